//! Topics in, topics out: typed publishers and subscribers over DDS, and a seeded in-memory twin for tests.
//!
//! Main types: [`Bus`] (one DDS participant in one cell, or one node of a [`twin::Network`]), [`Publisher`],
//! [`Subscriber`], [`Sample`], [`BusConfig`]. What topics there are, with which quality of service, is `muster-idl`'s
//! table; this crate takes the profile from there and never asks for another.
//!
//! ```
//! # tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(async {
//! use muster_bus::{Payload, twin::{LossConfig, Network}};
//! use muster_idl::v1::Heartbeat;
//!
//! let network = Network::new(1, LossConfig::NONE);
//! let (host, controller) = (network.join("host"), network.join("controller"));
//! let mut hearts = controller.subscriber::<Heartbeat>(64).unwrap();
//! let beat = Heartbeat {
//!     host: "a".into(), incarnation: "i".into(), boot: "b".into(), participant: host.participant_guid(),
//!     counter: 0, sent_at_us: 0, draining: false,
//! };
//! host.publisher::<Heartbeat>().unwrap().publish(&beat).unwrap();
//! assert_eq!(hearts.recv().await.unwrap().payload, Payload::Value(beat));
//! # });
//! ```
//!
//! Invariants:
//! 1. Nothing here waits without a bound: [`Publisher::publish`] gives up after [`PUBLISH_TIMEOUT`], queues have a
//!    capacity, readers never stop the receiving thread.
//! 2. A full subscriber of a best-effort topic loses the oldest samples and counts them ([`Subscriber::dropped`]).
//!    Of a reliable topic nothing is dropped here: samples wait in the DDS cache (`max_samples` of the profile);
//!    what even that lost is counted ([`Subscriber::missed`]).
//! 3. A DDS acknowledgement is not delivery: who must know that a thing arrived asks for an answer on another topic.
//! 4. The twin sends CDR bytes, as DDS does: what does not survive encoding fails in both.
//! 5. Only this crate names the DDS library.
//!
//! Threads: each DDS bus owns `muster-bus` (polls, takes, hands over), and with peers `muster-peers` (relays
//! discovery), beside the two threads of the DDS library; a twin with delays owns `twin-clock`. All end with the last
//! `Bus`, `Publisher` and `Subscriber`. Locks: one per queue and one per bus; no callback runs under either.
//!
//! Deliberately not here: liveness (read it from heartbeats: the DDS lease is 50 s), groups and filters (they are in
//! the payload), acknowledgement by the application, encryption.
#![forbid(unsafe_code)]

mod codec;
mod config;
mod dds;
mod error;
mod queue;
#[cfg(feature = "testing")]
pub mod testing;
pub mod twin;

use std::{any::Any, fmt, marker::PhantomData, sync::Arc, time::Duration};

use muster_idl::{Reliability, Topic};

pub use config::{BusConfig, MAX_CELL};
pub use error::BusError;
use queue::{Arrived, Erased, Overflow, Queue};

/// How long a publish on a reliable topic waits for room when readers do not acknowledge. Best-effort topics do not
/// wait at all.
pub const PUBLISH_TIMEOUT: Duration = Duration::from_millis(500);

/// What a sample says.
#[derive(Clone, Debug, PartialEq)]
pub enum Payload<T: Topic> {
    /// The instance is so.
    Value(T),
    /// The instance is gone.
    Disposed(T::Key),
}

impl<T: Topic> Payload<T> {
    pub fn key(&self) -> T::Key {
        match self {
            Payload::Value(value) => value.key(),
            Payload::Disposed(key) => key.clone(),
        }
    }
}

/// One received sample.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample<T: Topic> {
    pub payload: Payload<T>,
    /// GUID of the writer, 32 hexadecimal digits; the first 24 are its participant's.
    pub writer: String,
    /// When it was received here, microseconds since the Unix epoch.
    pub received_us: u64,
}

impl<T: Topic> Sample<T> {
    pub fn value(self) -> Option<T> {
        match self.payload {
            Payload::Value(value) => Some(value),
            Payload::Disposed(_) => None,
        }
    }
}

/// One node's end of the transport: a DDS participant or a node of the twin.
pub(crate) trait Transport: Send + Sync {
    fn writer(&self, codec: &'static dyn codec::Codec) -> Result<Box<dyn Writer>, BusError>;
    /// Samples go into `queue` until the returned guard is dropped.
    fn reader(
        &self,
        codec: &'static dyn codec::Codec,
        queue: Arc<Queue>,
    ) -> Result<Box<dyn Any + Send + Sync>, BusError>;
    fn participant_guid(&self) -> String;
    fn diagnosis(&self) -> String;
    fn rebuild(&self) -> Result<(), BusError>;
}

pub(crate) trait Writer: Send + Sync {
    fn publish(&self, value: &dyn Any) -> Result<(), BusError>;
    fn dispose(&self, key: &dyn Any) -> Result<(), BusError>;
    fn matched(&self) -> usize;
}

/// A place on the bus. Cheap to clone; the participant ends when the last clone, publisher and subscriber is dropped.
#[derive(Clone)]
pub struct Bus {
    cell: u16,
    transport: Arc<dyn Transport>,
}

impl fmt::Debug for Bus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus").field("cell", &self.cell).field("participant", &self.participant_guid()).finish()
    }
}

impl Bus {
    /// Joins a cell over DDS. Blocks for some milliseconds (sockets and threads are made).
    ///
    /// # Errors
    /// A cell above [`MAX_CELL`], an interface this machine does not have (the error names those it has), a port
    /// another program holds.
    pub fn dds(config: &BusConfig) -> Result<Bus, BusError> {
        Ok(Bus { cell: config.cell, transport: dds::join(config)? })
    }

    pub(crate) fn new(cell: u16, transport: Arc<dyn Transport>) -> Bus {
        Bus { cell, transport }
    }

    /// The cell (DDS domain id).
    pub fn cell(&self) -> u16 {
        self.cell
    }

    /// A writer of `T`'s topic, with the quality of service of the table.
    ///
    /// # Errors
    /// When the DDS library refuses.
    pub fn publisher<T: Topic>(&self) -> Result<Publisher<T>, BusError> {
        let writer = self.transport.writer(codec::of::<T>()?)?;
        Ok(Publisher { writer: Arc::from(writer), _bus: self.clone(), of: PhantomData })
    }

    /// A reader of `T`'s topic. `capacity` samples wait for [`Subscriber::recv`]; see invariant 2 for more than that.
    ///
    /// # Errors
    /// When the DDS library refuses.
    pub fn subscriber<T: Topic>(&self, capacity: usize) -> Result<Subscriber<T>, BusError> {
        let overflow = match T::INFO.profile.reliability {
            Reliability::BestEffort => Overflow::DropOldest,
            Reliability::Reliable => Overflow::Refuse,
        };
        let queue = Arc::new(Queue::new(capacity, overflow));
        let guard = self.transport.reader(codec::of::<T>()?, queue.clone())?;
        Ok(Subscriber { queue, _guard: guard, _bus: self.clone(), of: PhantomData })
    }

    /// GUID of this participant, 32 hexadecimal digits. Another one after [`Bus::rebuild`].
    pub fn participant_guid(&self) -> String {
        self.transport.participant_guid()
    }

    /// Where this bus looks and whom it sees, for the warning that nobody answers.
    pub fn diagnosis(&self) -> String {
        self.transport.diagnosis()
    }

    /// Leaves and joins again with a fresh participant; publishers and subscribers stay valid, and what
    /// transient-local publishers last wrote is written again. For the watchdog: after an outage of more than 50 s
    /// participants of this DDS library never match each other again (docs of `muster-bus`: FACTS), and heartbeats
    /// that come back without the topics are the sign. Blocks for some milliseconds.
    ///
    /// # Errors
    /// As [`Bus::dds`]; the old participant is gone then, and a later call tries again.
    pub fn rebuild(&self) -> Result<(), BusError> {
        self.transport.rebuild()
    }
}

/// A typed writer. Cheap to clone; samples of all clones are in one order.
pub struct Publisher<T: Topic> {
    writer: Arc<dyn Writer>,
    _bus: Bus,
    of: PhantomData<fn() -> T>,
}

impl<T: Topic> Clone for Publisher<T> {
    fn clone(&self) -> Self {
        Self { writer: self.writer.clone(), _bus: self._bus.clone(), of: PhantomData }
    }
}

impl<T: Topic> fmt::Debug for Publisher<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Publisher({})", T::INFO.name)
    }
}

impl<T: Topic> Publisher<T> {
    /// Writes a sample. Returns at once, except when readers of a reliable topic have not acknowledged `max_samples`
    /// of them: then waits [`PUBLISH_TIMEOUT`] at most.
    ///
    /// # Errors
    /// [`BusError::Timeout`]: the sample was not written.
    pub fn publish(&self, sample: &T) -> Result<(), BusError> {
        self.writer.publish(sample)
    }

    /// Says that an instance is gone.
    ///
    /// # Errors
    /// As [`Publisher::publish`].
    pub fn dispose(&self, key: &T::Key) -> Result<(), BusError> {
        self.writer.dispose(key)
    }

    /// How many readers it has now.
    pub fn matched(&self) -> usize {
        self.writer.matched()
    }
}

/// A typed reader.
pub struct Subscriber<T: Topic> {
    queue: Arc<Queue>,
    _guard: Box<dyn Any + Send + Sync>,
    _bus: Bus,
    of: PhantomData<fn() -> T>,
}

impl<T: Topic> fmt::Debug for Subscriber<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Subscriber({})", T::INFO.name)
    }
}

impl<T: Topic> Drop for Subscriber<T> {
    fn drop(&mut self) {
        self.queue.close();
    }
}

impl<T: Topic> Subscriber<T> {
    fn typed(arrived: Arrived) -> Option<Sample<T>> {
        // the codec of T made it, so it is a T
        let payload = match arrived.payload {
            Erased::Value(value) => Payload::Value(*value.downcast::<T>().ok()?),
            Erased::Disposed(key) => Payload::Disposed(*key.downcast::<T::Key>().ok()?),
        };
        Some(Sample { payload, writer: arrived.writer, received_us: arrived.received_us })
    }

    /// The next sample; `None` when the bus is closed. Cancel-safe: a sample is taken only when it is returned.
    pub async fn recv(&mut self) -> Option<Sample<T>> {
        self.queue.recv().await.and_then(Self::typed)
    }

    /// The next sample, if there is one.
    pub fn try_recv(&mut self) -> Option<Sample<T>> {
        self.queue.pop().and_then(Self::typed)
    }

    /// The next sample, for threads without a runtime. `None` when none came in time.
    pub fn recv_timeout(&mut self, timeout: Duration) -> Option<Sample<T>> {
        self.queue.recv_timeout(timeout).and_then(Self::typed)
    }

    /// Samples this reader was too slow for (best-effort topics).
    pub fn dropped(&self) -> u64 {
        self.queue.dropped()
    }

    /// Samples of reliable topics that writers sent and this reader never got: evicted from the DDS cache, or sent
    /// during an outage. Only gaps inside the stream of one writer are seen.
    pub fn missed(&self) -> u64 {
        self.queue.missed()
    }

    /// How many writers it has now.
    pub fn matched(&self) -> usize {
        self.queue.matched()
    }
}
