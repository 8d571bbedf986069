//! What each verb means in each state.

use muster_common::ErrorCode;
use muster_idl::v1::Verb;

use crate::{EnabledState, RequestedState};

/// What to do about a verb in a state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Do it; it is done when this state is read back. A verb that changes no state names the present one; for
    /// `delete` it is [`EnabledState::NotApplicable`]: nothing can be read any more.
    Do(EnabledState),
    /// It is so.
    Already,
    /// It is under way: do nothing but wait until this state is read.
    Await(EnabledState),
    /// Not in this state. The text says what would help.
    Refuse(ErrorCode, &'static str),
}

/// CIM's number for what a verb asks for, where CIM has one.
pub const fn requested_state(verb: Verb) -> Option<RequestedState> {
    match verb {
        Verb::PowerOn | Verb::Resume => Some(RequestedState::Enabled),
        Verb::PowerOff => Some(RequestedState::Disabled),
        Verb::Shutdown => Some(RequestedState::ShutDown),
        Verb::Reset => Some(RequestedState::Reset),
        Verb::Reboot => Some(RequestedState::Reboot),
        Verb::Pause => Some(RequestedState::Quiesce),
        Verb::Suspend => Some(RequestedState::Offline),
        _ => None,
    }
}

/// The answer for a virtual system that exists.
pub const fn transition(state: EnabledState, verb: Verb) -> Answer {
    answer(Some(state), verb)
}

/// The answer for a virtual system; `None`: there is no such one on this host.
pub const fn answer(state: Option<EnabledState>, verb: Verb) -> Answer {
    use Answer::{Already, Await, Do, Refuse};
    use EnabledState::{Disabled, Enabled, EnabledButOffline, Quiesce, ShuttingDown, Starting};
    use ErrorCode::{AlreadyExists, InvalidArgument, InvalidState, NotFound};

    const OFF: Answer = Refuse(InvalidState, "it is off");
    const PAUSED: Answer = Refuse(InvalidState, "it is paused: resume it first");
    const SAVED: Answer = Refuse(InvalidState, "it is saved: resume it first");
    const STOPPING: Answer = Refuse(InvalidState, "it is shutting down: wait, or power it off");
    const BOOTING: Answer = Refuse(InvalidState, "it is starting: wait, or power it off");
    const RUNNING: Answer = Refuse(InvalidState, "it is not off: power it off first");
    const UNREADABLE: Answer = Refuse(InvalidState, "the hypervisor does not say what state it is in");

    if matches!(verb, Verb::Drain | Verb::Undrain | Verb::ImagePull | Verb::ImageDrop) {
        return Refuse(InvalidArgument, "a verb for hosts, not for virtual systems");
    }
    let state = match (state, verb) {
        (None | Some(EnabledState::NotApplicable), Verb::Create) => return Do(Disabled),
        (None | Some(EnabledState::NotApplicable), Verb::Delete) => return Already,
        (None | Some(EnabledState::NotApplicable), _) => {
            return Refuse(NotFound, "no such virtual system on this host");
        }
        (Some(_), Verb::Create) => return Refuse(AlreadyExists, "it exists"),
        (Some(state), Verb::Ping) => return Do(state),
        (Some(EnabledState::Unknown | EnabledState::Other | EnabledState::InTest | EnabledState::Deferred), _) => {
            return UNREADABLE;
        }
        (Some(state), _) => state,
    };
    match verb {
        Verb::PowerOn => match state {
            Disabled | Quiesce | EnabledButOffline => Do(Enabled),
            Enabled => Already,
            Starting => Await(Enabled),
            ShuttingDown => STOPPING,
            _ => UNREADABLE,
        },
        Verb::Resume => match state {
            Quiesce | EnabledButOffline => Do(Enabled),
            Enabled => Already,
            Starting => Await(Enabled),
            Disabled => Refuse(InvalidState, "it is off: power it on instead"),
            ShuttingDown => STOPPING,
            _ => UNREADABLE,
        },
        Verb::PowerOff => match state {
            Enabled | Quiesce | ShuttingDown | Starting => Do(Disabled),
            Disabled => Already,
            EnabledButOffline => SAVED,
            _ => UNREADABLE,
        },
        Verb::Shutdown => match state {
            Enabled => Do(Disabled),
            Disabled => Already,
            ShuttingDown => Await(Disabled),
            Starting => BOOTING,
            Quiesce => PAUSED,
            EnabledButOffline => SAVED,
            _ => UNREADABLE,
        },
        Verb::Reset => match state {
            Enabled | Quiesce => Do(Enabled),
            Disabled => OFF,
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            EnabledButOffline => SAVED,
            _ => UNREADABLE,
        },
        Verb::Reboot => match state {
            Enabled => Do(Enabled),
            Disabled => OFF,
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            Quiesce => PAUSED,
            EnabledButOffline => SAVED,
            _ => UNREADABLE,
        },
        Verb::Pause => match state {
            Enabled => Do(Quiesce),
            Quiesce => Already,
            Disabled => OFF,
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            EnabledButOffline => SAVED,
            _ => UNREADABLE,
        },
        Verb::Suspend => match state {
            Enabled => Do(EnabledButOffline),
            EnabledButOffline => Already,
            Disabled => OFF,
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            Quiesce => PAUSED,
            _ => UNREADABLE,
        },
        // point-in-time copies of the volumes: crash-consistent, or better where the guest agent answers
        Verb::Snapshot | Verb::Backup => Do(state),
        // the disks are exchanged under it
        Verb::Restore | Verb::DestroyVolumes => match state {
            Disabled => Do(Disabled),
            EnabledButOffline => SAVED,
            _ => RUNNING,
        },
        Verb::Delete => match state {
            // a saved one goes with its saved memory
            Disabled | EnabledButOffline => Do(EnabledState::NotApplicable),
            _ => RUNNING,
        },
        // who was up comes up again, from the template; saved memory no longer fits the disk and goes
        Verb::ResetSession => match state {
            Enabled | Quiesce => Do(Enabled),
            Disabled | EnabledButOffline => Do(Disabled),
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            _ => UNREADABLE,
        },
        Verb::Exec | Verb::FileWrite => match state {
            Enabled => Do(Enabled),
            Disabled => OFF,
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            Quiesce => PAUSED,
            EnabledButOffline => SAVED,
            _ => UNREADABLE,
        },
        // the guest is told of a new size while it runs; one that is saved or half way would miss it
        Verb::Resize => match state {
            Enabled => Do(Enabled),
            Disabled => Do(Disabled),
            Quiesce => Do(Quiesce),
            EnabledButOffline => SAVED,
            ShuttingDown => STOPPING,
            Starting => BOOTING,
            _ => UNREADABLE,
        },
        // answered above
        Verb::Create | Verb::Ping | Verb::Drain | Verb::Undrain | Verb::ImagePull | Verb::ImageDrop => UNREADABLE,
    }
}

/// The answer of a host to a verb for hosts.
pub const fn host_answer(draining: bool, verb: Verb) -> Answer {
    match verb {
        Verb::Drain if draining => Answer::Already,
        Verb::Undrain if !draining => Answer::Already,
        Verb::ImagePull if draining => Answer::Refuse(ErrorCode::HostDraining, "the host takes no new work"),
        Verb::Ping | Verb::Drain | Verb::Undrain | Verb::Backup | Verb::ImagePull | Verb::ImageDrop => {
            Answer::Do(EnabledState::Enabled)
        }
        _ => Answer::Refuse(ErrorCode::InvalidArgument, "a verb for virtual systems, not for hosts"),
    }
}

/// True for verbs that bring new work to a host: a draining host refuses them with [`ErrorCode::HostDraining`].
pub const fn refused_while_draining(verb: Verb) -> bool {
    matches!(verb, Verb::Create | Verb::PowerOn | Verb::Resume | Verb::Restore | Verb::ImagePull)
}

#[cfg(test)]
mod tests {
    use super::*;
    use EnabledState::*;

    const LIVE: &[EnabledState] = &[Enabled, Disabled, ShuttingDown, EnabledButOffline, Quiesce, Starting];

    #[test]
    fn the_table_of_the_design_holds() {
        let allowed: &[(Verb, &[EnabledState], EnabledState)] = &[
            (Verb::PowerOn, &[Disabled, Quiesce, EnabledButOffline], Enabled),
            (Verb::Resume, &[Quiesce, EnabledButOffline], Enabled),
            (Verb::PowerOff, &[Enabled, Quiesce, ShuttingDown, Starting], Disabled),
            (Verb::Shutdown, &[Enabled], Disabled),
            (Verb::Reset, &[Enabled, Quiesce], Enabled),
            (Verb::Reboot, &[Enabled], Enabled),
            (Verb::Pause, &[Enabled], Quiesce),
            (Verb::Suspend, &[Enabled], EnabledButOffline),
        ];
        for (verb, from, to) in allowed {
            for state in LIVE {
                let done = transition(*state, *verb) == Answer::Do(*to);
                assert_eq!(done, from.contains(state), "{verb} in {state}");
            }
        }
    }

    #[test]
    fn a_verb_done_twice_is_already_done() {
        for verb in [Verb::PowerOn, Verb::Resume, Verb::PowerOff, Verb::Shutdown, Verb::Pause, Verb::Suspend] {
            for state in LIVE {
                if let Answer::Do(reached) = transition(*state, verb) {
                    assert_eq!(transition(reached, verb), Answer::Already, "{verb} from {state}");
                }
            }
        }
        assert_eq!(answer(None, Verb::Delete), Answer::Already);
    }

    #[test]
    fn every_pair_has_an_answer_and_every_refusal_a_reason() {
        for verb in Verb::ALL {
            for state in EnabledState::ALL.iter().copied().map(Some).chain([None]) {
                match answer(state, *verb) {
                    Answer::Refuse(code, text) => {
                        assert_ne!(code, ErrorCode::Ok);
                        assert!(!text.is_empty(), "{verb} in {state:?}");
                    }
                    Answer::Do(to) | Answer::Await(to) => {
                        assert!(LIVE.contains(&to) || *verb == Verb::Delete || *verb == Verb::Ping, "{verb}: {to}");
                    }
                    Answer::Already => {}
                }
            }
        }
        // in a readable state only the two early returns of unreachable arms would say "does not say"
        for (verb, state) in Verb::ALL.iter().flat_map(|v| LIVE.iter().map(move |s| (v, s))) {
            if let Answer::Refuse(_, text) = transition(*state, *verb) {
                assert!(!text.contains("does not say"), "{verb} in {state} has no answer of its own");
            }
        }
    }

    #[test]
    fn hosts_answer_only_verbs_for_hosts() {
        for verb in Verb::ALL {
            let host = !matches!(host_answer(false, *verb), Answer::Refuse(..));
            let vm = !matches!(answer(Some(Enabled), *verb), Answer::Refuse(ErrorCode::InvalidArgument, _));
            assert!(host || vm, "{verb} belongs to nobody");
        }
        assert_eq!(host_answer(true, Verb::Drain), Answer::Already);
    }
}
