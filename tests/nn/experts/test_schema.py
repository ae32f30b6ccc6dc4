"""Schemas: calls come apart and together again, and a call that does not fit is refused with the reason."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.schema import ExpertSchema, descriptors_in

pytestmark = pytest.mark.local

D = BatchTensorDescriptor
TOKENS = D(None, dtype=torch.int64)
SCHEMA = ExpertSchema(
    (D(3), {"scale": D(), "bias": D(3, dtype=torch.float64)}),
    {"tokens": TOKENS, "mask": [D(2, dtype=torch.bool), None]},
    (D(4), {"counts": D(dtype=torch.int32)}),
)


def call(rows: int = 2, length: int = 5) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args = (
        torch.randn(rows, 3),
        {"bias": torch.randn(rows, 3, dtype=torch.float64), "scale": torch.randn(rows)},
    )
    kwargs = {
        "mask": [torch.ones(rows, 2, dtype=torch.bool), None],
        "tokens": torch.arange(rows * length).reshape(rows, length),
    }
    return args, kwargs


def test_descriptor_describes_one_sample() -> None:
    descriptor = BatchTensorDescriptor(3, None, dtype=torch.bfloat16, requires_grad=True)
    assert descriptor.shape == (3, None)
    assert (descriptor.dtype, descriptor.device) == (torch.bfloat16, "cpu")
    assert descriptor.requires_grad and descriptor.is_differentiable and not descriptor.has_fixed_shape
    assert descriptor == BatchTensorDescriptor(3, None, dtype=torch.bfloat16, requires_grad=True)
    assert len({descriptor, D(3, None), D(3, None)}) == 2


def test_descriptor_from_tensor_leaves_the_batch_out() -> None:
    assert D.from_tensor(torch.zeros(7, 2, 3, dtype=torch.int8)) == D(2, 3, dtype=torch.int8)
    assert D.from_tensor(torch.zeros(7, requires_grad=True)) == D(requires_grad=True)
    with pytest.raises(MismatchError, match="first axis"):
        D.from_tensor(torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64, torch.int64, torch.bool])
def test_dummy_batches_fit_their_descriptor(dtype: torch.dtype) -> None:
    descriptor = D(3, None, dtype=dtype)
    for batch in (descriptor.make_zeros(2), descriptor.make_random(2), descriptor.make_zeros(0)):
        descriptor.check(batch, "batch")
    assert descriptor.make_zeros(2, free_length=5).shape == (2, 3, 5)
    assert D(3, requires_grad=True).make_random(2).requires_grad


@pytest.mark.parametrize("shape", [(-1,), (2.0,), ("a",), (True,), ((2, 3),)])
def test_shape_that_is_no_shape_is_refused(shape: tuple[Any, ...]) -> None:
    with pytest.raises(MismatchError, match="must be made of lengths"):
        D(*shape)


def test_integer_with_gradient_is_refused() -> None:
    with pytest.raises(MismatchError, match="floating"):
        D(3, dtype=torch.int64, requires_grad=True)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.zeros(2, 4), r"x must have shape \(batch, 3, any\), got \(2, 4\)"),
        (torch.zeros(2, 4, 5), r"must have shape \(batch, 3, any\), got \(2, 4, 5\)"),
        (torch.zeros(2, 3, 5, 1), "must have shape"),
        (torch.zeros(2, 3, 5, dtype=torch.float64), "x must have dtype torch.float32, got torch.float64"),
        (torch.tensor(1.0), "must have shape"),
        ([1.0], "x must be a tensor, got a list"),
    ],
)
def test_check_tells_what_is_wrong(value: object, reason: str) -> None:
    with pytest.raises(MismatchError, match=reason):
        D(3, None).check(value, "x")


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_call_comes_apart_and_together_again(rows: int) -> None:
    args, kwargs = call(rows)
    tensors = SCHEMA.flatten_call(args, kwargs)
    wanted = [args[0], args[1]["bias"], args[1]["scale"], kwargs["mask"][0], kwargs["tokens"]]
    assert all(tensor is want for tensor, want in zip(tensors, wanted, strict=True))
    assert SCHEMA.check_inputs(tensors) == rows
    back_args, back_kwargs = SCHEMA.unflatten_call(tensors)
    assert back_args[1]["scale"] is args[1]["scale"] and back_kwargs["mask"] == [kwargs["mask"][0], None]
    assert type(back_args) is tuple and type(back_kwargs["mask"]) is list


def test_facts_of_a_schema() -> None:
    assert SCHEMA.keyword_names == ("mask", "tokens")
    assert (SCHEMA.num_inputs, SCHEMA.num_outputs) == (5, 2)
    assert SCHEMA.differentiable_inputs == (True, True, True, False, False)
    assert SCHEMA.differentiable_outputs == (True, False)
    assert SCHEMA.grad_outputs == (D(4),)


def test_outputs_come_apart_and_together_again() -> None:
    outputs = (torch.zeros(2, 4), {"counts": torch.zeros(2, dtype=torch.int32)})
    flat = SCHEMA.flatten_outputs(outputs)
    assert flat[1] is outputs[1]["counts"]
    again = SCHEMA.unflatten_outputs(flat)
    assert type(again) is tuple and again[1]["counts"] is flat[1]
    with pytest.raises(MismatchError, match="output must have 2 parts, got a Tensor"):
        SCHEMA.flatten_outputs(flat[0])


def change(part: str, value: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args, kwargs = call()
    if part == "args":
        return value(args), kwargs
    return args, value(kwargs)


@pytest.mark.parametrize(
    ("part", "value", "reason"),
    [
        ("args", lambda args: args[:1], "must have 2 arguments, got 1"),
        ("args", lambda args: (args[0], args[1], args[0]), "must have 2 arguments, got 3"),
        ("args", lambda args: (args[0].double(), args[1]), "argument 0 must have dtype"),
        ("args", lambda args: (args[0], args[0]), r"argument 1 must be a dict .*\['bias', 'scale'\]"),
        ("args", lambda args: (args[0], {"bias": args[1]["bias"]}), r"got \['bias'\]"),
        ("args", lambda args: (args[0][:1], args[1]), r"batch size must be the same .*\[1, 2, 2, 2, 2\]"),
        ("kwargs", lambda kwargs: {}, r"keywords .* must be \['mask', 'tokens'\], got \[\]"),
        ("kwargs", lambda kwargs: {**kwargs, "other": 1}, r"got \['mask', 'other', 'tokens'\]"),
        ("kwargs", lambda kwargs: {**kwargs, "mask": [None, None]}, r"'mask'\[0\] must be a tensor"),
        ("kwargs", lambda kwargs: {**kwargs, "mask": [*kwargs["mask"][:1], 1]}, r"'mask'\[1\] must be None"),
        ("kwargs", lambda kwargs: {**kwargs, "mask": kwargs["mask"][:1]}, "must have 2 parts, got 1 parts"),
    ],
)
def test_call_that_does_not_fit_is_refused_with_the_reason(part: str, value: Any, reason: str) -> None:
    with pytest.raises(MismatchError, match=reason):
        SCHEMA.flatten_call(*change(part, value))


def test_flat_tensors_are_checked_by_number() -> None:
    tensors = SCHEMA.flatten_call(*call())
    with pytest.raises(MismatchError, match="must be 5, got 4"):
        SCHEMA.check_inputs(tensors[1:])
    with pytest.raises(MismatchError, match=r"number 3, must have dtype torch\.bool"):
        SCHEMA.check_inputs([*tensors[:3], tensors[3].float(), tensors[4]])
    with pytest.raises(MismatchError, match="number of tensors must be 5"):
        SCHEMA.unflatten_call(tensors[1:])
    assert SCHEMA.check_backward([*tensors, torch.zeros(2, 4)]) == 2
    with pytest.raises(MismatchError, match="batch size"):
        SCHEMA.check_backward([*tensors, torch.zeros(3, 4)])


def test_plain_form_survives_json() -> None:
    plain = json.loads(json.dumps(SCHEMA.to_plain()))
    again = ExpertSchema.from_plain(plain)
    assert again == SCHEMA and hash(again) == hash(SCHEMA)
    assert descriptors_in(again.args) == descriptors_in(SCHEMA.args)
    assert again.inputs == SCHEMA.inputs and again.kwargs["tokens"].shape == (None,)


def test_plain_form_of_an_unknown_dtype_is_refused() -> None:
    plain = SCHEMA.to_plain()
    plain["args"][0][2] = "manual_seed"
    with pytest.raises(MismatchError, match="dtype"):
        ExpertSchema.from_plain(plain)


def test_different_schemas_are_unequal() -> None:
    assert ExpertSchema((D(3),), {}, D(4)) != ExpertSchema((D(3),), {}, (D(4),))
    assert ExpertSchema((D(3),), {}, D(4)) != ExpertSchema((), {"x": D(3)}, D(4))
    assert ExpertSchema((), {"a": D(1), "b": D(2)}, D(4)) == ExpertSchema((), {"b": D(2), "a": D(1)}, D(4))


@pytest.mark.parametrize(
    ("args", "outputs"), [((), D(3)), ((D(3),), None), ((torch.zeros(2),), D(3)), (({1: D(3)},), D(3))]
)
def test_schema_of_something_else_is_refused(args: tuple[Any, ...], outputs: Any) -> None:
    with pytest.raises(MismatchError):
        ExpertSchema(args, {}, outputs)
