"""Samples of HDF5 files, shared exactly among ranks and read in whole blocks by a thread that is ahead.

::

    shares        which positions of the epoch are this rank's          (shares.py)
    epoch order   which samples these are, and which blocks to read     (epoch_order.py)
    reader        a thread that fills a ring of buffers                 (block_reader.py)
    gather        batches, copied out of the buffers                    (batching.py)

With ``cache="node"`` the samples are in memory and there is no reader; order and shares are the same.

In the workers of a ``DataLoader`` each takes every so-manieth batch of this rank's, so that the loader, which
asks its workers in turn, hands batches out in the order in which one process would. A position in an epoch
is therefore one number, however many workers there are.

Nothing is open between iterations: every iteration opens the files in the process and thread that read.
"""

from __future__ import annotations

import logging
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from hpcpar.comm import agree
from hpcpar.data.amplification import read_amplification
from hpcpar.data.batching import MemoryParts, gather
from hpcpar.data.block_reader import BlockReader
from hpcpar.data.epoch_order import EpochOrder, Interleave
from hpcpar.data.h5_files import OpenFiles, Paths
from hpcpar.data.node_cache import NodeCache
from hpcpar.data.node_layout import Wanted, check_same, describe_on_nodes
from hpcpar.data.progress import Cursor, Progress, check_state, gather_taken
from hpcpar.data.read_options import ReadOptions
from hpcpar.data.shares import count, piece, whole_number
from hpcpar.data.worker_board import WorkerBoard, WorkerUse

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Batches", "H5Dataset"]

_LOG = logging.getLogger(__name__)
_SUBJECT = "an H5Dataset"
_RUN_SAMPLES = 64  # copied at once when samples are handed out one by one
_AMPLIFICATION, _MATTERS_BYTES = 1.5, 16 << 20  # what to warn of, and from which size of the data


class H5Dataset(IterableDataset[Any]):
    """Samples of one or several HDF5 files, this rank's share of each epoch.

    Collective to make, to close, and in ``gather_state``, over ``comm``; all else is Local.

    Parameters
    ----------
    path
        A file, a pattern such as ``"train-*.h5"`` or ``"train/**/*.h5"``, or a list of these; several files
        count as one, in their order. One rank of each node looks at them.
    names
        Of the dataset in each file that has a sample in each row, or a list of names of datasets that belong
        together and are equally long. A sample is a tensor, or a tuple of tensors for a list.
    comm
        The ranks that share the work; after construction only ``close`` and ``gather_state`` use it. None:
        this process takes all.
    shuffle
        Whether each epoch has an order of its own: blocks are shuffled, then samples in windows of blocks.
    seed
        From 0. The order depends on it and on the epoch; torch's and numpy's own generators are not used.
    block_size
        Samples to read at once, rounded up to whole chunks; None for about a 256th of the data, from 64 KiB
        to 1 MiB.
    window_blocks
        Blocks among which samples mix; None for a 128th of the data, from 4 to 16 blocks, at most 64 MiB.
        This rank holds ``buffers`` windows.
    batch_size
        Default of :meth:`batches`. A ``DataLoader`` with workers that makes batches out of single samples
        must be given the same number, so that its order is that of one process.
    transform
        Called with each sample, a tensor or a tuple, before it is handed out; also on the way to a batch.
    batch_transform
        Called with each batch that :meth:`batches` makes.
    buffers
        Windows in the ring, from 2.
    pin_memory
        Whether batches are in page-locked memory; None: where there is CUDA, outside of worker processes.
    cache
        ``"node"``: read everything now, once for each node, into memory that its ranks share.
    driver
        ``"mpio"``: open the files through MPI-IO, with an h5py that was built for it. Seldom faster.

    Raises
    ------
    FileNotFoundError, OSError, KeyError, TypeError, ValueError
        On the rank that cannot find or use what it was given.
    MismatchError
        On all other ranks, and on all when ranks were given different data or options.

    Examples
    --------
    >>> data = hpcpar.data.H5Dataset("train.h5", ["images", "labels"], comm, shuffle=True)
    >>> for epoch in range(10):
    ...     data.set_epoch(epoch)
    ...     for images, labels in data.batches(64):
    ...         ...
    """

    def __init__(
        self,
        path: Paths,
        names: str | Sequence[str],
        comm: Communicator | None = None,
        *,
        shuffle: bool = False,
        seed: int = 0,
        block_size: int | None = None,
        window_blocks: int | None = None,
        batch_size: int | None = None,
        transform: Callable[[Any], Any] | None = None,
        batch_transform: Callable[[Any], Any] | None = None,
        buffers: int = 2,
        pin_memory: bool | None = None,
        cache: str | None = None,
        driver: str | None = None,
    ) -> None:
        def understand() -> tuple[Wanted, ReadOptions]:
            given = (bool(shuffle), seed, block_size, window_blocks, batch_size, buffers, cache, driver)
            return Wanted.of(path, names), ReadOptions(*given).checked(comm)

        rank, ranks = (0, 1) if comm is None else (comm.rank, comm.size)
        groups = [] if comm is None or ranks == 1 else [comm]
        wanted, self._options = agree(groups, _SUBJECT, understand) if groups else understand()
        self._layout = describe_on_nodes(comm, _SUBJECT, wanted)
        if comm is not None and ranks > 1:
            check_same(comm, _SUBJECT, [*self._layout.lines(), *self._options.lines()])
        self._single, self._comm = isinstance(names, str), comm
        self._transform, self._batch_transform, self._pin_memory = transform, batch_transform, pin_memory
        self._bounds = self._layout.bounds(self._options.block_size)
        self._window_blocks = self._options.window(self._layout, len(self._bounds) - 1)
        if rank == 0 and cache is None:
            self._warn_of_amplification(ranks)
        self._progress, self._board = Progress(self._layout.samples, rank, ranks), WorkerBoard()
        self._readers: weakref.WeakSet[BlockReader] = weakref.WeakSet()
        self._closed = False
        self._cache = None if cache is None else NodeCache(comm, self._layout, self._bounds)
        self._parallel = self._open_parallel(comm) if driver is not None else None

    # ---- reading

    def __iter__(self) -> Iterator[Any]:
        """Sample by sample, in memory that is never written again; it begins with the first one. Local."""
        if self._batch_transform is not None:
            raise ValueError("batch_transform must be used with batches(), got an iteration over samples")
        cursor, parts, total = self._begin(self._options.batch_size)
        with closing(parts):
            for columns in gather(parts, self._layout.fields, total, _RUN_SAMPLES, pinned=False):
                for sample in self._split(columns):
                    cursor.advance(1)
                    yield sample if self._transform is None else self._transform(sample)
        cursor.end()

    def batches(self, batch_size: int | None = None, *, drop_last: bool = False) -> Batches:
        """Whole batches of this rank's samples, which is the fast way. Local.

        Parameters
        ----------
        batch_size
            Samples in each; None for the dataset's own.
        drop_last
            Whether to leave out a last batch that is smaller. Then the epoch is not exact; a state counts
            what was left out as taken.

        Returns
        -------
        Batches
            To iterate over, by itself or by a ``DataLoader(..., batch_size=None)``. A batch has tensors of
            shape ``(batch_size, *shape of a sample)``.
        """
        size = self._options.batch_size if batch_size is None else batch_size
        return Batches(self, whole_number("batch_size", size, 1), drop_last)

    def __len__(self) -> int:
        """Samples that this rank gets in the iteration that is in progress, or else in the next. Local."""
        return count(self._progress.share())

    @property
    def total_samples(self) -> int:
        """Samples in the files, the work of all ranks in an epoch."""
        return self._layout.samples

    # ---- where it is

    def set_epoch(self, epoch: int) -> None:
        """Go to the beginning of an epoch, 0 at first; nothing happens when it is this one. Local.

        Without it every iteration has the same order, as with torch's ``DistributedSampler``.
        """
        if self._progress.set_epoch(epoch):
            self._board.announce(epoch)

    def restart(self) -> None:
        """Go to the beginning of this epoch, whatever was loaded or handed out. Local."""
        self._progress.restart()
        self._board.announce(self._progress.epoch)

    def state_dict(self, samples: int | None = None) -> dict[str, Any]:
        """Where the epoch is, to continue it on any number of ranks, if ranks go in step. Local.

        Parameters
        ----------
        samples
            How many this rank has trained on since the epoch was begun, or continued. None: as many as the
            last iteration of this process has handed out. With worker processes, which read ahead, it must
            be given; a rank's whole share is then the end of the epoch.

        Returns
        -------
        dict
            Of numbers and lists. It is the same on all ranks that have taken equally many batches, or all
            of theirs. Where ranks may have taken different numbers, use :meth:`gather_state`.

        Raises
        ------
        ValueError
            When worker processes have read and ``samples`` is not given, or their order is not that of one
            process.
        """
        self._check_workers(samples)
        return {**self._identity(), **self._progress.state(self._progress.taken(samples))}

    def gather_state(self, samples: int | None = None) -> dict[str, Any]:
        """Where the epoch is, whatever each rank has taken; the same on all ranks. Collective.

        Parameters
        ----------
        samples
            As for :meth:`state_dict`, of this rank.

        Returns
        -------
        dict
            To be loaded as that of :meth:`state_dict`.

        Raises
        ------
        ValueError
            As by :meth:`state_dict`, on the rank concerned.
        MismatchError
            On all others then, and on all when ranks are in different epochs.
        """
        progress = self._progress

        def look() -> tuple[list[str], int]:
            self._check_workers(samples)
            return progress.place(), progress.own_taken(samples)

        taken = gather_taken(self._comm, progress.ranks, "the state of an H5Dataset", look)
        return {**self._identity(), **progress.state(taken)}

    def _check_workers(self, samples: int | None) -> None:
        use = self._board.use
        if samples is None and use is not WorkerUse.NONE:
            raise ValueError(
                "samples must be given to state_dict() with the workers of a DataLoader, which read ahead, "
                "got None. Count the samples that were trained on in this epoch"
            )
        if use is WorkerUse.BY_PIECES:
            raise ValueError(
                "batch_size must be given to H5Dataset for a state_dict() with the workers of a DataLoader, "
                "got None. It makes their order that of one process; or load batches(n) with batch_size=None"
            )

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue an epoch, by a state of either kind: the next iteration has what was left of it. Local.

        On the same number of ranks, that had gone in step, each goes on in the order in which it would have;
        else each remaining sample still comes exactly once. The place that was loaded holds until an
        iteration has come to its end, in this process, or ``set_epoch`` goes to another epoch; so one may
        look at a batch and begin again.

        Raises
        ------
        ValueError
            When the state is of other data, or of another order.
        """
        own = {**self._identity(), **self._progress.state(0)}
        check_state("an H5Dataset", state, own, varying=("epoch", "spans", "ranks", "taken"))
        self._progress.load(state)
        self._board.announce(self._progress.epoch, loaded=True)

    # ---- the end

    def close(self) -> None:
        """End reading and give back what was taken; a second call is fine. Collective with ``comm``."""
        self._closed = True
        for reader in list(self._readers):
            reader.close()
        if self._cache is not None:
            self._cache.free()
            self._cache = None
        if self._parallel is not None:
            self._parallel.close()
            self._parallel = None

    def __enter__(self) -> H5Dataset:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # After an error other ranks may never come to free the shared memory with us.
        if kind is None or self._cache is None:
            self.close()

    def __getstate__(self) -> dict[str, Any]:
        state = {**self.__dict__, "_readers": None, "_cache": None, "_comm": None}
        if self._parallel is not None:
            raise TypeError(
                "a dataset with driver='mpio' must not be pickled: its files are open on all ranks"
            )
        if self._cache is not None:
            _LOG.warning("a pickled dataset reads its files: the node's memory does not go with it")
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._readers = weakref.WeakSet()

    # ---- private

    def _identity(self) -> dict[str, Any]:
        return {
            "samples": self._layout.samples,
            "shuffle": self._options.shuffle,
            "seed": self._options.seed,
            "window_blocks": self._window_blocks,
            "blocks_crc": zlib.crc32(self._bounds.tobytes()),
        }

    def _warn_of_amplification(self, ranks: int) -> None:
        samples, blocks, shuffle = self._layout.samples, len(self._bounds) - 1, self._options.shuffle
        times = read_amplification(samples, blocks, self._window_blocks, ranks, shuffle=shuffle)
        if times > _AMPLIFICATION and samples * self._layout.sample_bytes >= _MATTERS_BYTES:
            _LOG.warning(
                "%d ranks read the data %.1f times in each epoch: their shares are small beside a window of "
                "%d of %d blocks. Use cache='node', or a smaller window_blocks or block_size",
                ranks,
                times,
                self._window_blocks,
                blocks,
            )

    def _open_parallel(self, comm: Communicator | None) -> OpenFiles:
        files = OpenFiles(self._layout, driver="mpio", comm=comm.mpi if comm is not None else None)
        files.open_all()
        return files

    def _begin(self, group: int | None) -> tuple[Cursor, BlockReader | MemoryParts, int]:
        """Start an iteration: where it counts, what it reads, and how many samples that is."""
        if self._closed:
            raise RuntimeError("a dataset must not be read from after close(), got an iteration")
        worker = get_worker_info()
        if worker is not None:
            if self._parallel is not None:
                raise RuntimeError(
                    "driver='mpio' must be used without worker processes, got a DataLoader with some"
                )
            use = WorkerUse.IN_TURN if group else WorkerUse.BY_PIECES
            self._progress.set_epoch(self._board.read_epoch(use))
        cursor = self._progress.begin(keep=worker is not None)
        spans, interleave = cursor.spans, None
        if worker is not None and group:
            interleave = Interleave(worker.id, worker.num_workers, group)
        elif worker is not None:
            spans = piece(spans, worker.id, worker.num_workers)
        total = count(spans) if interleave is None else interleave.count(count(spans))
        order = EpochOrder(
            self._bounds,
            self._window_blocks,
            shuffle=self._options.shuffle,
            seed=self._options.seed,
            epoch=self._progress.epoch,
        )
        tasks = order.tasks(spans, interleave)
        if self._cache is not None:
            return cursor, MemoryParts(self._cache.arrays, tasks), total
        rows = order.largest_window if total else 0
        reader = BlockReader(self._opener(), tasks, self._layout.fields, rows, self._options.buffers)
        self._readers.add(reader)
        return cursor, reader, total

    def _opener(self) -> Callable[[], AbstractContextManager[OpenFiles]]:
        """What opens the files in the reader's thread; it must not keep this object alive."""
        parallel, layout = self._parallel, self._layout
        return lambda: OpenFiles(layout) if parallel is None else nullcontext(parallel)

    def _batches(self, size: int, drop_last: bool) -> Iterator[Any]:
        cursor, parts, total = self._begin(size)
        pinned = self._pin_memory
        if pinned is None:
            pinned = get_worker_info() is None and torch.cuda.is_available()
        with closing(parts):
            for columns in gather(parts, self._layout.fields, total, size, pinned=pinned):
                if drop_last and len(columns[0]) < size:
                    break
                cursor.advance(size, whole_only=drop_last)
                yield self._finish(columns)
        cursor.end()

    def _finish(self, columns: list[torch.Tensor]) -> Any:
        """A batch as the user wants it."""
        batch: Any = columns[0] if self._single else tuple(columns)
        if self._transform is not None:
            batch = default_collate([self._transform(sample) for sample in self._split(columns)])
        return batch if self._batch_transform is None else self._batch_transform(batch)

    def _split(self, columns: list[torch.Tensor]) -> Iterable[Any]:
        """Samples of a batch: tensors, or tuples of them."""
        rows = [column.unbind() for column in columns]
        return rows[0] if self._single else zip(*rows, strict=True)


class Batches(IterableDataset[Any]):
    """The batches of an :class:`H5Dataset`; made by its :meth:`~H5Dataset.batches`. Local.

    Iterating counts in the dataset: its ``state_dict`` is that of this iteration.
    """

    def __init__(self, dataset: H5Dataset, size: int, drop_last: bool) -> None:
        self._dataset, self._size, self._drop_last = dataset, size, drop_last

    def __iter__(self) -> Iterator[Any]:
        return self._dataset._batches(self._size, self._drop_last)

    def __len__(self) -> int:
        """Batches of this rank."""
        samples = len(self._dataset)
        return samples // self._size if self._drop_last else -(-samples // self._size)
