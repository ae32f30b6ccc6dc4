"""Means over all samples of all ranks, exact: the same bits on every rank and for every number of ranks.

A loss that is averaged over batches and then over ranks depends on how samples fell into them, and a sum of
floats on the order. Here sums are exact (:mod:`hpcpar.data.exact_sum`) and the mean is rounded once, to
float64. So a metric tells two runs apart only if their samples' values differ.

What ranks exchange are two whole numbers each, of some hundred bytes, however many the samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from hpcpar.data.exact_sum import UNITS_OF_ONE, ExactSum, quotient
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Mean", "mean"]

Values = torch.Tensor | npt.ArrayLike
_ONE = np.int8(1)


def mean(values: Values, weights: Values | None = None, comm: Communicator | None = None) -> float:
    """The mean of all values of all ranks, rounded once. Collective.

    Parameters
    ----------
    values
        Of this rank, any number of them, also none: a tensor, an array, a list or a number; of integers,
        booleans or floats of up to 64 bits.
    weights
        One for each value, or one number for all, such as the size of the batch that a loss is the mean of.
    comm
        The ranks; None for this process alone.

    Returns
    -------
    float
        The sum of ``values * weights`` by the sum of the weights. NaN and infinities come through.

    Raises
    ------
    ValueError, TypeError
        When the weights sum to zero (there is no sample), on all ranks; or on the rank whose values are of
        another kind, or weights of another shape.
    MismatchError
        On all others then.
    """
    result = Mean(comm)
    return result._compute(lambda: result.update(values, weights))


class Mean:
    """A mean that is collected over many steps. Collective is only :meth:`compute`.

    Parameters
    ----------
    comm
        The ranks; None for this process alone.

    Examples
    --------
    >>> accuracy = hpcpar.data.Mean(comm)
    >>> for images, labels in data.batches(64):
    ...     accuracy.update(model(images).argmax(1) == labels)
    >>> accuracy.compute()
    """

    def __init__(self, comm: Communicator | None = None) -> None:
        self._comm = comm
        self.reset()

    def update(self, values: Values, weights: Values | None = None) -> None:
        """Add values of this rank, as for :func:`mean`. Local."""
        array = _array("values", values)
        if weights is None:
            self._total.add(array.reshape(-1), np.broadcast_to(_ONE, array.size))
            self._weight.units += array.size * UNITS_OF_ONE
            return
        weighing = _array("weights", weights)
        if weighing.size == 1:
            weighing = np.broadcast_to(weighing.reshape(()), array.shape)
        if weighing.shape != array.shape:
            raise ValueError(
                f"weights must be one number or of the shape {array.shape}, got {weighing.shape}"
            )
        self._total.add(array.reshape(-1), weighing.reshape(-1))
        self._weight.add(weighing.reshape(-1), np.broadcast_to(_ONE, array.size))

    def compute(self) -> float:
        """The mean over all ranks and updates; they go on counting. Collective.

        Raises
        ------
        ValueError
            When the weights sum to zero, on all ranks.
        """
        return self._compute(lambda: None)

    def reset(self) -> None:
        """Begin again. Local."""
        self._total, self._weight = ExactSum(), ExactSum()

    def state_dict(self) -> dict[str, Any]:
        """The sums of this rank: each rank has its own. Local."""
        sums = {"total": self._total, "weight": self._weight}
        return {name: [hex(part.units), part.beside] for name, part in sums.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from sums. They may be any rank's, once each: the mean is over all ranks. Local."""
        self._total, self._weight = (
            ExactSum(int(state[name][0], 16), float(state[name][1])) for name in ("total", "weight")
        )

    def _compute(self, prepare: Callable[[], None]) -> float:
        """The mean, after something that may fail on this rank: one message for both."""
        problem: Exception | None = None
        try:
            prepare()
        except Exception as error:
            problem = error
        text = None if problem is None else f"{type(problem).__name__}: {problem}"
        mine = (text, self._total, self._weight)
        everyone = [mine] if self._comm is None else self._comm.allgather(mine)
        if problem is not None:
            raise problem
        total, weight = ExactSum(), ExactSum()
        for rank, (wrong, part, part_weight) in enumerate(everyone):
            if wrong is not None:
                raise MismatchError(f"a mean must be possible on all ranks, got {wrong} on rank {rank}")
            total.merge(part)
            weight.merge(part_weight)
        if not weight.units and not weight.beside:
            raise ValueError(
                "a mean must be over weights that do not sum to zero, got no samples, or only such weights"
            )
        return quotient(total, weight)


def _array(name: str, values: Values) -> npt.NDArray[Any]:
    if isinstance(values, torch.Tensor):
        tensor = values.detach().cpu()
        if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float64, torch.float32):
            tensor = tensor.double()  # numpy lacks bfloat16
        array = tensor.resolve_neg().numpy()
    else:
        array = np.asarray(values)
        array = array.astype(np.float64) if array.size == 0 and array.dtype.kind == "O" else array
    if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
        raise TypeError(f"{name} must be integers, booleans or floats of up to 64 bits, got {array.dtype}")
    return array
