"""A rank of a pipeline that fails, dies, stops or leaves ends the job within seconds, with the cause."""

from __future__ import annotations

import signal

from tests.launching import Launched, LaunchResult, check_ended_badly, launch

RANKS = 3
SOON_S = 40.0  # far above what any of these takes, far below the default deadline of ten minutes

PREPARE = """
import os, signal, sys, time
import torch, hpcpar
from torch import nn
comm = hpcpar.comm.world()
place = comm.size - 1


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        if self.calls == 9:
            happen()
        return self.linear(x)


def happen():
    pass


WIDTH = 8
torch.manual_seed(0)


def train(steps=10**9):
    model = nn.Sequential(*(Layer() for _ in range(comm.size)))
    pipe = hpcpar.nn.Pipeline(model, comm, microbatches=4, loss_fn=nn.functional.mse_loss)
    for step in range(steps):
        pipe.train_step(torch.ones(8, WIDTH), torch.zeros(8, WIDTH))
        if step == 1:
            print('ready', flush=True)
"""


def run(body: str, *, timeout_s: str = "600") -> LaunchResult:
    return launch(RANKS, PREPARE + body, env={"HPCPAR_TIMEOUT_S": timeout_s}, timeout_s=SOON_S)


def test_exception_in_a_stage_ends_the_job_with_its_cause() -> None:
    result = run(
        """
def happen():
    if comm.rank == 1: raise ValueError('bad layer')
train()
"""
    )
    check_ended_badly(result)
    assert "ValueError: bad layer" in result.stderr
    assert "in layer '1' (Layer) of pipeline stage 1, microbatch 0" in result.stderr


def test_exception_that_all_ranks_catch_leaves_them_able_to_go_on() -> None:
    """With large messages under way, and another pipeline afterwards."""
    result = run(
        """
WIDTH = 2000
def happen():
    if comm.rank == 1: raise ValueError('bad layer')
try:
    train()
except (ValueError, hpcpar.errors.RankFailedError) as error:
    print('caught', type(error).__name__, 'bad layer' in str(error), flush=True)
def happen():
    pass
WIDTH = 8
train(3)
comm.Barrier()
print('done', flush=True)
"""
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("caught RankFailedError True") == RANKS - 1
    assert result.stdout.count("caught ValueError True") == 1
    assert result.stdout.count("done") == RANKS


def test_killed_rank_ends_the_job() -> None:
    with Launched(RANKS, PREPARE + "train()\n", timeout_s=SOON_S) as job:
        job.wait_for_output(r"(?s)(ready.*){3}")
        job.signal_rank(1, signal.SIGKILL)
        result = job.wait()
    check_ended_badly(result)


def test_stopped_rank_is_named_with_the_action_that_needs_it() -> None:
    with Launched(RANKS, PREPARE + "train()\n", env={"HPCPAR_TIMEOUT_S": "5"}, timeout_s=SOON_S) as job:
        job.wait_for_output(r"(?s)(ready.*){3}")
        job.signal_rank(1, signal.SIGSTOP)
        result = job.wait()
    check_ended_badly(result)
    assert "StalledError: " in result.stderr
    assert f"of {RANKS} waits for rank 1." in result.stderr
    assert "must end within 5 s" in result.stderr
    waits = ("of pipeline stage ", "pipeline step, ")
    assert any(text in result.stderr for text in waits), result.stderr


def test_slow_rank_is_named_with_stage_action_and_message() -> None:
    """Ranks 0 and 2 both wait for rank 1; only rank 2 is impatient, so that it is the one that reports."""
    result = run(
        """
def happen():
    if comm.rank == 1: time.sleep(60)
if comm.rank == 2: os.environ['HPCPAR_TIMEOUT_S'] = '3'
train()
"""
    )
    check_ended_badly(result)
    text = "action 2F0 of pipeline stage 2, which needs the activation of microbatch 0 from stage 1,"
    assert f"{text} must end within 3 s" in result.stderr
    assert f"rank 2 of {RANKS} waits for rank 1." in result.stderr


def test_rank_that_leaves_ends_the_job() -> None:
    result = run(
        """
def happen():
    if comm.rank == 1: sys.exit(3)
train()
"""
    )
    check_ended_badly(result)
    assert "rank 1" in result.stderr
