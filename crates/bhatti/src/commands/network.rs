//! The network of this host, as the configuration wants it used.

use bhatti_net::{Host, Instance, PrivateNames, Upstreams};
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
            let private_names =
                if config.dns_private_names { PrivateNames::Asked } else { PrivateNames::Denied };
            let host = Host::open(instance, upstreams(config), private_names).await;
            host.map_err(|error| Report(&error).to_string())
        }
    };
    Ok(NetworkConfig { host, range, allowable, reach_host: config.network_reach_host })
}

/// Who is asked for names that are no sandbox's.
fn upstreams(config: &Config) -> Upstreams {
    let servers = config.dns.clone().map(Upstreams::Fixed);
    servers.unwrap_or_else(|| Upstreams::In(RESOLVERS.into()))
}
