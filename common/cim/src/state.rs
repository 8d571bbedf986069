//! CIM's enumerations, with CIM's numbers.

use serde::{Deserialize, Serialize};

macro_rules! cim_enum {
    ($($(#[$doc:meta])* $name:ident { $($(#[$v_doc:meta])* $variant:ident = $number:literal $text:literal,)+ })+) => {
        $($(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$v_doc])* $variant,)+ }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];
            /// CIM's number, as it is on the wire.
            pub const fn cim(self) -> u16 {
                match self { $($name::$variant => $number,)+ }
            }
            /// `None` for a number this version does not know.
            pub const fn from_cim(number: u16) -> Option<Self> {
                match number { $($number => Some($name::$variant),)+ _ => None }
            }
            /// The word people and REST use.
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }
            pub fn from_text(text: &str) -> Option<Self> {
                match text { $($text => Some($name::$variant),)+ _ => None }
            }
        }
        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        })+
    };
}

cim_enum! {
    /// CIM_EnabledLogicalElement.EnabledState.
    EnabledState {
        /// The hypervisor does not say.
        Unknown = 0 "unknown",
        Other = 1 "other",
        /// Running.
        Enabled = 2 "enabled",
        /// Off.
        Disabled = 3 "disabled",
        ShuttingDown = 4 "shutting-down",
        /// It does not exist (any more).
        NotApplicable = 5 "not-applicable",
        /// Saved: its memory is kept, it does not run.
        EnabledButOffline = 6 "enabled-but-offline",
        InTest = 7 "in-test",
        Deferred = 8 "deferred",
        /// Paused.
        Quiesce = 9 "quiesce",
        Starting = 10 "starting",
    }

    /// CIM_EnabledLogicalElement.RequestedState.
    RequestedState {
        Unknown = 0 "unknown",
        Enabled = 2 "enabled",
        Disabled = 3 "disabled",
        ShutDown = 4 "shut-down",
        NoChange = 5 "no-change",
        Offline = 6 "offline",
        Test = 7 "test",
        Deferred = 8 "deferred",
        Quiesce = 9 "quiesce",
        Reboot = 10 "reboot",
        Reset = 11 "reset",
        /// None was ever asked for.
        NotApplicable = 12 "not-applicable",
    }

    /// CIM_ManagedSystemElement.HealthState.
    HealthState {
        Unknown = 0 "unknown",
        Ok = 5 "ok",
        Degraded = 10 "degraded",
        MinorFailure = 15 "minor-failure",
        MajorFailure = 20 "major-failure",
        CriticalFailure = 25 "critical-failure",
        NonRecoverable = 30 "non-recoverable",
    }

    /// CIM_ManagedSystemElement.OperationalStatus.
    OperationalStatus {
        Unknown = 0 "unknown",
        Other = 1 "other",
        Ok = 2 "ok",
        Degraded = 3 "degraded",
        Stressed = 4 "stressed",
        Error = 6 "error",
        Starting = 8 "starting",
        Stopping = 9 "stopping",
        Stopped = 10 "stopped",
        NoContact = 12 "no-contact",
        LostCommunication = 13 "lost-communication",
        Dormant = 15 "dormant",
    }
}

/// The health and operational status that go with a state; `failed`: it crashed, or a volume of it is lost.
pub fn condition_of(state: EnabledState, failed: bool) -> (HealthState, Vec<OperationalStatus>) {
    if failed {
        return (HealthState::MajorFailure, vec![OperationalStatus::Error]);
    }
    match state {
        EnabledState::Enabled => (HealthState::Ok, vec![OperationalStatus::Ok]),
        EnabledState::Starting => (HealthState::Ok, vec![OperationalStatus::Starting]),
        EnabledState::ShuttingDown => (HealthState::Ok, vec![OperationalStatus::Stopping]),
        EnabledState::Disabled => (HealthState::Ok, vec![OperationalStatus::Stopped]),
        EnabledState::EnabledButOffline | EnabledState::Quiesce => (HealthState::Ok, vec![OperationalStatus::Dormant]),
        EnabledState::Unknown
        | EnabledState::Other
        | EnabledState::NotApplicable
        | EnabledState::InTest
        | EnabledState::Deferred => (HealthState::Unknown, vec![OperationalStatus::Unknown]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_words_are_one_to_one() {
        for number in 0..=u16::MAX {
            if let Some(state) = EnabledState::from_cim(number) {
                assert_eq!(state.cim(), number);
                assert_eq!(EnabledState::from_text(state.as_str()), Some(state));
            }
        }
        assert_eq!(EnabledState::ALL.len(), 11);
        assert_eq!(EnabledState::from_cim(11), None);
        assert_eq!(RequestedState::Reset.cim(), 11);
        assert_eq!(OperationalStatus::NoContact.cim(), 12);
    }
}
