//! After a restart: which commands of the ledger have no verdict, and what is said of them.
//!
//! | found in the ledger | said |
//! |---|---|
//! | recorded, not begun, time passed | expired |
//! | recorded, not begun, time left | refused, stale-incarnation: it was given to the earlier run |
//! | begun | what the state read back says ([`outcome_of`]), else indeterminate |

use muster_cim::EnabledState;
use muster_common::ErrorCode;
use muster_idl::v1::{Outcome, TargetKind, Verb};

use super::{Action, Dispatcher, Ending, Known, MemberState, judge::Facts};
use crate::ledger::Entry;

impl Dispatcher {
    /// Takes over what the ledger holds. Called once, before any event.
    pub fn recover(&mut self, now_us: u64, entries: Vec<Entry>) -> Vec<Action> {
        for entry in entries {
            match entry {
                Entry::Command(entry) => {
                    let members = entry.members.iter().map(|m| (m.clone(), MemberState::Open)).collect();
                    self.commands.insert(entry.id, Known { entry, members });
                }
                Entry::Begun { id, vm, at_us } => {
                    if let Some(member) = self.commands.get_mut(&id).and_then(|k| k.members.get_mut(&vm)) {
                        *member = MemberState::ReadingBack { begun_us: at_us };
                    }
                }
                Entry::Verdict(verdict) => {
                    let Ok(id) = verdict.command.parse() else { continue };
                    // a later one takes the place of an earlier one, and of its result
                    self.drop_result(id, &verdict.vm);
                    let known = self.commands.get_mut(&id);
                    if let Some(member) = known.and_then(|k| k.members.get_mut(&verdict.vm)) {
                        *member = MemberState::Said(verdict.clone());
                        self.keep_result(id, &verdict);
                    }
                }
                Entry::Epoch { controller, epoch } => {
                    let known = self.epochs.entry(controller).or_insert(0);
                    *known = (*known).max(epoch);
                }
            }
        }
        let mut out = Vec::new();
        let mut never_begun = Vec::new();
        for known in self.commands.values() {
            for (member, state) in &known.members {
                match state {
                    MemberState::Said(_) => {}
                    MemberState::ReadingBack { .. } => {
                        out.push(Action::ReadBack { entry: known.entry.clone(), member: member.clone() });
                    }
                    MemberState::Open => never_begun.push((known.entry.clone(), member.clone())),
                }
            }
        }
        for (entry, member) in never_begun {
            let ending = if now_us > entry.not_after_us {
                Ending::of(Outcome::Expired, ErrorCode::Expired, "its time passed while the agent was down", 0)
            } else {
                let text = "the agent restarted before it was begun: give it again";
                Ending::of(Outcome::Refused, ErrorCode::StaleIncarnation, text, 0)
            };
            let verdict = self.verdict(now_us, entry.id, &member, entry.received_us, 0, ending);
            self.settle(entry.id, verdict, &mut out);
        }
        out
    }

    pub(super) fn read_back(
        &mut self,
        now_us: u64,
        command: muster_common::CommandId,
        member: &str,
        facts: &Facts,
        out: &mut Vec<Action>,
    ) {
        let Some(known) = self.commands.get(&command) else { return };
        let Some(MemberState::ReadingBack { begun_us }) = known.members.get(member) else { return };
        let (begun_us, received_us) = (*begun_us, known.entry.received_us);
        let ending = outcome_of(known.entry.verb, known.entry.target_kind, facts);
        let verdict = self.verdict(now_us, command, member, received_us, begun_us, ending);
        self.settle(command, verdict, out);
    }
}

/// What can be said of a verb that had begun when the agent died, from what is read now.
pub fn outcome_of(verb: Verb, kind: TargetKind, facts: &Facts) -> Ending {
    const DIED: &str = "the agent died while it was at work";
    let state = facts.cim_state();
    let done = || Ending {
        message: format!("{DIED}; the state read back is the one asked for"),
        guest_up: facts.guest_up,
        ..Ending::done(state)
    };
    let failed = |code, why: &str| Ending::of(Outcome::Failed, code, format!("{DIED}; {why}"), state);
    let unknown = || {
        Ending::of(
            Outcome::Indeterminate,
            ErrorCode::Indeterminate,
            format!("{DIED}; what came of it cannot be read back"),
            state,
        )
    };
    let lost = || failed(ErrorCode::VolumeLost, "what it made was lost with the agent's memory");
    let reached = |wanted: EnabledState| match facts.state {
        Some(state) if state == wanted => done(),
        _ if facts.lost => lost(),
        Some(_) => failed(ErrorCode::InvalidState, "the state read back is another one"),
        None => failed(ErrorCode::NotFound, "there is no such VM now"),
    };
    if kind == TargetKind::Vm && (facts.hypervisor_missing.is_some() || facts.unreadable.is_some()) {
        return unknown();
    }
    match verb {
        Verb::Ping => done(),
        Verb::PowerOn | Verb::Resume => reached(EnabledState::Enabled),
        Verb::PowerOff | Verb::Shutdown => reached(EnabledState::Disabled),
        Verb::Pause => reached(EnabledState::Quiesce),
        Verb::Suspend => reached(EnabledState::EnabledButOffline),
        Verb::Delete if facts.state.is_none() => done(),
        Verb::Delete => failed(ErrorCode::Internal, "it is still there: delete it again"),
        Verb::Create if facts.state.is_none() => failed(ErrorCode::Internal, "it does not exist: create it again"),
        Verb::Create | Verb::Restore | Verb::ResetSession | Verb::Snapshot => lost(),
        Verb::DestroyVolumes => done(),
        Verb::Backup if facts.backed_up => done(),
        Verb::Backup => failed(ErrorCode::Internal, "no backup of it is there, and nothing partial either"),
        Verb::ImagePull if facts.as_wanted => done(),
        Verb::ImagePull => lost(),
        Verb::ImageDrop if facts.as_wanted => done(),
        Verb::ImageDrop => failed(ErrorCode::Internal, "the image is still there"),
        Verb::Drain if facts.draining => done(),
        Verb::Undrain if !facts.draining => done(),
        Verb::Drain | Verb::Undrain => failed(ErrorCode::Internal, "the mark is not as asked for"),
        Verb::Reset | Verb::Reboot | Verb::Exec | Verb::FileWrite | Verb::Resize => unknown(),
    }
}
