"""The exceptions that hpcpar raises, one family under :class:`HpcparError`.

Every message has the same shape, so that a user who reads the log of one rank out of a thousand knows
what happened, where, and what to do::

    <subject> must <rule>, got <value> (rank r of p). <remedy>

An exception that describes other ranks carries their numbers as attributes, so that programs need not
parse the text.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "CheckpointError",
    "CommunicatorFreedError",
    "DatasetEndedError",
    "HpcparError",
    "LauncherError",
    "MismatchError",
    "RankFailedError",
    "RemoteExpertError",
    "ScheduleError",
    "StalledError",
    "TopologyError",
]


class HpcparError(RuntimeError):
    """Base class of every error that hpcpar raises on purpose."""


class RankFailedError(HpcparError):
    """Other ranks died, or left the job, while this rank needed them.

    Parameters
    ----------
    ranks
        The failed ranks, numbered in the communicator of the failed operation.
    message
        What this rank was doing; a default names the ranks only.
    """

    def __init__(self, ranks: Sequence[int], message: str | None = None) -> None:
        self.ranks = tuple(ranks)
        super().__init__(message or f"{_name_ranks(self.ranks)} failed")


class StalledError(HpcparError):
    """A wait reached its deadline (``HPCPAR_TIMEOUT_S``, default 600 s, 0 means never).

    Parameters
    ----------
    operation
        What this rank was waiting in, such as ``"Allreduce"``.
    waiting_for
        Ranks from which nothing was heard, numbered in the communicator of the operation.
    message
        The whole text; a default is made from the two other arguments.
    """

    def __init__(self, operation: str, waiting_for: Sequence[int], message: str | None = None) -> None:
        self.operation = operation
        self.waiting_for = tuple(waiting_for)
        super().__init__(message or f"{operation} is still waiting for {_name_ranks(self.waiting_for)}")


class MismatchError(HpcparError):
    """Ranks disagree about something on which they must agree: a model, an operation, a count."""


class TopologyError(HpcparError):
    """Ranks, nodes or grid axes do not fit together."""


class LauncherError(TopologyError):
    """The program was started by the launcher of one MPI and runs with the library of another."""


class ScheduleError(HpcparError):
    """A pipeline schedule is incomplete, contradictory, or would deadlock."""


class CommunicatorFreedError(HpcparError):
    """A communicator, or something built on one, was used after it was freed."""


class DatasetEndedError(HpcparError, StopIteration):
    """A step was asked for behind the end of the dataset, of which the step before had told."""


class CheckpointError(HpcparError):
    """A checkpoint file is missing, truncated, corrupt, or not one of ours."""


class RemoteExpertError(HpcparError):
    """An expert on another rank failed; the message carries the remote traceback."""


def _name_ranks(ranks: Sequence[int]) -> str:
    if not ranks:
        return "no rank in particular"
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    return "ranks " + ", ".join(map(str, ranks))
