r"""The TPU manager: one rank's XLA devices, as one fast worker of an MPI job.

The model that an optimizer steps, a checkpoint saves and other ranks know lives on the host. Each device has
a replica, driven by a thread of its own; nothing is spawned, so this works wherever MPI does::

                 rank 0                                    rank 1
    dataset --> feed --> xla:0  replica --.     dataset --> feed --> xla:0  replica --.
                     \-> xla:1  replica --+                     \-> xla:1  replica --+
                                          |  one transfer each                        |
                       flat sum on the host <------------ reducer ------------> flat sum
                       .grad of the model                                  .grad of the model
                       optimizer, upload                                   optimizer, upload

A step is: new parameters to the devices, if there are; ``grad_accumulation_steps`` batches through each;
gradients times samples, summed on the device, to the host in one transfer per device; one reduction over the
ranks; division by the number of all samples. The result is the gradient of the mean loss over the samples of
all devices and ranks, exactly as many as there were.

Invariant: ranks take part in every step, with nothing if they have nothing, or have failed. So a failure on
one is an error on all, in the same step, and the end of the data is where the last rank's data ends.
"""

from __future__ import annotations

import functools
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import nn

from hpcpar.comm import agree, broadcast_packed, check_alike
from hpcpar.errors import DatasetEndedError, HpcparError, StalledError
from hpcpar.xla.batches import BatchReader, ShortBatch
from hpcpar.xla.feed import Feed
from hpcpar.xla.gradients import HostGradients
from hpcpar.xla.model_state import ModelState, Snapshot
from hpcpar.xla.options import ManagerOptions, choose_devices
from hpcpar.xla.position import Position
from hpcpar.xla.replica import Contribution
from hpcpar.xla.shared_failure import share_failure
from hpcpar.xla.stats import ManagerStats, Tally
from hpcpar.xla.step_sums import StepSums, StepTotals
from hpcpar.xla.workers import Workers

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["TPUManager"]

_log = logging.getLogger(__name__)

_SUBJECT = "a TPUManager"
_CLOSING_S = 10.0  # for threads that are in the middle of something
_SHORT_CLOSING_S = 1.0


class TPUManager:
    """Runs a model on this rank's XLA devices and gathers the gradients on the host.

    Parameters
    ----------
    model
        On the host. Called with what ``collate_fn`` makes, by keywords for a mapping, by position for a tuple
        or list, and returns its mean loss over the samples of a batch: as a mapping with ``"loss"``, an
        object with ``.loss``, the first of a tuple or list, or alone. With ``comm``, rank 0's parameters and
        buffers are broadcast.
    dataset
        The samples of this rank: map-style, or anything to iterate over. To share one dataset among ranks,
        give it with ``sampler=hpcpar.data.DistributedSampler(dataset, comm)``.
    collate_fn
        Makes a batch of a list of samples; torch's default if None.
    batch_size_per_device
        Samples in one pass of one device. Ranks may differ.
    grad_accumulation_steps
        Passes of each device in one step.
    prefetch
        Batches that are read ahead on the host; each device holds two more.
    seed_base
        Random generator of device *i*, counted over all ranks, is seeded with ``seed_base + i``.
    devices
        To be used: ``torch.device``, names such as ``"xla:1"`` or numbers; by default all of this process.
    comm
        The ranks over which gradients are summed. None: this rank alone, as for an optimizer that
        communicates itself.
    sampler
        Indices into a map-style dataset, in the order in which to read it.
    num_workers
        Processes that read the dataset (which must be picklable then); 0 reads in a thread.
    short_batch
        What becomes of a last batch of fewer samples (:mod:`hpcpar.xla.batches`): ``"pad"`` fills it up and
        takes off again what that added; ``"drop"`` leaves it out; ``"compile"`` compiles a graph for it.
    bucket_mb
        Size of the pieces, in MiB, in which gradients are summed on the host.
    transport
        As in :class:`hpcpar.comm.Reducer`.

    Attributes
    ----------
    model : nn.Module
        The one that was given, on the host.
    devices : list of torch.device
        Those that are used.

    Raises
    ------
    TypeError, ValueError
        On the rank that was given something wrong.
    MismatchError
        On the other ranks then, and on all when the models differ.

    Notes
    -----
    Collective over ``comm`` are making one, ``step()``, ``epoch()``, ``state_dict()`` and ``shutdown()``; the
    rest is local.

    ``step()`` leaves the gradient in ``.grad`` of the host model, so any optimizer over its parameters can
    follow. It adds to what is there, as ``backward()`` does. What has changed of the model, its modes of
    training and evaluation included, goes to the devices at the beginning of the next step, in one transfer
    per device. Changes that torch does not count, as those through ``.data`` or numpy, need
    :meth:`update_model_parameters`. Which parameters there are, and which are trained, must stay.

    The tensors in ``.grad`` are the manager's: the next step writes to them again.

    Persistent buffers of numbers, such as running means, come back with the gradients: the host's are the
    mean over the devices, weighted by samples, of what each has made of them.

    Examples
    --------
    >>> with hpcpar.xla.TPUManager(model, dataset, batch_size_per_device=8, comm=comm) as manager:
    ...     for loss, samples in manager.epoch():
    ...         optimizer.step()
    ...         manager.update_model_parameters(model.parameters())
    ...         manager.zero_grad()
    """

    def __init__(
        self,
        model: nn.Module,
        dataset: Any,
        *,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        batch_size_per_device: int = 1,
        grad_accumulation_steps: int = 1,
        prefetch: int = 16,
        seed_base: int = 42,
        devices: Sequence[torch.device | str | int] | None = None,
        comm: Communicator | None = None,
        sampler: Iterable[int] | None = None,
        num_workers: int = 0,
        short_batch: ShortBatch = "pad",
        bucket_mb: float = 25.0,
        transport: str = "auto",
    ) -> None:
        def look() -> tuple[ManagerOptions, ModelState, list[torch.device]]:
            options = ManagerOptions(
                dataset,
                collate_fn,
                batch_size_per_device,
                grad_accumulation_steps,
                prefetch,
                seed_base,
                sampler,
                num_workers,
                short_batch,
                bucket_mb,
            )
            return options, ModelState(model), choose_devices(devices)

        self.model = model
        self._options, self._state, self.devices = look() if comm is None else agree([comm], _SUBJECT, look)
        if comm is not None:
            lines = [f"bucket_mb={bucket_mb} transport={transport}", *self._state.describe()]
            check_alike(comm, _SUBJECT, lines)
            broadcast_packed([*model.parameters(), *model.buffers()], comm, 0)
        self._comm = None if comm is None else comm.Dup()
        trainable = [self._state.parameters[index] for index in self._state.trainable]
        self._gradients = HostGradients(trainable, self._state.dtype)
        self._sums = StepSums(
            self._comm,
            [parameter.numel() for parameter in trainable],
            sum(buffer.numel() for buffer in self._state.tracked),
            self._state.dtype,
            bucket_bytes=int(bucket_mb * 2**20),
            transport=transport,
        )
        self._position = Position(self._comm, sampler, dataset)
        self._on_devices: Snapshot | None = None
        self._is_reading = self._was_left = self._end_was_told = self._is_shut_down = False
        self._why_unusable = ""
        self._shared_error: Exception | None = None  # raised last, on all ranks together
        self._tally = Tally(self._where)
        self._start_workers()

    def step(self) -> tuple[float, int]:
        """Forward and backward on all devices; the gradient is in ``.grad`` of the host model. Collective.

        Returns
        -------
        loss : float
            Mean over the samples of all devices and ranks.
        samples : int
            How many they were: fewer than usual where the data of a rank ends. At the end of all ranks' data,
            once, ``(0.0, 0)``; gradients are untouched then.

        Raises
        ------
        Exception
            Whatever the dataset, the collate function or the model raised on this rank. The samples of the
            step are lost, gradients are untouched; another step may follow.
        RankFailedError
            When that happened on another rank, with the cause.
        StalledError
            At the deadline, naming the device, and what it is busy with. Nothing may follow.
        DatasetEndedError
            When the end was told before, see :meth:`epoch`.
        """
        self._check_usable()
        self._shared_error = None
        if self._end_was_told:
            raise DatasetEndedError(
                "TPUManager.step() must have samples, got the end of the dataset, of which the last call has "
                "told by (0.0, 0). epoch() begins again"
            )
        try:
            return self._step()
        except BaseException as error:
            # Ctrl-C, or ranks that did not come: the others are anywhere by now, and nothing may follow.
            if error is not self._shared_error:
                self._why_unusable = f"{type(error).__name__} in step()"
                self._sums.give_up()
            raise

    def epoch(self) -> Iterator[tuple[float, int]]:
        """Steps until the data of all ranks has ended; yields what :meth:`step` returns. Collective.

        Each call reads the dataset, or the sampler, from its beginning; the first one after
        :meth:`load_state_dict` goes on from there. What a loop has left over when it was left is dropped. To
        go on after a failed step, call :meth:`step`.
        """
        self._end_was_told = False
        if self._is_reading:
            self._is_reading, self._was_left = False, True
            self._position.start_epoch()
        while True:
            loss, samples = self.step()
            if not samples:
                return
            yield loss, samples

    def get_aggregated_gradients(self) -> list[torch.Tensor | None]:
        """Copies of the gradients, in the order of ``model.parameters()``. Local.

        Returns
        -------
        list
            None for a parameter that has no gradient: a frozen one, or one that no step has used.
        """
        return [None if p.grad is None else p.grad.detach().clone() for p in self._state.parameters]

    def zero_grad(self) -> None:
        """Set the gradients to zero, so that the next step's do not add to them. Local."""
        self._gradients.zero()

    def update_model_parameters(self, new: Iterable[torch.Tensor] | Mapping[str, torch.Tensor]) -> None:
        """Give the model new parameters; the devices get them at the beginning of the next step. Local.

        Parameters
        ----------
        new
            In the order of ``model.parameters()``, which may be what is given, or by name, as
            ``state_dict()`` returns, buffers included. Copied.

        Raises
        ------
        ValueError
            When they do not fit; nothing is changed then.
        """
        if isinstance(new, Mapping):
            self._state.assign_named(new)
        else:
            self._state.assign(list(new))
        self._on_devices = None

    def state_dict(self) -> dict[str, Any]:
        """Where the training is: to continue it, save this beside the model and the optimizer. Collective.

        Returns
        -------
        dict
            The same on all ranks. With :class:`hpcpar.data.DistributedSampler` or
            :class:`hpcpar.data.H5Dataset`, whose place is in it, an epoch continues on any number of ranks.
        """
        self._check_usable()
        return self._position.state_dict(self._workers.random_states())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from there, before the first step of an epoch. Local; all ranks must.

        On other ranks or devices than it was saved on, random generators start from their seeds.

        Raises
        ------
        HpcparError
            When an epoch is under way.
        ValueError
            When the state is of another number of ranks, and nothing can share out the rest.
        """
        if self._is_reading:
            raise HpcparError(
                "load_state_dict() must come before the first step of an epoch, got it later; make a new "
                "manager"
            )
        states = self._position.load_state_dict(state)
        self._end_was_told = False
        if states is None or len(states) != len(self.devices):
            states = self._seeds
        self._workers.set_random_states(states)

    def stats(self) -> ManagerStats:
        """What has been done so far. Local."""
        return self._tally.stats(self._position, self._workers.waited_s)

    def shutdown(self) -> None:
        """End the threads and give the communicator back; a second call is fine. Collective.

        After Ctrl-C or a deadline it waits for nobody.
        """
        if self._is_shut_down:
            return
        self._is_shut_down = True
        self._finalizer.detach()
        self._workers.close(_SHORT_CLOSING_S if self._why_unusable else _CLOSING_S)
        if self._why_unusable:
            return  # other ranks may never come to free theirs
        self._sums.free()
        if self._comm is not None:
            self._comm.Free()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and error is not self._shared_error and not self._why_unusable:
            self._why_unusable = f"{type(error).__name__} in its with statement"
        self.shutdown()

    def _start_workers(self) -> None:
        options, comm = self._options, self._comm
        reader = BatchReader(
            options.dataset,
            options.batch_size_per_device,
            collate_fn=options.collate_fn,
            sampler=options.sampler,
            num_workers=options.num_workers,
            short_batch=options.short_batch,
            seed=(options.seed_base, self._position.rank),
        )
        make_feed = functools.partial(Feed, reader, self.devices, options.prefetch, self._state.dtype)
        self._workers = Workers(self.devices, make_feed, self._where)
        # A manager that is forgotten ends its threads, too.
        self._finalizer = weakref.finalize(self, self._workers.close, _SHORT_CLOSING_S)
        counts = [len(self.devices)] if comm is None else comm.allgather(len(self.devices))
        first = self._options.seed_base + sum(counts[: self._position.rank])
        self._seeds = list(range(first, first + len(self.devices)))
        self._on_devices = self._state.snapshot()

        def build() -> None:
            self._workers.build(self._state, self._seeds)

        try:
            build() if comm is None else agree([comm], _SUBJECT, build)
        except BaseException as error:
            if isinstance(error, StalledError) or not isinstance(error, Exception):
                self._why_unusable = f"{type(error).__name__} at the start"  # so wait for nobody
            self.shutdown()
            raise

    @property
    def _where(self) -> str:
        return f"rank {self._position.rank} of {self._position.size}"

    def _check_usable(self) -> None:
        if self._is_shut_down:
            raise HpcparError("a TPUManager must be open, got one that was shut down")
        if self._why_unusable:
            raise HpcparError(f"a TPUManager must be made anew after a failure, got {self._why_unusable}")

    def _step(self) -> tuple[float, int]:
        contributions, error = self._run_devices()
        if isinstance(error, StalledError):
            _log.error("%s", error)  # at once: the others may be late, or gone
        start = time.perf_counter()
        try:
            totals = self._sums.add_up(contributions, failed=error is not None)
        except StalledError as late:
            if error is None:
                raise
            raise error from late  # nobody came to hear of it
        if self._is_reading:
            self._position.go_to(self._workers.taken)
        if totals.failed:
            self._shared_error, is_final = share_failure(self._comm, error, self._where)
            self._on_devices = None  # what the step has done to buffers there is undone
            if is_final:
                self._why_unusable = "a deadline in step()"
            raise self._shared_error
        loss = self._apply(totals)
        self._tally.reducing_s += time.perf_counter() - start
        return loss, totals.samples

    def _run_devices(self) -> tuple[list[Contribution], Exception | None]:
        """What this rank does alone; an error is the second of what is returned, for ranks to share."""
        try:
            self._state.check_kept()
            if self._was_left:
                self._workers.leave_epoch()
                self._position.restart()
                self._was_left = False
            if not self._is_reading:
                self._workers.start_epoch(self._position.skipped)
                self._is_reading = True
            now = self._state.snapshot()
            if self._on_devices is None or not now.is_like(self._on_devices):
                self._workers.load(self._state)
                self._on_devices = now
            return self._workers.step(self._options.grad_accumulation_steps), None
        except Exception as error:
            return [], error

    def _apply(self, totals: StepTotals) -> float:
        """Take the sums into the gradients and buffers; returns the mean loss."""
        if not totals.samples:
            self._is_reading, self._end_was_told = False, True
            self._position.start_epoch()
            return 0.0
        self._gradients.add(self._sums.gradients, totals.samples, totals.used)
        self._state.change_tracked(self._sums.buffer_changes / totals.samples)
        self._position.steps += 1
        self._position.samples += totals.samples
        self._tally.look_for_new_graphs(self._position.steps)
        return totals.loss_sum / totals.samples
