"""A replica on a device makes the sums that plain torch makes on the host, whatever the model is made of."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.xla.batches import Batch, Microbatch
from hpcpar.xla.feed import DeviceMicrobatch, upload_batch
from hpcpar.xla.model_state import ModelState
from hpcpar.xla.replica import Replica, call, find_loss
from tests.xla.models import assert_gradients, close

pytestmark = pytest.mark.local

SIZE = 4


class Tied(nn.Module):
    """An encoder whose weight is the decoder's, too."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(SIZE, SIZE, bias=False)
        self.decoder = nn.Linear(SIZE, SIZE)
        self.decoder.weight = self.encoder.weight

    def forward(self, x: Tensor) -> Tensor:
        return (self.decoder(self.encoder(x).tanh()) - x).square().mean()


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(SIZE, SIZE)
        self.other = nn.Linear(SIZE, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x).square().mean()


class Full(Plain):
    """Nothing is unused."""

    def forward(self, x: Tensor) -> Tensor:
        return self.other(self.used(x)).square().mean()


def frozen() -> nn.Module:
    model = Full()
    model.used.weight.requires_grad_(False)
    return model


def with_hook() -> nn.Module:
    model = Full()
    model.used.register_forward_hook(lambda module, inputs, output: 3 * output)
    return model


MODELS: dict[str, Callable[[], nn.Module]] = {
    "plain": Full,
    "some unused": Plain,
    "tied": Tied,
    "frozen": frozen,
    "with a hook": with_hook,
    "float64": lambda: Full().double(),
}


def inputs(dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(3, SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)


def on_device(
    data: Any,
    replica: Replica,
    *,
    weight: float = 3.0,
    updates: bool = True,
    dtype: torch.dtype | None = None,
) -> DeviceMicrobatch:
    batch = Batch(3, (Microbatch(data, weight, updates),))
    return upload_batch(batch, replica.device, dtype or torch.float32).parts[0]


def split(sums: Tensor, state: ModelState) -> tuple[list[Tensor], float, Tensor]:
    """Gradients of trainable parameters, the loss, and the changes of buffers."""
    shapes = [state.parameters[index].shape for index in state.trainable]
    *gradients, loss, changes = sums.split(
        [*(shape.numel() for shape in shapes), 1, sum(buffer.numel() for buffer in state.tracked)]
    )
    return [part.view(shape) for part, shape in zip(gradients, shapes, strict=True)], loss.item(), changes


@pytest.mark.parametrize("kind", MODELS)
def test_sums_are_gradients_and_loss_times_samples(kind: str, device: torch.device) -> None:
    model = MODELS[kind]()
    state = ModelState(model)
    replica = Replica(state, device)
    first, second = inputs(state.dtype, seed=1), inputs(state.dtype, seed=2)
    for is_first, x in ((True, second), (True, first), (False, second)):  # the second begins anew
        used = replica.add(on_device(x, replica, dtype=state.dtype), is_first=is_first)
    gradients, loss, _ = split(replica.take(), state)
    expected = 3 * (model(first) + model(second))
    expected.backward()
    trainable = [state.parameters[index] for index in state.trainable]
    assert used == {index for index, p in enumerate(trainable) if p.grad is not None}
    assert_gradients(gradients, [torch.zeros_like(p) if p.grad is None else p.grad for p in trainable])
    close(loss, expected.item())
    assert gradients[0].dtype == state.dtype


def test_float64_is_summed_in_float64(device: torch.device) -> None:
    model = Full().double()
    state = ModelState(model)
    replica = Replica(state, device)
    replica.add(on_device(inputs(torch.float64), replica, dtype=state.dtype), is_first=True)
    gradients, _, _ = split(replica.take(), state)
    model(inputs(torch.float64)).backward()
    for got, parameter in zip(gradients, state.parameters, strict=True):
        torch.testing.assert_close(got, 3 * parameter.grad, rtol=1e-13, atol=1e-14)


def test_parameters_of_16_bits_are_summed_in_float32(device: torch.device) -> None:
    model = Full().bfloat16()
    state = ModelState(model)
    replica = Replica(state, device)
    replica.add(on_device(inputs(torch.bfloat16), replica), is_first=True)
    replica.add(on_device(inputs(torch.bfloat16), replica, weight=1 / 256), is_first=False)
    gradients, _, _ = split(replica.take(), state)
    model(inputs(torch.bfloat16)).backward()
    for got, parameter in zip(gradients, state.parameters, strict=True):
        expected = (3 + 1 / 256) * parameter.grad.float()
        torch.testing.assert_close(got, expected, rtol=3e-2, atol=1e-2)  # a gradient of 8 bits
        # The small addend would be lost in 8 bits; in float32 the sum is a multiple of it.
        exact = got / (3 + 1 / 256)
        assert torch.equal(exact, exact.bfloat16().float())


def test_ties_hold_on_the_device_and_survive_new_parameters(device: torch.device) -> None:
    model = Tied()
    state = ModelState(model)
    replica = Replica(state, device)
    with torch.no_grad():
        model.encoder.weight.add_(1.0)
    replica.load(state)
    copied = replica.model
    assert isinstance(copied, Tied)
    assert copied.encoder.weight is copied.decoder.weight
    assert torch.equal(copied.decoder.weight.detach().cpu(), model.encoder.weight.detach())
    assert copied.encoder.weight is not model.encoder.weight


# ---- buffers -----------------------------------------------------------------------------------------------


class Buffers(nn.Module):
    """One of each kind. The first three are changed by a forward, which may put in another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        self.register_buffer("mean", torch.zeros(SIZE))
        self.register_buffer("count", torch.tensor(5))
        self.register_buffer("tied", torch.zeros(2))
        self.inner = nn.Module()
        self.inner.register_buffer("tied", self.tied)
        self.register_buffer("table", torch.tensor([float("-inf"), 1e-30, float("inf"), 0.1]))
        self.register_buffer("mask", torch.tensor([True, False, True, True]))
        self.register_buffer("scratch", torch.full((SIZE,), 2.0), persistent=False)
        self.register_buffer("none", None)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        self.mean = 0.5 * self.mean + 0.5 * x.detach().mean(0)
        self.count += 1
        self.tied.add_(1.0)
        if self.fails:
            raise ArithmeticError("in the middle")
        return torch.where(self.mask, self.weight * x * self.scratch, 0.0).mean()


NAMES = ["mean", "count", "tied", "table"]


@dataclass
class Setting:
    model: Buffers
    state: ModelState
    replica: Replica

    def changes(self) -> dict[str, Tensor]:
        flat = split(self.replica.take(), self.state)[2]
        sizes = [buffer.numel() for buffer in self.state.tracked]
        return dict(zip(NAMES, flat.split(sizes), strict=True))


@pytest.fixture
def setting(device: torch.device) -> Setting:
    model = Buffers()
    state = ModelState(model)
    return Setting(model, state, Replica(state, device))


def test_tracked_buffers_are_persistent_numbers_each_once(setting: Setting) -> None:
    model = setting.model
    expected = [model.mean, model.count, model.tied, model.table]
    assert all(a is b for a, b in zip(setting.state.tracked, expected, strict=True))
    copied = setting.replica.model
    assert isinstance(copied, Buffers)
    assert copied.inner.tied is copied.tied
    assert all(
        not torch.is_tensor(v) or v.device.type == setting.replica.device.type for v in copied.buffers()
    )


def test_changes_of_buffers_come_back_and_constants_have_none(setting: Setting) -> None:
    x = inputs()
    for is_first in (True, False):
        setting.replica.add(on_device(x, setting.replica), is_first=is_first)
    changes = setting.changes()
    close(changes["mean"], 0.75 * x.mean(0))
    assert (changes["count"].tolist(), changes["tied"].tolist()) == ([2.0], [2.0, 2.0])
    assert changes["table"].tolist() == [0.0] * 4


def test_pass_that_only_fills_up_changes_no_buffers(setting: Setting) -> None:
    replica, x = setting.replica, inputs()
    replica.add(on_device(x, replica), is_first=True)
    replica.add(on_device(x, replica, updates=False), is_first=False)
    assert setting.changes()["count"].tolist() == [1.0]
    replica.add(on_device(x, replica), is_first=True)  # goes on from there
    close(setting.changes()["mean"], 0.75 * x.mean(0))


def test_new_values_from_the_host_are_what_changes_count_from(setting: Setting) -> None:
    with torch.no_grad():
        setting.model.mean.fill_(7.0)
        setting.model.inner.tied.fill_(3.0)
    setting.replica.load(setting.state)
    copied = setting.replica.model
    assert isinstance(copied, Buffers)
    assert copied.inner.tied is copied.tied
    x = inputs()
    setting.replica.add(on_device(x, setting.replica), is_first=True)
    changes = setting.changes()
    close(changes["mean"], 0.5 * (x.mean(0) - 7.0))
    assert changes["tied"].tolist() == [1.0, 1.0]


def test_model_that_raises_leaves_buffers_and_gradients_as_they_were(setting: Setting) -> None:
    replica, x = setting.replica, inputs()
    assert isinstance(replica.model, Buffers)
    replica.add(on_device(x, replica), is_first=True)
    before = replica.take()
    replica.model.fails = True
    with pytest.raises(ArithmeticError, match="in the middle"):
        replica.add(on_device(x, replica), is_first=False)
    replica.model.fails = False
    assert torch.equal(replica.take(), before)
    replica.add(on_device(x, replica), is_first=False)
    gradients, _, changes = split(replica.take(), setting.state)
    close(gradients[0], 2 * split(before, setting.state)[0][0])
    assert changes[SIZE] == 2.0


def test_mean_changes_are_added_to_the_host_and_zero_leaves_every_bit(setting: Setting) -> None:
    model = setting.model
    before = copy.deepcopy(model.state_dict())
    changes = torch.cat([torch.full((SIZE,), 0.5), torch.tensor([1.6]), torch.ones(2), torch.zeros(SIZE)])
    setting.state.change_tracked(changes)
    assert model.mean.tolist() == [0.5] * SIZE
    assert (model.count.item(), model.count.dtype) == (7, torch.int64)
    assert model.inner.tied.tolist() == [1.0, 1.0]
    for name in ("table", "mask"):
        assert torch.equal(model.state_dict()[name], before[name])


# ---- models that cannot be ---------------------------------------------------------------------------------


def nothing_to_train() -> nn.Module:
    return nn.Linear(2, 2).requires_grad_(False)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.ReLU(), "require a gradient, got none"),
        (nothing_to_train(), "require a gradient, got none"),
        (nn.Linear(2, 2, device="meta"), "on the host, got weight on meta"),
        (nn.ParameterList([torch.zeros(2, dtype=torch.complex64)]), "real numbers, got 0"),
    ],
)
def test_model_must_be_one_that_can_be_trained_here(model: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelState(model)


# ---- losses and calls --------------------------------------------------------------------------------------

LOSS = torch.tensor(2.0, requires_grad=True)
ONE = torch.tensor([[3.0]], requires_grad=True)


@pytest.mark.parametrize(
    "output",
    [
        LOSS,
        {"logits": None, "loss": LOSS},
        SimpleNamespace(loss=LOSS, logits=None),
        (LOSS, "more"),
        [LOSS],
    ],
    ids=["tensor", "mapping", "attribute", "tuple", "list"],
)
def test_loss_is_found_in_every_kind_of_output(output: Any) -> None:
    assert torch.equal(find_loss(output), LOSS)


def test_loss_of_one_element_counts_as_scalar() -> None:
    assert find_loss(ONE).shape == ()


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        (None, TypeError, "as a tensor, got NoneType"),
        (3.0, TypeError, "as a tensor, got float"),
        ((), TypeError, "as a tensor, got NoneType"),
        ({"losses": LOSS}, ValueError, r"'loss', got \['losses'\]"),
        ({"loss": 1.0}, TypeError, "as a tensor, got float"),
        (SimpleNamespace(loss=None), TypeError, "as a tensor, got SimpleNamespace"),
        (torch.ones(2, requires_grad=True), ValueError, r"scalar, got a tensor of shape \(2,\)"),
        (torch.tensor(1.0), ValueError, "require a gradient, got one without"),
    ],
)
def test_output_without_a_loss_says_what_is_wrong(output: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        find_loss(output)


def test_model_is_called_as_the_batch_says() -> None:
    class Echo(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    model = Echo()
    assert call(model, {"a": 1, "b": 2}) == ((), {"a": 1, "b": 2})
    assert call(model, (1, 2)) == ((1, 2), {})
    assert call(model, [1, 2]) == ((1, 2), {})
    assert call(model, "x") == (("x",), {})
