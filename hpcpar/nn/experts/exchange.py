"""The exchange of rows: from the ranks that have the tokens to those that have the experts, and back.

::

    rank 0  tokens -> rows for [ e0 e1 | e2 e3 ] --+  Alltoallv  +-> from [rank 0 | rank 1] -> e0, e1
    rank 1  tokens -> rows for [ e0 e1 | e2 e3 ] --+             +-> from [rank 0 | rank 1] -> e2, e3

Rows leave sorted by place and are sent as they lie. They arrive sorted by sender and are regrouped, so that
each expert computes on all its rows at once; with one expert on the rank they are right as they are.

All waits hear the alarm of a rank that fails meanwhile (:class:`hpcpar.comm.Alarm`), also of one whose
backward ends in an exception, of which a layer is not told: a callback of autograd that dies unheard tells.
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from hpcpar.comm import Alarm
from hpcpar.errors import CommunicatorFreedError, HpcparError
from hpcpar.nn.experts.routing import RowPlan

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from hpcpar.comm import Communicator

__all__ = ["Exchange"]

_IMPATIENT_S = 2.0


class Exchange:
    """A communicator of a layer's own, with an alarm. Collective to make and to free.

    Parameters
    ----------
    comm
        The ranks; a duplicate is used.
    """

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm.Dup()
        self._alarm = Alarm([self.comm])
        self._users = 1

    @property
    def has_failed(self) -> bool:
        """Whether some rank has, as far as is known here. Local."""
        return not self._alarm.is_quiet

    def check_usable(self, *, is_freed: bool) -> None:
        """Raise when it was freed, or when a failure has left it in pieces. Local."""
        if is_freed or self.comm.is_freed:
            raise CommunicatorFreedError("a mixture of experts must not be used after free()")
        if self._alarm.error is None and not self._alarm.is_quiet:
            raise HpcparError(
                "a mixture of experts must not be used after a failure, got one whose other ranks have been "
                "told to give up. Make a new one, or restart from a checkpoint"
            )

    def armed(self) -> AbstractContextManager[None]:
        """Hear of failures in the waits inside the block. Local."""
        return self._alarm.armed() if self.comm.size > 1 else nullcontext()

    @contextmanager
    def sounding(self) -> Iterator[None]:
        """Tell the other ranks of an exception that leaves the block. Local."""
        try:
            yield
        except Exception:
            if self.comm.size > 1:
                self._alarm.sound(traceback.format_exc())
            raise

    def watch_backward(self) -> None:
        """Tell the other ranks if the backward that runs now fails. Local."""
        if self.comm.size > 1:
            engine: Any = torch.autograd.Variable._execution_engine
            engine.queue_callback(_Witness(self._alarm))

    def to_experts(self, rows: torch.Tensor, plan: RowPlan) -> list[torch.Tensor]:
        """Send rows to their experts. Collective.

        Parameters
        ----------
        rows
            Shape (rows, features), in the order of ``plan``.
        plan
            Of this rank.

        Returns
        -------
        list of torch.Tensor
            For each expert of this rank its rows from all ranks, shape (rows, features).
        """
        received = [sum(counts) for counts in plan.received]
        if self.comm.size > 1:
            arrived = rows.new_empty(sum(received), rows.shape[1])
            self._alltoallv(rows, plan.sent, arrived, received)
        else:
            arrived = rows
        if len(plan.received[0]) == 1:
            return [arrived]
        pieces = torch.split(arrived, [count for counts in plan.received for count in counts])
        columns = len(plan.received[0])
        return [_joined(pieces[column::columns]) for column in range(columns)]

    def from_experts(self, outputs: Sequence[torch.Tensor], plan: RowPlan, extra: int = 0) -> torch.Tensor:
        """Send rows of experts back to where they came from. Collective.

        Parameters
        ----------
        outputs
            For each expert of this rank, shape (rows, features).
        plan
            Of this rank.
        extra
            Rows of zeros to append.

        Returns
        -------
        torch.Tensor
            Shape (rows + extra, features), in the order of ``plan``.
        """
        columns = [
            torch.split(output, [counts[column] for counts in plan.received])
            for column, output in enumerate(outputs)
        ]
        result = outputs[0].new_empty(len(plan.slots) + extra, outputs[0].shape[1])
        result[len(plan.slots) :] = 0
        rows = result[: len(plan.slots)]
        pieces = [piece for sender in zip(*columns, strict=True) for piece in sender]
        if self.comm.size == 1:
            torch.cat(pieces, out=rows)
            return result
        leaving = outputs[0].contiguous() if len(outputs) == 1 else torch.cat(list(pieces))
        self._alltoallv(leaving, [sum(counts) for counts in plan.received], rows, plan.sent)
        return result

    def free(self) -> None:
        """Give the communicator back, unless a copy uses it or a failure left messages in it. Collective."""
        self._users -= 1
        if self._users > 0 or self.comm.is_freed or self.has_failed:
            return
        self._alarm.free()
        self.comm.Free()

    def __deepcopy__(self, memo: object) -> Exchange:
        self._users += 1
        return self  # a copy of a layer works over the same ranks, at its turn

    def __reduce__(self) -> str:
        raise TypeError(
            "a mixture of experts must not be pickled, for it is a part of a job of several processes. Save "
            "full_state_dict(), and load that into a new one"
        )

    def _alltoallv(
        self, send: torch.Tensor, sent: Sequence[int], receive: torch.Tensor, received: Sequence[int]
    ) -> None:
        width = send.shape[1]
        with self.armed():
            # Wait for the last rank patiently. Then all data is there, and moves only as fast as MPI is
            # called: in a wait that sleeps between its looks it would take many times as long (MPICH).
            barrier = self.comm.Ibarrier()
            barrier.operation = "exchange of rows in forward or backward of a mixture of experts"
            barrier.wait()
            request = self.comm.Ialltoallv(
                [send, *_layout(sent, width)],
                [receive, *_layout(received, width)],
            )
            patient_at = time.monotonic() + _IMPATIENT_S
            while not request.test() and time.monotonic() < patient_at:
                os.sched_yield()
            request.wait()


class _Witness:
    """A callback for the end of a backward that sounds the alarm if it dies without having been called."""

    def __init__(self, alarm: Alarm) -> None:
        self._alarm: Alarm | None = alarm

    def __call__(self) -> None:
        self._alarm = None

    def __del__(self) -> None:
        if self._alarm is not None:
            self._alarm.sound("an exception has ended the backward of a mixture of experts")


def _layout(rows: Sequence[int], width: int) -> tuple[list[int], list[int]]:
    """Counts and displacements in elements."""
    counts = [count * width for count in rows]
    return counts, list(accumulate((0, *counts[:-1])))


def _joined(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor with memory of its own, since an expert may work in place."""
    return pieces[0].clone() if len(pieces) == 1 else torch.cat(list(pieces))
