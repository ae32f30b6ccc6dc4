"""Optimizers over ranks: sharded state against DDP's, and a collaboration against lock-step.

::

    mpirun -n 2 python benchmarks/optimizers.py --part sharded
    mpirun -n 4 python benchmarks/optimizers.py --part collaborative

See `optimizers_sharded.py` and `optimizers_collaborative.py` for what is timed. DASO, which is about the link
between hosts, has a command of its own: `optimizers_daso.py`.
"""

from __future__ import annotations

import argparse

import hpcpar
import optimizers_collaborative
import optimizers_sharded
from common import add_common_options, describe, parse_arguments, positive_int, save

PARTS = {"sharded": optimizers_sharded, "collaborative": optimizers_collaborative}


def main() -> None:
    """Run the benchmark. **Collective.**"""
    comm = hpcpar.comm.world()
    options = parse_arguments(make_parser(), comm)
    environment = describe(comm)
    if options.quick:
        options.repetitions, options.steps, options.warmup = min(options.repetitions, 2), 2, 2
        options.updates, options.sleep_ms = 2, 1
    if options.warmup is None:
        options.warmup = 5 if environment.threads == 1 else 20
    if comm.rank == 0:
        print(environment.text, flush=True)
    for part in PARTS if options.part == "all" else [options.part]:
        results = PARTS[part].run(comm, options)
        if comm.rank == 0:
            PARTS[part].show(results, environment)
            figure = PARTS[part].draw(results, environment)
            save(options.output, f"optimizers_{part}", environment, {"results": results}, figure)


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_common_options(parser, repetitions=15)
    parser.add_argument(
        "--part", choices=[*PARTS, "all"], default="all", help="what to measure (default all)"
    )
    parser.add_argument(
        "--steps", type=positive_int, default=4, metavar="N", help="sharded: of each run (default 4)"
    )
    parser.add_argument(
        "--warmup",
        type=positive_int,
        metavar="N",
        help="sharded: steps of each variant before\n(default 5; 20 with several threads)",
    )
    parser.add_argument(
        "--updates", type=positive_int, default=4, metavar="N", help="collaborative: of each run (default 4)"
    )
    parser.add_argument(
        "--sleep-ms",
        type=positive_int,
        default=20,
        metavar="MS",
        help="collaborative: of a microbatch on the fast ranks (default 20)",
    )
    return parser


if __name__ == "__main__":
    main()
