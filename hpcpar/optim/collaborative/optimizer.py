"""The collaborative optimizer: ranks of unequal speed make the same steps, and none waits for the slowest.

Every rank calls ``step(batch_size)`` after each backward, at its own pace. When all together have accumulated
``target_batch_size`` samples, everybody joins one averaging round, as soon as it is through with the batch at
hand, and applies the same optimizer step. A slow rank contributes fewer samples, not a slower step::

    rank 0   b b b b b b b | round | b b b b b b b b | round      b: a batch, backward, step(batch_size)
    rank 1   b  b  b  b  b | round | b  b  b  b  b   | round
    rank 2   b     b     b | round | b     b     b   | round      slower: fewer samples

The gradient of the step is the sum of ``batch_size * gradient`` over all batches of all ranks, divided once
by the number of samples: exactly the mean over all samples, if each loss is the mean over its batch.

Who has how many samples travels in small messages to a secretary, which names the members of a round
(:mod:`~hpcpar.optim.collaborative.secretary`). Rounds are triggered by counts and never by a clock. With
``averaging_timeout`` a round goes on without ranks that are late; these load a newer state when they come
back (:mod:`~hpcpar.optim.collaborative.catch_up`).

Invariant: replicas of one version are bitwise equal, since each sum is computed in one place and copied, and
everything that follows from it is computed alike.
"""

from __future__ import annotations

import traceback
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import agree, check_alike
from hpcpar.errors import HpcparError, MismatchError
from hpcpar.optim.collaborative.collaboration import Collaboration
from hpcpar.optim.collaborative.options import CollaborativeOptions, check_batch_size, check_kinds
from hpcpar.optim.collaborative.progress import CollaborationState, TrainingState
from hpcpar.optim.collaborative.replica import Replica, Scheduler, describe
from hpcpar.optim.data_parallel import drop_gradients
from hpcpar.optim.wrapped import WrappedOptimizer

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["CollaborativeOptimizer"]

_SUBJECT = "a CollaborativeOptimizer"
_STATE = "collaborative"
_GENERATION = 2**32  # versions of one
_SCALING = ("grad_scale", "found_inf")  # what a GradScaler sets for the time of its step()


class CollaborativeOptimizer(WrappedOptimizer):
    """Steps a torch optimizer whenever all ranks together have computed enough samples.

    Parameters
    ----------
    opt
        Any torch optimizer over the parameters of a plain module. Rank 0's parameters, optimizer and
        scheduler state are broadcast.
    comm
        The ranks.
    target_batch_size
        Samples of all ranks together that make a step due.
    batch_size_per_step
        What ``step()`` counts when it is given no number.
    scheduler
        A learning-rate scheduler over ``opt``; stepped once per global step, on every rank.
    step_tolerance
        Gradients of parameters at most so many versions old still count after a state was loaded.
    reuse_grad_buffers
        Accumulate in ``.grad`` itself, without other memory. ``zero_grad()`` raises then, and every batch
        has ``batch_size_per_step`` samples.
    accumulate_grads_on
        Device of the accumulators; that of the parameters by default.
    averaging_timeout
        Seconds that the first rank of a round waits for the others, after which the round takes place
        without them; ``None`` waits for everybody.
    performance_ema_alpha
        Weight of the newest batch in the average speed.
    verbose
        Log a line per global step at level INFO instead of DEBUG.
    delayed_averaging
        Let a round run behind the next batches; its step is applied in the first call that finds it complete.
        One round is under way at most, so gradients are at most one version old.
    clip_grad_norm
        Largest norm of the mean gradient.
    wire_dtype, transport
        As in :class:`hpcpar.comm.Reducer`, for rounds of all ranks.

    Raises
    ------
    MismatchError
        On every rank, when options are wrong or differ, or parameters do.

    Notes
    -----
    Collective to make and to shut down; in between, ranks call what they like at their own pace.

    A ``torch.amp.GradScaler`` on each rank works as usual: ``scaler.step(opt, batch_size=n)``. If a gradient
    of any rank overflows, the round's samples are dropped on all ranks: no step is made, ``local_step`` and
    the scheduler stay where they are.

    After ``step()`` has made a global step, ``.grad`` holds the mean gradient. Call ``zero_grad()`` before
    the next backward, as always.

    A state that was loaded by ``load_state_dict()`` is newer than all that was before. Load it on all ranks,
    or on one, from which the others load by :meth:`load_state_from_peers` behind a barrier.

    Examples
    --------
    >>> with CollaborativeOptimizer(torch.optim.AdamW(net.parameters()), comm, target_batch_size=4096) as opt:
    ...     while opt.local_step < 1000:
    ...         opt.zero_grad()
    ...         loss_fn(net(x), y).backward()
    ...         opt.step(batch_size=len(x))
    """

    # A GradScaler then calls step() always, with its scale in an attribute: an overflow is everybody's.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        opt: torch.optim.Optimizer,
        comm: Communicator,
        *,
        target_batch_size: int,
        batch_size_per_step: int | None = None,
        scheduler: Scheduler | None = None,
        step_tolerance: int = 1,
        reuse_grad_buffers: bool = False,
        accumulate_grads_on: torch.device | str | None = None,
        averaging_timeout: float | None = None,
        performance_ema_alpha: float = 0.1,
        verbose: bool = False,
        delayed_averaging: bool = False,
        clip_grad_norm: float | None = None,
        wire_dtype: torch.dtype | None = None,
        transport: str = "auto",
    ) -> None:
        def check() -> CollaborativeOptions:
            check_kinds(opt, scheduler, reuse_grad_buffers=reuse_grad_buffers)
            Collaboration.check_alone(comm, reuses_gradients=reuse_grad_buffers)
            device = None if accumulate_grads_on is None else torch.device(accumulate_grads_on)
            return CollaborativeOptions(
                target_batch_size=target_batch_size,
                batch_size_per_step=batch_size_per_step,
                step_tolerance=step_tolerance,
                reuse_grad_buffers=reuse_grad_buffers,
                accumulate_grads_on=device,
                averaging_timeout=averaging_timeout,
                performance_ema_alpha=performance_ema_alpha,
                verbose=verbose,
                delayed_averaging=delayed_averaging,
                clip_grad_norm=clip_grad_norm,
                wire_dtype=wire_dtype,
                transport=transport,
            )

        self._options = agree([comm], _SUBJECT, check)
        super().__init__(opt)
        self._replica = Replica(opt, scheduler)
        check_alike(comm, _SUBJECT, describe(self._replica, self._options.in_common()))
        self._replica.broadcast(comm)
        self._collaboration = Collaboration(comm, self._replica, self._options)

    # The training loop -----------------------------------------------------------------------------------

    def step(self, batch_size: int | None = None) -> None:  # type: ignore[override]
        """Count the batch whose gradients are in ``.grad``; make the global step if it is due.

        Waits for other ranks only in a round. Point-to-point.

        Parameters
        ----------
        batch_size
            Samples in the batch; ``batch_size_per_step`` by default.

        Raises
        ------
        MismatchError
            When the number is missing or wrong.
        RankFailedError, StalledError
            When a rank that is waited for has failed, or does not come.
        """
        try:
            self._step(batch_size)
        except BaseException:
            for name in _SCALING:
                self.__dict__.pop(name, None)  # a GradScaler does not come to remove them
            raise

    def _step(self, batch_size: int | None) -> None:
        self._check_open()
        samples = self._samples_of(batch_size)
        scale, overflows = (self.__dict__.get(name) for name in _SCALING)
        if overflows is not None and self._options.reuse_grad_buffers:
            raise HpcparError(
                "reuse_grad_buffers must not be combined with a GradScaler, got both: gradients of several "
                "scales would add up in .grad. Use bfloat16, or reuse_grad_buffers=False"
            )
        self._collaboration.contribute(
            samples,
            scale=None if scale is None else float(scale),
            has_overflowed=overflows is not None and float(overflows) > 0.0,
        )

    def step_aux(self) -> None:
        """Assist others: take part in the next round with nothing new, for a rank without data.

        Returns after a round, or after about a second without one. ``while opt.local_step < n:
        opt.step_aux()`` makes a rank that only assists, and stays a replica. Point-to-point.
        """
        self._check_open()
        self._collaboration.assist()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch. Local.

        Raises
        ------
        HpcparError
            With ``reuse_grad_buffers``, where ``.grad`` holds what is accumulated.
        """
        if self._options.reuse_grad_buffers and self._collaboration.is_open:
            raise HpcparError(
                "zero_grad() must not be called with reuse_grad_buffers, got a call: it would drop what is "
                "accumulated in .grad. Leave it out; each global step clears it"
            )
        for group in self.param_groups:
            drop_gradients(group["params"], set_to_none)

    def load_state_from_peers(self) -> None:
        """Load the newest parameters, optimizer, scheduler and random numbers from another rank.

        All ranks may call it at once, for instance after one of them has loaded a checkpoint; a rank that
        has the newest while all ask keeps what it has. Gradients that are not too old for ``step_tolerance``
        still count. Point-to-point.

        Raises
        ------
        StalledError
            When no other rank uses its optimizer until the deadline.
        """
        self._check_open()
        self._collaboration.load_from_peers()

    def shutdown(self) -> None:
        """Leave, and free everything; a second call does nothing. Collective.

        A rank that comes early assists the others until they come too, so all end as the same replica.
        Samples that do not suffice for another step are dropped.
        """
        self._collaboration.leave()

    # What is known ---------------------------------------------------------------------------------------

    @property
    def local_step(self) -> int:
        """Global steps in this rank's parameters. Local."""
        return self._replica.step

    @property
    def is_synchronized(self) -> bool:
        """Whether no newer parameters than this rank's are known of. Local."""
        return not self._collaboration.is_behind

    @property
    def collaboration_state(self) -> CollaborationState:
        """What all ranks together have accumulated, as last heard. Local."""
        return self._collaboration.state

    @property
    def training_state(self) -> TrainingState:
        """What this rank has said about itself. Local."""
        return self._collaboration.training_states[self._collaboration.rank]

    @property
    def training_states(self) -> list[TrainingState]:
        """What each rank has said about itself, as last heard; in rank order. Local."""
        return self._collaboration.training_states

    # As a torch optimizer --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """That of the wrapped optimizer, which can load it, with ``"collaborative"`` added. Local.

        It is the same on all ranks at the same ``local_step`` and loads on any number of ranks. Accumulated
        gradients are not in it.
        """
        scheduler = self._replica.scheduler
        mine = {
            "version": self._replica.version,
            "step": self._replica.step,
            "scheduler": None if scheduler is None else scheduler.state_dict(),
        }
        return {**self.optimizer.state_dict(), _STATE: mine}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load on all ranks, or on one from which the others load then. Drops accumulated gradients.

        Local, but waits for a round that runs behind (``delayed_averaging``). A state of the wrapped
        optimizer alone is fine, too; it counts as newer than what was there.
        """
        self._check_open()
        self._collaboration.settle()
        self.optimizer.load_state_dict(state_dict)
        mine = state_dict.get(_STATE)
        # Of a new generation: newer than whatever any rank has, so that older states can be returned to.
        generation, number = divmod(self._replica.version, _GENERATION)
        if mine is not None:
            number, self._replica.step = mine["version"] % _GENERATION, mine["step"]
            if self._replica.scheduler is not None and mine["scheduler"] is not None:
                self._replica.scheduler.load_state_dict(mine["scheduler"])
        self._replica.version = (generation + 1) * _GENERATION + number
        self._collaboration.restart()

    def residual_state(self) -> dict[int, torch.Tensor]:
        """What ``wire_dtype=torch.int8`` has kept back of each trained parameter, by number. Collective.

        To be saved beside :meth:`state_dict`, when all ranks are at the same step. It is the total of all
        ranks, the same on each, and loads on any number of ranks. Empty for other types.
        """
        self._check_open()
        if self._options.wire_dtype is not torch.int8:
            return {}
        return dict(enumerate(self._collaboration.residuals()))

    def load_residual_state(self, state: dict[int, torch.Tensor]) -> None:
        """Go on from what :meth:`residual_state` returned on these or other ranks. Collective.

        Raises
        ------
        MismatchError
            When it is of other parameters.
        """
        self._check_open()
        shapes = {number: tuple(p.shape) for number, p in enumerate(self._replica.parameters)}
        if state and {number: tuple(tensor.shape) for number, tensor in state.items()} != shapes:
            raise MismatchError("residuals must have the shapes of the trained parameters, got others")
        if state:
            self._collaboration.load_residuals([state[number] for number in shapes])

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Not possible: accumulators are laid out when the optimizer is made.

        Raises
        ------
        HpcparError
            Always.
        """
        raise HpcparError(
            "parameters must be known when a CollaborativeOptimizer is made, got a group afterwards. Add it "
            "to the wrapped optimizer before"
        )

    def __repr__(self) -> str:
        return f"CollaborativeOptimizer({self.optimizer!r}, step {self.local_step})"

    def __enter__(self) -> CollaborativeOptimizer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.shutdown()
        else:  # others wait for this rank, which comes no more
            self._collaboration.abort("".join(traceback.format_exception(error)))

    def _samples_of(self, batch_size: int | None) -> int:
        usual = self._options.batch_size_per_step
        if batch_size is None and usual is None:
            raise MismatchError(
                "batch_size must be given, got None. Pass it to step(), or batch_size_per_step beforehand"
            )
        samples = check_batch_size("batch_size", usual if batch_size is None else batch_size)
        if self._options.reuse_grad_buffers and samples != usual:
            raise MismatchError(
                f"batch_size must be batch_size_per_step={usual} with reuse_grad_buffers, got {samples}"
            )
        return samples

    def _check_open(self) -> None:
        if self._collaboration.failure:
            raise HpcparError(
                "a CollaborativeOptimizer must not be used after a failure, which was "
                f"{self._collaboration.failure}"
            )
        if not self._collaboration.is_open:
            raise HpcparError("a CollaborativeOptimizer must not be used after shutdown()")
