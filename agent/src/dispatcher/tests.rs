use std::collections::BTreeMap;

use muster_cim::EnabledState;
use muster_common::{CommandId, ErrorCode, HostId, Incarnation, VmId};
use muster_idl::{
    arguments::name,
    v1::{Argument, GroupCommand, Member, Outcome, TargetKind, Verb, Verdict},
};
use proptest::prelude::*;

use super::{Action, Dispatcher, Ending, Event, OVERRUN_US, Order, judge::Facts};
use crate::ledger::Entry;

const S: u64 = 1_000_000;

fn host() -> HostId {
    HostId::from_uuid(uuid::Uuid::from_u128(1))
}
fn run(n: u128) -> Incarnation {
    Incarnation::from_uuid(uuid::Uuid::from_u128(n))
}
fn vm(n: u128) -> VmId {
    VmId::from_uuid(uuid::Uuid::from_u128(100 + n))
}
fn id(n: u128) -> CommandId {
    CommandId::from_uuid(uuid::Uuid::from_u128(1000 + n))
}
fn dispatcher(parallel: usize) -> Dispatcher {
    Dispatcher::new(host(), run(7), parallel)
}

fn member(vm: &str) -> Member {
    Member { host: host().to_string(), incarnation: String::new(), vm: vm.into(), name: String::new() }
}

fn command(n: u128, verb: Verb, vms: &[VmId]) -> GroupCommand {
    GroupCommand {
        id: id(n).to_string(),
        controller: "c".into(),
        issuer: String::new(),
        controller_epoch: 1,
        group_epoch: 0,
        issued_at_us: 0,
        not_after_us: 10 * S,
        target_kind: TargetKind::Vm,
        target: String::new(),
        members: vms.iter().map(|v| member(&v.to_string())).collect(),
        verb,
        arguments: vec![],
        wave: 0,
        plan_digest: String::new(),
        retry_of: String::new(),
        key_id: String::new(),
        signature: vec![],
        extension: vec![],
    }
}

fn facts(state: EnabledState) -> Facts {
    Facts { state: Some(state), ..Facts::blank() }
}

fn inspected(actions: &[Action]) -> Vec<Order> {
    actions.iter().filter_map(|a| if let Action::Inspect(o) = a { Some(o.clone()) } else { None }).collect()
}
fn said(actions: &[Action]) -> Vec<Verdict> {
    actions.iter().filter_map(|a| if let Action::Say(v) = a { Some(v.clone()) } else { None }).collect()
}
fn said_again(actions: &[Action]) -> Vec<Verdict> {
    actions.iter().filter_map(|a| if let Action::SayAgain(v) = a { Some(v.clone()) } else { None }).collect()
}
fn receive(d: &mut Dispatcher, now: u64, c: &GroupCommand) -> Vec<Action> {
    d.handle(now, Event::Command(Box::new(c.clone())))
}

#[test]
fn a_command_is_recorded_inspected_begun_and_answered_once() {
    let mut d = dispatcher(4);
    let c = command(1, Verb::PowerOn, &[vm(1)]);
    let out = receive(&mut d, S, &c);
    assert!(matches!(out[0], Action::Record(Entry::Epoch { epoch: 1, .. })));
    assert!(matches!(&out[1], Action::Record(Entry::Command(e)) if e.id == id(1)));
    let task = inspected(&out)[0].task;
    let out = d.handle(2 * S, Event::Inspected { task, facts: facts(EnabledState::Disabled) });
    assert!(matches!(out[0], Action::Record(Entry::Begun { .. })));
    assert!(matches!(out[1], Action::Act { expected: 2, wait_only: false, .. }));
    let out = d.handle(3 * S, Event::Ended { task, ending: Ending::done(2) });
    assert!(matches!(&out[0], Action::Record(Entry::Verdict(_))));
    let verdict = &said(&out)[0];
    assert_eq!((verdict.outcome, verdict.enabled_state), (Outcome::Done, 2));
    assert_eq!((verdict.received_at_us, verdict.started_at_us, verdict.ended_at_us), (S, 2 * S, 3 * S));
    // the same end again, the same sample again, and a controller that lacks it
    assert!(d.handle(4 * S, Event::Ended { task, ending: Ending::done(3) }).is_empty());
    assert_eq!(said_again(&receive(&mut d, 5 * S, &c)), std::slice::from_ref(verdict));
    let out = d.handle(6 * S, Event::Awaiting(vec![c.id.clone(), "nonsense".into(), id(99).to_string()]));
    assert_eq!(said_again(&out), std::slice::from_ref(verdict));
}

#[test]
fn what_names_other_hosts_is_not_even_recorded() {
    let mut d = dispatcher(4);
    let mut c = command(1, Verb::PowerOn, &[vm(1)]);
    c.members[0].host = HostId::random().to_string();
    assert!(receive(&mut d, S, &c).is_empty());
}

#[test]
fn past_its_time_it_is_expired_and_nothing_begins() {
    let mut d = dispatcher(4);
    let out = receive(&mut d, 11 * S, &command(1, Verb::PowerOff, &[vm(1), vm(2)]));
    assert!(inspected(&out).is_empty());
    assert!(said(&out).iter().all(|v| v.outcome == Outcome::Expired && v.code == "expired"));
    assert_eq!(said(&out).len(), 2);
}

#[test]
fn stale_incarnations_old_epochs_and_malformed_members_are_refused() {
    let mut d = dispatcher(4);
    let mut stale = command(1, Verb::PowerOn, &[vm(1)]);
    stale.members[0].incarnation = run(6).to_string();
    assert_eq!(said(&receive(&mut d, S, &stale))[0].code, "stale-incarnation");

    let mut newer = command(2, Verb::Ping, &[vm(1)]);
    newer.controller_epoch = 5;
    receive(&mut d, S, &newer);
    assert_eq!(said(&receive(&mut d, S, &command(3, Verb::Ping, &[vm(1)])))[0].code, "conflict");
    let mut other = command(4, Verb::Ping, &[vm(2)]);
    other.controller = "another".into();
    assert_eq!(inspected(&receive(&mut d, S, &other)).len(), 1);

    let mut odd = command(5, Verb::Ping, &[]);
    odd.controller_epoch = 5;
    odd.members = vec![member("not a uuid")];
    assert_eq!(said(&receive(&mut d, S, &odd))[0].code, "invalid-argument");
}

#[test]
fn texts_too_long_to_be_ids_are_not_kept() {
    let mut d = dispatcher(1);
    let long = "x".repeat(2 << 20);
    let mut of_member = command(1, Verb::PowerOn, &[vm(1)]);
    of_member.members[0].vm = long.clone();
    let of_controller = GroupCommand { controller: long.clone(), ..command(2, Verb::PowerOn, &[vm(1)]) };
    let mut of_image = command(3, Verb::ImagePull, &[vm(1)]);
    of_image.arguments.push(Argument { name: name::DIGEST.into(), value: long });
    for c in [of_member, of_controller, of_image] {
        assert!(matches!(&receive(&mut d, 10, &c)[..], [Action::Warn(_)]));
    }
    assert!(d.entries().is_empty());
}

#[test]
fn a_current_incarnation_and_a_member_named_twice_are_fine() {
    let mut d = dispatcher(4);
    let mut c = command(1, Verb::PowerOn, &[vm(1), vm(1)]);
    c.members[0].incarnation = run(7).to_string();
    assert_eq!(inspected(&receive(&mut d, S, &c)).len(), 1);
}

#[test]
fn one_vm_has_one_task_at_work_and_others_run_beside_it() {
    let mut d = dispatcher(4);
    let first = inspected(&receive(&mut d, S, &command(1, Verb::PowerOn, &[vm(1)])))[0].task;
    assert!(inspected(&receive(&mut d, S, &command(2, Verb::Pause, &[vm(1)]))).is_empty());
    assert_eq!(inspected(&receive(&mut d, S, &command(3, Verb::PowerOn, &[vm(2)]))).len(), 1);
    d.handle(S, Event::Inspected { task: first, facts: facts(EnabledState::Disabled) });
    let out = d.handle(S, Event::Ended { task: first, ending: Ending::done(2) });
    assert_eq!(inspected(&out)[0].verb, Verb::Pause);
}

#[test]
fn a_power_off_overtakes_a_shutdown_that_waits_for_its_guest() {
    let mut d = dispatcher(1);
    let shutdown = inspected(&receive(&mut d, S, &command(1, Verb::Shutdown, &[vm(1)])))[0].task;
    d.handle(S, Event::Inspected { task: shutdown, facts: facts(EnabledState::Enabled) });
    assert_eq!(inspected(&receive(&mut d, S, &command(2, Verb::PowerOff, &[vm(1)]))).len(), 1);
    // but not one that waits before it
    let mut d = dispatcher(4);
    let on = inspected(&receive(&mut d, S, &command(1, Verb::PowerOn, &[vm(1)])))[0].task;
    assert!(inspected(&receive(&mut d, S, &command(2, Verb::PowerOff, &[vm(1)]))).is_empty());
    d.handle(S, Event::Inspected { task: on, facts: facts(EnabledState::Enabled) });
    assert_eq!(d.open_tasks(), 1);
}

#[test]
fn no_more_than_the_limit_is_at_work_and_power_off_does_not_wait_for_it() {
    let mut d = dispatcher(2);
    let all: Vec<VmId> = (0..5).map(vm).collect();
    let first = inspected(&receive(&mut d, S, &command(1, Verb::PowerOn, &all)));
    assert_eq!(first.len(), 2);
    assert_eq!(inspected(&receive(&mut d, S, &command(2, Verb::PowerOff, &[vm(9)]))).len(), 1);
    let out = d.handle(S, Event::Inspected { task: first[0].task, facts: facts(EnabledState::Enabled) });
    assert_eq!(said(&out)[0].outcome, Outcome::Already);
    assert_eq!(inspected(&out).len(), 1);
}

#[test]
fn what_cannot_be_recorded_is_answered_once_and_frees_its_lane() {
    let mut d = dispatcher(1);
    let first = inspected(&receive(&mut d, S, &command(1, Verb::PowerOn, &[vm(1)])))[0].task;
    let begun = d.handle(S, Event::Inspected { task: first, facts: facts(EnabledState::Disabled) });
    assert!(matches!(begun[1], Action::Act { .. }));
    receive(&mut d, S, &command(2, Verb::Pause, &[vm(1)]));
    receive(&mut d, S, &command(3, Verb::Ping, &[vm(1)]));
    // the begin of the first, and the second with its member that waits
    let out = d.handle(S, Event::Unrecorded { commands: vec![id(2)], tasks: vec![first] });
    let verdicts: Vec<_> = said(&out).into_iter().map(|v| (v.command, v.outcome, v.code, v.started_at_us)).collect();
    let failed = |n| (id(n).to_string(), Outcome::Failed, "io".to_string(), 0);
    assert_eq!(verdicts, [failed(1), failed(2)]);
    let next: Vec<_> = inspected(&out).iter().map(|o| o.command).collect();
    assert_eq!(next, [id(3)], "the lane is free");
    // neither a late end nor the deadline says a second one
    assert!(d.handle(2 * S, Event::Ended { task: first, ending: Ending::done(2) }).is_empty());
    let late = d.handle(100 * S, Event::Tick);
    assert!(said(&late).iter().all(|v| v.command == id(3).to_string()), "{late:?}");
    assert_eq!(d.open_tasks(), 0);
}

/// Commands `from..to`, each ended with a result of this length.
fn end_with_results(d: &mut Dispatcher, from: u128, to: u128, length: usize) {
    for n in from..to {
        let task = inspected(&receive(d, S, &command(n, Verb::Exec, &[vm(1)])))[0].task;
        d.handle(S, Event::Inspected { task, facts: facts(EnabledState::Enabled) });
        let ending = Ending { result: "x".repeat(length), message: "m".into(), ..Ending::done(2) };
        assert_eq!(said(&d.handle(S, Event::Ended { task, ending }))[0].result.len(), length);
    }
}

#[test]
fn results_are_dropped_a_day_after_the_deadline_and_the_rest_of_the_verdict_stays() {
    let mut d = dispatcher(4);
    end_with_results(&mut d, 1, 2, 1000);
    let again =
        |d: &mut Dispatcher, now| said_again(&d.handle(now, Event::Awaiting(vec![id(1).to_string()]))).remove(0);
    let full = again(&mut d, 2 * S);
    let day = 10 * S + crate::ledger::RESULT_RETENTION_US;
    assert_eq!((d.forget_expired(day - 1), again(&mut d, day - 1).result.len()), (0, 1000));
    assert_eq!((d.forget_expired(day), d.forget_expired(day)), (1000, 0));
    assert_eq!(again(&mut d, day), Verdict { result: String::new(), ..full });
    assert_eq!((d.results.bytes, d.results.queue.len()), (0, 0));
}

#[test]
fn results_beyond_the_limit_are_dropped_oldest_first_also_those_of_the_ledger() {
    let mut d = dispatcher(4);
    let length = 256 << 10;
    let most = (super::RESULTS_LIMIT / length) as u128;
    end_with_results(&mut d, 0, most + 2, length);
    let empty = |d: &mut Dispatcher| -> Vec<u128> {
        let all = (0..most + 2).map(|n| id(n).to_string()).collect();
        let verdicts = said_again(&d.handle(2 * S, Event::Awaiting(all)));
        (0..most + 2).zip(verdicts).filter(|(_, v)| v.result.is_empty()).map(|(n, _)| n).collect()
    };
    assert_eq!((empty(&mut d), d.results.bytes), (vec![0, 1], super::RESULTS_LIMIT));
    assert_eq!(d.forget_expired(2 * S), 2 * length as u64);
    let mut again = Dispatcher::new(host(), run(8), 1);
    again.recover(2 * S, d.entries());
    assert_eq!((empty(&mut again), again.results.bytes), (vec![0, 1], super::RESULTS_LIMIT));
    end_with_results(&mut again, most + 2, most + 3, length);
    assert_eq!((empty(&mut again), again.results.bytes), (vec![0, 1, 2], super::RESULTS_LIMIT));
}

#[test]
fn what_waited_too_long_expires_and_what_hangs_is_indeterminate() {
    let mut d = dispatcher(1);
    let first = inspected(&receive(&mut d, S, &command(1, Verb::PowerOn, &[vm(1), vm(2)])))[0].task;
    d.handle(S, Event::Inspected { task: first, facts: facts(EnabledState::Disabled) });
    let out = d.handle(10 * S + 1, Event::Tick);
    assert_eq!(said(&out)[0].outcome, Outcome::Expired);
    let out = d.handle(10 * S + OVERRUN_US + 1, Event::Tick);
    assert_eq!(out[0], Action::GiveUp(first));
    assert_eq!((said(&out)[0].outcome, said(&out)[0].code.as_str()), (Outcome::Indeterminate, "timeout"));
    assert!(d.handle(20 * S, Event::Ended { task: first, ending: Ending::done(2) }).is_empty());
}

#[test]
fn after_a_crash_each_member_is_answered_by_what_is_read_back() {
    let mut d = dispatcher(1);
    let mut entries = Vec::new();
    let keep = |actions: Vec<Action>, entries: &mut Vec<Entry>| {
        for action in &actions {
            if let Action::Record(entry) = action {
                entries.push(entry.clone());
            }
        }
        actions
    };
    let out = keep(receive(&mut d, S, &command(1, Verb::PowerOn, &[vm(1), vm(2)])), &mut entries);
    let first = inspected(&out)[0].task;
    keep(d.handle(S, Event::Inspected { task: first, facts: facts(EnabledState::Disabled) }), &mut entries);

    let mut d = Dispatcher::new(host(), run(8), 1);
    let out = d.recover(2 * S, entries.clone());
    let refused = said(&out);
    assert_eq!((refused[0].vm.clone(), refused[0].code.as_str()), (vm(2).to_string(), "stale-incarnation"));
    let Some(Action::ReadBack { entry, member }) = out.iter().find(|a| matches!(a, Action::ReadBack { .. })) else {
        panic!("{out:?}")
    };
    assert_eq!((entry.id, member.clone()), (id(1), vm(1).to_string()));
    let read = Event::ReadBack { command: id(1), member: member.clone(), facts: facts(EnabledState::Enabled) };
    let out = d.handle(3 * S, read.clone());
    assert_eq!((said(&out)[0].outcome, said(&out)[0].incarnation.clone()), (Outcome::Done, run(8).to_string()));
    assert!(d.handle(3 * S, read).is_empty());

    let mut d = Dispatcher::new(host(), run(9), 1);
    d.recover(2 * S, entries);
    let lost = Facts { lost: true, ..facts(EnabledState::Quiesce) };
    let out = d.handle(3 * S, Event::ReadBack { command: id(1), member: vm(1).to_string(), facts: lost });
    assert_eq!((said(&out)[0].outcome, said(&out)[0].code.as_str()), (Outcome::Failed, "volume-lost"));
}

#[test]
fn a_reboot_cut_short_by_a_crash_is_indeterminate() {
    let ending = super::recovery::outcome_of(Verb::Reboot, TargetKind::Vm, &facts(EnabledState::Enabled));
    assert_eq!((ending.outcome, ending.code), (Outcome::Indeterminate, ErrorCode::Indeterminate));
}

#[test]
fn what_is_remembered_is_what_the_ledger_holds() {
    let mut d = dispatcher(1);
    let first = inspected(&receive(&mut d, S, &command(1, Verb::PowerOn, &[vm(1), vm(2)])))[0].task;
    d.handle(S, Event::Inspected { task: first, facts: facts(EnabledState::Disabled) });
    let mut again = Dispatcher::new(host(), run(8), 1);
    let out = again.recover(S, d.entries());
    assert_eq!(out.iter().filter(|a| matches!(a, Action::ReadBack { .. })).count(), 1);
    assert_eq!(said(&out).len(), 1);
    again.forget_expired(100 * S);
    assert_eq!(again.commands.len(), 1);
}

/// A whole life of an agent: commands, answers in any order, time, crashes.
#[derive(Clone, Debug)]
enum Step {
    Command {
        n: u128,
        verb: usize,
        vms: Vec<u128>,
        epoch: u64,
        lives: u64,
        stale: bool,
    },
    Inspect {
        pick: prop::sample::Index,
        state: usize,
        lost: bool,
    },
    End {
        pick: prop::sample::Index,
        outcome: bool,
    },
    ReadBack {
        pick: prop::sample::Index,
        state: usize,
    },
    Awaiting {
        n: u128,
    },
    Wait {
        us: u64,
    },
    /// How many of the records not yet followed by another action are lost: none, they are durable first.
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    let index = any::<prop::sample::Index>();
    prop_oneof![
        4 => (0u128..6, 0..Verb::ALL.len(), prop::collection::vec(0u128..4, 1..4), 1u64..3, 0u64..8, prop::bool::weighted(0.1))
            .prop_map(|(n, verb, vms, epoch, lives, stale)| Step::Command { n, verb, vms, epoch, lives, stale }),
        6 => (index.clone(), 0..EnabledState::ALL.len(), prop::bool::weighted(0.1))
            .prop_map(|(pick, state, lost)| Step::Inspect { pick, state, lost }),
        6 => (index.clone(), any::<bool>()).prop_map(|(pick, outcome)| Step::End { pick, outcome }),
        3 => (index, 0..EnabledState::ALL.len()).prop_map(|(pick, state)| Step::ReadBack { pick, state }),
        2 => (0u128..6).prop_map(|n| Step::Awaiting { n }),
        2 => (0u64..4 * S).prop_map(|us| Step::Wait { us }),
        1 => Just(Step::Crash),
    ]
}

/// Checks the module's invariants on the stream of actions.
#[derive(Default)]
struct Witness {
    durable: Vec<Entry>,
    said: BTreeMap<(String, String), Verdict>,
    inspecting: Vec<Order>,
    acting: Vec<Order>,
    reading: Vec<(CommandId, String)>,
    begun: std::collections::BTreeSet<(CommandId, String)>,
}

impl Witness {
    fn see(&mut self, now: u64, parallel: usize, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Record(entry) => self.durable.push(entry),
                Action::Inspect(order) => {
                    assert!(now <= order.deadline_us, "inspected after its time");
                    self.recorded(order.command);
                    self.inspecting.push(order);
                }
                Action::Act { order, .. } => {
                    assert!(now <= order.deadline_us, "begun after its time");
                    let begun = Entry::Begun { id: order.command, vm: order.member.clone(), at_us: now };
                    assert!(self.durable.contains(&begun), "begun before it was recorded");
                    assert!(self.begun.insert((order.command, order.member.clone())), "begun twice");
                    self.inspecting.retain(|o| o.task != order.task);
                    self.acting.push(order);
                }
                Action::GiveUp(task) => {
                    self.inspecting.retain(|o| o.task != task);
                    self.acting.retain(|o| o.task != task);
                }
                Action::ReadBack { entry, member } => self.reading.push((entry.id, member)),
                Action::Say(verdict) => {
                    assert!(self.durable.contains(&Entry::Verdict(Box::new(verdict.clone()))), "said before recorded");
                    let member = (verdict.command.clone(), verdict.vm.clone());
                    self.inspecting.retain(|o| (o.command.to_string(), o.member.clone()) != member);
                    self.acting.retain(|o| (o.command.to_string(), o.member.clone()) != member);
                    assert!(self.said.insert(member, verdict).is_none(), "two verdicts for one member");
                }
                Action::SayAgain(verdict) => {
                    let member = (verdict.command.clone(), verdict.vm.clone());
                    assert_eq!(self.said.get(&member), Some(&verdict), "a verdict changed");
                }
                Action::Warn(_) => {}
            }
        }
        let work: Vec<&Order> = self.inspecting.iter().chain(&self.acting).collect();
        assert!(work.iter().filter(|o| !super::plan::is_quick(o.verb)).count() <= parallel, "too many at work");
        for order in &work {
            let same = work.iter().filter(|o| o.vm == order.vm && o.verb != Verb::PowerOff);
            assert!(order.vm.is_none() || same.count() <= 1, "two at work for one VM");
        }
    }

    fn recorded(&self, command: CommandId) {
        let found = self.durable.iter().any(|e| matches!(e, Entry::Command(c) if c.id == command));
        assert!(found, "inspected before it was recorded");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]
    #[test]
    fn every_member_gets_exactly_one_verdict_whatever_happens(steps in prop::collection::vec(step(), 1..60), parallel in 1usize..4) {
        let mut now = S;
        let mut life = 0;
        let mut d = Dispatcher::new(host(), run(life), parallel);
        let mut witness = Witness::default();
        for step in steps {
            let actions = match step {
                Step::Command { n, verb, vms, epoch, lives, stale } => {
                    let vms: Vec<VmId> = vms.into_iter().map(vm).collect();
                    let mut c = command(n, Verb::ALL[verb], &vms);
                    c.controller_epoch = epoch;
                    // the same id always means the same deadline
                    c.not_after_us = (n as u64 * 3 + 2) * S + lives % 2;
                    if stale {
                        c.members[0].incarnation = "old".into();
                    }
                    receive(&mut d, now, &c)
                }
                Step::Inspect { pick, state, lost } if !witness.inspecting.is_empty() => {
                    let task = witness.inspecting[pick.index(witness.inspecting.len())].task;
                    let state = EnabledState::ALL[state];
                    d.handle(now, Event::Inspected { task, facts: Facts { lost, ..facts(state) } })
                }
                Step::End { pick, outcome } if !witness.acting.is_empty() => {
                    let task = witness.acting[pick.index(witness.acting.len())].task;
                    let ending = if outcome { Ending::done(2) } else { Ending::of(Outcome::Failed, ErrorCode::Io, "x", 3) };
                    d.handle(now, Event::Ended { task, ending })
                }
                Step::ReadBack { pick, state } if !witness.reading.is_empty() => {
                    let (command, member) = witness.reading.swap_remove(pick.index(witness.reading.len()));
                    d.handle(now, Event::ReadBack { command, member, facts: facts(EnabledState::ALL[state]) })
                }
                Step::Awaiting { n } => d.handle(now, Event::Awaiting(vec![id(n).to_string()])),
                Step::Wait { us } => {
                    now += us;
                    d.handle(now, Event::Tick)
                }
                Step::Crash => {
                    life += 1;
                    witness.inspecting.clear();
                    witness.acting.clear();
                    witness.reading.clear();
                    d = Dispatcher::new(host(), run(life), parallel);
                    d.recover(now, witness.durable.clone())
                }
                Step::Inspect { .. } | Step::End { .. } | Step::ReadBack { .. } => continue,
            };
            witness.see(now, parallel, actions);
        }
        // in the end time answers for everybody
        for (command, member) in std::mem::take(&mut witness.reading) {
            let out = d.handle(now, Event::ReadBack { command, member, facts: Facts::blank() });
            witness.see(now, parallel, out);
        }
        now += 1000 * S;
        let out = d.handle(now, Event::Tick);
        witness.see(now, parallel, out);
        prop_assert_eq!(d.open_tasks(), 0);
        for entry in witness.durable.clone() {
            if let Entry::Command(c) = entry {
                for member in c.members {
                    prop_assert!(witness.said.contains_key(&(c.id.to_string(), member)), "a member without verdict");
                }
            }
        }
    }
}
