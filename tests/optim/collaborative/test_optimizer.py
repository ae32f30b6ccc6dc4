"""The applied gradient is the mean over all samples, whoever computed them, and replicas stay equal."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.optim import CollaborativeOptimizer
from tests.nn.training import assert_close, assert_replicas_equal, mlp
from tests.optim.collaborative.scripted import (
    adam,
    all_samples,
    check_parity,
    data,
    mean_loss,
    momentum,
    play,
    reference,
    target_of,
)

pytestmark = [pytest.mark.mpi, pytest.mark.timeout_s(10)]


def even(comm: Communicator, rounds: int = 3) -> list[list[list[int]]]:
    return [[[4, 4]] * comm.size] * rounds


def uneven(comm: Communicator, rounds: int = 3) -> list[list[list[int]]]:
    """Other batch sizes on every rank, in every round; the same total."""
    parts = [[[1 + rank, 2], [3], [2, 1, 3 + rank]] for rank in range(comm.size)]
    script = []
    for number in range(rounds):
        of_ranks = [list(parts[rank][(rank + number) % 3]) for rank in range(comm.size)]
        of_ranks[-1].append(12 * comm.size + 12 - sum(map(sum, of_ranks)))
        script.append(of_ranks)
    return script


# ---- parity ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [adam, momentum])
def test_unequal_batches_give_the_mean_over_all_samples(comm: Communicator, make) -> None:
    check_parity(comm, uneven(comm), make)


def test_rank_without_data_assists_and_stays_a_replica(comm: Communicator) -> None:
    script = [[[3, 5], *[[] for _ in range(comm.size - 1)]]] * 3
    check_parity(comm, script)


def test_rank_zero_may_be_the_one_without_data(comm: Communicator) -> None:
    script = [[*[[] for _ in range(comm.size - 1)], [3, 5]]] * 3
    check_parity(comm, script)


def test_reused_gradient_buffers(comm: Communicator) -> None:
    check_parity(comm, even(comm), zero=False, batch_size_per_step=4, reuse_grad_buffers=True)


def test_accumulators_on_another_device_and_messages(comm: Communicator) -> None:
    check_parity(comm, uneven(comm), accumulate_grads_on="cpu", transport="mpi")


def test_narrow_wire_keeps_replicas_equal_and_counts_exact(
    comm: Communicator, caplog: pytest.LogCaptureFixture
) -> None:
    """771 samples per rank have no place in bfloat16."""
    net = mlp()
    caplog.set_level(logging.INFO)
    options = {"transport": "mpi", "wire_dtype": torch.bfloat16, "verbose": True}
    with CollaborativeOptimizer(
        momentum(net.parameters()), comm, target_batch_size=771 * comm.size, **options
    ) as opt:
        mean_loss(net, *data(0, comm.rank, 0, 771)).backward()
        opt.step(771)
        while opt.local_step == 0:
            opt.step_aux()
    assert f"global step 1: {771 * comm.size} samples" in caplog.text
    assert_replicas_equal(comm, net.parameters())


def test_delayed_averaging_counts_every_sample_once(comm: Communicator) -> None:
    """With one round's samples at a time nothing is stale, and the result is that of one process."""
    check_parity(comm, uneven(comm), delayed_averaging=True)


@pytest.mark.parametrize("delayed", [False, True])
def test_without_threads(comm: Communicator, monkeypatch: pytest.MonkeyPatch, delayed: bool) -> None:
    """The secretary then works when rank 0 looks."""
    for module in ("hpcpar.comm.bulletin", "hpcpar.optim.collaborative.averaging"):
        monkeypatch.setattr(f"{module}.threads_allowed", lambda: False)
    check_parity(comm, uneven(comm, 2), delayed_averaging=delayed)


def test_target_smaller_than_one_batch(comm: Communicator) -> None:
    """Each batch of any rank makes a step, with whatever the others have by then."""
    net = mlp()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with CollaborativeOptimizer(inner, comm, target_batch_size=2, batch_size_per_step=5) as opt:
        for place in range(4):
            opt.zero_grad()
            mean_loss(net, *data(0, comm.rank, place, 5)).backward()
            before = opt.local_step
            opt.step()
            assert opt.local_step == before + 1
    assert_replicas_equal(comm, net.parameters())


def test_learning_rate_is_that_of_the_global_step(comm: Communicator) -> None:
    check_parity(
        comm, uneven(comm), make_scheduler=lambda opt: torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    )


def two_groups(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    first, *rest = parameters
    return torch.optim.SGD([{"params": [first], "lr": 0.3}, {"params": rest}], lr=0.1)


def test_several_groups(comm: Communicator) -> None:
    check_parity(comm, uneven(comm, 2), two_groups)


def test_clipping_is_by_the_norm_of_the_mean(comm: Communicator) -> None:
    script, limit = uneven(comm, 2), 0.05
    net, expected = mlp(), mlp()
    optimizer = torch.optim.SGD(expected.parameters(), lr=1.0)
    for number in range(2):
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*all_samples(script, number), strict=True))
        mean_loss(expected, x, y).backward()
        assert torch.nn.utils.clip_grad_norm_(expected.parameters(), limit) > limit
        optimizer.step()
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    options = {"target_batch_size": target_of(script), "clip_grad_norm": limit}
    with CollaborativeOptimizer(inner, comm, **options) as opt:
        play(comm, net, opt, script)
    assert_close(net, expected)


class Branches(nn.Module):
    """Each rank uses one branch only; nobody uses ``idle``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.branches = nn.ModuleList(nn.Linear(3, 2, dtype=torch.float64) for _ in range(4))
        self.idle = nn.Linear(3, 2, dtype=torch.float64)


def test_parameter_without_gradient_counts_as_zero_or_stays_none(comm: Communicator) -> None:
    net, expected = Branches(), Branches()
    samples = [torch.full((rank + 1, 3), 0.5, dtype=torch.float64) for rank in range(comm.size)]
    total = sum(map(len, samples))
    for rank, x in enumerate(samples):
        (expected.branches[rank](x).sum(1).sum() / total).backward()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    reference_opt = torch.optim.SGD(expected.parameters(), lr=0.1)
    reference_opt.step()
    missing: list[bool] = []  # in the step: outside of it gradients are the program's
    inner.register_step_post_hook(lambda *_: missing.extend(p.grad is None for p in net.parameters()))
    with CollaborativeOptimizer(inner, comm, target_batch_size=total) as opt:
        net.branches[comm.rank](samples[comm.rank]).sum(1).mean().backward()
        opt.step(len(samples[comm.rank]))
        while opt.local_step == 0:
            opt.step_aux()
        assert missing == [p.grad is None for p in expected.parameters()]
    assert_close(net, expected)


def test_narrow_parameters_are_accumulated_in_float32(comm: Communicator) -> None:
    """In bfloat16 256 + 1 is 256."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    nn.init.zeros_(net.weight)
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    with CollaborativeOptimizer(inner, comm, target_batch_size=257 * comm.size) as opt:
        for samples in (256, 1):
            opt.zero_grad()
            net.weight.grad = torch.ones_like(net.weight)
            opt.step(samples)
        while opt.local_step == 0:
            opt.step_aux()
        assert net.weight.grad.dtype is torch.bfloat16
        assert net.weight.grad.item() == 1.0


def test_training_in_any_order_keeps_replicas_equal(comm: Communicator) -> None:
    """Nobody waits for anybody here; every step is compared on all ranks by the sum of its parameters."""
    net = mlp(torch.float32)
    sums: dict[int, float] = {}
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=20) as opt:
        for place in range(20 + 7 * comm.rank):
            opt.zero_grad()
            mean_loss(net, *data(1, comm.rank, place, 1 + comm.rank)).backward()
            opt.step(1 + comm.rank)
            sums[opt.local_step] = sum(p.double().sum().item() for p in net.parameters())
    everywhere = comm.allgather(sums)
    for step, value in sums.items():
        assert all(other.get(step, value) == value for other in everywhere)
    assert_replicas_equal(comm, net.parameters())
    assert len(set(comm.allgather(opt.local_step))) == 1


# ---- delayed averaging -------------------------------------------------------------------------------------


def test_delayed_rounds_lose_no_sample_and_count_none_twice(
    comm: Communicator, caplog: pytest.LogCaptureFixture
) -> None:
    """Every gradient is one, so a mean of anything else has lost or doubled a gradient or a count."""
    net = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    nn.init.zeros_(net.weight)
    inner = torch.optim.SGD(net.parameters(), lr=1.0)
    caplog.set_level(logging.INFO)
    options = {"target_batch_size": 4 * comm.size, "delayed_averaging": True, "verbose": True}
    with CollaborativeOptimizer(inner, comm, **options) as opt:
        for _ in range(30 + comm.rank):
            opt.zero_grad()
            net.weight.grad = torch.ones_like(net.weight)
            opt.step(1)
    assert opt.local_step >= 2
    assert net.weight.item() == -opt.local_step
    in_rounds = sum(int(number) for number in re.findall(r"global step \d+: (\d+) samples", caplog.text))
    left = sum(state.samples_accumulated for state in opt.training_states)
    assert in_rounds + left == sum(30 + rank for rank in range(comm.size))


def test_delayed_averaging_goes_on_while_others_are_late(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs somebody who is late")
    net = mlp()
    options = {"target_batch_size": 8, "delayed_averaging": True}
    with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
        if comm.rank == 0:
            for place in range(2):
                opt.zero_grad()
                mean_loss(net, *data(2, 0, place, 8 if place == 0 else 4)).backward()
                opt.step(8 if place == 0 else 4)  # the first makes a round due; the second need not wait
            assert opt.local_step == 0
            assert opt.training_state.samples_accumulated == 12
        comm.Barrier()
        while opt.local_step == 0:
            opt.step_aux()
    assert_replicas_equal(comm, net.parameters())


# ---- mixed precision ---------------------------------------------------------------------------------------


def test_scaled_gradients_are_unscaled_by_each_ranks_own_scale(comm: Communicator) -> None:
    script = [[[4]] * comm.size] * 2
    net = mlp(torch.float32)
    expected = reference(mlp(torch.float32), script, adam)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0 ** (3 + comm.rank))
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=4 * comm.size) as opt:
        for number in range(2):
            opt.zero_grad()
            scaler.scale(mean_loss(net, *data(number, comm.rank, 0, 4))).backward()
            scaler.step(opt, batch_size=4)
            scaler.update()
            while opt.local_step == number:
                opt.step_aux()
    assert_close(net, expected)


def test_overflow_on_one_rank_is_skipped_by_all(comm: Communicator) -> None:
    net = mlp(torch.float32)
    before = [p.detach().clone() for p in net.parameters()]
    inner = adam(net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    options = {"target_batch_size": 4 * comm.size, "scheduler": scheduler}
    with CollaborativeOptimizer(inner, comm, **options) as opt:
        for number in range(2):
            poison = number == 0 and comm.rank == comm.size - 1
            opt.zero_grad()
            loss = mean_loss(net, *data(3, comm.rank, number, 4))
            scaler.scale(loss * float("inf") if poison else loss).backward()
            scaler.step(opt, batch_size=4)
            scaler.update()
            while opt.state_dict()["collaborative"]["version"] == number:
                opt.step_aux()
            if number == 0:
                assert opt.local_step == 0
                assert inner.param_groups[0]["lr"] == 0.05
                assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))
        assert opt.local_step == 1
        assert inner.param_groups[0]["lr"] == 0.025
    assert scaler.get_scale() == (4.0 if comm.rank == comm.size - 1 else 8.0)
    assert_replicas_equal(comm, net.parameters())
    assert all(p.isfinite().all() for p in net.parameters())


def test_scaler_and_reused_buffers_exclude_each_other(comm: Communicator) -> None:
    net = mlp(torch.float32)
    options = {"target_batch_size": 99, "batch_size_per_step": 4, "reuse_grad_buffers": True}
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
        scaler.scale(mean_loss(net, *data(0, 0, 0, 4))).backward()
        with pytest.raises(HpcparError, match="GradScaler"):
            scaler.step(opt)


# ---- use ---------------------------------------------------------------------------------------------------


def test_it_is_a_torch_optimizer(comm: Communicator) -> None:
    net = mlp()
    inner = adam(net.parameters())
    with CollaborativeOptimizer(inner, comm, target_batch_size=8) as opt:
        assert isinstance(opt, torch.optim.Optimizer)
        assert opt.param_groups is inner.param_groups
        torch.optim.lr_scheduler.StepLR(opt, 1)
        assert "CollaborativeOptimizer" in repr(opt)
        with pytest.raises(HpcparError, match="must be known"):
            opt.add_param_group({"params": [nn.Parameter(torch.ones(1))]})


def test_line_per_global_step(comm: Communicator, caplog: pytest.LogCaptureFixture) -> None:
    net = mlp()
    caplog.set_level(logging.INFO)
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=1, verbose=True) as opt:
        mean_loss(net, *data(0, 0, 0, 4)).backward()
        opt.step(4)
    assert f"global step 1: {4 * comm.size} samples, {comm.size} ranks" in caplog.text


def test_zero_grad_raises_where_gradients_are_accumulators(comm: Communicator) -> None:
    options = {"target_batch_size": 8, "batch_size_per_step": 4, "reuse_grad_buffers": True}
    with (
        CollaborativeOptimizer(adam(mlp().parameters()), comm, **options) as opt,
        pytest.raises(HpcparError, match=r"zero_grad\(\) must not be called"),
    ):
        opt.zero_grad()


@pytest.mark.parametrize("batch_size", [None, 0, -3, 2.5, True, "4"])
def test_wrong_batch_size(comm: Communicator, batch_size: object) -> None:
    with CollaborativeOptimizer(adam(mlp().parameters()), comm, target_batch_size=8) as opt:
        with pytest.raises(MismatchError, match="batch_size must be"):
            opt.step(batch_size)
        assert opt.collaboration_state.samples_accumulated == 0


def test_other_batch_size_than_the_one_of_reused_buffers(comm: Communicator) -> None:
    options = {"target_batch_size": 8, "batch_size_per_step": 4, "reuse_grad_buffers": True}
    with (
        CollaborativeOptimizer(adam(mlp().parameters()), comm, **options) as opt,
        pytest.raises(MismatchError, match="batch_size must be batch_size_per_step=4"),
    ):
        opt.step(3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"target_batch_size": 0},
        {"target_batch_size": 2.5},
        {"batch_size_per_step": -1},
        {"step_tolerance": -1},
        {"averaging_timeout": 0.0},
        {"performance_ema_alpha": 0.0},
        {"clip_grad_norm": -1.0},
        {"reuse_grad_buffers": True},
        {"reuse_grad_buffers": True, "batch_size_per_step": 4, "delayed_averaging": True},
        {"reuse_grad_buffers": True, "batch_size_per_step": 4, "accumulate_grads_on": "cpu"},
        {"delayed_averaging": True, "step_tolerance": 0},
    ],
)
def test_wrong_option_on_one_rank_is_an_error_on_all(comm: Communicator, wrong: dict) -> None:
    options = {"target_batch_size": 8, **(wrong if comm.rank == comm.size - 1 else {})}
    with pytest.raises(MismatchError):
        CollaborativeOptimizer(adam(mlp().parameters()), comm, **options)


def test_options_and_parameters_must_be_alike(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("needs another rank")
    is_last = comm.rank == comm.size - 1
    with pytest.raises(MismatchError, match="target_batch_size=8"):
        CollaborativeOptimizer(adam(mlp().parameters()), comm, target_batch_size=9 if is_last else 8)
    net = mlp(torch.float32 if is_last else torch.float64)
    with pytest.raises(MismatchError, match=r"torch\.float32"):
        CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=8)
    with pytest.raises(MismatchError, match="torch optimizer"):
        CollaborativeOptimizer(net if is_last else adam(net.parameters()), comm, target_batch_size=8)


# ---- the end -----------------------------------------------------------------------------------------------


def test_shutdown_twice_and_use_afterwards(comm: Communicator) -> None:
    net = mlp()
    opt = CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=8)
    opt.shutdown()
    opt.shutdown()
    for use in (opt.step, opt.step_aux, opt.load_state_from_peers, lambda: opt.load_state_dict({})):
        with pytest.raises(HpcparError, match=r"after shutdown\(\)"):
            use()
    assert opt.local_step == 0
    assert opt.is_synchronized
    assert len(opt.training_states) == comm.size
    opt.state_dict()


def test_rank_that_leaves_early_assists_with_what_it_has(comm: Communicator) -> None:
    net = mlp()
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=6) as opt:
        for place in range(1 if comm.rank else 5):
            opt.zero_grad()
            mean_loss(net, *data(5, comm.rank, place, 3)).backward()
            opt.step(3)
    assert opt.local_step >= 2
    assert len(set(comm.allgather(opt.local_step))) == 1
    assert_replicas_equal(comm, net.parameters())


def test_two_optimizers_at_once(comm: Communicator) -> None:
    nets = [mlp(seed=1), mlp(seed=2)]
    # A smaller target could be reached without a rank that waits in the other optimizer.
    target = 4 * comm.size
    opts = [CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=target) for net in nets]
    for opt, net in zip(opts, nets, strict=True):
        mean_loss(net, *data(6, comm.rank, 0, 4)).backward()
        opt.step(4)
        while opt.local_step < 1:
            opt.step_aux()
        assert opt.local_step == 1
    for opt in reversed(opts):
        opt.shutdown()
    assert_replicas_equal(comm, [p for net in nets for p in net.parameters()])
