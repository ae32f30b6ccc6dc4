"""What the ranks find out together for ``hpcpar doctor``, on machines that are pretended."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from hpcpar.cli.doctor import gather as gathering
from hpcpar.cli.doctor.gather import gather
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.session import Watcher
from hpcpar.comm import Communicator


class Silent(Watcher):
    """A watcher that watches nothing."""

    def __init__(self) -> None:
        self.said: list[object] = []

    def _send(self, word: object) -> None:
        self.said.append(word)


def own_machine(comm: Communicator) -> ProcessFacts:
    return ProcessFacts(host=f"n{comm.rank}", machine=f"machine {comm.rank}", mount_space="m")


def test_every_machine_looks_at_the_folder_and_its_clock(comm: Communicator, tmp_path: Path) -> None:
    folder = Path(comm.bcast(str(tmp_path)))
    missing = folder / "missing"
    job = gather(own_machine(comm), comm, [(folder, True), (missing, False)], Silent())
    assert comm.allgather(job) == [job] * comm.size
    assert job.problems == {}
    found = [one for one in job.folders if one.path == str(folder)]
    assert [one.host for one in found] == [f"n{rank}" for rank in range(comm.size)]
    assert [one.shared for one in found] == [None] + [True] * (comm.size - 1)
    assert all(one.problem is None and one.named for one in found)
    assert all("ENOENT" in (one.problem or "") for one in job.folders if one.path == str(missing))
    assert sorted(job.clock_offsets_s) == list(range(1, comm.size))
    assert all(abs(offset) < 1.0 for offset in job.clock_offsets_s.values())
    assert job.memcpy_bytes_per_s and bool(job.links) == (comm.size > 1)
    assert not list(folder.glob(".hpcpar*"))


def test_clock_that_is_ahead_is_found(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Ahead:
        @staticmethod
        def time() -> float:
            return time.time() + 100.0 * comm.rank

    monkeypatch.setattr(gathering, "time", Ahead)
    offsets = gathering._clocks(comm, comm.allgather(own_machine(comm)))
    assert all(abs(offset - 100.0 * rank) < 1.0 for rank, offset in offsets.items())


def test_part_that_fails_on_one_rank_is_left_out_on_all(
    comm: Communicator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> float:
        if comm.rank == comm.size - 1:
            raise MemoryError("no room")
        return 1.0

    monkeypatch.setattr("hpcpar.cli.measure.measure_memcpy", fail)
    monkeypatch.setattr(gathering, "_links", lambda comm: [])
    job = gather(own_machine(comm), comm, [], Silent())
    assert job.problems == {"memcpy": f"rank {comm.size - 1}: MemoryError: no room"}
    assert job.memcpy_bytes_per_s is None
