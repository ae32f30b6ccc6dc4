"""What rank 0 shows and writes: a line per epoch or evaluation, progress, curves, history.

Every rank calls the same methods and the other ranks stay silent, so the training loop carries no
``if rank == 0``. Nothing here communicates. Progress is a bar on a terminal, and a line of the log now and
then elsewhere: see `hpcpar.logs`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

import hpcpar
from common import UserError
from hpcpar.comm import Communicator

__all__ = [
    "Curve",
    "Reporter",
    "draw_curves",
    "draw_heat_map",
    "draw_shares",
    "prepare_output",
    "write_history",
]

Curve = tuple[str, Sequence[float], Sequence[float]]
"""A label, the x and the y values."""


class Reporter:
    """Lines on standard output and progress, as a bar or in the log. Only rank 0 shows anything.

    Parameters
    ----------
    comm : the ranks.
    total_steps : optimizer steps of the whole run.
    """

    def __init__(self, comm: Communicator, total_steps: int) -> None:
        self._shows = comm.rank == 0
        self._progress = hpcpar.logs.Progress("training", total_steps, comm)

    def __enter__(self) -> Reporter:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, traceback)

    def skip(self, steps: int) -> None:
        """So many were done by the job before."""
        self._progress.skip(steps)

    def step(self) -> None:
        """One more optimizer step is done."""
        self._progress.advance()

    def line(self, text: str) -> None:
        """Print one line, above the bar if there is one."""
        console = self._progress.console
        if console is not None and sys.stdout.isatty():
            console.print(text, soft_wrap=True, markup=False, highlight=False)
        elif self._shows:
            print(text, flush=True)


def prepare_output(folder: Path) -> None:
    """Create the folder for results now, so that a bad path shows before the training."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history.json").touch()
    except OSError as error:
        raise UserError(f"--output {folder}: cannot write there ({error.strerror})") from error


def write_history(folder: Path, history: Mapping[str, Any]) -> Path:
    """Write options and results as ``history.json``, for scripts that compare runs."""
    path = folder / "history.json"
    path.write_text(json.dumps(history, indent=1, default=str) + "\n", encoding="utf-8")
    return path


def draw_curves(
    path: Path,
    x_label: str,
    panels: Mapping[str, Sequence[Curve]],
    beside: Mapping[str, Sequence[Curve]] | None = None,
) -> Path | None:
    """Draw one panel per entry, side by side, into a picture file; None where matplotlib is missing.

    Curves of `beside`, by the same titles, are dashed: those below them can be seen where they coincide.
    """
    figure = _figure(width=5.0 * len(panels), height=3.6)
    if figure is None:
        return None
    row = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, curves) in zip(row, panels.items(), strict=True):
        for label, x, y in curves:
            axes.plot(x, y, marker=".", label=label)
        for label, x, y in (beside or {}).get(title, ()):
            axes.plot(x, y, linestyle="--", label=label)
        axes.set(title=title, xlabel=x_label)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=120)
    return path


def draw_heat_map(
    path: Path, groups: Mapping[str, npt.NDArray[np.float64]], first_column: int, labels: tuple[str, str, str]
) -> Path | None:
    """Draw groups of rows above each other as colours; None where matplotlib is missing.

    Parameters
    ----------
    path : the picture.
    groups : a title and an array of shape (rows, columns) each; all have as many columns.
    first_column : the number of the first column, for the axis.
    labels : of the columns, the rows and the colours.
    """
    rows = sum(len(values) for values in groups.values())
    figure = _figure(width=8.0, height=1.2 + 0.22 * rows + 0.3 * len(groups))
    if figure is None:
        return None
    heights = [len(values) for values in groups.values()]
    panels = figure.subplots(len(groups), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0]
    brightest = max(float(values.max(initial=0.0)) for values in groups.values())
    for axes, (title, values) in zip(panels, groups.items(), strict=True):
        left = first_column - 0.5
        image = axes.imshow(
            values,
            aspect="auto",
            interpolation="nearest",
            vmin=0.0,
            vmax=brightest,
            extent=(left, left + values.shape[1], len(values) - 0.5, -0.5),
        )
        axes.set_title(title, fontsize="small", loc="left")
        axes.set_ylabel(labels[1])
    panels[-1].set_xlabel(labels[0])
    figure.colorbar(image, ax=list(panels), label=labels[2])
    figure.savefig(path, dpi=120)
    return path


def draw_shares(
    path: Path, rows: npt.NDArray[np.float64], first_column: int, labels: tuple[str, str, str]
) -> Path | None:
    """Draw rows on top of each other as areas, and as a heat map below; None where matplotlib is missing.

    Parameters
    ----------
    path : the picture.
    rows : of shape (rows, columns), none below zero.
    first_column : the number of the first column, for the axis.
    labels : of the columns, the rows and the values.
    """
    map_height = 0.6 + 0.22 * len(rows)
    figure = _figure(width=8.0, height=3.4 + map_height)
    if figure is None:
        return None
    areas, colours = figure.subplots(2, 1, sharex=True, height_ratios=[2.8, map_height])
    columns = np.arange(rows.shape[1]) + first_column
    areas.stackplot(columns, rows, labels=[f"{labels[1]} {number}" for number in range(len(rows))])
    areas.set_ylabel(labels[2])
    if len(rows) <= 10:
        areas.legend(loc="lower right", fontsize="small")
    edges = (first_column - 0.5, first_column - 0.5 + rows.shape[1], len(rows) - 0.5, -0.5)
    image = colours.imshow(rows, aspect="auto", interpolation="nearest", vmin=0.0, extent=edges)
    colours.yaxis.get_major_locator().set_params(integer=True)
    colours.set(xlabel=labels[0], ylabel=labels[1])
    figure.colorbar(image, ax=[areas, colours], label=labels[2])
    figure.savefig(path, dpi=120)
    return path


def _figure(width: float, height: float) -> Any:
    """An empty figure, in inches, or None, after a note on standard error, without matplotlib.

    Uses matplotlib's Agg canvas directly: no display is needed on a compute node.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        print("matplotlib is not installed: no picture is drawn", file=sys.stderr)
        return None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
