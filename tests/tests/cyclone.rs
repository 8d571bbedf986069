//! Another vendor's DDS reads and writes every topic: Cyclone DDS in Python, there and back.
//!
//! On loopback by configured peers, for everybody; by multicast between two network namespaces, for root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::{
    collections::{BTreeMap, BTreeSet},
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use muster_bus::{
    Bus, BusConfig, Payload, Publisher, Subscriber,
    testing::{Domain, Namespaces, free_domain},
};
use muster_idl::{Topic, samples};

const LIMIT: Duration = Duration::from_secs(60);

fn source_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|p| p.join("Cargo.lock").exists()).unwrap().to_path_buf()
}

/// The Python that has Cyclone: of `cargo xtask setup`, else the one in the path.
fn python() -> PathBuf {
    let venv = source_root().join("target/venv/bin/python");
    if venv.exists() { venv } else { "python3".into() }
}

struct Cyclone {
    child: Child,
    lines: Receiver<String>,
}

impl Cyclone {
    fn start(mut command: Command) -> Self {
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap_or_else(|e| {
                panic!("run {command:?}: {e}; `cargo xtask setup` installs Cyclone DDS for Python")
            });
        let (send, lines) = channel();
        let out = child.stdout.take().unwrap();
        std::thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                if send.send(line).is_err() {
                    return;
                }
            }
        });
        Self { child, lines }
    }

    fn say(&mut self, line: &str) {
        writeln!(self.child.stdin.as_mut().unwrap(), "{line}").unwrap();
    }
}

impl Drop for Cyclone {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.child.try_wait().is_ok_and(|status| status.is_none()) && Instant::now() < deadline {
            std::thread::park_timeout(Duration::from_millis(20));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One topic's two ends on our side, whatever its type.
trait Ends {
    fn topic(&self) -> &'static str;
    fn publish(&self);
    fn dispose(&self);
    /// A sample of the other vendor equal to ours has come; a different one is a failure.
    fn echoed(&mut self, own: &str) -> bool;
    fn disposed(&mut self, own: &str) -> bool;
}

struct TypedEnds<T: Topic> {
    publisher: Publisher<T>,
    subscriber: Subscriber<T>,
    sample: T,
    echoed: bool,
    disposed: bool,
}

impl<T: Topic + PartialEq + std::fmt::Debug> TypedEnds<T> {
    fn read(&mut self, own: &str) {
        while let Some(received) = self.subscriber.try_recv() {
            // our reader hears our own writer too
            if received.writer.starts_with(own) {
                continue;
            }
            match received.payload {
                Payload::Value(value) => {
                    assert_eq!(value, self.sample, "{} came back different", T::INFO.name);
                    self.echoed = true;
                }
                Payload::Disposed(key) => {
                    assert_eq!(key, self.sample.key(), "{}", T::INFO.name);
                    self.disposed = true;
                }
            }
        }
    }
}

impl<T: Topic + PartialEq + std::fmt::Debug> Ends for TypedEnds<T> {
    fn topic(&self) -> &'static str {
        T::INFO.name
    }
    fn publish(&self) {
        self.publisher.publish(&self.sample).unwrap();
    }
    fn dispose(&self) {
        self.publisher.dispose(&self.sample.key()).unwrap();
    }
    fn echoed(&mut self, own: &str) -> bool {
        self.read(own);
        self.echoed
    }
    fn disposed(&mut self, own: &str) -> bool {
        self.read(own);
        self.disposed
    }
}

/// Everything there and back: `bus` is our end, `command` starts Cyclone's.
fn round_trip(bus: &Bus, domain: &Domain, mut command: Command) {
    let mut rows = Vec::new();
    let mut ends: Vec<Box<dyn Ends>> = Vec::new();
    macro_rules! topic {
        ($($sample:ident)+) => { $({
            let sample = samples::$sample();
            fn add<T: Topic + PartialEq + std::fmt::Debug>(
                bus: &Bus, sample: T, rows: &mut Vec<serde_json::Value>, ends: &mut Vec<Box<dyn Ends>>,
            ) {
                let profile = T::INFO.profile;
                rows.push(serde_json::json!({
                    "topic": T::INFO.name,
                    "qos": {
                        "reliability": format!("{:?}", profile.reliability),
                        "durability": format!("{:?}", profile.durability),
                        "depth": profile.history_depth,
                    },
                    "sample": sample,
                }));
                ends.push(Box::new(TypedEnds {
                    publisher: bus.publisher::<T>().unwrap(), subscriber: bus.subscriber::<T>(256).unwrap(), sample,
                    echoed: false, disposed: false,
                }));
            }
            add(bus, sample, &mut rows, &mut ends);
        })+ };
    }
    topic!(heartbeat physical_host host_metrics store_state store_health virtual_system vm_metrics volume_metrics verdict
           progress event controller_state group_set group_command);
    assert_eq!(ends.len(), muster_idl::topics::ALL.len(), "a topic is left out");
    let dir = tempfile::tempdir().unwrap();
    let expected = dir.path().join("expected.json");
    std::fs::write(&expected, serde_json::to_vec_pretty(&rows).unwrap()).unwrap();
    command.arg(source_root().join("tests/interop/echo.py")).arg(domain.cell().to_string()).arg(&expected);
    let mut cyclone = Cyclone::start(command);
    let own = bus.participant_guid()[..24].to_string();

    let topics: BTreeSet<&str> = ends.iter().map(|e| e.topic()).collect();
    let mut got: BTreeSet<String> = BTreeSet::new();
    let mut gone: BTreeSet<String> = BTreeSet::new();
    let deadline = Instant::now() + LIMIT;
    let mut published_at = None;
    let listen = |cyclone: &mut Cyclone, got: &mut BTreeSet<String>, gone: &mut BTreeSet<String>| {
        while let Ok(line) = cyclone.lines.recv_timeout(Duration::from_millis(20)) {
            match line.split_whitespace().collect::<Vec<_>>()[..] {
                ["got", topic] => _ = got.insert(topic.to_string()),
                ["disposed", topic] => _ = gone.insert(topic.to_string()),
                ["ready"] => {}
                _ => panic!("cyclone says: {line}"),
            }
        }
    };
    loop {
        listen(&mut cyclone, &mut got, &mut gone);
        let missing: Vec<&str> = ends.iter_mut().filter_map(|e| (!e.echoed(&own)).then_some(e.topic())).collect();
        if got.len() == topics.len() && missing.is_empty() {
            break;
        }
        assert!(
            Instant::now() < deadline,
            "in {LIMIT:?} cyclone read {got:?}; not come back: {missing:?}; {}",
            bus.diagnosis()
        );
        if published_at.is_none_or(|at: Instant| at.elapsed() > Duration::from_millis(300)) {
            published_at = Some(Instant::now());
            ends.iter().filter(|e| !got.contains(e.topic())).for_each(|e| e.publish());
        }
    }
    // and both sides' disposal, where instances are remembered
    let kept: BTreeMap<&str, usize> = ends
        .iter()
        .enumerate()
        .filter(|(_, e)| {
            muster_idl::topics::ALL
                .iter()
                .any(|t| t.name == e.topic() && t.profile.durability == muster_idl::Durability::TransientLocal)
        })
        .map(|(i, e)| (e.topic(), i))
        .collect();
    cyclone.say("dispose");
    loop {
        listen(&mut cyclone, &mut got, &mut gone);
        let missing: Vec<&str> =
            kept.iter().filter(|(_, i)| !ends[**i].disposed(&own)).map(|(topic, _)| *topic).collect();
        if missing.is_empty() {
            break;
        }
        assert!(Instant::now() < deadline + LIMIT, "not seen as disposed by cyclone: {missing:?}");
    }
    kept.values().for_each(|i| ends[*i].dispose());
    while kept.keys().any(|topic| !gone.contains(*topic)) {
        listen(&mut cyclone, &mut got, &mut gone);
        assert!(Instant::now() < deadline + 2 * LIMIT, "cyclone saw the disposal of {gone:?} only");
    }
}

/// Cyclone without multicast, on loopback.
const LOOPBACK: &str = "<CycloneDDS><Domain Id=\"any\"><General><Interfaces><NetworkInterface name=\"lo\"/></Interfaces>\
    <AllowMulticast>false</AllowMulticast></General><Discovery><ParticipantIndex>auto</ParticipantIndex>\
    <MaxAutoParticipantIndex>20</MaxAutoParticipantIndex><Peers><Peer Address=\"127.0.0.1\"/></Peers></Discovery>\
    </Domain></CycloneDDS>";

#[test]
fn every_topic_goes_there_and_back_on_loopback() {
    let domain = free_domain();
    let bus = domain.bus().unwrap();
    let mut command = Command::new(python());
    command.env("CYCLONEDDS_URI", LOOPBACK);
    round_trip(&bus, &domain, command);
}

#[test]
fn every_topic_goes_there_and_back_by_multicast_between_namespaces() {
    let Some(namespaces) = Namespaces::make() else { return };
    let domain = free_domain();
    namespaces.inside(0, || {
        let bus = Bus::dds(&BusConfig {
            cell: domain.cell(),
            interface: Some(Namespaces::ADDRESSES[0].into()),
            peers: vec![],
            multicast: true,
        })
        .unwrap();
        let mut command = Command::new("ip");
        command.args(["netns", "exec", namespaces.name(1)]).arg(python());
        command.env(
            "CYCLONEDDS_URI",
            "<CycloneDDS><Domain Id=\"any\"><General><Interfaces><NetworkInterface name=\"eth0\"/></Interfaces>\
             </General></Domain></CycloneDDS>",
        );
        round_trip(&bus, &domain, command);
    });
}
