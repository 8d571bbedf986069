# Generated from idl/idl/muster_v1.idl by `cargo xtask python-types`. Do not edit.
"""The topics of Muster for the Python binding of Cyclone DDS (`pip install cyclonedds`)."""

from dataclasses import dataclass

import cyclonedds.idl.annotations as ann
import cyclonedds.idl.types as types
from cyclonedds.idl import IdlEnum, IdlStruct


class TargetKind(IdlEnum, typename="muster.v1.TargetKind", default="TARGET_KIND_HOST"):
    TARGET_KIND_HOST = 0
    TARGET_KIND_VM = 1


class Verb(IdlEnum, typename="muster.v1.Verb", default="VERB_PING"):
    VERB_PING = 0
    VERB_CREATE = 1
    VERB_DELETE = 2
    VERB_POWER_ON = 3
    VERB_RESUME = 4
    VERB_POWER_OFF = 5
    VERB_SHUTDOWN = 6
    VERB_RESET = 7
    VERB_REBOOT = 8
    VERB_SUSPEND = 9
    VERB_PAUSE = 10
    VERB_SNAPSHOT = 11
    VERB_BACKUP = 12
    VERB_RESTORE = 13
    VERB_RESET_SESSION = 14
    VERB_EXEC = 15
    VERB_FILE_WRITE = 16
    VERB_DESTROY_VOLUMES = 17
    VERB_IMAGE_PULL = 18
    VERB_IMAGE_DROP = 19
    VERB_DRAIN = 20
    VERB_UNDRAIN = 21
    VERB_RESIZE = 22


class Outcome(IdlEnum, typename="muster.v1.Outcome", default="OUTCOME_DONE"):
    OUTCOME_DONE = 0
    OUTCOME_ALREADY = 1
    OUTCOME_REFUSED = 2
    OUTCOME_FAILED = 3
    OUTCOME_EXPIRED = 4
    OUTCOME_OFFLINE = 5
    OUTCOME_UNKNOWN = 6
    OUTCOME_INDETERMINATE = 7


class Severity(IdlEnum, typename="muster.v1.Severity", default="SEVERITY_INFO"):
    SEVERITY_INFO = 0
    SEVERITY_WARNING = 1
    SEVERITY_ERROR = 2


@dataclass
@ann.final
class Heartbeat(IdlStruct, typename="muster.v1.Heartbeat"):
    host: str
    ann.key("host")
    incarnation: str
    boot: str
    participant: str
    counter: types.uint64
    sent_at_us: types.uint64
    draining: bool


@dataclass
@ann.final
class PhysicalHost(IdlStruct, typename="muster.v1.PhysicalHost"):
    host: str
    ann.key("host")
    incarnation: str
    name: str
    cell: types.uint16
    hardware_uuid: str
    boot: str
    agent_version: str
    operating_system: str
    kernel: str
    processor_model: str
    number_of_processors: types.uint32
    total_memory_bytes: types.uint64
    enabled_state: types.uint16
    health_state: types.uint16
    operational_status: types.sequence[types.uint16]
    hypervisor_uri: str
    hypervisor_version: str
    accelerator: str
    hypervisor_remark: str
    draining: bool
    lab: bool
    stream_endpoint: str
    started_at_us: types.uint64


@dataclass
@ann.final
class HostMetrics(IdlStruct, typename="muster.v1.HostMetrics"):
    host: str
    ann.key("host")
    sampled_at_us: types.uint64
    processor_percent: types.float64
    load_average_1m: types.float64
    memory_total_bytes: types.uint64
    memory_available_bytes: types.uint64
    network_received_bytes: types.uint64
    network_sent_bytes: types.uint64
    disk_read_bytes: types.uint64
    disk_written_bytes: types.uint64
    running_vms: types.uint32


@dataclass
@ann.final
class StoreImage(IdlStruct, typename="muster.v1.StoreImage"):
    digest: str
    name: str
    logical_bytes: types.uint64
    volumes: types.uint32


@dataclass
@ann.final
class StoreState(IdlStruct, typename="muster.v1.StoreState"):
    host: str
    ann.key("host")
    sampled_at_us: types.uint64
    budget_bytes: types.uint64
    resident_bytes: types.uint64
    metadata_bytes: types.uint64
    logical_bytes: types.uint64
    provisioned_bytes: types.uint64
    unique_blocks: types.uint64
    dedup_ratio: types.float64
    guest_file_reads: types.uint64
    page_kind: str
    images: types.sequence[StoreImage]
    volumes: types.uint32


@dataclass
@ann.final
class StoreNode(IdlStruct, typename="muster.v1.StoreNode"):
    node: types.uint32
    memory_bytes: types.uint64
    store_bytes: types.uint64


@dataclass
@ann.final
class StoreHealth(IdlStruct, typename="muster.v1.StoreHealth"):
    host: str
    ann.key("host")
    sampled_at_us: types.uint64
    scrubbing: bool
    blocks_checked: types.uint64
    blocks_damaged: types.uint64
    blocks_repaired: types.uint64
    blocks_unreadable: types.uint64
    passes: types.uint64
    last_pass_at_us: types.uint64
    nodes: types.sequence[StoreNode]


@dataclass
@ann.final
class VirtualDisk(IdlStruct, typename="muster.v1.VirtualDisk"):
    role: str
    volume: str
    generation: types.uint64
    size_bytes: types.uint64
    image: str
    condition: str


@dataclass
@ann.final
class VirtualSystem(IdlStruct, typename="muster.v1.VirtualSystem"):
    host: str
    ann.key("host")
    vm: str
    ann.key("vm")
    incarnation: str
    name: str
    enabled_state: types.uint16
    requested_state: types.uint16
    health_state: types.uint16
    operational_status: types.sequence[types.uint16]
    guest_up: bool
    virtual_processors: types.uint32
    memory_bytes: types.uint64
    disks: types.sequence[VirtualDisk]
    template: str
    remark: str
    changed_at_us: types.uint64
    sampled_at_us: types.uint64


@dataclass
@ann.final
class VmMetrics(IdlStruct, typename="muster.v1.VmMetrics"):
    host: str
    ann.key("host")
    vm: str
    ann.key("vm")
    sampled_at_us: types.uint64
    processor_percent: types.float64
    processor_time_us: types.uint64
    memory_resident_bytes: types.uint64
    memory_used_bytes: types.uint64
    disk_reads: types.uint64
    disk_writes: types.uint64
    disk_read_bytes: types.uint64
    disk_written_bytes: types.uint64
    network_received_bytes: types.uint64
    network_sent_bytes: types.uint64


@dataclass
@ann.final
class VolumeMetrics(IdlStruct, typename="muster.v1.VolumeMetrics"):
    host: str
    ann.key("host")
    volume: str
    ann.key("volume")
    generation: types.uint64
    vm: str
    target: str
    transport: str
    sampled_at_us: types.uint64
    sessions: types.uint32
    reads: types.uint64
    writes: types.uint64
    flushes: types.uint64
    discards: types.uint64
    errors: types.uint64
    read_bytes: types.uint64
    written_bytes: types.uint64
    latency_window_us: types.uint64
    read_p50_us: types.float64
    read_p99_us: types.float64
    read_max_us: types.float64
    write_p50_us: types.float64
    write_p99_us: types.float64
    write_max_us: types.float64
    in_flight: types.uint32
    waiting_for_space: types.uint32
    throttled_requests: types.uint64
    throttled_us: types.uint64
    limit_requests: types.uint64
    limit_bytes: types.uint64


@dataclass
@ann.final
class Argument(IdlStruct, typename="muster.v1.Argument"):
    name: str
    value: str


@dataclass
@ann.final
class Member(IdlStruct, typename="muster.v1.Member"):
    host: str
    incarnation: str
    vm: str
    name: str


@dataclass
@ann.final
class GroupCommand(IdlStruct, typename="muster.v1.GroupCommand"):
    id: str
    ann.key("id")
    controller: str
    issuer: str
    controller_epoch: types.uint64
    group_epoch: types.uint64
    issued_at_us: types.uint64
    not_after_us: types.uint64
    target_kind: TargetKind
    target: str
    members: types.sequence[Member]
    verb: Verb
    arguments: types.sequence[Argument]
    wave: types.uint32
    plan_digest: str
    retry_of: str
    key_id: str
    signature: types.sequence[types.uint8]
    extension: types.sequence[types.uint8]


@dataclass
@ann.final
class Verdict(IdlStruct, typename="muster.v1.Verdict"):
    command: str
    ann.key("command")
    host: str
    ann.key("host")
    vm: str
    ann.key("vm")
    incarnation: str
    outcome: Outcome
    code: str
    message: str
    enabled_state: types.uint16
    guest_up: bool
    result: str
    received_at_us: types.uint64
    started_at_us: types.uint64
    ended_at_us: types.uint64


@dataclass
@ann.final
class Progress(IdlStruct, typename="muster.v1.Progress"):
    command: str
    ann.key("command")
    host: str
    ann.key("host")
    vm: str
    ann.key("vm")
    phase: str
    done: types.uint64
    total: types.uint64
    sent_at_us: types.uint64


@dataclass
@ann.final
class Event(IdlStruct, typename="muster.v1.Event"):
    host: str
    ann.key("host")
    vm: str
    incarnation: str
    counter: types.uint64
    occurred_at_us: types.uint64
    severity: Severity
    kind: str
    message: str
    from_state: types.uint16
    to_state: types.uint16
    command: str


@dataclass
@ann.final
class ControllerState(IdlStruct, typename="muster.v1.ControllerState"):
    controller: str
    ann.key("controller")
    incarnation: str
    name: str
    epoch: types.uint64
    group_epoch: types.uint64
    stream_endpoint: str
    lab: bool
    sent_at_us: types.uint64
    awaiting: types.sequence[str]


@dataclass
@ann.final
class Group(IdlStruct, typename="muster.v1.Group"):
    path: str
    hosts: types.sequence[str]
    vms: types.sequence[str]
    groups: types.sequence[str]


@dataclass
@ann.final
class GroupSet(IdlStruct, typename="muster.v1.GroupSet"):
    controller: str
    ann.key("controller")
    epoch: types.uint64
    groups: types.sequence[Group]


# Topic name -> type.
TOPICS = {
    "muster_v1_heartbeat": Heartbeat,
    "muster_v1_physical_host": PhysicalHost,
    "muster_v1_host_metrics": HostMetrics,
    "muster_v1_store_state": StoreState,
    "muster_v1_store_health": StoreHealth,
    "muster_v1_virtual_system": VirtualSystem,
    "muster_v1_vm_metrics": VmMetrics,
    "muster_v1_volume_metrics": VolumeMetrics,
    "muster_v1_group_command": GroupCommand,
    "muster_v1_verdict": Verdict,
    "muster_v1_progress": Progress,
    "muster_v1_event": Event,
    "muster_v1_controller_state": ControllerState,
    "muster_v1_group_set": GroupSet,
}
