//! Admission of sandboxes' networks.

use bhatti_types::{NetworkMode, NetworkSpec, UserId};
use ipnet::Ipv4Net;

use crate::Control;

/// A sandbox cannot have the requested network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The owner may not allow the range.
    #[error("only the admin may let a sandbox reach {0}")]
    NotAllowable(Ipv4Net),
    /// A range is allowed to a sandbox without a network.
    #[error("a sandbox without a network reaches nothing, so no range can be allowed to it")]
    NothingToAllow,
    /// The node cannot set the network up.
    #[error(transparent)]
    Node(#[from] bhatti_node::NetworkError),
}

impl Control {
    /// Admits a network for a sandbox of `owner`. Assigns the owner's network if it has none yet.
    pub(crate) async fn admit_network(
        &self,
        owner: UserId,
        wanted: &NetworkSpec,
    ) -> Result<(), NetworkError> {
        let NetworkSpec { mode, allow } = wanted;
        let node = &self.inner.node;
        if *mode == NetworkMode::None {
            if allow.ranges().is_empty() {
                return Ok(());
            }
            // If the mode is a default because this host has no network, that is the error.
            node.require_network()?;
            return Err(NetworkError::NothingToAllow);
        }
        node.require_network()?;
        if owner != UserId::ADMIN
            && let Some(range) = allow.first_outside(&self.inner.network_allowable)
        {
            return Err(NetworkError::NotAllowable(range));
        }
        Ok(node.assign_network(owner).await?)
    }
}
