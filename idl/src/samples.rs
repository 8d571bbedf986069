//! One sample of each topic type with every field away from its zero: what golden bytes and interop tests send.

use crate::v1::*;

fn text(text: &str) -> String {
    text.into()
}

const HOST: &str = "6f1c9d9e-5a0e-4f0e-8c7e-0d7b5b1f0a01";
const VM: &str = "0b6c2a52-61b7-4a39-9d2c-7b1a5f2d9c02";
const COMMAND: &str = "01930a3c-7a10-7c21-8f32-4b5c6d7e8f03";
const RUN: &str = "c2b4a5f6-1d2e-4f3a-9b8c-7d6e5f4a3b04";
const CONTROLLER: &str = "9e8d7c6b-5a49-4837-a625-140302010005";

pub fn heartbeat() -> Heartbeat {
    Heartbeat {
        host: text(HOST),
        incarnation: text(RUN),
        boot: text("5d1a0f52-9f5e-4a9a-b9f5-4a1b2c3d4e06"),
        participant: text("01123f9a0b1c2d3e4f506172000001c1"),
        counter: 0x0102_0304_0506_0708,
        sent_at_us: 1_732_100_000_000_001,
        draining: true,
    }
}

pub fn physical_host() -> PhysicalHost {
    PhysicalHost {
        host: text(HOST),
        incarnation: text(RUN),
        name: text("rechner-süd"),
        cell: 17,
        hardware_uuid: text("4c4c4544-0042-3510-8056-b7c04f503207"),
        boot: text("5d1a0f52-9f5e-4a9a-b9f5-4a1b2c3d4e06"),
        agent_version: text("0.1.0"),
        operating_system: text("Debian GNU/Linux 12 (bookworm)"),
        kernel: text("6.1.0-31-amd64"),
        processor_model: text("Some CPU @ 3.00GHz"),
        number_of_processors: 16,
        total_memory_bytes: 68_719_476_736,
        enabled_state: 2,
        health_state: 5,
        operational_status: vec![2, 4],
        hypervisor_uri: text("qemu:///embed?root=/run/muster"),
        hypervisor_version: text("9.0.0"),
        accelerator: text("tcg"),
        hypervisor_remark: text("no KVM: probe guest did not start"),
        draining: false,
        lab: true,
        stream_endpoint: text("http://10.0.0.2:7800"),
        started_at_us: 1_732_100_000_000_002,
    }
}

pub fn host_metrics() -> HostMetrics {
    HostMetrics {
        host: text(HOST),
        sampled_at_us: 1_732_100_000_000_003,
        processor_percent: 12.5,
        load_average_1m: 0.75,
        memory_total_bytes: 68_719_476_736,
        memory_available_bytes: 34_359_738_368,
        network_received_bytes: 1_234_567_890_123,
        network_sent_bytes: 987_654_321,
        disk_read_bytes: 4096,
        disk_written_bytes: 8192,
        running_vms: 6,
    }
}

pub fn store_state() -> StoreState {
    StoreState {
        host: text(HOST),
        sampled_at_us: 1_732_100_000_000_004,
        budget_bytes: 8 << 30,
        resident_bytes: 1_500_000_256,
        metadata_bytes: 12_345_678,
        logical_bytes: 4_500_000_768,
        provisioned_bytes: 40 << 30,
        unique_blocks: 366_211,
        dedup_ratio: 3.0,
        guest_file_reads: 1,
        page_kind: text("thp"),
        images: vec![
            StoreImage { digest: "ab".repeat(32), name: text("debian"), logical_bytes: 2 << 30, volumes: 6 },
            StoreImage { digest: "0c".repeat(32), name: text("tiny"), logical_bytes: 3, volumes: 1 },
        ],
        volumes: 12,
    }
}

pub fn store_health() -> StoreHealth {
    StoreHealth {
        host: text(HOST),
        sampled_at_us: 1_732_100_000_000_016,
        scrubbing: true,
        blocks_checked: 16_777_216,
        blocks_damaged: 3,
        blocks_repaired: 2,
        blocks_unreadable: 1,
        passes: 4,
        last_pass_at_us: 1_732_100_000_000_010,
        nodes: vec![
            StoreNode { node: 0, memory_bytes: 32 << 30, store_bytes: 3 << 30 },
            StoreNode { node: 1, memory_bytes: 32 << 30, store_bytes: 5 << 30 },
        ],
    }
}

pub fn virtual_system() -> VirtualSystem {
    VirtualSystem {
        host: text(HOST),
        vm: text(VM),
        incarnation: text(RUN),
        name: text("lab1-desk-01"),
        enabled_state: 9,
        requested_state: 2,
        health_state: 5,
        operational_status: vec![15],
        guest_up: true,
        virtual_processors: 2,
        memory_bytes: 536_870_912,
        disks: vec![VirtualDisk {
            role: text("system"),
            volume: text("7a6b5c4d-3e2f-4a1b-8c9d-0e1f2a3b4c07"),
            generation: 3,
            size_bytes: 2 << 30,
            image: "ab".repeat(32),
            condition: text("volatile"),
        }],
        template: text("desktop"),
        remark: text("paused by the operator"),
        changed_at_us: 1_732_100_000_000_005,
        sampled_at_us: 1_732_100_000_000_006,
    }
}

pub fn vm_metrics() -> VmMetrics {
    VmMetrics {
        host: text(HOST),
        vm: text(VM),
        sampled_at_us: 1_732_100_000_000_007,
        processor_percent: 150.25,
        processor_time_us: 9_876_543_210,
        memory_resident_bytes: 400_000_000,
        memory_used_bytes: 300_000_000,
        disk_reads: 1,
        disk_writes: 2,
        disk_read_bytes: 3,
        disk_written_bytes: 4,
        network_received_bytes: 5,
        network_sent_bytes: 6,
    }
}

pub fn volume_metrics() -> VolumeMetrics {
    VolumeMetrics {
        host: text(HOST),
        volume: text("7a6b5c4d-3e2f-4a1b-8c9d-0e1f2a3b4c07"),
        generation: 3,
        vm: text(VM),
        target: text("vda"),
        transport: text("vhost-user"),
        sampled_at_us: 1_732_100_000_000_015,
        sessions: 1,
        reads: 1_000_000,
        writes: 200_000,
        flushes: 30_000,
        discards: 4_000,
        errors: 5,
        read_bytes: 4_096_000_000,
        written_bytes: 819_200_000,
        latency_window_us: 1_000_100,
        read_p50_us: 16.384,
        read_p99_us: 131.072,
        read_max_us: 1048.576,
        write_p50_us: 32.768,
        write_p99_us: 262.144,
        write_max_us: 2097.152,
        in_flight: 32,
        waiting_for_space: 2,
        throttled_requests: 70,
        throttled_us: 8_000_000,
        limit_requests: 10_000,
        limit_bytes: 209_715_200,
    }
}

pub fn verdict() -> Verdict {
    Verdict {
        command: text(COMMAND),
        host: text(HOST),
        vm: text(VM),
        incarnation: text(RUN),
        outcome: Outcome::Indeterminate,
        code: text("indeterminate"),
        message: text("the hypervisor did not answer in 30 s"),
        enabled_state: 10,
        guest_up: true,
        result: text("{\"exit\":0}"),
        received_at_us: 1_732_100_000_000_008,
        started_at_us: 1_732_100_000_000_009,
        ended_at_us: 1_732_100_000_000_010,
    }
}

pub fn progress() -> Progress {
    Progress {
        command: text(COMMAND),
        host: text(HOST),
        vm: text(VM),
        phase: text("writing chunks"),
        done: 7,
        total: 9,
        sent_at_us: 1_732_100_000_000_011,
    }
}

pub fn event() -> Event {
    Event {
        host: text(HOST),
        vm: text(VM),
        incarnation: text(RUN),
        counter: 42,
        occurred_at_us: 1_732_100_000_000_012,
        severity: Severity::Error,
        kind: text("vm-state"),
        message: text("crashed"),
        from_state: 2,
        to_state: 3,
        command: text(COMMAND),
    }
}

pub fn controller_state() -> ControllerState {
    ControllerState {
        controller: text(CONTROLLER),
        incarnation: text(RUN),
        name: text("controller"),
        epoch: 4,
        group_epoch: 12,
        stream_endpoint: text("http://10.0.0.1:7700"),
        lab: true,
        sent_at_us: 1_732_100_000_000_013,
        awaiting: vec![text(COMMAND), text("b")],
    }
}

pub fn group_set() -> GroupSet {
    GroupSet {
        controller: text(CONTROLLER),
        epoch: 12,
        groups: vec![
            Group { path: text("school"), hosts: vec![text(HOST)], vms: vec![], groups: vec![text("school/lab1")] },
            Group { path: text("school/lab1"), hosts: vec![], vms: vec![text(VM)], groups: vec![] },
        ],
    }
}

pub fn group_command() -> GroupCommand {
    GroupCommand {
        id: text(COMMAND),
        controller: text(CONTROLLER),
        issuer: text("operator"),
        controller_epoch: 4,
        group_epoch: 12,
        issued_at_us: 1_732_100_000_000_014,
        not_after_us: 1_732_100_060_000_014,
        target_kind: TargetKind::Vm,
        target: text("school/lab1"),
        members: vec![
            Member { host: text(HOST), incarnation: text(RUN), vm: text(VM), name: text("lab1-desk-01") },
            Member { host: text(HOST), incarnation: text(""), vm: text("x"), name: text("y") },
        ],
        verb: Verb::ResetSession,
        arguments: vec![Argument { name: text("policy"), value: text("power-off") }],
        wave: 1,
        plan_digest: text("p"),
        retry_of: text("r"),
        key_id: text("k"),
        signature: vec![1, 2, 3, 255],
        extension: vec![0, 128],
    }
}
