//! Says verdicts, progress and events: hands them to one thread that publishes, so that nobody who decides or acts ever
//! waits for a reader.
//!
//! Thread: `agent-voice`. A full queue drops what was handed over and says so in the log: verdicts are in the ledger and
//! are said again when the controller awaits them; progress and events may be lost.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread::JoinHandle,
};

use crossbeam_channel::{Receiver, Sender, TrySendError, bounded};
use muster_bus::{Bus, BusError, Publisher};
use muster_common::{Chain, Clock, HostId, Incarnation};
use muster_idl::v1::{Event, Progress, Severity, Verdict};

use crate::dispatcher::Order;

/// What is said.
enum Word {
    Verdict(Box<Verdict>),
    Progress(Box<Progress>),
    Event(Box<Event>),
    Stop,
}

const QUEUE: usize = 4096;

/// A handle; cheap to clone.
#[derive(Clone)]
pub struct Voice {
    sender: Sender<Word>,
    clock: Arc<dyn Clock>,
    host: String,
    incarnation: String,
    counter: Arc<AtomicU64>,
}

/// What an event is about.
#[derive(Clone, Debug, Default)]
pub struct About {
    pub vm: String,
    pub from_state: u16,
    pub to_state: u16,
    pub command: String,
}

impl Voice {
    /// Starts the thread.
    pub fn start(
        bus: &Bus,
        clock: Arc<dyn Clock>,
        host: HostId,
        incarnation: Incarnation,
    ) -> Result<(Self, JoinHandle<()>), BusError> {
        let (verdicts, progress, events) = (bus.publisher()?, bus.publisher()?, bus.publisher()?);
        let (sender, receiver) = bounded(QUEUE);
        let thread = std::thread::Builder::new()
            .name("agent-voice".into())
            .spawn(move || speak(&receiver, &verdicts, &progress, &events))
            .map_err(|source| BusError::Io { attempted: "start thread agent-voice".into(), source })?;
        let voice = Self {
            sender,
            clock,
            host: host.to_string(),
            incarnation: incarnation.to_string(),
            counter: Arc::default(),
        };
        Ok((voice, thread))
    }

    fn hand_over(&self, word: Word, what: &'static str) {
        match self.sender.try_send(word) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => tracing::warn!(what, "dropped, the queue to the bus is full"),
            Err(TrySendError::Disconnected(_)) => tracing::debug!(what, "dropped, the agent is stopping"),
        }
    }

    pub fn verdict(&self, verdict: Verdict) {
        self.hand_over(Word::Verdict(Box::new(verdict)), "verdict");
    }

    pub fn progress(&self, order: &Order, phase: &str, done: u64, total: u64) {
        let progress = Progress {
            command: order.command.to_string(),
            host: self.host.clone(),
            vm: order.member.clone(),
            phase: phase.to_string(),
            done,
            total,
            sent_at_us: self.clock.now_us(),
        };
        self.hand_over(Word::Progress(Box::new(progress)), "progress");
    }

    pub fn event(&self, severity: Severity, kind: &str, message: impl Into<String>, about: About) {
        let event = Event {
            host: self.host.clone(),
            vm: about.vm,
            incarnation: self.incarnation.clone(),
            counter: self.counter.fetch_add(1, Ordering::Relaxed),
            occurred_at_us: self.clock.now_us(),
            severity,
            kind: kind.to_string(),
            message: message.into(),
            from_state: about.from_state,
            to_state: about.to_state,
            command: about.command,
        };
        self.hand_over(Word::Event(Box::new(event)), "event");
    }

    /// Lets the thread say what is queued and end.
    pub fn finish(&self) {
        // a full queue is being emptied: wait for room, this is the last word
        let _ = self.sender.send_timeout(Word::Stop, std::time::Duration::from_secs(5));
    }
}

fn speak(
    receiver: &Receiver<Word>,
    verdicts: &Publisher<Verdict>,
    progress: &Publisher<Progress>,
    events: &Publisher<Event>,
) {
    for word in receiver {
        let result = match &word {
            Word::Verdict(sample) => verdicts.publish(sample),
            Word::Progress(sample) => progress.publish(sample),
            Word::Event(sample) => events.publish(sample),
            Word::Stop => return,
        };
        if let Err(e) = result {
            tracing::warn!(err = %Chain(&e), "a sample was not published");
        }
    }
}
