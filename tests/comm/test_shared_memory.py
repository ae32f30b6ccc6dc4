"""Shared windows and flag boards: what one rank writes, the others of its node read."""

from __future__ import annotations

import pytest
import torch

from hpcpar.comm import Communicator, shared_memory
from hpcpar.comm.progress import Patience, wait_until
from hpcpar.comm.shared_memory import FlagBoard, SharedWindow, has_space
from hpcpar.errors import CommunicatorFreedError
from tests.nn.training import pretended_nodes

pytestmark = pytest.mark.mpi


def wait_for(board: FlagBoard, flag: int, value: int) -> None:
    patience = Patience(f"flag {flag}", missing=tuple, where="here")
    wait_until(lambda: board.all_reached(flag, value), patience)


@pytest.mark.parametrize("ranks_per_node", [None, 1, 2, 3])
def test_flags_publish_what_was_written_before(comm: Communicator, ranks_per_node: int | None) -> None:
    with pretended_nodes(comm, ranks_per_node) as nodes:
        node = nodes.node
        window = SharedWindow(node, 4096)
        board = FlagBoard(window, node, 1024, 2)
        segments = [window.tensor(rank, 64, 100, torch.float64) for rank in range(node.size)]
        assert all(not bool(segment.any()) for segment in segments)
        node.Barrier()
        for step in range(1, 200):
            segments[node.rank].fill_(step * 100 + node.rank)
            board.raise_flag(0, step)
            wait_for(board, 0, step)
            for rank, segment in enumerate(segments):
                assert bool((segment == step * 100 + rank).all())
            board.raise_flag(1, step)
            wait_for(board, 1, step)
        assert [board.read(rank, 1) for rank in range(node.size)] == [199] * node.size
        assert not board.all_reached(0, 200)
        assert board.all_reached(0, 200, range(0))
        board.free()
        window.free()
        window.free()
        with pytest.raises(CommunicatorFreedError):
            window.tensor(0, 0, 1, torch.float32)


def test_empty_tensors_and_every_dtype(comm: Communicator) -> None:
    window = SharedWindow(comm.node, 0)
    assert window.tensor(0, 0, 0, torch.float32).shape == (0,)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.complex64, torch.uint8):
        assert window.tensor(comm.node.rank, 0, 8, dtype).dtype == dtype
    window.free()


def test_space_is_asked_for_all_ranks_of_a_node_together(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert has_space(comm, 1)
    assert not has_space(comm, 1 << 60)
    reserve = shared_memory._RESERVE_BYTES
    monkeypatch.setattr(shared_memory, "_free_bytes", lambda: 1000 * comm.size + reserve)
    assert has_space(comm, 1000)
    assert not has_space(comm, 1001)


def test_one_full_node_is_enough_for_no(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_memory, "_free_bytes", lambda: 0 if comm.rank == comm.size - 1 else 1 << 40)
    with pretended_nodes(comm, 1) as nodes:
        assert not has_space(nodes, 10)


def test_folder_that_is_no_file_system_counts_as_endless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_MCA_osc_sm_backing_directory", "/nowhere/at/all")
    assert shared_memory._free_bytes() == 1 << 62
