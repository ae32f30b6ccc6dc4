"""Indices for any map-style dataset, shared exactly among ranks: none twice, none left out.

The order of an epoch is one permutation, and ranks take it in turns::

    order    7  2  9  0  4  |  1  8  3  5  6
    rank     0  1  2  0  1  |  2  0  1  2  0

After equally many samples on each rank, what all have taken together is the beginning of the order, whatever
their number. So one number, of the samples that all have consumed, says where an epoch is; global batch *i*
has the same samples on 3 ranks with 20 each as on 2 ranks with 30.

Where ranks go at paces of their own, what they have taken has gaps. Then a state has, beside that number, a
list of *rounds*: how many each rank took in turns of what the rounds before it had left.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, SupportsIndex

import numpy as np
from torch.utils.data import Sampler

from hpcpar.comm import agree, check_alike
from hpcpar.data.progress import check_state, gather_taken
from hpcpar.data.shares import in_step, sizes, whole_number

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DistributedSampler"]


class DistributedSampler(Sampler[int]):
    """Indices of this rank's share of a dataset. Collective to make and in ``gather_state``; else Local.

    Parameters
    ----------
    dataset
        Anything with a length, or the length.
    comm
        The ranks; after construction only ``gather_state`` uses it. None: this process takes all.
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
        self,
        dataset: Sized | SupportsIndex,
        comm: Communicator | None = None,
        *,
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        self._comm = comm
        self._rank, self._ranks = (0, 1) if comm is None else (comm.rank, comm.size)
        self._shuffle = bool(shuffle)

        def look() -> None:
            self._length = _length(dataset)
            self._seed = whole_number("seed", seed)

        if comm is None or comm.size == 1:
            look()
        else:
            agree([comm], "a DistributedSampler", look)
            lines = [f"{self._length} samples", f"shuffle={self._shuffle}", f"seed={self._seed}"]
            check_alike(comm, "a DistributedSampler", lines)
        self._epoch = self._run = 0  # iterations are numbered, so that only the last one counts
        self._ended = False
        self._start(0, [])

    def __iter__(self) -> Iterator[int]:
        """The indices of the epoch, or after ``load_state_dict`` of the rest of it."""
        if self._ended:
            self._start(0, [])
        self._run += 1
        self._taken = 0
        return self._indices(self._run, self._left_indices()[self._rank :: self._ranks])

    def __len__(self) -> int:
        """Indices of this rank in the iteration that is in progress, or else in the next."""
        return sizes(self._length if self._ended else self._left, self._ranks)[self._rank]

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, 0 at first; nothing happens when it is this one. Local."""
        number = whole_number("the epoch", epoch)
        if number != self._epoch:
            self._epoch = number
            self._start(0, [])

    def restart(self) -> None:
        """Go to the beginning of this epoch, whatever was loaded or handed out. Local."""
        self._start(0, [])

    def state_dict(self, samples: int | None = None) -> dict[str, Any]:
        """Where the epoch is, to continue it on any number of ranks, if ranks go in step. Local.

        Parameters
        ----------
        samples
            How many this rank has trained on since the epoch was begun, or continued. None: as many as the
            iteration has handed out, which is right for a ``DataLoader`` without workers. Workers are sent
            indices ahead of time. A rank's whole share is the end of the epoch.

        Returns
        -------
        dict
            That of this and of all ranks that have taken equally many, or all of theirs. Where ranks may
            have taken different numbers, use :meth:`gather_state`.
        """
        step = self._steps(samples)
        return self._state([min(step, share) for share in sizes(self._left, self._ranks)])

    def gather_state(self, samples: int | None = None) -> dict[str, Any]:
        """Where the epoch is, whatever each rank has taken; the same on all ranks. Collective.

        Parameters
        ----------
        samples
            As for :meth:`state_dict`, of this rank.

        Raises
        ------
        ValueError
            On the rank that was given something else than a number.
        MismatchError
            On all others then, and on all when ranks are in different epochs.
        """

        def look() -> tuple[list[str], int]:
            place = [f"epoch {self._epoch}", f"consumed {self._consumed}", f"rounds {self._rounds}"]
            return place, min(self._steps(samples), sizes(self._left, self._ranks)[self._rank])

        return self._state(gather_taken(self._comm, self._ranks, "the state of a DistributedSampler", look))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an epoch, by a state of either kind: the next iteration has what was left of it. Local.

        That place holds until an iteration has come to its end, or ``set_epoch`` goes to another epoch.

        Raises
        ------
        ValueError
            When the state is of a dataset of another length, or of another order.
        """
        own = {**self._identity(), "epoch": 0, "consumed": 0, "rounds": []}
        check_state("a DistributedSampler", state, own, varying=("epoch", "consumed", "rounds"))
        epoch = whole_number("the epoch of a state", state["epoch"])
        consumed = whole_number("the samples consumed in a state", state["consumed"])
        rounds = [[whole_number("samples in a round", own) for own in each] for each in state["rounds"]]
        self._check_rounds(consumed, rounds)
        self._epoch = epoch
        self._start(consumed, rounds)

    def _check_rounds(self, consumed: int, rounds: list[list[int]]) -> None:
        left = self._length - consumed
        for taken in rounds:
            shares = sizes(max(left, 0), max(len(taken), 1))
            fits = bool(taken) and all(own <= share for own, share in zip(taken, shares, strict=True))
            left = left - sum(taken) if fits else -1
        if left < 0:
            raise ValueError(
                f"a state must have consumed some of {self._length} samples, got {consumed} and then {rounds}"
            )

    def _start(self, consumed: int, rounds: list[list[int]]) -> None:
        """Iterations begin here: after the first ``consumed`` of the order, and the rounds after them."""
        self._consumed, self._rounds = consumed, rounds
        self._left = self._length - consumed - sum(map(sum, rounds))
        self._taken = 0
        self._ended = False
        self._run += 1

    def _steps(self, samples: int | None) -> int:
        """How many each rank has taken, if they go in step."""
        number = self._taken if samples is None else whole_number("samples", samples)
        shares = sizes(self._left, self._ranks)
        done = self._ended if samples is None else number and number >= shares[self._rank]
        return shares[0] if done else number

    def _state(self, taken: list[int]) -> dict[str, Any]:
        consumed, rounds = self._consumed, self._rounds
        step = in_step(taken, sizes(self._left, self._ranks))
        if sum(taken) == self._left:
            consumed, rounds = self._length, []
        elif step is not None and not rounds:
            consumed += sum(taken)
        elif sum(taken):
            rounds = [*rounds, taken]
        return {**self._identity(), "epoch": self._epoch, "consumed": consumed, "rounds": rounds}

    def _identity(self) -> dict[str, Any]:
        return {"length": self._length, "shuffle": self._shuffle, "seed": self._seed}

    def _left_indices(self) -> Any:
        """What is left of the epoch's order where an iteration begins."""
        if self._shuffle:
            left = np.random.default_rng([self._seed, self._epoch]).permutation(self._length)
        else:
            left = np.arange(self._length)
        left = left[self._consumed :]
        for taken in self._rounds:
            left = left[_untaken(len(left), taken)]
        return left

    def _indices(self, run: int, indices: Any) -> Iterator[int]:
        for taken, index in enumerate(indices.tolist(), start=1):
            if run == self._run:  # an iteration that goes on after another has begun does not count
                self._taken = taken
            yield index
        if run == self._run:
            self._ended = True

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_comm": None}


def _untaken(length: int, taken: Sequence[int]) -> Any:
    """A mask of what is left of a sequence when rank r has taken the first ``taken[r]`` of its turns."""
    left = np.ones(length, bool)
    for rank, own in enumerate(taken):
        left[rank : rank + own * len(taken) : len(taken)] = False
    return left


def _length(dataset: Sized | SupportsIndex) -> int:
    try:
        length = len(dataset)  # type: ignore[arg-type]
    except TypeError:  # a number of any type, or a tensor that is one
        try:
            length = operator.index(dataset)  # type: ignore[arg-type]
        except TypeError:
            raise TypeError(f"dataset must have a length or be one, got {type(dataset).__name__}") from None
    if length < 0:
        raise ValueError(f"dataset must have a length from 0, got {length}")
    return length
