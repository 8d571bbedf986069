#!/usr/bin/env python3
"""Counts the samples on the command topic with another vendor's DDS (Cyclone), one line a sample and a total.

needs: pip install cyclonedds
usage: count_commands.py [--cell N] [--interface ADDRESS] [--peer ADDRESS] [--seconds N]
Ends after --seconds, or by SIGINT or SIGTERM; the last line is the total.
"""

import signal
import threading
import time

import muster
import muster_v1 as m


def main():
    parser = muster.arguments(__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="how long to count (default: until a signal)")
    options = parser.parse_args()
    cell = muster.Cell(options)
    reader = cell.reader(m.GroupCommand)
    ended, count = threading.Event(), 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: ended.set())
    deadline = time.monotonic() + options.seconds if options.seconds else float("inf")
    print(f"counting {muster.TOPIC_OF[m.GroupCommand]} in cell {options.cell}", flush=True)
    while not ended.wait(0.05) and time.monotonic() < deadline:
        for sample in reader.take(N=1000):
            if sample.sample_info.valid_data:
                count += 1
                verb = sample.verb.name.removeprefix("VERB_").lower().replace("_", "-")
                print(f"{count} {sample.id} {verb} {sample.target or '-'} {len(sample.members)} members", flush=True)
    print(f"total {count}", flush=True)


if __name__ == "__main__":
    main()
