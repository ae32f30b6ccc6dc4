"""``hpcpar checkpoint``: what is in a checkpoint, whether it is whole, its weights for other programs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from hpcpar.checkpoint import CheckpointInfo, Entry, export, info, verify
from hpcpar.errors import CheckpointError

__all__ = ["checkpoint"]

_FOLDER = click.Path(path_type=Path)
_DAMAGED = 1


@click.group()
def checkpoint() -> None:
    """Look at checkpoints that hpcpar.checkpoint.save has written. Nothing in them is executed."""


@checkpoint.command("info", epilog="Example: hpcpar checkpoint info run/step-1000")
@click.argument("path", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print for programs instead of people.")
def show_info(path: Path, as_json: bool) -> None:
    """Show who saved the checkpoint PATH and when, and all that is in it."""
    found = info(path)
    if as_json:
        click.echo(json.dumps({**asdict(found), "path": str(found.path)}))
    else:
        click.echo(_report(found))


@checkpoint.command("verify", epilog="Example: hpcpar checkpoint verify run/step-1000 || exit 1")
@click.argument("path", type=_FOLDER)
@click.option("--json", "as_json", is_flag=True, help="Print for programs instead of people.")
@click.pass_context
def check(context: click.Context, path: Path, as_json: bool) -> None:
    """Read all of the checkpoint PATH and compare checksums. The exit status is 1 when it is damaged."""
    problem = None
    try:
        nbytes = verify(path).nbytes
    except CheckpointError as error:
        problem, nbytes = str(error), 0
    if as_json:
        click.echo(
            json.dumps({"path": str(path), "whole": problem is None, "problem": problem, "nbytes": nbytes})
        )
    else:
        click.echo(
            f"{path}: whole, {_size(nbytes)}" if problem is None else f"damaged: {problem}", err=bool(problem)
        )
    if problem is not None:
        context.exit(_DAMAGED)


@checkpoint.command(
    "export", epilog="Example: hpcpar checkpoint export run/step-1000 model.safetensors --prefix model."
)
@click.argument("path", type=_FOLDER)
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--prefix",
    default="",
    help="Only tensors whose names begin with this, such as model.; it is taken off their names.",
)
@click.option("--skip-per-rank", is_flag=True, help="Leave out tensors that differ between ranks.")
def write_tensors(path: Path, target: Path, prefix: str, skip_per_rank: bool) -> None:
    """Write the tensors of the checkpoint PATH to TARGET in the format of safetensors."""
    names = export(path, target, prefix=prefix, skip_per_rank=skip_per_rank)
    click.echo(f"{target}: {len(names)} tensor(s)")


def _report(found: CheckpointInfo) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found.versions.items())
    head = [
        f"checkpoint  {found.path}",
        f"saved       {found.created} by {found.ranks} rank(s), {versions}",
        f"data        {_size(found.nbytes)}",
        "",
    ]
    rows = [("name", "type", "shape", "size", "rank"), *map(_row, found.entries)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join([*head, *(line.rstrip() for line in lines)])


def _row(entry: Entry) -> tuple[str, ...]:
    kind = entry.dtype if entry.kind == "tensor" else f"{entry.kind} {entry.dtype}".strip()
    shape = " × ".join(map(str, entry.shape)) if entry.dtype else entry.value
    ranks = " ".join(map(str, entry.ranks)) or "all"
    return entry.name, kind, shape, _size(entry.nbytes) if entry.dtype else "", ranks


def _size(nbytes: int) -> str:
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
