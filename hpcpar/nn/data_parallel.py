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

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from hpcpar.comm import MPI, ReducerStats, broadcast_packed, world
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.nn.gradient_reduction import GradientReduction, on_gradient, tensors_in
from hpcpar.nn.model_signature import check_same_model
from hpcpar.nn.own_gradients import OwnGradients, own_gradient_modules, own_tensors
from hpcpar.nn.reduction_options import ReductionOptions
from hpcpar.nn.residual_state import load_residual_state, residual_state
from hpcpar.nn.sparse_gradients import sparse_parameters

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DataParallel", "OverlappingOptimizer"]

_AVERAGES = ("ranks", "samples")


class OverlappingOptimizer(Protocol):
    """An optimizer that updates parameters when they are next read, as their gradients arrive."""

    def attach(self, gradients: GradientReduction) -> None:
        """Take over the waiting for the gradients of a model. Local."""

    def finish(self) -> None:
        """Wait for everything that is under way and apply it. Collective in effect."""


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
        ``torch.bfloat16`` or ``torch.float16``: gradients cross the network in this type (they are summed
        in float32). ``torch.int8``: in eight bits, blockwise, and what rounding keeps back goes with the
        next step; see :meth:`residual_state`. Shared memory keeps their own type.
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
        if optimizer is not None and not (hasattr(optimizer, "attach") and hasattr(optimizer, "finish")):
            raise TypeError(
                "optimizer of DataParallel must be an hpcpar.optim.DataParallelOptimizer, got "
                f"{type(optimizer).__name__}. Other optimizers are not passed; step() them as usual"
            )
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
        self._samples += _batch_size(args, kwargs)
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
        self, average: str = "ranks", *, optimizer: torch.optim.Optimizer | None = None
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

        Notes
        -----
        Collective: all ranks enter and leave.
        """
        if self._scatter is not None and optimizer is None:
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
        gradients.weight = self._take_samples if average == "samples" else lambda: 1.0
        steps = gradients.reducer.step
        try:
            yield
            steps = gradients.reducer.step - steps
            self._finish_updates()
            while gradients.shadow_step():
                if optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
            comm = gradients.reducer.comm
            _, root = comm.allreduce((steps, -comm.rank), MPI.MAX)
            if optimizer is None:
                self._broadcast_state(-root)
            elif self._broadcast_buffers:
                broadcast_packed(list(self._module_buffers().values()), comm, -root)
        finally:
            gradients.weight = None

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
        """
        if self._optimizer is not None and cut is not None:
            raise HpcparError(
                "gradients must not be scattered while an optimizer overlaps the next forward. Make the "
                "DataParallel without optimizer="
            )
        if self._freed:
            return None
        self._prepare()
        if self._gradients is None or (cut is None and not self._gradients.is_scattered):
            return None
        self._gradients.free()
        self._scatter = cut
        self._reduce_gradients()
        return self._gradients

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
        import copy

        twin = type(self).__new__(type(self))
        memo[id(self)] = twin
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
            if self._scatter is not None:
                raise HpcparError(
                    "requires_grad must stay as it is while a ShardedOptimizer holds the parameters. free() "
                    "the optimizer, and make it again afterwards"
                )
            self._finish_updates()
            if self._gradients is not None:
                self._gradients.free()
            check_same_model(self.module, self._comm, self._agreed)
            self._reduce_gradients()

    def _reduce_gradients(self) -> None:
        """Make the reduction for the parameters that are trainable now. Collective."""
        assert self._comm is not None
        self._trainable = self._trainable_now()
        self._gradients, self._own = None, own_gradient_modules(self.module)
        for part in self._own:
            part.share_gradients(self._comm, average=True, options=self._options)
        self._apply_synchronize()
        own = own_tensors(self.module)
        named = [(n, p) for n, p in self.module.named_parameters() if p.requires_grad and id(p) not in own]
        if self._comm.size == 1 or not named:
            return
        self._gradients = GradientReduction(
            named,
            [parameter for parameter in sparse_parameters(self.module) if id(parameter) not in own],
            self._module_buffers if self._broadcast_buffers else dict,
            self._comm,
            self._options,
            scatter=self._scatter,
        )
        self._gradients.after_end = self._synchronize_buffers
        self._apply_synchronize()
        if self._optimizer is not None:
            self._optimizer.attach(self._gradients)

    def _trainable_now(self) -> list[bool]:
        """Of the parameters that all ranks have; experts notice by themselves."""
        own = own_tensors(self.module)
        return [p.requires_grad for p in self.module.parameters() if id(p) not in own]

    def _module_buffers(self) -> dict[str, torch.Tensor]:
        own = own_tensors(self.module) if self._own else set()
        return {name: buffer for name, buffer in self.module.named_buffers() if id(buffer) not in own}

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
            buffers = self._module_buffers()
            broadcast_packed([buffers[name] for name in changed], self._gradients.reducer.scope, 0)

    def _broadcast_state(self, root: int) -> None:
        comm = self._comm if self._gradients is None else self._gradients.reducer.comm
        assert comm is not None
        own = own_tensors(self.module)
        tensors = (*self.module.parameters(), *self.module.buffers())
        broadcast_packed([tensor for tensor in tensors if id(tensor) not in own], comm, root)


def hides_parameters(module: nn.Module) -> bool:
    """Whether scripted or compiled code reads parameters, which does not notice stale ones. Local."""
    return any(
        isinstance(m, torch.jit.ScriptModule)
        or m._compiled_call_impl is not None
        or "_orig_mod" in m._modules
        for m in module.modules()
    )


def _batch_size(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int:
    """Length of the first axis of the first tensor."""
    for tensor in tensors_in([*args, *kwargs.values()]):
        return tensor.shape[0] if tensor.dim() else 1
    return 0
