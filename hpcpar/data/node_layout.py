"""Looking at the files once on each node: a thousand ranks that open a thousand files halt a metadata server.

One rank of each node opens the files, and the others are told what it found. Nodes look for themselves, for
each may have a copy on a disk of its own, and so does a rank that was given other paths than that rank. ::

    node 0   rank 0 looks --> rank 1      the same paths: told by rank 0
    node 1   rank 2 looks --> rank 3      the same paths: told by rank 2

What was found is compared between all ranks, by a digest, and in full only if digests differ.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpcpar.comm import agree, check_alike
from hpcpar.data.h5_files import Layout, Paths, describe, listed_names, listed_paths

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Wanted", "check_same", "describe_on_nodes"]


@dataclass(frozen=True)
class Wanted:
    """Which files to read, and what of them. ``folder`` is where relative paths begin."""

    paths: tuple[str, ...]
    names: tuple[str, ...]
    folder: str | None

    @classmethod
    def of(cls, paths: Paths, names: str | Sequence[str]) -> Wanted:
        """What a user asks for. Local; raises TypeError and ValueError as the functions that it calls."""
        listed = listed_paths(paths)
        folder = None if all(map(os.path.isabs, listed)) else os.getcwd()
        return cls(listed, listed_names(names), folder)


def describe_on_nodes(comm: Communicator | None, subject: str, wanted: Wanted) -> Layout:
    """What is in the files, seen by one rank of each node. Collective.

    Parameters
    ----------
    comm
        The ranks; None for this process alone.
    subject
        Of errors.
    wanted
        The files, which may differ between ranks.

    Raises
    ------
    Exception
        What :func:`~hpcpar.data.h5_files.describe` raises, on the rank that looked.
    MismatchError
        On all others then.
    """
    if comm is None or comm.size == 1:
        return describe(wanted.paths, wanted.names)
    node = comm.node
    told = node.bcast(wanted, root=0) == wanted and node.rank > 0
    found = agree([comm], subject, lambda: None if told else describe(wanted.paths, wanted.names))
    first = node.bcast(found, root=0)
    layout: Layout = first if found is None else found
    return layout


def check_same(comm: Communicator, subject: str, lines: Sequence[str]) -> None:
    """Raise on every rank when the ranks' descriptions differ. Collective.

    Raises
    ------
    MismatchError
        Shows the first line that differs from rank 0's.
    """
    digest = hashlib.sha256("\n".join(lines).encode(errors="surrogateescape")).hexdigest()
    if len(set(comm.allgather(digest))) > 1:
        check_alike(comm, subject, lines)
