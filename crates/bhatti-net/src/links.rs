//! Interfaces, addresses and routes of this host, by route netlink.

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

/// The longest prefix of a default route and of the halves that some set up instead: no network of this host's own.
const DEFAULT_ROUTE_BITS: u8 = 1;

/// Link addresses that a bridge learns: a guest that shows others fills no memory of this host.
const LEARNED_MAX: u32 = 1024;

/// A way to the kernel's route netlink.
pub(crate) struct Links {
    handle: Handle,
    instance: Instance,
}

/// A bridge that is there.
pub(crate) struct Bridge {
    pub(crate) number: u32,
    index: u32,
    is_ours: bool,
}

/// What this host has already, so that nothing is given out twice.
#[derive(Clone, Debug, Default)]
pub struct Taken {
    bridges: Vec<u32>,
    ranges: Vec<Ipv4Net>,
}

impl Taken {
    /// Whether a network cannot be this one's because somebody else has its name or its addresses.
    #[must_use]
    pub fn holds(&self, network: &Network) -> bool {
        let overlaps =
            |range: &Ipv4Net| range.contains(&network.subnet) || network.subnet.contains(range);
        self.bridges.contains(&network.number) || self.ranges.iter().any(overlaps)
    }
}

impl Links {
    /// Must be called within a runtime, which then serves it.
    pub(crate) fn open(instance: Instance) -> io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(connection);
        Ok(Self { handle, instance })
    }

    /// What others have on this host.
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

    /// All interfaces with the name of a bridge of ours, whosever they are.
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

    /// Makes sure that the bridge of a network is there, with its address. Does nothing to one that is as it should be.
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
        self.handle.link().set(up).execute().await.map_err(NetError::netlink("start a bridge"))
    }

    async fn create_bridge(&self, name: &str) -> Result<u32, NetError> {
        let mark = Mac::of_bridges(self.instance).0.to_vec();
        // It learns nothing from frames that are for itself alone, which its rules do not see, and no more than a network can have.
        let bridge = LinkBridge::new(name).down().address(mark);
        let bridge = bridge.no_linklocal_learn(true).fdb_max_learned(LEARNED_MAX).build();
        let failed = NetError::netlink("create a bridge");
        self.handle.link().add(bridge).execute().await.map_err(failed)?;
        switch_off_ipv6(name)?;
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
                // Of a network that it was of before.
                let failed = NetError::netlink("take an address from a bridge");
                addresses.del(message).execute().await.map_err(failed)?;
            }
        }
        if is_there {
            return Ok(());
        }
        let failed = NetError::netlink("give a bridge its address");
        addresses.add(index, IpAddr::V4(gateway), bits).execute().await.map_err(failed)
    }

    /// Removes a bridge of ours. Whoever is left at it has nothing any more.
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

    /// Makes a tap a port of a bridge, and brings it up.
    pub(crate) async fn connect(&self, tap: &str, bridge: &str) -> Result<(), NetError> {
        switch_off_ipv6(tap)?;
        let (tap, bridge) = (self.index(tap).await?, self.index(bridge).await?);
        // Known to the rules, and only then a port.
        let group = LinkUnspec::new_with_index(tap).link_group(self.instance.0).build();
        let failed = NetError::netlink("mark a tap");
        self.handle.link().set(group).execute().await.map_err(failed)?;
        let port = LinkUnspec::new_with_index(tap).controller(bridge).up().build();
        self.handle.link().set(port).execute().await.map_err(NetError::netlink("connect a tap"))
    }

    /// Cuts a tap off.
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
        let failed = NetError::netlink("look for an interface");
        let mut found = self.handle.link().get().match_name(name.to_owned()).execute();
        let link = found.try_next().await.map_err(failed)?;
        let missing = || NetError::Missing { name: name.to_owned() };
        Ok(link.ok_or_else(missing)?.header.index)
    }
}

/// Keeps an interface that is not up yet from having an address of the sixth version: this host is not to be found under one.
fn switch_off_ipv6(interface: &str) -> Result<(), NetError> {
    let setting = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    match fs::write(&setting, "1") {
        Err(source) if source.kind() != io::ErrorKind::NotFound => {
            Err(NetError::File { path: setting, source })
        }
        // A kernel without it has nothing to switch off.
        _ => Ok(()),
    }
}
