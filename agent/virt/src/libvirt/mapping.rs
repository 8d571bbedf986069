//! libvirt's numbers in our words.

use virt::error::{Error, ErrorNumber};
use virt_sys as sys;

use crate::error::{HypervisorError, HypervisorErrorKind};
use crate::state::{DomainState, StateReason};

pub(super) fn failed(context: &str, e: Error) -> HypervisorError {
    HypervisorError::with_source(kind_of(&e), context, e)
}

pub(super) fn kind_of(e: &Error) -> HypervisorErrorKind {
    match e.code() {
        ErrorNumber::NoDomain => HypervisorErrorKind::NotFound,
        ErrorNumber::OperationInvalid => HypervisorErrorKind::InvalidState,
        ErrorNumber::DomExist => HypervisorErrorKind::AlreadyExists,
        ErrorNumber::NoSupport
        | ErrorNumber::ConfigUnsupported
        | ErrorNumber::ArgumentUnsupported
        | ErrorNumber::OperationUnsupported => HypervisorErrorKind::Unsupported,
        ErrorNumber::OperationTimeout | ErrorNumber::AgentCommandTimeout => HypervisorErrorKind::Unknown,
        ErrorNumber::AgentUnresponsive | ErrorNumber::AgentUnsynced => HypervisorErrorKind::AgentUnavailable,
        ErrorNumber::AgentCommandFailed => HypervisorErrorKind::GuestFailed,
        ErrorNumber::NoConnect | ErrorNumber::Rpc => HypervisorErrorKind::Connection,
        ErrorNumber::XmlError | ErrorNumber::XmlDetail | ErrorNumber::InvalidArg => HypervisorErrorKind::InvalidSpec,
        _ => HypervisorErrorKind::Other,
    }
}

/// `saved`: it is off and its memory is kept.
pub(super) fn state_of(state: u32, reason: i32, saved: bool) -> (DomainState, StateReason) {
    let reason = reason as u32;
    match state {
        sys::VIR_DOMAIN_RUNNING | sys::VIR_DOMAIN_BLOCKED => (DomainState::Running, StateReason::None),
        sys::VIR_DOMAIN_PAUSED => match reason {
            sys::VIR_DOMAIN_PAUSED_STARTING_UP => (DomainState::Starting, StateReason::None),
            sys::VIR_DOMAIN_PAUSED_SHUTTING_DOWN => (DomainState::ShuttingDown, StateReason::GuestShutdown),
            sys::VIR_DOMAIN_PAUSED_CRASHED => (DomainState::Crashed, StateReason::Crashed),
            sys::VIR_DOMAIN_PAUSED_IOERROR => (DomainState::Paused, StateReason::IoError),
            sys::VIR_DOMAIN_PAUSED_USER => (DomainState::Paused, StateReason::User),
            sys::VIR_DOMAIN_PAUSED_MIGRATION
            | sys::VIR_DOMAIN_PAUSED_SAVE
            | sys::VIR_DOMAIN_PAUSED_DUMP
            | sys::VIR_DOMAIN_PAUSED_SNAPSHOT => (DomainState::Paused, StateReason::Job),
            _ => (DomainState::Paused, StateReason::None),
        },
        // the guest sleeps by its own wish; `resume` wakes it
        sys::VIR_DOMAIN_PMSUSPENDED => (DomainState::Paused, StateReason::GuestShutdown),
        sys::VIR_DOMAIN_SHUTDOWN => (DomainState::ShuttingDown, StateReason::GuestShutdown),
        sys::VIR_DOMAIN_SHUTOFF if saved => (DomainState::Saved, StateReason::User),
        sys::VIR_DOMAIN_SHUTOFF => match reason {
            sys::VIR_DOMAIN_SHUTOFF_CRASHED => (DomainState::Crashed, StateReason::Crashed),
            sys::VIR_DOMAIN_SHUTOFF_SHUTDOWN => (DomainState::Off, StateReason::GuestShutdown),
            sys::VIR_DOMAIN_SHUTOFF_DESTROYED => (DomainState::Off, StateReason::Destroyed),
            sys::VIR_DOMAIN_SHUTOFF_FAILED => (DomainState::Off, StateReason::Failed),
            _ => (DomainState::Off, StateReason::None),
        },
        sys::VIR_DOMAIN_CRASHED => (DomainState::Crashed, StateReason::Crashed),
        _ => (DomainState::Unknown, StateReason::None),
    }
}

/// `None` for events that change no state (defined, undefined).
pub(super) fn lifecycle_event(event: u32, detail: i32) -> Option<(DomainState, StateReason)> {
    let detail = detail as u32;
    Some(match event {
        sys::VIR_DOMAIN_EVENT_STARTED | sys::VIR_DOMAIN_EVENT_RESUMED => (DomainState::Running, StateReason::None),
        sys::VIR_DOMAIN_EVENT_SUSPENDED => {
            let reason = match detail {
                sys::VIR_DOMAIN_EVENT_SUSPENDED_IOERROR => StateReason::IoError,
                sys::VIR_DOMAIN_EVENT_SUSPENDED_PAUSED => StateReason::User,
                _ => StateReason::Job,
            };
            (DomainState::Paused, reason)
        }
        sys::VIR_DOMAIN_EVENT_STOPPED => match detail {
            sys::VIR_DOMAIN_EVENT_STOPPED_SHUTDOWN => (DomainState::Off, StateReason::GuestShutdown),
            sys::VIR_DOMAIN_EVENT_STOPPED_DESTROYED => (DomainState::Off, StateReason::Destroyed),
            sys::VIR_DOMAIN_EVENT_STOPPED_CRASHED => (DomainState::Crashed, StateReason::Crashed),
            sys::VIR_DOMAIN_EVENT_STOPPED_SAVED => (DomainState::Saved, StateReason::User),
            sys::VIR_DOMAIN_EVENT_STOPPED_FAILED => (DomainState::Off, StateReason::Failed),
            _ => (DomainState::Off, StateReason::None),
        },
        sys::VIR_DOMAIN_EVENT_SHUTDOWN => (DomainState::ShuttingDown, StateReason::GuestShutdown),
        sys::VIR_DOMAIN_EVENT_PMSUSPENDED => (DomainState::Paused, StateReason::GuestShutdown),
        sys::VIR_DOMAIN_EVENT_CRASHED => (DomainState::Crashed, StateReason::Crashed),
        _ => return None,
    })
}
