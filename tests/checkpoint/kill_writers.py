"""Kill ranks that save, at random moments, and look at what they leave.

::

    python -m tests.checkpoint.kill_writers --times 50 --ranks 2

Each time ``mpirun`` starts ranks that save again and again to the same folder, at once or in the background
by turns. One of them, or all, get SIGKILL. The folder must then hold a checkpoint that is whole, and at least
as new as the last save that was said to be complete.
"""

from __future__ import annotations

import argparse
import random
import re
import signal
import tempfile
import time
from pathlib import Path

import torch

from hpcpar.checkpoint import PerRank, load, verify
from tests.launching import Launched

__all__ = ["kill_writers"]

_WRITER = """
import itertools, sys
import torch
import hpcpar
from hpcpar.checkpoint import PerRank, save

comm = hpcpar.comm.world()
for n in itertools.count():
    state = {"n": n, "w": torch.full((700_000,), float(n)), "mine": PerRank([n, comm.rank])}
    saving = save(sys.argv[1], state, comm, asynchronous=bool(n % 2))
    saving.wait()
    if comm.rank == 0:
        print(f"saved {n}.", flush=True)
"""


def kill_writers(folder: Path, ranks: int, draw: random.Random) -> tuple[int, int]:
    """Start writers and kill them once. The last save they had reported, and what is in the folder."""
    with Launched(ranks, _WRITER, str(folder)) as job:
        job.wait_for_output(r"saved 1\.")
        time.sleep(draw.uniform(0.0, 0.3))
        victims = [draw.randrange(ranks)] if draw.random() < 0.7 else list(range(ranks))
        for victim in victims:
            job.signal_rank(victim, signal.SIGKILL)
        job.wait(timeout_s=20.0)
        reported = int(re.findall(r"saved (\d+)\.", job.stdout)[-1])
    verify(folder)
    state = load(folder, {"n": None, "w": None, "mine": PerRank(None)})
    found = int(state["n"])
    if found < reported or not torch.equal(state["w"], torch.full((700_000,), float(found))):
        raise AssertionError(f"reported {reported}, found {found}")
    if state["mine"].value != [found, 0]:
        raise AssertionError(f"found parts of {found} and {state['mine'].value}")
    return reported, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.times):
            reported, found = kill_writers(Path(folder) / "run", options.ranks, draw)
            print(f"{number + 1:3d}: killed after save {reported}; the checkpoint is whole, of save {found}")


if __name__ == "__main__":
    main()
