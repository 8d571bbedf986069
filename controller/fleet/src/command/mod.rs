//! What becomes of a command: frozen members, one publish a cell, exactly one verdict a member, an end that always comes.
//!
//! ```text
//!   begin ----> open ------ every member has its verdict ------> ended --- all said it themselves --> done with
//!                 |                                                |
//!                 |  deadline + grace: the silent become           |  the controller's own words may still be
//!                 +- offline (no heartbeat) or unknown ----------->+  replaced for a while (settling)
//! ```
//! Rules, with their reasons in `docs/decisions`:
//! 1. A member's own word is final: the first counts, a repetition is ignored, a contradiction is ignored and reported.
//! 2. `offline` and `unknown` are the controller's words. A member's own word replaces them whenever it comes while the
//!    command is open or settling, and is then marked late.
//! 3. `offline` is said at the deadline, or earlier of a host that has been silent so long that the sample can no longer
//!    reach it.
//! 4. A cell whose publish is not recorded as done is published again after a restart while the command may still be begun:
//!    agents know ids, so it is never executed twice.

mod engine;
#[cfg(test)]
mod properties;

use std::collections::{BTreeMap, BTreeSet};

use muster_common::{CommandId, HostId, VmId};
use muster_idl::v1::{Outcome, TargetKind, Verb};
use serde::{Deserialize, Serialize};

pub use engine::Engine;

/// One who must answer, as frozen when the command began.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    pub host: HostId,
    pub host_name: String,
    pub cell: u16,
    /// The agent run it is meant for; empty: any.
    pub incarnation: String,
    pub vm: Option<VmId>,
    /// The VM's name; the host's for a host command.
    pub name: String,
}

/// A command as it was given. Never changes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Order {
    pub id: CommandId,
    #[serde(with = "words")]
    pub verb: Verb,
    #[serde(with = "words")]
    pub target_kind: TargetKind,
    /// As the operator named it.
    pub target: String,
    pub issuer: String,
    pub group_epoch: u64,
    pub issued_at_us: u64,
    pub not_after_us: u64,
    pub arguments: BTreeMap<String, String>,
    pub retry_of: Option<CommandId>,
    pub members: Vec<Member>,
}

/// The verdict on one member.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Verdict {
    #[serde(with = "words")]
    pub outcome: Outcome,
    pub code: String,
    pub message: String,
    pub enabled_state: u16,
    pub guest_up: bool,
    /// JSON; empty when nothing.
    pub result: String,
    pub received_at_us: u64,
    pub started_at_us: u64,
    pub ended_at_us: u64,
    pub arrived_at_us: u64,
    /// It replaced the controller's own word.
    pub late: bool,
}

impl Verdict {
    /// True for the controller's word in a member's stead.
    pub fn is_provisional(&self) -> bool {
        matches!(self.outcome, Outcome::Offline | Outcome::Unknown)
    }
    fn says_the_same(&self, other: &Verdict) -> bool {
        self.outcome == other.outcome && self.code == other.code
    }
}

/// How far a member is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    pub phase: String,
    pub done: u64,
    pub total: u64,
    pub sent_at_us: u64,
}

/// A command with all that is known of it.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub order: Order,
    /// One place a member, in the order of the members.
    pub verdicts: Vec<Option<Verdict>>,
    /// Not stored: it may be lost.
    pub progress: Vec<Option<Progress>>,
    /// Cells in which the sample was handed to the bus.
    pub published: BTreeSet<u16>,
    /// 0 while it is open.
    pub ended_at_us: u64,
    /// Grows with each change.
    pub version: u64,
}

impl Record {
    pub fn new(order: Order) -> Self {
        let members = order.members.len();
        Self {
            order,
            verdicts: vec![None; members],
            progress: vec![None; members],
            published: BTreeSet::new(),
            ended_at_us: 0,
            version: 1,
        }
    }
    pub fn is_open(&self) -> bool {
        self.ended_at_us == 0
    }
    pub fn cells(&self) -> BTreeSet<u16> {
        self.order.members.iter().map(|member| member.cell).collect()
    }
    pub fn answered(&self) -> usize {
        self.verdicts.iter().flatten().count()
    }
    fn awaits_words(&self) -> bool {
        self.verdicts.iter().any(|verdict| verdict.as_ref().is_none_or(Verdict::is_provisional))
    }
}

/// What the driver is to do, in this order.
#[derive(Clone, Debug, PartialEq)]
pub enum Action {
    /// Make the order durable before anything that follows.
    Record(CommandId),
    /// Hand the sample to the bus of this cell, once, and say how it went: `published` or `publish_failed`.
    Publish { command: CommandId, cell: u16 },
    /// Make it durable that this cell's sample was handed over.
    RecordPublished { command: CommandId, cell: u16 },
    /// Make a verdict durable. It replaces what is there.
    RecordVerdict { command: CommandId, member: usize },
    /// Make the end durable and tell those who follow.
    RecordEnd(CommandId),
    /// Tell those who follow; nothing to store.
    ShowProgress { command: CommandId, member: usize },
    /// Nothing more will change: the engine forgets the command.
    Forget(CommandId),
    /// Something came that does not count. Worth a log line, except repetitions.
    Ignored { command: CommandId, host: HostId, vm: Option<VmId>, why: Ignored },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ignored {
    /// The member said so before: the normal answer to `awaiting`.
    Repeated,
    /// The member said something else before.
    Contradiction,
    /// Not on the frozen list.
    NotAMember,
    /// Agents do not say offline or unknown.
    NotTheirWord,
}

/// What the engine needs to know of hosts.
pub trait Liveness {
    /// When the host was last heard; 0: not since the controller's start.
    fn last_seen_us(&self, host: HostId) -> u64;
    fn is_online(&self, host: HostId) -> bool;
}

/// Times the engine goes by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Settings {
    /// A verdict needs so long from the deadline to get here.
    pub grace_us: u64,
    /// A host silent for so long gets nothing that was published before: the participant lease of RustDDS is 50 s.
    pub lost_after_us: u64,
    /// After a restart, agents get so long to say again what they said while the controller was away.
    pub restart_grace_us: u64,
    /// So long after its end a command's controller's words may be replaced.
    pub settle_us: u64,
    /// A failed publish is tried again after so long.
    pub publish_retry_us: u64,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            grace_us: 3_000_000,
            lost_after_us: 60_000_000,
            restart_grace_us: 8_000_000,
            settle_us: 600_000_000,
            publish_retry_us: 1_000_000,
        }
    }
}

/// Enumerations of the wire as their words.
mod words {
    use muster_idl::v1::{Outcome, TargetKind, Verb};
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub trait Word: Sized {
        fn text(&self) -> &'static str;
        fn parse(text: &str) -> Option<Self>;
    }
    macro_rules! words {
        ($($ty:ty),+) => { $(impl Word for $ty {
            fn text(&self) -> &'static str { self.as_str() }
            fn parse(text: &str) -> Option<Self> { Self::from_text(text) }
        })+ };
    }
    words!(Verb, TargetKind, Outcome);

    pub fn serialize<T: Word, S: Serializer>(value: &T, s: S) -> Result<S::Ok, S::Error> {
        s.serialize_str(value.text())
    }
    pub fn deserialize<'de, T: Word, D: Deserializer<'de>>(d: D) -> Result<T, D::Error> {
        let text = String::deserialize(d)?;
        T::parse(&text).ok_or_else(|| D::Error::custom(format!("unknown word {text:?}")))
    }
}
