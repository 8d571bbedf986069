//! RustDDS behind [`Transport`].
//!
//! ```text
//!   publisher --write--> DataWriter                 (caller's thread)
//!   DataReader --mio--> thread muster-bus: take --> Queue --> subscriber
//!   status events --'        matches, losses, the 50 s watchdog
//! ```
//!
//! Known faults of RustDDS 0.15.1 that are handled here: samples sent to a multicast group whole networks hear
//! (ports::Guard); no initial peers (relay); participants that never match again after an outage longer than the
//! lease (watchdog: lost by time-out and discovered again -> rebuild); readers that remember every key (wire); a
//! status queue of four per endpoint (the participant's listener holds 2048).

mod ports;
mod relay;
mod wire;

use std::{
    any::Any,
    collections::{BTreeMap, BTreeSet},
    io,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use mio::{Events, Interest, Poll, Registry, Token, Waker};
use muster_common::{Clock, SystemClock};
use muster_idl::Durability;
use parking_lot::{Mutex, RwLock};
use rustdds::{DomainParticipantBuilder, DomainParticipantStatusEvent, GUID, LostReason, RTPSEntity, StatusEvented};

use crate::{
    BusConfig, BusError, Transport, Writer,
    codec::Codec,
    queue::{Arrived, Queue},
};
use wire::{DdsReader, DdsWriter, Factories};
pub(crate) use wire::{Endpoints, TypedEndpoints};

const WAKE: Token = Token(0);
const STATUS: Token = Token(1);
const FIRST_READER: usize = 2;

/// The poll thread looks around at least this often, should a wake-up of the library ever be lost.
const LOOK_AROUND: Duration = Duration::from_millis(500);

/// Between the end of our endpoints and the end of their participant. RustDDS's discovery thread tells peers of ended
/// endpoints; it holds the participant for moments, and when the last reference ends there, it tries to join itself,
/// panics, and says no more: peers would keep dead endpoints for the lease of 50 s.
const FAREWELL: Duration = Duration::from_millis(100);

/// Samples taken from one reader before the next reader has its turn.
const TURN: usize = 1024;

pub(crate) fn join(config: &BusConfig) -> Result<Arc<dyn Transport>, BusError> {
    let io = |attempted: &str, source| BusError::Io { attempted: attempted.into(), source };
    ports::check(config)?;
    let poll = Poll::new().map_err(|e| io("create the poll of the bus", e))?;
    let registry = poll.registry().try_clone().map_err(|e| io("share the poll of the bus", e))?;
    let waker = Waker::new(&registry, WAKE).map_err(|e| io("create the waker of the bus", e))?;
    let core = Arc::new(Core {
        config: config.clone(),
        registry,
        waker,
        stop: AtomicBool::new(false),
        rebuild_due: AtomicBool::new(false),
        inner: Mutex::new(Inner {
            session: None,
            readers: BTreeMap::new(),
            writers: BTreeMap::new(),
            next_token: FIRST_READER,
            timed_out: BTreeSet::new(),
            participants: BTreeSet::new(),
            rebuilt: 0,
        }),
    });
    core.rebuild()?;
    let running = core.clone();
    let thread = std::thread::Builder::new()
        .name("muster-bus".into())
        .spawn(move || running.run(poll))
        .map_err(|e| io("start the thread muster-bus", e))?;
    Ok(Arc::new(Dds { core, thread: Some(thread) }))
}

struct Dds {
    core: Arc<Core>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Dds {
    fn drop(&mut self) {
        self.core.stop.store(true, Ordering::Release);
        let _ = self.core.waker.wake();
        if let Some(thread) = self.thread.take() {
            // the last publisher may be dropped by a callback of that very thread
            if thread.thread().id() != std::thread::current().id() {
                let _ = thread.join();
            }
        }
        self.core.inner.lock().close(&self.core.registry);
    }
}

struct Core {
    config: BusConfig,
    registry: Registry,
    waker: Waker,
    stop: AtomicBool,
    rebuild_due: AtomicBool,
    inner: Mutex<Inner>,
}

struct Inner {
    /// None between a failed rebuild and the next.
    session: Option<Session>,
    readers: BTreeMap<Token, ReaderEntry>,
    writers: BTreeMap<usize, Arc<WriterEntry>>,
    next_token: usize,
    /// GUID prefixes of participants lost by time-out: if one comes back, this library will not match it again.
    timed_out: BTreeSet<[u8; 12]>,
    participants: BTreeSet<[u8; 12]>,
    rebuilt: u64,
}

struct Session {
    factories: Factories,
    status: rustdds::DomainParticipantStatusListener,
    multicast: bool,
    _relay: Option<relay::Relay>,
}

struct ReaderEntry {
    codec: &'static dyn Codec,
    reader: Option<Box<dyn DdsReader>>,
    queue: Arc<Queue>,
    matched: BTreeSet<GUID>,
    last: BTreeMap<GUID, i64>,
    /// Taken and not yet accepted by the queue.
    waiting: std::collections::VecDeque<Arrived>,
}

struct WriterEntry {
    codec: &'static dyn Codec,
    writer: RwLock<Option<Box<dyn DdsWriter>>>,
    matched: Mutex<BTreeSet<GUID>>,
    matched_count: AtomicUsize,
    /// Transient-local: what to write again after a rebuild, by key, with the order of writing.
    kept: Mutex<Kept>,
}

#[derive(Default)]
struct Kept {
    counter: u64,
    by_key: BTreeMap<Vec<u8>, (u64, Box<dyn Any + Send>)>,
}

fn prefix(guid: GUID) -> [u8; 12] {
    let mut prefix = [0; 12];
    prefix.copy_from_slice(&guid.to_bytes()[..12]);
    prefix
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

impl Inner {
    fn close(&mut self, registry: &Registry) {
        for entry in self.readers.values_mut() {
            if let Some(mut reader) = entry.reader.take() {
                let _ = registry.deregister(reader.source());
            }
            entry.matched.clear();
            entry.queue.set_matched(0);
        }
        for entry in self.writers.values() {
            *entry.writer.write() = None;
            entry.matched.lock().clear();
            entry.matched_count.store(0, Ordering::Relaxed);
        }
        if let Some(mut session) = self.session.take() {
            let _ = registry.deregister(session.status.as_status_source_mio1());
            let until = Instant::now() + FAREWELL;
            while let Some(left) = until.checked_duration_since(Instant::now()) {
                std::thread::park_timeout(left);
            }
        }
        self.participants.clear();
        self.timed_out.clear();
    }

    fn on_status(&mut self, event: DomainParticipantStatusEvent) -> bool {
        use DomainParticipantStatusEvent as E;
        match event {
            E::RemoteReaderMatched { local_writer, remote_reader } => {
                for entry in self.writers.values() {
                    if entry.writer.read().as_ref().is_some_and(|w| w.guid() == local_writer) {
                        let mut matched = entry.matched.lock();
                        matched.insert(remote_reader);
                        entry.matched_count.store(matched.len(), Ordering::Relaxed);
                    }
                }
            }
            E::RemoteWriterMatched { local_reader, remote_writer } => {
                for entry in self.readers.values_mut() {
                    if entry.reader.as_ref().is_some_and(|r| r.guid() == local_reader) {
                        entry.matched.insert(remote_writer);
                        entry.queue.set_matched(entry.matched.len());
                    }
                }
            }
            E::ReaderLost { guid, .. } => self.unmatch(|g| g == guid),
            E::WriterLost { guid, .. } => self.unmatch(|g| g == guid),
            E::ParticipantLost { id, reason } => {
                let Ok(lost) = <[u8; 12]>::try_from(id.as_ref()) else { return false };
                self.participants.remove(&lost);
                self.unmatch(|g| prefix(g) == lost);
                if matches!(reason, LostReason::Timeout { .. }) {
                    tracing::info!(participant = hex(&lost), "lost a participant: silent for longer than its lease");
                    self.timed_out.insert(lost);
                }
            }
            E::ParticipantDiscovered { dpd } => {
                let found = prefix(dpd.guid);
                self.participants.insert(found);
                if self.timed_out.contains(&found) {
                    tracing::warn!(
                        participant = hex(&found),
                        "a participant is back after an outage longer than its lease: rebuilding ours, for the two would not match"
                    );
                    return true;
                }
            }
            E::RemoteReaderQosIncompatible { local_writer, remote_reader, .. } => {
                tracing::warn!(
                    writer = hex(&local_writer.to_bytes()),
                    reader = hex(&remote_reader.to_bytes()),
                    "a reader asks for a quality of service that our writer does not offer"
                );
            }
            E::RemoteWriterQosIncompatible { local_reader, remote_writer, .. } => {
                tracing::warn!(
                    reader = hex(&local_reader.to_bytes()),
                    writer = hex(&remote_writer.to_bytes()),
                    "a writer offers less quality of service than our reader asks for"
                );
            }
            _ => {}
        }
        false
    }

    fn unmatch(&mut self, is_lost: impl Fn(GUID) -> bool) {
        for entry in self.writers.values() {
            let mut matched = entry.matched.lock();
            matched.retain(|g| !is_lost(*g));
            entry.matched_count.store(matched.len(), Ordering::Relaxed);
        }
        for entry in self.readers.values_mut() {
            entry.matched.retain(|g| !is_lost(*g));
            entry.queue.set_matched(entry.matched.len());
            entry.last.retain(|g, _| !is_lost(*g));
        }
    }
}

impl ReaderEntry {
    /// Moves samples into the queue as far as it has room; true when there may be more to take at once.
    fn pump(&mut self) -> bool {
        while let Some(arrived) = self.waiting.pop_front() {
            if let Err(refused) = self.queue.push(arrived) {
                self.waiting.push_front(refused);
                return false;
            }
        }
        let Some(reader) = self.reader.as_mut() else { return false };
        // a full queue leaves the samples where they are: in the cache of DDS, up to max_samples
        let room = self.queue.room().min(TURN);
        if room == 0 {
            return false;
        }
        let (taken, malformed) = reader.take(room);
        self.queue.add_missed(malformed);
        let more = taken.len() == room;
        let received_us = SystemClock.now_us();
        let keep_all = self.codec.info().profile.history_depth == 0;
        for sample in taken {
            let last = self.last.insert(sample.writer, sample.sequence_number);
            // a writer that keeps all leaves no gaps; others skip what is superseded
            if keep_all
                && let Some(last) = last
                && sample.sequence_number > last + 1
            {
                self.queue.add_missed((sample.sequence_number - last - 1) as u64);
            }
            let arrived = Arrived { payload: sample.payload, writer: hex(&sample.writer.to_bytes()), received_us };
            if let Err(refused) = self.queue.push(arrived) {
                self.waiting.push_back(refused);
            }
        }
        more
    }
}

impl Core {
    fn run(&self, mut poll: Poll) {
        let mut events = Events::with_capacity(256);
        let mut busy = false;
        while !self.stop.load(Ordering::Acquire) {
            let wait = if busy { Duration::ZERO } else { LOOK_AROUND };
            if let Err(error) = poll.poll(&mut events, Some(wait))
                && error.kind() != io::ErrorKind::Interrupted
            {
                tracing::error!(err = %error, "the poll of the bus failed");
                return;
            }
            busy = false;
            {
                let mut inner = self.inner.lock();
                let mut status = Vec::new();
                if let Some(session) = &inner.session {
                    while let Some(event) = session.status.try_recv_status() {
                        status.push(event);
                    }
                }
                let mut due = false;
                for event in status {
                    due |= inner.on_status(event);
                }
                if due {
                    self.rebuild_due.store(true, Ordering::Release);
                }
                for entry in inner.readers.values_mut() {
                    busy |= entry.pump();
                }
            }
            if self.rebuild_due.swap(false, Ordering::AcqRel)
                && let Err(error) = self.rebuild()
            {
                tracing::error!(err = %muster_common::Chain(&error), "could not rebuild the bus");
                self.rebuild_due.store(true, Ordering::Release);
            }
        }
    }

    fn rebuild(&self) -> Result<(), BusError> {
        let mut inner = self.inner.lock();
        let again = inner.session.is_some() || inner.rebuilt > 0;
        inner.close(&self.registry);
        let mut session = Session::open(&self.config)?;
        self.registry
            .register(session.status.as_status_source_mio1(), STATUS, Interest::READABLE)
            .map_err(|source| BusError::Io { attempted: "watch the status of the participant".into(), source })?;
        let Inner { readers, writers, .. } = &mut *inner;
        for (token, entry) in readers.iter_mut() {
            entry.last.clear();
            entry.reader = Some(self.open_reader(&session.factories, entry.codec, *token)?);
        }
        for entry in writers.values() {
            let writer = entry.codec.endpoints().writer(&session.factories)?;
            let kept = entry.kept.lock();
            let mut values: Vec<_> = kept.by_key.values().collect();
            values.sort_by_key(|(order, _)| *order);
            for (_, value) in values {
                writer.write(value.as_ref())?;
            }
            *entry.writer.write() = Some(writer);
        }
        inner.session = Some(session);
        if again {
            inner.rebuilt += 1;
        }
        Ok(())
    }

    fn open_reader(
        &self,
        factories: &Factories,
        codec: &'static dyn Codec,
        token: Token,
    ) -> Result<Box<dyn DdsReader>, BusError> {
        let mut reader = codec.endpoints().reader(factories)?;
        self.registry.register(reader.source(), token, Interest::READABLE).map_err(|source| BusError::Io {
            attempted: format!("watch the reader of {}", codec.info().name),
            source,
        })?;
        Ok(reader)
    }
}

impl Session {
    fn open(config: &BusConfig) -> Result<Session, BusError> {
        let place = ports::check(config)?;
        let prefix_cell = relay::PrefixCell::default();
        let relay = if place.remote_peers.is_empty() {
            None
        } else {
            Some(relay::Relay::start(config.cell, config.interface, place.remote_peers.clone(), prefix_cell.clone())?)
        };
        // one participant of this process at a time: the guards are exclusive, and bounded in time against others
        static MAKING: OnceLock<Mutex<()>> = OnceLock::new();
        let making = MAKING.get_or_init(Mutex::default).lock();
        let user_traffic = ports::Guard::hold(ports::user_multicast(config.cell))?;
        let discovery = if place.multicast {
            ports::check_discovery_port(config.cell)?;
            None
        } else {
            ports::Guard::hold(ports::discovery_multicast(config.cell))?
        };
        let mut builder = DomainParticipantBuilder::new(config.cell);
        if let Some(only) = place.only {
            builder = builder.with_only_networks(only);
        }
        let dds =
            |attempted: String| move |e: rustdds::dds::CreateError| BusError::Dds { attempted, reason: e.to_string() };
        let participant = builder.build().map_err(|e| {
            let reason = e.to_string();
            if reason.contains("ParticipantId") {
                BusError::PortInUse {
                    cell: config.cell,
                    port: ports::discovery_unicast(config.cell, 0),
                    purpose: "all participant ports of this cell are taken on this machine",
                    source: io::ErrorKind::AddrInUse.into(),
                }
            } else {
                BusError::Dds { attempted: format!("create a participant in cell {}", config.cell), reason }
            }
        })?;
        drop((user_traffic, discovery));
        drop(making);
        prefix_cell.set(prefix(participant.guid()));
        let qos = rustdds::QosPolicyBuilder::new().build();
        let publisher = participant.create_publisher(&qos).map_err(dds("create a DDS publisher".into()))?;
        let subscriber = participant.create_subscriber(&qos).map_err(dds("create a DDS subscriber".into()))?;
        let status = participant.status_listener();
        Ok(Session {
            factories: Factories { participant, publisher, subscriber },
            status,
            multicast: place.multicast,
            _relay: relay,
        })
    }
}

impl Transport for Dds {
    fn writer(&self, codec: &'static dyn Codec) -> Result<Box<dyn Writer>, BusError> {
        let mut inner = self.core.inner.lock();
        let session = inner.session.as_ref().ok_or(BusError::Closed { topic: codec.info().name })?;
        let writer = codec.endpoints().writer(&session.factories)?;
        let entry = Arc::new(WriterEntry {
            codec,
            writer: RwLock::new(Some(writer)),
            matched: Mutex::default(),
            matched_count: AtomicUsize::new(0),
            kept: Mutex::default(),
        });
        let id = inner.next_token;
        inner.next_token += 1;
        inner.writers.insert(id, entry.clone());
        Ok(Box::new(WriterHandle { core: self.core.clone(), id, entry }))
    }

    fn reader(&self, codec: &'static dyn Codec, queue: Arc<Queue>) -> Result<Box<dyn Any + Send + Sync>, BusError> {
        let mut inner = self.core.inner.lock();
        let session = inner.session.as_ref().ok_or(BusError::Closed { topic: codec.info().name })?;
        let token = Token(inner.next_token);
        let reader = self.core.open_reader(&session.factories, codec, token)?;
        inner.next_token += 1;
        let core = Arc::downgrade(&self.core);
        queue.on_room(Box::new(move || {
            if let Some(core) = core.upgrade() {
                let _ = core.waker.wake();
            }
        }));
        let entry = ReaderEntry {
            codec,
            reader: Some(reader),
            queue,
            matched: BTreeSet::new(),
            last: BTreeMap::new(),
            waiting: Default::default(),
        };
        inner.readers.insert(token, entry);
        drop(inner);
        let _ = self.core.waker.wake();
        Ok(Box::new(ReaderHandle { core: self.core.clone(), token }))
    }

    fn participant_guid(&self) -> String {
        self.core
            .inner
            .lock()
            .session
            .as_ref()
            .map(|s| hex(&s.factories.participant.guid().to_bytes()))
            .unwrap_or_default()
    }

    fn diagnosis(&self) -> String {
        let BusConfig { cell, interface, peers, .. } = &self.core.config;
        let inner = self.core.inner.lock();
        let own = inner
            .session
            .as_ref()
            .map(|s| (s.factories.participant.participant_id(), prefix(s.factories.participant.guid())));
        let interface = interface.map_or("all interfaces".to_string(), |i| format!("interface {i}"));
        let discovery = match &inner.session {
            Some(session) if session.multicast => {
                format!("multicast 239.255.0.1:{}", ports::discovery_multicast(*cell))
            }
            _ => "no multicast".to_string(),
        };
        let peers = if peers.is_empty() {
            "no peers configured".to_string()
        } else {
            format!(
                "peers {} at UDP ports {} and up",
                peers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
                ports::discovery_unicast(*cell, 0)
            )
        };
        let listening = own.map_or("no participant".to_string(), |(id, _)| {
            let port = ports::discovery_unicast(*cell, id);
            format!("listening at UDP ports {port} and {}", port + 1)
        });
        let seen = inner.participants.iter().filter(|p| own.is_none_or(|(_, own)| own != **p)).count();
        format!(
            "cell {cell} (DDS domain id), {interface}, {discovery}, {peers}, {listening}; {seen} other participants seen, {} lost by time-out",
            inner.timed_out.len()
        )
    }

    fn rebuild(&self) -> Result<(), BusError> {
        self.core.rebuild()?;
        let _ = self.core.waker.wake();
        Ok(())
    }
}

struct WriterHandle {
    core: Arc<Core>,
    id: usize,
    entry: Arc<WriterEntry>,
}

impl WriterHandle {
    /// Remembers what a rebuild must write again; at most `history_depth` instances, as DDS keeps no more either.
    fn keep(&self, value: &dyn Any) -> Result<(), BusError> {
        let codec = self.entry.codec;
        let profile = codec.info().profile;
        if profile.durability != Durability::TransientLocal {
            return Ok(());
        }
        let key = codec.key_of(value)?;
        let value = codec.decode(&codec.encode(value)?)?;
        let mut kept = self.entry.kept.lock();
        kept.counter += 1;
        let order = kept.counter;
        kept.by_key.insert(key, (order, value));
        if kept.by_key.len() > usize::from(profile.history_depth.max(1))
            && let Some(oldest) = kept.by_key.iter().min_by_key(|(_, (order, _))| *order).map(|(key, _)| key.clone())
        {
            kept.by_key.remove(&oldest);
        }
        Ok(())
    }
}

impl Writer for WriterHandle {
    fn publish(&self, value: &dyn Any) -> Result<(), BusError> {
        self.keep(value)?;
        let topic = self.entry.codec.info().name;
        self.entry.writer.read().as_ref().ok_or(BusError::Closed { topic })?.write(value)
    }
    fn dispose(&self, key: &dyn Any) -> Result<(), BusError> {
        let topic = self.entry.codec.info().name;
        self.entry.kept.lock().by_key.remove(&self.entry.codec.encode_key(key)?);
        self.entry.writer.read().as_ref().ok_or(BusError::Closed { topic })?.dispose(key)
    }
    fn matched(&self) -> usize {
        self.entry.matched_count.load(Ordering::Relaxed)
    }
}

impl Drop for WriterHandle {
    fn drop(&mut self) {
        self.core.inner.lock().writers.remove(&self.id);
    }
}

struct ReaderHandle {
    core: Arc<Core>,
    token: Token,
}

impl Drop for ReaderHandle {
    fn drop(&mut self) {
        let entry = self.core.inner.lock().readers.remove(&self.token);
        if let Some(mut reader) = entry.and_then(|e| e.reader) {
            let _ = self.core.registry.deregister(reader.source());
        }
    }
}
