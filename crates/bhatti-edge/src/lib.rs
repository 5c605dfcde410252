//! The edge: where a connection becomes a request of a known caller that holds a permit.
//!
//! ```text
//!  accept (connections per address, TLS, HTTP/1.1 and HTTP/2, time limits)
//!    └► Identity (user, key, scope)
//!         └► Permit (requests in flight of that user), held until the last byte is sent
//!              └► handler ─► a body that ends with its key
//! ```
//!
//! Three properties hold here for all APIs: no user or peer holds more connections or requests than
//! its share, no stream outlives its key, and the daemon keeps nothing for a peer that is gone.

mod accept;
mod body;
mod drain;
mod identity;
mod keys;
mod permits;
mod tickets;
mod tls;

pub use accept::{Admitted, Peer, PeerSocket, Source, WithTls, serve};
pub use body::{end_input_with_key, end_with_key, hold};
pub use drain::{OF_STRANGERS_BYTES, drain};
pub use identity::{Identity, Key, Keyring};
pub use keys::{PREFIX as KEY_PREFIX, generate as generate_key, hash as hash_key, random_hex};
pub use permits::{Permit, Permits};
pub use tickets::{GOOD_FOR as TICKET_GOOD_FOR, PREFIX as TICKET_PREFIX, Tickets};
pub use tls::{Tls, TlsError};
