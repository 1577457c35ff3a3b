"""python -m tests.fuzz --minutes N --seed S"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from pathlib import Path

import torch

from tests.fuzz import campaign

PER_SEED = 200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Checks random quantized graphs.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="the first; each next batch of graphs takes the next seed")
    parser.add_argument("--graphs", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--compile-every", type=int, metavar="K",
                        help=f"of every K groups of {campaign.TOGETHER} graphs generate and compile the C++ of one (0: none, "
                             "default: 25)")  # fmt: skip
    parser.add_argument("--mode", choices=["max-autotune"],
                        help="compile in this mode, every graph unless --compile-every is given; kernels of ours are "
                             "taken wherever there are any, slower or not")  # fmt: skip
    parser.add_argument("--having", metavar="PATTERN", default="",
                        help="only graphs with a kind of operator that matches this regular expression: 'lstm|gru|rnn'")  # fmt: skip
    parser.add_argument("--record", metavar="FILE", help="write the figures there as JSON")
    arguments = parser.parse_args()
    compile_every = arguments.compile_every
    if compile_every is None:
        compile_every = 1 if arguments.mode else 25
    logging.getLogger("inductor_x86q").setLevel(logging.ERROR)  # misses are checked here
    torch.set_num_threads(1)
    began = time.monotonic()
    end = began + 60 * arguments.minutes
    tally, seed, shown = campaign.Tally(), arguments.seed, 0
    while time.monotonic() < end and tally.graphs < arguments.graphs:
        count = min(PER_SEED, arguments.graphs - tally.graphs)
        for _ in campaign.run(seed, count, tally, compile_every=compile_every, mode=arguments.mode,
                              having=arguments.having):  # fmt: skip
            for message, _graph in tally.failures[shown:]:
                print(f"--- seed {seed}\n{message}\n", flush=True)
            shown = len(tally.failures)
            if time.monotonic() > end:
                break
        print(f"seed {seed} done: {tally.graphs} graphs, {shown} failures", flush=True)
        seed += 1
    minutes = (time.monotonic() - began) / 60
    print(f"seeds {arguments.seed} to {seed - 1}, {minutes:.1f} minutes, {tally.graphs / minutes:.0f} graphs a minute")
    print(tally)
    if arguments.record:
        record = {"seeds": [arguments.seed, seed - 1], "minutes": round(minutes, 1), **tally.record()}
        Path(arguments.record).write_text(json.dumps(record, indent=1))
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
