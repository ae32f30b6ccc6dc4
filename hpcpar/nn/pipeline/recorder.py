"""What a rank's steps have cost: sums always, and every action and wait while a trace is on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcpar.nn.pipeline.timeline import Span, Timeline

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["PipelineStats", "Recorder"]


@dataclass(frozen=True)
class PipelineStats:
    """What the steps of this rank have cost since the start.

    Attributes
    ----------
    steps : int
        Training steps.
    computed_s, waited_s : float
        Seconds in actions, and seconds in which there was nothing to do but wait for other stages.
    messages_sent, headers_sent : int
        Messages, and how many of them carried a description.
    bytes_sent : int
        Their contents.
    peak_activations : int
        Most pairs of stage and microbatch between forward and the end of backward at one time.
    """

    steps: int
    computed_s: float
    waited_s: float
    messages_sent: int
    headers_sent: int
    bytes_sent: int
    peak_activations: int


class Recorder:
    """Counts, and notes spans while a trace is on. Local.

    Parameters
    ----------
    comm
        The ranks of the pipeline.

    Attributes
    ----------
    steps, computed_s, waited_s, peak_activations
        As in :class:`PipelineStats`.
    is_tracing : bool
        Whether spans are noted.
    """

    def __init__(self, comm: Communicator) -> None:
        self._comm = comm
        self._spans: list[Span] = []
        self.is_tracing = False
        self._origin_s = 0.0
        self.steps = 0
        self.computed_s = self.waited_s = 0.0
        self.peak_activations = 0

    def held(self, activations: int) -> None:
        """So many activations are held now. Local."""
        self.peak_activations = max(self.peak_activations, activations)

    def note(
        self, start_s: float, end_s: float, label: str, kind: str, place: tuple[int, int] | None = None
    ) -> None:
        """Something has taken from ``start_s`` to ``end_s``; ``place`` is stage and microbatch. Local."""
        if self.is_tracing:
            stage, microbatch = (None, None) if place is None else place
            self._spans.append(Span(self._comm.rank, start_s, end_s, label, kind, stage, microbatch))

    @contextmanager
    def waiting(self, kind: str) -> Iterator[None]:
        """The block does nothing but wait for other ranks. Local."""
        start = time.perf_counter()
        yield
        end = time.perf_counter()
        self.waited_s += end - start
        self.note(start, end, kind, kind)

    def start(self) -> None:
        """Note spans from now on. Collective: the ranks meet, which aligns their clocks."""
        self._comm.Barrier()
        self._spans, self._origin_s, self.is_tracing = [], time.perf_counter(), True

    def stop(self) -> None:
        """Note nothing more; what was noted stays. Local."""
        self.is_tracing = False

    def timeline(self) -> Timeline:
        """What all ranks have noted in the last trace, in seconds from its start. Collective."""
        spans = [
            dataclasses.replace(
                span, start_s=span.start_s - self._origin_s, end_s=span.end_s - self._origin_s
            )
            for span in self._spans
        ]
        return Timeline(tuple(span for some in self._comm.allgather(spans) for span in some), self._comm.size)
