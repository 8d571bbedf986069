//! Error codes that travel, and the one way an error chain is printed.

use std::{error::Error, fmt};

use serde::{Deserialize, Serialize};

macro_rules! codes {
    ($($(#[$doc:meta])* $variant:ident = $text:literal,)+) => {
        /// Why something was not done: stable text on the wire, in REST problem bodies and in JSON output.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        pub enum ErrorCode {
            $($(#[$doc])* #[serde(rename = $text)] $variant,)+
        }
        impl ErrorCode {
            pub const ALL: &'static [ErrorCode] = &[$(ErrorCode::$variant,)+];
            /// The stable text.
            pub const fn as_str(self) -> &'static str {
                match self { $(ErrorCode::$variant => $text,)+ }
            }
            /// The code of a stable text; `None` for a text of a newer version.
            pub fn from_text(text: &str) -> Option<Self> {
                match text { $($text => Some(ErrorCode::$variant),)+ _ => None }
            }
        }
    };
}

codes! {
    /// Nothing is wrong.
    Ok = "ok",
    /// The request itself is malformed.
    InvalidArgument = "invalid-argument",
    NotFound = "not-found",
    AlreadyExists = "already-exists",
    /// The name matches more than one thing.
    Ambiguous = "ambiguous",
    /// The resource changed since it was read (resource version differs).
    Conflict = "conflict",
    /// The verb has no meaning in the present state.
    InvalidState = "invalid-state",
    /// In use: attached, cloned from, or referenced.
    InUse = "in-use",
    /// A group would contain itself.
    GroupCycle = "group-cycle",
    /// The command's time had passed when it arrived or before it was done.
    Expired = "expired",
    /// Addressed to an earlier run of this agent.
    StaleIncarnation = "stale-incarnation",
    /// No heartbeat from the host.
    HostOffline = "host-offline",
    /// The host takes no new work.
    HostDraining = "host-draining",
    /// The memory budget does not hold it.
    NoSpace = "no-space",
    UnsupportedFormat = "unsupported-format",
    /// The image refers to other files of the host.
    ExternalReference = "external-reference",
    /// Shorter than its own headers say, or a checksum differs.
    Corrupt = "corrupt",
    Unsupported = "unsupported",
    /// The hypervisor is missing or refused.
    Hypervisor = "hypervisor",
    /// The guest agent does not answer.
    GuestAgent = "guest-agent",
    /// A volume of the VM was lost with the agent's memory.
    VolumeLost = "volume-lost",
    Timeout = "timeout",
    /// The outcome could not be read back.
    Indeterminate = "indeterminate",
    PermissionDenied = "permission-denied",
    /// Another process holds the port, socket or state directory.
    AddressInUse = "address-in-use",
    Unavailable = "unavailable",
    Io = "io",
    Cancelled = "cancelled",
    Internal = "internal",
}

impl fmt::Display for ErrorCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.as_str())
    }
}

/// Prints an error and its sources as `outer: middle: inner`. Messages never repeat their source themselves.
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_their_texts_are_one_to_one() {
        for &code in ErrorCode::ALL {
            assert_eq!(ErrorCode::from_text(code.as_str()), Some(code));
            assert_eq!(serde_json::to_string(&code).unwrap(), format!("\"{code}\""));
        }
    }
}
