"""A failure that all ranks of a step share: the rank that has it raises it, the others say whose it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hpcpar.errors import RankFailedError, StalledError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["share_failure"]


def share_failure(comm: Communicator | None, own: Exception | None, where: str) -> tuple[Exception, bool]:
    """Exchange what has failed. Collective.

    Parameters
    ----------
    comm
        The ranks, of which at least one has failed; None for this one alone.
    own
        The error of this rank, if it has one.
    where
        Place of this rank.

    Returns
    -------
    error : Exception
        What this rank should raise.
    is_final : bool
        Whether a rank cannot go on, because one of its devices is still busy.
    """
    text = None if own is None else f"{type(own).__name__}: {own}"
    mine = (text, isinstance(own, StalledError))
    everyone = [mine] if comm is None else comm.allgather(mine)
    is_final = any(is_stuck for _, is_stuck in everyone)
    if own is not None:
        return own, is_final
    failed = {rank: text for rank, (text, _) in enumerate(everyone) if text is not None}
    first, cause = next(iter(failed.items()))
    place = f"rank {first} of {len(everyone)}"
    message = f"TPUManager.step() must succeed on all ranks, got on {place}: {cause} ({where})"
    return RankFailedError(tuple(failed), message), is_final
