"""What the examples with experts are made of. Whole runs are in tests/launched/test_examples.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import common
import expert_gpt
import expert_load
import gpt
import remote_experts
import saved_run
from hpcpar.comm import MPI
from hpcpar.nn import MixtureOfExperts, TopKGate

TINY = gpt.GptConfig(layers=2, width=8, heads=2, context=6)


def net_with_experts(comm) -> gpt.Gpt:
    torch.manual_seed(3)
    net = gpt.Gpt(TINY)
    makers = [lambda: expert_gpt.make_expert(TINY)] * 3
    net.blocks[1].mlp = MixtureOfExperts(TopKGate(TINY.width, 3), makers, comm)
    return net


def test_experts_do_not_depend_on_the_number_of_ranks(comm) -> None:
    tokens = torch.randint(0, 256, (2, 6))
    with comm.Dup() as ranks, ranks.Split(ranks.rank, 0) as alone:
        torch.testing.assert_close(net_with_experts(ranks)(tokens), net_with_experts(alone)(tokens))


def test_parameters_of_experts_elsewhere_are_counted(comm) -> None:
    dense = gpt.Gpt(TINY)
    expert = sum(p.numel() for p in gpt.Mlp(TINY).parameters())
    expected = sum(p.numel() for p in dense.parameters()) + 2 * expert + 3 * TINY.width
    assert expert_gpt.count_parameters(net_with_experts(comm)) == expected
    assert expert_gpt.count_parameters(dense) == sum(p.numel() for p in dense.parameters())


def test_load_counts_forwards_of_training_only(comm) -> None:
    net = net_with_experts(comm)
    load = expert_gpt.watch_load(expert_gpt.expert_layers(net))
    tokens = torch.zeros(1 + comm.rank, 6, dtype=torch.int64)
    net(tokens)
    net(tokens)
    load.end_step()
    net.eval()(tokens)
    load.end_step()
    table = load.table(comm, MPI.MAX)
    windows = comm.size * (comm.size + 1) // 2
    assert table.shape == (1, 3, 2)
    assert table.sum(dim=(0, 1)).tolist() == [2 * 2 * 6 * windows, 0]


@pytest.mark.local
def test_heat_map_comes_with_its_numbers(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = torch.arange(24).reshape(2, 3, 4)
    written = expert_load.write_expert_load(tmp_path, ["a", "b"], table, first_step=10, draw=True)
    assert [path.name for path in written] == ["expert_load.npz", "expert_load.png"]
    numbers = np.load(written[0])
    assert numbers["rows"].tolist() == table.tolist()
    assert (numbers["layers"].tolist(), int(numbers["first_step"])) == (["a", "b"], 10)
    assert written[1].stat().st_size > 1000
    assert len(expert_load.write_expert_load(tmp_path, ["a", "b"], table, first_step=0, draw=False)) == 1


@pytest.mark.local
def test_heat_map_of_no_steps_and_no_rows_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    table = torch.zeros(1, 3, 1, dtype=torch.int64)
    assert len(expert_load.write_expert_load(tmp_path, ["a"], table, first_step=0, draw=True)) == 2


@pytest.mark.local
@pytest.mark.parametrize("grid", [(4,), (2, 3), (2, 3, 2)])
def test_chosen_experts_are_the_best_sums_of_scores(grid: tuple[int, ...]) -> None:
    scores = [torch.randn(50, length) for length in grid]
    expected = torch.zeros(grid, dtype=torch.int64)
    for sample in range(50):
        totals = {
            place: sum(float(s[sample, p]) for s, p in zip(scores, place, strict=True))
            for place in np.ndindex(*grid)
        }
        for place in sorted(totals, key=totals.__getitem__)[-2:]:
            expected[place] += 1
    assert remote_experts.chosen_experts(scores, 2).tolist() == expected.flatten().tolist()


@pytest.mark.local
@pytest.mark.parametrize("servers", [1, 2, 3])
def test_servers_share_all_experts_and_initial_weights_do_not_depend_on_them(servers: int) -> None:
    def backends(server: int, of: int) -> dict:
        return remote_experts.make_backends(
            TINY, (2, 2), server, of, learning_rate=1e-3, samples_per_update=None, slow_s=0.0, seed=0
        )

    reference = backends(0, 1)
    assert list(reference)[:5] == ["block0.0.0", "block0.0.1", "block0.1.0", "block0.1.1", "block1.0.0"]
    found = {uid: backend for server in range(servers) for uid, backend in backends(server, servers).items()}
    assert list(found) == list(reference)
    for uid, backend in found.items():
        for ours, theirs in zip(backend.expert.parameters(), reference[uid].expert.parameters(), strict=True):
            assert torch.equal(ours, theirs)


def test_saved_run_comes_back_with_its_optimizer(comm, tmp_path_factory) -> None:
    folder = comm.bcast(tmp_path_factory.mktemp("run") if comm.rank == 0 else None, root=0)
    tokens = torch.arange(12).reshape(2, 6)

    def step(net: gpt.Gpt, adamw: torch.optim.Optimizer) -> None:
        adamw.zero_grad()
        net(tokens).square().sum().backward()
        adamw.step()

    net = net_with_experts(comm)
    adamw = torch.optim.AdamW(net.parameters(), lr=0.01)
    step(net, adamw)
    target = saved_run.save_run(folder, net, adamw, 7, comm)
    step(net, adamw)
    other = net_with_experts(comm)
    for parameter in other.parameters():
        parameter.data.fill_(0.5)
    another = torch.optim.AdamW(other.parameters(), lr=0.01)
    assert saved_run.resume_run(target, other, another, comm) == 7
    step(other, another)
    for ours, theirs in zip(other.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_missing_run_is_an_error_of_the_user(comm, tmp_path: Path) -> None:
    net = net_with_experts(comm)
    with pytest.raises(common.UserError, match="nowhere"):
        saved_run.resume_run(tmp_path / "nowhere", net, torch.optim.SGD(net.parameters(), lr=0.1), comm)
