from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hpcpar.checkpoint import load, save
from hpcpar.comm import Communicator
from hpcpar.data import DistributedSampler, H5Dataset, h5_files, node_cache
from hpcpar.errors import MismatchError
from tests.data.files import BOTH, numbers, write
from tests.nn.training import pretended_nodes

pytestmark = pytest.mark.mpi

OPTIONS: dict[str, Any] = {"shuffle": True, "block_size": 4, "window_blocks": 3}


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One folder for all ranks."""
    made = comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None)
    yield Path(made)
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(made)


def file_for_all(comm: Communicator, folder: Path, samples: int, **options: Any) -> Path:
    if comm.rank == 0:
        write(folder / "a.h5", samples, **options)
    comm.Barrier()
    return folder / "a.h5"


def together(comm: Communicator, found: list[int]) -> list[int]:
    return [number for own in comm.allgather(found) for number in own]


def test_ranks_share_every_epoch_exactly_and_go_on_after_an_interruption(
    comm: Communicator, folder: Path
) -> None:
    path = file_for_all(comm, folder, 61, compression="gzip")
    with H5Dataset(path, BOTH, comm, **OPTIONS) as data, H5Dataset(path, BOTH, **OPTIONS) as alone:
        for epoch in range(2):
            data.set_epoch(epoch)
            alone.set_epoch(epoch)
            own = numbers(data.batches(4))
            assert len(own) == len(data)
            assert together(comm, own) == numbers(alone)
        data.set_epoch(2)
        alone.set_epoch(2)
        batches = iter(data.batches(4))
        taken = numbers([next(batches), next(batches)])
        state = data.state_dict()
        assert comm.allgather(state) == [state] * comm.size
        alone.load_state_dict(state)  # one rank for all
        assert sorted(together(comm, taken) + numbers(alone)) == list(range(61))
        with H5Dataset(path, BOTH, comm, **OPTIONS) as again:
            again.load_state_dict(state)
            assert numbers(again.batches(4)) == numbers(batches)


def test_a_state_of_the_end_of_an_epoch_loads_on_another_number_of_ranks(
    comm: Communicator, folder: Path
) -> None:
    path = file_for_all(comm, folder, 3 * comm.size + 1)
    sampler = DistributedSampler(3 * comm.size + 1, comm)
    with H5Dataset(path, BOTH, comm, **OPTIONS) as data, H5Dataset(path, BOTH, **OPTIONS) as alone:
        numbers(data.batches(2))
        list(sampler)
        save(folder / "saved", {"data": data.state_dict(), "sampler": sampler.state_dict()}, comm)
        state = load(folder / "saved")  # as one process
        alone.load_state_dict(state["data"])
        other = DistributedSampler(3 * comm.size + 1)
        other.load_state_dict(state["sampler"])
        assert numbers(alone) == list(other) == []


def test_ranks_at_paces_of_their_own_gather_a_state(comm: Communicator, folder: Path) -> None:
    path = file_for_all(comm, folder, 61)
    with H5Dataset(path, BOTH, comm, **OPTIONS) as data, H5Dataset(path, BOTH, **OPTIONS) as alone:
        own = numbers(islice(data.batches(3), 1 + 2 * comm.rank))
        save(folder / "saved", data.gather_state(), comm)
        state = load(folder / "saved")
        for ranks in (alone, data):
            ranks.load_state_dict(state)
        rest = numbers(alone)
        assert sorted(together(comm, own) + rest) == list(range(61))
        assert sorted(together(comm, numbers(data))) == sorted(rest)
        data.set_epoch(comm.rank)
        if comm.size > 1:
            with pytest.raises(MismatchError, match="epoch 1"):
                data.gather_state()


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_one_rank_of_each_node_looks_at_the_files(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch, ranks_per_node: int
) -> None:
    path = file_for_all(comm, folder, 20)
    looked: list[str] = []
    real = h5_files._open

    def opened(name: str, **options: Any) -> Any:
        looked.append(name)
        return real(name, **options)

    monkeypatch.setattr(h5_files, "_open", opened)
    with pretended_nodes(comm, ranks_per_node) as nodes, H5Dataset(path, BOTH, nodes) as data:
        assert len(looked) == (nodes.node.rank == 0)
        assert sorted(together(comm, numbers(data))) == list(range(20))


@pytest.mark.parametrize("ranks_per_node", [None, 1, 2])
def test_the_node_cache_gives_what_the_files_give(
    comm: Communicator, folder: Path, ranks_per_node: int | None
) -> None:
    path = file_for_all(comm, folder, 61, compression="gzip")
    with (
        pretended_nodes(comm, ranks_per_node) as nodes,
        H5Dataset(path, BOTH, nodes, cache="node", **OPTIONS) as cached,
        H5Dataset(path, BOTH, nodes, **OPTIONS) as plain,
    ):
        for data in (cached, plain):
            data.set_epoch(1)
        assert numbers(cached.batches(5)) == numbers(plain.batches(5)) == numbers(cached)


def test_a_node_without_room_is_an_error_on_all(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file_for_all(comm, folder, 20)
    monkeypatch.setattr(node_cache, "has_space", lambda comm, nbytes: False)
    with pytest.raises(OSError, match="MiB in /dev/shm of every node"):
        H5Dataset(path, BOTH, comm, cache="node")


def test_a_part_that_one_rank_cannot_read_is_an_error_on_all(comm: Communicator, folder: Path) -> None:
    own = folder / f"rank{comm.rank}" / "a.h5"
    own.parent.mkdir()
    write(own, 64, 8, fletcher32=True)
    if comm.rank == comm.size - 1:  # every chunk of its images is damaged
        content = own.read_bytes()
        place = content.index(bytes(range(12)))
        own.write_bytes(content[:place] + b"\xff" * 8 * 96 + content[place + 8 * 96 :])
    with pytest.raises((OSError, MismatchError), match="must be whole and as it was at first"):
        H5Dataset(own, BOTH, comm, cache="node", block_size=8)


@pytest.mark.mpi(min_size=2)
def test_what_one_rank_lacks_is_an_error_on_all(comm: Communicator, folder: Path) -> None:
    own = folder / f"rank{comm.rank}" / "a.h5"  # each node may have a copy of its own
    own.parent.mkdir()
    write(own, 20)
    with H5Dataset(own, BOTH, comm) as data:
        assert sorted(together(comm, numbers(data))) == list(range(20))
    wrong = comm.rank == 1
    with pytest.raises((FileNotFoundError, MismatchError), match=r"none\.h5 must be an HDF5 file"):
        H5Dataset(folder / "none.h5" if wrong else own, BOTH, comm)
    with pytest.raises((ValueError, MismatchError), match="buffers must be"):
        H5Dataset(own, BOTH, comm, buffers=0 if wrong else 2)
    given: Any = 5 if wrong else BOTH
    with pytest.raises((TypeError, MismatchError), match="names must be the name of a dataset"):
        H5Dataset(own, given, comm)
    H5Dataset(own, BOTH, comm, seed=np.int64(3) if wrong else 3).close()
    for different in ({"seed": 3}, {"shuffle": True}, {"block_size": 7}):
        with pytest.raises(MismatchError, match=f"{next(iter(different))}="):
            H5Dataset(own, BOTH, comm, **(different if wrong else {}))
    if wrong:
        write(own, 21)
    with pytest.raises(MismatchError, match="21 samples"):
        H5Dataset(own, BOTH, comm)


def test_ranks_with_nothing(comm: Communicator, folder: Path) -> None:
    for samples in (0, 1):
        path = file_for_all(comm, folder, samples)
        for cache in (None, "node"):
            with H5Dataset(path, BOTH, comm, cache=cache, **OPTIONS) as data:
                own = numbers(data.batches(3))
                assert len(own) == len(data) == int(comm.rank < samples)
