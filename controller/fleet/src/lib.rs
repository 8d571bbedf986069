//! The controller's decisions: who is there, who is meant, where a new VM goes, and what became of a command.
//!
//! Main types: [`inventory::Inventory`] (hosts and VMs as heard of), [`groups::Groups`], [`target::hosts`] and [`target::vms`],
//! [`placement::place`], [`command::Engine`].
//!
//! Invariants:
//! 1. No I/O, no clock, no threads: time comes in with each call, what is to be done goes out as a value. The controller is
//!    the thin driver that does it.
//! 2. A group never contains itself, over any number of groups in between.
//! 3. The members of a command are frozen when it begins. Each has exactly one verdict when it has ended, and it ends by its
//!    deadline plus a grace, whatever comes or does not come from the bus.
//! 4. A member's own word is final. The controller's word in its stead (offline, unknown) gives way to it, never the other
//!    way round.
//!
//! Does not: decide whether a verb is legal in a VM's state (the agent does, where the state is), store anything.
#![forbid(unsafe_code)]

pub mod arguments;
pub mod command;
pub mod error;
pub mod groups;
pub mod inventory;
pub mod name;
pub mod placement;
pub mod target;

pub use error::FleetError;
