//! What is true of this host alone: the node's id, networks and addresses. The node writes these
//! tables. They are never shared with other hosts.

pub(crate) mod networks;
