//! The network of this host, as the configuration wants it used.

use std::net::IpAddr;

use bhatti_net::{Host, Instance};
use bhatti_store::Store;
use bhatti_supervisor::NetworkConfig;
use bhatti_types::{Allowance, Report};

use crate::config::{Config, NetworkUse};
use crate::error::CliError;

/// Where this host says who knows names.
const RESOLVERS: &str = "/etc/resolv.conf";

/// What the supervisor makes networks with. Without what they need, sandboxes have none, and those that ask for one are told why.
pub(super) async fn open(config: &Config, store: &Store) -> Result<NetworkConfig, CliError> {
    let allowable = Allowance::parse(&config.network_allowable)
        .map_err(|error| CliError::of(&error).hint("see `network_allowable` in config.yaml"))?;
    let range = config.network_range()?;
    let instance = Instance(store.instance().map_err(|error| CliError::of(&error))?);
    let host = match config.network {
        NetworkUse::Off => Err("the configuration says `network: off`".to_owned()),
        NetworkUse::Auto => {
            let host = Host::open(instance, upstreams(config)).await;
            host.map_err(|error| Report(&error).to_string())
        }
    };
    Ok(NetworkConfig { host, range, allowable })
}

/// Who is asked for names that are no sandbox's.
fn upstreams(config: &Config) -> Vec<IpAddr> {
    if let Some(servers) = &config.dns {
        return servers.clone();
    }
    parse_resolvers(&std::fs::read_to_string(RESOLVERS).unwrap_or_default())
}

fn parse_resolvers(text: &str) -> Vec<IpAddr> {
    let server = |line: &str| line.strip_prefix("nameserver")?.trim().parse().ok();
    text.lines().filter_map(server).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn name_servers_are_those_of_the_host() {
        let text = "# made by hand\nnameserver 127.0.0.53\nnameserver\t::1\noptions edns0\n";
        let servers: Vec<IpAddr> = ["127.0.0.53", "::1"].map(|it| it.parse().unwrap()).to_vec();
        assert_eq!(parse_resolvers(text), servers);
    }
}
