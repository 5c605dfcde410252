//! The container's network card: a pair of interfaces, one of them on this host, where it is what a VM's tap is.
//!
//! Docker is told to give the container no network. Rules, bridges and addresses are then the same as for every other engine.

use std::io;

use rtnetlink::packet_route::link::{InfoData, InfoVeth};
use rtnetlink::{Handle, LinkMessageBuilder, LinkUnspec, LinkVeth};

/// The card's name in the container.
const CARD: &str = "eth0";

/// Makes the pair `tap` here and the card in the network of the process `pid`. It ends with that network.
pub(crate) async fn make(tap: &str, pid: u32) -> io::Result<()> {
    // One of an earlier run, whose network the kernel has not taken down yet.
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
