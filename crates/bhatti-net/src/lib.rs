//! The networks of sandboxes on this host.
//!
//! ```text
//!  sandbox ─ eth0 ═ bh… (tap) ─┐                         ┌─ this host: refused, but for names
//!  sandbox ─ eth0 ═ bh… (tap) ─┴─ bhatti<n> (bridge) ────┼─ other networks: refused
//!                                 10.213.<n>.1/24        └─ elsewhere: masqueraded
//! ```
//!
//! One bridge per user. What there is to be is a [`Plan`], declared as a whole; [`Host::apply`] makes the host so, and may be called again
//! at any time. What is on the host and not this daemon's own is never touched: bridges carry its mark in their link address, the tables of
//! the packet filter its name. Taps are the VMMs': they end with them, so none can be left over.

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

/// The packet filter's program.
const NFT: &str = "nft";

/// Whether this host passes on what is not for itself.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// A user's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Network {
    /// Its number on this host.
    pub number: u32,
    /// Its addresses: 256 of them.
    pub subnet: Ipv4Net,
}

/// A sandbox's place in a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// The interface on this host.
    pub tap: String,
    /// The number of its network.
    pub network: u32,
    /// The sandbox's address.
    pub address: Ipv4Addr,
    /// What siblings call it.
    pub name: String,
    /// What it may reach beyond what everybody may.
    pub allow: Allowance,
    /// A number of the sandbox's own, never 0, which its connections carry as a mark: those of an earlier sandbox with its address are known
    /// by another one.
    pub epoch: u32,
}

/// All that there is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// The networks in which there are sandboxes.
    pub networks: Vec<Network>,
    /// The sandboxes, whether they have a VM or not.
    pub ports: Vec<Port>,
    /// Whether sandboxes reach this host's own addresses in the ranges that they are allowed.
    pub reach_host: bool,
}

impl Plan {
    /// One with everything in it that a plan can have.
    fn sample() -> Self {
        let range = NEVER_REACHED[0];
        let network = Network { number: 0, subnet: range };
        let allow = Allowance::parse(&["192.0.2.0/24"]).unwrap_or_default();
        let (tap, name) = ("bh0".to_owned(), "sample".to_owned());
        let port = Port { tap, network: 0, address: network.gateway(), name, allow, epoch: 1 };
        Self { networks: vec![network], ports: vec![port], reach_host: false }
    }
}

/// The host's network could not be made what it is to be.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The kernel refused something.
    #[error("failed to {step}: {message}")]
    Netlink {
        /// What was being done.
        step: &'static str,
        /// What it said.
        message: String,
    },
    /// No tap can be made.
    #[error("failed to make a tap")]
    Tap(#[source] io::Error),
    /// Netlink cannot be used.
    #[error("failed to open netlink")]
    Open(#[source] io::Error),
    /// An interface of this name is somebody else's.
    #[error("the interface `{name}` belongs to somebody else")]
    Taken {
        /// Its name.
        name: String,
    },
    /// An interface is not there.
    #[error("there is no interface `{name}`")]
    Missing {
        /// Its name.
        name: String,
    },
    /// The packet filter did not take the rules.
    #[error("nft refused the rules: {message}")]
    Rules {
        /// What it said.
        message: String,
    },
    /// The packet filter's program cannot be run.
    #[error("failed to run `nft`")]
    Nft(#[source] io::Error),
    /// A setting of the kernel cannot be made.
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
        /// Where.
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
    /// One change at a time, and one list of everything: the kernel has busy sockets start no second.
    changing: Mutex<Applied>,
    /// Changes that have been asked for.
    asked: AtomicU64,
}

/// How far the host has come.
#[derive(Debug, Default)]
struct Applied {
    /// The changes that the last one covers: its plan was read after they had been asked for.
    asked: u64,
    /// Networks that could not be set up then.
    failed: Vec<u32>,
    /// What the rules were declared for last, if it is known.
    rules: Option<Plan>,
    /// The number of changes to this host's rules when they were last known to be what was declared.
    generation: Option<u32>,
    /// How nft lists what was declared last, once it was looked at.
    listing: Option<String>,
}

/// What a look at the rules found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// They are what was declared.
    Intact,
    /// They are gone, or were changed.
    Changed,
}

impl Host {
    /// Takes hold of the host's network, and sees whether it can be changed. Must be called within a runtime. Names that are no sandbox's
    /// are asked of `upstreams`, those of private networks only if `private_names` says so.
    ///
    /// # Errors
    ///
    /// Returns why it cannot be changed.
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

    /// Whether this host has what a sandbox needs.
    async fn check(&self) -> Result<(), NetError> {
        bhatti_host::tap::check().map_err(NetError::Tap)?;
        // Rules of every kind, of which nothing stays. Who may make them may make taps; to make one and take it away would take 20 ms.
        nft(&["--check"], &rules::script(self.instance, &Plan::sample())).await?;
        Ok(())
    }

    /// Whether the rules are what was declared last, to the last element of their sets. After [`Rules::Changed`] the next [`apply`](Self::apply)
    /// declares them as a whole.
    ///
    /// # Errors
    ///
    /// Returns an error if they cannot be looked at.
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
            // Nobody else has changed anything since they were declared.
            None if is_ours => applied.listing = Some(there),
            Some(declared) if *declared == there => applied.generation = Some(generation),
            _ => {
                (applied.rules, applied.generation, applied.listing) = (None, None, None);
                return Ok(Rules::Changed);
            }
        }
        Ok(Rules::Intact)
    }

    /// Waits until somebody, which may be this daemon, has changed the rules of this host.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel does not tell.
    ///
    /// # Cancel safety
    ///
    /// Cancel safe.
    pub async fn rules_changed(&self) -> Result<(), NetError> {
        self.watch.changed().await.map_err(NetError::Open)
    }

    /// Cuts a sandbox's tap off.
    ///
    /// # Errors
    ///
    /// Returns an error if it is not there.
    pub async fn disconnect(&self, tap: &str) -> Result<(), NetError> {
        self.links.disconnect(tap).await
    }

    /// What others have on this host.
    ///
    /// # Errors
    ///
    /// Returns an error if the kernel does not say.
    pub async fn taken(&self) -> Result<Taken, NetError> {
        let _turn = self.changing.lock().await;
        self.links.taken().await
    }

    /// Makes the host what `plan` says, and what is there beyond it, of this daemon's, goes. `plan` is asked for when it is this change's turn.
    ///
    /// # Errors
    ///
    /// Returns what could not be done, unless it is about another network than the one of the number `needed`: that is logged, for nobody
    /// suffers by it who asked. The rules are then the new ones or the old ones, never in between.
    pub async fn apply<E: From<NetError>>(
        &self,
        needed: Option<u32>,
        plan: impl FnOnce() -> Result<Plan, E>,
    ) -> Result<(), E> {
        let mine = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut applied = self.changing.lock().await;
        let has_failed = needed.is_some_and(|network| applied.failed.contains(&network));
        if applied.asked >= mine && !has_failed {
            // Another change came first, whose plan had what this one is for.
            return Ok(());
        }
        let asked = self.asked.load(Ordering::SeqCst);
        let plan = plan()?;
        applied.failed = self.make_so(needed, &plan, &mut applied).await?;
        applied.asked = asked;
        Ok(())
    }

    /// Returns the networks that could not be set up and that nobody asked for.
    async fn make_so(
        &self,
        needed: Option<u32>,
        plan: &Plan,
        applied: &mut Applied,
    ) -> Result<Vec<u32>, NetError> {
        let mut failed = Vec::new();
        let there = self.links.bridges().await?;
        // The rules come first, and go last: no bridge is ever without them.
        self.declare(plan, applied).await?;
        for network in &plan.networks {
            match self.set_up(network, &there).await {
                Err(error) if needed != Some(network.number) => {
                    let bridge = bridge_name(network.number);
                    tracing::error!(bridge, error = %Report(&error), "A network cannot be set up");
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
            enable_forwarding()?;
        }
        Ok(failed)
    }

    /// Puts the rules of `plan` in force, and has the kernel forget the connections of sandboxes that are gone.
    async fn declare(&self, plan: &Plan, applied: &mut Applied) -> Result<(), NetError> {
        // Unknown until it is done: who is cancelled does not hear whether the kernel took it.
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
        // If there was another change in between, the next look does not know what to expect, and they are declared anew.
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

    /// Changes what siblings are called, and nothing else.
    pub fn rename(&self, plan: &Plan) {
        self.resolver.keep(plan);
    }

    /// Connects a sandbox's tap with its network. Before that, nothing passes it.
    ///
    /// # Errors
    ///
    /// Returns an error if either is not there.
    pub async fn connect(&self, tap: &str, network: u32) -> Result<(), NetError> {
        self.links.connect(tap, &bridge_name(network)).await
    }
}

/// See [`nfnetlink::generation`].
async fn generation() -> Result<u32, NetError> {
    let asked = tokio::task::spawn_blocking(nfnetlink::generation).await;
    asked.map_err(io::Error::other).flatten().map_err(NetError::Open)
}

/// Has the kernel forget connections. One that it does not forget takes room for a while, and passes nothing.
async fn forget_connections(epochs: Vec<u32>) {
    if epochs.is_empty() {
        return;
    }
    let forget = move || epochs.into_iter().try_for_each(nfnetlink::forget_connections);
    if let Err(error) =
        tokio::task::spawn_blocking(forget).await.map_err(io::Error::other).flatten()
    {
        tracing::warn!(%error, "Connections of sandboxes that are gone were not forgotten");
    }
}

/// Has `nft` do a script, all of it or nothing. Returns what it prints.
async fn nft(arguments: &[&str], script: &str) -> Result<String, NetError> {
    let mut nft = command(NFT);
    nft.args(arguments).args(["-f", "-"]).stdin(Stdio::piped());
    nft.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut process = nft.spawn().map_err(NetError::Nft)?;
    let input = process.stdin.take();
    let written = async {
        if let Some(mut input) = input {
            // If it closes the pipe, it says itself why.
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

/// Has this host pass on what is not for itself: without that, nothing leaves a network.
fn enable_forwarding() -> Result<(), NetError> {
    let failed = |source| NetError::File { path: FORWARDING.to_owned(), source };
    if std::fs::read_to_string(FORWARDING).map_err(failed)?.trim() == "0" {
        std::fs::write(FORWARDING, "1").map_err(failed)?;
        tracing::info!("This host forwards packets from now on, for its sandboxes");
    }
    Ok(())
}
