#!/usr/bin/env python3
"""Commands VMs with another vendor's DDS (Cyclone): one published sample, a verdict from each VM. Lab mode only.

needs: pip install cyclonedds
usage: command.py [--cell N] [--interface ADDRESS] [--peer ADDRESS] [--seconds N] VERB VM-NAME...
exit:  0 all done, 1 some members failed, 2 could not run
"""

import json
import os
import sys
import time
import uuid

import muster
import muster_v1 as m

DISCOVERY_SECONDS = 15


def uuid7():
    """RFC 9562, section 5.7: sorts by time of issue."""
    bits = (time.time_ns() // 1_000_000) << 80 | int.from_bytes(os.urandom(10), "big")
    bits = bits & ~(0xF << 76) | 0x7 << 76
    bits = bits & ~(0x3 << 62) | 0x2 << 62
    return str(uuid.UUID(int=bits))


def poll(seconds, step):
    """Calls `step` until it yields something; None when it does not in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = step()
        if found:
            return found
        time.sleep(0.05)
    return None


def main():
    parser = muster.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="after this the command must not be begun (default: 60)")
    parser.add_argument("--argument", action="append", default=[], metavar="NAME=VALUE", help="repeatable")
    parser.add_argument("verb", choices=[v.name.removeprefix("VERB_").lower().replace("_", "-") for v in m.Verb])
    parser.add_argument("vm", nargs="+", help="name of a VM")
    options = parser.parse_args()
    cell = muster.Cell(options)
    commands, verdicts = cell.writer(m.GroupCommand), cell.reader(m.Verdict)
    systems, hearts = cell.reader(m.VirtualSystem), cell.reader(m.Heartbeat)

    # who is meant: the VMs as their hosts publish them
    known, participants = {}, {}

    def find():
        for s in systems.take(N=1000):
            if s.sample_info.valid_data:
                known[s.name] = s
        for h in hearts.take(N=1000):
            if h.sample_info.valid_data:
                participants[h.host] = h.participant
        if not all(name in known for name in options.vm):
            return False
        # volatile: an agent whose reader is not matched yet would not hear the command
        listening = {
            commands.get_matched_subscription_data(handle).participant_key.hex[:24]
            for handle in commands.get_matched_subscriptions()
        }
        return all(participants.get(known[name].host, "")[:24] in listening for name in options.vm)

    if not poll(DISCOVERY_SECONDS, find):
        missing = [name for name in options.vm if name not in known]
        print(f"not found in cell {options.cell}: {', '.join(missing) or 'an agent that listens'}", file=sys.stderr)
        return 2

    now_us = time.time_ns() // 1000
    members = [m.Member(host=known[n].host, incarnation="", vm=known[n].vm, name=n) for n in options.vm]
    command = m.GroupCommand(
        id=uuid7(),
        controller=str(uuid.uuid4()),
        issuer="command.py",
        controller_epoch=1,
        group_epoch=0,
        issued_at_us=now_us,
        not_after_us=now_us + options.seconds * 1_000_000,
        target_kind=m.TargetKind.TARGET_KIND_VM,
        target="",
        members=members,
        verb=m.Verb[f"VERB_{options.verb.replace('-', '_').upper()}"],
        arguments=[m.Argument(*argument.split("=", 1)) for argument in options.argument],
        wave=0,
        plan_digest="",
        retry_of="",
        key_id="",
        signature=[],
        extension=[],
    )
    commands.write(command)
    print(f"published {command.id}: {options.verb} to {len(members)} VMs", flush=True)

    waiting, failed = {(member.host, member.vm): member.name for member in members}, 0

    def collect():
        nonlocal failed
        for v in verdicts.take(N=1000):
            name = v.command == command.id and waiting.pop((v.host, v.vm), None)
            if not name:
                continue
            outcome = v.outcome.name.removeprefix("OUTCOME_").lower()
            failed += outcome not in ("done", "already")
            state = muster.ENABLED_STATE.get(v.enabled_state, v.enabled_state)
            seconds = (v.ended_at_us - v.received_at_us) / 1e6
            result = f" {json.loads(v.result)}" if v.result else ""
            print(f"{name}: {outcome} after {seconds:.1f} s, {state}, {v.code}{': ' + v.message if v.message else ''}{result}", flush=True)
        return not waiting

    poll(options.seconds + 5, collect)
    for name in waiting.values():
        print(f"{name}: unknown, no verdict in {options.seconds + 5} s")
    return 1 if failed or waiting else 0


if __name__ == "__main__":
    sys.exit(main())
