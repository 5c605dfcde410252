//! Interfaces, addresses and routes of this host, through route netlink.

use bhatti_host::blocking;
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use futures_util::TryStreamExt;
use ipnet::Ipv4Net;
use rtnetlink::packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute};
use rtnetlink::{Handle, LinkBridge, LinkUnspec, RouteMessageBuilder};

use crate::names::{Instance, Mac, bridge_name, bridge_number};
use crate::{NetError, Network};

/// The longest prefix of a default route, and of the two halves that some software sets up
/// instead. Such a route does not stand for a network of this host.
const DEFAULT_ROUTE_BITS: u8 = 1;

/// Maximum of link addresses that a bridge learns, so that a guest that uses many fills no memory
/// of this host.
const LEARNED_MAX: u32 = 1024;

/// A connection to the kernel's route netlink.
pub(crate) struct Links {
    handle: Handle,
    instance: Instance,
}

/// A bridge that exists on this host.
pub(crate) struct Bridge {
    pub(crate) number: u32,
    index: u32,
    is_ours: bool,
}

/// Networks that this host already has, so that none is assigned twice.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    bridges: Vec<u32>,
    ranges: Vec<Ipv4Net>,
}

impl Taken {
    /// Whether `network` cannot be assigned because another owner has its name or some of its
    /// addresses.
    #[must_use]
    pub fn holds(&self, network: &Network) -> bool {
        let overlaps =
            |range: &Ipv4Net| range.contains(&network.subnet) || network.subnet.contains(range);
        self.bridges.contains(&network.number) || self.ranges.iter().any(overlaps)
    }
}

impl Links {
    /// Opens route netlink. Must be called within a runtime, which then drives the connection.
    pub(crate) fn open(instance: Instance) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, instance })
    }

    /// Returns the networks on this host that do not belong to this daemon.
    pub(crate) async fn taken(&self) -> Result<Taken, NetError> {
        let bridges = self.bridges().await?;
        let (ours, others): (Vec<_>, Vec<_>) = bridges.iter().partition(|bridge| bridge.is_ours);
        let ours: Vec<u32> = ours.iter().map(|bridge| bridge.index).collect();
        let failed = NetError::netlink("list the routes");
        let routes = self.handle.route().get(RouteMessageBuilder::<Ipv4Addr>::new().build());
        let routes: Vec<_> = routes.execute().try_collect().await.map_err(failed)?;
        let mut ranges = Vec::new();
        for route in routes {
            let bits = route.header.destination_prefix_length;
            let (mut to, mut over) = (None, None);
            for attribute in route.attributes {
                match attribute {
                    RouteAttribute::Destination(RouteAddress::Inet(address)) => to = Some(address),
                    RouteAttribute::Oif(index) => over = Some(index),
                    _ => {}
                }
            }
            let of_ours = over.is_some_and(|index| ours.contains(&index));
            let range = to.and_then(|address| Ipv4Net::new(address, bits).ok());
            ranges.extend(range.filter(|_| bits > DEFAULT_ROUTE_BITS && !of_ours));
        }
        Ok(Taken { bridges: others.iter().map(|bridge| bridge.number).collect(), ranges })
    }

    /// Returns all interfaces that are named like our bridges, including those of other owners.
    pub(crate) async fn bridges(&self) -> Result<Vec<Bridge>, NetError> {
        let failed = NetError::netlink("list the interfaces");
        let links: Vec<_> =
            self.handle.link().get().execute().try_collect().await.map_err(failed)?;
        Ok(links.iter().filter_map(|link| self.as_bridge(link)).collect())
    }

    fn as_bridge(&self, link: &LinkMessage) -> Option<Bridge> {
        let (mut number, mut is_bridge, mut is_marked) = (None, false, false);
        for attribute in &link.attributes {
            match attribute {
                LinkAttribute::IfName(name) => number = bridge_number(name),
                LinkAttribute::Address(address) => {
                    is_marked = address == &Mac::of_bridges(self.instance).0;
                }
                LinkAttribute::LinkInfo(infos) => {
                    is_bridge = infos.contains(&LinkInfo::Kind(InfoKind::Bridge));
                }
                _ => {}
            }
        }
        Some(Bridge { number: number?, index: link.header.index, is_ours: is_bridge && is_marked })
    }

    /// Makes sure that the bridge of a network exists and has its address. Leaves a bridge alone
    /// that already does.
    pub(crate) async fn ensure_bridge(
        &self,
        network: &Network,
        there: &[Bridge],
    ) -> Result<(), NetError> {
        let name = bridge_name(network.number);
        let found = there.iter().find(|bridge| bridge.number == network.number);
        let index = match found {
            Some(bridge) if bridge.is_ours => bridge.index,
            Some(_) => return Err(NetError::Taken { name }),
            None => self.create_bridge(&name).await?,
        };
        self.ensure_address(index, network).await?;
        let up = LinkUnspec::new_with_index(index).up().build();
        self.handle.link().set(up).execute().await.map_err(NetError::netlink("bring a bridge up"))
    }

    async fn create_bridge(&self, name: &str) -> Result<u32, NetError> {
        let mark = Mac::of_bridges(self.instance).0.to_vec();
        // The bridge learns nothing from link-local frames, which its rules do not see, and
        // learns a limited number of addresses.
        let bridge = LinkBridge::new(name).down().address(mark);
        let bridge = bridge.no_linklocal_learn(true).fdb_max_learned(LEARNED_MAX).build();
        let failed = NetError::netlink("create a bridge");
        self.handle.link().add(bridge).execute().await.map_err(failed)?;
        blocking(|| switch_off_ipv6(name))?;
        self.index(name).await
    }

    async fn ensure_address(&self, index: u32, network: &Network) -> Result<(), NetError> {
        let (gateway, bits) = (network.gateway(), network.subnet.prefix_len());
        let addresses = self.handle.address();
        let failed = NetError::netlink("list a bridge's addresses");
        let listed = addresses.get().set_link_index_filter(index).execute();
        let listed: Vec<_> = listed.try_collect().await.map_err(failed)?;
        let mut is_there = false;
        for message in listed {
            use rtnetlink::packet_route::address::AddressAttribute::Address;
            let bits_match = message.header.prefix_len == bits;
            let right = message.attributes.contains(&Address(IpAddr::V4(gateway)));
            if right && bits_match {
                is_there = true;
            } else {
                // An address of a network that had this bridge before.
                let failed = NetError::netlink("remove an address from a bridge");
                addresses.del(message).execute().await.map_err(failed)?;
            }
        }
        if is_there {
            return Ok(());
        }
        let failed = NetError::netlink("add an address to a bridge");
        addresses.add(index, IpAddr::V4(gateway), bits).execute().await.map_err(failed)
    }

    /// Removes a bridge of ours, and takes down the interfaces that are connected to it.
    pub(crate) async fn remove_bridge(&self, bridge: &Bridge) -> Result<(), NetError> {
        if !bridge.is_ours {
            return Ok(());
        }
        let failed = NetError::netlink("list the interfaces");
        let links: Vec<_> =
            self.handle.link().get().execute().try_collect().await.map_err(failed)?;
        let port = LinkAttribute::Controller(bridge.index);
        for link in links.iter().filter(|link| link.attributes.contains(&port)) {
            self.take_down(link.header.index).await?;
        }
        let removed = self.handle.link().del(bridge.index).execute().await;
        removed.map_err(NetError::netlink("remove a bridge"))
    }

    /// Connects a tap to a bridge, and brings it up.
    pub(crate) async fn connect(&self, tap: &str, bridge: &str) -> Result<(), NetError> {
        blocking(|| switch_off_ipv6(tap))?;
        let (tap, bridge) = (self.index(tap).await?, self.index(bridge).await?);
        // Mark the tap for the rules before it becomes a port.
        let group = LinkUnspec::new_with_index(tap).link_group(self.instance.0).build();
        let failed = NetError::netlink("mark a tap");
        self.handle.link().set(group).execute().await.map_err(failed)?;
        let port = LinkUnspec::new_with_index(tap).controller(bridge).up().build();
        self.handle.link().set(port).execute().await.map_err(NetError::netlink("connect a tap"))
    }

    /// Takes a tap down.
    pub(crate) async fn disconnect(&self, tap: &str) -> Result<(), NetError> {
        let index = self.index(tap).await?;
        self.take_down(index).await
    }

    async fn take_down(&self, index: u32) -> Result<(), NetError> {
        let down = LinkUnspec::new_with_index(index).down().build();
        let taken = self.handle.link().set(down).execute().await;
        taken.map_err(NetError::netlink("take an interface down"))
    }

    async fn index(&self, name: &str) -> Result<u32, NetError> {
        let failed = NetError::netlink("look up an interface");
        let mut found = self.handle.link().get().match_name(name.to_owned()).execute();
        let link = found.try_next().await.map_err(failed)?;
        let missing = || NetError::Missing { name: name.to_owned() };
        Ok(link.ok_or_else(missing)?.header.index)
    }
}

/// Keeps an interface that is not up yet from getting an IPv6 address, so that guests cannot
/// reach this host over IPv6.
fn switch_off_ipv6(interface: &str) -> Result<(), NetError> {
    let setting = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(&setting, "1") {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NetError::File { path: setting, source })
        }
        // A kernel without IPv6 has no such setting.
        _ => Ok(()),
    }
}
