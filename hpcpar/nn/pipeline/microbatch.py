"""Microbatches: a batch cut along its samples, and the outputs put together again.

::

    batch   (x [8, d],  mask Whole [t, t],  scale 0-d,  "gelu")
    0       (x[0:3],    mask,               scale,      "gelu")
    1       (x[3:6],    mask,               scale,      "gelu")
    2       (x[6:8],    mask,               scale,      "gelu")

Every tensor with a dimension 0 is cut there, into views, as ``torch.tensor_split`` cuts: sizes differ by at
most one, larger ones first. With fewer samples than microbatches the last ones are empty, and nothing is
computed for them. What is no batch of samples but has a dimension 0 must be marked :class:`Whole`: in a batch
of T samples, nothing would tell a (T, T) mask from samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.structure import flatten, unflatten

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Microbatch", "Whole", "check_filled", "join", "split"]


class Whole:
    """Marks a part of the inputs that every microbatch gets whole, such as a (T, T) mask.

    Parameters
    ----------
    value
        A tensor or a nested value of tensors. The layers see it without this mark.
    """

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return f"Whole({self.value!r})"


@dataclass(frozen=True, eq=False)
class Microbatch:
    """One part of a batch.

    Attributes
    ----------
    index : int
        Its place in the batch.
    value : object
        What the first layer is called with; ``None`` when it is empty.
    samples : int
        Samples in it, 0 when it is empty.
    total : int
        Samples of the whole batch, so that ``samples / total`` is its weight in a mean.
    """

    index: int
    value: Any
    samples: int
    total: int


def split(value: Any, microbatches: int) -> list[Microbatch]:
    """Cut a batch into microbatches. Local.

    Parameters
    ----------
    value
        A tensor or a nested value. Tensors are cut along dimension 0, into views; 0-d tensors, constants and
        parts marked :class:`Whole` go to every microbatch.
    microbatches
        How many; at least 1.

    Returns
    -------
    list of Microbatch
        ``microbatches`` of them. Sizes differ by at most one, and empty ones are last.

    Raises
    ------
    MismatchError
        When tensors differ in their number of samples, nothing can be cut, the batch is empty, or a tensor
        belongs to an autograd graph.
    """
    if type(microbatches) is not int or microbatches < 1:
        raise MismatchError(f"the number of microbatches must be a positive integer, got {microbatches!r}.")
    leaves, structure = flatten(value, also=Whole)
    for leaf in leaves:
        _check_graph(leaf)
    total = _samples([leaf for leaf in leaves if isinstance(leaf, torch.Tensor) and leaf.dim()])
    smaller, larger_ones = divmod(total, microbatches)
    parts, start = [], 0
    for index in range(microbatches):
        samples = smaller + (index < larger_ones)
        part = None
        if samples:
            part = unflatten(structure, [_cut(leaf, start, samples) for leaf in leaves])
        parts.append(Microbatch(index, part, samples, total))
        start += samples
    return parts


def check_filled(microbatches: Sequence[Microbatch], replicas: Communicator) -> None:
    """Where replicas compute each microbatch together, they must have as many that are not empty. Collective.

    Raises
    ------
    MismatchError
        On every replica, when they have not.
    """
    filled = replicas.allgather(sum(part.samples > 0 for part in microbatches))
    if len(set(filled)) > 1:
        raise MismatchError(
            "batches of replicas whose stages have experts or synchronised batch norm must fill the same "
            f"number of microbatches, got {filled}. Give each replica at least as many samples as there are "
            "microbatches"
        )


def _samples(tensors: Sequence[torch.Tensor]) -> int:
    if not tensors:
        raise MismatchError(
            "the input of a pipeline must have a tensor with samples in dimension 0, got none. 0-d tensors, "
            "constants and what is marked Whole cannot be cut into microbatches."
        )
    first = tensors[0]
    for other in tensors:
        if len(other) != len(first):
            raise MismatchError(
                "tensors in the input of a pipeline must have the same number of samples in dimension 0, got "
                f"shapes {tuple(first.shape)} and {tuple(other.shape)}. Wrap what every microbatch should "
                "get whole in Whole(...)."
            )
    if not len(first):
        raise MismatchError(
            f"a batch must have at least one sample, got a tensor of shape {tuple(first.shape)}."
        )
    return len(first)


def _cut(leaf: torch.Tensor | Whole, start: int, samples: int) -> Any:
    if isinstance(leaf, Whole):
        return leaf.value
    # One view for each: the outputs of split() share a node of the graph and may not be changed in place.
    return leaf.narrow(0, start, samples) if leaf.dim() else leaf


def _check_graph(leaf: torch.Tensor | Whole) -> None:
    if not torch.is_grad_enabled():
        return
    for tensor in flatten(leaf.value)[0] if isinstance(leaf, Whole) else [leaf]:
        if tensor.grad_fn is not None:
            raise MismatchError(
                "the input of a pipeline must not be part of an autograd graph, got a tensor of shape "
                f"{tuple(tensor.shape)} computed by {tensor.grad_fn.name()}: there is a backward pass for "
                "each microbatch, and each would go through that graph. Pass tensor.detach(), or make what "
                "computes it the first layer."
            )


def join(outputs: Sequence[Any]) -> Any:
    """Put the outputs of microbatches together, in their order. Local.

    Parameters
    ----------
    outputs
        Of the microbatches that are not empty; at least one.

    Returns
    -------
    object
        Like each of them, with tensors concatenated along dimension 0 and 0-d tensors stacked to 1-d ones.

    Raises
    ------
    MismatchError
        When the outputs differ in structure, constants, dtypes or in sizes other than that of dimension 0.
    """
    if not outputs:
        raise MismatchError("join must be given the output of at least one microbatch, got none.")
    columns, structure = flatten(outputs[0])
    columns = [[tensor] for tensor in columns]
    for index, output in enumerate(outputs[1:], 1):
        tensors, other = flatten(output)
        if other != structure:
            raise MismatchError(
                "the outputs of all microbatches must have the same structure and constants, got "
                f"{structure} and, as output {index}, {other}."
            )
        for column, tensor in zip(columns, tensors, strict=True):
            column.append(tensor)
    return unflatten(structure, [_join_tensors(column) for column in columns])


def _join_tensors(tensors: list[torch.Tensor]) -> torch.Tensor:
    first = tensors[0]
    for other in tensors[1:]:
        if (first.dim(), first.shape[1:], first.dtype) != (other.dim(), other.shape[1:], other.dtype):
            raise MismatchError(
                "the outputs of all microbatches must have the same dtype, and the same shape from dimension "
                f"1 on, got {tuple(first.shape)} {first.dtype} and {tuple(other.shape)} {other.dtype}."
            )
    if first.dim() == 0:
        return torch.stack(tensors)
    return torch.cat(tensors) if len(tensors) > 1 else first
