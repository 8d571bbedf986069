"""The other vendor's half of tests/tests/cyclone.rs.

Reads the samples it is told to expect from every topic with Cyclone DDS, compares them value by value, and publishes
what it read back on the same topic. Talks to the test in lines: `got TOPIC`, `wrong TOPIC …`, `disposed TOPIC KEY` on
standard output; a line `dispose` on standard input makes it dispose what it published; end of input ends it.

usage: echo.py DOMAIN EXPECTED.json
"""

import json
import pathlib
import re
import sys
import threading

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "python"))

import muster_v1  # noqa: E402
from cyclonedds.core import InstanceState, Policy, Qos, ReadCondition, SampleState, ViewState  # noqa: E402
from cyclonedds.domain import DomainParticipant  # noqa: E402
from cyclonedds.idl import IdlEnum, types  # noqa: E402
from cyclonedds.pub import DataWriter  # noqa: E402
from cyclonedds.sub import DataReader  # noqa: E402
from cyclonedds.topic import Topic  # noqa: E402
from cyclonedds.util import duration  # noqa: E402


def snake(name):
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).upper()


def build(kind, value):
    """A value of the generated dataclasses from the JSON of its Rust mirror."""
    if isinstance(kind, types.sequence):
        return [build(kind.subtype, element) for element in value]
    if isinstance(kind, type) and issubclass(kind, IdlEnum):
        return kind[f"{snake(kind.__name__)}_{snake(value)}"]
    if hasattr(kind, "__dataclass_fields__"):
        fields = kind.__dataclass_fields__.values()
        assert [f.name for f in fields] == list(value), f"fields of {kind.__name__}: {list(value)}"
        return kind(**{f.name: build(f.type, value[f.name]) for f in fields})
    return value


def plain(value):
    """Octet sequences may come as bytes or as lists: compare their contents."""
    if isinstance(value, (list, tuple, bytes, bytearray)):
        return [plain(element) for element in value]
    if hasattr(value, "__dataclass_fields__"):
        return {name: plain(getattr(value, name)) for name in value.__dataclass_fields__}
    return value


def qos(profile):
    reliable = profile["reliability"] == "Reliable"
    return Qos(
        Policy.Reliability.Reliable(duration(seconds=1)) if reliable else Policy.Reliability.BestEffort,
        Policy.Durability.TransientLocal if profile["durability"] == "TransientLocal" else Policy.Durability.Volatile,
        Policy.History.KeepLast(profile["depth"]) if profile["depth"] else Policy.History.KeepAll,
    )


def main():
    domain, expected = int(sys.argv[1]), json.load(open(sys.argv[2], encoding="utf-8"))
    participant = DomainParticipant(domain)
    ends = {}
    for row in expected:
        kind = muster_v1.TOPICS[row["topic"]]
        topic = Topic(participant, row["topic"], kind, qos=qos(row["qos"]))
        ends[row["topic"]] = (
            DataReader(participant, topic, qos=qos(row["qos"])),
            DataWriter(participant, topic, qos=qos(row["qos"])),
            build(kind, row["sample"]),
        )
    commands = []
    ended = threading.Event()

    def read_input():
        for line in sys.stdin:
            commands.append(line.strip())
        ended.set()

    threading.Thread(target=read_input, daemon=True).start()
    echoed, told = {}, set()
    anything = SampleState.Any | ViewState.Any | InstanceState.Any
    print("ready", flush=True)
    while not ended.wait(0.05):
        for name, (reader, writer, want) in ends.items():
            for sample in reader.take(N=100, condition=ReadCondition(reader, anything)):
                info = sample.sample_info
                if info.instance_state == InstanceState.NotAliveDisposed:
                    if (name, "disposed") not in told:
                        told.add((name, "disposed"))
                        print(f"disposed {name}", flush=True)
                    continue
                if not info.valid_data or name in echoed:
                    continue
                if plain(sample) == plain(want):
                    echoed[name] = sample
                    print(f"got {name}", flush=True)
                else:
                    print(f"wrong {name} {plain(sample)} instead of {plain(want)}", flush=True)
            if name in echoed and "dispose" not in commands:
                # again and again: best effort may lose it, and volatile readers may match late
                writer.write(echoed[name])
        if "dispose" in commands and "dispose" not in told:
            told.add("dispose")
            for name, sample in echoed.items():
                ends[name][1].dispose(sample)


main()
