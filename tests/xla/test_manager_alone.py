"""What a manager does that needs no other rank: parameters, gradients, devices, deadlines, threads."""

from __future__ import annotations

import gc
import itertools
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from hpcpar.errors import HpcparError, StalledError
from hpcpar.xla import TPUManager
from tests.xla.models import (
    FEATURES,
    Regression,
    Sample,
    assert_gradients,
    close,
    reference,
    samples,
)

pytestmark = pytest.mark.local

BATCH = samples(4)


def make(model: nn.Module, dataset: Any = None, **options: Any) -> TPUManager:
    """Sees the same four samples in every step, on one device."""
    given = {"batch_size_per_device": 4, "devices": [0]} | options
    return TPUManager(model, itertools.cycle(BATCH) if dataset is None else dataset, **given)


def threads_of_hpcpar() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("hpcpar ")]


# ---- gradients ---------------------------------------------------------------------------------------------


def test_gradients_that_were_asked_for_are_a_snapshot() -> None:
    model = Regression()
    with make(model) as manager:
        assert manager.get_aggregated_gradients() == [None] * 4
        manager.step()
        taken = manager.get_aggregated_gradients()
        manager.step()
    _, gradients = reference(model, BATCH)
    assert_gradients(taken, gradients)
    assert_gradients(model, [2 * each for each in gradients if each is not None])


def test_zeroing_by_the_manager_begins_anew() -> None:
    model = Regression()
    with make(model) as manager:
        for _ in range(2):
            manager.zero_grad()
            manager.step()
    assert_gradients(model, reference(model, BATCH)[1])


def test_frozen_and_unused_parameters_keep_no_gradient() -> None:
    class Part(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.unused = nn.Parameter(torch.ones(3))
            self.first.weight.requires_grad_(False)

    model = Part()
    with make(model) as manager:
        loss, _ = manager.step()
    expected, gradients = reference(model, BATCH)
    assert (model.unused.grad, model.first.weight.grad) == (None, None)
    assert_gradients(model, gradients)
    close(loss, expected)


def test_several_devices_accumulate_to_the_gradient_of_all_their_samples(devices: list[torch.device]) -> None:
    data = samples(3 * len(devices) * 4)
    model = Regression()
    with make(model, data, devices=None, grad_accumulation_steps=3) as manager:
        loss, count = manager.step()
        assert manager.devices == devices
    expected, gradients = reference(model, data)
    assert count == len(data)
    close(loss, expected)
    assert_gradients(model, gradients)


@pytest.mark.parametrize("length", [12, 400])
def test_epoch_that_a_loop_has_left_begins_anew(length: int, devices: list[torch.device]) -> None:
    """Whether or not the dataset had been read to its end by then."""
    data = samples(length)
    model = Regression()
    with make(model, data, devices=None, prefetch=2) as manager:
        for _ in manager.epoch():
            break
        again = manager.epoch()
        losses = [next(again)[0]]
        losses += [loss for loss, _ in manager.epoch()]
    number = 4 * len(devices)
    expected = [reference(model, data[first : first + number])[0] for first in range(0, length, number)]
    close(losses, [expected[0], *expected])


def test_dataset_that_blocks_while_its_epoch_is_left_is_an_error_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    go_on = threading.Event()

    def stream() -> Iterator[Sample]:
        yield from BATCH
        go_on.wait(60.0)

    manager = make(Regression(), stream())
    for _ in manager.epoch():
        break
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.5")
    with pytest.raises(StalledError, match=r"the dataset of a TPUManager .* got hpcpar xla reader busy"):
        next(manager.epoch())
    go_on.set()
    manager.shutdown()


def test_error_before_the_first_step_of_an_epoch_takes_nothing_from_it() -> None:
    model = Regression()
    with make(model, samples(12)) as manager:
        assert len(list(manager.epoch())) == 3
        weight = model.first.weight
        model.first.weight = nn.Parameter(weight.detach().clone())
        with pytest.raises(HpcparError, match="must keep its parameters"):
            next(manager.epoch())
        model.first.weight = weight
        state = manager.state_dict()
    with make(model, samples(12)) as manager:
        manager.load_state_dict(state)
        assert len(list(manager.epoch())) == 3


def test_model_may_register_a_cache_in_its_forward_and_be_evaluated_on_the_host() -> None:
    class Caches(Regression):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            if not hasattr(self, "cache"):
                self.register_buffer("cache", torch.ones(FEATURES, device=x.device), persistent=False)
            return super().forward(x * self.cache, y)

    model = Caches()
    with make(model) as manager:
        manager.step()
        batch = default_collate(BATCH)
        with torch.inference_mode():
            model(**batch)
        manager.zero_grad()
        manager.step()
    assert_gradients(model, reference(model, BATCH)[1])


# ---- parameters --------------------------------------------------------------------------------------------

Parameters = Iterable[Tensor] | Mapping[str, Tensor]
KINDS: dict[str, Callable[[nn.Module], Parameters]] = {
    "list": lambda other: [parameter.detach() for parameter in other.parameters()],
    "generator": lambda other: other.parameters(),
    "state": lambda other: other.state_dict(),
}


@pytest.mark.parametrize("kind", KINDS)
def test_new_parameters_reach_the_host_and_the_devices(kind: str) -> None:
    model, other = Regression(seed=0), Regression(seed=1)
    with make(model) as manager:
        manager.step()
        manager.zero_grad()
        manager.update_model_parameters(KINDS[kind](other))
        loss, _ = manager.step()
    expected, gradients = reference(other, BATCH)
    close(loss, expected)
    assert_gradients(model, gradients)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_model_s_own_parameters_stay_what_they_are() -> None:
    model = Regression()
    before = [parameter._version for parameter in model.parameters()]
    with make(model) as manager:
        manager.update_model_parameters(model.parameters())
    assert [parameter._version for parameter in model.parameters()] == before


@pytest.mark.parametrize("change", ["in place", "data", "load"])
def test_devices_follow_what_happens_on_the_host(change: str) -> None:
    model, other = Regression(seed=0), Regression(seed=1)
    with make(model) as manager:
        manager.step()
        if change == "load":
            model.load_state_dict(other.state_dict())
        else:
            for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
                with torch.no_grad():
                    parameter.copy_(new)
                if change == "data":
                    parameter.data = new.data.clone()
        if change == "data":  # of which torch counts nothing
            manager.update_model_parameters(model.parameters())
        loss, _ = manager.step()
    close(loss, reference(other, BATCH)[0])


def wrong_parameters() -> list[Any]:
    good = [parameter.detach() for parameter in Regression(seed=1).parameters()]
    state = Regression(seed=1).state_dict()
    return [
        pytest.param(good[:-1], r"as many as the model's 4, got 3", id="too few"),
        pytest.param([*good, good[0]], r"as many as the model's 4, got 5", id="too many"),
        pytest.param([*good[:3], torch.zeros(7)], r"got \(7,\) for second.bias of \(1,\)", id="shape"),
        pytest.param({**state, "third": good[0]}, r"difference in \['third'\]", id="name"),
        pytest.param({**state, "second.bias": torch.zeros(7)}, r"got \(7,\) for second.bias", id="named"),
    ]


@pytest.mark.parametrize(("new", "words"), wrong_parameters())
def test_parameters_that_do_not_fit_change_nothing(new: Any, words: str) -> None:
    model = Regression(seed=0)
    with make(model) as manager, pytest.raises(ValueError, match=words):
        manager.update_model_parameters(new)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), Regression(seed=0).parameters(), strict=True)
    )


def test_persistent_mask_that_changes_on_the_host_reaches_the_devices() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(FEATURES))
            self.register_buffer("mask", torch.tensor([True, False, True]))

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return torch.where(self.mask, self.weight, 0.0).sum() + 0 * (x.sum() + y.sum())

    model = Masked()
    with make(model) as manager:
        losses = [manager.step()[0]]
        manager.update_model_parameters({"weight": torch.ones(FEATURES), "mask": torch.tensor([True] * 3)})
        losses.append(manager.step()[0])
    close(losses, [2.0, 3.0])


def test_buffers_are_no_reason_for_a_second_state(devices: list[torch.device]) -> None:
    """Constants in a model stay the same to the last bit, over steps and updates."""

    class WithTable(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.tensor([float("-inf"), 0.1, 1e-38]))

    model = WithTable()
    before = model.table.clone()
    with make(model, devices=None) as manager:
        for _ in range(3):
            manager.step()
            manager.update_model_parameters(model.state_dict())
    assert torch.equal(model.table.view(torch.int32), before.view(torch.int32))


def test_devices_follow_the_mode_of_the_model() -> None:
    class Doubling(Regression):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return {"loss": super().forward(x, y)["loss"] * (1 if self.training else 2)}

    model = Doubling()
    with make(model) as manager:
        first, _ = manager.step()
        model.eval()
        second, _ = manager.step()
    close(second, 2 * first)


def replace_parameter(model: Regression) -> None:
    model.first.weight = nn.Parameter(torch.zeros_like(model.first.weight))


def freeze(model: Regression) -> None:
    model.first.requires_grad_(False)


@pytest.mark.parametrize("change", [replace_parameter, freeze], ids=["replaced", "frozen"])
def test_model_must_keep_what_is_to_be_trained(change: Callable[[Regression], None]) -> None:
    model = Regression()
    with make(model) as manager:
        manager.step()
        change(model)
        with pytest.raises(HpcparError, match="the model of a TPUManager must keep"):
            manager.step()


def test_new_parameters_may_be_views_of_the_old_ones() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            both = torch.tensor([1.0, 2.0])
            self.a, self.b = nn.Parameter(both[:1]), nn.Parameter(both[1:])

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return (self.a + 10 * self.b).sum() + 0 * (x.sum() + y.sum())

    model = Two()
    with make(model) as manager:
        manager.update_model_parameters([model.b.detach(), model.a.detach()])
        close(manager.step()[0], 12.0)


# ---- devices -----------------------------------------------------------------------------------------------


def test_devices_may_be_named_or_numbered(devices: list[torch.device]) -> None:
    last = len(devices) - 1
    for wanted in ([last], [str(devices[last])], [devices[last]], last, str(devices[last])):
        with make(Regression(), devices=wanted) as manager:
            assert manager.devices == [devices[last]]
            assert manager.step()[1] == 4
    with make(Regression(), devices=devices[0].type) as manager:
        assert manager.devices == [devices[0]]


@pytest.mark.parametrize("wanted", [[99], [-1], ["cuda:0"], ["nonsense"], [0, 0], []])
def test_devices_that_are_not_there_are_an_error(wanted: Any) -> None:
    with pytest.raises(ValueError, match="devices must"):
        make(Regression(), devices=wanted)
    assert threads_of_hpcpar() == []


# ---- ends --------------------------------------------------------------------------------------------------


def test_no_thread_is_left_after_shutdown() -> None:
    manager = make(Regression(), devices=None)
    manager.step()
    assert threads_of_hpcpar()
    manager.shutdown()
    assert threads_of_hpcpar() == []


def test_no_thread_is_left_when_an_error_leaves_the_with_statement() -> None:
    with pytest.raises(KeyError), make(Regression()) as manager:
        manager.step()
        raise KeyError("in the training loop")
    assert threads_of_hpcpar() == []


def test_manager_that_is_forgotten_ends_its_threads() -> None:
    manager = make(Regression())
    manager.step()
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None
    assert threads_of_hpcpar() == []


def test_forgotten_managers_may_be_found_by_one_of_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    mishaps: list[Any] = []
    monkeypatch.setattr(sys, "unraisablehook", mishaps.append)

    class Holder:
        manager: TPUManager | None = None

    holder, is_forgotten, has_ended = Holder(), threading.Event(), threading.Event()

    def stream() -> Iterator[Sample]:
        yield from BATCH
        is_forgotten.wait(20.0)
        holder.manager = None  # the last reference, in the thread that reads
        has_ended.set()
        yield from BATCH

    manager = make(Regression(), stream())
    manager.step()
    holder.manager = manager
    threads = [*manager._workers._feed.threads]
    del manager
    is_forgotten.set()
    assert has_ended.wait(20.0)
    for thread in threads:
        thread.join(20.0)
    assert threads_of_hpcpar() == []
    assert mishaps == []


def test_dataset_that_blocks_is_an_error_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    go_on = threading.Event()

    def stream() -> Iterator[Sample]:
        yield from 3 * BATCH
        go_on.wait(60.0)

    manager = make(Regression(), stream(), grad_accumulation_steps=2)
    manager.step()  # what is compiled is compiled
    monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.5")
    device = manager.devices[0]
    words = f"within 0.5 s, got {device} is waiting for batch 2 of a step from the dataset"
    with pytest.raises(StalledError, match=words) as caught:
        manager.step()
    assert "rank 0 of 1" in str(caught.value)
    with pytest.raises(HpcparError, match="anew after a failure, got a deadline in step"):
        manager.step()
    manager.shutdown()  # comes back though the dataset does not
    assert not go_on.is_set()
    left = [thread for thread in threading.enumerate() if thread.name.startswith("hpcpar ")]
    go_on.set()
    for thread in left:
        thread.join(20.0)
    assert threads_of_hpcpar() == []


def test_interrupt_leaves_an_unusable_manager_that_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    manager = make(Regression())
    manager.step()

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(manager._workers, "step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.step()
    with pytest.raises(HpcparError, match="got KeyboardInterrupt in step"):
        manager.step()
    manager.shutdown()
    assert threads_of_hpcpar() == []


def test_model_that_cannot_be_copied_is_an_error_of_the_constructor() -> None:
    class NoCopy(Regression):
        def __deepcopy__(self, memo: Any) -> Any:
            raise NotImplementedError("there is only one")

    with pytest.raises(NotImplementedError, match="there is only one"):
        make(NoCopy())
    assert threads_of_hpcpar() == []
