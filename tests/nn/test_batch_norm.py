"""SyncBatchNorm equals torch's batch normalisation of the whole batch in one process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.nn import SyncBatchNorm, convert_sync_batchnorm
from tests.nn.training import wrap

pytestmark = pytest.mark.mpi

CHANNELS = 3
KINDS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
EVEN = [2, 2, 2, 2]
UNEVEN = [3, 1, 5, 2]
SOME_EMPTY = [4, 0, 3, 0]


def whole_batch(rows: Sequence[int], axes: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(rows))
    shape = (sum(rows), CHANNELS, *[2, 3, 2][:axes])
    values = torch.randn(*shape, generator=generator, dtype=torch.float64) * 3 + 100
    return list(values.to(dtype).split(list(rows)))


def check(comm: Communicator, rows: Sequence[int], axes: int, dtype: torch.dtype, **options: Any) -> None:
    rows = list(rows)[: comm.size]
    kind = KINDS[max(axes, 1)]
    parameters = options.pop("parameters", dtype)
    reference = kind(CHANNELS, dtype=parameters, **options)
    if reference.affine:
        nn.init.uniform_(reference.weight)
        nn.init.uniform_(reference.bias)
    layer = convert_sync_batchnorm(copy.deepcopy(reference), comm)
    assert isinstance(layer, SyncBatchNorm)
    for _ in range(3):
        parts = whole_batch(rows, axes, dtype)
        x, whole = parts[comm.rank].clone().requires_grad_(), torch.cat(parts).requires_grad_()
        y, expected = layer(x), reference(whole)
        assert y.dtype == dtype
        weights = torch.cos(torch.arange(whole.numel(), dtype=torch.float64)).view(whole.shape).to(dtype)
        mine = slice(sum(rows[: comm.rank]), sum(rows[: comm.rank + 1]))
        (y * weights[mine]).sum().backward()
        (expected * weights).sum().backward()
        close = {"rtol": 5e-2, "atol": 5e-2} if dtype.itemsize == 2 else {}
        if dtype is torch.float32:
            close = {"rtol": 1e-4, "atol": 1e-4}
        torch.testing.assert_close(y, expected[mine], **close)
        torch.testing.assert_close(x.grad, whole.grad[mine], **close)
        assert x.grad.dtype == dtype
    if reference.affine:
        for name in ("weight", "bias"):
            gradient = getattr(layer, name).grad
            comm.Allreduce(gradient.clone(), gradient)
            torch.testing.assert_close(gradient, getattr(reference, name).grad, **close)
    if reference.track_running_stats:
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(layer, name), getattr(reference, name), **close)
    layer.eval()
    reference.eval()
    torch.testing.assert_close(layer(x), reference(x), **close)


@pytest.mark.parametrize("axes", [0, 1, 2, 3])
def test_equals_batch_norm_of_the_whole_batch(comm: Communicator, axes: int) -> None:
    for rows in (EVEN, UNEVEN, SOME_EMPTY):
        for dtype in (torch.float64, torch.float32):
            check(comm, rows, axes, dtype)


def test_options_are_those_of_batch_norm(comm: Communicator) -> None:
    check(comm, UNEVEN, 2, torch.float64, momentum=None)
    check(comm, UNEVEN, 2, torch.float64, momentum=0.3, eps=1e-2)
    check(comm, UNEVEN, 2, torch.float64, affine=False)
    check(comm, EVEN, 1, torch.float64, affine=False, momentum=None)


def test_narrow_inputs_and_parameters(comm: Communicator) -> None:
    check(comm, UNEVEN, 2, torch.bfloat16, parameters=torch.float32)
    check(comm, UNEVEN, 2, torch.bfloat16)


def test_evaluation_is_local_with_and_without_running_statistics(comm: Communicator) -> None:
    x = whole_batch(EVEN, 2, torch.float64)[comm.rank]
    for track in (True, False):
        layer = SyncBatchNorm(CHANNELS, track_running_stats=track, comm=comm, dtype=torch.float64).eval()
        if comm.rank == comm.size - 1:
            expected = nn.BatchNorm2d(CHANNELS, track_running_stats=track, dtype=torch.float64).eval()
            torch.testing.assert_close(layer(x), expected(x))


def test_training_without_running_statistics(comm: Communicator) -> None:
    check_parts = whole_batch(UNEVEN[: comm.size], 2, torch.float64)
    layer = SyncBatchNorm(CHANNELS, track_running_stats=False, comm=comm, dtype=torch.float64)
    reference = nn.BatchNorm2d(CHANNELS, track_running_stats=False, dtype=torch.float64)
    expected = reference(torch.cat(check_parts)).split(UNEVEN[: comm.size])[comm.rank]
    torch.testing.assert_close(layer(check_parts[comm.rank]), expected)


def test_one_value_per_channel_cannot_be_normalised(comm: Communicator) -> None:
    layer = SyncBatchNorm(CHANNELS, comm=comm)
    x = torch.ones(1 if comm.rank == 0 else 0, CHANNELS)
    if comm.size > 1:
        with pytest.raises(ValueError, match="more than one value per channel"):
            layer(x)


def test_wrong_shape_is_refused(comm: Communicator) -> None:
    with pytest.raises(ValueError, match=r"must have shape \(batch, 3"):
        SyncBatchNorm(CHANNELS, comm=comm)(torch.ones(2, 4))


def test_second_derivative_is_refused_rather_than_wrong(comm: Communicator) -> None:
    if comm.size == 1:
        pytest.skip("one rank uses torch's own layer")
    layer = SyncBatchNorm(CHANNELS, comm=comm)
    x = torch.randn(4, CHANNELS, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_conversion_reaches_every_layer_and_keeps_tensors(comm: Communicator) -> None:
    shared = nn.BatchNorm1d(4)
    net = nn.Sequential(
        nn.Linear(4, 4),
        nn.Sequential(nn.BatchNorm1d(4, momentum=None), nn.ReLU()),
        shared,
        shared,
        nn.BatchNorm1d(4, affine=False, track_running_stats=False).eval(),
        nn.InstanceNorm1d(4),
    )
    names = list(net.state_dict())
    tensors = dict(net.named_parameters()) | dict(net.named_buffers())
    converted = convert_sync_batchnorm(net, comm)
    assert converted is net
    assert list(net.state_dict()) == names
    for name, tensor in {**dict(net.named_parameters()), **dict(net.named_buffers())}.items():
        assert tensor is tensors[name]
    kinds = [type(module).__name__ for module in (net[1][0], net[2], net[3], net[4], net[5])]
    assert kinds == ["SyncBatchNorm"] * 4 + ["InstanceNorm1d"]
    assert net[1][0].momentum is None
    assert not net[4].training
    assert convert_sync_batchnorm(net[2], comm) is net[2]


def test_copies_work(comm: Communicator) -> None:
    layer = SyncBatchNorm(CHANNELS, comm=comm, dtype=torch.float64)
    parts = whole_batch(EVEN[: comm.size], 1, torch.float64)
    expected = nn.BatchNorm1d(CHANNELS, dtype=torch.float64)(torch.cat(parts)).chunk(comm.size)[comm.rank]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(twin(parts[comm.rank]), expected)


def test_data_parallel_network_with_synchronised_layers_equals_one_process(comm: Communicator) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(CHANNELS, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.Conv1d(4, 2, 1)).double()
    reference = copy.deepcopy(net)
    for blocking in (False, True):
        mine = convert_sync_batchnorm(copy.deepcopy(net), comm)
        model = wrap(mine, comm, blocking_parameter_updates=blocking)
        parts = whole_batch(EVEN[: comm.size], 1, torch.float64)
        reference.load_state_dict(net.state_dict())
        reference.zero_grad()
        reference(torch.cat(parts)).square().mean().backward()
        model(parts[comm.rank]).square().mean().backward()
        for parameter, other in zip(mine.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad, other.grad)
        for buffer, other in zip(mine.buffers(), reference.buffers(), strict=True):
            torch.testing.assert_close(buffer, other)
        model.free()
