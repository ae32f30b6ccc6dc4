"""Loading: rank 0 reads the manifest, every rank reads of the data what it wants.

Ranks load what they ask for, whoever has written it: a stage of a pipeline its layers, one process
everything. Nothing in a checkpoint is executed or unpickled, wherever it came from.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpar.checkpoint.manifest import Manifest, manifest_from, manifest_text
from hpcpar.checkpoint.ranks import Alone, Ranks, together
from hpcpar.checkpoint.reading import LeafReader
from hpcpar.checkpoint.template import Place, Template
from hpcpar.comm import MPI

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["load"]


def load(
    path: str | os.PathLike[str],
    state: Any = None,
    comm: Communicator | None = None,
    *,
    strict: bool = True,
    verify: bool = True,
) -> Any:
    """Load what was saved, on any number of ranks. Collective with ``comm``, else Local.

    Parameters
    ----------
    path
        The folder.
    state
        A template: what of the checkpoint is wanted, in the same nested form. Its tensors and arrays are
        filled in place, on their devices, and must have the saved shapes and dtypes; other values are
        replaced in its dicts and lists; objects get theirs by ``load_state_dict()``. ``None``, an empty dict
        or an empty list, in any place, takes all that is saved there. What it does not ask for is not read.
        By default everything is loaded, tensors on the host.
    comm
        The ranks that load together, so that a failure on one is raised by all.
    strict
        Whether it is an error when the template asks for something that was not saved, or when ranks saved
        different values, unmarked, and their number is another one now. Otherwise these places are left as
        they are, and left out where there is no template.
    verify
        Whether to compare the checksums of what is read.

    Returns
    -------
    Any
        The state; with a template, that.

    Raises
    ------
    CheckpointError
        When the checkpoint is missing, incomplete, damaged, or does not fit the template. Misfits are found
        before anything is changed; after damaged data the template may be filled in part.

    Notes
    -----
    A value that was marked by :class:`~hpcpar.checkpoint.PerRank` comes back on the rank of the same number;
    on others, when there are more ranks than then, the template keeps what it has, and without one it is
    ``None``. A process that loads without ``comm`` has its rank in the job, or is rank 0.
    """
    folder = Path(path)
    ranks: Ranks = Alone() if comm is None else comm
    text = together(ranks, _on_root(ranks, lambda: manifest_text(folder)))
    text = ranks.bcast(text)
    manifest = together(ranks, lambda: manifest_from(text, folder))
    with LeafReader(folder, manifest, verify=verify) as reader:
        template = Template(reader, _place(comm, manifest), strict=strict)
        read = together(ranks, lambda: template.match(state, manifest.node))
        result = together(ranks, read)
        together(ranks, template.load_objects)
    return result


def _on_root(ranks: Ranks, action: Callable[[], str]) -> Callable[[], str]:
    return action if ranks.rank == 0 else str


def _place(comm: Communicator | None, manifest: Manifest) -> Place:
    if comm is not None:
        return Place(comm.rank, comm.size, manifest.ranks)
    library = sys.modules.get("mpi4py.MPI")
    if library is None or not library.Is_initialized() or library.Is_finalized():
        return Place(0, 1, manifest.ranks)
    return Place(MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size(), manifest.ranks)
