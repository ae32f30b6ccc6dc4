"""Experts on disk, each in a file of its own, named by its uid.

An expert is the unit that moves: training that goes on with another number of ranks serves or holds the same
experts elsewhere, and every rank reads the files of those that are its own by then::

    2 ranks   expert.0  expert.1 | expert.2  expert.3        expert.0.h5  expert.1.h5
    3 ranks   expert.0 | expert.1 | expert.2  expert.3       expert.2.h5  expert.3.h5

What can be saved is whatever has ``get_full_state`` and ``load_full_state``: the backends of a server, and
the experts of a synchronous layer with their part of the optimizer (:func:`hpcpar.nn.layer_experts`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from hpcpar.checkpoint.state_file import read_state, write_state
from hpcpar.errors import CheckpointError, HpcparError

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Replicated", "Restorable", "load_experts", "save_experts"]


class Restorable(Protocol):
    """Something with a state that can be taken and given back."""

    def get_full_state(self) -> dict[str, Any]:
        """A copy of the state."""

    def load_full_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""


@runtime_checkable
class Replicated(Restorable, Protocol):
    """Something of which several ranks may have a copy, each with a part of the state of its own.

    Attributes
    ----------
    replicas : object
        ``None`` for something that has no other copies.
    """

    replicas: Any

    def replica_part(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """What a state has of its own."""

    def with_replica_parts(
        self, state: Mapping[str, Any], parts: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """A state with the parts of other copies."""

    def without_replica_part(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """A state without a part, for all copies but one."""


def save_experts(
    folder: str | os.PathLike[str], experts: Mapping[str, Restorable], comm: Communicator
) -> None:
    """Write each expert to ``<folder>/<uid>.h5``. Collective.

    Parameters
    ----------
    folder
        Made if need be; all ranks must see the same one.
    experts
        Those of this rank by uid. One that several ranks have (replicas) is written by the first of them,
        with what the others have accumulated for the next update.
    comm
        All ranks that have some, or none.

    Raises
    ------
    CheckpointError
        On every rank, when one could not write. Files of single experts are always whole.
    """
    states: dict[str, Any] = {}

    def take() -> None:
        states.update((uid, experts[uid].get_full_state()) for uid in sorted(experts))

    _together(take, comm)
    parts = comm.allgather({uid: _replica_part(experts[uid], state) for uid, state in states.items()})
    earlier = {uid for others in parts[: comm.rank] for uid in others}

    def write() -> None:
        for uid in sorted(set(experts) - earlier):
            expert = experts[uid]
            later = [others[uid] for others in parts[comm.rank + 1 :] if others.get(uid) is not None]
            if later and isinstance(expert, Replicated):
                states[uid] = expert.with_replica_parts(states[uid], later)
            write_state(_path(folder, uid), states[uid])

    _together(write, comm)


def load_experts(
    folder: str | os.PathLike[str], experts: Mapping[str, Restorable], comm: Communicator
) -> None:
    """Give each expert the state in ``<folder>/<uid>.h5``. Collective.

    Parameters
    ----------
    folder, experts, comm
        As in :func:`save_experts`; the number of ranks, and who has which experts, may differ.

    Raises
    ------
    CheckpointError
        On every rank, when a file is missing, damaged, or does not fit its expert. Experts before it may have
        been loaded.
    """
    owners = comm.allgather(sorted(experts))
    earlier = {uid for uids in owners[: comm.rank] for uid in uids}

    def read() -> None:
        for uid in sorted(experts):
            path, expert = _path(folder, uid), experts[uid]
            state = read_state(path)
            try:
                if uid in earlier and isinstance(expert, Replicated):
                    state = expert.without_replica_part(state)
                expert.load_full_state(state)
            except HpcparError as error:
                raise CheckpointError(f"{path} must fit expert {uid!r}: {error}") from error

    _together(read, comm)


def _replica_part(expert: Restorable, state: dict[str, Any]) -> dict[str, Any] | None:
    """What a copy's state has of its own, to be added to that of the first; ``None`` for nothing."""
    if isinstance(expert, Replicated) and expert.replicas is not None:
        return expert.replica_part(state)
    return None


def _path(folder: str | os.PathLike[str], uid: str) -> Path:
    if not uid or "/" in uid or uid.startswith("."):
        raise CheckpointError(f"uid must be fit for a file name, got {uid!r}")
    return Path(folder) / f"{uid}.h5"


def _together(action: Callable[[], None], comm: Communicator) -> None:
    """Raise on every rank what went wrong on any. Collective."""
    problem = None
    try:
        action()
    except CheckpointError as error:
        problem = str(error)
    except Exception as error:
        problem = f"a state must be taken and given without errors, got {type(error).__name__}: {error}"
    problems = [(rank, text) for rank, text in enumerate(comm.allgather(problem)) if text is not None]
    if problems:
        rank, text = problems[0]
        raise CheckpointError(f"{text} (rank {rank} of {comm.size})")
