"""Agreement: what all ranks must have been given alike, and failures that all ranks must share.

A pipeline, or a layer of experts, is made and called by all its ranks together. A mistake on one of them
becomes the same error on all, so that none is left waiting in the next collective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from hpcpar.comm.mpi import MPI
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from hpcpar.comm.communicator import Communicator

__all__ = ["agree", "check_alike", "largest_and_smallest"]

T = TypeVar("T")

_NOTHING = -(2**62)


def agree(groups: Sequence[Communicator], subject: str, attempt: Callable[[], T]) -> T:
    """Do something on every rank that may fail on some; then it fails on all. Collective.

    Parameters
    ----------
    groups
        The sets of ranks that this rank belongs to, such as those of a pipeline and the replicas of one of
        its stages. A failure reaches each rank of the others, group by group.
    subject
        What it is for; the subject of the error.
    attempt
        What to do. It may be collective over one of the groups if it fails on all of its ranks or on none.

    Raises
    ------
    MismatchError
        Where the attempt succeeded but another rank's did not. A rank's own error is raised as it is.
    """
    result: list[T] = []
    problem: Exception | None = None
    try:
        result.append(attempt())
    except Exception as error:
        problem = error
    text = None
    if problem is not None:
        text = f"{type(problem).__name__} on rank {groups[0].rank}: {problem}"
    for group in groups:
        text = next((other for other in group.allgather(text) if other is not None), None)
    if problem is not None:
        raise problem
    if text is not None:
        raise MismatchError(f"{subject} must be possible on all ranks, got {text}")
    return result[0]


def check_alike(comm: Communicator, subject: str, lines: Sequence[str]) -> None:
    """Raise on every rank when the ranks' descriptions differ. Collective.

    Raises
    ------
    MismatchError
        Shows the first line that differs from rank 0's.
    """
    everyone = comm.allgather(list(lines))
    for rank, others in enumerate(everyone):
        pairs = zip([*everyone[0], "nothing more"], [*others, "nothing more"], strict=False)
        different = next((pair for pair in pairs if pair[0] != pair[1]), None)
        if different is not None:
            raise MismatchError(
                f"{subject} must be made alike on all ranks, got {different[0]!r} on rank 0 and "
                f"{different[1]!r} on rank {rank}"
            )


def largest_and_smallest(comm: Communicator, facts: Mapping[str, int | None]) -> dict[str, tuple[int, int]]:
    """The largest and the smallest value of each fact over the ranks. Collective, one message.

    Parameters
    ----------
    comm
        The ranks.
    facts
        Integers by name, ``None`` where this rank has none; the same names in the same order on every rank.

    Returns
    -------
    dict
        Where no rank has a value, the largest is smaller than the smallest.
    """
    signed = [_NOTHING if v is None else sign * v for v in facts.values() for sign in (1, -1)]
    if comm.size > 1:
        values = torch.tensor(signed)
        comm.Allreduce(MPI.IN_PLACE, values, MPI.MAX)
        signed = values.tolist()
    return {name: (signed[2 * i], -signed[2 * i + 1]) for i, name in enumerate(facts)}
