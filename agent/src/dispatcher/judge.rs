//! What an order means given the facts: `muster-cim`'s (state, verb) table, and what only this host knows (draining,
//! lost volumes, no hypervisor).

use muster_cim::{Answer, EnabledState};
use muster_common::ErrorCode;
use muster_idl::v1::{TargetKind, Verb};

use super::Order;

/// What was read about the target of an order just before a decision.
#[derive(Clone, Debug, PartialEq)]
pub struct Facts {
    /// Why no VM can be commanded here; `None`: there is a hypervisor.
    pub hypervisor_missing: Option<String>,
    /// The state as read back; `None`: no such VM on this host, or the order is for the host.
    pub state: Option<EnabledState>,
    /// At least one volume of it is lost.
    pub lost: bool,
    pub guest_up: bool,
    pub draining: bool,
    /// For create: the VM exists and is the one asked for. For image-pull: the image is resident. For image-drop: it is not.
    pub as_wanted: bool,
    /// For backup: one of this command is in the repository.
    pub backed_up: bool,
    /// Why the state could not be read, when it could not.
    pub unreadable: Option<String>,
}

impl Facts {
    /// Nothing known, nothing wrong.
    pub const fn blank() -> Self {
        Self {
            hypervisor_missing: None,
            state: None,
            lost: false,
            guest_up: false,
            draining: false,
            as_wanted: false,
            backed_up: false,
            unreadable: None,
        }
    }

    /// For a verdict.
    pub fn cim_state(&self) -> u16 {
        self.state.map_or(EnabledState::NotApplicable.cim(), EnabledState::cim)
    }
}

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Judgement {
    Begin { expected: u16, wait_only: bool },
    Already,
    Refuse(ErrorCode, String),
}

/// Verbs that make no sense without the volumes' contents. Not here: reset-session and restore, which bring them back,
/// and power-off and delete, which need none.
const fn needs_volumes(verb: Verb) -> bool {
    matches!(
        verb,
        Verb::PowerOn
            | Verb::Resume
            | Verb::Shutdown
            | Verb::Reset
            | Verb::Reboot
            | Verb::Suspend
            | Verb::Snapshot
            | Verb::Backup
            | Verb::Exec
            | Verb::FileWrite
            | Verb::Resize
    )
}

pub fn judge(order: &Order, facts: &Facts) -> Judgement {
    match order.target_kind {
        TargetKind::Host => host(order, facts),
        TargetKind::Vm => vm(order, facts),
    }
}

fn host(order: &Order, facts: &Facts) -> Judgement {
    match muster_cim::host_answer(facts.draining, order.verb) {
        Answer::Do(_) if facts.as_wanted && matches!(order.verb, Verb::ImagePull | Verb::ImageDrop) => {
            Judgement::Already
        }
        Answer::Do(expected) | Answer::Await(expected) => {
            Judgement::Begin { expected: expected.cim(), wait_only: false }
        }
        Answer::Already => Judgement::Already,
        Answer::Refuse(code, text) => Judgement::Refuse(code, text.to_string()),
    }
}

fn vm(order: &Order, facts: &Facts) -> Judgement {
    let verb = order.verb;
    if let Some(why) = &facts.hypervisor_missing {
        return Judgement::Refuse(ErrorCode::Hypervisor, format!("this host has no hypervisor: {why}"));
    }
    if let Some(why) = &facts.unreadable {
        return Judgement::Refuse(ErrorCode::Hypervisor, format!("its state cannot be read: {why}"));
    }
    let answer = muster_cim::answer(facts.state, verb);
    if facts.state.is_some() && facts.lost {
        if verb == Verb::DestroyVolumes {
            return Judgement::Already;
        }
        // said before "it is paused": resuming it is just what would not help
        if needs_volumes(verb) && answer != Answer::Already {
            let text = "a volume of it was lost with the agent's memory: restore it, or reset its session";
            return Judgement::Refuse(ErrorCode::VolumeLost, text.to_string());
        }
    }
    let (expected, wait_only) = match answer {
        Answer::Already => return Judgement::Already,
        Answer::Refuse(ErrorCode::AlreadyExists, _) if facts.as_wanted => return Judgement::Already,
        Answer::Refuse(code, text) => return Judgement::Refuse(code, text.to_string()),
        Answer::Do(expected) => (expected, false),
        Answer::Await(expected) => (expected, true),
    };
    if facts.draining && muster_cim::refused_while_draining(verb) {
        return Judgement::Refuse(ErrorCode::HostDraining, "the host takes no new work".to_string());
    }
    Judgement::Begin { expected: expected.cim(), wait_only }
}

#[cfg(test)]
mod tests {
    use muster_common::{CommandId, VmId};

    use super::*;

    fn order(kind: TargetKind, verb: Verb) -> Order {
        let vm = VmId::random();
        Order {
            task: 0,
            command: CommandId::now(),
            controller: String::new(),
            verb,
            target_kind: kind,
            member: vm.to_string(),
            vm: Some(vm),
            name: String::new(),
            arguments: vec![],
            deadline_us: 1,
            received_us: 0,
        }
    }

    fn code(judgement: Judgement) -> Option<ErrorCode> {
        match judgement {
            Judgement::Refuse(code, text) => {
                assert!(!text.is_empty());
                Some(code)
            }
            Judgement::Begin { .. } | Judgement::Already => None,
        }
    }

    #[test]
    fn without_a_hypervisor_every_verb_for_vms_is_refused_with_its_code() {
        let facts = Facts { hypervisor_missing: Some("none configured".into()), ..Facts::blank() };
        for verb in Verb::ALL {
            let got = code(judge(&order(TargetKind::Vm, *verb), &facts));
            assert_eq!(got, Some(ErrorCode::Hypervisor), "{verb}");
        }
        assert_eq!(code(judge(&order(TargetKind::Host, Verb::Ping), &facts)), None);
    }

    #[test]
    fn a_vm_with_a_lost_volume_can_be_restored_reset_switched_off_and_deleted_and_nothing_else() {
        for state in [EnabledState::Quiesce, EnabledState::Disabled] {
            let facts = Facts { state: Some(state), lost: true, ..Facts::blank() };
            for verb in Verb::ALL.iter().filter(|v| needs_volumes(**v)) {
                let got = judge(&order(TargetKind::Vm, *verb), &facts);
                if got != Judgement::Already {
                    assert_eq!(code(got), Some(ErrorCode::VolumeLost), "{verb} in {state}");
                }
            }
        }
        let paused = Facts { state: Some(EnabledState::Quiesce), lost: true, ..Facts::blank() };
        let off = Facts { state: Some(EnabledState::Disabled), lost: true, ..Facts::blank() };
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::PowerOff), &paused)), None);
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::ResetSession), &paused)), None);
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::Restore), &off)), None);
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::Delete), &off)), None);
    }

    #[test]
    fn a_draining_host_starts_nothing_and_still_stops_things() {
        let off = Facts { state: Some(EnabledState::Disabled), draining: true, ..Facts::blank() };
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::PowerOn), &off)), Some(ErrorCode::HostDraining));
        let none = Facts { draining: true, ..Facts::blank() };
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::Create), &none)), Some(ErrorCode::HostDraining));
        let on = Facts { state: Some(EnabledState::Enabled), draining: true, ..Facts::blank() };
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::Shutdown), &on)), None);
        assert_eq!(judge(&order(TargetKind::Vm, Verb::PowerOn), &on), Judgement::Already);
    }

    #[test]
    fn creating_what_is_there_as_wanted_is_already_done() {
        let facts = Facts { state: Some(EnabledState::Disabled), as_wanted: true, ..Facts::blank() };
        assert_eq!(judge(&order(TargetKind::Vm, Verb::Create), &facts), Judgement::Already);
        let other = Facts { as_wanted: false, ..facts };
        assert_eq!(code(judge(&order(TargetKind::Vm, Verb::Create), &other)), Some(ErrorCode::AlreadyExists));
    }
}
