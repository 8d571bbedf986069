//! Version 1 of every type on the wire. Field by field the mirror of `idl/muster_v1.idl`; its comments say what
//! each field means, in CIM's words (CIM schema 2.49) where CIM has them.

use serde::{Deserialize, Serialize};

macro_rules! types {
    ($($(#[$doc:meta])* $name:ident { $($(#[$field_doc:meta])* $field:ident: $ty:ty,)+ })+) => {
        $($(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
        pub struct $name { $($(#[$field_doc])* pub $field: $ty,)+ })+
    };
}
macro_rules! keys {
    ($($(#[$doc:meta])* $name:ident { $($field:ident: $ty:ty,)+ })+) => {
        $($(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub struct $name { $(pub $field: $ty,)+ })+
    };
}

keys! {
    /// Key of everything a host says of itself.
    HostKey { host: String, }
    /// Key of a virtual system on a host.
    VmKey { host: String, vm: String, }
    /// Key of a volume on a host.
    VolumeKey { host: String, volume: String, }
    /// Key of an answer: one a member of a command.
    ReplyKey { command: String, host: String, vm: String, }
    /// Key of a controller's own topics.
    ControllerKey { controller: String, }
    /// Key of a command.
    CommandKey { id: String, }
}

types! {
    /// "I am here", each second. The participant lease of RustDDS is fixed at 50 s; this is what liveness is read from.
    Heartbeat {
        /// HostId (UUID).
        host: String,
        /// Random at each start of the agent.
        incarnation: String,
        /// Kernel boot id: tells a restarted agent from a restarted machine.
        boot: String,
        /// GUID of the agent's DDS participant, 32 hexadecimal digits.
        participant: String,
        /// Counts from 0 in each incarnation.
        counter: u64,
        sent_at_us: u64,
        /// True while the host takes no new work.
        draining: bool,
    }

    /// CIM_ComputerSystem of the host.
    PhysicalHost {
        host: String,
        incarnation: String,
        /// ElementName: the host's name for people.
        name: String,
        /// The cell: the DDS domain id.
        cell: u16,
        /// Dedicated/attribute: DMI system UUID; not unique among containers and clones. Empty when unreadable.
        hardware_uuid: String,
        boot: String,
        agent_version: String,
        /// Operating system, for people.
        operating_system: String,
        kernel: String,
        processor_model: String,
        /// CIM_ComputerSystem.NumberOfProcessors: logical processors.
        number_of_processors: u32,
        total_memory_bytes: u64,
        /// 2 enabled, 4 shutting down (CIM_EnabledLogicalElement.EnabledState).
        enabled_state: u16,
        /// 5 OK, 20 major failure, 0 unknown (CIM_ManagedSystemElement.HealthState).
        health_state: u16,
        /// CIM_ManagedSystemElement.OperationalStatus.
        operational_status: Vec<u16>,
        /// libvirt URI; "simulator:" for the simulator; empty when there is no hypervisor.
        hypervisor_uri: String,
        hypervisor_version: String,
        /// "kvm", "tcg", "simulated" or "none".
        accelerator: String,
        /// Why there is no hypervisor or no KVM, for people; empty when all is well.
        hypervisor_remark: String,
        draining: bool,
        /// True: the host runs without authentication (lab mode).
        lab: bool,
        /// Base URL of the host's stream endpoint, e.g. "http://10.0.0.2:7800".
        stream_endpoint: String,
        started_at_us: u64,
    }

    /// Load of the host, each second.
    HostMetrics {
        host: String,
        sampled_at_us: u64,
        /// 0 to 100 of all processors together.
        processor_percent: f64,
        load_average_1m: f64,
        memory_total_bytes: u64,
        memory_available_bytes: u64,
        /// Totals since boot, over all interfaces but loopback.
        network_received_bytes: u64,
        network_sent_bytes: u64,
        /// Totals since boot, over all block devices.
        disk_read_bytes: u64,
        disk_written_bytes: u64,
        running_vms: u32,
    }

    /// One resident image.
    StoreImage {
        /// BLAKE3 digest of the manifest, 64 hexadecimal digits.
        digest: String,
        name: String,
        logical_bytes: u64,
        /// Volumes that are clones of it.
        volumes: u32,
    }

    /// The memory-resident store of one host, each second and on change.
    StoreState {
        host: String,
        sampled_at_us: u64,
        budget_bytes: u64,
        /// Arena frames in use times the frame size.
        resident_bytes: u64,
        /// Index, maps and counts.
        metadata_bytes: u64,
        /// What images and volumes would take without deduplication: mapped, non-zero blocks.
        logical_bytes: u64,
        /// Sum of the sizes of images and volumes.
        provisioned_bytes: u64,
        unique_blocks: u64,
        /// logical_bytes / resident_bytes; 1 when empty.
        dedup_ratio: f64,
        /// Reads of a file or a block device made to serve a guest since start: 0 is the promise.
        guest_file_reads: u64,
        /// "4k", "thp" or "hugetlb".
        page_kind: String,
        images: Vec<StoreImage>,
        volumes: u32,
    }

    /// Memory of one NUMA node of the host.
    StoreNode {
        node: u32,
        /// All of it.
        memory_bytes: u64,
        /// What the store has there.
        store_bytes: u64,
    }

    /// How sound the memory of a host's store is, and where it lies; every ten seconds, and when damage was found or repaired.
    StoreHealth {
        host: String,
        sampled_at_us: u64,
        /// False: nobody looks for damage.
        scrubbing: bool,
        /// Blocks of 4 KiB hashed and compared since the agent's start, those found damaged, those of them repaired.
        blocks_checked: u64,
        blocks_damaged: u64,
        blocks_repaired: u64,
        /// Damaged and not repaired now: reading one is an I/O error.
        blocks_unreadable: u64,
        /// Times the whole store was looked through since the agent's start, and when the last one ended; 0: none has.
        passes: u64,
        last_pass_at_us: u64,
        /// Read once a minute. Empty when the memory ends with the agent: it cannot be told from other memory then.
        nodes: Vec<StoreNode>,
    }

    /// A disk of a virtual system.
    VirtualDisk {
        /// "system", "data" or "application".
        role: String,
        volume: String,
        generation: u64,
        size_bytes: u64,
        /// Digest of the image it is a clone of; empty for a blank one.
        image: String,
        /// "volatile", "lost".
        condition: String,
    }

    /// CIM_ComputerSystem of a VM, on change and every few seconds.
    VirtualSystem {
        host: String,
        /// VmId (UUID), the same as the libvirt domain UUID.
        vm: String,
        incarnation: String,
        /// ElementName.
        name: String,
        /// 2 enabled, 3 disabled, 4 shutting down, 6 enabled but offline (saved), 9 quiesce (paused), 10 starting.
        enabled_state: u16,
        /// The last state asked for and accepted; 12 not applicable when none.
        requested_state: u16,
        health_state: u16,
        operational_status: Vec<u16>,
        /// True while the guest agent answers.
        guest_up: bool,
        virtual_processors: u32,
        memory_bytes: u64,
        disks: Vec<VirtualDisk>,
        /// Template it was made from; empty when none.
        template: String,
        /// Reason or error, for people; empty when there is nothing to say.
        remark: String,
        /// When enabled_state last changed.
        changed_at_us: u64,
        sampled_at_us: u64,
    }

    /// Load of a VM, each second while it runs.
    VmMetrics {
        host: String,
        vm: String,
        sampled_at_us: u64,
        /// 0 to 100 times its processors.
        processor_percent: f64,
        processor_time_us: u64,
        /// Memory of the hypervisor process.
        memory_resident_bytes: u64,
        /// As the balloon reports it; 0 when unknown.
        memory_used_bytes: u64,
        disk_reads: u64,
        disk_writes: u64,
        disk_read_bytes: u64,
        disk_written_bytes: u64,
        network_received_bytes: u64,
        network_sent_bytes: u64,
    }

    /// One disk of a VM as its export counts it, each second while its VM runs or somebody is connected.
    VolumeMetrics {
        host: String,
        /// VolumeId (UUID).
        volume: String,
        /// Names the export together with the volume; counters begin anew with it, and with the agent's start.
        generation: u64,
        /// VmId of the VM it is a disk of.
        vm: String,
        /// Its name in the VM, e.g. "vda".
        target: String,
        /// "vhost-user" or "nbd".
        transport: String,
        sampled_at_us: u64,
        /// Connections: queues' owners over vhost-user, clients over NBD.
        sessions: u32,
        /// Requests answered since it is offered, failed ones included.
        reads: u64,
        writes: u64,
        flushes: u64,
        /// Trims and zeroings.
        discards: u64,
        /// Requests of any kind that failed.
        errors: u64,
        read_bytes: u64,
        written_bytes: u64,
        /// The latencies below are of requests answered in so long a time before the sample. They include waiting behind
        /// others, for a limit and for space, and are rounded up to a power of two nanoseconds; 0 when there were no requests.
        latency_window_us: u64,
        read_p50_us: f64,
        read_p99_us: f64,
        read_max_us: f64,
        write_p50_us: f64,
        write_p99_us: f64,
        write_max_us: f64,
        /// Requests taken and not yet answered; 0 over NBD, where they wait in the socket.
        in_flight: u32,
        /// Queues whose first write waits because the store is full (over NBD such a write fails instead).
        waiting_for_space: u32,
        /// Requests that had to wait for the limits, and how long, all of them together.
        throttled_requests: u64,
        throttled_us: u64,
        /// Limits: requests and bytes a second; 0: none.
        limit_requests: u64,
        limit_bytes: u64,
    }

    /// A name and a value. Structured values are JSON.
    Argument {
        name: String,
        value: String,
    }

    /// One of the frozen list of those who must answer.
    Member {
        host: String,
        /// The agent run it is meant for; empty: any.
        incarnation: String,
        /// VmId; empty for a host command.
        vm: String,
        /// The VM's name (its name to be, for Create).
        name: String,
    }

    /// An order, published once a cell.
    GroupCommand {
        /// UUID version 7.
        id: String,
        controller: String,
        /// Who asked, for the log.
        issuer: String,
        /// Grows with each start of the controller: an agent refuses one lower than it has seen from this controller.
        controller_epoch: u64,
        /// Epoch of the group set the members were frozen from.
        group_epoch: u64,
        issued_at_us: u64,
        /// After this moment it must not be begun.
        not_after_us: u64,
        target_kind: TargetKind,
        /// The group path or selector the operator named; empty when he named members.
        target: String,
        members: Vec<Member>,
        verb: Verb,
        arguments: Vec<Argument>,
        /// Part of a command sent in waves; 0 when it has one wave.
        wave: u32,
        /// Digest of the plan it belongs to; empty when none.
        plan_digest: String,
        /// Id of the command this one repeats; empty when none.
        retry_of: String,
        /// Signing key; empty in lab mode.
        key_id: String,
        signature: Vec<u8>,
        /// For later versions; ignored.
        extension: Vec<u8>,
    }

    /// What one member says of a command; the last word, once. Said again when the controller awaits it.
    Verdict {
        command: String,
        host: String,
        vm: String,
        incarnation: String,
        outcome: Outcome,
        /// Stable code (`ErrorCode`), "ok" when done.
        code: String,
        /// For people; empty when there is nothing to say.
        message: String,
        /// EnabledState of the member as read back.
        enabled_state: u16,
        /// The guest agent had answered when this was said.
        guest_up: bool,
        /// What the verb yields, JSON; empty when nothing.
        result: String,
        received_at_us: u64,
        started_at_us: u64,
        ended_at_us: u64,
    }

    /// How far a member is. May be lost.
    Progress {
        command: String,
        host: String,
        vm: String,
        /// What is being done, for people.
        phase: String,
        done: u64,
        /// 0 when unknown.
        total: u64,
        sent_at_us: u64,
    }

    /// Something worth remembering.
    Event {
        host: String,
        /// VmId; empty when it is about the host.
        vm: String,
        incarnation: String,
        /// Counts from 0 in each incarnation.
        counter: u64,
        occurred_at_us: u64,
        severity: Severity,
        /// Stable kind, e.g. "vm-state", "volume-lost", "agent-started".
        kind: String,
        message: String,
        /// EnabledState before and after; 0 when it is not about a state.
        from_state: u16,
        to_state: u16,
        /// Command that caused it; empty when none.
        command: String,
    }

    /// The controller's heartbeat, each second.
    ControllerState {
        /// ControllerId (UUID).
        controller: String,
        incarnation: String,
        name: String,
        epoch: u64,
        /// Epoch of the group set in force.
        group_epoch: u64,
        /// Base URL of the controller's stream endpoint.
        stream_endpoint: String,
        lab: bool,
        sent_at_us: u64,
        /// Commands it still lacks verdicts of: whoever has some says them again.
        awaiting: Vec<String>,
    }

    /// One named group.
    Group {
        /// "school/lab1".
        path: String,
        hosts: Vec<String>,
        vms: Vec<String>,
        /// Paths of the groups directly in it.
        groups: Vec<String>,
    }

    /// All groups at once: groups travel as a whole.
    GroupSet {
        controller: String,
        epoch: u64,
        groups: Vec<Group>,
    }
}

macro_rules! enums {
    ($($(#[$doc:meta])* $name:ident { $($(#[$v_doc:meta])* $variant:ident = $text:literal,)+ })+) => {
        $($(#[$doc])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name { $($(#[$v_doc])* $variant,)+ }
        impl $name {
            pub const ALL: &'static [$name] = &[$($name::$variant,)+];
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

enums! {
    TargetKind {
        Host = "host",
        Vm = "vm",
    }

    Verb {
        /// Nothing but a verdict: who hears us?
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
        /// Runs a program in the guest through the guest agent.
        Exec = "exec",
        /// Writes a file in the guest through the guest agent.
        FileWrite = "file-write",
        /// Throws the volumes of a VM away (restore drills).
        DestroyVolumes = "destroy-volumes",
        /// Makes an image resident.
        ImagePull = "image-pull",
        ImageDrop = "image-drop",
        Drain = "drain",
        Undrain = "undrain",
        /// Makes a disk of a VM larger, or changes its quota.
        Resize = "resize",
    }

    /// Stands exactly once for each member when a command has ended.
    Outcome {
        /// The state read back is the one asked for.
        Done = "done",
        /// It was so before.
        Already = "already",
        /// Not begun: the state or the arguments do not allow it.
        Refused = "refused",
        /// Begun and not achieved.
        Failed = "failed",
        /// Not begun: its time had passed.
        Expired = "expired",
        /// Set by the controller: no heartbeat from the host, and no word by the deadline.
        Offline = "offline",
        /// Set by the controller: the host is there, its word is missing.
        Unknown = "unknown",
        /// Begun; what came of it could not be read back.
        Indeterminate = "indeterminate",
    }

    Severity {
        Info = "info",
        Warning = "warning",
        Error = "error",
    }
}
