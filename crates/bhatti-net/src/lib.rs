//! The networks of sandboxes on this host.
//!
//! ```text
//!  sandbox ─ eth0 ═ bh… (tap) ─┐                         ┌─ this host: refused, except DNS
//!  sandbox ─ eth0 ═ bh… (tap) ─┴─ bhatti<n> (bridge) ────┼─ other networks: refused
//!                                 10.213.<n>.1/24        └─ elsewhere: masqueraded
//! ```
//!
//! Each user has one bridge. A [`Plan`] declares the whole target state; [`Host::apply`] brings
//! the host to that state, and may be called again at any time. It never touches interfaces and
//! tables of other owners: the daemon's bridges carry its mark in their link address, and the
//! tables of the packet filter carry its name. Taps belong to the VMMs and end with them, so no
//! tap is left over.

mod links;
mod names;
mod nfnetlink;
mod others;
mod resolver;
mod rules;

use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::Stdio;
use std::sync::atomic::{AtomicU64, Ordering};

use bhatti_host::blocking;
use bhatti_host::process::command;
use bhatti_types::{Allowance, NEVER_REACHED, Report};
use ipnet::Ipv4Net;
use tokio::io::AsyncWriteExt;
use tokio::sync::Mutex;

pub use links::Taken;
pub use names::{Instance, Mac, bridge_name, tap_name};
pub use others::{Kept, Obstacle, obstacles};
pub use resolver::{PrivateNames, Upstreams};

use links::Links;
use nfnetlink::RulesWatch;
use resolver::Resolver;

/// The program that controls the packet filter.
const NFT: &str = "nft";

/// The kernel setting that makes this host forward packets.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// A user's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// The network's number on this host.
    pub number: u32,
    /// The network's 256 addresses.
    pub subnet: Ipv4Net,
}

/// A sandbox's place in a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The interface on this host.
    pub tap: String,
    /// The number of the sandbox's network.
    pub network: u32,
    /// The sandbox's address.
    pub address: Ipv4Addr,
    /// The name under which siblings find the sandbox.
    pub name: String,
    /// Ranges that the sandbox may reach beyond those that all sandboxes may.
    pub allow: Allowance,
    /// The sandbox's unique number, never 0. Its connections carry the number as a mark, so that
    /// connections of an earlier sandbox with the same address can be told apart.
    pub epoch: u32,
}

/// The target state of the host's network.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The networks that have sandboxes.
    pub networks: Vec<Network>,
    /// The sandboxes, with or without a VM.
    pub ports: Vec<Port>,
    /// Whether sandboxes reach this host's own addresses in their allowed ranges.
    pub reach_host: bool,
}

impl Plan {
    /// Returns a plan that uses every feature of a plan.
    fn sample() -> Self {
        let range = NEVER_REACHED[0];
        let network = Network { number: 0, subnet: range };
        let allow = Allowance::parse(&["192.0.2.0/24"]).unwrap_or_default();
        let (tap, name) = ("bh0".to_owned(), "sample".to_owned());
        let port = Port { tap, network: 0, address: network.gateway(), name, allow, epoch: 1 };
        Self { networks: vec![network], ports: vec![port], reach_host: false }
    }
}

/// The host's network could not be brought to the target state.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refused a request.
    #[error("failed to {step}: {message}")]
    Netlink {
        /// The step that failed.
        step: &'static str,
        /// The kernel's message.
        message: String,
    },
    /// A tap cannot be made.
    #[error("failed to make a tap")]
    Tap(#[source] io::Error),
    /// Netlink cannot be used.
    #[error("failed to open netlink")]
    Open(#[source] io::Error),
    /// An interface of this name does not belong to this daemon.
    #[error("the interface `{name}` does not belong to this daemon")]
    Taken {
        /// The interface's name.
        name: String,
    },
    /// An interface does not exist.
    #[error("there is no interface `{name}`")]
    Missing {
        /// The interface's name.
        name: String,
    },
    /// The packet filter refused the rules.
    #[error("nft refused the rules: {message}")]
    Rules {
        /// The message of `nft`.
        message: String,
    },
    /// The packet filter's program cannot be run.
    #[error("failed to run `nft`")]
    Nft(#[source] io::Error),
    /// A setting of the kernel cannot be written.
    #[error("failed to write `{path}`")]
    File {
        /// The setting.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The resolver of a network cannot listen.
    #[error("failed to listen on {address}")]
    Resolver {
        /// Address to listen on.
        address: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl NetError {
    fn netlink(step: &'static str) -> impl Fn(rtnetlink::Error) -> Self {
        move |error| {
            let message = match error {
                rtnetlink::Error::NetlinkError(error) => error.to_io().to_string(),
                error => error.to_string(),
            };
            Self::Netlink { step, message }
        }
    }
}

/// This host's network, as one daemon sees it.
pub struct Host {
    instance: Instance,
    links: Links,
    resolver: Resolver,
    watch: RulesWatch,
    /// Serializes changes and netlink dumps: the kernel refuses to start a second dump on a busy
    /// socket.
    changing: Mutex<Applied>,
    /// Number of changes requested so far.
    asked: AtomicU64,
}

/// The state that the host is known to have.
#[derive(Debug, Default)]
struct Applied {
    /// Number of requests that the last change covers: its plan was read after they had been
    /// made.
    asked: u64,
    /// Networks that the last change could not set up.
    failed: Vec<u32>,
    /// The plan of which the rules are in force, if it is known.
    rules: Option<Plan>,
    /// Generation of this host's rules when they were last known to match the declared ones.
    generation: Option<u32>,
    /// nft's listing of the declared rules, after the first check.
    listing: Option<String>,
}

/// The result of a check of the rules.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// The rules match the declared ones.
    Intact,
    /// The rules are gone, or were changed.
    Changed,
}

impl Host {
    /// Opens the host's network, and checks that it can be changed. Must be called within a
    /// runtime. The resolvers ask `upstreams` for names other than those of sandboxes, and for
    /// names of private networks only if `private_names` says so.
    ///
    /// # Errors
    ///
    /// Returns why the network cannot be changed.
    pub async fn open(
        instance: Instance,
        upstreams: Upstreams,
        private_names: PrivateNames,
    ) -> Result<Self, NetError> {
        let links = Links::open(instance).map_err(NetError::Open)?;
        let resolver = Resolver::new(upstreams, private_names);
        let host = Self {
            instance,
            links,
            resolver,
            watch: RulesWatch::open().map_err(NetError::Open)?,
            changing: Mutex::default(),
            asked: AtomicU64::new(0),
        };
        host.check().await?;
        Ok(host)
    }

    /// Checks that this host supports networks of sandboxes.
    async fn check(&self) -> Result<(), NetError> {
        bhatti_host::tap::check().map_err(NetError::Tap)?;
        // Checks rules of every kind without applying them. A process that may make rules may
        // also make taps; making and removing one as a test would take 20 ms.
        nft(&["--check"], &rules::script(self.instance, &Plan::sample())).await?;
        Ok(())
    }

    /// Checks whether the rules match those declared last, down to each element of their sets.
    /// After [`Rules::Changed`] the next [`apply`](Self::apply) declares the rules as a whole.
    ///
    /// # Errors
    ///
    /// Returns an error if the rules cannot be listed.
    pub async fn check_rules(&self) -> Result<Rules, NetError> {
        let mut applied = self.changing.lock().await;
        if applied.rules.is_none() {
            return Ok(Rules::Changed);
        }
        let generation = generation().await?;
        if Some(generation) == applied.generation && applied.listing.is_some() {
            return Ok(Rules::Intact);
        }
        let ruleset = nft(&["--stateless"], "list ruleset\n").await?;
        let there = rules::declared_part(self.instance, &ruleset);
        let is_ours = Some(generation) == applied.generation;
        match &applied.listing {
            // Only this daemon has changed rules since they were declared.
            None if is_ours => applied.listing = Some(there),
            Some(declared) if *declared == there => applied.generation = Some(generation),
            _ => {
                (applied.rules, applied.generation, applied.listing) = (None, None, None);
                return Ok(Rules::Changed);
            }
        }
        Ok(Rules::Intact)
    }

    /// Waits until the rules of this host change. The change may be this daemon's own.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel does not report changes.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn rules_changed(&self) -> Result<(), NetError> {
        self.watch.changed().await.map_err(NetError::Open)
    }

    /// Takes a sandbox's tap down.
    ///
    /// # Errors
    ///
    /// Returns an error if there is no such tap.
    pub async fn disconnect(&self, tap: &str) -> Result<(), NetError> {
        self.links.disconnect(tap).await
    }

    /// Returns the networks on this host that do not belong to this daemon.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel does not list them.
    pub async fn taken(&self) -> Result<Taken, NetError> {
        let _turn = self.changing.lock().await;
        self.links.taken().await
    }

    /// Brings the host to the state of `plan`, and removes everything else of this daemon's.
    /// Calls `plan` when it is this change's turn.
    ///
    /// # Errors
    ///
    /// Returns the first failure. A network other than `needed` that cannot be set up is only
    /// logged, because the caller does not depend on it. After an error, the rules are either the
    /// new ones or the old ones, never a mixture.
    pub async fn apply<E: From<NetError>>(
        &self,
        needed: Option<u32>,
        plan: impl FnOnce() -> Result<Plan, E>,
    ) -> Result<(), E> {
        let mine = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut applied = self.changing.lock().await;
        let has_failed = needed.is_some_and(|network| applied.failed.contains(&network));
        if applied.asked >= mine && !has_failed {
            // An earlier change read its plan after this one was requested, so it covers this
            // one.
            return Ok(());
        }
        let asked = self.asked.load(Ordering::SeqCst);
        let plan = plan()?;
        applied.failed = self.make_so(needed, &plan, &mut applied).await?;
        applied.asked = asked;
        Ok(())
    }

    /// Returns the numbers of the networks that could not be set up, except `needed`.
    async fn make_so(
        &self,
        needed: Option<u32>,
        plan: &Plan,
        applied: &mut Applied,
    ) -> Result<Vec<u32>, NetError> {
        let mut failed = Vec::new();
        let there = self.links.bridges().await?;
        // The rules are added first and removed last, so no bridge is ever without them.
        self.declare(plan, applied).await?;
        for network in &plan.networks {
            match self.set_up(network, &there).await {
                Err(error) if needed != Some(network.number) => {
                    let bridge = bridge_name(network.number);
                    tracing::error!(bridge, error = %Report(&error), "Failed to set up a network");
                    failed.push(network.number);
                }
                done => done?,
            }
        }
        for bridge in &there {
            if !plan.networks.iter().any(|network| network.number == bridge.number) {
                self.links.remove_bridge(bridge).await?;
            }
        }
        self.resolver.keep(plan);
        if !plan.networks.is_empty() {
            blocking(enable_forwarding)?;
        }
        Ok(failed)
    }

    /// Puts the rules of `plan` in force, and makes the kernel forget the connections of
    /// sandboxes that are gone.
    async fn declare(&self, plan: &Plan, applied: &mut Applied) -> Result<(), NetError> {
        // Unknown until it is done: if this future is dropped, the kernel may or may not have the
        // new rules.
        let before = applied.rules.take();
        let known = applied.generation.take();
        let change = before.as_ref().and_then(|before| rules::change(self.instance, before, plan));
        let is_same = change.as_ref().is_some_and(String::is_empty);
        let changed = match change {
            Some(change) if !is_same => nft(&[], &change).await.is_ok(),
            Some(_) => true,
            None => false,
        };
        if !changed {
            nft(&[], &rules::script(self.instance, plan)).await?;
        }
        let generation = generation().await?;
        let (expected, listing) = match known {
            Some(known) if is_same => (known, applied.listing.take()),
            Some(known) => (known.wrapping_add(1), None),
            None => (generation, None),
        };
        // If there was another change in between, the expected generation is unknown at the next
        // check, and the rules are declared again.
        applied.generation = (generation == expected).then_some(generation);
        applied.listing = listing;
        applied.rules = Some(plan.clone());
        let gone = before.iter().flat_map(|before| &before.ports);
        let epochs = gone
            .filter(|port| plan.ports.iter().all(|there| there.epoch != port.epoch))
            .map(|port| port.epoch)
            .collect();
        forget_connections(epochs).await;
        Ok(())
    }

    async fn set_up(&self, network: &Network, there: &[links::Bridge]) -> Result<(), NetError> {
        self.links.ensure_bridge(network, there).await?;
        self.resolver.serve(network)
    }

    /// Changes only the names under which siblings find sandboxes.
    pub fn rename(&self, plan: &Plan) {
        self.resolver.keep(plan);
    }

    /// Connects a sandbox's tap to its network. No packets pass the tap before that.
    ///
    /// # Errors
    ///
    /// Returns an error if the tap or the network's bridge does not exist.
    pub async fn connect(&self, tap: &str, network: u32) -> Result<(), NetError> {
        self.links.connect(tap, &bridge_name(network)).await
    }
}

/// See [`nfnetlink::generation`].
async fn generation() -> Result<u32, NetError> {
    let asked = tokio::task::spawn_blocking(nfnetlink::generation).await;
    asked.map_err(io::Error::other).flatten().map_err(NetError::Open)
}

/// Makes the kernel forget connections. A connection that it does not forget takes up memory
/// until it expires, but passes no packets.
async fn forget_connections(epochs: Vec<u32>) {
    if epochs.is_empty() {
        return;
    }
    let forget = move || epochs.into_iter().try_for_each(nfnetlink::forget_connections);
    if let Err(error) =
        tokio::task::spawn_blocking(forget).await.map_err(io::Error::other).flatten()
    {
        tracing::warn!(%error, "Failed to make the kernel forget connections of removed sandboxes");
    }
}

/// Runs a script with `nft`, which applies all of it or nothing. Returns the output of `nft`.
async fn nft(arguments: &[&str], script: &str) -> Result<String, NetError> {
    let mut nft = command(NFT);
    nft.args(arguments).args(["-f", "-"]).stdin(Stdio::piped());
    nft.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = nft.spawn().map_err(NetError::Nft)?;
    let input = process.stdin.take();
    let written = async {
        if let Some(mut input) = input {
            // If nft closes the pipe, its error output gives the reason.
            drop(input.write_all(script.as_bytes()).await);
        }
    };
    let ((), output) = tokio::join!(written, process.wait_with_output());
    let output = output.map_err(NetError::Nft)?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let message = String::from_utf8_lossy(&output.stderr);
    let first: Vec<&str> = message.lines().take(3).collect();
    Err(NetError::Rules { message: first.join(" ") })
}

/// Enables forwarding on this host: without it, no packets leave a network.
fn enable_forwarding() -> Result<(), NetError> {
    let failed = |source| NetError::File { path: FORWARDING.to_owned(), source };
    if std::fs::read_to_string(FORWARDING).map_err(failed)?.trim() == "0" {
        std::fs::write(FORWARDING, "1").map_err(failed)?;
        tracing::info!("Enabled packet forwarding on this host for sandboxes");
    }
    Ok(())
}
