//! Networks of sandboxes: which network a sandbox is in, and that its rules are in force before it
//! runs.
//!
//! The store holds the wanted state: an address belongs to a sandbox as long as its row exists.
//! The host's network is brought to that state before a VM runs, whatever starts the VM, and once
//! more after the row is deleted.

use std::io;
use std::net::Ipv4Addr;

use bhatti_net::{Host, NetError, Network, Plan, Port, Rules, tap_name};
use bhatti_proto::GuestNetwork;
use bhatti_store::{NetworkAssignError, NetworkRow, PortRow, SandboxRow, StoreError};
use bhatti_types::{NetworkMode, Report, SandboxId, UserId};
use ipnet::Ipv4Net;
use tokio::time::{Duration, sleep};
use tracing::{error, warn};

use crate::{Node, Shared};

/// Name of the guest's only network card.
const INTERFACE: &str = "eth0";

/// Interval of checks whether the firewall rules exist.
const RULES_LOOK: Duration = Duration::from_secs(10);

/// The settings of sandboxes' networks.
pub struct NetworkConfig {
    /// This host's network, or the reason why it cannot be used.
    pub host: Result<Host, String>,
    /// The range from which each user gets a network.
    pub range: Ipv4Net,
    /// Whether sandboxes reach this host's own addresses in the ranges that they are allowed.
    pub reach_host: bool,
}

/// A sandbox cannot have a network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// This daemon cannot set up networks.
    #[error("this daemon cannot set up networks: {0}")]
    Unavailable(String),
    /// No network is free for the owner.
    #[error(transparent)]
    Assign(#[from] NetworkAssignError),
    /// Another program uses an interface or a port that the network needs.
    #[error("the sandbox's network cannot be set up: {0}")]
    InTheWay(NetError),
    /// The host's network could not be changed.
    #[error("failed to set up the sandbox's network")]
    Host(#[source] NetError),
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<NetError> for NetworkError {
    fn from(error: NetError) -> Self {
        match error {
            NetError::Taken { .. } => Self::InTheWay(error),
            NetError::Resolver { ref source, .. } if source.kind() == io::ErrorKind::AddrInUse => {
                Self::InTheWay(error)
            }
            error => Self::Host(error),
        }
    }
}

impl Node {
    /// Returns the network mode of sandboxes whose requests name none.
    #[must_use]
    pub fn default_network(&self) -> NetworkMode {
        self.shared.default_network()
    }

    /// Returns the default network mode, or why sandboxes have no network.
    ///
    /// # Errors
    ///
    /// Returns why this host's network cannot be used.
    pub fn network(&self) -> Result<NetworkMode, &str> {
        let host = self.shared.config.network.host.as_ref();
        host.map(|_| self.shared.default_network()).map_err(String::as_str)
    }

    /// Returns an error if sandboxes cannot have a network on this host.
    ///
    /// # Errors
    ///
    /// Returns [`NetworkError::Unavailable`] with the reason.
    pub fn require_network(&self) -> Result<(), NetworkError> {
        self.shared.host().map(drop)
    }

    /// Assigns a network of this host to `owner`, unless it has one that can be used.
    ///
    /// # Errors
    ///
    /// Returns an error if no network is free or the host cannot be examined.
    pub async fn assign_network(&self, owner: UserId) -> Result<(), NetworkError> {
        let shared = &self.shared;
        let host = shared.host()?;
        if shared.store.is_network_used(owner)? {
            return Ok(());
        }
        let taken = host.taken().await?;
        let is_free = |row: &NetworkRow| !taken.holds(&network(row));
        shared.store.assign_network(owner, shared.config.network.range, is_free)?;
        Ok(())
    }

    /// Watches the firewall rules of sandboxes' networks for as long as the future is polled.
    pub async fn watch_networks(&self) {
        self.shared.watch_networks().await;
    }

    /// Updates the resolvers with the sandboxes' current names.
    pub fn rename_in_networks(&self) {
        self.shared.rename_in_networks();
    }
}

impl Shared {
    fn host(&self) -> Result<&Host, NetworkError> {
        let host = self.config.network.host.as_ref();
        host.map_err(|why| NetworkError::Unavailable(why.clone()))
    }

    /// Returns the network mode of sandboxes whose requests name none.
    pub(crate) fn default_network(&self) -> NetworkMode {
        match self.config.network.host {
            Ok(_) => NetworkMode::Nat,
            Err(_) => NetworkMode::None,
        }
    }

    /// Returns the network of a sandbox, if the sandbox has an address.
    fn network_of(
        &self,
        owner: UserId,
        address: Option<Ipv4Addr>,
    ) -> Result<Option<NetworkRow>, NetworkError> {
        match address {
            None => Ok(None),
            Some(_) => Ok(Some(self.store.find_network(owner)?.ok_or(StoreError::NoSuchRow)?)),
        }
    }

    /// Returns the wanted state of all networks, from the store.
    fn plan(&self) -> Result<Plan, NetworkError> {
        Ok(plan(&self.store.list_ports()?, self.config.network.reach_host))
    }

    /// Puts the rules of a sandbox's network in force.
    pub(crate) async fn enforce_network(
        &self,
        owner: UserId,
        address: Option<Ipv4Addr>,
    ) -> Result<(), NetworkError> {
        let Some(network) = self.network_of(owner, address)? else { return Ok(()) };
        self.host()?.apply(Some(network.number), || self.plan()).await
    }

    /// Connects a sandbox's tap with its owner's network.
    pub(crate) async fn connect_network(
        &self,
        id: SandboxId,
        owner: UserId,
        address: Option<Ipv4Addr>,
    ) -> Result<(), NetworkError> {
        let Some(network) = self.network_of(owner, address)? else { return Ok(()) };
        Ok(self.host()?.connect(&tap_name(id), network.number).await?)
    }

    /// Removes from the host what belonged to deleted sandboxes. If this fails, the next change
    /// removes it.
    pub(crate) async fn settle_networks(&self) {
        let Ok(host) = self.host() else { return };
        let settled: Result<(), NetworkError> = host.apply(None, || self.plan()).await;
        if let Err(error) = settled {
            error!(error = %Report(&error), "Failed to update this host's network");
        }
    }

    /// Disconnects a sandbox whose rules are not in force.
    pub(crate) async fn disconnect_network(&self, id: SandboxId) {
        let cut = match self.host() {
            Ok(host) => host.disconnect(&tap_name(id)).await.map_err(NetworkError::from),
            Err(error) => Err(error),
        };
        if let Err(error) = cut {
            error!(sandbox = %id, error = %Report(&error), "Failed to disconnect a sandbox whose rules are not in force");
        }
    }

    /// Restores the rules whenever they are lost: other programs may flush rules that they did not
    /// make.
    pub(crate) async fn watch_networks(&self) {
        let Ok(host) = self.host() else { return };
        match bhatti_net::obstacles().await {
            Ok(obstacles) => obstacles.iter().for_each(|obstacle| {
                warn!(%obstacle, "Another firewall blocks sandboxes; run `bhatti doctor` for the fix");
            }),
            Err(error) => warn!(error = %Report(&error), "Failed to inspect other firewalls"),
        }
        loop {
            tokio::select! {
                () = sleep(RULES_LOOK) => {}
                changed = host.rules_changed() => {
                    if let Err(error) = changed {
                        warn!(error = %Report(&error), "Failed to wait for changes of the firewall rules");
                        sleep(RULES_LOOK).await;
                    }
                }
            }
            let has_ports = self.store.list_ports().is_ok_and(|ports| !ports.is_empty());
            if !has_ports {
                continue;
            }
            match host.check_rules().await {
                Ok(Rules::Intact) => {}
                Ok(Rules::Changed) => {
                    warn!("The rules of the sandboxes' networks were changed; they are restored");
                    self.settle_networks().await;
                }
                Err(error) => {
                    warn!(error = %Report(&error), "Failed to check the rules of the sandboxes' networks");
                }
            }
        }
    }

    /// Updates the resolvers with the sandboxes' current names.
    pub(crate) fn rename_in_networks(&self) {
        let Ok(host) = self.host() else { return };
        match self.plan() {
            Ok(plan) => host.rename(&plan),
            Err(error) => {
                error!(error = %Report(&error), "Failed to update the resolvers with a new name");
            }
        }
    }
}

/// Returns the tap of this host at which a sandbox's network card ends, if it has one.
pub(crate) fn tap(id: SandboxId, has_network: bool) -> Option<String> {
    has_network.then(|| tap_name(id))
}

/// Returns the network and the name servers of a warm-up run. The address is in a range for
/// documentation.
pub(crate) fn warm_up() -> (GuestNetwork, Vec<String>) {
    (of_address(Ipv4Addr::new(192, 0, 2, 2)), vec![Ipv4Addr::UNSPECIFIED.to_string()])
}

/// Returns the network configuration and the name servers of a sandbox's guest.
pub(crate) fn of_guest(row: &SandboxRow) -> (Option<GuestNetwork>, Vec<String>) {
    let Some(address) = row.address else { return (None, Vec::new()) };
    let network = of_address(address);
    let dns = network.gateway.clone().into_iter().collect();
    (Some(network), dns)
}

fn of_address(address: Ipv4Addr) -> GuestNetwork {
    let [a, b, c, _] = address.octets();
    GuestNetwork {
        interface: INTERFACE.to_owned(),
        address: format!("{address}/24"),
        gateway: Some(Ipv4Addr::new(a, b, c, 1).to_string()),
        mac: Some(bhatti_net::Mac::of_guest(address).to_string()),
    }
}

/// Returns the epoch of a sandbox: half of its id, which is random.
fn epoch(sandbox: SandboxId) -> u32 {
    let id = sandbox.to_string();
    id.get(8..).and_then(|digits| u32::from_str_radix(digits, 16).ok()).unwrap_or_default().max(1)
}

fn network(row: &NetworkRow) -> Network {
    let NetworkRow { number, subnet } = *row;
    Network { number, subnet }
}

fn plan(rows: &[PortRow], reach_host: bool) -> Plan {
    let mut plan = Plan { reach_host, ..Plan::default() };
    for PortRow { sandbox, name, network: row, address, allow } in rows {
        let of_port = network(row);
        if !plan.networks.contains(&of_port) {
            plan.networks.push(of_port);
        }
        plan.ports.push(Port {
            tap: tap_name(*sandbox),
            network: of_port.number,
            address: *address,
            name: name.to_string(),
            allow: allow.clone(),
            epoch: epoch(*sandbox),
        });
    }
    plan
}
