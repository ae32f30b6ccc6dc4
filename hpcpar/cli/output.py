"""What the commands print: tables as plain text, units, and one voice among many ranks.

Under a launcher every rank runs the command, and only the first may speak. The launcher's variables tell who
that is before MPI has started, and also when it never will: the processes of a job that MPI takes for *N*
jobs of one rank must not explain that *N* times.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

import click

from hpcpar.comm.environment import read_launcher

__all__ = [
    "compact_ranges",
    "format_bytes",
    "format_rate",
    "format_seconds",
    "format_table",
    "is_first_process",
    "paragraph",
    "parse_size",
    "print_json",
    "styled",
    "terminal_width",
]

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_PREFIXES = ("", "K", "M", "G", "T")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?", re.IGNORECASE)


def is_first_process() -> bool:
    """Whether this process is the first that the launcher started, or the only one. Local."""
    return read_launcher().rank in (None, 0)


def terminal_width() -> int:
    """Columns to write in: the terminal's, between 60 and 120. Local."""
    return min(max(shutil.get_terminal_size((100, 24)).columns, 60), 120)


def styled(text: str, **style: Any) -> str:
    """``text`` in colour where somebody can see it: on a terminal, unless ``NO_COLOR`` is set. Local.

    Launchers give their ranks a terminal that is none, so what they print has no colours.
    """
    if os.environ.get("NO_COLOR") or not sys.stdout.isatty() or read_launcher().rank is not None:
        return text
    return click.style(text, **style)


def print_json(content: object) -> None:
    """One JSON object on standard output. Local."""
    click.echo(json.dumps(content, indent=2))


def format_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, numbers to the right. Local."""
    lines = [list(head), *map(list, rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    numeric = [all(_is_number(line[column]) for line in lines[1:]) for column in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        ).rstrip()
        for line in lines
    )


def _is_number(cell: str) -> bool:
    return cell in ("", "-") or re.match(r"^[\d.]+( [A-Za-zμ/]+)?$", cell) is not None


def paragraph(label: str, text: str, indent: int, columns: int) -> str:
    """``label`` and wrapped text beside it. Local."""
    first = label.ljust(indent)
    return textwrap.fill(
        text, columns, initial_indent=first, subsequent_indent=" " * indent, break_on_hyphens=False
    )


def format_bytes(nbytes: float) -> str:
    """Such as ``"64 MiB"``. Local."""
    unit = 0
    while nbytes >= 1024 and unit < len(_BYTE_UNITS) - 1:
        nbytes /= 1024
        unit += 1
    return f"{nbytes:.0f} {_BYTE_UNITS[unit]}" if nbytes >= 10 else f"{nbytes:.3g} {_BYTE_UNITS[unit]}"


def format_seconds(seconds: float) -> str:
    """Such as ``"1.3 us"``. Local."""
    for unit, scale in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if seconds >= scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def format_rate(bytes_per_s: float) -> str:
    """Such as ``"11.2 GB/s"``; decimal units, as networks are sold. Local."""
    scale, unit = (1e9, "GB/s") if bytes_per_s >= 1e8 else (1e6, "MB/s")
    return f"{bytes_per_s / scale:.3g} {unit}"


def parse_size(text: str) -> int:
    """Bytes of ``"8"``, ``"1KiB"``, ``"4M"``; every unit is a power of 1024. Local.

    Raises
    ------
    ValueError
        For anything else, and for nothing at all.
    """
    match = _SIZE.fullmatch(text.strip())
    nbytes = int(float(match[1]) * 1024 ** _PREFIXES.index(match[2].upper())) if match else 0
    if nbytes < 1:
        raise ValueError(f"must be sizes such as 8,1KiB,64MiB, got {text!r}")
    return nbytes


def compact_ranges(numbers: Iterable[int]) -> str:
    """``0-3,8`` for 0, 1, 2, 3, 8. Local."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
