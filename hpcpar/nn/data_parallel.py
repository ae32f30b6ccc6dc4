"""Data parallelism: every rank trains the same model on its own part of the batch.

``DataParallel`` wraps a module so that after ``backward()`` the ``.grad`` of every parameter is the mean
over the ranks; any optimizer then does the same step everywhere, and the replicas stay bitwise equal. The
work is done elsewhere: :mod:`~hpcpar.nn.gradient_reduction` knows about autograd,
:mod:`hpcpar.comm.reducer` about ranks. This file is about the module: equal models at the start, buffers,
when not to synchronise, copies.

Three modes::

    default                             bucket by bucket during backward; backward() returns the mean
    blocking_parameter_updates=True     each gradient is reduced inside its hook
    optimizer=DataParallelOptimizer     backward() returns at once; each parameter is updated just before
                                        the next forward first reads it

Buffers (running statistics) of rank 0 reach all ranks at the end of every synchronised backward in which
they changed on any rank, so that ``eval()`` and ``state_dict()`` agree everywhere and never communicate.

Parts of the model that differ between ranks, such as experts, are left alone and reduce for themselves
(:mod:`~hpcpar.nn.own_gradients`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import ReducerStats, broadcast_packed, world
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn.gradient_reduction import GradientReduction, on_gradient
from hpcpar.nn.joining import joined
from hpcpar.nn.model_signature import check_same_model
from hpcpar.nn.module_facts import batch_size, hides_parameters
from hpcpar.nn.overlapping_optimizer import OverlappingOptimizer, check_overlapping
from hpcpar.nn.own_gradients import (
    OwnGradients,
    own_gradient_modules,
    replicated_buffers,
    replicated_parameters,
)
from hpcpar.nn.reduction_options import ReductionOptions
from hpcpar.nn.residual_state import load_residual_state, residual_state
from hpcpar.nn.shared_flag import SharedFlag
from hpcpar.nn.sparse_gradients import sparse_parameters

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DataParallel"]

_AVERAGES = ("ranks", "samples")


class DataParallel(nn.Module):
    """A module that is trained by all ranks together. Collective to make and to ``free``.

    Parameters
    ----------
    module
        The model, on the host or on this rank's GPU. Parameters and buffers of rank 0 are broadcast into
        it; nothing else of it, and no random state, changes.
    comm
        The ranks, ``hpcpar.comm.world()`` by default. The model uses a duplicate.
    optimizer
        A :class:`hpcpar.optim.DataParallelOptimizer` to overlap the reduction with the next forward;
        ``None`` for any other optimizer.
    blocking_parameter_updates
        Reduce each gradient inside its hook instead of in the background.
    bucket_mb
        Size in MiB at which a bucket of gradients is sent.
    broadcast_buffers
        Keep the buffers of all ranks equal to rank 0's.
    wire_dtype
        ``torch.bfloat16`` or ``torch.float16``: gradients cross the network in this type, summed in float32.
        ``torch.int8``: in eight bits, blockwise, and what rounding keeps back goes with the next step; see
        :meth:`residual_state`. Shared memory keeps their own type.
    transport
        ``"auto"``, ``"shared_memory"`` or ``"mpi"``; see :class:`hpcpar.comm.Reducer`.
    progress
        ``"hooks"``: progress is made when gradients arrive. ``"thread"``: by a thread. ``"auto"``: measured
        in the first steps where each rank has more than one core, else hooks.

    Attributes
    ----------
    module : torch.nn.Module
        The wrapped model. Attributes that this class lacks are looked up there.

    Raises
    ------
    MismatchError
        On every rank, when the ranks' models differ.

    Notes
    -----
    Compile the module, ``DataParallel(torch.compile(net))``, and not this wrapper: compiled code around it
    would not notice parameters that an overlapping optimizer has yet to update.

    Examples
    --------
    >>> model = hpcpar.nn.DataParallel(net)
    >>> loss_fn(model(x), y).backward()  # .grad is the mean over ranks
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator | None = None,
        optimizer: OverlappingOptimizer | None = None,
        blocking_parameter_updates: bool = False,
        *,
        bucket_mb: float | None = None,
        broadcast_buffers: bool = True,
        wire_dtype: torch.dtype | None = None,
        transport: str = "auto",
        progress: str = "auto",
    ) -> None:
        super().__init__()
        check_overlapping(optimizer)
        self.module = module
        self._comm: Communicator | None = world() if comm is None else comm
        self._optimizer = optimizer
        self._broadcast_buffers = broadcast_buffers
        self._options = ReductionOptions(
            bucket_mb=bucket_mb,
            blocking=blocking_parameter_updates,
            wire_dtype=wire_dtype,
            transport=transport,
            progress=progress,
        )
        self._reset()
        check_same_model(module, self._comm, self._agreed)
        self._broadcast_state(0)
        self._reduce_gradients()

    def _reset(self) -> None:
        self._gradients: GradientReduction | None = None
        self._own: list[OwnGradients] = []
        self._flag = SharedFlag()
        self._trainable: list[bool] = []
        self._synchronize = True
        self._scatter: str | None = None
        self._samples = 0
        self._freed = False

    # Running ---------------------------------------------------------------------------------------------

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the wrapped module. Local, except for the first training forward of a copy."""
        if self._optimizer is not None and hides_parameters(self.module):
            self._optimizer.finish()
        if not torch.is_grad_enabled() or self._freed:
            return self.module(*args, **kwargs)
        if self.training:
            self._prepare()
        self._samples += batch_size(args, kwargs)
        output = self.module(*args, **kwargs)
        if not self.training and not self._is_prepared:
            on_gradient(output, self._prepare)  # only backward tells that this is more than an evaluation
        elif self.training:
            for part in self._own:
                part.watch(output)
            if self._gradients is not None:
                self._gradients.watch(output)
        return output

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Accumulate gradients on this rank only; the next backward outside reduces the sum. Local."""
        before, self._synchronize = self._synchronize, False
        self._apply_synchronize()
        try:
            yield
        finally:
            self._synchronize = before
            self._apply_synchronize()

    @contextmanager
    def join(
        self,
        average: str = "ranks",
        *,
        optimizer: torch.optim.Optimizer | None = None,
        step: Callable[[], object] | None = None,
    ) -> Iterator[None]:
        """Train on unequal numbers of batches: ranks that run out take part until the last has.

        Parameters
        ----------
        average
            ``"ranks"``: the mean over the ranks that still have batches. ``"samples"``: weighted by the
            number of samples, which is the first axis of the first tensor that was passed to the model since
            the last backward.
        optimizer
            Steps it with every step that this rank sits out, so that its state (momentum) stays equal on
            all ranks too. Without it, parameters and buffers of the rank that trained longest are broadcast
            at the end.
        step
            In place of ``optimizer``: what the training loop does after backward, such as clipping, a step,
            that of a scheduler, ``zero_grad()``.

        Notes
        -----
        Collective: all ranks enter and leave.
        """
        steps_along = step
        if optimizer is not None and step is None:
            steps_along = lambda: (optimizer.step(), optimizer.zero_grad())  # noqa: E731
        if self._scatter is not None and steps_along is None:
            raise HpcparError(
                "join() must be given the ShardedOptimizer, whose steps need all ranks: join(optimizer=...)"
            )
        if average not in _AVERAGES:
            raise MismatchError(f"average must be 'ranks' or 'samples', got {average!r}")
        self._prepare()  # a copy has no reduction before its first training forward
        gradients = self._gradients
        if self._own and self._comm is not None and self._comm.size > 1:
            raise HpcparError(
                "join() must not be used for a model with experts, in whose exchange of tokens all ranks "
                "take part. Give ranks that run out of batches some with zero tokens"
            )
        if gradients is None:
            yield
            return
        self._samples = 0
        weight = self._take_samples if average == "samples" else lambda: 1.0
        with joined(gradients, weight, self._finish_updates, steps_along, is_whole=step is not None) as root:
            yield
        if steps_along is None:
            self._broadcast_state(root())
        elif self._broadcast_buffers:
            broadcast_packed(list(replicated_buffers(self.module).values()), gradients.reducer.comm, root())

    @property
    def comm(self) -> Communicator | None:
        """The ranks it was given; ``None`` of a copy that has not trained yet. Local."""
        return self._comm

    @property
    def flag(self) -> SharedFlag | None:
        """A bit that every reduction carries to all ranks; ``None`` where none does. Local."""
        return None if self._gradients is None else self._flag

    def reduced_parameters(self) -> list[nn.Parameter]:
        """The parameters that are trained now and whose gradients are averaged in buckets. Local."""
        sparse = {id(parameter) for parameter in sparse_parameters(self.module)}
        return [p for _, p in self._trained() if id(p) not in sparse]

    def scatter_gradients(self, cut: str | None) -> GradientReduction | None:
        """Leave each rank its part of the mean gradients only, for optimizers that want no more. Collective.

        Parameters
        ----------
        cut
            ``"anywhere"``, or ``"tensors"`` to cut between parameters; ``None`` ends it.

        Returns
        -------
        GradientReduction or None
            Who owns which part, and where it is; ``None`` when there is nobody to share with.

        Raises
        ------
        HpcparError
            While another optimizer has the gradients.
        """
        if self._freed:
            return None
        if cut is not None and (self._optimizer is not None or self._scatter is not None):
            raise HpcparError(
                "gradients of a DataParallel must go to one optimizer, got a ShardedOptimizer besides "
                "another. free() the other one, or leave out optimizer="
            )
        before, self._scatter = self._scatter, cut
        self._prepare()
        if self._gradients is None:
            self._scatter = None
        elif before != cut:
            self._rebuild()
        return None if cut is None else self._gradients

    def stats(self) -> ReducerStats:
        """Bytes, buckets, and seconds of communication of this rank so far. Local."""
        if self._gradients is None:
            return ReducerStats(0, 0, 0, 0.0, 0.0, "none")
        return self._gradients.stats()

    def residual_state(self) -> dict[str, torch.Tensor]:
        """What ``wire_dtype=torch.int8`` has kept back of the gradients, to be saved. Collective.

        By name of parameter and in its shape, on the host, the same on every rank; empty where gradients
        travel in another type or not at all. It goes with the scale of a ``GradScaler``.
        """
        self._prepare()
        self._finish_updates()
        return residual_state(self.module, self._gradients)

    def load_residual_state(self, state: Mapping[str, torch.Tensor]) -> None:
        """Go on from :meth:`residual_state` of any number of ranks; all load the same. Collective.

        Raises
        ------
        MismatchError
            When a name or shape is none of the model's.
        """
        self._prepare()
        self._finish_updates()
        load_residual_state(self.module, self._gradients, state)

    def free(self) -> None:
        """Give windows and communicators back. The wrapped module works on, without ranks. Collective."""
        self._finish_updates()
        if self._gradients is not None:
            self._gradients.free()
        for part in self._own:
            part.keep_gradients()
        self._gradients, self._own = None, []
        self._freed = True

    # Attributes and copies -------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "module":
                raise
            return getattr(self.module, name)

    def __getstate__(self) -> dict[str, Any]:
        self._finish_updates()
        state = self.__dict__.copy()
        state.update(_gradients=None, _comm=None, _optimizer=None)
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> DataParallel:
        memo[id(self)] = twin = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin._comm = self._comm
        return twin

    # Parts -----------------------------------------------------------------------------------------------

    @property
    def _agreed(self) -> dict[str, object]:
        return {**vars(self._options), "broadcast_buffers": self._broadcast_buffers}

    @property
    def _is_prepared(self) -> bool:
        return self._trainable == self._trainable_now()

    def _prepare(self) -> None:
        """Before a training forward: is the reduction there, does it fit the model, is it idle?"""
        is_open = self._gradients is not None and self._gradients.is_open
        inside_backward = torch._C._current_graph_task_id() != -1
        if is_open and not inside_backward:
            raise HpcparError(
                "a backward pass must end before the next forward, got one that an exception has ended "
                "half-way: other ranks may have reduced gradients that this one has not. Restart the job "
                "from a checkpoint"
            )
        if not is_open and not self._is_prepared:
            if self._comm is None:
                self._comm = world()
            if self._gradients is not None and self._gradients.is_scattered and self._scatter is not None:
                raise HpcparError(
                    "requires_grad must stay as it is while a ShardedOptimizer holds the parameters. free() "
                    "the optimizer, and make it again afterwards"
                )
            self._finish_updates()
            check_same_model(self.module, self._comm, self._agreed)
            self._rebuild()

    def _rebuild(self) -> None:
        """Make the reduction anew, with what an 8-bit wire has kept back so far. Collective."""
        kept_back = residual_state(self.module, self._gradients)
        if self._gradients is not None:
            self._gradients.free()
        self._reduce_gradients()
        if kept_back:
            load_residual_state(self.module, self._gradients, kept_back)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that are reduced here, with their names."""
        return [(name, p) for name, p in replicated_parameters(self.module) if p.requires_grad]

    def _reduce_gradients(self) -> None:
        """Make the reduction for the parameters that are trainable now. Collective."""
        assert self._comm is not None
        self._trainable = self._trainable_now()
        self._gradients, self._own = None, own_gradient_modules(self.module)
        for part in self._own:
            part.share_gradients(self._comm, average=True, options=self._options)
        self._apply_synchronize()
        named = self._trained()
        if self._comm.size == 1 or not named:
            return
        trained = {id(parameter) for _, parameter in named}
        self._gradients = GradientReduction(
            named,
            [parameter for parameter in sparse_parameters(self.module) if id(parameter) in trained],
            (lambda: replicated_buffers(self.module)) if self._broadcast_buffers else dict,
            self._comm,
            self._options,
            scatter=self._scatter,
        )
        self._gradients.after_end = self._synchronize_buffers
        self._gradients.flag = self._flag
        self._apply_synchronize()
        if self._optimizer is not None:
            self._optimizer.attach(self._gradients)

    def _trainable_now(self) -> list[bool]:
        """Of the parameters that all ranks have; experts notice by themselves."""
        return [parameter.requires_grad for _, parameter in replicated_parameters(self.module)]

    def _apply_synchronize(self) -> None:
        for part in self._own:
            part.synchronize = self._synchronize
        if self._gradients is not None:
            self._gradients.synchronize = self._synchronize

    def _take_samples(self) -> float:
        samples, self._samples = self._samples, 0
        return float(samples)

    def _finish_updates(self) -> None:
        if self._optimizer is not None:
            self._optimizer.finish()

    def _synchronize_buffers(self, changed: Sequence[str]) -> None:
        """Copy the buffers that changed from the first rank; not while joining, when that may have left."""
        assert self._gradients is not None
        if changed and self._gradients.weight is None:
            buffers = replicated_buffers(self.module)
            broadcast_packed([buffers[name] for name in changed], self._gradients.reducer.scope, 0)

    def _broadcast_state(self, root: int) -> None:
        comm = self._comm if self._gradients is None else self._gradients.reducer.comm
        assert comm is not None
        parameters = [parameter for _, parameter in replicated_parameters(self.module)]
        broadcast_packed([*parameters, *replicated_buffers(self.module).values()], comm, root)
