"""A signal on one rank stops all ranks at the same step, whatever carries the news."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

import hpcpar
from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.jobs import REQUEUE_STATUS, Preemption
from tests.launching import find_launcher
from tests.nn.training import ROUTES, mlp, pretended_nodes

STEPS = 12
SIGNALLED = 4  # the step in which the last rank gets a signal


@contextmanager
def usual_handlers() -> Iterator[None]:
    """Check that the handlers of before are there again afterwards."""
    before = signal.getsignal(signal.SIGUSR1)
    yield
    assert signal.getsignal(signal.SIGUSR1) is before


def stop_step(comm: Communicator, preemption: Preemption, step: object = lambda: None) -> int:
    """Go through steps until the ranks want to stop; the number of steps."""
    for number in range(STEPS):
        if number == SIGNALLED and comm.rank == comm.size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        step()
        if preemption.requested():
            assert preemption.requested()
            return number
    return STEPS


def check_stop(comm: Communicator, steps: int, preemption: Preemption) -> None:
    assert comm.allgather(steps) == [steps] * comm.size
    assert SIGNALLED <= steps <= SIGNALLED + 2
    why = "SIGUSR1" if comm.rank == comm.size - 1 else "another rank says so"
    assert preemption.reason == f"{why} (rank {comm.rank} of {comm.size})"


def test_signal_stops_all_ranks_at_the_same_step(comm: Communicator) -> None:
    with usual_handlers(), Preemption(comm) as preemption:
        check_stop(comm, stop_step(comm, preemption), preemption)


@pytest.mark.parametrize("route", ROUTES)
def test_gradients_carry_the_news(comm: Communicator, route: str) -> None:
    ranks_per_node, transport = ROUTES[route]
    with pretended_nodes(comm, ranks_per_node) as nodes:
        model = hpcpar.nn.DataParallel(mlp(), nodes, transport=transport)
        with Preemption(nodes, model=model) as preemption:
            steps = stop_step(nodes, preemption, lambda: model(torch.ones(2, 6).double()).sum().backward())
            check_stop(nodes, steps, preemption)
            assert preemption._exchange is None  # nothing was sent for it
        model.free()


@pytest.mark.parametrize("wire_dtype", [torch.int8, torch.bfloat16])
def test_one_flag_among_many_numbers_survives_the_wire(comm: Communicator, wire_dtype: torch.dtype) -> None:
    with pretended_nodes(comm, 1) as nodes:
        model = hpcpar.nn.DataParallel(mlp(torch.float32), nodes, wire_dtype=wire_dtype)
        with Preemption(nodes, model=model) as preemption:
            check_stop(
                nodes,
                stop_step(nodes, preemption, lambda: model(torch.ones(2, 6)).sum().backward()),
                preemption,
            )
        model.free()


def test_overlapping_optimizer_carries_the_news_a_step_later(comm: Communicator) -> None:
    net = mlp()
    optimizer = hpcpar.optim.DataParallelOptimizer(torch.optim.SGD(net.parameters(), lr=0.01))
    model = hpcpar.nn.DataParallel(net, comm, optimizer=optimizer)

    def step() -> None:
        optimizer.zero_grad()
        model(torch.ones(2, 6).double()).sum().backward()
        optimizer.step()
        if comm.rank == 0:
            model.state_dict()  # this rank alone waits for its gradients, and must not know earlier

    with Preemption(comm, model=model) as preemption:
        check_stop(comm, stop_step(comm, preemption, step), preemption)
    model.free()


def test_model_without_gradients_leaves_it_to_an_exchange(comm: Communicator) -> None:
    model = hpcpar.nn.DataParallel(mlp().requires_grad_(False), comm)
    with Preemption(comm, model=model) as preemption:
        check_stop(comm, stop_step(comm, preemption), preemption)
    model.free()


def test_rank_without_batches_learns_of_it_while_it_joins(comm: Communicator) -> None:
    """Whoever is told: a rank that trains, or one that has run out."""
    model = hpcpar.nn.DataParallel(mlp(), comm)
    for told in {0, comm.size - 1}:
        with Preemption(comm, model=model) as preemption:
            steps = 0
            with model.join():
                while steps < (1 if comm.rank == 0 else 50) and not preemption.requested():
                    if steps == 0 and comm.rank == told:
                        os.kill(os.getpid(), signal.SIGUSR1)
                    model(torch.ones(2, 6).double()).sum().backward()
                    steps += 1
            assert preemption.requested()
            assert steps < 5
    model.free()


def test_next_one_begins_afresh(comm: Communicator) -> None:
    model = hpcpar.nn.DataParallel(mlp(), comm)
    for signalled in (True, False):
        with Preemption(comm, model=model) as preemption:
            for _ in range(3):
                if signalled:
                    os.kill(os.getpid(), signal.SIGUSR1)
                model(torch.ones(2, 6).double()).sum().backward()
                asked = preemption.requested()
            assert asked is signalled
    model.free()


@pytest.mark.parametrize("model", [None, torch.nn.Linear(2, 2)])
def test_model_that_carries_no_flag_is_as_good_as_none(comm: Communicator, model: object) -> None:
    with Preemption(comm, model=model) as preemption:
        check_stop(comm, stop_step(comm, preemption), preemption)


CHILDREN = """
import os, signal, subprocess, sys, time
from hpcpar.jobs import Preemption

with Preemption(signals=("SIGUSR1", "SIGTERM")) as preemption:
    for number, end in [(signal.SIGTERM, signal.SIGTERM), (signal.SIGUSR1, signal.SIGUSR1)]:
        ready, begun = os.pipe()
        if (child := os.fork()) == 0:
            os.write(begun, b".")  # before that, Python drops signals that a child gets
            time.sleep(60)
            os._exit(0)
        os.read(ready, 1)
        os.kill(child, number)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == end  # as without us, and not left behind
    with preemption.shielded():
        worker = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        os.kill(os.getpid(), signal.SIGUSR1)
    assert preemption.requested() and preemption.reason.startswith("SIGUSR1")
    worker.send_signal(signal.SIGUSR1)
    worker.communicate(b"\\n", timeout=30)
    assert worker.returncode == 0
"""


@pytest.mark.local
def test_children_are_no_ranks() -> None:
    alone = find_launcher().environment()  # or it takes itself for the rank that runs this test
    command = [sys.executable, "-c", CHILDREN]
    done = subprocess.run(command, env=alone, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr


def test_reason_of_ones_own_counts_too(comm: Communicator) -> None:
    with Preemption(comm, signals=()) as preemption:
        assert not preemption.requested()
        if comm.rank == 0:
            preemption.request("a file named STOP")
        while not preemption.requested():
            time.sleep(0.001)
        assert preemption.reason.startswith("a file named STOP" if comm.rank == 0 else "another rank")
        with pytest.raises(SystemExit) as left:
            preemption.leave()
        assert left.value.code == REQUEUE_STATUS == 75


def test_end_of_the_job_stops_it_in_time(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1000))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "3")
    with Preemption(comm, margin_s=120.0) as preemption:
        assert preemption.restarts == 3
        assert not preemption.requested() and not preemption.requested()
        if comm.rank == 0:  # a clock that is ahead of the others
            monkeypatch.setattr(time, "time", lambda now=time.time: now() + 900)
        steps = next(number for number in range(STEPS) if preemption.requested())
        monkeypatch.undo()
        assert comm.allgather(steps) == [steps] * comm.size
        assert preemption.reason.startswith("the job ends in " if comm.rank == 0 else "another rank")


@pytest.mark.local
@pytest.mark.parametrize(("left_s", "margin_s", "stops_after_s"), [(1000, 120, 880), (60, 120, 45)])
def test_margin_is_at_most_a_quarter_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, left_s: int, margin_s: float, stops_after_s: float
) -> None:
    """Or a short job would stop at its first step, be requeued, and stop again."""
    now = 1_800_000_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + left_s))
    with Preemption(margin_s=margin_s, signals=()) as preemption:
        for after_s, stops in [(stops_after_s - 1, False), (stops_after_s + 1, True)]:
            monkeypatch.setattr(time, "time", lambda after_s=after_s: now + after_s)
            assert preemption.requested() is stops


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"signals": ("SIGNAL",)}, "names of signals .* got 'SIGNAL'"),
        ({"signals": ("SIGKILL",)}, "got 'SIGKILL'"),
        ({"margin_s": -1.0}, "margin_s must be .* got -1.0"),
    ],
)
def test_mistake_of_one_rank_is_an_error_on_all(
    comm: Communicator, options: dict[str, object], reason: str
) -> None:
    with usual_handlers(), pytest.raises(HpcparError, match=reason):
        Preemption(comm, **(options if comm.rank == comm.size - 1 else {}))


@pytest.mark.mpi(min_size=2)
def test_ranks_with_other_arguments_are_refused(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match="SIGUSR2"):
        Preemption(comm, signals=("SIGUSR1" if comm.rank == 0 else "SIGUSR2",))


@pytest.mark.local
def test_thread_that_gets_no_signals_is_refused() -> None:
    errors: list[str] = []

    def make() -> None:
        try:
            Preemption()
        except HpcparError as error:
            errors.append(str(error))

    thread = threading.Thread(target=make, name="trainer")
    thread.start()
    thread.join()
    assert "main thread" in errors[0] and "'trainer'" in errors[0]


def test_error_of_one_rank_leaves_without_the_others(comm: Communicator) -> None:
    with usual_handlers():
        preemption = Preemption(comm)
        preemption.requested()
        if comm.rank == 0:
            with pytest.raises(ZeroDivisionError), preemption:
                1 // 0  # noqa: B018
        comm.Barrier()
        preemption.close()
        preemption.close()
