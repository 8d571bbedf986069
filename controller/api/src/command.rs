//! Orders to groups, and what every member says of them.

use std::{collections::BTreeMap, fmt};

use muster_common::{CommandId, HostId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

macro_rules! words {
    ($($(#[$doc:meta])* $name:ident { $($(#[$v_doc:meta])* $variant:ident = $text:literal,)+ })+) => {
        $($(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize, ToSchema)]
        pub enum $name { $($(#[$v_doc])* #[serde(rename = $text)] $variant,)+ }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];
            pub const fn as_str(self) -> &'static str {
                match self { $($name::$variant => $text,)+ }
            }
            pub fn from_text(text: &str) -> Option<Self> {
                match text { $($text => Some($name::$variant),)+ _ => None }
            }
        }
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        })+
    };
}

words! {
    TargetKind {
        Host = "host",
        Vm = "vm",
    }
    Verb {
        Ping = "ping",
        Create = "create",
        Delete = "delete",
        PowerOn = "power-on",
        Resume = "resume",
        PowerOff = "power-off",
        Shutdown = "shutdown",
        Reset = "reset",
        Reboot = "reboot",
        Suspend = "suspend",
        Pause = "pause",
        Snapshot = "snapshot",
        Backup = "backup",
        Restore = "restore",
        ResetSession = "reset-session",
        Exec = "exec",
        FileWrite = "file-write",
        DestroyVolumes = "destroy-volumes",
        ImagePull = "image-pull",
        ImageDrop = "image-drop",
        Drain = "drain",
        Undrain = "undrain",
        Resize = "resize",
    }
    /// Stands exactly once for each member when a command has ended.
    Outcome {
        /// The state read back is the one asked for.
        Done = "done",
        /// It was so before.
        Already = "already",
        Refused = "refused",
        Failed = "failed",
        Expired = "expired",
        /// The controller's word: no heartbeat from the host.
        Offline = "offline",
        /// The controller's word: the host is there, its answer is missing.
        Unknown = "unknown",
        Indeterminate = "indeterminate",
    }
    CommandState {
        /// Verdicts are still awaited.
        Open = "open",
        /// Every member has its verdict.
        Ended = "ended",
    }
}

impl Outcome {
    /// True when the member is as the command wants it.
    pub const fn is_success(self) -> bool {
        matches!(self, Outcome::Done | Outcome::Already)
    }
}

/// Gives an order. `POST /v1/commands`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateCommand {
    pub verb: Verb,
    /// Names, ids or group paths; the members are all they name, each once.
    pub target: Vec<String>,
    /// Hosts or VMs, for the verbs that know both (backup). None: VMs, where the verb has them.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub target_kind: Option<TargetKind>,
    /// By name; texts as they are, anything else is sent as JSON.
    #[serde(default)]
    #[schema(value_type = BTreeMap<String, Object>)]
    pub arguments: BTreeMap<String, serde_json::Value>,
    /// It must not be begun later than this from now; the verb's own default when not said.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout_seconds: Option<u32>,
    /// The command this one repeats.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub retry_of: Option<CommandId>,
}

/// A command with its frozen members and their verdicts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Command {
    #[serde(flatten)]
    pub summary: CommandSummary,
    pub arguments: BTreeMap<String, String>,
    pub members: Vec<Member>,
}

/// A command without its members.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CommandSummary {
    #[schema(value_type = String)]
    pub id: CommandId,
    pub verb: Verb,
    pub target_kind: TargetKind,
    /// As the operator named it.
    pub target: String,
    /// Who asked.
    pub issuer: String,
    pub state: CommandState,
    pub issued_at_us: u64,
    pub not_after_us: u64,
    /// 0 while it is open.
    pub ended_at_us: u64,
    /// Cells it was published in, once each.
    pub cells: Vec<u16>,
    pub members_total: u32,
    pub members_answered: u32,
    /// How many members have each outcome.
    #[schema(value_type = BTreeMap<String, u32>)]
    pub outcomes: BTreeMap<Outcome, u32>,
    /// From issue to the first and to the last verdict, 0 while there is none.
    pub first_verdict_after_us: u64,
    pub last_verdict_after_us: u64,
    #[schema(value_type = Option<String>)]
    pub retry_of: Option<CommandId>,
    /// Resource version.
    pub version: u64,
}

/// One who must answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Member {
    #[schema(value_type = String)]
    pub host: HostId,
    pub host_name: String,
    /// None for a host command.
    #[schema(value_type = Option<String>)]
    pub vm: Option<VmId>,
    /// The VM's name, or the host's for a host command.
    pub name: String,
    pub verdict: Option<Verdict>,
    /// The latest word before the verdict.
    pub progress: Option<Progress>,
}

/// What a member says, or the controller in its stead.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Verdict {
    pub outcome: Outcome,
    /// Stable code, "ok" when done.
    pub code: String,
    pub message: String,
    /// EnabledState as read back.
    pub enabled_state: u16,
    pub guest_up: bool,
    /// What the verb yields, JSON; null when nothing.
    #[schema(value_type = Object)]
    pub result: serde_json::Value,
    /// When the member received, began and ended it; 0 when it did not.
    pub received_at_us: u64,
    pub started_at_us: u64,
    pub ended_at_us: u64,
    /// When the verdict came to the controller.
    pub arrived_at_us: u64,
    /// True: the member's own word came after the command had ended, and replaced "offline" or "unknown".
    pub late: bool,
}

/// How far a member is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Progress {
    pub phase: String,
    pub done: u64,
    /// 0 when unknown.
    pub total: u64,
    pub sent_at_us: u64,
}

/// A server-sent event of `/v1/commands/{id}/events`. First the whole command, then what changes, `ended` last.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum CommandEvent {
    /// The command as it stands at the start of the stream, or again after the reader fell behind.
    Command { command: Box<Command> },
    /// `member` has its verdict.
    Verdict { member: Box<Member> },
    /// `member` has come further.
    Progress { member: Box<Member> },
    /// All have answered, or the time is over. The stream ends.
    Ended { summary: Box<CommandSummary> },
}

/// Which commands are asked for, newest first.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub struct CommandQuery {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cursor: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<u32>,
    /// Only those that are open.
    #[serde(default)]
    pub open: bool,
}
