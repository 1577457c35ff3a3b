"""python -m tests.fuzz --minutes N --seed S"""

from __future__ import annotations

import argparse
import logging
import sys
import time

import torch

from tests.fuzz import campaign

PER_SEED = 200


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Checks random quantized graphs.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0, help="the first; each next batch of graphs takes the next seed")
    parser.add_argument("--graphs", type=int, default=sys.maxsize, help="stop after so many")
    parser.add_argument("--generate", action="store_true", help="generate and compile the C++ too")
    arguments = parser.parse_args()
    logging.getLogger("inductor_x86q").setLevel(logging.ERROR)  # misses are checked here
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * arguments.minutes
    tally, seed, shown = campaign.Tally(), arguments.seed, 0
    while time.monotonic() < end and tally.graphs < arguments.graphs:
        for _ in campaign.run(seed, min(PER_SEED, arguments.graphs), tally, generate=arguments.generate):
            for message, _graph in tally.failures[shown:]:
                print(f"--- seed {seed}\n{message}\n", flush=True)
            shown = len(tally.failures)
            if time.monotonic() > end:
                break
        print(f"seed {seed} done: {tally.graphs} graphs, {shown} failures", flush=True)
        seed += 1
    print(tally)
    return 1 if tally.failures else 0


if __name__ == "__main__":
    sys.exit(main())
