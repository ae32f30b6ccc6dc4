"""Alarms: a rank that fails is heard by all others wherever they wait, and only where they listen."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from hpcpar.comm import Alarm, Communicator, wait_for_peers
from hpcpar.errors import RankFailedError

pytestmark = pytest.mark.mpi(min_size=2)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "20")  # who does not hear the alarm gets a StalledError


@pytest.fixture
def alarm(comm: Communicator) -> Iterator[Alarm]:
    made = Alarm([comm])
    yield made
    made.free()


def wait_in_barrier(comm: Communicator) -> None:
    comm.Ibarrier().wait()


def wait_in_allreduce(comm: Communicator) -> None:
    comm.Allreduce(torch.ones(100_000), torch.empty(100_000))


def wait_in_recv(comm: Communicator) -> None:
    comm.Recv(torch.empty(3), comm.rank)


def wait_for_object(comm: Communicator) -> None:
    comm.recv(comm.rank)


def wait_by_hand(comm: Communicator) -> None:
    wait_for_peers(lambda: False, comm, lambda: ("waiting", []))


@pytest.mark.parametrize(
    "wait", [wait_in_barrier, wait_in_allreduce, wait_in_recv, wait_for_object, wait_by_hand]
)
def test_alarm_is_heard_by_all_others_in_every_wait(
    comm: Communicator, alarm: Alarm, wait: Callable[[Communicator], None]
) -> None:
    failing = comm.size - 1
    assert alarm.is_quiet
    other = Communicator(comm.mpi.Dup())  # what was begun in it will never end
    if comm.rank == failing:
        with alarm.armed():
            alarm.sound("the oven is on fire")
    else:
        with (
            pytest.raises(RankFailedError, match=f"rank {failing} of {comm.size} failed") as caught,
            alarm.armed(),
        ):
            wait(other)
        assert caught.value.ranks == (failing,)
        assert "the oven is on fire" in str(caught.value)
        assert alarm.error is caught.value
    assert not alarm.is_quiet


def test_alarm_stays_and_is_raised_before_anything_is_begun(comm: Communicator, alarm: Alarm) -> None:
    if comm.rank == 0:
        alarm.sound("first")
        alarm.sound("second")
        comm.Barrier()
        return
    comm.Barrier()
    for _ in range(3):
        reached = False
        with pytest.raises(RankFailedError, match="first"), alarm.armed():
            reached = True
        assert not reached
    assert alarm.error is not None


def test_alarm_is_not_heard_outside_of_an_armed_block(comm: Communicator, alarm: Alarm) -> None:
    with alarm.armed():
        comm.Barrier()
    comm.Barrier()  # all have left the block
    left, right = (comm.rank - 1) % comm.size, (comm.rank + 1) % comm.size
    if comm.rank == 0:
        alarm.sound("fire")
    for _ in range(3):
        comm.Barrier()
        comm.Sendrecv(torch.ones(2), right, 0, torch.empty(2), left)
    assert alarm.is_quiet == (comm.rank != 0)


def test_alarm_of_one_group_is_not_heard_by_another(comm: Communicator) -> None:
    halves = comm.Split(comm.rank % 2, comm.rank)
    assert halves is not None
    alarm = Alarm([halves])
    comm.Barrier()
    if comm.rank == 0:
        alarm.sound("fire in the even half")
    comm.Barrier()
    if comm.rank % 2 == 0 and comm.rank > 0:
        with pytest.raises(RankFailedError, match=f"rank 0 of {halves.size} failed: fire"), alarm.armed():
            wait_by_hand(comm)
    elif comm.rank % 2 == 1:
        with alarm.armed():
            halves.Barrier()
        assert alarm.is_quiet
    comm.Barrier()
    alarm.free()
    halves.Free()


@pytest.mark.mpi(min_size=3)
def test_who_belongs_to_two_groups_passes_the_alarm_on(comm: Communicator) -> None:
    """0 1 | 1 2 | 2 3: the failure of rank 0 reaches rank 3 by way of ranks 1 and 2."""
    pairs = [
        comm.Split(0 if comm.rank in (left, left + 1) else 1, comm.rank) for left in range(comm.size - 1)
    ]
    mine = [pair for left, pair in enumerate(pairs) if pair is not None and comm.rank in (left, left + 1)]
    alarm = Alarm(mine)
    if comm.rank == 0:
        alarm.sound("fire at one end")
    else:
        with pytest.raises(RankFailedError, match="fire at one end") as caught, alarm.armed():
            wait_by_hand(comm)
        assert caught.value.ranks == (0,)
    comm.Barrier()


@pytest.mark.parametrize("length", [0, 100, 5_000_000])
def test_long_words_wait_for_nobody(comm: Communicator, alarm: Alarm, tmp_path: Path, length: int) -> None:
    """Who sounds an alarm may never call MPI again, so all of it must be on its way at once."""
    told = Path(comm.bcast(str(tmp_path)))
    comm.Barrier()
    if comm.rank == 0:
        alarm.sound("the cause is this" + " ünd thïs" * (length // 9) + " in the end")
        poll(lambda: all((told / str(rank)).exists() for rank in range(1, comm.size)))
    else:
        with pytest.raises(RankFailedError, match="failed: the cause is this") as caught, alarm.armed():
            wait_by_hand(comm)
        assert str(caught.value).endswith("in the end")
        assert caught.value.ranks == (0,)
        (told / str(comm.rank)).touch()


def poll(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20.0
    while not done():
        assert time.monotonic() < deadline, "the others hang"
        time.sleep(0.002)


def test_two_ranks_may_sound_at_once(comm: Communicator, alarm: Alarm) -> None:
    if comm.rank < 2:
        alarm.sound(f"fire on {comm.rank}")
    else:
        with pytest.raises(RankFailedError, match=r"fire on [01]"), alarm.armed():
            wait_by_hand(comm)
    comm.Barrier()
    alarm.sound("too late to matter")
    assert not alarm.is_quiet


def test_freed_alarm_has_nothing_to_say(comm: Communicator) -> None:
    alarm = Alarm([comm])
    with alarm.armed():
        comm.Barrier()
    alarm.free()
    alarm.free()
    with alarm.armed():
        comm.Barrier()
    assert alarm.is_quiet
