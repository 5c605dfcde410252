//! The container's network card: a veth pair, whose end on this host takes the place of a VM's tap.
//!
//! Docker gives the container no network, so rules, bridges and addresses are the same as for every
//! other engine.

use std::io;

use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

/// The card's name in the container.
const CARD: &str = "eth0";

/// Makes a veth pair: `tap` on this host, and the card in the network namespace of the process
/// `pid`. The pair ends with that namespace.
pub(crate) async fn make(tap: &str, pid: u32) -> io::Result<()> {
    // Removes the pair of an earlier run, whose namespace the kernel has not removed yet.
    remove(tap).await?;
    let card = LinkMessageBuilder::<LinkUnspec>::new().name(CARD.to_owned()).setns_by_pid(pid);
    let pair = LinkMessageBuilder::<LinkVeth>::new(tap, CARD)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(card.build())))
        .build();
    with_netlink(async |handle| handle.link().add(pair).execute().await).await
}

/// Removes the pair, if it is there.
pub(crate) async fn remove(tap: &str) -> io::Result<()> {
    let link = LinkMessageBuilder::<LinkUnspec>::new().name(tap.to_owned()).build();
    with_netlink(async |handle| {
        let mut request = handle.link().del(0);
        *request.message_mut() = link;
        match request.execute().await {
            Err(rtnetlink::Error::NetlinkError(error))
                if error.raw_code() == -rustix::io::Errno::NODEV.raw_os_error() =>
            {
                Ok(())
            }
            removed => removed,
        }
    })
    .await
}

async fn with_netlink(
    act: impl AsyncFnOnce(&Handle) -> Result<(), rtnetlink::Error>,
) -> io::Result<()> {
    let (connection, handle, _) = rtnetlink::new_connection()?;
    let connection = tokio::spawn(connection);
    let done = act(&handle).await;
    connection.abort();
    done.map_err(io::Error::other)
}
