"""Ranks that are stopped for a while are left out and catch up; ranks that die or raise end the job."""

from __future__ import annotations

import re
import signal

import pytest

from tests.launching import Launched, LaunchResult, find_launcher, launch

RANKS = 3
SOON_S = 60.0  # far above what any of these takes, far below the default deadline of ten minutes

PREPARE = """
import os, signal, sys, time
import torch, hpcpar
from torch import nn
from hpcpar.errors import HpcparError
from hpcpar.optim import CollaborativeOptimizer

comm = hpcpar.comm.world()
torch.manual_seed(0)
net = nn.Linear(8, 4)


def make(**options):
    inner = torch.optim.Adam(net.parameters(), lr=0.01)
    options.update(target_batch_size=4 * comm.size, batch_size_per_step=4)
    return CollaborativeOptimizer(inner, comm, **options)


def train(opt, until, happen=lambda step: None):
    while not until():
        opt.zero_grad()
        net(torch.randn(4, 8)).square().mean().backward()
        opt.step()
        happen(opt.local_step)
        time.sleep(0.005)


def check_equal():
    table = comm.allgather([p.tolist() for p in net.parameters()])
    assert all(row == table[0] for row in table)
    print('equal', comm.rank, flush=True)
"""


def run(body: str, *, timeout_s: str = "600", arguments: tuple[str, ...] = ()) -> LaunchResult:
    env = {"HPCPAR_TIMEOUT_S": timeout_s}
    return launch(RANKS, PREPARE + body, env=env, timeout_s=SOON_S, mpirun_args=arguments)


@pytest.mark.parametrize("victim", [0, RANKS - 1])
def test_stopped_rank_is_left_out_and_catches_up(victim: int) -> None:
    """Rank 0 has the secretary's thread: the others wait for it, and go on when it does."""
    body = f"""
def happen(step):
    if comm.rank == {victim} and step >= 5 and not os.path.exists('woken'):
        print('stopping', flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
        print('woken at', step, flush=True)
        open('woken', 'w').close()
with make(averaging_timeout=0.5) as opt:
    began = time.monotonic()
    train(opt, lambda: os.path.exists('woken') and opt.local_step >= 40, happen)
    print('steps', comm.rank, opt.local_step, flush=True)
check_equal()
"""
    with Launched(RANKS, PREPARE + body, env={"HPCPAR_TIMEOUT_S": "30"}, timeout_s=SOON_S) as job:
        job.wait_for_output("stopping")
        with pytest.raises(TimeoutError):
            job.wait_for_output("no rank prints this", timeout_s=3.0)
        job.signal_rank(victim, signal.SIGCONT)
        result = job.wait()
    assert not result.timed_out, result.stderr
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == RANKS, result.stderr
    assert "woken at" in result.stdout


def test_others_make_steps_while_a_rank_is_stopped() -> None:
    body = f"""
stops = [3]
def happen(step):
    if comm.rank == {RANKS - 1} and step in stops:
        stops.clear()
        print('stopping', flush=True)
        os.kill(os.getpid(), signal.SIGSTOP)
    elif comm.rank == 0 and step == 60:
        print('sixty', flush=True)
with make(averaging_timeout=0.3) as opt:
    train(opt, lambda: opt.local_step >= 80, happen)
check_equal()
"""
    with Launched(RANKS, PREPARE + body, env={"HPCPAR_TIMEOUT_S": "30"}, timeout_s=SOON_S) as job:
        job.wait_for_output("stopping")
        job.wait_for_output("sixty", timeout_s=30.0)
        job.signal_rank(RANKS - 1, signal.SIGCONT)
        result = job.wait()
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("equal") == RANKS, result.stderr


def test_stopped_rank_is_named_without_a_timeout_for_rounds() -> None:
    body = """
def happen(step):
    if comm.rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGSTOP)
with make() as opt:
    train(opt, lambda: False, happen)
"""
    result = run(body, timeout_s="2")
    assert not result.timed_out, result.stderr
    assert result.returncode != 0
    assert re.search(r"joining averaging round 3 must end within 2 s.*waits for rank 1\.", result.stderr), (
        result.stderr
    )


def test_exception_of_one_rank_reaches_the_others() -> None:
    body = """
def happen(step):
    if comm.rank == 1 and step == 3: raise ValueError('bad data')
try:
    with make() as opt:
        train(opt, lambda: False, happen)
except (HpcparError, ValueError) as error:
    print('ended', comm.rank, type(error).__name__, 'bad data' in str(error), flush=True)
"""
    result = run(body)
    assert not result.timed_out, result.stderr
    assert "ended 1 ValueError True" in result.stdout, result.stderr
    for rank in (0, 2):
        assert f"ended {rank} RankFailedError True" in result.stdout, result.stderr


def test_exception_that_nobody_catches_ends_the_job() -> None:
    body = """
with make() as opt:
    def happen(step):
        if comm.rank == 2: raise ValueError('bad data')
    train(opt, lambda: False, happen)
"""
    result = run(body)
    assert not result.timed_out, result.stderr
    assert result.returncode != 0
    assert "ValueError: bad data" in result.stderr


@pytest.mark.skipif(
    not find_launcher().is_openmpi,
    reason="the launcher ends the job when a rank is killed; `mpirun --with-ft ulfm` of Open MPI does not",
)
@pytest.mark.parametrize("victim", [0, 1])
def test_dead_rank_is_named_within_seconds(victim: int) -> None:
    body = f"""
def happen(step):
    if comm.rank == {victim} and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
opt = make()
try:
    train(opt, lambda: False, happen)
except HpcparError as error:
    print('heard', getattr(error, 'ranks', None), flush=True)
time.sleep(0.5)
os._exit(0)
"""
    result = run(body, arguments=("--with-ft", "ulfm"))
    assert not result.timed_out, result.stderr
    assert result.stdout.count(f"heard ({victim},)") == RANKS - 1, result.stdout + result.stderr


def test_killed_rank_ends_the_job() -> None:
    body = """
def happen(step):
    if comm.rank == 1 and step == 3:
        os.kill(os.getpid(), signal.SIGKILL)
with make() as opt:
    train(opt, lambda: False, happen)
"""
    result = run(body)
    assert not result.timed_out, result.stderr
    assert result.returncode != 0
