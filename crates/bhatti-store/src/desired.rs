//! What users want: users, their quotas and API keys, sandboxes, snapshots, volumes, secrets,
//! templates, images and published ports. The control half writes these tables. The node that runs
//! a sandbox writes its state and report, and deletes its row, with a claim ([`claims`]).

pub(crate) mod claims;
pub(crate) mod idempotency;
pub(crate) mod images;
pub(crate) mod keys;
pub(crate) mod publications;
pub(crate) mod sandboxes;
pub(crate) mod secrets;
pub(crate) mod snapshots;
pub(crate) mod templates;
pub(crate) mod users;
pub(crate) mod volumes;
