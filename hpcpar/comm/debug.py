"""``HPCPAR_DEBUG=1``: before each collective the ranks compare what they are about to do.

Ranks that call different collectives, or the same one with other types or counts, hang or corrupt memory,
and MPI does not say so. With the switch on, every rank first gathers one line from all ranks (operation,
dtype, count, root, operator) with the place in the program that made the call; any difference raises the
same :class:`~hpcpar.errors.MismatchError` on all of them. The price is one small all-gather per call.
"""

from __future__ import annotations

import os
import sys
import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpar.comm.mpi import MPI
from hpcpar.comm.request import Request
from hpcpar.errors import MismatchError

if TYPE_CHECKING:
    from hpcpar.comm.base import CommunicatorBase

__all__ = ["call_site", "compare", "describe"]

_LINE_BYTES = 512
_DESCRIPTION_CHARACTERS = 200
_PACKAGE = str(Path(__file__).resolve().parent.parent) + os.sep


def call_site() -> str:
    """File and line of the innermost caller outside hpcpar. Local."""
    frame = sys._getframe(1)
    while frame.f_back is not None and str(Path(frame.f_code.co_filename)).startswith(_PACKAGE):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def compare(comm: CommunicatorBase, operation: str, facts: tuple[object, ...]) -> None:
    """Raise on every rank when the ranks are not about to do the same. Collective.

    Parameters
    ----------
    comm
        Where the collective takes place.
    operation
        Its name.
    facts
        What must be equal on all ranks; ``None`` entries are left out.

    Raises
    ------
    MismatchError
        Shows the operation and call site of this rank and of the first rank that differs.
    """
    described = " ".join([operation, *(describe(fact) for fact in facts if fact is not None)])
    if len(described) > _DESCRIPTION_CHARACTERS:  # many counts: leave room for the place
        described = (
            f"{described[:_DESCRIPTION_CHARACTERS]}... (checksum {zlib.crc32(described.encode()):08x})"
        )
    line = f"{described}\0{call_site()}".encode()[:_LINE_BYTES].ljust(_LINE_BYTES, b"\0")
    lines = bytearray(_LINE_BYTES * comm.size)
    handle = comm._control.Iallgather([line, MPI.BYTE], [lines, MPI.BYTE])
    Request(operation, [handle], comm._collective_patience, keep=(line, lines)).wait()
    calls = [
        bytes(lines[start : start + _LINE_BYTES]).rstrip(b"\0").decode(errors="replace").split("\0")
        for start in range(0, len(lines), _LINE_BYTES)
    ]
    first = calls[0]
    for rank, call in enumerate(calls):
        if call[0] != first[0]:
            raise MismatchError(
                f"all ranks must make the same call, got {first[0]!r} on rank 0 at {first[-1]} and "
                f"{call[0]!r} on rank {rank} at {call[-1]} (rank {comm.rank} of {comm.size})"
            )


def describe(fact: object) -> str:
    """``fact`` as the ranks compare it: MPI operators by name, anything else as text. Local."""
    if not isinstance(fact, MPI.Op):
        return str(fact)
    names = ("SUM", "PROD", "MAX", "MIN", "LAND", "LOR", "LXOR", "BAND", "BOR", "BXOR", "MAXLOC", "MINLOC")
    return next((name for name in names if getattr(MPI, name) == fact), "user-defined operator")
