"""Timelines: what every rank did and when, simulated or measured, and three ways to look at one.

::

    rank 0 |F0F1....B0==F2B1==..B2==|     in characters, for a terminal
    rank 1 |..F0B0==F1B1==F2B2==....|     a Chrome trace, to zoom into
           0                     12 s     a picture, for a report

A timeline is a flat set of spans, and everything is derived from it. In text a column is the same moment on
all ranks. A span of two columns or more gets them for itself; where spans are shorter, a column shows what
takes most of its time, so that a wide schedule loses detail and keeps its shape.

Invariant: spans that wait are idle time; whatever else a rank does, be it twice at once (a reduction behind a
backward), counts once.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hpcpar.errors import HpcparError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["Span", "Timeline"]


@dataclass(frozen=True, slots=True)
class _Style:
    """How spans of one kind are shown."""

    meaning: str
    letter: str
    fill: str
    colour: str


_STYLES: Mapping[str, _Style] = {
    "F": _Style("forward", "F", "-", "#4c72b0"),
    "B": _Style("backward", "B", "=", "#dd8452"),
    "I": _Style("backward, inputs", "I", "=", "#e8a33d"),
    "W": _Style("backward, weights", "W", "~", "#55a868"),
    "R": _Style("recompute", "R", "+", "#8172b3"),
    "reduce": _Style("reduce", "#", "#", "#937860"),
    "other": _Style("other", "?", "?", "#8c8c8c"),
    "wait": _Style("wait", ",", ",", "#e6e6e6"),
}
_BACKGROUND = ("reduce", "other", "wait")  # what a rank may do while it computes
_IDLE = "."
_ROUNDING = 1e-6
_CHARACTERS_PER_SPAN = 8  # at most, for the shortest: more says nothing more


@dataclass(frozen=True, slots=True)
class Span:
    """One thing that a rank did.

    Parameters
    ----------
    rank
        Who.
    start_s, end_s
        From when to when, in seconds of one clock for all ranks.
    label
        For people: ``"1F3"``.
    kind
        ``F`` forward, ``B`` backward, ``I`` its inputs, ``W`` its weights, ``R`` recompute, ``wait``,
        ``reduce`` or ``other``.
    stage, microbatch
        Of which stage and microbatch, None where that means nothing.

    Raises
    ------
    HpcparError
        When the kind is another one, or the end comes before the start.
    """

    rank: int
    start_s: float
    end_s: float
    label: str
    kind: str
    stage: int | None = None
    microbatch: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in _STYLES:
            raise HpcparError(f"kind of a span must be one of {', '.join(_STYLES)}, got {self.kind!r}")
        if not self.end_s >= self.start_s:
            raise HpcparError(
                f"span {self.label} must end after its start, got {self.start_s} to {self.end_s}"
            )


@dataclass(frozen=True)
class Timeline:
    """What all ranks did.

    Parameters
    ----------
    spans
        In any order.
    ranks
        How many ranks there are.

    Raises
    ------
    HpcparError
        When a span is of a rank that there is not.
    """

    spans: tuple[Span, ...]
    ranks: int

    def __post_init__(self) -> None:
        object.__setattr__(self, "spans", tuple(self.spans))
        for span in self.spans:
            if not 0 <= span.rank < self.ranks:
                raise HpcparError(f"rank of span {span.label} must be below {self.ranks}, got {span.rank}")

    @cached_property
    def start_s(self) -> float:
        """When the first span starts."""
        return min((span.start_s for span in self.spans), default=0.0)

    @cached_property
    def makespan(self) -> float:
        """Seconds from the first start to the last end."""
        return max((span.end_s for span in self.spans), default=0.0) - self.start_s

    @cached_property
    def busy(self) -> tuple[float, ...]:
        """Seconds in which each rank does something other than wait."""
        return tuple(_covered(row) for row in self._rows)

    @cached_property
    def bubble(self) -> tuple[float, ...]:
        """Share of the makespan in which each rank is idle or waits."""
        if self.makespan == 0:
            return (0.0,) * self.ranks
        return tuple(1 - busy / self.makespan for busy in self.busy)

    @cached_property
    def _rows(self) -> tuple[tuple[Span, ...], ...]:
        rows: list[list[Span]] = [[] for _ in range(self.ranks)]
        for span in sorted(self.spans, key=lambda span: (span.start_s, span.end_s)):
            rows[span.rank].append(span)
        return tuple(map(tuple, rows))

    @cached_property
    def _kinds(self) -> list[str]:
        present = {span.kind for span in self.spans}
        return [kind for kind in _STYLES if kind in present]

    @cached_property
    def _several_stages(self) -> bool:
        """Whether a rank has more than one, so that its number does not say the stage."""
        return any(len({span.stage for span in row} - {None}) > 1 for row in self._rows)

    # ---- in characters -------------------------------------------------------------------------------------

    def to_text(self, width: int = 100) -> str:
        """A Gantt chart in characters, a line per rank, with an axis and a legend. **Local.**

        Parameters
        ----------
        width
            Characters per line, at least 20; a short schedule takes fewer.
        """
        if width < 20:
            raise HpcparError(f"width must be at least 20, got {width}")
        names = [f"rank {rank}" for rank in range(self.ranks)]
        margin = max(map(len, names), default=0)
        per_second = self._characters_per_second(width - margin - 3)
        columns = round(self.makespan * per_second)
        with_stages = self._has_room_for_stages(per_second)
        lines = [
            f"{name.rjust(margin)} |{self._line(row, per_second, columns, with_stages)}|"
            for name, row in zip(names, self._rows, strict=True)
        ]
        end = f"{self.makespan:.6g} s"
        axis = "0" + end.rjust(max(columns + 1, len(end) + 1))
        shown = [f"{_STYLES[kind].letter} {_STYLES[kind].meaning}" for kind in self._kinds]
        legend = ", ".join([*shown, f"{_IDLE} idle"])
        return "\n".join([*lines, " " * (margin + 1) + axis, f"{' ' * (margin + 2)}{legend}"])

    def _characters_per_second(self, columns: int) -> float:
        """A whole number of characters for the shortest span where there is room, else what fits."""
        if self.makespan == 0:
            return 0.0
        shortest = min((d for span in self.spans if (d := span.end_s - span.start_s) > 0), default=1.0)
        whole = min(int(columns * shortest / self.makespan * (1 + 1e-9)), _CHARACTERS_PER_SPAN)
        return whole / shortest if whole else columns / self.makespan

    def _has_room_for_stages(self, per_second: float) -> bool:
        """Whether stages are to be shown: some rank has several, and no span is too short for its own."""
        return self._several_stages and all(
            round((span.end_s - span.start_s) * per_second) > len(_name(span, True))
            for span in self.spans
            if span.end_s > span.start_s
        )

    def _line(self, row: Sequence[Span], per_second: float, columns: int, with_stages: bool) -> str:
        cells = [_IDLE] * columns
        shares: list[dict[str, float]] = [{} for _ in cells]  # of each column's time, by the letter
        for span in sorted(row, key=lambda span: span.kind not in _BACKGROUND):
            start, end = ((moment - self.start_s) * per_second for moment in (span.start_s, span.end_s))
            first, last = (min(int(moment + 0.5), columns) for moment in (start, end))
            if end - start >= 2:
                cells[first:last] = _cell(span, last - first, with_stages)
                continue
            letter = _STYLES[span.kind].letter
            for column in range(int(start), min(math.ceil(end), columns)):
                share = min(end, column + 1) - max(start, column)
                shares[column][letter] = shares[column].get(letter, 0.0) + share
        for column, share_of in enumerate(shares):
            if cells[column] == _IDLE and sum(share_of.values()) > 0.5 - _ROUNDING:
                cells[column] = max(share_of, key=share_of.__getitem__)
        return "".join(cells)

    # ---- in files ------------------------------------------------------------------------------------------

    def to_chrome(self, path: str | os.PathLike[str]) -> None:
        """Write a trace in Chrome's format, for ``chrome://tracing`` or https://ui.perfetto.dev. **Local.**

        Raises
        ------
        OSError
            When the file cannot be written.
        """
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": rank, "args": {"name": f"rank {rank}"}}
            for rank in range(self.ranks)
        ]
        for span in self.spans:
            events.append(
                {
                    "name": span.label,
                    "cat": _STYLES[span.kind].meaning,
                    "ph": "X",
                    "ts": (span.start_s - self.start_s) * 1e6,
                    "dur": (span.end_s - span.start_s) * 1e6,
                    "pid": 0,
                    "tid": span.rank,
                    "args": {"kind": span.kind, "stage": span.stage, "microbatch": span.microbatch},
                }
            )
        with open(path, "w", encoding="utf-8") as file:
            json.dump({"traceEvents": events, "displayTimeUnit": "ms"}, file)

    def draw(self, path: str | os.PathLike[str], title: str | None = None) -> None:
        """Draw a Gantt chart, a row of bars per rank; the file's name says the format. **Local.**

        Raises
        ------
        HpcparError
            When matplotlib is missing, or does not know the format.
        OSError
            When the file cannot be written.
        """
        figure, axes, width_inches = _new_figure(self.ranks)
        for kind in self._kinds:
            _draw_kind(axes, self._rows, kind, self.start_s)
        for span in self.spans:
            _draw_name(axes, span, self.start_s, self.makespan / width_inches, self._several_stages)
        axes.set_xlim(0, self.makespan or 1.0)
        axes.set_ylim(self.ranks - 0.5, -0.5)  # rank 0 on top
        axes.set_yticks(range(self.ranks), [f"rank {rank}" for rank in range(self.ranks)])
        axes.set_xlabel("seconds")
        axes.set_title(title or "")
        if self.spans:
            figure.legend(loc="outside lower center", ncols=len(self._kinds), frameon=False)
        try:
            figure.savefig(path, dpi=120)
        except ValueError as error:
            shown = os.fspath(path)
            raise HpcparError(
                f"name of a picture must end like one, as in .png, got {shown}: {error}"
            ) from error


def _covered(row: Sequence[Span]) -> float:
    """Seconds that the spans, sorted by start, cover: those of two at once only once."""
    total, end = 0.0, float("-inf")
    for span in row:
        if span.kind != "wait" and span.end_s > end:
            total += span.end_s - max(span.start_s, end)
            end = span.end_s
    return total


def _cell(span: Span, length: int, with_stage: bool) -> str:
    """``F3--`` for forward 3 in four characters, ``1F3-`` with its stage, ``F`` in a single one."""
    style = _STYLES[span.kind]
    name = _name(span, with_stage)
    return (name if len(name) <= length else style.letter[:length]).ljust(length, style.fill)


def _name(span: Span, with_stage: bool) -> str:
    stage = str(span.stage) if with_stage and span.stage is not None else ""
    if span.kind in _BACKGROUND or span.microbatch is None:
        return _STYLES[span.kind].letter
    return f"{stage}{_STYLES[span.kind].letter}{span.microbatch}"


# ---- the picture -------------------------------------------------------------------------------------------


def _new_figure(ranks: int) -> tuple[Figure, Axes, float]:
    """A figure that needs no display, with one pair of axes, and about how wide those are."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HpcparError(
            "to draw a timeline, matplotlib must be installed. pip install matplotlib"
        ) from error
    width = 12.0
    figure = Figure(figsize=(width, min(1.4 + 0.45 * ranks, 20.0)), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(), width - 1.2


def _draw_kind(axes: Axes, rows: Sequence[Sequence[Span]], kind: str, start_s: float) -> None:
    """All spans of a kind at once: one collection of bars per rank, for there may be thousands."""
    style = _STYLES[kind]
    label: str | None = style.meaning
    layer = 1 if kind in _BACKGROUND else 2
    for rank, row in enumerate(rows):
        bars = [(span.start_s - start_s, span.end_s - span.start_s) for span in row if span.kind == kind]
        if bars:
            bar = axes.broken_barh(bars, (rank - 0.4, 0.8), facecolor=style.colour, label=label, zorder=layer)
            bar.set(edgecolor="white", linewidth=0.4)
            label = None  # once in the legend


def _draw_name(axes: Axes, span: Span, start_s: float, seconds_per_inch: float, with_stage: bool) -> None:
    """The number of the microbatch in a bar that is wide enough for it, ``1F3`` where stages matter."""
    inches_per_character = 0.09
    number = "" if span.microbatch is None else str(span.microbatch)
    text = _name(span, True) if with_stage and number else number
    room = (span.end_s - span.start_s) / seconds_per_inch if seconds_per_inch else 0.0
    if text and room > inches_per_character * (len(text) + 0.5):
        middle = (span.start_s + span.end_s) / 2 - start_s
        axes.text(middle, span.rank, text, ha="center", va="center", fontsize=7, color="white")
