"""One rank's part in a collaboration: what each call of the optimizer does next, and in which order.

A *turn* looks at the news and does what is due: load a newer state, or take part in a round::

    turn:  behind?            -> load the newest state from a donor; keep gradients that are not too old
           round due, joined? -> wait for the decision -> hand over, sum, apply     (blocking)
                                 look, apply if it is complete                      (delayed averaging)

With delayed averaging a rank joins with what it has, goes on accumulating apart, and blocks only when the
round after the one under way has its samples, too.

Invariants:

* What was handed over is either summed or taken back, so samples count once. A round that is being summed
  is ended before anything else is looked at, even if others are ahead meanwhile.
* An exception between the beginning of the sums and the end of the step leaves a replica that is none: it
  ends the collaboration, for all ranks.
* Outside of ``step()`` the gradients that the program has computed stay what they are.
* A rank that waits in one collaboration joins rounds of its others, as far as that changes no parameters; two
  ranks that wait in different ones would wait for each other.
* Parameters change only in :meth:`Collaboration._apply` and when a state is loaded, both in the thread and
  inside a call of the optimizer, with no wait in between: a donor never packs half a step.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch

from hpcpar.comm import Alarm, Reducer, wait_for_peers
from hpcpar.errors import MismatchError
from hpcpar.optim.collaborative.accumulation import Accumulation, Totals, plan_accumulation
from hpcpar.optim.collaborative.averaging import Averaging
from hpcpar.optim.collaborative.catch_up import CatchUp
from hpcpar.optim.collaborative.membership import Membership
from hpcpar.optim.collaborative.options import CollaborativeOptions
from hpcpar.optim.collaborative.performance import PerformanceEMA
from hpcpar.optim.collaborative.progress import (
    CollaborationState,
    TrainingState,
    describe_round,
    summarize,
    training_states,
)
from hpcpar.optim.collaborative.replica import Replica
from hpcpar.optim.collaborative.state_exchange import StateExchange

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Collaboration"]

logger = logging.getLogger(__name__)

_ASSIST_S = 1.0
_ALONE_S = 0.02  # ranks in step seldom wait as long, and then join with what they are about to compute


class Collaboration:
    """Everything of a collaborative optimizer that communicates. Collective to make.

    Parameters
    ----------
    comm
        The ranks.
    replica
        Equal on all of them.
    options
        Of the optimizer.
    """

    def __init__(self, comm: Communicator, replica: Replica, options: CollaborativeOptions) -> None:
        self._comm = comm.Dup()
        self._comm.skip_checks()
        self.rank = comm.rank
        self.is_open = True
        self.failure = ""
        self._siblings: list[Collaboration] = cast(
            "list[Collaboration]", comm.attachments.setdefault("collaborations", [])
        )
        self._siblings.append(self)
        self._joined_s = 0.0
        self._is_leaving = False
        self._replica, self._options = replica, options
        self._performance = PerformanceEMA(options.performance_ema_alpha)
        self._alarm = Alarm([self._comm])
        likes, layouts, devices = plan_accumulation(replica.parameters, options.accumulate_grads_on)
        reducer = Reducer(
            self._comm,
            layouts,
            transport=options.transport,
            wire_dtype=options.wire_dtype,
            devices=devices,
            name="averaging round",
        )
        self._accumulation = Accumulation(
            replica.parameters,
            likes,
            layouts,
            reducer,
            apart=options.delayed_averaging,
            batch_size=options.batch_size_per_step if options.reuse_grad_buffers else None,
            unit=options.unit_of_sums,
            untrained=replica.untrained,
        )
        self._averaging = Averaging(self._comm, reducer, behind=options.delayed_averaging)
        self._members: Sequence[int] | None = None  # of the round that is being summed
        self._exchange = StateExchange(self._comm, replica.pack)
        self._membership = Membership(self._comm, options.target_batch_size, options.averaging_timeout)
        self._catch_up = CatchUp(self._comm, self._membership, self._exchange, options.averaging_timeout)

    @staticmethod
    def check_alone(comm: Communicator, *, reuses_gradients: bool) -> None:
        """Whether one more collaboration of these ranks can wait for the others. Local.

        Raises
        ------
        MismatchError
            Where one accumulates in ``.grad``, which cannot be summed while the program computes.
        """
        others = cast("list[Collaboration]", comm.attachments.get("collaborations", []))
        if others and (reuses_gradients or any(other._options.reuse_grad_buffers for other in others)):
            raise MismatchError(
                "reuse_grad_buffers must be left to the only CollaborativeOptimizer of a communicator, got "
                "several optimizers"
            )

    # What is known ---------------------------------------------------------------------------------------

    @property
    def is_behind(self) -> bool:
        """Whether others have a newer version. Local."""
        self._look()
        return self._membership.is_behind

    @property
    def state(self) -> CollaborationState:
        """Of all ranks together. Local."""
        self._look()
        return summarize(self._membership.rows, self._options.target_batch_size)

    @property
    def training_states(self) -> list[TrainingState]:
        """Of each rank. Local."""
        self._look()
        return training_states(self._membership.rows)

    # What the optimizer calls ----------------------------------------------------------------------------

    def contribute(self, samples: int, *, scale: float | None, has_overflowed: bool) -> None:
        """Count a batch, then take a turn. Point-to-point."""
        version = self._replica.version
        with self._alarm.armed():
            if self._membership.has_joined and not self._options.delayed_averaging:
                with self._keeping_gradients():  # joined while this rank waited elsewhere
                    self._advance_round(wait=True)
            self._accumulation.add(samples, version, scale, has_overflowed)
            self._performance.update(samples)
            self._turn()

    def join_meanwhile(self, *, may_step: bool) -> None:
        """Let a round of this collaboration go on while the rank waits in another one. Never waits.

        Parameters
        ----------
        may_step
            Whether it may be ended, too, with new parameters.
        """
        if not self.is_open:
            return
        self._look()
        membership = self._membership
        if self._members is not None:
            if self._averaging.is_done() and may_step:
                with self._keeping_gradients():
                    self._advance_round(wait=False)
        elif not membership.is_behind:
            if not membership.has_joined and membership.is_due:
                self._join()
            if membership.has_joined and membership.members() is not None:
                self._begin_round(wait=False)

    def assist(self) -> None:
        """Take a turn when there is something to do, or after a second. Point-to-point."""
        with self._alarm.armed(), self._performance.pause(), self._keeping_gradients():
            limit_s = time.monotonic() + _ASSIST_S
            self._wait_for_others(lambda: self._is_called or time.monotonic() >= limit_s)
            self._turn(is_computing=False)

    def load_from_peers(self) -> None:
        """Load the newest state with the random numbers, also if this rank has the newest. Point-to-point."""
        self.settle()
        with self._alarm.armed(), self._keeping_gradients():
            self._load(explicit=True)
            while self._membership.is_behind:
                self._load(explicit=True)

    def settle(self) -> None:
        """End the round that runs behind, if any. Point-to-point."""
        with self._alarm.armed(), self._keeping_gradients():
            while self._membership.has_joined:
                self._advance_round(wait=True)

    def residuals(self) -> list[torch.Tensor]:
        """What an eight-bit wire has kept back of each parameter's sum, over all ranks. Collective."""
        self.settle()
        with self._alarm.armed():
            return [view.clone() for view in self._accumulation.views_of(self._averaging.residuals())]

    def load_residuals(self, residuals: Sequence[torch.Tensor]) -> None:
        """Go on from that. Collective, does not wait."""
        self.settle()
        flats = [torch.zeros(flat.shape, dtype=flat.dtype) for flat in self._averaging.buckets]
        for view, residual in zip(self._accumulation.views_of(flats), residuals, strict=True):
            view.copy_(residual)
        self._averaging.load_residuals(flats)

    def restart(self) -> None:
        """Go on with the replica's state, which was loaded from elsewhere. Local."""
        self._accumulation.clear()
        self._membership.advance(self._replica.version, self._replica.step, 0, anew=True)

    def leave(self) -> None:
        """Assist until all leave, then free everything. Collective."""
        if not self.is_open:
            return
        membership = self._membership
        self._is_leaving = True
        with self._alarm.armed(), self._performance.pause():
            membership.leave()
            while not membership.decision.all_left:
                self._wait_for_others(self._make_news_check())
                self._turn(is_computing=False)
            membership.close()
            self._exchange.free()
        self._accumulation.detach()
        self._averaging.free()
        self._close()
        self._alarm.free()
        self._comm.Free()

    def abort(self, text: str) -> None:
        """Tell the others that this rank has failed, and wait for nobody. Local."""
        if not self.is_open:
            return
        self.failure = text.strip().rpartition("\n")[2]
        self._close()
        self._alarm.sound(text)
        self._membership.stop()
        self._exchange.stop()
        self._averaging.give_up()

    # Turns -----------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Take in what is new, answer who asks. Never waits."""
        if self.is_open:
            self._membership.look()
            self._exchange.progress()

    @property
    def _is_called(self) -> bool:
        """Whether a turn would do something."""
        self._look()
        membership = self._membership
        if self._members is not None:
            return self._averaging.is_done() or membership.is_next_due or membership.is_behind
        if membership.is_behind:
            return True
        if not membership.has_joined:
            return membership.is_due
        return membership.is_decided or membership.is_next_due

    def _turn(self, *, is_computing: bool = True) -> None:
        """Do what is due now; a rank that has nothing to compute meanwhile sees a round to its end."""
        membership = self._membership
        rate = self._performance.samples_per_second if is_computing else 0.0
        membership.report(self._accumulation.samples, rate)
        self._look()
        if membership.is_behind:
            if self._members is not None:
                self._advance_round(wait=True)  # others have ended it already
            if membership.is_behind:
                self._load(explicit=False)
            return
        if not membership.has_joined:
            if not membership.is_due:
                return
            self._join()
        may_go_on = self._options.delayed_averaging and is_computing and not membership.is_next_due
        self._advance_round(wait=not may_go_on)

    def _join(self) -> None:
        self._joined_s = time.monotonic()
        self._membership.join()
        if self._options.delayed_averaging:  # else when it begins, so that it need not be taken back
            self._accumulation.hand_over()

    def _advance_round(self, *, wait: bool) -> None:
        """Go on with the round that was joined, to its end if this may wait."""
        with self._performance.pause():
            if not self._begin_round(wait=wait):
                return
            if not wait and not self._averaging.is_done():
                return
            with self._failing_for_good():
                if len(self._siblings) > 1:  # members may be waiting in rounds of those
                    self._wait_for_others(self._averaging.is_done)
                self._averaging.wait()
                members, self._members = self._members or (), None
                self._apply(self._accumulation.totals(), len(members), time.monotonic() - self._joined_s)

    def _begin_round(self, *, wait: bool) -> bool:
        """Start the sums when the members are known; whether they are under way."""
        membership = self._membership
        if self._members is not None:
            return True
        if wait:
            self._wait_for_others(lambda: membership.is_decided)
        elif not membership.is_decided:
            return False
        members = membership.members()
        if members is None:
            self._load(explicit=False)
            return False
        with self._failing_for_good():
            if not self._options.delayed_averaging:
                self._accumulation.hand_over()
            self._averaging.start(members)
        self._members = members
        return True

    def _apply(self, totals: Totals, members: int, seconds: float) -> None:
        """Make the global step, the same on all members."""
        is_step = totals.samples > 0 and not totals.has_overflowed
        if is_step:
            self._accumulation.write_means(totals)
            self._replica.apply(self._options.clip_grad_norm)
        self._accumulation.end_round()
        self._replica.version += 1
        self._membership.advance(self._replica.version, self._replica.step, self._accumulation.samples)
        level = logging.INFO if self._options.verbose else logging.DEBUG
        if logger.isEnabledFor(level):
            state = summarize(self._membership.rows, self._options.target_batch_size)
            logger.log(level, "%s", describe_round(state, self._replica.step, totals, members, seconds))

    # States ----------------------------------------------------------------------------------------------

    def _load(self, *, explicit: bool) -> None:
        """Load the newest state, unless it turns out that none is needed."""
        membership, accumulation = self._membership, self._accumulation
        if membership.has_joined:
            if self._options.delayed_averaging:
                accumulation.take_back()
            membership.leave_round(accumulation.samples)
        is_behind = membership.is_behind
        with self._performance.pause():
            packed = self._catch_up.fetch(
                membership.version + int(is_behind), lambda: explicit or membership.is_behind
            )
        if packed is None:
            return
        before = self._replica.version
        with self._failing_for_good():
            self._replica.unpack(packed, with_random=explicit)
        self._drop_old_gradients()
        membership.advance(self._replica.version, self._replica.step, accumulation.samples)
        logger.info(
            "%s was at version %d and has loaded version %d", self._comm._where, before, self._replica.version
        )

    def _drop_old_gradients(self) -> None:
        accumulation = self._accumulation
        if accumulation.oldest is None:
            return
        age = self._replica.version - accumulation.oldest
        if age > self._options.step_tolerance:
            logger.warning(
                "%s drops %d samples: gradients of parameters %d versions old, where step_tolerance is %d",
                self._comm._where,
                accumulation.samples,
                age,
                self._options.step_tolerance,
            )
            accumulation.clear()

    def _make_news_check(self) -> Callable[[], bool]:
        """Whether anything is new since now; a wait for news begins its deadline anew with each."""
        membership = self._membership
        heard = membership.rows.tobytes()
        return lambda: self._is_called or membership.decision.all_left or membership.rows.tobytes() != heard

    # Gradients, failures ---------------------------------------------------------------------------------

    @contextmanager
    def _keeping_gradients(self) -> Iterator[None]:
        """What ``.grad`` holds before the block it holds after it, unless it is an accumulator."""
        if self._options.reuse_grad_buffers:
            yield
            return
        gradients = [parameter.grad for parameter in self._replica.parameters]
        for parameter in self._replica.parameters:
            parameter.grad = None  # or a mean would be written into the same memory
        try:
            yield
        finally:
            for parameter, gradient in zip(self._replica.parameters, gradients, strict=True):
                parameter.grad = gradient

    @contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """An exception inside the block ends the collaboration, for all ranks."""
        try:
            yield
        except BaseException:
            self.abort(traceback.format_exc())
            raise

    def _close(self) -> None:
        self.is_open = False
        self._siblings.remove(self)

    # Waiting ---------------------------------------------------------------------------------------------

    def _wait_for_others(self, done: Callable[[], bool]) -> None:
        limit_s = time.monotonic() + _ALONE_S

        def look_and_ask() -> bool:
            self._look()
            if len(self._siblings) > 1 and time.monotonic() >= limit_s:
                for other in self._siblings:
                    if other is not self:
                        other.join_meanwhile(may_step=self._is_leaving)
            return done()

        wait_for_peers(look_and_ask, self._comm, self._describe)

    def _describe(self) -> tuple[str, Sequence[int]]:
        membership = self._membership
        if membership.has_joined:
            return f"joining averaging round {membership.version}", membership.missing()
        return "assisting other ranks", [r.rank for r in training_states(membership.rows) if not r.has_left]
