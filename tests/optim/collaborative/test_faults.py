"""Where ranks, calls and rounds have got in each other's way; each test has failed once."""

from __future__ import annotations

import copy
import logging
import random
import re
import time

import numpy as np
import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.comm.progress import ENGINE
from hpcpar.errors import HpcparError, MismatchError, RankFailedError
from hpcpar.optim import CollaborativeOptimizer
from hpcpar.optim.collaborative.collaboration import Collaboration
from hpcpar.optim.collaborative.replica import Packed
from hpcpar.optim.collaborative.state_exchange import StateExchange
from tests.nn.training import assert_close, assert_replicas_equal, mlp
from tests.optim.collaborative.scripted import adam, data, mean_loss, reference

pytestmark = [pytest.mark.mpi, pytest.mark.timeout_s(20)]


def zeros(size: int = 4, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.zeros(size, dtype=dtype))


def descent(*parameters: nn.Parameter) -> torch.optim.Optimizer:
    """A step subtracts the mean gradient, so that parameters tell which gradients were averaged."""
    return torch.optim.SGD(parameters, lr=1.0)


def backward(opt: CollaborativeOptimizer, parameter: nn.Parameter, gradient: float = 1.0) -> None:
    opt.zero_grad()
    (gradient * parameter).sum().backward()


def batch(opt: CollaborativeOptimizer, parameter: nn.Parameter, samples: int, gradient: float = 1.0) -> None:
    backward(opt, parameter, gradient)
    opt.step(samples)


def assist_until(opt: CollaborativeOptimizer, step: int) -> None:
    while opt.local_step < step:
        opt.step_aux()


def is_last(comm: Communicator) -> bool:
    return comm.rank == comm.size - 1


def needs(comm: Communicator, size: int) -> None:
    if comm.size < size:
        pytest.skip(f"needs {size} ranks")


def assert_steps(comm: Communicator, parameter: nn.Parameter, steps: int) -> None:
    """All ranks are the replica that so many steps with the gradient one have made."""
    assert set(comm.allgather(steps)) == {steps}
    assert torch.equal(parameter, torch.full_like(parameter, -steps))
    assert_replicas_equal(comm, [parameter])


# ---- rounds that run behind --------------------------------------------------------------------------------


def test_rank_that_looks_in_the_middle_of_its_round_loads_nothing(
    comm: Communicator, caplog: pytest.LogCaptureFixture
) -> None:
    """A thread does its part; others are rounds ahead, without it, when it comes to apply its own."""
    needs(comm, 2)
    caplog.set_level(logging.INFO)
    parameter, drawn = zeros(), 31
    options = {"delayed_averaging": True, "averaging_timeout": 0.05, "step_tolerance": 99, "verbose": True}
    with CollaborativeOptimizer(descent(parameter), comm, target_batch_size=30, **options) as opt:
        batch(opt, parameter, 30)  # all join
        comm.Barrier()
        for _ in range(20):  # all hear of the decision
            assert opt.is_synchronized
            time.sleep(0.005)
        if is_last(comm):
            batch(opt, parameter, 1)  # begins to sum
            comm.Barrier()
            for _ in range(40):
                time.sleep(0.01)
                assert opt.collaboration_state.target_batch_size == 30
        else:
            comm.Barrier()
            batch(opt, parameter, 1)
            while opt.local_step < 3:
                batch(opt, parameter, 10)
                drawn += 10
                time.sleep(0.01)
        for _ in range(3):
            batch(opt, parameter, 10)
            drawn += 10
    assert_steps(comm, parameter, opt.local_step)
    mine = dict(re.findall(r"global step (\d+): (\d+) samples", caplog.text))
    rounds: dict[str, str] = {}
    for others in comm.allgather(mine):
        assert all(rounds.get(step, samples) == samples for step, samples in others.items())
        rounds.update(others)
    assert len(rounds) == opt.local_step
    left = sum(state.samples_accumulated for state in opt.training_states)
    assert sum(map(int, rounds.values())) + left == sum(comm.allgather(drawn))


def test_loop_up_to_a_step_ends_with_that_step(comm: Communicator) -> None:
    """The scheduler raises when it is stepped once too often."""
    parameter, steps = zeros(), 12
    inner = descent(parameter)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(inner, max_lr=0.1, total_steps=steps)
    options = {"target_batch_size": 8, "scheduler": scheduler, "delayed_averaging": True}
    with CollaborativeOptimizer(inner, comm, **options) as opt:
        while opt.local_step < steps:
            batch(opt, parameter, 4)
            time.sleep(0.002 * (1 + comm.rank))
    assert set(comm.allgather(opt.local_step)) == {steps}
    assert scheduler.last_epoch == steps
    assert_replicas_equal(comm, [parameter])


def test_assisting_takes_part_in_a_whole_round_that_runs_behind(comm: Communicator) -> None:
    parameter = zeros()
    options = {"target_batch_size": 10, "delayed_averaging": True}
    with CollaborativeOptimizer(descent(parameter), comm, **options) as opt:
        if comm.rank == 0:
            batch(opt, parameter, 10)
        comm.Barrier()
        if opt.local_step == 0:
            opt.step_aux()
        assert opt.local_step == 1
    assert_steps(comm, parameter, 1)


# ---- two optimizers in one loop ----------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [(32, 40), (4, 5)])
def test_two_optimizers_whose_rounds_are_due_at_different_times(
    comm: Communicator, targets: tuple[int, int]
) -> None:
    parameters = [zeros(), zeros()]
    opts = [
        CollaborativeOptimizer(descent(parameter), comm, target_batch_size=target)
        for parameter, target in zip(parameters, targets, strict=True)
    ]
    pace = random.Random(comm.rank)
    for _ in range(30):
        for opt, parameter in zip(opts, parameters, strict=True):
            time.sleep(0.005 * pace.random())
            batch(opt, parameter, 4)
    for opt in opts:
        opt.shutdown()
    for opt, parameter in zip(opts, parameters, strict=True):
        assert opt.local_step >= 30 * comm.size * 4 // 80
        assert_steps(comm, parameter, opt.local_step)


@pytest.mark.parametrize("late_s", [0.0, 0.02])
def test_gradients_that_wait_keep_their_values_in_a_wait_for_another_optimizer(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, late_s: float
) -> None:
    """Ranks of even number step the first optimizer, the others the second, and so wait for each other.

    What is decided on the other optimizer may be heard when this one's round has begun.
    """
    needs(comm, 2)
    join_meanwhile = Collaboration.join_meanwhile

    def join_late(self: Collaboration, **options: bool) -> None:
        if time.monotonic() > self._joined_s + late_s:
            join_meanwhile(self, **options)

    monkeypatch.setattr(Collaboration, "join_meanwhile", join_late)
    parameters = [zeros(), zeros()]
    opts = [CollaborativeOptimizer(descent(p), comm, target_batch_size=32) for p in parameters]
    now = comm.rank % 2
    later = 1 - now
    for number in range(3):
        backward(opts[now], parameters[now], 1.0)
        backward(opts[later], parameters[later], 5.0)
        opts[now].step(32)
        assist_until(opts[later], 2 * number + 1)
        assert parameters[later].grad.tolist() == [5.0] * 4
        comm.Barrier()
        opts[later].step(32)
        assist_until(opts[now], 2 * number + 2)
        comm.Barrier()
    for opt, parameter in zip(opts, parameters, strict=True):
        opt.shutdown()
        assert opt.local_step == 6
        assert parameter.tolist() == [-18.0] * 4


def test_rank_that_leaves_one_optimizer_goes_on_with_the_other(comm: Communicator) -> None:
    """As those do that end a loop first: the last one still has rounds of the second optimizer to go."""
    parameters = [zeros(), zeros()]
    first, second = (CollaborativeOptimizer(descent(p), comm, target_batch_size=4) for p in parameters)
    for _ in range(3 if comm.rank == 0 else 0):
        batch(second, parameters[1], 4)
    first.shutdown()
    second.shutdown()
    assert first.local_step == 0
    assert_steps(comm, parameters[1], 3)


# ---- failures ----------------------------------------------------------------------------------------------


class FailsOnce:
    """A scheduler, or a hook after the optimizer's step, that fails in its second step."""

    def __init__(self, fails: bool) -> None:
        self.fails, self.steps = fails, 0

    def step(self, *_: object) -> None:
        self.steps += 1
        if self.fails and self.steps == 2:
            raise ValueError("the second step has failed")

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state_dict: dict[str, object]) -> None:
        assert state_dict == {}


@pytest.mark.parametrize("place", ["scheduler", "hook"])
def test_failure_within_a_round_reaches_all_ranks(comm: Communicator, place: str) -> None:
    parameter = zeros()
    inner, fragile = descent(parameter), FailsOnce(is_last(comm))
    if place == "hook":
        inner.register_step_post_hook(fragile.step)
    opt = CollaborativeOptimizer(
        inner,
        comm,
        target_batch_size=10 * comm.size,
        scheduler=fragile if place == "scheduler" else None,
    )
    expected = ValueError if is_last(comm) else RankFailedError
    with pytest.raises(expected, match="the second step has failed"):
        for _ in range(1000):
            batch(opt, parameter, 10)
    for use in (lambda: opt.step(10), opt.step_aux, opt.load_state_from_peers):
        with pytest.raises(HpcparError, match="the second step has failed"):
            use()
    assert opt.local_step <= 2


def test_failure_leaves_nothing_of_a_round_of_some_ranks(comm: Communicator) -> None:
    """Rank 1 joins and fails; rank 0 is in the round by then; the others never came."""
    needs(comm, 3)
    parameter = zeros()
    options = {"target_batch_size": 100, "averaging_timeout": 0.15, "delayed_averaging": True}
    expected = ValueError if comm.rank == 1 else RankFailedError
    with (
        pytest.raises(expected, match="of rank 1"),
        CollaborativeOptimizer(descent(parameter), comm, **options) as opt,
    ):
        if comm.rank == 0:
            batch(opt, parameter, 100)
        elif comm.rank == 1:
            while not opt.collaboration_state.ready_for_step:
                time.sleep(0.001)
            batch(opt, parameter, 1)
        for _ in range(20 if comm.rank == 0 else 0):
            time.sleep(0.02)
            batch(opt, parameter, 1)
        comm.Barrier()
        if comm.rank == 1:
            raise ValueError("failure of rank 1")
        for _ in range(10):
            opt.step_aux()
    assert not [item for item in ENGINE._items if item.needed_by_others]


def test_scale_of_a_step_that_was_refused_is_forgotten(comm: Communicator) -> None:
    parameter = zeros(dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    with CollaborativeOptimizer(descent(parameter), comm, target_batch_size=comm.size) as opt:
        scaler.scale(parameter.sum()).backward()
        with pytest.raises(MismatchError, match="batch_size must be given"):
            scaler.step(opt)
        batch(opt, parameter, 1)
        assist_until(opt, 1)
    assert_steps(comm, parameter, 1)


# ---- gradients ---------------------------------------------------------------------------------------------


def test_sum_of_a_large_batch_fits_a_narrow_wire(comm: Communicator) -> None:
    """4096 samples of gradient 20 are more than float16 can hold."""
    parameter = zeros(1000, torch.float32)
    options = {"target_batch_size": 4096 * comm.size, "wire_dtype": torch.float16, "transport": "mpi"}
    with CollaborativeOptimizer(descent(parameter), comm, **options) as opt:
        batch(opt, parameter, 4096, 20.0)
        assist_until(opt, 1)
    torch.testing.assert_close(parameter.detach(), torch.full((1000,), -20.0), rtol=2e-3, atol=0.0)
    assert_replicas_equal(comm, [parameter])


def test_zero_grad_of_the_module_loses_no_reused_gradient(comm: Communicator) -> None:
    script = [[[4, 4, 4]] * comm.size] * 2
    net = mlp()
    expected = reference(net, script, adam)
    options = {
        "target_batch_size": 12 * comm.size,
        "batch_size_per_step": 4,
        "reuse_grad_buffers": True,
    }
    with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
        for number in range(2):
            for place in range(3):
                net.zero_grad()
                mean_loss(net, *data(number, comm.rank, place, 4)).backward()
                opt.step()
            assist_until(opt, number + 1)
    assert_close(net, expected)


def test_parameter_that_is_trained_later_is_an_error(comm: Communicator) -> None:
    frozen, trained = zeros(5), zeros(4)
    frozen.requires_grad_(False)
    with CollaborativeOptimizer(descent(trained, frozen), comm, target_batch_size=99) as opt:
        batch(opt, trained, 1)
        frozen.requires_grad_(True)
        (frozen.sum() + trained.sum()).backward()
        with pytest.raises(HpcparError, match=r"shape \(5,\) must be trainable"):
            opt.step(1)


def test_gradients_survive_an_assist_before_they_are_counted(comm: Communicator) -> None:
    needs(comm, 2)
    parameter = zeros()
    with CollaborativeOptimizer(descent(parameter), comm, target_batch_size=10) as opt:
        if comm.rank == 0:
            backward(opt, parameter, 100.0)
        elif is_last(comm):
            batch(opt, parameter, 10)
        assist_until(opt, 1)
        if comm.rank == 0:
            opt.step(10)
        assist_until(opt, 2)
    assert parameter.tolist() == [-101.0] * 4


def test_gradients_survive_a_load_before_they_are_counted(comm: Communicator) -> None:
    """Before the load, the round that runs behind comes to its end."""
    parameter = zeros()
    options = {"target_batch_size": 10, "delayed_averaging": True}
    with CollaborativeOptimizer(descent(parameter), comm, **options) as opt:
        if comm.rank == 0:
            batch(opt, parameter, 10)
            backward(opt, parameter, 100.0)
            opt.load_state_from_peers()
            assert opt.local_step == 1
            opt.step(10)
        assist_until(opt, 2)
    assert parameter.tolist() == [-101.0] * 4


# ---- states ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [0, -1])
def test_all_ranks_return_to_an_older_state_one_after_the_other(comm: Communicator, late: int) -> None:
    net = mlp()

    def global_step(number: int) -> None:
        opt.zero_grad()
        mean_loss(net, *data(number, comm.rank, 0, 4)).backward()
        before = opt.local_step
        opt.step(4)
        while opt.local_step == before:
            opt.step_aux()
        assert opt.local_step == before + 1

    expected = reference(net, [[[4]] * comm.size] * 2, adam)
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=4 * comm.size) as opt:
        global_step(0)
        saved = copy.deepcopy((net.state_dict(), opt.state_dict()))
        global_step(8)
        global_step(9)
        comm.Barrier()
        for _ in range(20 if comm.rank == late % comm.size else 1):
            time.sleep(0.01)
            assert opt.collaboration_state.num_peers == comm.size  # looks
        net.load_state_dict(saved[0])
        opt.load_state_dict(saved[1])
        assert opt.local_step == 1
        global_step(1)
        assert opt.local_step == 2
    assert_close(net, expected)
    assert_replicas_equal(comm, net.parameters())


def test_state_of_several_chunks_comes_in_few_looks_of_the_donor(comm: Communicator) -> None:
    """A donor that computes looks once per batch."""
    contents = torch.arange(8000, dtype=torch.int32).to(torch.uint8)
    exchange = StateExchange(comm, lambda: Packed(contents[:5], contents), chunk_bytes=300)
    download = exchange.download((comm.rank + 1) % comm.size, 1)
    exchange.stop()  # it looks when it is told to
    for _ in range(14):
        exchange.progress()
        comm.Barrier()
        for _ in range(10):
            download.advance()
            time.sleep(0.0005)
    assert download.advance()
    assert download.chunks == 27
    assert torch.equal(download.packed.contents, contents)
    comm.Barrier()
    exchange.free()


def test_random_numbers_of_python_and_numpy_come_with_a_state(comm: Communicator) -> None:
    needs(comm, 2)
    parameter = zeros()
    with CollaborativeOptimizer(descent(parameter), comm, target_batch_size=8) as opt:
        random.seed(int(is_last(comm)))
        np.random.seed(int(is_last(comm)))  # noqa: NPY002 - the global generator is what programs use
        if is_last(comm):
            opt.load_state_from_peers()
    draws = (random.random(), float(np.random.rand()))  # noqa: NPY002
    assert len(set(comm.allgather(draws))) == 1


def test_rank_that_turns_to_assisting_computes_at_no_rate(comm: Communicator) -> None:
    needs(comm, 2)
    parameter = zeros()
    with CollaborativeOptimizer(descent(parameter), comm, target_batch_size=4 * comm.size) as opt:
        batch(opt, parameter, 4)
        assert opt.training_state.samples_per_second > 0.0
        assist_until(opt, 1)
        comm.Barrier()
        if not is_last(comm):
            batch(opt, parameter, 4 if comm.rank else 8)
        assist_until(opt, 2)
        assert opt.training_state.samples_per_second == 0.0 or not is_last(comm)


# ---- what is refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_narrow_gradients_are_no_accumulators(comm: Communicator, dtype: torch.dtype) -> None:
    options = {"target_batch_size": 8, "batch_size_per_step": 4, "reuse_grad_buffers": True}
    with pytest.raises(MismatchError, match="reuse_grad_buffers"):
        CollaborativeOptimizer(descent(zeros(dtype=dtype)), comm, **options)


def test_scheduler_on_some_ranks_only(comm: Communicator) -> None:
    needs(comm, 2)
    inner = descent(zeros())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5) if is_last(comm) else None
    with pytest.raises(MismatchError, match="scheduler"):
        CollaborativeOptimizer(inner, comm, target_batch_size=8, scheduler=scheduler)


def test_steps_that_need_more_than_gradients_are_refused(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match="LBFGS"):
        CollaborativeOptimizer(torch.optim.LBFGS([zeros()]), comm, target_batch_size=8)
    inner = descent(zeros())
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(inner)
    with pytest.raises(MismatchError, match="ReduceLROnPlateau"):
        CollaborativeOptimizer(inner, comm, target_batch_size=8, scheduler=plateau)


def test_reused_buffers_are_refused_beside_another_optimizer(comm: Communicator) -> None:
    reused = {"target_batch_size": 8, "reuse_grad_buffers": True, "batch_size_per_step": 4}
    plain = {"target_batch_size": 8}
    for first, second in ((plain, reused), (reused, plain)):
        with (
            CollaborativeOptimizer(adam(mlp().parameters()), comm, **first),
            pytest.raises(MismatchError, match="reuse_grad_buffers"),
        ):
            CollaborativeOptimizer(adam(mlp().parameters()), comm, **second)
