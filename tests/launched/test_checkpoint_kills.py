"""Ranks that die while they save leave a whole checkpoint; the next job saves over what they left."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from hpcpar.checkpoint import load
from tests.checkpoint.kill_writers import kill_writers
from tests.launching import launch

_FAILS_AFTER_SAVE = """
import sys, time, torch, hpcpar
from hpcpar.checkpoint import job, save

write = job.write_data_file
def slow(*args):
    time.sleep(0.3)
    return write(*args)
job.write_data_file = slow
comm = hpcpar.comm.world()
save(sys.argv[1], {"x": torch.arange(2_000_000)}, comm, asynchronous=True)
if comm.rank == 1:
    raise ValueError("loss is nan")
comm.Barrier()  # never complete
"""


def test_killed_ranks_leave_a_whole_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(1)
    for _ in range(2):
        kill_writers(tmp_path / "run", 2, draw)
    files = [path.name for path in (tmp_path / "run").iterdir()]
    assert len(files) < 20  # what the first job left is gone


def test_exception_of_a_rank_ends_the_job_after_the_save_under_way(tmp_path: Path) -> None:
    done = launch(2, _FAILS_AFTER_SAVE, str(tmp_path / "run"))
    assert done.returncode != 0 and "loss is nan" in done.stderr
    assert torch.equal(load(tmp_path / "run")["x"], torch.arange(2_000_000))


@pytest.mark.large
@pytest.mark.timeout_s(900)
def test_killed_ranks_leave_a_whole_checkpoint_fifty_times(tmp_path: Path) -> None:
    draw = random.Random(2)
    for _ in range(50):
        kill_writers(tmp_path / "run", 2, draw)
