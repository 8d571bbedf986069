//! The twin: a bus in memory that behaves as DDS does where it matters, driven by one seed.
//!
//! Samples travel as CDR bytes. Best-effort samples are lost at random; reliable ones are delayed by the
//! retransmissions a loss costs, stay in the order of their writer, and wait out a partition. A partition longer than
//! the lease ends the match: what was written to volatile topics before is lost, transient-local history is sent
//! again. Depth of transient-local history counts per writer, as in RustDDS.
//!
//! Time is real ([`Network::new`]) or moved by the test ([`Network::with_virtual_time`], [`Network::advance`]). With
//! virtual time a run is a function of its seed and of the calls made.

use std::{
    any::Any,
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet, BinaryHeap, VecDeque},
    sync::{
        Arc, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use muster_common::{Clock, SystemClock};
use muster_idl::{Durability, Profile, Reliability, TopicInfo};
use parking_lot::Mutex;

use crate::{
    Bus, BusError, Transport, Writer,
    codec::Codec,
    queue::{Arrived, Erased, Queue},
};

/// How bad the network is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LossConfig {
    /// Chance that one transmission is lost, 0 to 1.
    pub loss: f64,
    /// Least and greatest delay of one transmission, evenly spread.
    pub delay: (Duration, Duration),
    /// What each retransmission of a reliable sample adds.
    pub retransmission: Duration,
    /// A partition longer than this ends the match (RustDDS: fixed at 50 s).
    pub lease: Duration,
}

impl LossConfig {
    /// No loss, no delay: a publish returns when all readers have the sample.
    pub const NONE: LossConfig = LossConfig {
        loss: 0.0,
        delay: (Duration::ZERO, Duration::ZERO),
        retransmission: Duration::from_millis(20),
        lease: Duration::from_secs(50),
    };

    /// A network that loses `loss` of all transmissions and takes up to `delay` for one.
    pub const fn lossy(loss: f64, delay: Duration) -> LossConfig {
        LossConfig { loss, delay: (Duration::ZERO, delay), ..LossConfig::NONE }
    }
}

/// A network in memory. Cheap to clone.
#[derive(Clone)]
pub struct Network {
    shared: Arc<Shared>,
}

struct Shared {
    state: Mutex<State>,
    clock: Option<JoinHandle<()>>,
    stop: Arc<AtomicBool>,
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(clock) = self.clock.take() {
            clock.thread().unpark();
            // the clock itself may hold the last reference
            if clock.thread().id() != thread::current().id() {
                let _ = clock.join();
            }
        }
    }
}

type Id = u64;

struct State {
    random: SplitMix64,
    config: LossConfig,
    /// Real time: since when; virtual time: None.
    epoch: Option<(Instant, u64)>,
    now_us: u64,
    next_id: Id,
    nodes: BTreeMap<Id, String>,
    writers: BTreeMap<Id, WriterState>,
    readers: BTreeMap<Id, ReaderState>,
    /// Pairs of node names that do not hear each other, and since when.
    cuts: BTreeMap<(String, String), u64>,
    flights: BinaryHeap<Reverse<Flight>>,
    /// Latest arrival of a reliable (writer, reader) pair: keeps their order.
    last_arrival: BTreeMap<(Id, Id), u64>,
    /// Reliable samples that wait for the end of a partition.
    held: BTreeMap<(Id, Id), VecDeque<Arc<Message>>>,
    published: BTreeMap<&'static str, u64>,
}

struct WriterState {
    node: Id,
    info: TopicInfo,
    history: VecDeque<Arc<Message>>,
}

struct ReaderState {
    node: Id,
    info: TopicInfo,
    codec: &'static dyn Codec,
    queue: Arc<Queue>,
    /// The DDS cache before the queue: reliable samples a slow reader has not taken.
    cache: VecDeque<(Id, Arc<Message>, u64)>,
}

struct Message {
    writer: String,
    bytes: Vec<u8>,
    disposed: bool,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Flight {
    at_us: u64,
    order: u64,
    writer: Id,
    reader: Id,
    message: Ordered,
}

/// Never compared: `order` is unique.
struct Ordered(Arc<Message>);
impl PartialEq for Ordered {
    fn eq(&self, _: &Self) -> bool {
        true
    }
}
impl Eq for Ordered {}
impl PartialOrd for Ordered {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl Ord for Ordered {
    fn cmp(&self, _: &Self) -> std::cmp::Ordering {
        std::cmp::Ordering::Equal
    }
}

/// SplitMix64 (Steele, Lea, Flood 2014): a stream that stays the same over versions, so that seeds stay tests.
struct SplitMix64(u64);

impl SplitMix64 {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }
    fn unit(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }
}

/// How long the clock thread sleeps when nothing is under way; a publish wakes it earlier.
const IDLE: Duration = Duration::from_millis(100);

impl Network {
    /// A network in real time.
    pub fn new(seed: u64, config: LossConfig) -> Network {
        Network::make(seed, config, true)
    }

    /// A network whose time moves only by [`Network::advance`]. It begins at 0.
    pub fn with_virtual_time(seed: u64, config: LossConfig) -> Network {
        Network::make(seed, config, false)
    }

    fn make(seed: u64, config: LossConfig, real: bool) -> Network {
        let state = State {
            random: SplitMix64(seed),
            config,
            epoch: real.then(|| (Instant::now(), SystemClock.now_us())),
            now_us: 0,
            next_id: 1,
            nodes: BTreeMap::new(),
            writers: BTreeMap::new(),
            readers: BTreeMap::new(),
            cuts: BTreeMap::new(),
            flights: BinaryHeap::new(),
            last_arrival: BTreeMap::new(),
            held: BTreeMap::new(),
            published: BTreeMap::new(),
        };
        let stop = Arc::new(AtomicBool::new(false));
        Network {
            shared: Arc::new_cyclic(|weak: &Weak<Shared>| {
                let clock = real.then(|| {
                    let (weak, stop) = (weak.clone(), stop.clone());
                    thread::Builder::new().name("twin-clock".into()).spawn(move || run_clock(&weak, &stop))
                });
                Shared { state: Mutex::new(state), clock: clock.and_then(Result::ok), stop: stop.clone() }
            }),
        }
    }

    /// A node's place on the network. Nodes of one name are on one side of every partition.
    pub fn join(&self, name: &str) -> Bus {
        let mut state = self.shared.state.lock();
        let id = state.fresh_id();
        state.nodes.insert(id, name.to_string());
        Bus::new(0, Arc::new(Node { network: self.clone(), id: Mutex::new(id), name: name.to_string() }))
    }

    /// Nodes `a` and nodes `b` do not hear each other until [`Network::heal`].
    pub fn partition(&self, a: &[&str], b: &[&str]) {
        let mut state = self.shared.state.lock();
        let now_us = state.now();
        for (a, b) in a.iter().flat_map(|a| b.iter().map(move |b| (*a, *b))) {
            state.cuts.entry(pair(a, b)).or_insert(now_us);
        }
    }

    /// Cuts one node off from all that have joined so far.
    pub fn isolate(&self, name: &str) {
        let others: BTreeSet<String> =
            self.shared.state.lock().nodes.values().filter(|other| *other != name).cloned().collect();
        self.partition(&[name], &others.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Ends every partition: what waited is delivered.
    pub fn heal(&self) {
        self.shared.state.lock().heal();
        self.wake();
    }

    /// Another network from here on.
    pub fn set_loss(&self, config: LossConfig) {
        self.shared.state.lock().config = config;
    }

    /// How many samples were published on a topic so far, disposals included.
    pub fn published(&self, topic: &str) -> u64 {
        self.shared.state.lock().published.get(topic).copied().unwrap_or(0)
    }

    /// Moves virtual time on and delivers what is due.
    pub fn advance(&self, by: Duration) {
        let mut state = self.shared.state.lock();
        let until = state.now() + by.as_micros() as u64;
        state.deliver_until(until);
        state.now_us = until;
    }

    /// When the next sample arrives, in virtual microseconds; None when none is under way.
    pub fn next_arrival_us(&self) -> Option<u64> {
        self.shared.state.lock().flights.peek().map(|Reverse(flight)| flight.at_us)
    }

    /// Microseconds of this network's time.
    pub fn now_us(&self) -> u64 {
        self.shared.state.lock().now()
    }

    fn wake(&self) {
        if let Some(clock) = &self.shared.clock {
            clock.thread().unpark();
        }
    }
}

fn run_clock(shared: &Weak<Shared>, stop: &AtomicBool) {
    while !stop.load(Ordering::Acquire) {
        let wait = match shared.upgrade() {
            None => IDLE,
            Some(shared) => {
                let mut state = shared.state.lock();
                let now_us = state.now();
                state.deliver_until(now_us);
                state.flights.peek().map_or(IDLE, |Reverse(flight)| {
                    Duration::from_micros(flight.at_us.saturating_sub(now_us).max(1)).min(IDLE)
                })
            }
        };
        thread::park_timeout(wait);
    }
}

fn pair(a: &str, b: &str) -> (String, String) {
    if a <= b { (a.to_string(), b.to_string()) } else { (b.to_string(), a.to_string()) }
}

impl State {
    fn fresh_id(&mut self) -> Id {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    fn now(&mut self) -> u64 {
        if let Some((since, at_us)) = self.epoch {
            // samples delivered late must not move time back
            self.now_us = self.now_us.max(at_us + since.elapsed().as_micros() as u64);
        }
        self.now_us
    }

    fn cut(&self, a: Id, b: Id) -> bool {
        match (self.nodes.get(&a), self.nodes.get(&b)) {
            (Some(a), Some(b)) => a != b && self.cuts.contains_key(&pair(a, b)),
            // a node that has left hears nothing more
            _ => true,
        }
    }

    fn refresh_matches(&mut self, topic: &str) {
        for reader in self.readers.values().filter(|r| r.info.name == topic) {
            let count =
                self.writers.values().filter(|w| w.info.name == topic && !self.cut(w.node, reader.node)).count();
            reader.queue.set_matched(count);
        }
    }

    fn matched_readers(&self, writer: Id) -> usize {
        let Some(writer) = self.writers.get(&writer) else { return 0 };
        self.readers.values().filter(|r| r.info.name == writer.info.name && !self.cut(writer.node, r.node)).count()
    }

    fn send(&mut self, writer: Id, reader: Id, message: Arc<Message>) {
        let (Some(w), Some(r)) = (self.writers.get(&writer), self.readers.get(&reader)) else { return };
        let reliable = w.info.profile.reliability == Reliability::Reliable;
        // a node's own samples do not cross the network
        let local = w.node == r.node;
        if self.cut(w.node, r.node) {
            if reliable {
                self.held.entry((writer, reader)).or_default().push_back(message);
            }
            return;
        }
        let mut delay = Duration::ZERO;
        if !local {
            let (least, greatest) = self.config.delay;
            let spread = greatest.saturating_sub(least);
            if spread > Duration::ZERO || least > Duration::ZERO {
                delay = least + spread.mul_f64(self.random.unit());
            }
            // 64 losses in a row end the matter: a loss of 1.0 is a partition and should be made as one
            let mut tries = 0;
            while self.config.loss > 0.0 && self.random.unit() < self.config.loss && tries < 64 {
                if !reliable {
                    return;
                }
                delay += self.config.retransmission;
                tries += 1;
            }
        }
        let now_us = self.now();
        let mut at_us = now_us + delay.as_micros() as u64;
        if reliable {
            let last = self.last_arrival.entry((writer, reader)).or_insert(0);
            at_us = at_us.max(*last);
            *last = at_us;
        }
        let order = self.fresh_id();
        if at_us <= now_us && !self.flights.iter().any(|Reverse(f)| f.writer == writer && f.reader == reader) {
            self.arrive(writer, reader, message, now_us);
        } else {
            self.flights.push(Reverse(Flight { at_us, order, writer, reader, message: Ordered(message) }));
        }
    }

    fn deliver_until(&mut self, until_us: u64) {
        while self.flights.peek().is_some_and(|Reverse(flight)| flight.at_us <= until_us) {
            let Some(Reverse(flight)) = self.flights.pop() else { break };
            self.now_us = self.now_us.max(flight.at_us);
            let (writer, reader) = (flight.writer, flight.reader);
            let cut = match (self.writers.get(&writer), self.readers.get(&reader)) {
                (Some(w), Some(r)) => self.cut(w.node, r.node),
                // what a writer sent before it left still arrives
                (None, Some(_)) => false,
                (_, None) => continue,
            };
            if !cut {
                self.arrive(writer, reader, flight.message.0, flight.at_us);
            } else if self.readers.get(&reader).is_some_and(|r| r.info.profile.reliability == Reliability::Reliable) {
                self.held.entry((writer, reader)).or_default().push_back(flight.message.0);
            }
        }
    }

    fn arrive(&mut self, writer: Id, reader: Id, message: Arc<Message>, now_us: u64) {
        let Some(reader) = self.readers.get_mut(&reader) else { return };
        reader.cache.push_back((writer, message, now_us));
        reader.drain();
        let limit = reader.info.profile.max_samples as usize;
        while reader.cache.len() > limit {
            reader.cache.pop_front();
            reader.queue.add_missed(1);
        }
    }

    fn heal(&mut self) {
        let now_us = self.now();
        let lease_us = self.config.lease.as_micros() as u64;
        let cuts = std::mem::take(&mut self.cuts);
        let held = std::mem::take(&mut self.held);
        let mut renewed = BTreeSet::new();
        for ((writer, reader), samples) in held {
            let (Some(w), Some(r)) = (self.writers.get(&writer), self.readers.get(&reader)) else { continue };
            let since = match (self.nodes.get(&w.node), self.nodes.get(&r.node)) {
                (Some(a), Some(b)) => cuts.get(&pair(a, b)).copied().unwrap_or(now_us),
                _ => continue,
            };
            if now_us.saturating_sub(since) > lease_us {
                if w.info.profile.durability == Durability::TransientLocal {
                    renewed.insert((writer, reader));
                } else {
                    r.queue.add_missed(samples.len() as u64);
                }
                continue;
            }
            for message in samples {
                self.send(writer, reader, message);
            }
        }
        for (writer, reader) in renewed {
            self.send_history(writer, reader);
        }
        let topics: BTreeSet<&'static str> = self.readers.values().map(|r| r.info.name).collect();
        for topic in topics {
            self.refresh_matches(topic);
        }
    }

    fn send_history(&mut self, writer: Id, reader: Id) {
        let history: Vec<_> =
            self.writers.get(&writer).map(|w| w.history.iter().cloned().collect()).unwrap_or_default();
        for message in history {
            self.send(writer, reader, message);
        }
    }
}

impl ReaderState {
    /// From the cache into the queue, as far as it has room.
    fn drain(&mut self) {
        while let Some((writer, message, received_us)) = self.cache.pop_front() {
            let decoded = if message.disposed {
                self.codec.decode_key(&message.bytes).map(Erased::Disposed)
            } else {
                self.codec.decode(&message.bytes).map(Erased::Value)
            };
            match decoded {
                Ok(payload) => {
                    let arrived = Arrived { payload, writer: message.writer.clone(), received_us };
                    if self.queue.push(arrived).is_err() {
                        self.cache.push_front((writer, message, received_us));
                        return;
                    }
                }
                Err(error) => {
                    tracing::error!(topic = self.info.name, err = %error, "the twin could not decode its own sample");
                }
            }
        }
    }
}

struct Node {
    network: Network,
    /// Another one after a rebuild.
    id: Mutex<Id>,
    name: String,
}

impl Drop for Node {
    fn drop(&mut self) {
        let id = *self.id.lock();
        self.network.shared.state.lock().nodes.remove(&id);
    }
}

fn guid(node: Id, entity: Id) -> String {
    format!("{node:024x}{entity:08x}")
}

impl Transport for Node {
    fn writer(&self, codec: &'static dyn Codec) -> Result<Box<dyn Writer>, BusError> {
        let node = *self.id.lock();
        let mut state = self.network.shared.state.lock();
        let id = state.fresh_id();
        state.writers.insert(id, WriterState { node, info: codec.info(), history: VecDeque::new() });
        state.refresh_matches(codec.info().name);
        Ok(Box::new(TwinWriter { network: self.network.clone(), id, codec, guid: guid(node, id) }))
    }

    fn reader(&self, codec: &'static dyn Codec, queue: Arc<Queue>) -> Result<Box<dyn Any + Send + Sync>, BusError> {
        let node = *self.id.lock();
        let shared = &self.network.shared;
        let mut state = shared.state.lock();
        let id = state.fresh_id();
        let info = codec.info();
        let weak = Arc::downgrade(shared);
        queue.on_room(Box::new(move || {
            if let Some(shared) = weak.upgrade()
                && let Some(reader) = shared.state.lock().readers.get_mut(&id)
            {
                reader.drain();
            }
        }));
        state.readers.insert(id, ReaderState { node, info, codec, queue, cache: VecDeque::new() });
        if info.profile.durability == Durability::TransientLocal {
            let writers: Vec<Id> =
                state.writers.iter().filter(|(_, w)| w.info.name == info.name).map(|(id, _)| *id).collect();
            for writer in writers {
                state.send_history(writer, id);
            }
        }
        state.refresh_matches(info.name);
        drop(state);
        self.network.wake();
        Ok(Box::new(TwinReader { network: self.network.clone(), id, topic: info.name }))
    }

    fn participant_guid(&self) -> String {
        guid(*self.id.lock(), 0x1c1)
    }

    fn diagnosis(&self) -> String {
        let state = self.network.shared.state.lock();
        let others: Vec<&str> = state.nodes.values().filter(|n| **n != self.name).map(String::as_str).collect();
        format!("in-memory network; node {}; other nodes: {}", self.name, others.join(", "))
    }

    fn rebuild(&self) -> Result<(), BusError> {
        let mut state = self.network.shared.state.lock();
        let fresh = state.fresh_id();
        let old = std::mem::replace(&mut *self.id.lock(), fresh);
        state.nodes.remove(&old);
        state.nodes.insert(fresh, self.name.clone());
        let mut again = Vec::new();
        for (id, writer) in state.writers.iter_mut().filter(|(_, w)| w.node == old) {
            writer.node = fresh;
            again.push((*id, writer.info));
        }
        for reader in state.readers.values_mut().filter(|r| r.node == old) {
            reader.node = fresh;
        }
        for (writer, info) in again {
            if info.profile.durability == Durability::TransientLocal {
                let readers: Vec<Id> =
                    state.readers.iter().filter(|(_, r)| r.info.name == info.name).map(|(id, _)| *id).collect();
                for reader in readers {
                    state.send_history(writer, reader);
                }
            }
        }
        Ok(())
    }
}

struct TwinWriter {
    network: Network,
    id: Id,
    codec: &'static dyn Codec,
    guid: String,
}

impl TwinWriter {
    fn send(&self, bytes: Vec<u8>, disposed: bool) -> Result<(), BusError> {
        let info = self.codec.info();
        let Profile { history_depth, max_samples, durability, .. } = info.profile;
        let mut state = self.network.shared.state.lock();
        let waiting =
            state.held.iter().filter(|((w, _), _)| *w == self.id).map(|(_, samples)| samples.len()).max().unwrap_or(0);
        if history_depth == 0 && waiting >= max_samples as usize {
            return Err(BusError::Timeout { topic: info.name, waited_ms: 0 });
        }
        let message = Arc::new(Message { writer: self.guid.clone(), bytes, disposed });
        *state.published.entry(info.name).or_insert(0) += 1;
        if durability == Durability::TransientLocal
            && let Some(writer) = state.writers.get_mut(&self.id)
        {
            writer.history.push_back(message.clone());
            while writer.history.len() > history_depth as usize {
                writer.history.pop_front();
            }
        }
        let readers: Vec<Id> =
            state.readers.iter().filter(|(_, r)| r.info.name == info.name).map(|(id, _)| *id).collect();
        for reader in readers {
            state.send(self.id, reader, message.clone());
        }
        drop(state);
        self.network.wake();
        Ok(())
    }
}

impl Writer for TwinWriter {
    fn publish(&self, value: &dyn Any) -> Result<(), BusError> {
        self.send(self.codec.encode(value)?, false)
    }
    fn dispose(&self, key: &dyn Any) -> Result<(), BusError> {
        self.send(self.codec.encode_key(key)?, true)
    }
    fn matched(&self) -> usize {
        self.network.shared.state.lock().matched_readers(self.id)
    }
}

impl Drop for TwinWriter {
    fn drop(&mut self) {
        let mut state = self.network.shared.state.lock();
        state.writers.remove(&self.id);
        state.held.retain(|(writer, _), _| *writer != self.id);
        state.refresh_matches(self.codec.info().name);
    }
}

struct TwinReader {
    network: Network,
    id: Id,
    topic: &'static str,
}

impl Drop for TwinReader {
    fn drop(&mut self) {
        let mut state = self.network.shared.state.lock();
        state.readers.remove(&self.id);
        let id = self.id;
        state.held.retain(|(_, reader), _| *reader != id);
        state.last_arrival.retain(|(_, reader), _| *reader != id);
        state.refresh_matches(self.topic);
    }
}

#[cfg(test)]
mod tests {
    use muster_idl::v1::{ControllerState, GroupCommand, Heartbeat, Progress, TargetKind, Verb};

    use super::*;
    use crate::{Publisher, Subscriber};

    fn beat(counter: u64) -> Heartbeat {
        Heartbeat {
            host: "h".into(),
            incarnation: String::new(),
            boot: String::new(),
            participant: String::new(),
            counter,
            sent_at_us: 0,
            draining: false,
        }
    }

    fn command(id: u64) -> GroupCommand {
        GroupCommand {
            id: id.to_string(),
            controller: String::new(),
            issuer: String::new(),
            controller_epoch: 0,
            group_epoch: 0,
            issued_at_us: id,
            not_after_us: 0,
            target_kind: TargetKind::Vm,
            target: String::new(),
            members: vec![],
            verb: Verb::Ping,
            arguments: vec![],
            wave: 0,
            plan_digest: String::new(),
            retry_of: String::new(),
            key_id: String::new(),
            signature: vec![],
            extension: vec![],
        }
    }

    fn drain<T: muster_idl::Topic>(subscriber: &mut Subscriber<T>) -> Vec<T> {
        std::iter::from_fn(|| subscriber.try_recv()).filter_map(crate::Sample::value).collect()
    }

    fn pair<T: muster_idl::Topic>(network: &Network) -> (Publisher<T>, Subscriber<T>) {
        let (a, b) = (network.join("a"), network.join("b"));
        (a.publisher().unwrap(), b.subscriber(1000).unwrap())
    }

    #[test]
    fn one_seed_gives_one_run() {
        let run = |seed| {
            let network = Network::with_virtual_time(seed, LossConfig::lossy(0.3, Duration::from_millis(10)));
            let (writer, mut reader) = pair::<Heartbeat>(&network);
            for i in 0..200 {
                writer.publish(&beat(i)).unwrap();
                network.advance(Duration::from_millis(1));
            }
            network.advance(Duration::from_secs(1));
            drain(&mut reader).iter().map(|b| b.counter).collect::<Vec<_>>()
        };
        let first = run(1);
        assert_eq!(first, run(1));
        assert_ne!(first, run(2));
        assert!((100..180).contains(&first.len()), "about 70 % of 200 arrive, got {}", first.len());
    }

    #[test]
    fn reliable_samples_wait_out_a_partition_and_best_effort_ones_do_not() {
        let network = Network::with_virtual_time(1, LossConfig::NONE);
        let (commands, mut inbox) = pair::<GroupCommand>(&network);
        let (beats, mut heard) = pair::<Heartbeat>(&network);
        network.partition(&["a"], &["b"]);
        assert_eq!(inbox.matched(), 1, "nobody has noticed yet");
        commands.publish(&command(1)).unwrap();
        beats.publish(&beat(1)).unwrap();
        network.advance(Duration::from_secs(10));
        assert!(drain(&mut inbox).is_empty() && drain(&mut heard).is_empty());
        network.heal();
        beats.publish(&beat(2)).unwrap();
        assert_eq!(drain(&mut inbox), vec![command(1)]);
        assert_eq!(drain(&mut heard), vec![beat(2)]);
    }

    #[test]
    fn a_partition_longer_than_the_lease_loses_volatile_samples_and_repeats_the_rest() {
        let network = Network::with_virtual_time(1, LossConfig::NONE);
        let (commands, mut inbox) = pair::<GroupCommand>(&network);
        let (states, mut seen) = pair::<ControllerState>(&network);
        network.isolate("a");
        let state = |n| ControllerState {
            controller: "c".into(),
            incarnation: String::new(),
            name: String::new(),
            epoch: 0,
            group_epoch: 0,
            stream_endpoint: String::new(),
            lab: true,
            sent_at_us: n,
            awaiting: vec![],
        };
        commands.publish(&command(1)).unwrap();
        states.publish(&state(1)).unwrap();
        states.publish(&state(2)).unwrap();
        network.advance(Duration::from_secs(51));
        network.heal();
        assert!(drain(&mut inbox).is_empty());
        assert_eq!(inbox.missed(), 1);
        assert_eq!(drain(&mut seen), vec![state(2)]);
        commands.publish(&command(2)).unwrap();
        assert_eq!(drain(&mut inbox), vec![command(2)]);
    }

    #[test]
    fn published_samples_are_counted_once_however_many_hear_them() {
        let network = Network::with_virtual_time(1, LossConfig::NONE);
        let (commands, _one) = pair::<GroupCommand>(&network);
        let (_, _two) = pair::<GroupCommand>(&network);
        assert_eq!(commands.matched(), 2);
        commands.publish(&command(1)).unwrap();
        assert_eq!(network.published("muster_v1_group_command"), 1);
    }

    #[test]
    fn a_writer_that_left_is_not_heard_again_and_its_last_words_arrive() {
        let network = Network::with_virtual_time(1, LossConfig::lossy(0.0, Duration::from_millis(5)));
        let (writer, mut reader) = pair::<Progress>(&network);
        let progress = Progress {
            command: "c".into(),
            host: "h".into(),
            vm: "v".into(),
            phase: "p".into(),
            done: 1,
            total: 2,
            sent_at_us: 3,
        };
        writer.publish(&progress).unwrap();
        drop(writer);
        network.advance(Duration::from_millis(5));
        assert_eq!(drain(&mut reader), vec![progress]);
        assert_eq!(reader.matched(), 0);
    }
}
