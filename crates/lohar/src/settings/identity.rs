//! Identity after restore: the properties that a restored guest must not share with its parent.

use std::io;
use std::rc::Rc;

use bhatti_proto::{Applied, GuestNetwork, Identity, IdentityReport};

use super::{start_init_of, system, write_files};
use crate::Agent;
use crate::clock::{clock, feed_random, set_clock};
use crate::refusal::OpError;
use crate::{log, netlink, suspend};

/// Serves one `IDENTITY_REQ`: applies every part, even if one fails, and reports each. Only then
/// does the agent thaw the users' processes.
pub(crate) async fn assume(agent: &Rc<Agent>, identity: &Identity) -> IdentityReport {
    let report = apply(agent, identity).await;
    IdentityReport { clock_ns: clock(), ..report }
}

async fn apply(agent: &Rc<Agent>, identity: &Identity) -> IdentityReport {
    let config = &identity.config;
    let guest = |apply: &dyn Fn() -> io::Result<()>| {
        if agent.place.has_kernel() { applied(apply()) } else { Applied::Nothing }
    };
    // First: every step before this one would make the clock lag.
    let wall_clock = guest(&|| set_clock(identity.wall_clock_ns));
    let network = config.network.as_ref().filter(|_| agent.place.has_kernel());
    let (addresses, connections) = move_to(network, &config.dns);
    // Before the files: some may be on a volume.
    let first_setup = if agent.settings.borrow().configured || identity.rehearsal {
        Applied::Nothing
    } else {
        guest(&|| {
            let applied = system::apply_once(config, system::Disks::Exchanged);
            applied.map_err(|error| io::Error::other(error.message))
        })
    };
    let files = match write_files(agent, config).await {
        Ok(()) if config.files.is_empty() => Applied::Nothing,
        Ok(()) => Applied::Done,
        Err(OpError::Refused(error)) => Applied::Failed { message: error.message },
        Err(OpError::HostGone) => Applied::Failed { message: "interrupted".to_owned() },
    };
    let report = IdentityReport {
        rng: guest(&|| feed_random(&identity.entropy)),
        wall_clock,
        hostname: guest(&|| system::set_hostname(&config.hostname)),
        machine_id: guest(&|| system::set_machine_id(&identity.machine_id)),
        token: Applied::Done,
        environment: if identity.rehearsal || !agent.place.has_kernel() {
            Applied::Done
        } else {
            applied(system::write_variables(&config.env))
        },
        files,
        addresses,
        first_setup,
        connections,
        clock_ns: None,
    };
    if identity.rehearsal {
        if let Some(network) = network
            && let Err(error) = rehearse_network(network, &config.dns)
        {
            log::line(format_args!("failed to set up the network in the warm-up run: {error}"));
        }
        suspend::thaw(agent);
        return report;
    }
    let first = !agent.settings.borrow().configured;
    agent.settings.borrow_mut().take_over(config);
    suspend::thaw(agent);
    if first {
        start_init_of(agent, &config.init);
    }
    report
}

/// Gives the network card its address, and cuts the connections of its old address. The agent's
/// own connections ended with the channel.
fn move_to(network: Option<&GuestNetwork>, dns: &[String]) -> (Applied, Applied) {
    let Some(network) = network else { return (Applied::Nothing, Applied::Nothing) };
    match netlink::configure(network) {
        Ok(left) => {
            // With a new address, the name servers change, too.
            if !left.is_empty()
                && !dns.is_empty()
                && let Err(error) = system::set_resolvers(dns)
            {
                return (applied(Err(error)), Applied::Nothing);
            }
            let connections = match netlink::cut_connections(&left) {
                Ok(0) => Applied::Nothing,
                cut => applied(cut.map(drop)),
            };
            (Applied::Done, connections)
        }
        Err(error) => (applied(Err(error)), Applied::Nothing),
    }
}

/// Performs the other network steps of a new sandbox in the warm-up run. Removes the addresses
/// again, so that the sandbox has nothing to undo.
fn rehearse_network(network: &GuestNetwork, dns: &[String]) -> io::Result<()> {
    system::set_resolvers(dns)?;
    netlink::forget(&network.interface)
}

fn applied(result: io::Result<()>) -> Applied {
    match result {
        Ok(()) => Applied::Done,
        Err(error) => Applied::Failed { message: error.to_string() },
    }
}
