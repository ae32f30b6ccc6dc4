"""Rows reach everybody, decisions follow, nobody waits, with a thread for the secretary and without."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest

from hpcpar.comm import Bulletin, Communicator
from hpcpar.comm.mpi import threads_allowed

pytestmark = [pytest.mark.mpi, pytest.mark.timeout_s(30)]

THREADED = [True, False]


def make(comm: Communicator, threaded: bool) -> Bulletin:
    def decide(rows: np.ndarray, now_s: float) -> np.ndarray:
        return np.array([rows[:, 0].sum(), rows[:, 0].min()])

    if threaded and not threads_allowed():
        pytest.skip("MPI grants no MPI_THREAD_MULTIPLE")
    return Bulletin(comm, np.zeros(3), decide, np.zeros(2), threaded=threaded)


def wait_for(bulletin: Bulletin, done: Callable[[], bool]) -> None:
    limit_s = time.monotonic() + 20.0
    while not done():
        bulletin.progress()
        assert time.monotonic() < limit_s
        time.sleep(0.0005)


@pytest.mark.parametrize("threaded", THREADED)
def test_everybody_learns_the_rows_and_the_decision(comm: Communicator, threaded: bool) -> None:
    bulletin = make(comm, threaded)
    total = sum(range(1, comm.size + 1))
    bulletin.post(np.array([comm.rank + 1.0, 0.5, -1.0]))
    wait_for(bulletin, lambda: bulletin.decision[0] == total)
    wait_for(bulletin, lambda: bulletin.rows[:, 0].tolist() == [r + 1.0 for r in range(comm.size)])
    assert bulletin.rows[comm.rank].tolist() == [comm.rank + 1.0, 0.5, -1.0]
    bulletin.close()


@pytest.mark.parametrize("threaded", THREADED)
def test_newest_row_arrives_after_many(comm: Communicator, threaded: bool) -> None:
    bulletin = make(comm, threaded)
    for number in range(1, 501):
        bulletin.post(np.full(3, float(number)), urgent=number % 50 == 0)
    wait_for(bulletin, lambda: bulletin.decision[1] == 500.0)
    wait_for(bulletin, lambda: (bulletin.rows == 500.0).all())
    bulletin.close()


def test_rows_do_not_pile_up_before_a_secretary_that_does_not_look(comm: Communicator) -> None:
    """Most of them are never sent, and the last one is."""
    bulletin = make(comm, False)
    if comm.rank == 0:
        comm.mpi.Barrier()  # in MPI itself, where no engine turns
    for number in range(1, 501):
        bulletin.post(np.full(3, float(number)), urgent=number % 50 == 0)
    if comm.rank:
        assert bulletin._rows_sent <= 500 // 50 + 4
        comm.mpi.Barrier()
    wait_for(bulletin, lambda: bulletin.decision[1] == 500.0)
    wait_for(bulletin, lambda: (bulletin.rows == 500.0).all())
    bulletin.close()


def test_secretary_works_while_rank_zero_computes(comm: Communicator) -> None:
    bulletin = make(comm, True)
    if comm.rank == 0:
        bulletin.post(np.ones(3))
        assert comm.recv(source=comm.size - 1, tag=1) if comm.size > 1 else True
    else:
        bulletin.post(np.ones(3))
        wait_for(bulletin, lambda: bulletin.decision[0] == comm.size)
        if comm.rank == comm.size - 1:
            comm.send(True, 0, tag=1)
    comm.Barrier()
    bulletin.close()


def test_rank_that_does_not_look_piles_up_no_boards(comm: Communicator) -> None:
    bulletin = make(comm, True)
    if comm.rank == 0:
        for number in range(200):
            bulletin.post(np.full(3, float(number)))
            time.sleep(0.0005)
        assert all(count <= 4 for count in bulletin._secretary.boards_sent)
    comm.Barrier()
    wait_for(bulletin, lambda: bulletin.rows[0, 0] == 199.0)
    comm.Barrier()
    bulletin.close()


def test_stop_ends_the_thread(comm: Communicator) -> None:
    bulletin = make(comm, True)
    bulletin.stop()
    bulletin.stop()
    comm.Barrier()
    bulletin.close()
