"""DASO: a step inside each node every time, between nodes every few steps and without waiting.

The network between nodes is the slow part of a large job. DASO (Coquelin et al., "Accelerating neural network
training with the distributed asynchronous and selective optimization (DASO) method", J. Big Data 9:14, 2022)
lets each node train by itself for some steps, and averages the parameters of all nodes meanwhile::

    node 0   rank 0, rank 1    step step step step | step step step step | ...   gradients: mean of the node
                                            snapshot --> mean --> merge          parameters: mean of all ranks
    node 1   rank 2, rank 3    step step step step | step step step step | ...

Which phase an epoch is in, and how often parameters are averaged, is the business of
:mod:`~hpcpar.optim.daso.schedule`; the average itself and how it is merged that of
:mod:`~hpcpar.optim.daso.delayed_average`. In warm-up and cool-down gradients are averaged over all ranks,
and every step is that of plain data parallelism, bit for bit. On the way from cycling to cool-down, nodes are
made one by an exact average of parameters, buffers and the optimizer's state
(:mod:`~hpcpar.optim.daso.exact_average`).

Invariants: what is exchanged depends on counts of steps and epochs and on a loss that all ranks share, so no
rank can miss a collective; ranks of one node hold the same bits at all times, and all ranks do after an exact
average. On a single node there is nothing to exchange, and every phase is plain data parallelism.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import WIRE_DTYPES, ReducerStats, check_alike, threads_allowed, world
from hpcpar.errors import CommunicatorFreedError, HpcparError, MismatchError
from hpcpar.optim.daso.delayed_average import DelayedAverage
from hpcpar.optim.daso.exact_average import average_exactly, average_state
from hpcpar.optim.daso.node_model import GradScalerLike, NodeModel
from hpcpar.optim.daso.schedule import Phase, ScheduleOptions, SkipSchedule
from hpcpar.optim.wrapped import WrappedOptimizer

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["DASO"]

_PROGRESS_CHOICES = ("auto", "hooks", "thread")
_NO_STATS = ReducerStats(0, 0, 0, 0.0, 0.0, "none")


class DASO(WrappedOptimizer):
    """Wraps a torch optimizer; pass it to :class:`hpcpar.nn.DataParallelMultiGPU`. Collective.

    Parameters
    ----------
    local_optimizer
        Any torch optimizer over the model's parameters. It does the steps.
    comm
        The ranks, ``hpcpar.comm.world()`` by default; the same as the model's.
    total_epochs
        Epochs of the whole training.
    warmup_epochs, cooldown_epochs
        How many of them, at the beginning and the end, average all gradients in every step.
    max_global_skips
        Most steps from one average of the parameters to the next.
    stability_level
        The loss is on a plateau when it stops falling by this fraction of the best so far.
    scheduler
        A learning-rate scheduler over ``local_optimizer``; stepped once per epoch, by
        :meth:`epoch_loss_logic`. ``ReduceLROnPlateau`` gets the mean loss.
    wire_dtype
        ``torch.bfloat16``, ``torch.float16`` or ``torch.int8``: type in which the changes of parameters cross
        the network; ``None`` for the parameters in their own type.
    skip_reduction_factor
        By what a plateau divides the skips.
    patience
        Epochs without a better loss that are not yet a plateau.
    progress
        Who moves averages on while the program computes: ``"thread"``, a thread of this process; ``"hooks"``,
        what this rank waits for meanwhile, such as gradients; ``"auto"``, a thread where MPI allows one.

    Attributes
    ----------
    last_batch : int or None
        Index of an epoch's last batch, to be set. At that step whatever is under way is merged, so that an
        epoch ends with nothing under way, and counting begins anew. ``None``: batches are counted on.
    epoch, global_skip, batches_to_wait : int
        The epoch that is being trained, steps from average to average, steps until one is merged. The skips
        are 0 in warm-up and cool-down.

    Raises
    ------
    MismatchError
        For options that are out of range, or differ between the ranks.

    Notes
    -----
    ``step``, ``epoch_loss_logic``, ``finish``, ``synchronize`` and ``state_dict`` are Collective: every rank
    calls them equally often. In cycling, nodes have models of their own, also to evaluate. Clipping and
    accumulation (``no_sync``) work as with any optimizer, and so does a ``torch.amp.GradScaler`` that
    :meth:`add_scaler` was given: a node whose gradients overflow skips its update, takes part in everything
    else, and has a scale of its own until nodes become one model.

    Examples
    --------
    >>> optimizer = hpcpar.optim.DASO(torch.optim.SGD(net.parameters(), lr=0.1), comm, total_epochs=30)
    >>> model = hpcpar.nn.DataParallelMultiGPU(net, optimizer, comm)
    >>> optimizer.last_batch = len(loader) - 1
    >>> for epoch in range(30):
    ...     for x, y in loader:
    ...         optimizer.zero_grad()
    ...         loss = loss_fn(model(x), y)
    ...         loss.backward()
    ...         optimizer.step()
    ...     optimizer.epoch_loss_logic(loss)
    """

    # A GradScaler would not call step() on the ranks that overflowed, and the others would wait for them.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        local_optimizer: torch.optim.Optimizer,
        comm: Communicator | None,
        total_epochs: int,
        *,
        warmup_epochs: int = 4,
        cooldown_epochs: int = 4,
        max_global_skips: int = 8,
        stability_level: float = 0.05,
        scheduler: Any = None,
        wire_dtype: torch.dtype | None = torch.bfloat16,
        skip_reduction_factor: int = 2,
        patience: int = 2,
        progress: str = "auto",
    ) -> None:
        if isinstance(local_optimizer, WrappedOptimizer):
            raise TypeError(
                "the local optimizer of DASO must be one of torch's kind that steps on its own, got "
                f"{type(local_optimizer).__name__}, whose steps are those of many ranks"
            )
        super().__init__(local_optimizer)
        _check_choice("wire_dtype", wire_dtype, WIRE_DTYPES)
        _check_choice("progress", progress, _PROGRESS_CHOICES)
        options = ScheduleOptions(
            total_epochs,
            warmup_epochs,
            cooldown_epochs,
            max_global_skips,
            skip_reduction_factor,
            stability_level,
            patience,
        )
        self.scheduler = scheduler
        self.last_batch: int | None = None
        self._schedule = SkipSchedule(options)
        self._wire_dtype = wire_dtype
        self._batch = 0
        self._scaler: GradScalerLike | None = None
        self._model: NodeModel | None = None
        self._names: list[str] = []  # of what is averaged in the background
        self._average: DelayedAverage | None = None
        self._comm = (world() if comm is None else comm).Dup()
        check_alike(self._comm, "DASO", [repr(options), f"wire_dtype={wire_dtype}", f"progress={progress!r}"])
        self._use_thread = progress == "thread" or (
            progress == "auto" and self._comm.bcast(threads_allowed(), 0)
        )

    def attach_model(self, model: NodeModel) -> None:
        """Take over a model, again when other parameters become trainable. Called by the model. Collective.

        Raises
        ------
        MismatchError
            When the model is trained by other ranks than this optimizer.
        HpcparError
            For a second model.
        """
        if self._model not in (None, model):
            raise HpcparError("DASO must be given one model, got a second. Make a DASO for each")
        if model.node_map != self._comm.node_map:
            raise MismatchError(
                f"DASO and its model must be made with the same ranks, got nodes {self._comm.node_map.nodes} "
                f"and {model.node_map.nodes}"
            )
        known = {id(tensor) for tensor in model.replicated_tensors().values()}
        if any(id(p) not in known for group in self.param_groups for p in group["params"] if p.requires_grad):
            raise MismatchError(
                "the parameters of DASO must be those of its model, which are averaged between nodes, got "
                "others too. Make them a part of the module"
            )
        if self.phase is Phase.CYCLING:
            self.synchronize()  # nodes had parameters of their own, and begin anew from common ones
        self._free_average()
        self._model = model
        self._names = [name for name, tensor in model.replicated_tensors().items() if _is_quantity(tensor)]
        if self._comm.num_nodes > 1:
            self._average = DelayedAverage(
                self._comm, self._quantities, self._wire_dtype, use_thread=self._use_thread
            )
        self._enter_phase()

    # A step ----------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Step with the gradients that are there, then begin and merge averages that are due. Collective.

        Parameters
        ----------
        closure
            For the local optimizer; all ranks must evaluate it equally often.

        Raises
        ------
        HpcparError
            Before a model was attached.
        """
        self._check_model()
        result = self._update(closure)
        if self._average is not None and self.phase is Phase.CYCLING:
            self._exchange(self._average)
        self._batch = 0 if self._batch == self.last_batch else self._batch + 1
        return result

    def _update(self, closure: Callable[[], float] | None) -> Any:
        """The local step, unless this node's gradients have overflowed."""
        # Set by a GradScaler for the time of this call; not looked up in the wrapped optimizer.
        scale, found_inf = self.__dict__.get("grad_scale"), self.__dict__.get("found_inf")
        is_scaled = scale is not None or found_inf is not None
        if is_scaled and self._scaler is None and self._comm.num_nodes > 1:
            raise HpcparError(
                "a GradScaler must be given to DASO before it steps, since nodes have scales of their own in "
                "cycling, got one that is unknown. Call add_scaler(scaler)"
            )
        if found_inf is not None and float(found_inf) > 0.0:
            return None
        if scale is not None:
            self._unscale(scale)
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)

    @torch.no_grad()
    def _unscale(self, scale: torch.Tensor) -> None:
        inverse = scale.double().reciprocal().float()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad.mul_(inverse.to(parameter.grad.device))

    def _exchange(self, average: DelayedAverage) -> None:
        """After the local step: what is due?"""
        is_last = self._batch == self.last_batch
        average.count_step()
        if average.is_under_way and (is_last or average.steps >= self.batches_to_wait):
            average.merge(self._quantities)
        if not average.is_under_way and (self._batch + 1) % self.global_skip == 0:
            average.start(self._quantities)
            if is_last:
                average.merge(self._quantities)

    # An epoch --------------------------------------------------------------------------------------------

    def epoch_loss_logic(self, loss: float | torch.Tensor, loss_globally_averaged: bool = False) -> None:
        """End an epoch: adapt the skips to its loss, step the scheduler, change the phase. Collective.

        Parameters
        ----------
        loss
            Of this epoch on this rank, a number or a tensor of one element.
        loss_globally_averaged
            Whether it is the mean over all ranks already; else that is taken here.
        """
        everyone = self._comm.allgather((float(loss), self.last_batch))
        if len({last_batch for _, last_batch in everyone}) > 1:
            raise MismatchError(
                f"last_batch must be the same on all ranks, got {[last for _, last in everyone]}. Give every "
                "rank as many batches"
            )
        # Summed by every rank in the same order, so that all decide alike.
        losses = [value for value, _ in everyone]
        mean = losses[0] if loss_globally_averaged else sum(losses) / len(losses)
        before = self.phase
        self._schedule.end_epoch(mean)
        if self.last_batch is not None:
            self._batch = 0
        if before is Phase.CYCLING and self.phase is not Phase.CYCLING:
            self.synchronize()
        self._enter_phase()
        if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            self.scheduler.step(mean)
        elif self.scheduler is not None:
            self.scheduler.step()

    def _enter_phase(self) -> None:
        """Set the model and the average to the phase. Replicas are equal now, or the phase is the same."""
        cycles = self._average is not None and self.phase is Phase.CYCLING
        if self._model is not None:
            self._model.within_node = cycles
        if self._average is not None and cycles:
            self._average.refer_to(self._quantities)

    def add_scaler(self, scaler: GradScalerLike) -> None:
        """Let nodes share the scale of this ``GradScaler`` when they become one model again. Local.

        In cycling each node's overflows change its own scale; gradients that are averaged over all ranks must
        have been scaled alike.
        """
        self._scaler = scaler

    def finish(self) -> None:
        """Wait for the average that is under way, if any, and merge it. Collective."""
        if self._average is not None and self._average.is_under_way:
            self._average.merge(self._quantities)

    def synchronize(self) -> None:
        """Make the nodes' models one: parameters, buffers, optimizer state, scaler are averaged. Collective.

        Exact, in the tensors' own types, and bitwise equal on all ranks afterwards. Happens by itself at the
        end of cycling and in :meth:`state_dict`; to be called when training ends early.
        """
        self.finish()
        if self._average is None:
            return
        tensors = self._check_model().replicated_tensors()
        # What was trained until now may be frozen already, and what is trained from now on not known yet.
        changed = [t for name, t in tensors.items() if name in self._names or _changes(t)]
        average_exactly(changed, self._comm)
        average_state(self.optimizer, self._comm)
        self._average.forget()
        self._enter_phase()
        if self._scaler is not None:
            self._scaler.load_state_dict(self._comm.bcast(self._scaler.state_dict(), 0))

    def free(self) -> None:
        """Give memory and communicators back; a second call is fine. Collective.

        In cycling the nodes become one model first. The model goes on as any data-parallel one.
        """
        if self._comm.is_freed:
            return
        if self._model is not None:
            if self.phase is Phase.CYCLING:
                self.synchronize()
            self._model.within_node = False
        self._free_average()
        self._model = None
        self._comm.Free()

    def _free_average(self) -> None:
        self.finish()
        if self._average is not None:
            self._average.free()
        self._average = None

    # State -----------------------------------------------------------------------------------------------

    @property
    def phase(self) -> Phase:
        """Of this epoch. Local."""
        return self._schedule.phase

    @property
    def epoch(self) -> int:
        """Number of calls of :meth:`epoch_loss_logic`, counted through checkpoints. Local."""
        return self._schedule.epoch

    @property
    def global_skip(self) -> int:
        """Steps from one average of the parameters to the next. Local."""
        return self._schedule.global_skip

    @property
    def batches_to_wait(self) -> int:
        """Steps after which an average is merged. Local."""
        return self._schedule.batches_to_wait

    def stats(self) -> ReducerStats:
        """Bytes, buckets and seconds of the averages of parameters on this rank so far. Local."""
        return _NO_STATS if self._average is None else self._average.stats()

    def state_dict(self) -> dict[str, Any]:
        """The state of one model: in cycling, :meth:`synchronize` comes first. Collective.

        Returns
        -------
        dict
            The local optimizer's, which loads into the plain optimizer too, and the entries ``"daso"`` and,
            with a scheduler, ``"scheduler"``. It loads on another number of ranks and nodes. Take it on all
            ranks and before that of the model, which is then the mean as well.
        """
        if self.phase is Phase.CYCLING:
            self.synchronize()
        state = {**self.optimizer.state_dict(), "daso": {**self._schedule.state_dict(), "batch": self._batch}}
        if self.scheduler is not None:
            state["scheduler"] = self.scheduler.state_dict()
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state, that of the plain optimizer included. Collective: all ranks load the same."""
        self.finish()
        self.optimizer.load_state_dict(
            {key: value for key, value in state_dict.items() if key not in ("daso", "scheduler")}
        )
        if "daso" in state_dict:
            self._schedule.load_state_dict(state_dict["daso"])
            self._batch = state_dict["daso"]["batch"]
        if self.scheduler is not None and "scheduler" in state_dict:
            self.scheduler.load_state_dict(state_dict["scheduler"])
        self._enter_phase()

    def _check_model(self) -> NodeModel:
        if self._comm.is_freed:
            raise CommunicatorFreedError("DASO must not be used after free()")
        if self._model is None:
            raise HpcparError(
                "DASO must be given a model before it steps, got none. Wrap the module: "
                "hpcpar.nn.DataParallelMultiGPU(module, optimizer, comm)"
            )
        return self._model

    @property
    def _quantities(self) -> list[torch.Tensor]:
        """Looked up anew each time: a module may replace its buffers."""
        tensors = self._check_model().replicated_tensors()
        return [tensors[name] for name in self._names]

    def __repr__(self) -> str:
        return f"DASO({self.optimizer!r}, epoch={self.epoch}, phase={self.phase.value!r})"


def _changes(tensor: torch.Tensor) -> bool:
    """Whether training changes it: a buffer, or a parameter that is not frozen."""
    return tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)


def _is_quantity(tensor: torch.Tensor) -> bool:
    """Whether to average it in the background; counts, as of batch norm, wait for an exact average."""
    return _changes(tensor) and (tensor.is_floating_point() or tensor.is_complex())


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise MismatchError(f"{name} of DASO must be one of {', '.join(map(repr, choices))}, got {value!r}")
