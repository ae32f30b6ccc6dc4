"""Indices for any map-style dataset, shared exactly among ranks: none twice, none left out.

The order of an epoch is one permutation, and ranks take it in turns::

    order    7  2  9  0  4  |  1  8  3  5  6
    rank     0  1  2  0  1  |  2  0  1  2  0

After equally many samples on each rank, what all have taken together is the beginning of the order, whatever
their number. So one number, of the samples that all have consumed, says where an epoch is; global batch *i*
has the same samples on 3 ranks with 20 each as on 2 ranks with 30.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Sampler

from hpcpar.comm import agree, check_alike
from hpcpar.data.shares import check_state, whole_number

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DistributedSampler"]


class DistributedSampler(Sampler[int]):
    """Indices of this rank's share of a dataset. Collective to make; all else is Local.

    Parameters
    ----------
    dataset
        Anything with a length, or the length.
    comm
        The ranks; not used after construction. None: this process takes all.
    shuffle
        Whether each epoch has an order of its own.
    seed
        From 0, the same on all ranks. The global generators are not used.

    Raises
    ------
    TypeError, ValueError
        On the rank that was given something wrong.
    MismatchError
        On all others, and on all when ranks were given different lengths or options.

    Notes
    -----
    Ranks get numbers of samples that differ by one where the length does not divide: the last batch of some
    may be smaller, or missing (see ``DataParallel.join``).
    """

    def __init__(
        self, dataset: Sized | int, comm: Communicator | None = None, *, shuffle: bool = True, seed: int = 0
    ) -> None:
        self._rank, self._ranks = (0, 1) if comm is None else (comm.rank, comm.size)
        self._shuffle, self._seed = bool(shuffle), seed

        def look() -> None:
            self._length = _length(dataset)
            whole_number("seed", seed)

        if comm is None or comm.size == 1:
            look()
        else:
            agree([comm], "a DistributedSampler", look)
            lines = [f"{self._length} samples", f"shuffle={self._shuffle}", f"seed={seed}"]
            check_alike(comm, "a DistributedSampler", lines)
        self._epoch = self._consumed = self._taken = 0  # consumed by all ranks when the iteration began
        self._started = False

    def __iter__(self) -> Iterator[int]:
        """The indices; those of the whole epoch, or after ``load_state_dict``, once, of the rest of it."""
        if self._started:
            self._consumed = 0
        self._started, self._taken = True, 0
        return self._indices(self._epoch, self._order()[self._consumed + self._rank :: self._ranks])

    def __len__(self) -> int:
        """Indices of this rank in the iteration that is in progress, or else in the next."""
        return len(range(self._consumed + self._rank, self._length, self._ranks))

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, 0 at first; nothing happens when it is this one. Local."""
        if whole_number("the epoch", epoch) != self._epoch:
            self._epoch, self._consumed, self._taken, self._started = epoch, 0, 0, False

    def state_dict(self, samples: int | None = None) -> dict[str, Any]:
        """Where the epoch is, to continue it on any number of ranks. Local.

        Parameters
        ----------
        samples
            How many this rank has trained on since the epoch was begun, or continued. None: as many as the
            iteration has handed out, which is right for a ``DataLoader`` without workers. Workers are sent
            indices ahead of time.

        Returns
        -------
        dict
            The same on all ranks that have taken equally many; in an epoch's last, uneven step rank 0's is
            right.
        """
        taken = self._taken if samples is None else whole_number("samples", samples)
        consumed = min(self._consumed + taken * self._ranks, self._length)
        return {**self._identity(), "epoch": self._epoch, "consumed": consumed}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an epoch: the next iteration has what was left of it. Local.

        Raises
        ------
        ValueError
            When the state is of a dataset of another length, or of another order.
        """
        own = {**self._identity(), "epoch": 0, "consumed": 0}
        check_state("a DistributedSampler", state, own, varying=("epoch", "consumed"))
        self._epoch, self._consumed = int(state["epoch"]), int(state["consumed"])
        self._taken, self._started = 0, False

    def _identity(self) -> dict[str, Any]:
        return {"length": self._length, "shuffle": self._shuffle, "seed": self._seed}

    def _order(self) -> Any:
        if not self._shuffle:
            return np.arange(self._length)
        return np.random.default_rng([self._seed, self._epoch]).permutation(self._length)

    def _indices(self, epoch: int, indices: Any) -> Iterator[int]:
        for taken, index in enumerate(indices.tolist(), start=1):
            if epoch == self._epoch:  # an iteration that goes on after set_epoch does not count
                self._taken = taken
            yield index


def _length(dataset: Sized | int) -> int:
    try:
        length = dataset if isinstance(dataset, int) else len(dataset)
    except TypeError:
        raise TypeError(
            f"dataset must have a length, got {type(dataset).__name__}. Pass the length itself"
        ) from None
    if length < 0:
        raise ValueError(f"dataset must have a length from 0, got {length}")
    return length
