"""The pipeline: a model cut into stages on the ranks of a communicator, trained as if it were whole.

This file is what users see. Making a pipeline is a plan that every rank computes alike
(:mod:`~hpcpar.nn.pipeline.plan`), after which each builds its own layers. A step is a schedule of actions
that the :mod:`~hpcpar.nn.pipeline.runtime` executes; what ranks must add up is the business of
:mod:`~hpcpar.nn.pipeline.reductions`.

::

    train_step(inputs, targets)        first rank             last rank
        split                          microbatches           targets
        run                            forwards, backwards, messages, losses
        finish                         gradients of replicas and copies; running statistics
        return                         the mean loss, on every rank

A failure on one rank becomes a failure of all: it sounds an alarm that the others hear in their waits. After
that the pipeline is broken, since messages of the failed step may still be on their way.
"""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import MPI, Alarm, broadcast_packed, world
from hpcpar.errors import CommunicatorFreedError, HpcparError, RankFailedError
from hpcpar.nn.pipeline.assembly import Assembly, assemble
from hpcpar.nn.pipeline.layers import LayerSpec
from hpcpar.nn.pipeline.mail import broadcast_value
from hpcpar.nn.pipeline.microbatch import Microbatch, check_filled, split
from hpcpar.nn.pipeline.module import PipelineModule
from hpcpar.nn.pipeline.recorder import PipelineStats
from hpcpar.nn.pipeline.runtime import Runtime
from hpcpar.nn.pipeline.schedule import Schedule
from hpcpar.nn.pipeline.stage import Stage
from hpcpar.nn.pipeline.step import LossFunction, MicrobatchLosses, Step
from hpcpar.nn.pipeline.structure import map_tensors
from hpcpar.nn.pipeline.timeline import Timeline

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Pipeline"]


class Pipeline(PipelineModule):
    """A model whose layers are spread over ranks. Collective to make and to ``free``.

    Parameters
    ----------
    module
        An ``nn.Sequential``, or a list of layers or :class:`~hpcpar.nn.pipeline.LayerSpec`. Each layer takes
        one argument: a tensor, or nested tuples, lists, dicts of tensors and constants. Each rank keeps its
        own layers; give the same weights everywhere (a common seed, or a checkpoint).
    comm
        The ranks, ``hpcpar.comm.world()`` by default.
    microbatches
        Parts into which a batch is cut. It need not divide.
    schedule
        ``"gpipe"``, ``"1f1b"``, ``"interleaved"``, ``"zero_bubble"``, or a
        :class:`~hpcpar.nn.pipeline.Schedule`.
    balance
        Layers per stage; by default such that parameters are spread evenly, ``"time"`` for measured time.
    checkpoint
        ``"never"``, ``"except_last"``, ``"always"``: microbatches whose activations are computed again in
        backward instead of being kept.
    loss_fn
        ``loss_fn(output, target)`` of one microbatch, a scalar. ``None`` if the last layer returns the loss.
    data_comm
        Ranks that hold the same stage of other replicas: data parallelism, reduced in the cool-down.
    reuse
        Layers that share parameters but fall on different ranks: ``"route"`` computes all of them where the
        first one lives, ``"replicate"`` keeps copies and sums their gradients.
    deferred_batch_norm
        Update running statistics once per step, from the whole batch.
    chunks
        Stages per rank.
    sample_input
        One microbatch, with which ``balance="time"`` measures; needed on rank 0.
    loss_reduction
        ``"mean"`` or ``"sum"``: what ``loss_fn`` does with the samples of a microbatch.
    device
        Where this rank computes; by default where its parameters are.
    bucket_mb, wire_dtype, transport
        Of the reduction over ``data_comm``, as in :class:`hpcpar.nn.DataParallel`.
    progress
        ``"hooks"``: messages move on between actions. ``"thread"``: a thread moves them on while a stage
        computes, too. ``"auto"`` measures it in the first steps where ranks have more than one core.

    Raises
    ------
    MismatchError, ScheduleError
        On every rank, when the arguments do not fit together or differ between ranks.

    Examples
    --------
    >>> pipe = hpcpar.nn.Pipeline(net, comm, microbatches=8, loss_fn=F.cross_entropy)
    >>> opt = torch.optim.AdamW(pipe.parameters())
    >>> loss = pipe.train_step(x, y)  # .grad is that of the whole batch; then opt.step()

    Notes
    -----
    ``pipe.parameters()`` are those of this rank only. Use :meth:`clip_grad_norm_` for the norm over all
    stages. Dropout draws the same masks on any number of ranks, under any schedule.
    """

    def __init__(
        self,
        module: nn.Module | Sequence[nn.Module | LayerSpec],
        comm: Communicator | None = None,
        *,
        microbatches: int,
        schedule: str | Schedule = "1f1b",
        balance: str | Sequence[int] | None = None,
        checkpoint: str = "never",
        loss_fn: LossFunction | None = None,
        data_comm: Communicator | None = None,
        reuse: str = "route",
        deferred_batch_norm: bool = False,
        chunks: int = 1,
        sample_input: Any = None,
        loss_reduction: str = "mean",
        device: torch.device | str | None = None,
        bucket_mb: float | None = None,
        wire_dtype: torch.dtype | None = None,
        transport: str = "auto",
        progress: str = "auto",
    ) -> None:
        super().__init__()
        self._comm = (world() if comm is None else comm).Dup()
        self._data = None if data_comm is None or data_comm.size == 1 else data_comm.Dup()
        self._loss_fn, self._checkpoint = loss_fn, checkpoint
        self._loss_reduction, self._microbatches = loss_reduction, microbatches
        options = {
            "microbatches": microbatches,
            "schedule": schedule,
            "balance": balance,
            "checkpoint": checkpoint,
            "reuse": reuse,
            "deferred_batch_norm": deferred_batch_norm,
            "chunks": chunks,
            "loss_reduction": loss_reduction,
            "bucket_mb": bucket_mb,
            "wire_dtype": wire_dtype,
            "transport": transport,
            "progress": progress,
        }
        try:
            parts = assemble(
                module,
                self._comm,
                self._data,
                self.layers,
                options=options,
                device=device,
                sample_input=sample_input,
            )
        except Exception:
            self._free_communicators()  # all ranks are here, whatever was wrong on one of them
            raise
        self._adopt(parts, progress)

    def _adopt(self, parts: Assembly, progress: str) -> None:
        """Take over the parts, and prepare to run. Collective."""
        self.plan, self.device, self._balance = parts.plan, parts.device, parts.balance
        self._stages, self._seeds, self._reductions = parts.stages, parts.seeds, parts.reductions
        self._alarm = Alarm([self._comm] if self._data is None else [self._comm, self._data])
        self._runtime = Runtime(self.plan, self._stages, self._comm, self.device, _groups(self._stages))
        self._runtime.choose_progress(progress)
        meets = any(stage.meets_replicas for stage in self._stages.values())
        self._meets_replicas = self._comm.allreduce(meets, MPI.LOR)
        self._open_state(parts.names, self._reductions.copies, self._reductions.later_copies)
        self._broken: BaseException | None = None
        self._freed = False

    # Steps -----------------------------------------------------------------------------------------------

    def train_step(self, inputs: Any = None, targets: Any = None, *, scale: float = 1.0) -> torch.Tensor:
        """Forward and backward of a batch; ``.grad`` of the local parameters becomes the whole model's.

        Parameters
        ----------
        inputs
            The batch, on the rank of the first stage; others may pass ``None``. Tensors of shape
            (samples, ...), or nested structures of them; see :class:`~hpcpar.nn.pipeline.Whole`.
        targets
            Likewise, on the rank of the last stage.
        scale
            Factor of the gradients, such as 1 / the number of accumulated steps. Not of the loss returned,
            nor, with ``loss_reduction="sum"``, of the losses that layers add themselves.

        Returns
        -------
        torch.Tensor
            The loss of the batch, 0-d, float64, on the host, on every rank; the mean over the replicas with
            ``data_comm``.

        Raises
        ------
        RankFailedError
            When another rank failed, with its message; a failure here is raised as it is.
        StalledError
            When a rank is late: names action, message and rank.

        Notes
        -----
        Collective.
        """
        with self._guarded():
            step = self._step(inputs, targets, training=True, scale=scale)
            self._reductions.begin()
            self._seeds.begin(training=True)
            # A sum is made a mean by ``scale``; the losses of layers are means already.
            for stage in self._stages.values():
                stage.losses_scale = 1.0 if self._loss_reduction == "sum" else scale
            with torch.enable_grad():
                self._runtime.run(step)
            with self._runtime.recorder.waiting("reduce"):
                self._reductions.finish()
            for stage in self._stages.values():
                stage.end_step(self._data)
            self._synchronize_buffers()
        assert step.result is not None
        return step.result[1].clone()

    @torch.no_grad()
    def eval_step(
        self, inputs: Any = None, targets: Any = None, *, broadcast_output: bool = False
    ) -> tuple[Any, torch.Tensor | None]:
        """Forward of a batch. Collective over the ranks of the pipeline; replicas are independent.

        Unless there are experts in the stages, which all replicas compute together.

        Parameters
        ----------
        inputs, targets
            As in :meth:`train_step`; without targets no loss is computed.
        broadcast_output
            Whether every rank gets the output.

        Returns
        -------
        output, loss
            The output on the rank of the last stage, ``None`` elsewhere unless it is broadcast. The loss of
            this replica's batch on every rank, or ``None``.

        Notes
        -----
        ``eval()`` and ``train()`` are up to the caller, as for any module.
        """
        with self._guarded():
            step = self._step(inputs, targets, training=False, scale=1.0)
            self._seeds.begin(training=False)
            self._runtime.run(step)
            for stage in self._stages.values():
                stage.end_step(None)  # replicas evaluate independently
            output = step.joined_output() if self.is_last else None
            if broadcast_output:
                output = broadcast_value(output, self._comm, self.plan.last_rank, self.device)
        assert step.result is not None
        return output, step.result[1].clone() if step.result[0] else None

    def forward(self, inputs: Any = None, *, broadcast_output: bool = False) -> Any:
        """The output of the model without gradients, as ``eval_step(inputs)[0]``. Collective."""
        return self.eval_step(inputs, broadcast_output=broadcast_output)[0]

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Steps inside leave the gradients of replicas apart; the next one outside averages all. Local."""
        before, self._reductions.synchronize = self._reductions.synchronize, False
        try:
            yield
        finally:
            self._reductions.synchronize = before

    # What it is ------------------------------------------------------------------------------------------

    @property
    def is_first(self) -> bool:
        """Whether this rank has the first stage, and so needs inputs. Local."""
        return self.plan.stages[0].rank == self._comm.rank

    @property
    def is_last(self) -> bool:
        """Whether this rank has the last stage, and so needs targets. Local."""
        return self.plan.last_rank == self._comm.rank

    @property
    def schedule(self) -> Schedule:
        """What the ranks execute in training. Local."""
        return self.plan.schedule

    @property
    def balance(self) -> list[int]:
        """Layers of each stage of the schedule that was asked for. Local."""
        return list(self._balance)

    def extra_repr(self) -> str:
        """What ``print`` shows besides the layers. Local."""
        where = f"rank {self._comm.rank} of {self._comm.size}"
        name = self.schedule.name or "own schedule"
        return f"{where}, stages {list(self._stages)}, {name}, {self._microbatches} microbatches"

    def stats(self) -> PipelineStats:
        """Seconds, messages and bytes of this rank so far. Local."""
        return self._runtime.stats()

    @contextmanager
    def trace(self) -> Iterator[Callable[[], Timeline]]:
        """Note who does what when. Collective to enter.

        Yields
        ------
        callable
            Returns the timeline of all ranks; Collective. To be called after the block, or in it.
        """
        recorder = self._runtime.recorder

        def timeline() -> Timeline:
            with self._listening():
                return recorder.timeline()

        with self._listening():
            recorder.start()
        try:
            yield timeline
        finally:
            recorder.stop()

    def free(self) -> None:
        """Give communicators and shared memory back; a second call is fine. Collective.

        After a failure nothing is freed: messages may still be on their way. Layers and gradients stay.
        """
        if self._freed:
            return
        self._freed = True
        self._runtime.use_progress_thread(False)
        if self._broken is not None or not self._alarm.is_quiet:
            return
        try:
            with self._alarm.armed():  # another rank may have failed after this one had done its part
                for comm in filter(None, (self._comm, self._data)):
                    comm.Barrier()
        except RankFailedError:
            return
        self._reductions.free()
        self._runtime.free()
        self._alarm.free()
        self._free_communicators()

    # Parts -----------------------------------------------------------------------------------------------

    def _step(self, inputs: Any, targets: Any, *, training: bool, scale: float) -> Step:
        loss = None
        if self.is_last and (training or targets is not None):
            loss = MicrobatchLosses(
                self._loss_fn,
                self._cut(targets),
                reduction=self._loss_reduction,
                scale=scale,
                replicas=self._data if training else None,
            )
        parts = self._cut(inputs) if self.is_first else None
        if parts is not None and self._data is not None and self._meets_replicas:
            check_filled(parts, self._data)
        return Step(
            self._microbatches,
            training=training,
            inputs=parts,
            loss=loss,
            checkpoint=self._checkpoint,
            backward_of=self._reductions.backward_of,
        )

    def _free_communicators(self) -> None:
        if self._data is not None:
            self._data.Free()
        self._comm.Free()

    def _cut(self, batch: Any) -> list[Microbatch] | None:
        """The microbatches of a batch, on this rank's device."""
        if batch is None:
            return None
        parts = split(batch, self._microbatches)
        if self.device.type == "cpu":
            return parts
        return [
            dataclasses.replace(part, value=map_tensors(lambda t: t.to(self.device), part.value))
            for part in parts
        ]

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Make a failure here a failure of all ranks."""
        if self._freed:
            raise CommunicatorFreedError("a pipeline must not be used after free()")
        if self._broken is not None:
            raise HpcparError(
                "a pipeline must not be used after a failure: messages of the failed step may be on their "
                "way. Make a new one, or restart from a checkpoint"
            ) from self._broken
        try:
            with self._alarm.armed():
                yield
        except BaseException as error:
            if self._comm.size > 1 or self._data is not None:
                self._broken = error
                where = f"stages {list(self._stages)} of the pipeline"
                self._alarm.sound(f"{where}: {''.join(traceback.format_exception(error))}")
                self._reductions.give_up()
            self._runtime.abandon()
            raise

    def _synchronize_buffers(self) -> None:
        """Running statistics of the first replica, as data parallelism has it."""
        if self._data is None or not self._reductions.synchronize:
            return
        buffers = [pair for stage in self._stages.values() for pair in stage.buffers]
        if buffers:
            # What changes may depend on the data; the replicas must send the same.
            changing = torch.tensor([is_changing for _, is_changing in buffers], dtype=torch.uint8)
            self._data.Allreduce(MPI.IN_PLACE, changing, MPI.MAX)
            changed = [buffer for (buffer, _), flag in zip(buffers, changing.tolist(), strict=True) if flag]
            broadcast_packed(changed, self._data, 0)


def _groups(stages: dict[int, Stage]) -> dict[int, int]:
    """Number the sets of stages that share parameters."""
    group = {index: index for index in stages}
    owner: dict[int, int] = {}
    for index, stage in stages.items():
        for parameter in stage.parameters:
            other = owner.setdefault(id(parameter), index)
            old, new = group[index], group[other]
            group = {i: new if g == old else g for i, g in group.items()}
    return group
