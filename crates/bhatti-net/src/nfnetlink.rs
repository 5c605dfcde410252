//! Operations of the packet filter that nft(8) does not do well: forgetting connections, and
//! noticing that rules were changed.
//!
//! Messages are built by hand, because there are only three of them. Numbers and layouts are
//! those of linux/netlink.h, linux/netfilter/nfnetlink.h, nfnetlink_conntrack.h and nf_tables.h.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with,
};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// `NLM_F_REQUEST` and `NLM_F_ACK`.
const REQUEST: u16 = 1;
const ACK: u16 = 4;
/// `NLMSG_ERROR`: an error, or with the number 0 an acknowledgment.
const ERROR: u16 = 2;

/// `NFNL_SUBSYS_CTNETLINK`, `IPCTNL_MSG_CT_DELETE`, `CTA_MARK` and `CTA_MARK_MASK`.
const CT_DELETE: u16 = 1 << 8 | 2;
const CTA_MARK: u16 = 8;
const CTA_MARK_MASK: u16 = 21;

/// `NFNL_SUBSYS_NFTABLES`, `NFT_MSG_NEWGEN`, `NFT_MSG_GETGEN` and `NFTA_GEN_ID`.
const NEWGEN: u16 = 10 << 8 | 15;
const GETGEN: u16 = 10 << 8 | 16;
const GEN_ID: u16 = 1;

/// The bit of `NFNLGRP_NFTABLES` in the groups that a socket is bound to.
const NFTABLES_GROUP: u32 = 1 << (7 - 1);

/// Bytes of `struct nlmsghdr`, of `struct nfgenmsg` and of `struct nlattr`.
const HEADER: usize = 16;
const FAMILY_HEADER: usize = 4;
const ATTRIBUTE_HEADER: usize = 4;

/// Timeout for the kernel's answer: the kernel searches all of its connections.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// Bytes that one read takes.
const ANSWER_BYTES: usize = 8192;

/// Makes the kernel forget the connections with this mark. Blocks until it has.
///
/// # Errors
///
/// Returns the kernel's error. It is no error if there is no such connection.
pub(crate) fn forget_connections(mark: u32) -> io::Result<()> {
    let attributes = [(CTA_MARK, mark), (CTA_MARK_MASK, u32::MAX)];
    match ask(CT_DELETE, REQUEST | ACK, &attributes, acknowledged) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        forgotten => forgotten,
    }
}

/// Returns the generation of this host's rules: the number of changes made to them by any
/// process. Packets do not change it.
///
/// # Errors
///
/// Returns the kernel's error.
pub(crate) fn generation() -> io::Result<u32> {
    ask(GETGEN, REQUEST, &[], |kind, body| match kind {
        NEWGEN => attribute(body.get(FAMILY_HEADER..)?, GEN_ID).map(Ok),
        _ => acknowledged(kind, body)
            .map(|outcome| outcome.and(Err(io::ErrorKind::InvalidData.into()))),
    })
}

/// Reports changes to the rules of this host.
pub(crate) struct RulesWatch(AsyncFd<OwnedFd>);

impl RulesWatch {
    /// Starts to watch. Must be called within a runtime.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = open(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
        bind(&socket, &SocketAddrNetlink::new(0, NFTABLES_GROUP))?;
        Ok(Self(bhatti_host::socket::watch(socket, Interest::READABLE)?))
    }

    /// Waits until the rules have changed, and consumes all pending notices.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub(crate) async fn changed(&self) -> io::Result<()> {
        let mut ready = self.0.readable().await?;
        let mut buffer = vec![0; ANSWER_BYTES];
        loop {
            match recv(self.0.get_ref(), &mut buffer[..], RecvFlags::empty()) {
                Ok(_) => {}
                Err(error) => {
                    ready.clear_ready();
                    // The socket lost notices because its buffer was full, so the rules have
                    // changed.
                    let is_full = error == rustix::io::Errno::NOBUFS;
                    let is_over = error == rustix::io::Errno::AGAIN || is_full;
                    return if is_over { Ok(()) } else { Err(error.into()) };
                }
            }
        }
    }
}

fn open(flags: SocketFlags) -> io::Result<OwnedFd> {
    Ok(socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(NETFILTER))?)
}

/// Sends a request, and receives messages until one of them is the answer.
fn ask<T>(
    kind: u16,
    flags: u16,
    attributes: &[(u16, u32)],
    answer: impl Fn(u16, &[u8]) -> Option<io::Result<T>>,
) -> io::Result<T> {
    let socket = open(SocketFlags::CLOEXEC)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(ANSWER_LIMIT))?;
    bind(&socket, &SocketAddrNetlink::new(0, 0))?;
    send(&socket, &message(kind, flags, attributes), SendFlags::empty())?;
    let mut buffer = vec![0; ANSWER_BYTES];
    loop {
        let (_, length) = recv(&socket, &mut buffer[..], RecvFlags::empty())?;
        if let Some(answered) =
            messages(&buffer[..length]).find_map(|(kind, body)| answer(kind, body))
        {
            return answered;
        }
    }
}

fn message(kind: u16, flags: u16, attributes: &[(u16, u32)]) -> Vec<u8> {
    let mut body = vec![0; FAMILY_HEADER];
    for (kind, value) in attributes {
        body.extend(8u16.to_ne_bytes());
        body.extend(kind.to_ne_bytes());
        body.extend(value.to_be_bytes());
    }
    let length = u32::try_from(HEADER + body.len()).unwrap_or(u32::MAX);
    let mut message = length.to_ne_bytes().to_vec();
    message.extend(kind.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    // Sequence number and sender stay 0, because each socket carries one request.
    message.extend([0; 8]);
    message.extend(body);
    message
}

/// Splits a buffer into messages, as type and body. A malformed message ends the iteration.
fn messages(mut buffer: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = u32::from_ne_bytes(buffer.get(..4)?.try_into().ok()?) as usize;
        let kind = u16::from_ne_bytes(buffer.get(4..6)?.try_into().ok()?);
        let body = buffer.get(HEADER..length)?;
        buffer = buffer.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, body))
    })
}

/// Parses an acknowledgment or an error of the kernel.
fn acknowledged(kind: u16, body: &[u8]) -> Option<io::Result<()>> {
    if kind != ERROR {
        return None;
    }
    let code = i32::from_ne_bytes(body.get(..4)?.try_into().ok()?);
    Some(if code == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(-code)) })
}

/// Returns the number in the attribute `wanted`.
fn attribute(mut attributes: &[u8], wanted: u16) -> Option<u32> {
    loop {
        let length = usize::from(u16::from_ne_bytes(attributes.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(attributes.get(2..4)?.try_into().ok()?);
        let value = attributes.get(ATTRIBUTE_HEADER..length)?;
        if kind == wanted {
            return Some(u32::from_be_bytes(value.try_into().ok()?));
        }
        attributes = attributes.get(length.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn malformed_input_ends_parsing() {
        assert_eq!(messages(&[1, 2, 3]).count(), 0);
        assert_eq!(messages(&[0; 64]).count(), 0, "a message has at least its header");
        assert_eq!(attribute(&[3, 0, 1, 0, 5], GEN_ID), None);
        assert_eq!(attribute(&[8, 0, 1, 0, 0, 0, 1, 2], GEN_ID), Some(258));
    }

    #[test]
    fn kernel_reports_its_generation() {
        if !bhatti_testkit::enter_own_network() {
            bhatti_testkit::skip("the generation of the rules", "a network namespace needs root");
            return;
        }
        let first = generation().unwrap();

        assert_eq!(generation().unwrap(), first);
        forget_connections(7).unwrap();
    }
}
