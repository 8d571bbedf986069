"""What the other scripts here share: where to look, and the quality of service of Muster's topics."""

import argparse

import muster_v1
from cyclonedds.core import Policy, Qos
from cyclonedds.domain import Domain, DomainParticipant
from cyclonedds.pub import DataWriter
from cyclonedds.sub import DataReader
from cyclonedds.topic import Topic
from cyclonedds.util import duration

RELIABLE = Policy.Reliability.Reliable(duration(seconds=1))

# Periodic readings: the next one replaces a lost one.
TELEMETRY = Qos(Policy.Reliability.BestEffort, Policy.Durability.Volatile, Policy.History.KeepLast(1))
# State whose last value a late joiner gets.
STATE = Qos(RELIABLE, Policy.Durability.TransientLocal, Policy.History.KeepLast(1))
# Orders and answers: none may be lost on the way, none may reach a reader that came later.
COMMAND = Qos(RELIABLE, Policy.Durability.Volatile, Policy.History.KeepAll)

QOS = {
    muster_v1.Heartbeat: TELEMETRY,
    muster_v1.PhysicalHost: STATE,
    muster_v1.HostMetrics: TELEMETRY,
    muster_v1.StoreState: STATE,
    muster_v1.StoreHealth: STATE,
    muster_v1.VirtualSystem: STATE,
    muster_v1.VmMetrics: TELEMETRY,
    muster_v1.VolumeMetrics: TELEMETRY,
    muster_v1.Verdict: COMMAND,
    muster_v1.Progress: TELEMETRY,
    muster_v1.Event: COMMAND,
    muster_v1.ControllerState: STATE,
    muster_v1.GroupSet: STATE,
    muster_v1.GroupCommand: COMMAND,
}
TOPIC_OF = {kind: name for name, kind in muster_v1.TOPICS.items()}

# CIM_EnabledLogicalElement.EnabledState
ENABLED_STATE = {
    2: "enabled",
    3: "disabled",
    4: "shutting-down",
    6: "enabled-but-offline",
    9: "quiesce",
    10: "starting",
}


def arguments(description):
    """The options every script has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--cell", type=int, default=0, help="the cell: the DDS domain id (default: 0)")
    parser.add_argument("--interface", help="address of the network interface to use (default: Cyclone chooses)")
    parser.add_argument("--peer", action="append", default=[], help="address to look for without multicast; repeatable")
    return parser


class Cell:
    """A place in a cell."""

    def __init__(self, options):
        interface = f'<Interfaces><NetworkInterface address="{options.interface}"/></Interfaces>' if options.interface else ""
        peers, multicast = list(options.peer), ""
        if options.interface and options.interface.startswith("127."):
            # the loopback interface has no multicast
            peers.append(options.interface)
        discovery = ""
        if peers:
            multicast = "<AllowMulticast>false</AllowMulticast>"
            listed = "".join(f'<Peer Address="{peer}"/>' for peer in peers)
            discovery = (
                "<Discovery><ParticipantIndex>auto</ParticipantIndex><MaxAutoParticipantIndex>20</MaxAutoParticipantIndex>"
                f"<Peers>{listed}</Peers></Discovery>"
            )
        # kept: the domain ends with the object
        self._domain = Domain(
            options.cell,
            f'<CycloneDDS><Domain Id="any"><General>{interface}{multicast}</General>{discovery}</Domain></CycloneDDS>',
        )
        self.participant = DomainParticipant(options.cell)

    def _topic(self, kind):
        return Topic(self.participant, TOPIC_OF[kind], kind, qos=QOS[kind])

    def reader(self, kind):
        return DataReader(self.participant, self._topic(kind), qos=QOS[kind])

    def writer(self, kind):
        return DataWriter(self.participant, self._topic(kind), qos=QOS[kind])
