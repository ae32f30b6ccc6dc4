"""What a manager has done so far."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from hpcpar.xla import adapter
from hpcpar.xla.position import Position

__all__ = ["ManagerStats", "Tally"]

_log = logging.getLogger(__name__)

_WARM_UP = 2  # steps in which new graphs are expected


@dataclass(frozen=True)
class ManagerStats:
    """Counts of a :class:`~hpcpar.xla.TPUManager`; those of transfers and time, of this rank in this job.

    Graphs and transfers are those of the process, in which another manager may be at work as well.

    Attributes
    ----------
    steps : int
        Steps that had samples, jobs before included.
    samples : int
        Of all ranks together, jobs before included.
    graphs : int
        Graphs that were compiled. Shapes that change make it grow, and each costs a compilation.
    downloads, uploads : int
        Transfers from the devices, of which a step takes one per device; and to them.
    waiting_s : float
        Seconds of ``step()`` in which this rank waited for its devices, their data included.
    reducing_s : float
        Seconds of ``step()`` in adding up over devices and ranks.
    """

    steps: int
    samples: int
    graphs: int
    downloads: int
    uploads: int
    waiting_s: float
    reducing_s: float


class Tally:
    """Counts what this process has compiled and transferred since it was made. Local.

    Parameters
    ----------
    where
        Place of this rank, for warnings.

    Attributes
    ----------
    reducing_s : float
        For the manager to add to.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._before = _transfers()
        self._graphs = adapter.compilations()
        self._looks = 0
        self.reducing_s = 0.0

    def look_for_new_graphs(self, steps: int) -> None:
        """Warn if the step of this number has compiled something, and is none of the first of this job."""
        graphs = adapter.compilations()
        self._looks += 1
        if self._looks > _WARM_UP and graphs > self._graphs:
            _log.warning(
                "step %d compiled %d new graph(s): batches whose shapes change, or a model that computes "
                "something else each time, cost a compilation each (%s)",
                steps,
                graphs - self._graphs,
                self._where,
            )
        self._graphs = graphs

    def stats(self, position: Position, waiting_s: float) -> ManagerStats:
        """What there is to tell."""
        graphs, downloads, uploads = (
            now - before for now, before in zip(_transfers(), self._before, strict=True)
        )
        return ManagerStats(
            position.steps, position.samples, graphs, downloads, uploads, waiting_s, self.reducing_s
        )


def _transfers() -> tuple[int, int, int]:
    return adapter.compilations(), adapter.downloads(), adapter.uploads()
