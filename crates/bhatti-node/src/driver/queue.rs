//! The requests that wait for a driver, and what is decided about a request when it arrives.
//!
//! A driver carries out one request at a time. A request that arrives meanwhile is decided at once
//! where that is possible: it is answered if the state denies it or has it already, and a
//! destruction supersedes all requests that wait. Everything else waits its turn and is decided
//! again then, so a hundred requests to wake a sandbox wake it once.

use std::collections::VecDeque;

use bhatti_types::Denied;

use super::state::{Admission, Kind, Wanted, admit};

/// The most requests that wait for one driver. Further callers wait until there is room.
pub(crate) const WAITING_MAX: usize = 256;

/// What is decided about a request on its arrival.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Decision {
    /// The request is answered: its goal is reached.
    Already,
    /// The request is answered: it cannot be carried out.
    Denied(Denied),
    /// The request waits for its turn.
    Wait,
    /// The request is a destruction: those that wait are superseded.
    Supersede,
}

/// Decides about a request that arrives in `state` while the driver carries out `current` and while
/// `waiting` requests are ahead of it.
pub(crate) fn decide(
    state: Kind,
    current: Option<Wanted>,
    waiting: impl IntoIterator<Item = Wanted>,
    wanted: Wanted,
) -> Decision {
    let ahead: Vec<Wanted> = current.into_iter().chain(waiting).collect();
    let is_going = ahead.contains(&Wanted::Destroy);
    let is_starting = ahead.iter().any(|ahead| matches!(ahead, Wanted::Start | Wanted::ColdBoot));
    if wanted == Wanted::Destroy {
        return if is_going { Decision::Wait } else { Decision::Supersede };
    }
    if is_going {
        return Decision::Denied(Denied::Destroyed);
    }
    match admit(state, wanted) {
        // The state is that of a transition which decides otherwise soon, or requests are ahead
        // that change it.
        _ if !ahead.is_empty() && (is_starting || !settles(state, wanted)) => Decision::Wait,
        Admission::Denied(denied) => Decision::Denied(denied),
        Admission::Already => Decision::Already,
        Admission::Perform => Decision::Wait,
    }
}

/// Whether the answer to a request is known although other requests are ahead of it: a sandbox that
/// is being stopped cannot be used, whatever comes of the stop.
const fn settles(state: Kind, wanted: Wanted) -> bool {
    matches!(
        (state, wanted),
        (Kind::Stopping, Wanted::Pause | Wanted::Save | Wanted::Merge | Wanted::Wake)
    )
}

/// Requests in the order of their arrival.
pub(crate) struct Queue<R>(VecDeque<(Wanted, R)>);

impl<R> Default for Queue<R> {
    fn default() -> Self {
        Self(VecDeque::new())
    }
}

impl<R> Queue<R> {
    /// Returns what the waiting requests ask for, first come first.
    pub(crate) fn wanted(&self) -> impl Iterator<Item = Wanted> + '_ {
        self.0.iter().map(|(wanted, _)| *wanted)
    }

    pub(crate) fn has_room(&self) -> bool {
        self.0.len() < WAITING_MAX
    }

    pub(crate) fn push(&mut self, wanted: Wanted, request: R) {
        self.0.push_back((wanted, request));
    }

    pub(crate) fn pop(&mut self) -> Option<(Wanted, R)> {
        self.0.pop_front()
    }

    /// Takes all requests out.
    pub(crate) fn drain(&mut self) -> impl Iterator<Item = R> + '_ {
        self.0.drain(..).map(|(_, request)| request)
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::tests::{KINDS, WANTED};
    use super::*;

    #[test]
    fn request_without_others_ahead_is_decided_by_the_state() {
        for kind in KINDS {
            for wanted in WANTED {
                let expected = match (admit(kind, wanted), wanted) {
                    (_, Wanted::Destroy) => Decision::Supersede,
                    (Admission::Perform, _) => Decision::Wait,
                    (Admission::Already, _) => Decision::Already,
                    (Admission::Denied(denied), _) => Decision::Denied(denied),
                };
                assert_eq!(decide(kind, None, [], wanted), expected, "{kind:?}, {wanted:?}");
            }
        }
    }

    #[test]
    fn nothing_but_a_second_destruction_waits_behind_a_destruction() {
        for kind in KINDS {
            for wanted in WANTED {
                for (current, waiting) in
                    [(Some(Wanted::Destroy), None), (Some(Wanted::Stop), Some(Wanted::Destroy))]
                {
                    let decision = decide(kind, current, waiting, wanted);
                    let expected = if wanted == Wanted::Destroy {
                        Decision::Wait
                    } else {
                        Decision::Denied(Denied::Destroyed)
                    };
                    assert_eq!(decision, expected, "{kind:?}, {wanted:?}");
                }
            }
        }
    }

    #[test]
    fn use_of_a_sandbox_that_is_being_stopped_is_denied_at_once() {
        for wanted in [Wanted::Wake, Wanted::Pause, Wanted::Save] {
            let decision = decide(Kind::Stopping, Some(Wanted::Stop), [], wanted);
            assert_eq!(decision, Decision::Denied(Denied::Stopped), "{wanted:?}");
        }
    }

    #[test]
    fn use_waits_if_the_sandbox_is_started_again() {
        let decision = decide(Kind::Stopping, Some(Wanted::Stop), [Wanted::Start], Wanted::Wake);
        assert_eq!(decision, Decision::Wait);
    }

    #[test]
    fn second_stop_waits_for_the_first_and_destruction_supersedes_it() {
        let current = Some(Wanted::Stop);
        assert_eq!(decide(Kind::Stopping, current, [], Wanted::Stop), Decision::Wait);
        let decision = decide(Kind::Stopping, current, [Wanted::Stop], Wanted::Destroy);
        assert_eq!(decision, Decision::Supersede);
    }

    #[test]
    fn request_behind_others_waits_although_the_state_would_answer_it() {
        // A pause comes before this wake.
        let decision = decide(Kind::Hot, Some(Wanted::Change), [Wanted::Pause], Wanted::Wake);
        assert_eq!(decision, Decision::Wait);
    }
}
