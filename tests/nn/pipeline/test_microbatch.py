"""Microbatches: nothing is lost or copied by cutting, and joining is the way back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.microbatch import Microbatch, Whole, join, split

pytestmark = pytest.mark.local


def same_storage(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@pytest.mark.parametrize(
    ("samples", "microbatches"), [(1, 1), (7, 1), (6, 3), (7, 3), (8, 3), (3, 3), (3, 4), (1, 7)]
)
def test_bare_tensor_is_cut_as_tensor_split_cuts(samples: int, microbatches: int) -> None:
    x = torch.randn(samples, 2)
    parts = split(x, microbatches)
    expected = torch.tensor_split(x, microbatches)
    assert [part.index for part in parts] == list(range(microbatches))
    for part, reference in zip(parts, expected, strict=True):
        assert (part.samples, part.total) == (len(reference), samples)
        if len(reference):
            assert torch.equal(part.value, reference)
            assert same_storage(part.value, x)
        else:
            assert part.value is None
    assert torch.equal(join([part.value for part in parts if part.samples]), x)


def test_nested_tensors_are_cut_and_the_rest_goes_to_every_microbatch() -> None:
    mask, scale = torch.ones(5, 5), torch.tensor(2.0)
    value = {"x": torch.arange(4), "rest": [torch.arange(8).view(4, 2), scale, "gelu"], "mask": Whole(mask)}
    first, second = (part.value for part in split(value, 2))
    assert (first["x"].tolist(), second["x"].tolist()) == ([0, 1], [2, 3])
    assert (first["rest"][0].tolist(), second["rest"][0].tolist()) == ([[0, 1], [2, 3]], [[4, 5], [6, 7]])
    for part in (first, second):
        assert part["mask"] is mask
        assert part["rest"][1] is scale
        assert part["rest"][2] == "gelu"


def test_whole_may_hold_a_nested_value() -> None:
    inner = {"bias": torch.zeros(3), "heads": 2}
    assert all(part.value[1] is inner for part in split((torch.zeros(4, 1), Whole(inner)), 2))


def test_split_and_join_of_a_nested_value_is_the_value() -> None:
    value = {"x": torch.randn(7, 3), "pair": (torch.randn(7), 5)}
    joined = join([part.value for part in split(value, 3)])
    assert torch.equal(joined["x"], value["x"])
    assert torch.equal(joined["pair"][0], value["pair"][0])
    assert joined["pair"][1] == 5


def test_leaf_gets_the_gradients_of_all_microbatches() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    scale = torch.tensor(3.0, requires_grad=True)
    for part in split((x, Whole(scale)), 2):
        (part.value[0] * part.value[1]).sum().backward()
    assert torch.equal(x.grad, torch.full((5, 3), 3.0))
    torch.testing.assert_close(scale.grad, x.detach().sum())


def test_view_may_be_changed_in_place() -> None:
    x = torch.ones(4, 2)
    with torch.enable_grad():
        for part in split(x, 2):
            part.value.mul_(part.index)
    assert x.tolist() == [[0, 0], [0, 0], [1, 1], [1, 1]]


@pytest.mark.parametrize("where", ["tensor", "nested", "whole"])
def test_part_of_a_graph_is_refused(where: str) -> None:
    hidden = torch.ones(4, 2, requires_grad=True) * 2
    x = torch.zeros(4)
    value = {"tensor": hidden, "nested": (x, [hidden]), "whole": (x, Whole({"h": hidden}))}[where]
    with pytest.raises(
        MismatchError, match=r"part of an autograd graph, got .*\(4, 2\).*MulBackward.*detach"
    ):
        split(value, 2)
    with torch.no_grad():  # there will be no backward pass
        assert len(split(value, 2)) == 2


def test_different_numbers_of_samples_are_refused_with_both_shapes() -> None:
    with pytest.raises(MismatchError, match=r"\(4, 2\) and \(3, 3\). Wrap .*Whole"):
        split((torch.zeros(4, 2), torch.zeros(4), torch.zeros(3, 3)), 2)


@pytest.mark.parametrize(
    "value", [5, (), torch.tensor(1.0), Whole(torch.zeros(4)), {"a": Whole(torch.zeros(4)), "b": "text"}]
)
def test_input_without_samples_is_refused(value: Any) -> None:
    with pytest.raises(MismatchError, match="must have a tensor with samples in dimension 0"):
        split(value, 2)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"at least one sample, got a tensor of shape \(0, 3\)"):
        split(torch.zeros(0, 3), 2)


@pytest.mark.parametrize("microbatches", [0, -1, True, 1.0, None])
def test_number_of_microbatches_must_be_a_positive_integer(microbatches: Any) -> None:
    with pytest.raises(MismatchError, match="must be a positive integer"):
        split(torch.zeros(4), microbatches)


def test_losses_are_stacked() -> None:
    joined = join([(torch.tensor(1.0), torch.zeros(2, 3)), (torch.tensor(2.0), torch.ones(1, 3))])
    assert joined[0].tolist() == [1.0, 2.0]
    assert joined[1].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1]]
    assert join([torch.tensor(1.0)]).tolist() == [1.0]


def test_join_keeps_the_graph() -> None:
    leaves = [torch.ones(2, requires_grad=True), torch.ones(1, requires_grad=True)]
    (join([leaf * 2 for leaf in leaves]) * torch.tensor([1.0, 2.0, 3.0])).sum().backward()
    assert [leaf.grad.tolist() for leaf in leaves] == [[2.0, 4.0], [6.0]]


@pytest.mark.parametrize(
    ("one", "other", "message"),
    [
        (torch.zeros(2), (torch.zeros(2),), "same structure"),
        ((torch.zeros(2), 1), (torch.zeros(2), 2), "same structure and constants"),
        (torch.zeros(2, 3), torch.zeros(2, 4), r"\(2, 3\) torch.float32 and \(2, 4\)"),
        (torch.zeros(2), torch.zeros(()), "same shape"),
        (torch.zeros(()), torch.zeros(1), "same shape"),
        (torch.zeros(2), torch.zeros(2).double(), "same dtype"),
    ],
)
def test_outputs_that_do_not_fit_together_are_refused(one: Any, other: Any, message: str) -> None:
    with pytest.raises(MismatchError, match=message):
        join([one, other])
    with pytest.raises(MismatchError, match=message):
        join([one, one, other])


def test_join_of_nothing_is_refused() -> None:
    with pytest.raises(MismatchError, match="at least one microbatch"):
        join([])


def test_microbatches_compare_by_identity() -> None:
    one, other = Microbatch(0, torch.zeros(2), 2, 2), Microbatch(0, torch.zeros(2), 2, 2)
    assert one != other  # and no ambiguous truth value of a tensor
