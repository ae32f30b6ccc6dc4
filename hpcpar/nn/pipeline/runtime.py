"""The runtime: one rank's event loop over the actions of a schedule and the messages between stages.

::

    schedule of this rank     0F0 0F1 0F2 0B0 0F3 0B1 ...
                               │   └─────┬─────┘
    runs now ──────────────────┘         └── window: receives are posted for these already

An action is *ready* when what it consumes has arrived. The first one in the schedule's order runs; if it is
not ready, the loop waits, and while it waits:

* a recomputation that the next backward needs anyway starts before the gradient arrives;
* an action behind it that is ready may overtake, once the wait has lasted half as long as that action usually
  takes. (At once would be wrong: a weight gradient of 3 ms would delay the backward that arrives 50 us
  later, and with it all stages before this one.) A forward never overtakes a backward: it would hold more
  activations than the schedule does, and delay what other stages wait for.

Invariants:

* Actions that add to the same gradients keep their order, so a run can be repeated bit by bit whatever the
  timing.
* Where stages meet their replicas inside of an action (experts, synchronised batch norm), all replicas must
  come to the same one: then the order is the schedule's, and nothing overtakes or starts early.
* Nothing here blocks: sends are started and forgotten, receives are posted for the window, so a
  rendezvous can never dead-lock. All waiting is in one place, has a deadline that names the action, what it
  waits for and from whom, and hears alarms.
* No rank leaves a step before it knows its result, which the last stage sends when its last forward is done,
  or later. So all forward messages of a step have been received when the next one begins, which
  :mod:`hpcpar.comm.parcels` needs.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING

import torch

from hpcpar.comm import ProgressThread, wait_for_peers
from hpcpar.nn.pipeline.activation import Activation
from hpcpar.nn.pipeline.mail import Mail, Task
from hpcpar.nn.pipeline.plan import PipelinePlan
from hpcpar.nn.pipeline.recorder import PipelineStats, Recorder
from hpcpar.nn.pipeline.schedule import Kind
from hpcpar.nn.pipeline.stage import Stage
from hpcpar.nn.pipeline.step import Step
from hpcpar.nn.progress_trial import ProgressTrial

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Runtime"]

_WINDOW = 4
_OVERTAKE_AFTER = 0.5
_BACKWARDS = (Kind.BACKWARD, Kind.BACKWARD_INPUT)
# What a task of each kind does in an order that must be kept: draw on the sequence of forwards, add to the
# gradients that are settled with the inputs', add to all others.
_ADDS: dict[Kind, set[str]] = {
    Kind.FORWARD: {"forward"},
    Kind.BACKWARD: {"settled", "weights"},
    Kind.BACKWARD_INPUT: {"settled"},
    Kind.BACKWARD_WEIGHT: {"weights"},
}


class Runtime:
    """Executes steps on this rank. Collective to make and to free.

    Parameters
    ----------
    plan
        The same on all ranks.
    stages
        Those of this rank, by number.
    comm
        The ranks of the pipeline.
    device
        Where the stages compute.
    groups
        Of each local stage the number of the set of stages with which it shares parameters.

    Attributes
    ----------
    recorder : Recorder
        What the steps have cost.
    """

    def __init__(
        self,
        plan: PipelinePlan,
        stages: dict[int, Stage],
        comm: Communicator,
        device: torch.device,
        groups: dict[int, int],
    ) -> None:
        self._plan = plan
        self._stages = stages
        self._comm = comm
        self._device = device
        self._groups = groups
        self._keeps_order = any(stage.meets_replicas for stage in stages.values())
        self._mail = Mail(plan, comm, device)
        self.recorder = Recorder(comm)
        self._usual_s: dict[tuple[Kind, int], float] = {}
        self._tasks = {
            True: [Task(action) for action in plan.schedule.actions[comm.rank]],
            False: [Task(action) for action in plan.forward_schedule.actions[comm.rank]],
        }
        self._flags: dict[int, dict[Hashable, list[tuple[bool, ...]]]] = {index: {} for index in stages}
        self._modes: dict[int, tuple[bool, ...]] = {}
        self._execute: dict[Kind, Callable[[Task], None]] = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.BACKWARD_INPUT: self._backward_inputs,
            Kind.BACKWARD_WEIGHT: self._backward_weights,
        }
        self._activations: dict[tuple[int, int], Activation] = {}
        self._trial: ProgressTrial | None = None
        self._thread: ProgressThread | None = None

    def run(self, step: Step) -> None:
        """Execute one step; its result is in ``step`` afterwards. Collective.

        Raises
        ------
        RankFailedError
            When another rank failed.
        StalledError
            When a message did not come in time.
        """
        self._begin(step)
        while self._pending:
            self._run(self._choose() or self._wait_for_work())
        self._end(step)

    def stats(self) -> PipelineStats:
        """What steps have cost on this rank so far. Local."""
        recorder, exchange = self.recorder, self._mail.exchange
        return PipelineStats(
            steps=recorder.steps,
            computed_s=recorder.computed_s,
            waited_s=recorder.waited_s,
            messages_sent=exchange.messages_sent,
            headers_sent=exchange.described_sent,
            bytes_sent=exchange.bytes_sent,
            peak_activations=recorder.peak_activations,
        )

    @property
    def comm(self) -> Communicator:
        """The ranks of the pipeline. Local."""
        return self._comm

    def choose_progress(self, progress: str) -> None:
        """Have a thread move messages on, or not, or find out in the next steps what is faster.

        Collective.
        """
        self._trial = ProgressTrial(self, progress)

    def use_progress_thread(self, wanted: bool) -> None:
        """Start or stop the thread. Local."""
        if wanted and self._thread is None and self._comm.size > 1:
            self._thread = ProgressThread(self._mail.exchange)
        elif not wanted and self._thread is not None:
            self._thread.stop()
            self._thread = None

    def abandon(self) -> None:
        """Give up what is under way, after a failure. Local."""
        self.use_progress_thread(False)
        self._mail.exchange.abandon()
        self._mail.begin("")
        self._activations.clear()

    def free(self) -> None:
        """Give the communicators back. Collective."""
        self.use_progress_thread(False)
        self._mail.exchange.free()

    # A step ----------------------------------------------------------------------------------------------

    def _begin(self, step: Step) -> None:
        if step.training:
            self.recorder.steps += 1
            if self._trial is not None:
                self._trial.begin_step()
        self._step = step
        self._pending = list(self._tasks[step.training])
        self._activations.clear()
        self._backwards_left = {index: len(step) for index in self._stages}
        self._mail.begin(step.context)
        for index, stage in self._stages.items():
            mode = stage.mode()
            if self._modes.get(index) != mode:
                self._modes[index] = mode
                self._flags[index].clear()
                stage.forget()
        self._expect_ahead()

    def _end(self, step: Step) -> None:
        """Exchange the result, and let go of what was sent."""
        if self._comm.rank == self._plan.last_rank:
            self._send_result(step)
        else:
            message = self._mail.expect_result(len(step))
            self._wait(message.test, lambda: ("pipeline step, which lacks the loss,", [self._plan.last_rank]))
            step.result = message.tensors[0]
        self._wait(lambda: self._mail.exchange.is_sent, self._describe_unsent)
        del self._step  # with the batch and what came out

    def _send_result(self, step: Step) -> None:
        if step.result is None:
            self._mail.send_result(step.finish_loss(), len(step))

    def _run(self, task: Task) -> None:
        start = time.perf_counter()
        self._pending.remove(task)
        self._execute[task.kind](task)
        end = time.perf_counter()
        self.recorder.computed_s += end - start
        if self.recorder.is_tracing:
            self.recorder.note(start, end, str(task.action), task.kind.value, task.key)
        what = task.kind, task.key[0]
        self._usual_s[what] = 0.7 * self._usual_s.get(what, end - start) + 0.3 * (end - start)
        self._expect_ahead()
        self._mail.exchange.progress()

    def _expect_ahead(self) -> None:
        """Post the receives of the next tasks."""
        for task in self._pending[:_WINDOW]:
            if task.expected is None:
                self._mail.expect(task, self._activations.get(task.key))
        if self._thread is not None:
            self._thread.wake()  # it sleeps whenever nothing is under way

    # Choosing --------------------------------------------------------------------------------------------

    def _choose(self, waited_s: float | None = None) -> Task | None:
        """The task to run now: the first one, or after a wait one that may overtake it by now."""
        first = self._pending[0]
        if self._is_ready(first):
            return first
        if waited_s is None or self._keeps_order:
            return None
        late = [first]
        for task in self._pending[1:_WINDOW]:
            usual_s = self._usual_s.get((task.kind, task.key[0]), math.inf)
            may_pass = waited_s >= _OVERTAKE_AFTER * usual_s and all(self._may_pass(task, o) for o in late)
            if may_pass and self._is_ready(task):
                return task
            late.append(task)
        return None

    def _may_pass(self, task: Task, late: Task) -> bool:
        """Whether a task may be executed before one that the schedule has before it."""
        if task.is_forward and late.kind in _BACKWARDS:
            return False  # it would hold more activations, and delay what other stages wait for
        if self._groups[task.key[0]] != self._groups[late.key[0]]:
            return True
        return not _ADDS[task.kind] & _ADDS[late.kind]

    def _is_ready(self, task: Task) -> bool:
        if task.kind is Kind.BACKWARD_WEIGHT:
            activation = self._activations.get(task.key)
            return activation is not None and activation.is_split
        return self._mail.has_come(task)

    # Waiting ---------------------------------------------------------------------------------------------

    def _wait_for_work(self) -> Task:
        """Wait until a task is ready, using the time where that is possible."""
        self._recompute_ahead()
        start = time.perf_counter()
        chosen: list[Task] = []

        def look() -> bool:
            task = self._choose(time.perf_counter() - start)
            if task is not None:
                chosen.append(task)
            self._mail.exchange.progress()
            return bool(chosen)

        self._wait(look, lambda: self._mail.describe_missing(self._pending[0]))
        return chosen[0]

    def _wait(self, done: Callable[[], bool], describe: Callable[[], tuple[str, Sequence[int]]]) -> None:
        with self.recorder.waiting("wait"):
            wait_for_peers(done, self._comm, describe)

    def _describe_unsent(self) -> tuple[str, Sequence[int]]:
        return "pipeline step, whose last messages are not received yet,", self._mail.exchange.slow_receivers

    def _recompute_ahead(self) -> None:
        """Start the recomputation of the next backward, if it needs one, before its gradient is there."""
        if self._keeps_order:
            return
        for task in self._pending[:_WINDOW]:
            if task.kind in _BACKWARDS:
                activation = self._activations.get(task.key)
                if activation is not None:
                    start = time.perf_counter()
                    self._recompute(task, activation)
                    self.recorder.computed_s += time.perf_counter() - start
                return

    # Tasks -----------------------------------------------------------------------------------------------

    def _forward(self, task: Task) -> None:
        step, (stage, microbatch) = self._step, task.key
        is_last = stage == len(self._plan.stages) - 1
        finish = step.finish(microbatch) if is_last else None
        if finish is not None and step.loss_may_draw:
            finish = functools.partial(self._stages[stage].seeded, microbatch, finish)
        activation = Activation(
            self._stages[stage],
            microbatch,
            self._mail.take_parcels(task) or [step.entry(microbatch)],
            finish,
            checkpoint=step.is_checkpointed(microbatch),
            device=self._device,
        )
        parcels, value = activation.forward(self._flags[stage], training=step.training)
        self._mail.send_parcels(task, parcels)
        if is_last:
            step.output(microbatch, value)
            if step.is_complete and not step.has_replicas:  # with replicas this could wait for one of them
                self._send_result(step)
        if step.training:
            self._activations[task.key] = activation
            self.recorder.held(len(self._activations))

    def _backward(self, task: Task) -> None:
        activation = self._prepare_backward(task)
        gradients = self._mail.take_gradients(task)
        with self._step.backward_of(task.key[0], self._is_last_of(task)):
            # Sent inside of the block, whose end may start a reduction: another stage waits for these.
            self._mail.send_gradients(task, activation.backward(gradients))
        del self._activations[task.key]

    def _backward_inputs(self, task: Task) -> None:
        activation = self._prepare_backward(task)
        self._mail.send_gradients(task, activation.backward_inputs(self._mail.take_gradients(task)))

    def _backward_weights(self, task: Task) -> None:
        activation = self._activations.pop(task.key)
        with self._step.backward_of(task.key[0], self._is_last_of(task)):
            activation.backward_weights()

    def _is_last_of(self, task: Task) -> bool:
        """Whether the gradients of the stage's parameters are complete after this task."""
        self._backwards_left[task.key[0]] -= 1
        return self._backwards_left[task.key[0]] == 0

    def _prepare_backward(self, task: Task) -> Activation:
        activation: Activation = self._activations[task.key]
        self._recompute(task, activation)
        return activation

    def _recompute(self, task: Task, activation: Activation) -> None:
        if activation.needs_recompute:
            start = time.perf_counter()
            activation.recompute()
            label = f"{task.key[0]}R{task.key[1]}"
            self.recorder.note(start, time.perf_counter(), label, "R", task.key)
