//! Cache of the text that lists contain for each sandbox. Few rows change from one list to the
//! next.

use std::collections::HashMap;

use bhatti_store::{SandboxRow, StoreError, StoredSandbox};
use bhatti_types::{SandboxId, Thermal};
use serde::Serialize;

/// Maximum size of the cache, in bytes (some eight thousand sandboxes), and of one entry. A
/// sandbox with larger environment variables is serialized for every list.
const KEPT_BYTES_MAX: usize = 8 << 20;
const LISTING_BYTES_MAX: usize = 16 << 10;

/// Overhead of an entry, in bytes.
const OVERHEAD_BYTES: usize = 128;

/// The cached texts, each with everything that it was made from.
#[derive(Default)]
pub(crate) struct Listings {
    kept: HashMap<SandboxId, Listing>,
    kept_bytes: usize,
    /// Content and text of the sandbox that was described last, whether or not it is cached.
    content: Vec<u8>,
    text: Vec<u8>,
}

struct Listing {
    content: Box<[u8]>,
    thermal: Option<Thermal>,
    text: Box<[u8]>,
}

impl Listing {
    const fn bytes(&self) -> usize {
        self.content.len() + self.text.len() + OVERHEAD_BYTES
    }
}

impl Listings {
    /// Returns the JSON that a list contains for a sandbox whose thermal state is `thermal`. If
    /// the row or the thermal state has changed, `describe` makes the JSON from the row.
    ///
    /// # Errors
    ///
    /// Returns an error if the row is damaged.
    pub(crate) fn text<T: Serialize>(
        &mut self,
        stored: &StoredSandbox<'_>,
        id: SandboxId,
        thermal: Option<Thermal>,
        describe: impl FnOnce(SandboxRow) -> T,
    ) -> Result<&[u8], StoreError> {
        let same = match self.kept.get(&id) {
            Some(kept) => kept.thermal == thermal && stored.is(&kept.content)?,
            None => false,
        };
        if same {
            return Ok(self.kept.get(&id).map_or(&[], |listing| &listing.text));
        }
        self.content.clear();
        stored.append_content(&mut self.content)?;
        self.text.clear();
        serde_json::to_writer(&mut self.text, &describe(stored.read()?))
            .map_err(|error| StoreError::Damaged(error.to_string()))?;
        let content = self.content.as_slice().into();
        self.keep(id, Listing { content, thermal, text: self.text.as_slice().into() });
        Ok(&self.text)
    }

    fn keep(&mut self, id: SandboxId, listing: Listing) {
        if let Some(earlier) = self.kept.remove(&id) {
            self.kept_bytes -= earlier.bytes();
        }
        if listing.bytes() > LISTING_BYTES_MAX {
            return;
        }
        if self.kept_bytes + listing.bytes() > KEPT_BYTES_MAX {
            // This also drops the entries of sandboxes that no longer exist.
            self.kept.clear();
            self.kept_bytes = 0;
        }
        self.kept_bytes += listing.bytes();
        self.kept.insert(id, listing);
    }
}

#[cfg(test)]
mod tests {
    use bhatti_store::{NewSandbox, SandboxChange, SandboxFilter, Store};
    use bhatti_types::{SandboxSpec, SandboxState, TimeLimit, UserId};

    use super::*;

    fn add(store: &Store, number: u16) -> SandboxId {
        let [high, low] = number.to_be_bytes();
        let id = SandboxId::from_entropy([0, 0, 0, 0, 0, 0, high, low]);
        let spec =
            SandboxSpec::plain(format!("s{number}").parse().unwrap(), "minimal".parse().unwrap());
        let new = NewSandbox {
            id,
            owner: UserId::ADMIN,
            spec,
            origin: "boot".to_owned(),
            agent_token: String::new(),
            time_limit: TimeLimit::default(),
            volumes: Vec::new(),
        };
        store.insert_sandbox(new).unwrap();
        id
    }

    /// Returns the texts of a list, and the number of rows that had to be described.
    fn list(
        store: &Store,
        listings: &mut Listings,
        thermal: Option<Thermal>,
    ) -> (Vec<String>, usize) {
        let (mut texts, mut made) = (Vec::new(), 0);
        let mut describe = |row: SandboxRow| {
            made += 1;
            format!("{} {} {thermal:?}", row.spec.name, row.state.as_str())
        };
        store
            .each_sandbox(UserId::ADMIN, &SandboxFilter::default(), |stored| {
                let text = listings.text(&stored, stored.id()?, thermal, &mut describe)?;
                texts.push(serde_json::from_slice(text).unwrap());
                Ok(())
            })
            .unwrap();
        texts.sort_unstable();
        (texts, made)
    }

    #[test]
    fn only_changed_rows_are_described_again() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        let ids = [1, 2].map(|number| add(&store, number));
        let mut listings = Listings::default();
        let mut list = |thermal| list(&store, &mut listings, thermal);
        let both = |first: &str, second: &str| vec![first.to_owned(), second.to_owned()];

        assert_eq!(list(None), (both("s1 creating None", "s2 creating None"), 2));
        assert_eq!(list(None), (both("s1 creating None", "s2 creating None"), 0));

        store.set_sandbox_state(&store.claim(ids[0]).unwrap(), SandboxState::Running).unwrap();
        assert_eq!(list(None), (both("s1 running None", "s2 creating None"), 1));

        let warm = Some(Thermal::Warm);
        let warmed = both("s1 running Some(Warm)", "s2 creating Some(Warm)");
        assert_eq!(list(warm), (warmed, 2), "the thermal state is not part of the row");

        let name = Some("other".parse().unwrap());
        store.change_sandbox(ids[1], SandboxChange { name, ..SandboxChange::default() }).unwrap();
        let renamed = both("other creating Some(Warm)", "s1 running Some(Warm)");
        assert_eq!(list(warm), (renamed, 1));

        store.delete_sandbox(&store.claim(ids[0]).unwrap()).unwrap();
        assert_eq!(list(warm), (vec!["other creating Some(Warm)".to_owned()], 0));
    }

    #[test]
    fn cache_stays_within_its_limits() {
        let mut listings = Listings::default();
        let id = |number: u64| SandboxId::from_entropy(number.to_be_bytes());
        let listing = |bytes: usize| {
            let text = vec![b'1'; bytes].into();
            Listing { content: Box::default(), thermal: None, text }
        };
        let size = LISTING_BYTES_MAX - OVERHEAD_BYTES;
        for number in 0..2000 {
            listings.keep(id(number), listing(size));
            let bytes: usize = listings.kept.values().map(Listing::bytes).sum();
            assert_eq!(listings.kept_bytes, bytes);
            assert!(bytes <= KEPT_BYTES_MAX);
            assert!(listings.kept.contains_key(&id(number)));
        }

        listings.keep(id(1999), listing(size + 1));

        assert!(!listings.kept.contains_key(&id(1999)), "the entry is too large");
    }

    #[test]
    fn sandbox_with_large_variables_is_listed_without_the_cache() {
        let place = tempfile::tempdir().unwrap();
        let store = Store::open(place.path()).unwrap();
        add(&store, 1);
        let mut listings = Listings::default();
        for _ in 0..2 {
            let mut listed = Vec::new();
            store
                .each_sandbox(UserId::ADMIN, &SandboxFilter::default(), |stored| {
                    let describe = |_| "v".repeat(LISTING_BYTES_MAX);
                    listed.push(listings.text(&stored, stored.id()?, None, describe)?.len());
                    Ok(())
                })
                .unwrap();
            assert_eq!(listed, [LISTING_BYTES_MAX + 2]);
            assert!(listings.kept.is_empty());
        }
    }
}
