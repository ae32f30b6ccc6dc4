"""Reading the leaves of one checkpoint, with the files that were read last open."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import torch

from hpcpar.checkpoint.data_file import DataReader
from hpcpar.checkpoint.leaves import LeafValue, empty_leaf, finished
from hpcpar.checkpoint.manifest import Manifest
from hpcpar.checkpoint.plan import Piece
from hpcpar.checkpoint.tree import Node
from hpcpar.errors import CheckpointError

__all__ = ["LeafReader"]

_MOST_OPEN = 32  # files; a process may have some hundreds, and there is one for each rank that saved


class LeafReader:
    """Reads leaves by their nodes; a leaf that has several names is read once. Local; a context manager.

    Parameters
    ----------
    folder
        Of the checkpoint.
    manifest
        Of it.
    verify
        Whether to compare checksums.
    """

    def __init__(self, folder: Path, manifest: Manifest, *, verify: bool = True) -> None:
        self._folder, self._manifest, self._verify = folder, manifest, verify
        self._files: OrderedDict[int, DataReader] = OrderedDict()  # the one used last at the end
        self._values: dict[int, LeafValue] = {}

    def __enter__(self) -> LeafReader:
        return self

    def __exit__(self, *error: object) -> None:
        while self._files:
            self._files.popitem()[1].close()
        self._values.clear()

    def value(self, node: Node) -> LeafValue:
        """A new value of a leaf. Local.

        Raises
        ------
        CheckpointError
            When a file of it is missing or damaged.
        """
        number = node["n"]
        if number not in self._values:
            try:
                value, memory = empty_leaf(node)
            except (TypeError, ValueError, RuntimeError, KeyError) as error:
                raise CheckpointError(
                    f"{self._folder} must be read by a hpcpar that knows it: {error}"
                ) from error
            self.fill(node, memory)
            self._values[number] = finished(node, value)
        return self._values[number]

    def fill(self, node: Node, memory: torch.Tensor) -> None:
        """Read a leaf into memory of its size: uint8, one dimension, on the host. Local.

        Raises
        ------
        CheckpointError
            When a file of it is missing or damaged.
        """
        pieces = self._pieces(node)
        if sum(piece.nbytes for piece in pieces) != memory.numel():
            raise CheckpointError(
                f"{self._folder} must have {memory.numel()} bytes for a leaf, got {len(pieces)} slices"
            )
        start = 0
        for piece in pieces:
            self._file(piece.rank).read(piece, memory[start : start + piece.nbytes])
            start += piece.nbytes

    def forget(self) -> None:
        """Keep no values for further names of a leaf. Local."""
        self._values.clear()

    def _pieces(self, node: Node) -> Sequence[Piece]:
        number: int = node["n"]
        return self._manifest.leaves[number]

    def _file(self, rank: int) -> DataReader:
        if rank not in self._files:
            file = self._manifest.files[rank]
            if file is None:
                raise CheckpointError(
                    f"{self._folder} must have data of rank {rank}, got none in its manifest"
                )
            while len(self._files) >= _MOST_OPEN:
                self._files.popitem(last=False)[1].close()
            self._files[rank] = DataReader(self._folder, file, verify=self._verify)
        self._files.move_to_end(rank)
        return self._files[rank]
