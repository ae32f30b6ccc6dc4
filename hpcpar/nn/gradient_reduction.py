"""From autograd to the reducer: when a gradient is ready, where it goes, and when it is the mean.

Every trainable parameter has a slot in a bucket of the reducer, in reverse order of registration, which is
about the order in which backward finishes them. A hook runs after autograd has accumulated a gradient: it
moves the gradient into its slot, makes ``.grad`` a view of it, and publishes the bucket when the last of its
parameters has fired. When the outermost backward ends, a callback settles what is left::

    backward        fire w3  fire w2 | fire w1  fire w0 |  end of backward
    buckets               publish 0  |        publish 1 |  unfired parameters, tail, wait
    reducer                 ---- bucket 0 ---   ---- bucket 1 ----   -- tail --

*The tail* is one more bucket, with a number per parameter (did it get a gradient on this rank?), per buffer
(did it change?), and for the :class:`~hpcpar.nn.shared_flag.SharedFlag`. Its mean tells every rank which
parameters were used anywhere; those that were not keep ``grad is None``. A parameter that did not fire
contributes the gradient it already has, else zero.

Invariants:

* Between publish and completion nobody but the reducer touches a slot. So a bucket is published only when
  each of its parameters has fired as often as it did in the previous backward (a tied parameter under
  reentrant checkpointing fires several times), and in the first backward only at its end. One that fires
  more often than it ever did raises an error.
* The callback is queued from the hook of an output of the model, which runs in the outermost backward; one
  queued from a parameter's hook inside a reentrant checkpoint would run too early.
* Every rank publishes every bucket in every synchronised backward, whatever its graph looked like.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import (
    BucketLayout,
    Partition,
    Reducer,
    ReducerStats,
    even_partition,
    plan_buckets,
    view_slot,
    whole_tensors,
)
from hpcpar.errors import HpcparError
from hpcpar.nn.progress_trial import ProgressTrial
from hpcpar.nn.reduction_options import ReductionOptions
from hpcpar.nn.scattered_gradient import ScatteredGradient
from hpcpar.nn.shared_flag import SharedFlag
from hpcpar.nn.sparse_gradients import average_sparse
from hpcpar.nn.watched_tensors import WatchedTensors

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["GradientReduction"]


class GradientReduction:
    """Averages the gradients of some parameters over ranks, as backward produces them.

    Parameters
    ----------
    named_parameters
        Trainable parameters with their names, each once, in order of registration.
    sparse
        Those of them whose gradients are sparse tensors.
    buffers
        Returns the tensors, by name, whose changes are watched for in the tail.
    comm
        The ranks.
    options
        How.
    average
        Whether to divide the sum by the number of ranks.
    scatter
        ``"anywhere"`` or ``"tensors"``: leave each rank only its part of the means, cut so; ``.grad`` is a
        :class:`~hpcpar.nn.scattered_gradient.ScatteredGradient` then. ``None``: every rank has all of it.

    Attributes
    ----------
    synchronize : bool
        Whether the next backward reduces; otherwise it accumulates on this rank.
    sits_out_with_steps_only : bool
        Whether ranks that have run out of batches do nothing but steps, so that nobody may clip.
    within_node : bool
        Whether the next reduction is one of this node's ranks only; all of them must say the same.
    flag : SharedFlag
        A bit that goes along with every reduction over all ranks.

    Notes
    -----
    Collective to make and to free.
    """

    def __init__(
        self,
        named_parameters: Sequence[tuple[str, nn.Parameter]],
        sparse: Sequence[nn.Parameter],
        buffers: Callable[[], dict[str, torch.Tensor]],
        comm: Communicator,
        options: ReductionOptions,
        *,
        average: bool = True,
        scatter: str | None = None,
    ) -> None:
        sparse_ids = {id(parameter) for parameter in sparse}
        dense = [(name, p) for name, p in reversed(named_parameters) if id(p) not in sparse_ids]
        self._names = [name for name, _ in dense]
        self.parameters = [parameter for _, parameter in dense]
        self._sparse = list(sparse)
        self._buffers = WatchedTensors(buffers)
        self._options = options
        self._average = average
        self.synchronize = True
        self.ends_with_backward = True
        self.within_node = False
        self.sits_out_with_steps_only = False
        self.flag = SharedFlag()
        self.weight: Callable[[], float] | None = None
        self.overlapped: Callable[[], None] | None = None
        self.before_begin: Callable[[], None] = lambda: None
        self.after_end: Callable[[Sequence[str]], None] = lambda changed: None
        self.layouts, self.partitions = self._plan(comm, options, scatter)
        self.reducer = self._make_reducer(comm, options)
        self._views = [torch.empty(0)] * len(self.parameters)
        self._bucket_of = [0] * len(self.parameters)
        for bucket, layout in enumerate(self.layouts):
            for slot in layout.slots:
                self._views[slot.index] = view_slot(
                    self.reducer.flats[bucket], slot, self.parameters[slot.index]
                )
                self._bucket_of[slot.index] = bucket
        self._tail = len(self.layouts)
        self._trial = ProgressTrial(self.reducer, options.progress)
        self._used: list[float] = []  # the tail of this step, once it is there
        self._reduced = 0  # in blocking mode: buckets waited for in this backward
        self._expected: list[int] | None = None
        self._fired = [0] * len(self.parameters)
        self._left: list[int] = []
        self._open = False
        self._resolved = [True] * len(self.layouts)
        self._handles = [add_hook(p, self._make_hook(index)) for index, p in enumerate(self.parameters)]
        self._handles += [add_hook(p, self._sparse_hook) for p in self._sparse]

    def _plan(
        self, comm: Communicator, options: ReductionOptions, scatter: str | None
    ) -> tuple[list[BucketLayout], list[Partition]]:
        layouts = plan_buckets(self.parameters, options.bucket_bytes)
        if scatter == "tensors":
            return whole_tensors(layouts, comm.node_map)
        parts = [even_partition(layout, comm.node_map) for layout in layouts] if scatter else []
        return layouts, parts

    def _make_reducer(self, comm: Communicator, options: ReductionOptions) -> Reducer:
        tail = BucketLayout(torch.float32, len(self.parameters) + len(self._buffers.names) + 1)
        devices = [self.parameters[layout.slots[0].index].device for layout in self.layouts]
        return Reducer(
            comm,
            [*self.layouts, tail],
            transport=options.transport,
            wire_dtype=options.wire_dtype,
            devices=[*devices, torch.device("cpu")],
            partitions=[*self.partitions, None] if self.partitions else None,
        )

    @property
    def is_scattered(self) -> bool:
        """Whether each rank has only its part of the means. Local."""
        return bool(self.partitions)

    @property
    def flats(self) -> list[torch.Tensor]:
        """The flat tensor of each bucket; this rank's part holds the mean after backward. Local."""
        return self.reducer.flats[:-1]

    @property
    def wire_dtype(self) -> torch.dtype | None:
        """What gradients cross the network in, ``None`` for their own type. Local."""
        return self._options.wire_dtype

    @property
    def buckets(self) -> list[list[nn.Parameter]]:
        """The parameters of each bucket. Local."""
        return [[self.parameters[slot.index] for slot in layout.slots] for layout in self.layouts]

    @property
    def is_open(self) -> bool:
        """Whether a backward has begun and not ended. Local."""
        return self._open

    def stats(self) -> ReducerStats:
        """What reductions have cost. Local."""
        return self.reducer.stats()

    def watch(self, outputs: object) -> None:
        """Notice when backward reaches an output of the model. Local."""
        on_gradient(outputs, self._on_output_gradient)

    def wait(self, bucket: int) -> None:
        """Wait for the mean of a bucket, and put it in ``.grad``. Collective in effect."""
        if self._resolved[bucket]:
            return
        self.reducer.wait(bucket)
        self._read_tail()
        for slot in self.layouts[bucket].slots:
            parameter = self.parameters[slot.index]
            parameter.grad = self._result(slot.index) if self._used[slot.index] > 0.0 else None
        self._resolved[bucket] = True

    def _read_tail(self) -> None:
        if not self._used:
            self.reducer.wait(self._tail)
            self._used = self.reducer.flats[self._tail].tolist()

    def _see_flag(self) -> None:
        """Learn of the flags of the reduction that is over; one within a node says nothing of others."""
        self._read_tail()
        if not self.within_node:
            self.flag.seen = self._used[-1] > 0.0

    def _see_overlapped_flag(self) -> None:
        """Before a step begins: that of the one before, whose end this rank may have seen at any time."""
        if self.overlapped is not None and self._used:
            self._see_flag()

    def _result(self, index: int) -> torch.Tensor:
        view = self._views[index]
        return view.as_subclass(ScatteredGradient) if self.is_scattered else view

    def wait_all(self) -> None:
        """Wait for all buckets, as :meth:`wait`."""
        for bucket in range(len(self.layouts)):
            self.wait(bucket)

    def finish(self) -> None:
        """Publish the gradients as they are now, for an owner that says itself when backward is over.

        It has set ``ends_with_backward`` to false and ``overlapped`` to what is to happen instead of
        waiting. Also for gradients that no backward under ``synchronize`` has touched. Collective in
        effect, does not wait.
        """
        if not self._open:
            self._begin()
        self._end()

    def shadow_step(self) -> bool:
        """Take part in one reduction with nothing to contribute; false when no rank is active. Collective."""
        self.before_begin()
        self._see_overlapped_flag()
        self._trial.begin_step()
        self.reducer.begin(0.0, active=False, within_node=self.within_node)
        if self.reducer.active_ranks() == 0:
            self.reducer.abandon()
            return False
        for bucket, flat in enumerate(self.reducer.flats):
            flat.zero_()
            if bucket == self._tail:
                flat[-1] = float(self.flag.raised)
            self.reducer.publish(bucket)
        self._resolved = [False] * len(self.layouts)
        self._used = []
        self.wait_all()
        if self.overlapped is None:
            self._see_flag()
        self._average_sparse(0.0)
        return True

    def give_up(self) -> None:
        """Leave a reduction unfinished, since another rank has failed. Local."""
        self._open = False
        self.reducer.give_up()

    def free(self) -> None:
        """Remove the hooks, detach the gradients from the buckets, free the reducer. Collective."""
        for handle in self._handles:
            handle.remove()
        self._detach()
        self._views = []
        self.reducer.free()

    def _detach(self) -> None:
        """Give gradients that lie in buckets memory of their own; no view may stay, or the buckets do."""
        for parameter, view in zip(self.parameters, self._views, strict=True):
            if isinstance(parameter.grad, ScatteredGradient):
                parameter.grad = None
            elif parameter.grad is not None and parameter.grad.data_ptr() == view.data_ptr():
                parameter.grad = parameter.grad.clone()

    # Hooks -----------------------------------------------------------------------------------------------

    def _on_output_gradient(self) -> None:
        if self.is_scattered:
            self._check_no_leftovers()
        if not self.synchronize:
            self.before_begin()  # autograd is about to add to gradients that may still be under way
        elif not self._open:
            self._begin()

    def _check_no_leftovers(self) -> None:
        """Nobody can add to a mean that is spread over the ranks."""
        for name, parameter in zip(self._names, self.parameters, strict=True):
            if isinstance(parameter.grad, ScatteredGradient):
                raise HpcparError(
                    f"zero_grad() must be called between a step of a ShardedOptimizer and the next backward, "
                    f"got the last gradient of {name!r}. To accumulate, use no_sync() for all backwards but "
                    "the last"
                )

    def _sparse_hook(self, parameter: torch.Tensor) -> None:
        if self.synchronize and not self._open:
            self._begin()

    def _make_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        def hook(parameter: torch.Tensor) -> None:
            if self.synchronize:
                self._on_gradient(index)

        return hook

    def _on_gradient(self, index: int) -> None:
        if not self._open:
            self._begin()
        start = time.perf_counter()
        self._fill(index)
        self._fired[index] += 1
        self.reducer.account(time.perf_counter() - start)
        if self._expected is None:
            return
        bucket = self._bucket_of[index]
        surplus = self._fired[index] - self._expected[index]
        if surplus == 0:
            self._left[bucket] -= 1
            if self._left[bucket] == 0:
                self._publish(bucket)
                return
        elif surplus > 0 and self._left[bucket] == 0:
            raise HpcparError(
                f"parameter {self._names[index]!r} must get its gradient as often in each backward, got it "
                f"{self._fired[index]} times after {self._expected[index]} in the backward before, when its "
                "bucket had been sent. Use torch.utils.checkpoint with use_reentrant=False"
            )
        self.reducer.progress()

    def _begin(self) -> None:
        self.before_begin()
        self._see_overlapped_flag()
        self._trial.begin_step()
        self._weight = None if self.weight is None else self.weight()
        self.reducer.begin(self._weight, average=self._average, within_node=self.within_node)
        self._open = True
        self._fired = [0] * len(self.parameters)
        self._left = [len(layout.slots) for layout in self.layouts]
        self._used = []
        self._reduced = 0
        self._unpublished = set(range(len(self.layouts)))
        self._resolved = [False] * len(self.layouts)
        if self.ends_with_backward:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(self._end)

    def _fill(self, index: int) -> None:
        parameter, view = self.parameters[index], self._views[index]
        gradient = parameter.grad
        if gradient is None or gradient.data_ptr() == view.data_ptr():
            return
        gradient = gradient.detach()  # it has a graph after backward(create_graph=True)
        view.copy_(gradient if gradient.layout is torch.strided else gradient.to_dense())
        parameter.grad = view

    def _publish(self, bucket: int) -> None:
        if self._weight is not None:
            self.reducer.flats[bucket].mul_(self._weight)
        self._unpublished.discard(bucket)
        self.reducer.publish(bucket)
        # Strictly in order: a bucket behind one that is not published can only be waited for later.
        while self._options.blocking and self._reduced <= bucket and self._reduced not in self._unpublished:
            self.reducer.wait(self._reduced)
            self._reduced += 1

    def _end(self) -> None:
        """The outermost backward is over: settle everything. Queued by :meth:`_begin`, or by the owner."""
        used = [1.0] * len(self.parameters)
        for index, times in enumerate(self._fired):
            if times:
                continue
            if self.parameters[index].grad is None:
                self._views[index].zero_()
                used[index] = 0.0
            else:
                self._fill(index)
        self._expected = [max(times, 1) for times in self._fired]
        for bucket in sorted(self._unpublished):
            self._publish(bucket)
        tail = [*used, *self._buffers.changes(), float(self.flag.raised)]
        self.reducer.flats[self._tail].copy_(torch.tensor(tail))
        self.reducer.publish(self._tail)
        self._open = False
        self._average_sparse(1.0 if self._weight is None else self._weight)
        self._exchange_buffers()
        if self.overlapped is not None:
            self.overlapped()
        else:
            self.wait_all()
            self._see_flag()

    def _exchange_buffers(self) -> None:
        if not self._buffers.names:
            return
        self.reducer.wait(self._tail)
        flags = self.reducer.flats[self._tail][len(self.parameters) : -1].tolist()
        self.after_end([name for name, flag in zip(self._buffers.names, flags, strict=True) if flag > 0.0])
        self._buffers.remember()

    def _average_sparse(self, weight: float) -> None:
        if self._sparse:
            self.reducer.wait(self._tail)  # its collectives are all started then, on every rank in one order
        for parameter in self._sparse:
            average_sparse(parameter, self.reducer.scope, weight)


def add_hook(parameter: nn.Parameter, hook: Callable[[torch.Tensor], None]) -> Any:
    """Call ``hook`` whenever autograd has accumulated a gradient in ``parameter``. Local."""
    return parameter.register_post_accumulate_grad_hook(hook)  # type: ignore[no-untyped-call]


def on_gradient(outputs: object, action: Callable[[], None]) -> None:
    """Call ``action`` when backward reaches a tensor in ``outputs``. Local."""
    for tensor in tensors_in(outputs):
        if tensor.requires_grad and not tensor.is_leaf:  # a leaf would keep the hooks of all forwards
            tensor.register_hook(lambda _: action())  # type: ignore[no-untyped-call]


def tensors_in(value: object) -> list[torch.Tensor]:
    """All tensors in nested tuples, lists, dicts and dataclasses. Local."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        return [tensor for item in value.values() for tensor in tensors_in(item)]
    if isinstance(value, (list, tuple, set)):
        return [tensor for item in value for tensor in tensors_in(item)]
    if hasattr(value, "__dataclass_fields__"):
        return [
            tensor for field in value.__dataclass_fields__ for tensor in tensors_in(getattr(value, field))
        ]
    return []
