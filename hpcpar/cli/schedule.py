"""``hpcpar schedule``: what a pipeline schedule costs, before anybody waits for a job to find out."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from hpcpar.nn.pipeline.builders import SCHEDULE_NAMES, build_schedule
from hpcpar.nn.pipeline.schedule import Schedule
from hpcpar.nn.pipeline.simulate import Simulation, simulate

__all__ = ["schedule"]


def _costs(context: click.Context, option: click.Parameter, value: str) -> float | list[float]:
    """One number, or one per stage with commas between them."""
    try:
        numbers = [float(text) for text in value.split(",")]
    except ValueError as error:
        raise click.BadParameter(f"must be a number, or one per stage as in 1,1,2, got {value!r}") from error
    return numbers[0] if len(numbers) == 1 else numbers


@dataclass(frozen=True)
class _Request:
    """Which schedule is wanted."""

    schedule: str | None
    file: Path | None
    ranks: int | None
    stages: int | None
    microbatches: int | None
    chunks: int | None
    max_in_flight: int | None


_COUNT = click.IntRange(min=1)
_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(epilog="Example: hpcpar schedule --ranks 4 --microbatches 8 --schedule zero_bubble")
@click.option(
    "--schedule",
    type=click.Choice(SCHEDULE_NAMES),
    help="One of the schedules that hpcpar makes itself; 1f1b unless --file is given.",
)
@click.option(
    "--file",
    type=_FILE,
    help="A schedule in a CSV file: a row per rank, cells like 1F3 (stage, kind, microbatch).",
)
@click.option("--ranks", type=_COUNT, help="How many ranks; or give --stages.")
@click.option("--stages", type=_COUNT, help="How many stages the model has: ranks times chunks.")
@click.option("--microbatches", type=_COUNT, help="How many microbatches a batch is cut into.")
@click.option("--chunks", type=_COUNT, help="Stages per rank, 1 by default.")
@click.option(
    "--forward",
    callback=_costs,
    default="1",
    metavar="SECONDS",
    help="Seconds of a forward: one number, or one per stage, as in 1,1,2.",
)
@click.option(
    "--backward-input",
    callback=_costs,
    default="1",
    metavar="SECONDS",
    help="Seconds of the gradients of a stage's input.",
)
@click.option(
    "--backward-weight",
    callback=_costs,
    default="1",
    metavar="SECONDS",
    help="Seconds of those of its parameters.",
)
@click.option("--message", type=float, default=0.0, help="Seconds that a message to another rank takes.")
@click.option(
    "--max-activations",
    type=_COUNT,
    help="Fail when a rank holds activations of more microbatches, over its stages.",
)
@click.option("--max-in-flight", type=_COUNT, help="Activations that zero_bubble may plan with on a rank.")
@click.option(
    "--picture", type=_FILE, help="Draw the timeline to this file, such as a .png; needs matplotlib."
)
@click.option("--chrome", type=_FILE, help="Write the timeline for chrome://tracing or ui.perfetto.dev.")
@click.option(
    "--csv", "table", type=_FILE, help="Write the schedule itself, to be changed and read by --file."
)
@click.option("--json", "as_json", is_flag=True, help="Print figures for programs instead of people.")
@click.option("--width", type=click.IntRange(min=20), help="Characters per line; by default the terminal's.")
def schedule(
    forward: Any,
    backward_input: Any,
    backward_weight: Any,
    message: float,
    max_activations: int | None,
    picture: Path | None,
    chrome: Path | None,
    table: Path | None,
    as_json: bool,
    width: int | None,
    **wanted: Any,
) -> None:
    """Simulate a pipeline schedule: how long a step takes, how much of it the ranks are idle, what they hold.

    Times are in any unit; by default a forward takes 1 and a backward 2, one for the gradients of the stage's
    input and one for those of its parameters.
    """
    plan = _make(_Request(**wanted))
    result = simulate(
        plan,
        forward=forward,
        backward_input=backward_input,
        backward_weight=backward_weight,
        message=message,
        max_activations=max_activations,
    )
    if table is not None:
        plan.to_csv(table)
    if chrome is not None:
        result.timeline.to_chrome(chrome)
    if picture is not None:
        result.timeline.draw(picture, f"{_title(plan)}: {result.bubble:.1%} idle")
    if as_json:
        click.echo(json.dumps(_figures(plan, result)))
    else:
        columns = width if width is not None else max(shutil.get_terminal_size((100, 24)).columns, 20)
        click.echo(_report(plan, result, columns))


# ---- which schedule ----------------------------------------------------------------------------------------


def _make(wanted: _Request) -> Schedule:
    if wanted.file is not None:
        return _read(wanted, wanted.file)
    chunks = 1 if wanted.chunks is None else wanted.chunks
    if wanted.microbatches is None:
        raise click.UsageError("--microbatches must be given, got none. Or give a schedule with --file")
    return build_schedule(
        wanted.schedule or "1f1b",
        _count_ranks(wanted, chunks),
        wanted.microbatches,
        chunks,
        max_in_flight=wanted.max_in_flight,
    )


def _read(wanted: _Request, path: Path) -> Schedule:
    """The schedule in a file; --ranks, --stages and --microbatches say what is expected of it."""
    for option in ("schedule", "chunks", "max_in_flight"):
        if getattr(wanted, option) is not None:
            raise click.UsageError(f"--{option.replace('_', '-')} must be left out with --file, got both")
    plan = Schedule.from_csv(path, name=path.stem)
    plan.check(wanted.ranks, wanted.microbatches)
    if wanted.stages not in (None, plan.stages):
        raise click.UsageError(f"--stages must be what is in {path}, {plan.stages}, got {wanted.stages}")
    return plan


def _count_ranks(wanted: _Request, chunks: int) -> int:
    if wanted.stages is None:
        if wanted.ranks is None:
            raise click.UsageError("--ranks or --stages must be given, got neither")
        return wanted.ranks
    if wanted.ranks is not None and wanted.ranks * chunks != wanted.stages:
        product = wanted.ranks * chunks
        raise click.UsageError(f"--stages must be ranks times chunks, {product}, got {wanted.stages}")
    if wanted.stages % chunks:
        raise click.UsageError(f"--stages must be a multiple of --chunks, {chunks}, got {wanted.stages}")
    return wanted.stages // chunks


# ---- what is said about it ---------------------------------------------------------------------------------


def _title(plan: Schedule) -> str:
    return f"{plan.name}, {plan.ranks} rank(s), {plan.stages} stage(s), {plan.microbatches} microbatch(es)"


def _ideal(plan: Schedule, result: Simulation) -> float:
    """The makespan, were no rank ever idle and all had the same work."""
    return sum(result.busy) / plan.ranks


def _figures(plan: Schedule, result: Simulation) -> dict[str, Any]:
    return {
        "schedule": plan.name,
        "ranks": plan.ranks,
        "stages": plan.stages,
        "microbatches": plan.microbatches,
        "placement": plan.placement,
        "makespan_s": result.makespan,
        "ideal_s": _ideal(plan, result),
        "bubble": result.bubble,
        "efficiency": result.efficiency,
        "busy_s": result.busy,
        "peak_activations": result.peak_activations,
        "actions": [list(map(str, row)) for row in plan.actions],
    }


def _report(plan: Schedule, result: Simulation, columns: int) -> str:
    peaks = " ".join(map(str, result.peak_activations))
    lines = [
        _title(plan),
        f"makespan          {result.makespan:.6g} s",
        f"ideal             {_ideal(plan, result):.6g} s",
        f"bubble            {100 * result.bubble:.1f} %",
        f"peak activations  {peaks}  (microbatches held by each rank, per stage)",
        "",
        result.timeline.to_text(columns),
    ]
    return "\n".join(lines)
