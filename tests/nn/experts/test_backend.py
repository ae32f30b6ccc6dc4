"""Expert backends: they fail without harm, snapshots are exact, and pools serve many callers."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn.experts.backend import ExpertBackend
from tests.nn.experts.backends import (
    DIM,
    Attention,
    D,
    Moody,
    Returning,
    assert_equal,
    backend_of,
    mlp,
    parameters_of,
    reference_step,
)

pytestmark = pytest.mark.local


# ---- buffers and failures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("samples_per_update", [None, 3])
def test_running_statistics_move_once_per_forward(samples_per_update: int | None) -> None:
    expert = mlp(nn.BatchNorm1d(8))
    plain = copy.deepcopy(expert)
    backend = backend_of(expert, samples_per_update=samples_per_update)
    x = torch.randn(8, DIM)
    backend.forward(x)
    backend.forward(x, training=False)
    plain(x)
    moved = copy.deepcopy(list(plain.buffers()))
    assert_equal(list(expert.buffers()), moved)
    got = backend.backward(x, x)
    assert_equal(list(expert.buffers()), moved)
    if samples_per_update is None:
        assert_equal(got, reference_step(plain, [x], [x]))


def test_failing_passes_leave_everything_as_it_was() -> None:
    expert = Moody()
    backend = backend_of(expert, torch.optim.Adam(expert.parameters()), samples_per_update=4)
    good, bad = torch.randn(3, DIM), torch.full((3, DIM), 13.0)
    backend.forward(good)
    backend.backward(good, good)
    state = backend.get_full_state()
    assert state["pending"]["samples"] == 3 and state["model"]["calls"] == 1
    batches = (bad, torch.cat([good, bad]))  # the second fails after an update in its midst
    for batch in batches:
        with pytest.raises(ValueError, match="unlucky"):
            backend.forward(batch)
        with pytest.raises(ValueError, match="unlucky"):
            backend.backward(batch, batch)
        assert_same_state(backend.get_full_state(), state)
        assert all(parameter.grad is None for parameter in expert.parameters())
    backend.backward(good, good)
    assert backend.get_stats() == {"updates": 1, "examples_processed": 6}


def test_failure_inside_of_autograd_leaves_no_gradient() -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            raise ValueError("broken")

    expert = Returning(lambda x, w: Broken.apply(x) * w)
    backend = backend_of(expert)
    state = backend.get_full_state()
    x = torch.randn(3, DIM)
    with pytest.raises(ValueError, match="broken"):
        backend.backward(x, x)
    assert expert.weight.grad is None
    assert_same_state(backend.get_full_state(), state)


def test_cut_batch_that_fails_late_undoes_its_updates() -> None:
    expert = Moody()
    backend = backend_of(expert, torch.optim.Adam(expert.parameters()), samples_per_update=2)
    x = torch.randn(5, DIM)
    x[4] = 13.0
    state = backend.get_full_state()
    with pytest.raises(ValueError, match="unlucky"):
        backend.backward(x, x)
    assert_same_state(backend.get_full_state(), state)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [
        ((torch.zeros(2, DIM + 1), torch.zeros(2, DIM)), "must have shape"),
        ((torch.zeros(2, DIM).double(), torch.zeros(2, DIM)), "must have dtype"),
        ((torch.zeros(2, DIM), torch.zeros(2, DIM).half()), "must have dtype"),
        ((torch.zeros(2, DIM), torch.zeros(3, DIM)), "batch size"),
        ((torch.zeros(2, DIM),), "must be 2, got 1"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs: Sequence[torch.Tensor], reason: str) -> None:
    with pytest.raises(MismatchError, match=reason):
        backend_of(mlp()).backward(*inputs)


def test_output_that_breaks_its_schema_is_refused() -> None:
    function = lambda x, w: x if not x.any() else x.double()  # noqa: E731
    with pytest.raises(MismatchError, match="output must have dtype"):
        backend_of(Returning(function)).forward(torch.ones(2, DIM))
    function = lambda x, w: x if not x.any() else x[:1]  # noqa: E731
    with pytest.raises(MismatchError, match="must have 2 rows"):
        backend_of(Returning(function)).forward(torch.ones(2, DIM))


def test_non_finite_gradient_follows_torch() -> None:
    expert = mlp()
    x = torch.full((1, DIM), float("nan"))
    backend = backend_of(expert)
    backend.backward(x, x)
    assert backend.get_stats()["updates"] == 1 and expert[0].weight.isnan().all()


# ---- state -------------------------------------------------------------------------------------------------


def assert_same_state(got: Any, want: Any) -> None:
    assert type(got) is type(want)
    if isinstance(want, dict):
        assert got.keys() == want.keys()
        for key in want:
            assert_same_state(got[key], want[key])
    elif isinstance(want, (list, tuple)):
        for one, other in zip(got, want, strict=True):
            assert_same_state(one, other)
    elif isinstance(want, torch.Tensor):
        assert torch.equal(got, want)
    else:
        assert got == want


def stateful(expert: nn.Module) -> ExpertBackend:
    optimizer = torch.optim.AdamW(expert.parameters(), lr=0.1)
    return backend_of(expert, optimizer, num_warmup_steps=2, num_total_steps=9, samples_per_update=4)


def test_state_continues_exactly_in_the_middle_of_an_update() -> None:
    first, second = stateful(mlp(nn.BatchNorm1d(8))), stateful(mlp(nn.BatchNorm1d(8)))
    batches = [torch.randn(rows, DIM) for rows in (3, 2, 5, 6)]
    for batch in batches[:2]:
        first.forward(batch)
        first.backward(batch, batch)
    state = first.get_full_state()
    assert sorted(state) == ["model", "optimizer", "pending", "scheduler", "stats"]
    assert state["stats"] == {"updates": 1, "examples_processed": 5} and state["pending"]["samples"] == 1
    copied = copy.deepcopy(state)
    second.load_full_state(state)
    for backend in (first, second):
        for batch in batches[2:]:
            backend.forward(batch)
            backend.backward(batch, batch)
    assert_same_state(second.get_full_state(), first.get_full_state())
    assert_same_state(state, copied)  # neither training nor loading touches the snapshot


def test_state_has_none_where_there_is_nothing() -> None:
    state = backend_of(mlp(), None).get_full_state()
    assert state["optimizer"] is None and state["scheduler"] is None
    assert state["pending"] == {"gradients": {}, "samples": 0}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda state: state.pop("model"), "must have the keys"),
        (lambda state: state["model"].pop("0.weight"), "0.weight"),
        (lambda state: state.update(optimizer=None), "optimizer"),
        (lambda state: state["optimizer"]["param_groups"].clear(), "parameter group"),
        (lambda state: state["pending"].pop("samples"), "samples"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change: Any, reason: str) -> None:
    backend, other = stateful(mlp()), stateful(mlp())
    x = torch.randn(5, DIM)
    backend.backward(x, x)
    before, state = backend.get_full_state(), other.get_full_state()
    change(state)
    with pytest.raises(MismatchError, match=reason):
        backend.load_full_state(state)
    assert_same_state(backend.get_full_state(), before)


def test_snapshots_under_load_are_consistent() -> None:
    expert = Returning(lambda x, w: x * w)
    # A power of two, so that a sum of thousands of steps is exact: a snapshot may wait for many of them.
    backend = backend_of(expert, torch.optim.SGD(expert.parameters(), lr=0.125))
    start = expert.weight.detach().clone()
    x = torch.ones(1, DIM)
    stop = threading.Event()

    def train() -> None:
        while not stop.is_set():
            backend.backward(x, x)

    with ThreadPoolExecutor(2) as executor:
        trainings = [executor.submit(train) for _ in range(2)]
        try:
            for _ in range(20):
                state = backend.get_full_state()
                assert torch.equal(state["model"]["weight"], start - 0.125 * state["stats"]["updates"])
        finally:
            stop.set()  # or the executor waits for them for ever
        for training in trainings:
            training.result(10)


# ---- pools -------------------------------------------------------------------------------------------------


def test_pools_serve_both_passes() -> None:
    expert = mlp(nn.Dropout(0.5))
    plain = copy.deepcopy(expert)
    backend = backend_of(expert, max_batch_size=8)
    forward, backward = backend.get_pools(start=False)
    assert backend.get_pools() == (forward, backward)
    assert (forward.name, backward.name) == ("expert_forward", "expert_backward")
    tasks = [torch.randn(rows, DIM) for rows in (2, 3, 0, 1)]
    futures = [forward.submit_task(task, seed=seed) for seed, task in enumerate(tasks)]
    assert forward.process_batch() and not forward.process_batch()
    for seed, (task, future) in enumerate(zip(tasks, futures, strict=True)):
        torch.manual_seed(seed)
        assert_equal(future.result(0), [plain(task)])
    futures = [backward.submit_task(task, task, seed=seed) for seed, task in enumerate(tasks)]
    assert backward.process_batch()
    assert [future.result(0)[0].shape for future in futures] == [task.shape for task in tasks]
    assert backend.get_stats() == {"updates": 1, "examples_processed": 6}
    with pytest.raises(MismatchError, match="dtype"):
        forward.submit_task(torch.zeros(2, DIM).double())
    with pytest.raises(MismatchError, match="must be 2"):
        backward.submit_task(torch.zeros(2, DIM))


def test_one_bad_backward_task_fails_alone() -> None:
    expert = Moody()
    plain = copy.deepcopy(expert)
    backend = backend_of(expert)
    _, backward = backend.get_pools(start=False)
    good, bad = torch.randn(2, DIM), torch.full((1, DIM), 13.0)
    futures = [backward.submit_task(task, task) for task in (good, bad, good)]
    backward.process_batch()
    with pytest.raises(ValueError, match="unlucky"):
        futures[1].result(0)
    for place in (0, 2):
        assert_equal(futures[place].result(0), reference_step(plain, [good], [good]))
    assert_equal(parameters_of(expert), parameters_of(plain))
    assert backend.get_stats() == {"updates": 2, "examples_processed": 4}


def test_large_request_draws_alike_in_both_pools() -> None:
    backend = backend_of(nn.Sequential(nn.Dropout(0.5)), max_batch_size=4)
    forward, backward = backend.get_pools()
    x = torch.ones(10, DIM)
    other = backward.submit_task(x[:3], x[:3], seed=1)
    (output,) = forward.submit_task(x, seed=9).result(10)
    (grad,) = backward.submit_task(x, x, seed=9).result(10)
    other.result(10)
    assert torch.equal(output, grad)
    backend.shutdown()
    backend.shutdown()
    with pytest.raises(HpcparError, match="shutdown"):
        forward.submit_task(x)


def test_attention_with_a_mask_is_trained_by_many_threads() -> None:
    expert = Attention()
    backend = backend_of(expert, args_schema=(D(None, DIM), D(None, dtype=torch.bool)), samples_per_update=8)
    forward, backward = backend.get_pools()

    def client(number: int) -> None:
        length = 2 + number % 3
        x, mask = torch.randn(2, length, DIM), torch.zeros(2, length, dtype=torch.bool)
        (output,) = forward.submit_task(x, mask, seed=number).result(30)
        grad_x, grad_mask = backward.submit_task(x, mask, F.normalize(output), seed=number).result(30)
        assert grad_x.shape == x.shape and grad_mask is None

    with ThreadPoolExecutor(3) as executor:
        list(executor.map(client, range(12)))
    backend.shutdown()
    assert backend.get_stats() == {"updates": 3, "examples_processed": 24}
