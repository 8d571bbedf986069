#!/usr/bin/env python3
"""Prints what the hosts of a cell say of themselves and of their VMs, with another vendor's DDS (Cyclone).

needs: pip install cyclonedds
usage: subscribe.py [--cell N] [--interface ADDRESS] [--peer ADDRESS]
"""

import muster
import muster_v1 as m
from cyclonedds.core import InstanceState, ReadCondition, SampleState, ViewState, WaitSet
from cyclonedds.util import duration

GIB = 1 << 30


def physical_host(s):
    return (
        f"host     {s.host} {s.name}: {s.number_of_processors} processors, {s.total_memory_bytes / GIB:.1f} GiB, "
        f"{s.accelerator}, {s.operating_system}" + (" (lab mode)" if s.lab else "")
    )


def host_metrics(s):
    used = s.memory_total_bytes - s.memory_available_bytes
    return f"load     {s.host} cpu {s.processor_percent:.0f} %, memory {used / GIB:.1f} GiB, {s.running_vms} VMs running"


def store_state(s):
    return (
        f"store    {s.host} {s.resident_bytes / GIB:.2f} of {s.budget_bytes / GIB:.1f} GiB resident, "
        f"ratio {s.dedup_ratio:.2f}, {len(s.images)} images, {s.volumes} volumes, {s.guest_file_reads} file reads"
    )


def store_health(s):
    nodes = ", ".join(f"{n.store_bytes / GIB:.2f} GiB on node {n.node}" for n in s.nodes)
    return (
        f"health   {s.host} {s.blocks_checked} blocks checked, {s.blocks_damaged} damaged, {s.blocks_repaired} repaired"
        + (f", {nodes}" if nodes else "")
    )


def virtual_system(s):
    state = muster.ENABLED_STATE.get(s.enabled_state, s.enabled_state)
    return f"vm       {s.vm} {s.name}: {state}" + (", guest up" if s.guest_up else "") + (f" ({s.remark})" if s.remark else "")


def vm_metrics(s):
    return f"vm load  {s.vm} cpu {s.processor_percent:.0f} %, {s.disk_reads} reads, {s.disk_writes} writes"


def volume_metrics(s):
    return (
        f"disk     {s.vm} {s.target} ({s.transport}) {s.reads} reads, p99 {s.read_p99_us:.0f} us; "
        f"{s.writes} writes, p99 {s.write_p99_us:.0f} us"
    )


def event(s):
    return f"event    {s.host} {s.kind}: {s.message}"


PRINTERS = {
    m.PhysicalHost: physical_host,
    m.HostMetrics: host_metrics,
    m.StoreState: store_state,
    m.StoreHealth: store_health,
    m.VirtualSystem: virtual_system,
    m.VmMetrics: vm_metrics,
    m.VolumeMetrics: volume_metrics,
    m.Event: event,
}


def main():
    options = muster.arguments(__doc__.splitlines()[0]).parse_args()
    cell = muster.Cell(options)
    anything = SampleState.Any | ViewState.Any | InstanceState.Any
    waitset, readers = WaitSet(cell.participant), []
    for kind, show in PRINTERS.items():
        reader = cell.reader(kind)
        condition = ReadCondition(reader, anything)
        waitset.attach(condition)
        readers.append((kind, reader, condition, show))
    print(f"reading {', '.join(muster.TOPIC_OF[kind] for kind in PRINTERS)} in cell {options.cell}", flush=True)
    while True:
        waitset.wait(duration(seconds=1))
        for kind, reader, condition, show in readers:
            for sample in reader.take(N=100, condition=condition):
                if sample.sample_info.valid_data:
                    print(show(sample), flush=True)
                elif sample.sample_info.instance_state == InstanceState.NotAliveDisposed:
                    print(f"gone     an instance of {muster.TOPIC_OF[kind]}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        pass
