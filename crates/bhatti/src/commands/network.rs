//! Opens this host's network as the configuration says.

use bhatti_net::{Host, Instance, PrivateNames, Upstreams};
use bhatti_node::NetworkConfig;
use bhatti_store::Store;
use bhatti_types::Report;

use crate::config::{Config, NetworkUse};
use crate::error::CliError;

/// File that lists this host's name servers.
const RESOLVERS: &str = "/etc/resolv.conf";

/// Returns the settings of sandboxes' networks. If this host cannot have networks, they hold the
/// reason, and requests for a network are refused with it.
pub(super) async fn open(config: &Config, store: &Store) -> Result<NetworkConfig, CliError> {
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
    Ok(NetworkConfig { host, range, reach_host: config.network_reach_host })
}

/// Returns the name servers for names that belong to no sandbox.
fn upstreams(config: &Config) -> Upstreams {
    let servers = config.dns.clone().map(Upstreams::Fixed);
    servers.unwrap_or_else(|| Upstreams::In(RESOLVERS.into()))
}
