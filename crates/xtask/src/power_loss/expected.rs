//! The state that a recovered daemon must have, and the faults in the state that it has.

use std::collections::{BTreeMap, BTreeSet};

use super::recovered::Seen;
use super::scenario::Recorded;

/// The promises of the responses that were given before a flush was done.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Expected {
    /// The state of each subject; an empty state means that the subject is gone.
    states: BTreeMap<String, String>,
    /// Subjects of calls in progress, which may have the old or the new state.
    under_way: BTreeSet<String>,
    /// The ids of subjects whose files must still exist.
    ids: BTreeMap<String, String>,
}

impl Expected {
    /// Returns what must hold if the power is cut when the log has `until` entries.
    pub(super) fn at(calls: &[Recorded], until: u64) -> Self {
        let mut expected = Self::default();
        for call in calls.iter().filter(|call| call.error.is_none()) {
            if call.after > until {
                if call.before <= until {
                    expected.under_way.insert(call.subject.clone());
                    // If the sandbox may be gone, its data may be gone, too.
                    expected.under_way.insert(call.subject.replace("sandbox:", "data:"));
                }
                continue;
            }
            expected.take_over(call);
        }
        expected
    }

    fn take_over(&mut self, call: &Recorded) {
        let state = call.state.clone().unwrap_or_default();
        self.states.insert(call.subject.clone(), state);
        match (&call.state, &call.id) {
            (None, _) => {
                self.ids.remove(&call.subject);
                if call.subject.starts_with("sandbox:") {
                    self.states.remove(&call.subject.replace("sandbox:", "data:"));
                }
            }
            (Some(_), Some(id)) => {
                self.ids.insert(call.subject.clone(), id.clone());
            }
            (Some(_), None) => {}
        }
    }

    /// Returns the faults of a recovered data directory, a line each.
    pub(super) fn faults(&self, seen: &Seen) -> Vec<String> {
        let mut faults = Vec::new();
        if let Some(why) = &seen.unusable {
            return vec![format!("daemon: {why}")];
        }
        for (subject, promised) in &self.states {
            let found = seen.states.get(subject).map_or("", String::as_str);
            let data_unknown =
                subject.strip_prefix("data:").is_some_and(|name| !seen.starts.contains_key(name));
            // A VM that ran when the power was cut is gone, but its disk is not.
            let lost_its_vm = promised == "running" && found == "failed";
            if found != promised
                && !lost_its_vm
                && !data_unknown
                && !self.under_way.contains(subject)
            {
                faults.push(format!("{subject}: `{promised}` was promised, `{found}` was found"));
            }
        }
        for (name, outcome) in &seen.starts {
            if let Some(why) = outcome.strip_prefix("no: ") {
                faults.push(format!("sandbox:{name}: the sandbox does not start: {why}"));
            }
        }
        for (subject, state) in seen.states.iter().filter(|(_, state)| state.contains(" in memory"))
        {
            faults.push(format!("{subject}: {state}"));
        }
        for (subject, id) in
            self.ids.iter().filter(|(subject, _)| !self.under_way.contains(*subject))
        {
            for (what, paths) in [("removed", &seen.removed), ("unreadable", &seen.unreadable)] {
                for path in paths.iter().filter(|path| path.contains(id.as_str())) {
                    faults.push(format!("{subject}: {path} was {what}"));
                }
            }
        }
        for path in &seen.unreported {
            faults.push(format!("{path}: no row has it, and the daemon reported nothing"));
        }
        faults
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(subject: &str, state: Option<&str>, before: u64, after: u64) -> Recorded {
        Recorded {
            subject: subject.into(),
            state: state.map(str::to_owned),
            id: state.is_some().then(|| format!("id-of-{subject}")),
            key: None,
            before,
            after,
            error: None,
        }
    }

    fn seen(states: &[(&str, &str)]) -> Seen {
        let states =
            states.iter().map(|(subject, state)| ((*subject).to_owned(), (*state).to_owned()));
        Seen { states: states.collect(), ..Seen::default() }
    }

    #[test]
    fn acknowledged_state_must_be_found_and_one_in_progress_may_be() {
        let calls = [
            call("user:u1", Some("key1"), 1, 5),
            call("user:u1", Some("key2"), 8, 12),
            call("volume:v", Some("there"), 13, 15),
        ];
        assert_eq!(Expected::at(&calls, 6).faults(&seen(&[("user:u1", "key1")])), [] as [&str; 0]);
        assert_eq!(Expected::at(&calls, 6).faults(&seen(&[])).len(), 1);
        for either in ["key1", "key2"] {
            assert_eq!(Expected::at(&calls, 10).faults(&seen(&[("user:u1", either)])).len(), 0);
        }
        assert_eq!(Expected::at(&calls, 12).faults(&seen(&[("user:u1", "key1")])).len(), 1);
    }

    #[test]
    fn deleted_subject_must_not_come_back() {
        let calls = [call("volume:v", Some("there"), 1, 2), call("volume:v", None, 3, 4)];
        assert_eq!(Expected::at(&calls, 4).faults(&seen(&[("volume:v", "there")])).len(), 1);
        assert_eq!(Expected::at(&calls, 4).faults(&seen(&[])).len(), 0);
    }

    #[test]
    fn running_sandbox_may_have_failed_but_not_vanished() {
        let calls = [call("sandbox:a", Some("running"), 1, 2)];
        assert_eq!(Expected::at(&calls, 2).faults(&seen(&[("sandbox:a", "failed")])).len(), 0);
        assert_eq!(Expected::at(&calls, 2).faults(&seen(&[("sandbox:a", "stopped")])).len(), 1);
        let mut lost = seen(&[("sandbox:a", "failed")]);
        lost.removed = vec!["sandboxes/id-of-sandbox:a".into()];
        assert_eq!(Expected::at(&calls, 2).faults(&lost).len(), 1);
    }

    #[test]
    fn sandbox_whose_destruction_was_under_way_may_have_lost_its_files() {
        let calls = [call("sandbox:a", Some("running"), 1, 2), call("sandbox:a", None, 3, 9)];
        let mut found = seen(&[]);
        found.removed = vec!["sandboxes/id-of-sandbox:a".into()];
        assert_eq!(Expected::at(&calls, 5).faults(&found).len(), 0);
    }

    #[test]
    fn memory_that_differs_from_the_disk_is_a_fault_at_any_point() {
        let calls = [call("data:a", Some("7"), 1, 9)];
        let found = seen(&[("data:a", "8 in memory, 7 on the disk")]);
        assert_eq!(Expected::at(&calls, 5).faults(&found).len(), 1);
    }

    #[test]
    fn sandbox_that_does_not_start_and_a_silent_orphan_are_faults() {
        let mut found = seen(&[]);
        found.starts.insert("a".into(), "no: not in qcow2 format".into());
        found.unreported = vec!["snapshots/x".into()];
        assert_eq!(Expected::at(&[], 5).faults(&found).len(), 2);
    }
}
