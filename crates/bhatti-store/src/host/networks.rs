//! The table of networks: one for each user who has had a sandbox with a network card.

use std::collections::HashSet;
use std::net::Ipv4Addr;

use bhatti_types::{Allowance, QuotaExceeded, SandboxId, SandboxName, UserId};
use ipnet::Ipv4Net;
use rusqlite::{Connection, OptionalExtension, Row, params};

use crate::{RowName, Store, StoreError, from_json, immediate, parsed, sound_rows};

/// The prefix length of a network.
const NETWORK_BITS: u8 = 24;

/// The range of the sandboxes' addresses in a network, by last octet. Address 1 is the host's.
const FIRST_ADDRESS: u8 = 2;
const LAST_ADDRESS: u8 = 254;

/// A user's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NetworkRow {
    /// The network's number on this host.
    pub number: u32,
    /// The network's addresses.
    pub subnet: Ipv4Net,
}

/// A sandbox with a network card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortRow {
    /// The sandbox.
    pub sandbox: SandboxId,
    /// Name of the sandbox.
    pub name: SandboxName,
    /// The owner's network.
    pub network: NetworkRow,
    /// Address of the sandbox.
    pub address: Ipv4Addr,
    /// Ranges that the sandbox may reach in addition to those that every sandbox may reach.
    pub allow: Allowance,
}

/// No network could be assigned to a user.
#[derive(Debug, thiserror::Error)]
pub enum NetworkAssignError {
    /// All networks are assigned or in use on this host.
    #[error("no network in {range} is free; change `network_range` in the configuration")]
    Exhausted {
        /// The configured range.
        range: Ipv4Net,
    },
    /// The store failed.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<rusqlite::Error> for NetworkAssignError {
    fn from(error: rusqlite::Error) -> Self {
        Self::Store(error.into())
    }
}

impl Store {
    /// Returns the number that tells this store's daemon from others on the host.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn instance(&self) -> Result<u32, StoreError> {
        self.work(|connection| {
            Ok(connection.query_row("SELECT number FROM instance", [], |row| row.get(0))?)
        })
    }

    /// Returns the network of `owner`, if assigned.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn find_network(&self, owner: UserId) -> Result<Option<NetworkRow>, StoreError> {
        self.work(|connection| network_of(connection, owner))
    }

    /// Whether sandboxes of `owner` have addresses in the owner's network.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn is_network_used(&self, owner: UserId) -> Result<bool, StoreError> {
        self.work(|connection| Ok(!addresses_of(connection, owner)?.is_empty()))
    }

    /// Assigns to `owner` the first network of `range` that no user has and that `is_free`
    /// accepts. A network already assigned to `owner` stays, if `is_free` accepts it or sandboxes
    /// use it.
    ///
    /// # Errors
    ///
    /// Returns [`NetworkAssignError::Exhausted`] if there is none.
    pub fn assign_network(
        &self,
        owner: UserId,
        range: Ipv4Net,
        is_free: impl Fn(&NetworkRow) -> bool,
    ) -> Result<NetworkRow, NetworkAssignError> {
        self.work(|connection| {
            let transaction = immediate(connection)?;
            if let Some(network) = network_of(&transaction, owner)? {
                if is_free(&network) || !addresses_of(&transaction, owner)?.is_empty() {
                    return Ok(network);
                }
                transaction
                    .execute("DELETE FROM networks WHERE owner = ?1", [owner.to_string()])?;
            }
            let others = all(&transaction)?;
            let is_nobodys = |network: &NetworkRow| {
                others.iter().all(|other| {
                    other.number != network.number && !other.subnet.contains(&network.subnet)
                })
            };
            let subnets = range.subnets(NETWORK_BITS).into_iter().flatten();
            let mut networks =
                (0..).zip(subnets).map(|(number, subnet)| NetworkRow { number, subnet });
            let found = networks.find(|network| is_nobodys(network) && is_free(network));
            let network = found.ok_or(NetworkAssignError::Exhausted { range })?;
            transaction.execute(
                "INSERT INTO networks (owner, number, subnet) VALUES (?1, ?2, ?3)",
                params![owner.to_string(), network.number, network.subnet.to_string()],
            )?;
            transaction.commit()?;
            Ok(network)
        })
    }

    /// Returns the sandboxes of all users that have a network card. Damaged rows are logged and
    /// skipped.
    ///
    /// # Errors
    ///
    /// Returns an error if the store fails.
    pub fn list_ports(&self) -> Result<Vec<PortRow>, StoreError> {
        self.work(|connection| {
            let mut query = connection.prepare_cached(
                "SELECT number, subnet, id, name, address, network_allow FROM addresses
                 JOIN sandboxes ON id = sandbox_id JOIN networks ON networks.owner = sandboxes.owner
                 ORDER BY created_at, id",
            )?;
            sound_rows(&mut query, [], RowName("sandbox's network", 2), port)
        })
    }
}

fn port(row: &Row<'_>) -> Result<PortRow, StoreError> {
    let text = |index: usize| row.get::<_, String>(index);
    Ok(PortRow {
        network: network(row)?,
        sandbox: parsed(text(2)?.parse())?,
        name: parsed(text(3)?.parse())?,
        address: parsed(text(4)?.parse())?,
        allow: allowance(&text(5)?)?,
    })
}

fn network(row: &Row<'_>) -> Result<NetworkRow, StoreError> {
    Ok(NetworkRow { number: row.get(0)?, subnet: parsed(row.get::<_, String>(1)?.parse())? })
}

/// Parses a column of allowed ranges.
pub(crate) fn allowance(text: &str) -> Result<Allowance, StoreError> {
    parsed(Allowance::parse(&from_json::<Vec<String>>(text)?))
}

fn all(connection: &Connection) -> Result<Vec<NetworkRow>, StoreError> {
    let mut query = connection.prepare_cached("SELECT number, subnet FROM networks")?;
    sound_rows(&mut query, [], RowName("network", 1), network)
}

fn network_of(connection: &Connection, owner: UserId) -> Result<Option<NetworkRow>, StoreError> {
    let mut query =
        connection.prepare_cached("SELECT number, subnet FROM networks WHERE owner = ?1")?;
    query.query_row([owner.to_string()], |row| Ok(network(row))).optional()?.transpose()
}

fn addresses_of(connection: &Connection, owner: UserId) -> Result<HashSet<Ipv4Addr>, StoreError> {
    let mut query = connection.prepare_cached("SELECT address FROM addresses WHERE owner = ?1")?;
    // A damaged address is of no use to others either: it is unique.
    let addresses = sound_rows(&mut query, [owner.to_string()], RowName("address", 0), |row| {
        parsed(row.get::<_, String>(0)?.parse())
    })?;
    Ok(addresses.into_iter().collect())
}

/// No address could be assigned.
pub(crate) enum AddressError {
    Quota(QuotaExceeded),
    Store(StoreError),
}

impl From<StoreError> for AddressError {
    fn from(error: StoreError) -> Self {
        Self::Store(error)
    }
}

/// Assigns an address to a sandbox, until the sandbox's row is deleted.
pub(crate) fn keep_address(
    connection: &Connection,
    sandbox: SandboxId,
    owner: UserId,
    address: Ipv4Addr,
) -> Result<(), StoreError> {
    let mut insert = connection.prepare_cached("INSERT INTO addresses VALUES (?1, ?2, ?3)")?;
    insert.execute([sandbox.to_string(), owner.to_string(), address.to_string()])?;
    Ok(())
}

/// Returns the first address in the network of `owner` that no sandbox has.
pub(crate) fn free_address(
    connection: &Connection,
    owner: UserId,
) -> Result<Ipv4Addr, AddressError> {
    let network = network_of(connection, owner)?.ok_or(StoreError::NoSuchRow)?;
    let used = addresses_of(connection, owner)?;
    let [a, b, c, _] = network.subnet.network().octets();
    let mut addresses = (FIRST_ADDRESS..=LAST_ADDRESS).map(|d| Ipv4Addr::new(a, b, c, d));
    addresses.find(|address| !used.contains(address)).ok_or_else(|| {
        let used = u32::try_from(used.len()).unwrap_or(u32::MAX);
        AddressError::Quota(QuotaExceeded::Count { what: "network address", used, max: used })
    })
}

#[cfg(test)]
mod tests {
    use bhatti_types::{NetworkMode, NetworkSpec, Quota};

    use super::*;
    use crate::InsertError;
    use crate::desired::sandboxes::tests::new;

    fn store() -> (tempfile::TempDir, Store) {
        let data = tempfile::tempdir().unwrap();
        let store = Store::open(data.path()).unwrap();
        (data, store)
    }

    fn range(text: &str) -> Ipv4Net {
        text.parse().unwrap()
    }

    fn user(store: &Store, number: u8) -> UserId {
        let id = UserId::from_entropy([number; 8]);
        let name = format!("user-{number}").parse().unwrap();
        store.insert_user(name, id, &[number; 32], Quota::default()).unwrap();
        id
    }

    #[test]
    fn networks_are_assigned_once_and_skipped_if_not_free() {
        let (_data, store) = store();
        let (alice, bob) = (user(&store, 1), user(&store, 2));

        let hers = store.assign_network(alice, range("10.213.0.0/22"), |_| true).unwrap();
        let his = store.assign_network(bob, range("10.213.0.0/22"), |it| it.number != 1).unwrap();

        assert_eq!((hers.number, hers.subnet), (0, range("10.213.0.0/24")));
        assert_eq!((his.number, his.subnet), (2, range("10.213.2.0/24")));
        assert_eq!(store.assign_network(alice, range("10.9.0.0/16"), |_| true).unwrap(), hers);
        let moved = store.assign_network(alice, range("10.213.0.0/22"), |it| it.number == 3);
        assert_eq!(moved.unwrap().number, 3, "no sandbox uses alice's network");
        let carol = user(&store, 3);
        let none = store.assign_network(carol, range("10.213.2.0/24"), |_| true);
        assert!(matches!(none, Err(NetworkAssignError::Exhausted { .. })));
    }

    #[test]
    fn network_numbers_exceed_a_byte() {
        let (_data, store) = store();
        for (owner, wanted, subnet) in [
            (1, 0, "10.0.0.0/24"),
            (2, 254, "10.0.254.0/24"),
            (3, 255, "10.0.255.0/24"),
            (4, 256, "10.1.0.0/24"),
            (5, 65_535, "10.255.255.0/24"),
        ] {
            let owner = user(&store, owner);
            let network =
                store.assign_network(owner, range("10.0.0.0/8"), |it| it.number == wanted);
            assert_eq!(network.unwrap().subnet, range(subnet));
        }
    }

    #[test]
    fn first_free_address_is_assigned_and_freed_addresses_are_reused() {
        let (_data, store) = store();
        let alice = user(&store, 1);
        store.assign_network(alice, range("10.213.0.0/16"), |_| true).unwrap();
        let add = |number: u8| {
            let mut new = new(SandboxId::from_entropy([number; 8]));
            new.owner = alice;
            new.spec.name = format!("s{number}").parse().unwrap();
            new.spec.network = NetworkSpec {
                mode: NetworkMode::Nat,
                allow: Allowance::parse(&["10.1.1.1"]).unwrap(),
            };
            store.insert_sandbox(new)
        };
        for number in 0..253 {
            let row = add(number).unwrap();
            assert_eq!(row.address, Some(Ipv4Addr::new(10, 213, 0, number + 2)));
        }
        assert!(matches!(
            add(253),
            Err(InsertError::Quota(QuotaExceeded::Count { used: 253, .. }))
        ));

        store.delete_sandbox(&store.claim(SandboxId::from_entropy([7; 8])).unwrap()).unwrap();

        assert_eq!(add(254).unwrap().address, Some(Ipv4Addr::new(10, 213, 0, 9)));
        let ports = store.list_ports().unwrap();
        assert_eq!(ports.len(), 253);
        assert_eq!(ports[0].allow.to_texts(), ["10.1.1.1/32"]);
    }
}
