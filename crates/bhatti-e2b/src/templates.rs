//! Builds of templates that SDKs follow, and the files that they have uploaded for them.
//!
//! Both are in memory: a build ends with its daemon, and an SDK sends files again that are not
//! there. What stays is the template itself.

pub(crate) mod annex;
pub(crate) mod build;
pub(crate) mod steps;
pub(crate) mod uploads;

use std::collections::BTreeMap;
use std::sync::Arc;

use bhatti_types::UserId;
use parking_lot::Mutex;

use build::Build;

/// The maximum number of a user's builds that are remembered. The oldest that does not run goes
/// first.
const BUILDS_MAX: usize = 32;

/// The builds of all users, by owner, and by age within each.
#[derive(Default)]
pub(crate) struct Builds(Mutex<BTreeMap<UserId, Vec<Arc<Build>>>>);

impl Builds {
    /// Adds a build. Returns `false` if the owner has too many builds that run.
    pub(crate) fn add(&self, owner: UserId, build: Arc<Build>) -> bool {
        let mut all = self.0.lock();
        let own = all.entry(owner).or_default();
        if own.len() >= BUILDS_MAX {
            let Some(oldest) = own.iter().position(|build| !build.runs()) else { return false };
            own.remove(oldest);
        }
        own.push(build);
        true
    }

    /// Returns a build of a user.
    pub(crate) fn find(&self, owner: UserId, template: &str, id: &str) -> Option<Arc<Build>> {
        let all = self.0.lock();
        let mut own = all.get(&owner)?.iter();
        own.find(|build| build.id == id && build.name == template).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn oldest_builds_are_forgotten_unless_they_run() {
        let builds = Builds::default();
        let owner = UserId::ADMIN;
        let build = |number: usize| Arc::new(Build::new(number.to_string(), "t".to_owned()));
        for number in 0..BUILDS_MAX {
            assert!(builds.add(owner, build(number)));
        }
        assert!(builds.find(owner, "t", "0").unwrap().begin());
        assert!(builds.add(owner, build(BUILDS_MAX)));

        assert!(builds.find(owner, "t", "0").is_some() && builds.find(owner, "t", "1").is_none());
        assert!(builds.find(owner, "other", "2").is_none());
        assert!(builds.find(UserId::from_entropy([1; 8]), "t", "2").is_none());
        for number in 2..=BUILDS_MAX {
            assert!(builds.find(owner, "t", &number.to_string()).unwrap().begin());
        }
        assert!(!builds.add(owner, build(100)), "all builds run");
    }
}
