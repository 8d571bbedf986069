//! What a bus must do, run against DDS and against its twin.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use muster_bus::{
    Bus, Payload, Sample, Subscriber,
    testing::{Domain, free_domain, wait_until},
    twin::{LossConfig, Network},
};
use muster_idl::{
    Topic,
    v1::{self, Argument, GroupCommand, TargetKind, Verb},
};

const LIMIT: Duration = Duration::from_secs(20);

/// Two nodes that hear each other, and a way to make a third.
trait Fixture {
    fn make() -> Self;
    fn join(&self, name: &str) -> Bus;
}

struct Dds(Domain);
impl Fixture for Dds {
    fn make() -> Self {
        Dds(free_domain())
    }
    fn join(&self, _name: &str) -> Bus {
        self.0.bus().unwrap()
    }
}

struct Twin(Network);
impl Fixture for Twin {
    fn make() -> Self {
        Twin(Network::new(7, LossConfig::NONE))
    }
    fn join(&self, name: &str) -> Bus {
        self.0.join(name)
    }
}

struct LossyTwin(Network);
impl Fixture for LossyTwin {
    fn make() -> Self {
        LossyTwin(Network::new(
            7,
            LossConfig { retransmission: Duration::from_millis(1), ..LossConfig::lossy(0.2, Duration::from_millis(2)) },
        ))
    }
    fn join(&self, name: &str) -> Bus {
        self.0.join(name)
    }
}

fn command(id: u64, payload: usize) -> GroupCommand {
    GroupCommand {
        id: format!("{id:08}"),
        controller: "c".into(),
        issuer: "test".into(),
        controller_epoch: 1,
        group_epoch: 1,
        issued_at_us: id,
        not_after_us: u64::MAX,
        target_kind: TargetKind::Vm,
        target: String::new(),
        members: vec![],
        verb: Verb::Ping,
        arguments: vec![Argument { name: "n".into(), value: id.to_string() }],
        wave: 0,
        plan_digest: String::new(),
        retry_of: String::new(),
        key_id: String::new(),
        signature: vec![],
        extension: (0..payload).map(|i| i as u8).collect(),
    }
}

fn vm(name: &str, sampled_at_us: u64) -> v1::VirtualSystem {
    v1::VirtualSystem {
        host: "host".into(),
        vm: name.into(),
        incarnation: "i".into(),
        name: name.into(),
        enabled_state: 2,
        requested_state: 12,
        health_state: 5,
        operational_status: vec![2],
        guest_up: true,
        virtual_processors: 2,
        memory_bytes: 1 << 30,
        disks: vec![],
        template: "t".into(),
        remark: String::new(),
        changed_at_us: 0,
        sampled_at_us,
    }
}

fn controller(counter: u64) -> v1::ControllerState {
    v1::ControllerState {
        controller: "c".into(),
        incarnation: "i".into(),
        name: "n".into(),
        epoch: 1,
        group_epoch: 0,
        stream_endpoint: String::new(),
        lab: true,
        sent_at_us: counter,
        awaiting: vec![],
    }
}

fn heartbeat(counter: u64) -> v1::Heartbeat {
    v1::Heartbeat {
        host: "h".into(),
        incarnation: "i".into(),
        boot: "b".into(),
        participant: String::new(),
        counter,
        sent_at_us: 0,
        draining: false,
    }
}

fn next<T: Topic>(subscriber: &mut Subscriber<T>) -> Sample<T> {
    subscriber.recv_timeout(LIMIT).unwrap_or_else(|| panic!("no sample on {} within {LIMIT:?}", T::INFO.name))
}

fn reliable_samples_arrive_in_the_order_of_their_writer<F: Fixture>() {
    let f = F::make();
    let (a, b, c) = (f.join("a"), f.join("b"), f.join("c"));
    let mut reader = c.subscriber::<GroupCommand>(64).unwrap();
    let writers = [a.publisher::<GroupCommand>().unwrap(), b.publisher::<GroupCommand>().unwrap()];
    wait_until("both writers match", LIMIT, || reader.matched() == 2 && writers.iter().all(|w| w.matched() == 1));
    for i in 0..300 {
        for (w, writer) in writers.iter().enumerate() {
            writer.publish(&command(i + 1000 * w as u64, 100)).unwrap();
        }
    }
    let mut seen: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for _ in 0..600 {
        let sample = next(&mut reader);
        let writer = sample.writer.clone();
        let value = sample.value().unwrap();
        assert_eq!(value, command(value.issued_at_us, 100));
        seen.entry(writer).or_default().push(value.issued_at_us);
    }
    assert_eq!(seen.len(), 2);
    let mut all: Vec<Vec<u64>> = seen.into_values().collect();
    all.sort();
    assert_eq!(all, vec![(0..300).collect::<Vec<_>>(), (1000..1300).collect()]);
    assert_eq!(reader.missed(), 0);
}

/// 4,000 samples to a reader that takes none meanwhile: 16 in its queue, the rest in the cache of DDS.
fn a_slow_reader_gets_everything<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let mut reader = b.subscriber::<GroupCommand>(16).unwrap();
    let writer = a.publisher::<GroupCommand>().unwrap();
    wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    for i in 0..4000 {
        writer.publish(&command(i, 64)).unwrap();
    }
    for i in 0..4000 {
        assert_eq!(next(&mut reader).value().unwrap().issued_at_us, i, "missed {}", reader.missed());
    }
    assert_eq!(reader.missed(), 0);
    assert!(reader.try_recv().is_none());
}

/// RustDDS may send superseded samples before it (it trims to the depth now and then); in order they are.
fn a_late_joiner_gets_the_last_snapshot<F: Fixture>() {
    let f = F::make();
    let a = f.join("a");
    let writer = a.publisher::<v1::ControllerState>().unwrap();
    for i in 0..20 {
        writer.publish(&controller(i)).unwrap();
    }
    let b = f.join("b");
    let mut reader = b.subscriber::<v1::ControllerState>(16).unwrap();
    let mut last = None;
    while last != Some(19) {
        let counter = next(&mut reader).value().unwrap().sent_at_us;
        assert!(last < Some(counter), "{counter} after {last:?}");
        last = Some(counter);
    }
    writer.publish(&controller(20)).unwrap();
    assert_eq!(next(&mut reader).value().unwrap(), controller(20));
}

fn a_late_joiner_gets_every_instance_of_state<F: Fixture>() {
    let f = F::make();
    let a = f.join("a");
    let writer = a.publisher::<v1::VirtualSystem>().unwrap();
    for round in 0..3 {
        for i in 0..30 {
            writer.publish(&vm(&format!("vm{i:02}"), round)).unwrap();
        }
    }
    let b = f.join("b");
    let mut reader = b.subscriber::<v1::VirtualSystem>(16).unwrap();
    let mut last: BTreeMap<String, u64> = BTreeMap::new();
    while last.len() < 30 || last.values().any(|round| *round < 2) {
        let value = next(&mut reader).value().unwrap();
        last.insert(value.vm, value.sampled_at_us);
    }
}

/// Commands are volatile: who comes later must not obey what was said before.
fn a_late_joiner_gets_no_command<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let writer = a.publisher::<GroupCommand>().unwrap();
    let mut early = b.subscriber::<GroupCommand>(16).unwrap();
    wait_until("they match", LIMIT, || early.matched() == 1 && writer.matched() == 1);
    writer.publish(&command(1, 0)).unwrap();
    assert_eq!(next(&mut early).value().unwrap().issued_at_us, 1);
    let c = f.join("c");
    let mut late = c.subscriber::<GroupCommand>(16).unwrap();
    wait_until("the late one matches", LIMIT, || late.matched() == 1 && writer.matched() == 2);
    writer.publish(&command(2, 0)).unwrap();
    assert_eq!(next(&mut late).value().unwrap().issued_at_us, 2);
    assert_eq!(next(&mut early).value().unwrap().issued_at_us, 2);
}

fn disposal_names_the_instance<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let writer = a.publisher::<v1::VirtualSystem>().unwrap();
    let mut reader = b.subscriber::<v1::VirtualSystem>(16).unwrap();
    wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    let (x, y) = (vm("x", 0), vm("y", 0));
    writer.publish(&x).unwrap();
    writer.publish(&y).unwrap();
    writer.dispose(&x.key()).unwrap();
    assert_eq!(next(&mut reader).payload, Payload::Value(x.clone()));
    assert_eq!(next(&mut reader).payload, Payload::Value(y));
    assert_eq!(next(&mut reader).payload, Payload::Disposed(x.key()));
    writer.publish(&x).unwrap();
    assert_eq!(next(&mut reader).payload, Payload::Value(x), "it may come back");
}

fn a_mebibyte_arrives_whole<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let writer = a.publisher::<GroupCommand>().unwrap();
    let mut reader = b.subscriber::<GroupCommand>(16).unwrap();
    wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    for i in 0..3 {
        writer.publish(&command(i, 1 << 20)).unwrap();
    }
    for i in 0..3 {
        assert_eq!(next(&mut reader).value().unwrap(), command(i, 1 << 20));
    }
}

/// All topics of a host and a controller at once, none takes another's samples.
fn many_topics_share_a_bus<F: Fixture>() {
    let f = F::make();
    let (host, controller_bus) = (f.join("host"), f.join("controller"));
    macro_rules! all {
        ($($name:ident: $ty:ident = $value:expr;)+) => {
            $(let (source, sink) = (host.publisher::<v1::$ty>().unwrap(), controller_bus.subscriber::<v1::$ty>(64).unwrap());
              wait_until(stringify!($ty), LIMIT, || sink.matched() == 1 && source.matched() == 1);
              let mut $name = (source, sink, $value);)+
            for _ in 0..10 { $($name.0.publish(&$name.2).unwrap();)+ }
            $(assert_eq!(next(&mut $name.1).value().unwrap(), $name.2, stringify!($ty));)+
        };
    }
    all! {
        heartbeats: Heartbeat = heartbeat(3);
        systems: VirtualSystem = vm("a", 1);
        controllers: ControllerState = controller(9);
        commands: GroupCommand = command(4, 10);
        progress: Progress = v1::Progress {
            command: "c".into(), host: "h".into(), vm: "v".into(), phase: "p".into(), done: 1, total: 2, sent_at_us: 3,
        };
        verdicts: Verdict = v1::Verdict {
            command: "c".into(), host: "h".into(), vm: "v".into(), incarnation: "i".into(), outcome: v1::Outcome::Indeterminate,
            code: "ok".into(), message: "m".into(), enabled_state: 2, guest_up: true, result: "{}".into(),
            received_at_us: 1, started_at_us: 2, ended_at_us: 3,
        };
        events: Event = v1::Event {
            host: "h".into(), vm: "v".into(), incarnation: "i".into(), counter: 1, occurred_at_us: 2, severity: v1::Severity::Error,
            kind: "k".into(), message: "m".into(), from_state: 2, to_state: 3, command: String::new(),
        };
        groups: GroupSet = v1::GroupSet {
            controller: "c".into(), epoch: 5,
            groups: vec![v1::Group { path: "a/b".into(), hosts: vec!["h".into()], vms: vec![], groups: vec!["a".into()] }],
        };
    }
}

/// A burst of telemetry, one sample a VM as an agent writes them each second: a reader that keeps up gets all of it.
fn a_burst_of_telemetry_is_not_lost_on_the_way_out<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let writer = a.publisher::<v1::Heartbeat>().unwrap();
    let mut reader = b.subscriber::<v1::Heartbeat>(256).unwrap();
    wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    let mut got = 0;
    // best effort may lose, so bursts are repeated until one arrives whole
    for burst in 0..20 {
        for i in 0..60 {
            writer.publish(&heartbeat(burst * 100 + i)).unwrap();
        }
        let mut of_this = 0;
        let deadline = Instant::now() + Duration::from_secs(2);
        while of_this < 60 {
            match reader.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Some(sample) => of_this += u64::from(sample.value().unwrap().counter / 100 == burst),
                None => break,
            }
        }
        got = got.max(of_this);
        if got == 60 {
            return;
        }
    }
    panic!("the best of 20 bursts of 60 brought {got}");
}

fn a_slow_reader_of_telemetry_loses_the_oldest_and_knows_it<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let writer = a.publisher::<v1::Heartbeat>().unwrap();
    let mut reader = b.subscriber::<v1::Heartbeat>(4).unwrap();
    wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    let mut counter = 0;
    wait_until("some were dropped", LIMIT, || {
        writer.publish(&heartbeat(counter)).unwrap();
        counter += 1;
        reader.dropped() >= 10
    });
    let first = next(&mut reader).value().unwrap().counter;
    assert!(first >= 10, "the oldest went first, got {first}");
}

fn who_left_is_no_longer_matched<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let reader = b.subscriber::<GroupCommand>(16).unwrap();
    let writer = a.publisher::<GroupCommand>().unwrap();
    wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    drop(reader);
    wait_until("the reader is gone", LIMIT, || writer.matched() == 0);
    let reader = b.subscriber::<GroupCommand>(16).unwrap();
    wait_until("they match again", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
    drop((writer, a));
    wait_until("the writer's bus is gone", LIMIT, || reader.matched() == 0);
}

/// Publishers and subscribers live on over a rebuild, and a late joiner's view is restored.
fn a_rebuilt_bus_works_on<F: Fixture>() {
    let f = F::make();
    let (a, b) = (f.join("a"), f.join("b"));
    let states = a.publisher::<v1::VirtualSystem>().unwrap();
    let commands = b.publisher::<GroupCommand>().unwrap();
    let mut inbox = a.subscriber::<GroupCommand>(16).unwrap();
    wait_until("they match", LIMIT, || inbox.matched() == 1 && commands.matched() == 1);
    for i in 0..5 {
        states.publish(&vm(&format!("vm{i}"), 1)).unwrap();
    }
    let before = a.participant_guid();
    a.rebuild().unwrap();
    assert_ne!(a.participant_guid(), before);
    let mut reader = b.subscriber::<v1::VirtualSystem>(16).unwrap();
    let mut seen = std::collections::BTreeSet::new();
    while seen.len() < 5 {
        seen.insert(next(&mut reader).value().unwrap().vm);
    }
    wait_until("the new participant matches", LIMIT, || inbox.matched() == 1 && commands.matched() == 1);
    commands.publish(&command(1, 0)).unwrap();
    assert_eq!(next(&mut inbox).value().unwrap().issued_at_us, 1);
}

fn recv_works_in_a_runtime<F: Fixture>() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async {
        let f = F::make();
        let (a, b) = (f.join("a"), f.join("b"));
        let writer = a.publisher::<GroupCommand>().unwrap();
        let mut reader = b.subscriber::<GroupCommand>(2).unwrap();
        wait_until("they match", LIMIT, || reader.matched() == 1 && writer.matched() == 1);
        let sender = tokio::task::spawn_blocking(move || {
            for i in 0..50 {
                writer.publish(&command(i, 0)).unwrap();
            }
            writer
        });
        for i in 0..50 {
            let sample = tokio::time::timeout(LIMIT, reader.recv()).await.unwrap().unwrap();
            assert_eq!(sample.value().unwrap().issued_at_us, i);
        }
        sender.await.unwrap();
    });
}

macro_rules! suite {
    ($module:ident, $fixture:ident, [$($test:ident),+ $(,)?]) => {
        mod $module {
            $(#[test] fn $test() { super::$test::<super::$fixture>(); })+
        }
    };
}

macro_rules! all_fixtures {
    ($($test:ident),+ $(,)?) => {
        suite!(dds, Dds, [$($test),+]);
        suite!(twin, Twin, [$($test),+]);
        suite!(lossy_twin, LossyTwin, [$($test),+]);
    };
}

all_fixtures! {
    reliable_samples_arrive_in_the_order_of_their_writer,
    a_slow_reader_gets_everything,
    a_late_joiner_gets_the_last_snapshot,
    a_late_joiner_gets_every_instance_of_state,
    a_late_joiner_gets_no_command,
    disposal_names_the_instance,
    a_mebibyte_arrives_whole,
    a_slow_reader_of_telemetry_loses_the_oldest_and_knows_it,
    who_left_is_no_longer_matched,
    a_rebuilt_bus_works_on,
    recv_works_in_a_runtime,
}
// these send best-effort samples and ask for all of them
suite!(dds_best_effort, Dds, [a_burst_of_telemetry_is_not_lost_on_the_way_out, many_topics_share_a_bus]);
suite!(twin_best_effort, Twin, [a_burst_of_telemetry_is_not_lost_on_the_way_out, many_topics_share_a_bus]);
