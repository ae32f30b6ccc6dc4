"""The position: how far the training of this rank is, and how to go on from there in another job.

::

    samples of the epoch     | skipped, by jobs before | taken, by this one | read ahead | ...

What was read ahead is on its way to the devices, so a sampler cannot know what was used; the steps do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Position"]


class Position:
    """Counts the steps and samples of a manager.

    Parameters
    ----------
    comm
        The ranks, or None for this one alone.
    keepers
        The manager's sampler and dataset. The first that has ``gather_state``, ``load_state_dict`` and
        ``restart``, as those of :mod:`hpcpar.data`, keeps the place in the epoch.

    Attributes
    ----------
    steps, samples : int
        Since the training began: steps that had samples, and samples of all ranks.
    skipped : int
        Samples of this rank at the beginning of the epoch, which are not to be read again.
    """

    def __init__(self, comm: Communicator | None, *keepers: Any) -> None:
        self._comm = comm
        wanted = ("gather_state", "load_state_dict", "restart")
        able = (each for each in keepers if all(hasattr(each, name) for name in wanted))
        self._keeper: Any = next(able, None)
        self.steps = self.samples = self.skipped = 0
        self._taken = 0
        self._is_between_epochs = False

    @property
    def rank(self) -> int:
        """Of this process. Local."""
        return 0 if self._comm is None else self._comm.rank

    @property
    def size(self) -> int:
        """Number of ranks. Local."""
        return 1 if self._comm is None else self._comm.size

    def go_to(self, taken: int) -> None:
        """So many samples of this rank are gone from the epoch, besides those that were skipped. Local."""
        self._taken, self._is_between_epochs = taken, False

    def start_epoch(self) -> None:
        """The dataset, or the sampler, begins again with the next step. Local."""
        self.skipped = self._taken = 0
        self._is_between_epochs = True

    def restart(self) -> None:
        """The keeper goes back to the beginning of its epoch, which was left before its end. Local."""
        if self._keeper is not None:
            self._keeper.restart()

    def state_dict(self, random_states: list[int]) -> dict[str, Any]:
        """What :meth:`load_state_dict` needs; the same on all ranks. Collective.

        Parameters
        ----------
        random_states
            Of this rank's devices.
        """
        own = (self.skipped + self._taken, [hex(state) for state in random_states])  # 64 bits without a sign
        everyone = [own] if self._comm is None else self._comm.allgather(own)
        # Between two epochs the keeper knows best: it may have been told of the next one.
        taken_of_keeper = None if self._is_between_epochs else self._taken
        return {
            "steps": self.steps,
            "samples": self.samples,
            "taken": [taken for taken, _ in everyone],
            "random_states": [states for _, states in everyone],
            "keeper": None if self._keeper is None else self._keeper.gather_state(taken_of_keeper),
            "is_between_epochs": self._is_between_epochs,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> list[int] | None:
        """Go on from a state. Local; all ranks must.

        Returns
        -------
        list of int or None
            Random states of this rank's devices, where it was saved on as many ranks.

        Raises
        ------
        ValueError
            When the state is of another number of ranks, and nothing can share out the rest.
        """
        taken = [int(own) for own in state["taken"]]
        is_same_size = len(taken) == self.size
        if state["keeper"] is not None and self._keeper is not None:
            self._keeper.load_state_dict(state["keeper"])
            if state["is_between_epochs"] and len(self._keeper) == 0:
                self._keeper.restart()  # the next epoch is a whole one
            skipped = 0
        elif any(taken) and not is_same_size:
            raise ValueError(
                f"an epoch that began on {len(taken)} ranks must go on on as many, got {self.size}; with "
                "sampler=hpcpar.data.DistributedSampler(dataset, comm) it may go on on others"
            )
        else:
            skipped = taken[self.rank] if is_same_size else 0
        self.skipped, self._taken, self._is_between_epochs = skipped, 0, bool(state["is_between_epochs"])
        self.steps, self.samples = int(state["steps"]), int(state["samples"])
        if not is_same_size:
            return None
        return [int(text, 16) for text in state["random_states"][self.rank]]
