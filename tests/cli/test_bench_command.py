"""``hpcpar bench`` and what it measures with, on one rank and on several."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner, Result

from hpcpar.cli.bench import _measure, _report
from hpcpar.cli.device_check import check_device_messages
from hpcpar.cli.main import main
from hpcpar.cli.measure import Pair, choose_pairs
from hpcpar.comm import Communicator, NodeMap


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments], prog_name="hpcpar")


@pytest.mark.local
def test_alone_it_measures_memcpy_and_says_how_to_start_it() -> None:
    result = bench("--seconds", "0.1")
    assert result.exit_code == 0, result.output
    assert "memcpy, all ranks at once" in result.stdout and "mpirun -n 2 hpcpar bench" in result.stdout
    content = json.loads(bench("--seconds", "0.1", "--json").stdout)
    assert content["ranks"] == 1 and content["memcpy_bytes_per_s"] > 0 and content["point_to_point"] == []


@pytest.mark.local
@pytest.mark.parametrize(
    ("arguments", "phrase"),
    [
        (["--sizes", "8,x"], "must be sizes such as 8,1KiB,64MiB, got 'x'"),
        (["--sizes", "2GiB"], "must be at most 1 GiB"),
        (["--seconds", "0"], "--seconds"),
        (["--pairs", "0"], "--pairs"),
    ],
)
def test_mistake_gives_one_line_and_status_2(arguments: list[str], phrase: str) -> None:
    result = bench(*arguments)
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1 and phrase in result.stderr


@pytest.mark.local
def test_pairs_are_inside_nodes_and_between_neighbours() -> None:
    assert choose_pairs(NodeMap((0, 0, 1, 1, 2))) == [
        Pair(0, 1, True),
        Pair(2, 3, True),
        Pair(0, 2, False),
        Pair(2, 4, False),
    ]
    assert choose_pairs(NodeMap((0,))) == []


@pytest.mark.local
def test_pairs_are_spread_over_a_large_job() -> None:
    pairs = choose_pairs(NodeMap(tuple(rank // 2 for rank in range(64))), limit=3)
    assert [pair.first for pair in pairs if pair.one_node] == [0, 30, 62]
    assert [(pair.first, pair.second) for pair in pairs if not pair.one_node] == [(0, 2), (30, 32), (60, 62)]
    assert len(choose_pairs(NodeMap(tuple(range(9))), limit=1)) == 1


def test_figures_are_the_same_on_all_ranks(comm: Communicator) -> None:
    figures = _measure(comm, [8, 4096], 0.2, 1)
    assert comm.allgather(figures) == [figures] * comm.size
    assert figures["ranks"] == comm.size
    if comm.size > 1:
        assert [row["nbytes"] for row in figures["point_to_point"]] == [8, 4096]
        assert all(0 < row["best_latency_s"] <= row["latency_s"] for row in figures["point_to_point"])
        assert [row["nbytes"] for row in figures["allreduce"]] == [4096]
        assert figures["allreduce"][0]["transport"] == "shared_memory"
        assert "inside a node" in _report(figures)


def test_device_messages_that_are_corrupted_on_one_rank_are_told_on_all(comm: Communicator) -> None:
    host = torch.device("cpu")

    def faithful(sent: torch.Tensor, received: torch.Tensor, target: int, source: int) -> None:
        comm.Sendrecv(sent, target, 0, received, source, 0)

    def corrupting(sent: torch.Tensor, received: torch.Tensor, target: int, source: int) -> None:
        faithful(sent, received, target, source)
        if comm.rank == comm.size - 1 and received.numel() == 4096:
            received[-1] += 1

    assert check_device_messages(comm, host, faithful).wrong == ()
    verdict = check_device_messages(comm, host, corrupting)
    assert verdict.wrong == (4096,) and "CORRUPTED" in verdict.summary
