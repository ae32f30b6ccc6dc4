"""Ranks with two devices of torch-xla each: the example as a user runs it, and what goes wrong in a job."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.launching import Launched, LaunchResult, check_ended_badly, launch

pytestmark = pytest.mark.xla

RANKS = 2
SOON_S = 60.0  # far above what any of these takes, far below the default deadline of ten minutes
# Sums of a few thousand float32 in another order, through a dozen steps of Adam.
LOSS_TOLERANCE = 1e-4

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "train_text.py"
TEXT = [
    "--layers",
    "2",
    "--width",
    "16",
    "--heads",
    "2",
    "--context",
    "16",
    "--limit",
    "20000",
    "--steps",
    "12",
]
TEXT += ["--batch-size", "8", "--warmup", "2", "--eval-every", "4", "--eval-windows", "9"]

PREPARE = """
import os, sys, time
import torch, hpcpar
from torch import nn
from hpcpar.errors import RankFailedError
comm = hpcpar.comm.world()
torch.manual_seed(0)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 1)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        happen(self.calls)
        return self.linear(x).square().mean()


def happen(call):
    pass


def samples():
    generator = torch.Generator().manual_seed(comm.rank)
    while True:
        yield torch.randn(4, generator=generator)


def make(dataset, batch_size=3):
    return hpcpar.xla.TPUManager(Model(), dataset, batch_size_per_device=batch_size, comm=comm)


def train(manager):
    for number, (loss, count) in enumerate(manager.epoch()):
        if number == 2:
            print('ready', flush=True)
"""


def run(body: str, *, timeout_s: str = "600") -> LaunchResult:
    return launch(RANKS, PREPARE + body, env={"HPCPAR_TIMEOUT_S": timeout_s}, timeout_s=SOON_S)


# ------------------------------------------------------------------------------------------ the example


def train_text(ranks: int, output: Path, *arguments: str) -> LaunchResult:
    result = launch(ranks, EXAMPLE, *TEXT, "--output", str(output), *arguments, timeout_s=SOON_S)
    assert not result.timed_out and result.returncode == 0, result.stderr
    return result


def losses(output: Path) -> list[float]:
    rows: list[dict[str, Any]] = json.loads((output / "history.json").read_text())["evaluations"]
    return [row[name] for row in rows for name in ("train_loss", "validation_loss")]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without torch-xla."""
    output = tmp_path_factory.mktemp("plain")
    train_text(1, output, "--no-plot")
    return output


def test_text_is_learnt_as_in_the_plain_run(plain: Path, tmp_path: Path) -> None:
    result = train_text(RANKS, tmp_path, "--xla", "--compare", str(plain / "history.json"))
    assert losses(tmp_path) == pytest.approx(losses(plain), rel=LOSS_TOLERANCE)
    assert f"compared with {plain.name}: losses differ by at most" in result.stdout
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert f"rank 0 of {RANKS} INFO" in result.stderr  # torch-xla has not taken our records
    assert "WARNING" not in result.stderr and "Traceback" not in result.stderr


def test_text_goes_on_with_another_number_of_ranks_and_passes(plain: Path, tmp_path: Path) -> None:
    saved = tmp_path / "run"
    train_text(RANKS, tmp_path / "first", "--xla", "--save", str(saved), "--no-plot")
    arguments = ["--xla", "--accumulate", "2", "--resume", str(saved / "step-4"), "--no-plot"]
    train_text(1, tmp_path / "rest", *arguments)
    assert losses(tmp_path / "rest") == pytest.approx(losses(plain)[2:], rel=LOSS_TOLERANCE)


def test_batch_that_cannot_be_shared_ends_all_ranks_with_one_message() -> None:
    result = launch(RANKS, EXAMPLE, *TEXT, "--xla", "--batch-size", "6", timeout_s=SOON_S)
    assert result.returncode == 2 and not result.timed_out, result.stderr
    assert result.stderr.count("--batch-size 6 must be a multiple of 4") == 1
    assert "Traceback" not in result.stderr


# ------------------------------------------------------------------------------------ what a user does


def test_dataset_that_ends_in_a_step_is_used_up_to_its_last_sample() -> None:
    result = run(
        """
length = 20 if comm.rank else 13  # a step takes 6 of each rank
with make(torch.ones(length, 4)) as manager:
    for epoch in range(2):
        print('samples', [count for loss, count in manager.epoch()], flush=True)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("samples [12, 12, 7, 2]") == 2 * RANKS


MODEL_RAISES = """
def happen(call):
    if comm.rank == 1 and call == 3:
        raise ValueError('bad batch')
"""


def test_model_that_raises_ends_the_job_with_its_cause() -> None:
    result = run(MODEL_RAISES + "with make(samples()) as manager: train(manager)\n")
    check_ended_badly(result)
    assert "ValueError: bad batch" in result.stderr
    assert f"rank 1 of {RANKS}" in result.stderr


def test_model_that_raises_is_caught_by_all_ranks_which_go_on() -> None:
    result = run(
        MODEL_RAISES
        + """
with make(samples()) as manager:
    for step in range(5):
        try:
            loss, count = manager.step()
            print('step', step, count, flush=True)
        except (ValueError, RankFailedError) as error:
            print('caught', step, type(error).__name__, 'bad batch' in str(error), flush=True)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("caught 2 ValueError True") == 1
    assert result.stdout.count("caught 2 RankFailedError True") == RANKS - 1
    assert result.stdout.count("step") == 4 * RANKS


def test_wrong_batch_size_on_one_rank_ends_the_job() -> None:
    result = run("make(samples(), 0 if comm.rank == 1 else 3)\n")
    check_ended_badly(result)
    assert "ValueError: batch_size_per_device must be at least 1, got 0" in result.stderr


def test_interrupt_ends_the_job_soon_and_without_a_crash() -> None:
    """Ctrl-C in a terminal, where every rank gets the signal; in the middle of a wait for data."""
    body = """
def slow():
    for number, sample in enumerate(samples()):
        if number >= 30:
            time.sleep(600)
        yield sample
with make(slow()) as manager: train(manager)
"""
    with Launched(RANKS, PREPARE + body, timeout_s=SOON_S) as job:
        job.wait_for_output(r"(?s)(ready.*){2}")
        job.job.signal_ranks(signal.SIGINT)
        result = job.wait()
    check_ended_badly(result)
    assert "KeyboardInterrupt" in result.stderr
    assert "Fatal Python error" not in result.stderr


def test_dataset_that_blocks_is_named_with_the_device() -> None:
    body = """
def stuck():
    for number, sample in enumerate(samples()):
        if comm.rank == 1 and number == 9:
            time.sleep(600)
        yield sample
with make(stuck()) as manager: train(manager)
"""
    result = run(body, timeout_s="3")
    check_ended_badly(result)
    assert "StalledError: the devices of a TPUManager must be done within 3 s" in result.stderr
    assert "xla:1 is waiting for batch 1 of a step from the dataset" in result.stderr
    assert f"(rank 1 of {RANKS})" in result.stderr


def test_killed_rank_ends_the_job() -> None:
    with Launched(
        RANKS, PREPARE + "with make(samples()) as manager: train(manager)\n", timeout_s=SOON_S
    ) as job:
        job.wait_for_output(r"(?s)(ready.*){2}")
        job.signal_rank(1, signal.SIGKILL)
        result = job.wait()
    assert not result.timed_out and result.returncode != 0, result.stderr
