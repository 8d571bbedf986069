//! The CIM model (schema 2.49) of what Muster manages: states with CIM's numbers, what each verb means in each state,
//! what counts as a change worth publishing, and what a disk may take of a host's memory.
//!
//! Main types: [`EnabledState`], [`RequestedState`], [`HealthState`], [`OperationalStatus`]; [`answer`] is the table
//! of every (state, verb) pair; [`Changes`] decides when a topic sample is due; [`DiskLimits`] are checked quota, reservation
//! and policy.
//!
//! Invariants:
//! 1. Numbers on the wire are CIM's own; a number this version does not know is kept ([`EnabledState::from_cim`]
//!    gives `None`), never mapped to another.
//! 2. [`answer`] is total: every pair is done, already so, under way, or refused with a code and a text for people.
//! 3. A verb done twice is not an error where that can be: the second time it is [`Answer::Already`] or
//!    [`Answer::Await`].
//!
//! ```text
//!                    power-on                        shutdown
//!   [3 disabled] ---------------> [10 starting]      +------> [4 shutting down] ---> [3 disabled]
//!        ^                             |             |            (guest obeys; else the command's policy)
//!        | power-off                   v             |
//!        +--------------------- [2 enabled] ---------+
//!        |                       |  ^   |  ^    reset: 2 -> 3 -> 2   reboot: 2 -> 4 -> 10 -> 2
//!        |                 pause |  |   |  | resume, power-on
//!        |                       v  |   v  |
//!        +--------------- [9 quiesce]  [6 enabled but offline]   (suspend: saved to disk or memory)
//! ```
//!
//! No I/O, no threads, no locks. Deliberately not here: how a hypervisor is made to do it (`agent/virt`), CIM-XML.
#![forbid(unsafe_code)]

mod change;
mod limits;
mod state;
mod verb;

pub use change::{Changes, Material};
pub use limits::{DiskLimits, LimitError, WhenFull, check_tenant};
pub use state::{EnabledState, HealthState, OperationalStatus, RequestedState, condition_of};
pub use verb::{Answer, answer, host_answer, refused_while_draining, requested_state, transition};
