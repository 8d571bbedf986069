//! Small decisions about one command: whose it is, what it may overlap with, whether it makes sense at all.

use std::collections::BTreeSet;

use muster_common::HostId;
use muster_idl::v1::{GroupCommand, Member, TargetKind, Verb};

use super::{Lane, Order};

/// Our members, each once, whatever the sample says twice.
pub(super) fn members_of(command: &GroupCommand, host: HostId) -> Vec<Member> {
    let host = host.to_string();
    let mut seen = BTreeSet::new();
    command
        .members
        .iter()
        // a third party may write a UUID in capitals
        .filter(|m| m.host.eq_ignore_ascii_case(&host))
        .filter(|m| seen.insert(m.vm.clone()))
        .cloned()
        .collect()
}

/// Texts that are ids are kept for a week: what is longer than any id comes from nobody who means well.
pub(super) fn is_overlong(command: &GroupCommand, mine: &[Member]) -> bool {
    const ID_LIMIT: usize = 256;
    const MEMBERS: usize = 2048;
    let subject = argument(command, muster_idl::arguments::name::DIGEST).unwrap_or_default();
    mine.len() > MEMBERS
        || command.controller.len() > ID_LIMIT
        || subject.len() > ID_LIMIT
        || mine.iter().any(|m| m.vm.len() > ID_LIMIT)
}

pub(super) fn argument<'a>(command: &'a GroupCommand, name: &str) -> Option<&'a str> {
    command.arguments.iter().find(|a| a.name == name).map(|a| a.value.as_str())
}

/// Why an order cannot be understood.
pub(super) fn malformed(order: &Order) -> Option<String> {
    match order.target_kind {
        TargetKind::Vm if order.vm.is_none() => {
            Some(format!("{:?} is not a VM id: expected a UUID", cut(&order.member, 100)))
        }
        TargetKind::Host if !order.member.is_empty() => {
            Some("a command for hosts names a VM among its members".to_string())
        }
        TargetKind::Vm | TargetKind::Host => None,
    }
}

pub(super) fn lane_of(order: &Order) -> Lane {
    match (order.vm, order.verb) {
        (Some(vm), _) => Lane::Vm(vm),
        (None, Verb::ImagePull | Verb::ImageDrop) => {
            Lane::Image(order.argument(muster_idl::arguments::name::DIGEST).unwrap_or_default().to_string())
        }
        (None, Verb::Backup) => Lane::HostBackup,
        (None, _) => Lane::Drain,
    }
}

/// Not held up by the limit of tasks at work: they cost little, and an operator in trouble needs them.
pub(super) const fn is_quick(verb: Verb) -> bool {
    matches!(verb, Verb::PowerOff | Verb::Ping | Verb::Drain | Verb::Undrain)
}

/// A power-off need not wait for a guest that does not listen.
pub(super) fn may_overtake(verb: Verb, at_work: &[Verb]) -> bool {
    verb == Verb::PowerOff
        && at_work
            .iter()
            .all(|v| matches!(v, Verb::Shutdown | Verb::Reboot | Verb::Exec | Verb::FileWrite | Verb::Ping))
}

/// At most `limit` bytes of it, at a character's border.
pub(super) fn cut(text: &str, limit: usize) -> String {
    if text.len() <= limit {
        return text.to_string();
    }
    let mut end = limit;
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}…", &text[..end])
}
