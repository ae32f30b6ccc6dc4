"""Loading: rank 0 reads the manifest, every rank reads of the data what it wants.

Ranks load what they ask for, whoever has written it: a stage of a pipeline its layers, one process
everything. Nothing in a checkpoint is executed or unpickled, wherever it came from.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpcpar.checkpoint.manifest import manifest_from, manifest_text
from hpcpar.checkpoint.ranks import Alone, Ranks, ranks_of, together
from hpcpar.checkpoint.reading import LeafReader
from hpcpar.checkpoint.saving import finish_pending
from hpcpar.checkpoint.template import Place, Template
from hpcpar.errors import CheckpointError

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
    """Load what was saved, on any number of ranks. Collective; Local for a process alone.

    Parameters
    ----------
    path
        The folder, the same on all ranks.
    state
        A template: what of the checkpoint is wanted, in the same nested form. Its tensors and arrays are
        filled in place, on their devices, and must have the saved shapes and dtypes; other values are
        replaced in its dicts and lists; objects get theirs by ``load_state_dict()``. ``None``, an empty dict
        or an empty list, in any place, takes all that is saved there. What it does not ask for is not read.
        By default everything is loaded, tensors on the host.
    comm
        The ranks that load together, so that a failure on one is raised by all. By default all ranks of the
        job, or this process if it was started alone.
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
    ``None``. A process alone is rank 0.

    Where all of a dict is taken, by an object or without a template, a rank gets back the keys that it had
    itself if the number of ranks is the one that saved, and the keys of all ranks if it is another.
    """
    communicator = ranks_of(comm)
    ranks: Ranks = Alone() if communicator is None else communicator
    folder = _agreed(ranks, path)
    finish_pending(folder)
    text = together(ranks, _on_root(ranks, lambda: manifest_text(folder)))
    text = ranks.bcast(text)
    manifest = together(ranks, lambda: manifest_from(text, folder))
    with LeafReader(folder, manifest, verify=verify) as reader:
        template = Template(reader, Place(ranks.rank, ranks.size, manifest.ranks), strict=strict)
        read = together(ranks, lambda: template.match(state, manifest.node))
        result = together(ranks, read)
        together(ranks, template.load_objects)
    return result


def _on_root(ranks: Ranks, action: Callable[[], str]) -> Callable[[], str]:
    return action if ranks.rank == 0 else str


def _agreed(ranks: Ranks, path: str | os.PathLike[str]) -> Path:
    """The folder, which all ranks must mean: by values of several checkpoints nothing would look wrong."""
    paths = ranks.allgather(os.path.abspath(path) if os.fspath(path) else "")
    different = next((rank for rank, other in enumerate(paths) if other != paths[0]), None)
    if different is not None:
        raise CheckpointError(
            f"path of a checkpoint must be the same on all ranks, got {paths[0]!r} on rank 0 and "
            f"{paths[different]!r} on rank {different}. Find it by latest(folder, comm)"
        )
    if not paths[0]:
        raise CheckpointError("path must be the folder of a checkpoint, got ''")
    return Path(path)
