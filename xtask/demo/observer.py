"""An independent reader of the demo's topics: Eclipse Cyclone DDS, no code of ours but the generated classes.

usage: observer.py DOMAIN ADDRESS

Prints a line for each change of a host, its store or a VM, at most one a second each, and one for every sample on the
command topic. `cargo xtask demo` runs it on a machine of its own and counts the command lines.
"""

import os
import pathlib
import sys
import time

domain, address = int(sys.argv[1]), sys.argv[2]
# one interface; unicast ports of the domain's range rather than random ones, as the firewall lets only those pass
os.environ["CYCLONEDDS_URI"] = f"""<CycloneDDS><Domain><General><Interfaces><NetworkInterface address="{address}"/>
</Interfaces></General><Discovery><ParticipantIndex>auto</ParticipantIndex></Discovery></Domain></CycloneDDS>"""
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "python"))

from cyclonedds.core import Policy, Qos
from cyclonedds.domain import DomainParticipant
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

import muster_v1 as v1

TELEMETRY = Qos(Policy.Reliability.BestEffort, Policy.Durability.Volatile, Policy.History.KeepLast(1))
STATE = Qos(Policy.Reliability.Reliable(duration(seconds=1)), Policy.Durability.TransientLocal, Policy.History.KeepLast(256),
            Policy.ResourceLimits(4096, -1, -1))
COMMAND = Qos(Policy.Reliability.Reliable(duration(seconds=1)), Policy.Durability.Volatile, Policy.History.KeepAll,
              Policy.ResourceLimits(8192, -1, -1))
STATES = {2: "running", 3: "off", 4: "shutting down", 6: "saved", 9: "paused", 10: "starting"}

participant = DomainParticipant(domain)


def reader(name, kind, qos):
    return DataReader(participant, Topic(participant, f"muster_v1_{name}", kind, qos=qos), qos=qos)


hosts = reader("physical_host", v1.PhysicalHost, STATE)
metrics = reader("host_metrics", v1.HostMetrics, TELEMETRY)
stores = reader("store_state", v1.StoreState, STATE)
systems = reader("virtual_system", v1.VirtualSystem, STATE)
commands = reader("group_command", v1.GroupCommand, COMMAND)


def say(text):
    print(text, flush=True)


def take(source):
    """Samples with data; disposals and departures carry none."""
    return [sample for sample in source.take(1000) if getattr(sample, "sample_info", None) is None or sample.sample_info.valid_data]


def mib(count):
    return f"{count / 1048576:.0f} MiB"


names, load, last_line, last_state = {}, {}, {}, {}
say("reading")
while True:
    for sample in take(hosts):
        names[sample.host] = sample.name
    for sample in take(metrics):
        load[sample.host] = sample
    now = time.monotonic()
    for sample in take(stores):
        host = names.get(sample.host, sample.host[:8])
        if now - last_line.get(host, 0) < 1:
            continue
        last_line[host] = now
        cpu = f"{load[sample.host].processor_percent:3.0f} %" if sample.host in load else "    ?"
        say(f"host {host}  cpu {cpu}  store {mib(sample.resident_bytes)} resident of {mib(sample.logical_bytes)} logical,"
            f" ratio {sample.dedup_ratio:.2f}, {sample.volumes} volumes")
    for sample in take(systems):
        state = STATES.get(sample.enabled_state, str(sample.enabled_state))
        seen = (state, sample.guest_up)
        if last_state.get(sample.vm) != seen:
            last_state[sample.vm] = seen
            host = names.get(sample.host, sample.host[:8])
            say(f"vm {sample.name}  on {host}  {state}{', guest up' if sample.guest_up else ''}")
    for sample in take(commands):
        verb = getattr(sample.verb, "name", str(sample.verb))
        verb = verb.removeprefix("VERB_").replace("_", "-").lower()
        say(f"command {sample.id}  {verb} {sample.target or '(members)'} {len(sample.members)} members")
    time.sleep(0.05)
