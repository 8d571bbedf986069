//! Whatever the bus, the hosts and the controller's own crashes do, rules 1 to 4 hold.

use std::collections::{BTreeMap, BTreeSet};

use muster_common::{CommandId, HostId, VmId};
use muster_idl::v1::{Outcome, TargetKind, Verb};
use proptest::prelude::*;

use super::*;

const S: u64 = 1_000_000;

#[derive(Default)]
struct Hosts(BTreeMap<HostId, u64>, u64);
impl Liveness for Hosts {
    fn last_seen_us(&self, host: HostId) -> u64 {
        self.0.get(&host).copied().unwrap_or(0)
    }
    fn is_online(&self, host: HostId) -> bool {
        self.last_seen_us(host) + 5 * S >= self.1 && self.last_seen_us(host) > 0
    }
}

fn order(members: &[(HostId, VmId, u16)], timeout_s: u64) -> Order {
    Order {
        id: CommandId::now(),
        verb: Verb::PowerOn,
        target_kind: TargetKind::Vm,
        target: "school".into(),
        issuer: "test".into(),
        group_epoch: 1,
        issued_at_us: 100 * S,
        not_after_us: (100 + timeout_s) * S,
        arguments: BTreeMap::new(),
        retry_of: None,
        members: members
            .iter()
            .map(|(host, vm, cell)| Member {
                host: *host,
                host_name: "h".into(),
                cell: *cell,
                incarnation: String::new(),
                vm: Some(*vm),
                name: "v".into(),
            })
            .collect(),
    }
}

fn said(outcome: Outcome, now_us: u64) -> Verdict {
    Verdict {
        outcome,
        code: "ok".into(),
        message: String::new(),
        enabled_state: 2,
        guest_up: false,
        result: String::new(),
        received_at_us: 0,
        started_at_us: 0,
        ended_at_us: 0,
        arrived_at_us: now_us,
        late: false,
    }
}

/// What survives a crash, kept as the driver keeps it.
#[derive(Default)]
struct Disk(Option<Record>);
impl Disk {
    fn apply(&mut self, engine: &Engine, actions: &[Action]) {
        for action in actions {
            match action {
                Action::Record(id) => {
                    let record = engine.get(*id).unwrap();
                    self.0 = Some(Record::new(record.order.clone()));
                }
                Action::RecordPublished { cell, .. } => {
                    self.0.as_mut().unwrap().published.insert(*cell);
                }
                Action::RecordVerdict { command, member } => {
                    let verdict = engine.get(*command).unwrap().verdicts[*member].clone();
                    self.0.as_mut().unwrap().verdicts[*member] = verdict;
                }
                Action::RecordEnd(id) => self.0.as_mut().unwrap().ended_at_us = engine.get(*id).unwrap().ended_at_us,
                _ => {}
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Step {
    Wait(u64),
    Beat(usize),
    /// Member, outcome.
    Say(usize, usize),
    Stranger,
    PublishDone(u16),
    PublishFailed(u16),
    Crash,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (1u64..8).prop_map(Step::Wait),
        3 => (0usize..3).prop_map(Step::Beat),
        6 => (0usize..6, 0usize..8).prop_map(|(m, o)| Step::Say(m, o)),
        1 => Just(Step::Stranger),
        3 => (0u16..2).prop_map(Step::PublishDone),
        1 => (0u16..2).prop_map(Step::PublishFailed),
        1 => Just(Step::Crash),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]
    #[test]
    fn every_member_ends_with_exactly_one_verdict(steps in prop::collection::vec(step(), 0..80)) {
        let hosts: Vec<HostId> = (0..3).map(|_| HostId::random()).collect();
        let members: Vec<(HostId, VmId, u16)> =
            (0..6).map(|i| (hosts[i % 3], VmId::random(), (i % 2) as u16)).collect();
        let settings = Settings::default();
        let mut engine = Engine::new(settings);
        let mut disk = Disk::default();
        let mut world = Hosts(BTreeMap::new(), 100 * S);
        let order = order(&members, 30);
        let id = order.id;
        let mut to_publish: Vec<u16> = Vec::new();
        let mut handed_over: BTreeMap<u16, u32> = BTreeMap::new();
        let mut crashes = 0;
        let mut first_word: BTreeMap<usize, Outcome> = BTreeMap::new();
        let mut ended_seen = 0;

        let actions = engine.begin(order.clone());
        prop_assert_eq!(actions[0].clone(), Action::Record(id));
        prop_assert!(engine.begin(order.clone()).is_empty(), "an id begins once");
        let mut now = 100 * S;
        disk.apply(&engine, &actions);
        let mut queue = vec![(now, actions)];
        let mut all: Vec<Step> = steps;
        // whatever happened: the deadline, the grace after a restart, and a tick
        all.extend([Step::Wait(31 + 3), Step::Wait(9)]);
        for step in all {
            match step {
                Step::Wait(seconds) => {
                    for _ in 0..seconds {
                        now += S;
                        world.1 = now;
                        let actions = engine.tick(now, &world);
                        disk.apply(&engine, &actions);
                        queue.push((now, actions));
                    }
                }
                Step::Beat(host) => { world.0.insert(hosts[host], now); }
                Step::Say(member, outcome) => {
                    let outcome = Outcome::ALL[outcome];
                    let (host, vm, _) = members[member];
                    let held = engine.get(id).is_some();
                    let actions = engine.verdict(id, host, Some(vm), said(outcome, now));
                    if held && !matches!(outcome, Outcome::Offline | Outcome::Unknown) {
                        first_word.entry(member).or_insert(outcome);
                    }
                    disk.apply(&engine, &actions);
                    queue.push((now, actions));
                }
                Step::Stranger => {
                    let actions = engine.verdict(id, hosts[0], Some(VmId::random()), said(Outcome::Done, now));
                    let recorded = actions.iter().any(|a| matches!(a, Action::RecordVerdict { .. }));
                    prop_assert!(!recorded);
                }
                Step::PublishDone(cell) if to_publish.contains(&cell) => {
                    to_publish.retain(|c| *c != cell);
                    *handed_over.entry(cell).or_default() += 1;
                    let actions = engine.published(id, cell);
                    disk.apply(&engine, &actions);
                    queue.push((now, actions));
                }
                Step::PublishFailed(cell) if to_publish.contains(&cell) => {
                    to_publish.retain(|c| *c != cell);
                    engine.publish_failed(id, cell, now);
                }
                Step::PublishDone(_) | Step::PublishFailed(_) => {}
                Step::Crash => {
                    crashes += 1;
                    to_publish.clear();
                    queue.clear();
                    engine = Engine::new(settings);
                    if let Some(record) = disk.0.clone() {
                        queue.push((now, engine.restore(record, now)));
                    }
                    world.0.clear();
                }
            }
            for (at, actions) in queue.drain(..) {
                for action in &actions {
                    match action {
                        Action::Publish { cell, .. } => {
                            prop_assert!(at < order.not_after_us, "nothing is published that must not be begun");
                            prop_assert!(!to_publish.contains(cell));
                            to_publish.push(*cell);
                        }
                        Action::RecordEnd(_) => ended_seen += 1,
                        _ => {}
                    }
                }
            }
            if let Some(record) = &disk.0 {
                for (member, first) in &first_word {
                    if let Some(verdict) = &record.verdicts[*member] {
                        prop_assert_eq!(verdict.outcome, *first, "a member's first own word stands");
                    }
                }
                if !record.is_open() {
                    prop_assert!(record.verdicts.iter().all(Option::is_some), "no end without all verdicts");
                }
            }
        }
        let record = disk.0.unwrap();
        prop_assert!(!record.is_open(), "it ends by its deadline");
        prop_assert_eq!(ended_seen, 1, "it ends once");
        prop_assert!(record.verdicts.iter().all(Option::is_some));
        if crashes == 0 {
            prop_assert!(handed_over.values().all(|n| *n == 1), "one sample a cell");
        }
        let cells: BTreeSet<u16> = handed_over.keys().copied().collect();
        prop_assert!(record.published.is_subset(&cells));
    }
}

#[test]
fn a_silent_member_of_a_live_host_is_unknown_and_of_a_dead_one_offline() {
    let (alive, dead) = (HostId::random(), HostId::random());
    let members = [(alive, VmId::random(), 0), (dead, VmId::random(), 0)];
    let mut engine = Engine::new(Settings::default());
    let order = order(&members, 10);
    let id = order.id;
    engine.begin(order);
    engine.published(id, 0);
    let mut world = Hosts(BTreeMap::from([(alive, 112 * S), (dead, 101 * S)]), 112 * S);
    assert_eq!(engine.tick(112 * S, &world), []);
    world.1 = 113 * S;
    engine.tick(113 * S, &world);
    let outcomes: Vec<Outcome> = engine.get(id).unwrap().verdicts.iter().map(|v| v.as_ref().unwrap().outcome).collect();
    assert_eq!(outcomes, [Outcome::Unknown, Outcome::Offline]);
    // its own word comes late, replaces the controller's, and is final
    let (host, vm, _) = members[1];
    let actions = engine.verdict(id, host, Some(vm), said(Outcome::Done, 120 * S));
    assert_eq!(actions, [Action::RecordVerdict { command: id, member: 1 }]);
    assert!(engine.get(id).unwrap().verdicts[1].as_ref().unwrap().late);
    let again = engine.verdict(id, host, Some(vm), said(Outcome::Failed, 121 * S));
    assert!(matches!(again[..], [Action::Ignored { why: Ignored::Contradiction, .. }]));
}

#[test]
fn a_host_lost_for_good_does_not_keep_a_long_command_open() {
    let (alive, dead) = (HostId::random(), HostId::random());
    let members = [(alive, VmId::random(), 0), (dead, VmId::random(), 0)];
    let mut engine = Engine::new(Settings::default());
    let order = order(&members, 3600);
    let id = order.id;
    engine.begin(order);
    engine.published(id, 0);
    engine.verdict(id, alive, Some(members[0].1), said(Outcome::Done, 101 * S));
    let mut world = Hosts(BTreeMap::from([(alive, 160 * S)]), 160 * S);
    engine.tick(160 * S, &world);
    assert!(engine.get(id).unwrap().is_open());
    world.1 = 161 * S;
    engine.tick(161 * S, &world);
    assert!(!engine.get(id).unwrap().is_open());
}

#[test]
fn awaiting_names_what_lacks_words_and_ends_with_them() {
    let members = [(HostId::random(), VmId::random(), 0)];
    let mut engine = Engine::new(Settings::default());
    let order = order(&members, 10);
    let id = order.id;
    engine.begin(order);
    assert_eq!(engine.awaiting(), [id]);
    engine.tick(200 * S, &Hosts::default());
    assert_eq!(engine.awaiting(), [id], "the controller's own word is not enough");
    engine.verdict(id, members[0].0, Some(members[0].1), said(Outcome::Done, 201 * S));
    assert_eq!(engine.awaiting(), []);
    assert_eq!(engine.tick(202 * S, &Hosts::default()), [Action::Forget(id)]);
}
