"""Batching: tasks of a pool, how they are cut and joined, and how answers find their way back.

A task is what one call asks for, or a part of it when it is larger than a batch. All parts share one answer,
which is complete when each has delivered its rows::

    call of 10 rows, batches of 4   ->   parts of 4, 4 and 2 rows   ->   one answer of 10 rows

Cuts depend on the call alone, and part ``p`` of a seeded call has the seed ``mix(seed, p)``: the same call,
forward or backward, is cut and seeded in the same way whatever else is queued.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.randomness import mix

__all__ = ["Answer", "Batch", "Key", "Request", "Task", "cut"]

Key = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Request:
    """What the function of a pool is told about one task of a batch.

    Attributes
    ----------
    rows : int
        Its number of rows.
    seed : int or None
        Of its random numbers; ``None`` to draw them from the process's generator.
    training : bool
        Whether it is for training.
    """

    rows: int
    seed: int | None = None
    training: bool = True


class Answer:
    """The answer to one call, put together from its parts. Local."""

    def __init__(self, parts: int) -> None:
        self.future: Future[Any] = Future()
        self._results: list[Any] = [None] * parts
        self._missing = parts
        self._begun = False
        self._lock = threading.Lock()

    def begin(self) -> bool:
        """Whether the answer is still wanted; from now on it cannot be cancelled. Local."""
        with self._lock:
            if not self._begun:
                self._begun = True
                self.future.set_running_or_notify_cancel()
            return not self.future.done()

    def deliver(self, part: int, result: Any) -> None:
        """Take the result of a part. Local."""
        with self._lock:
            self._results[part] = result
            self._missing -= 1
            complete = self._missing == 0 and not self.future.done()
        if complete:  # outside of the lock: callbacks of the future run in here
            self.future.set_result(_joined(self._results))

    def fail(self, error: BaseException) -> None:
        """Fail as a whole, unless another part already has. Local."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


@dataclass(slots=True)
class Task:
    """A call of a pool, or a part of one."""

    tensors: list[torch.Tensor]
    request: Request
    key: Key
    answer: Answer
    part: int
    arrived: float = field(default=0.0)


def cut(tensors: list[torch.Tensor], seed: int | None, training: bool, max_batch_size: int) -> list[Task]:
    """Tasks of at most ``max_batch_size`` rows that share one answer. Local."""
    rows = tensors[0].shape[0]
    key = (training, *((tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors))
    if rows <= max_batch_size:
        return [Task(tensors, Request(rows, seed, training), key, Answer(1), 0)]
    starts = range(0, rows, max_batch_size)
    answer = Answer(len(starts))
    return [
        Task(
            [tensor[start : start + max_batch_size] for tensor in tensors],
            Request(min(max_batch_size, rows - start), None if seed is None else mix(seed, part), training),
            key,
            answer,
            part,
        )
        for part, start in enumerate(starts)
    ]


class Batch:
    """Tasks that are run together. Local."""

    def __init__(self, tasks: list[Task]) -> None:
        self.tasks = tasks
        self.rows = sum(task.request.rows for task in tasks)

    def run(self, call: Callable[[Sequence[torch.Tensor], tuple[Request, ...]], Any]) -> int:
        """Run the tasks, together or else one by one, and answer them; the number of those that failed.

        Raises
        ------
        BaseException
            What ``call`` raises and is no Exception, such as KeyboardInterrupt; the tasks get it as well.
        """
        try:
            results = self._results(call)
        except Exception as error:
            if len(self.tasks) > 1:
                return sum(Batch([task]).run(call) for task in self.tasks)
            self.tasks[0].answer.fail(error)
            self.tasks[0].tensors = []  # the error has a traceback, which has this batch
            return 1
        except BaseException as error:
            for task in self.tasks:
                task.answer.fail(error)
            raise
        for task, result in zip(self.tasks, results, strict=True):
            task.answer.deliver(task.part, result)
        return 0

    def _results(self, call: Callable[..., Any]) -> list[Any]:
        """The function's result, cut into those of the tasks."""
        first = self.tasks[0]
        if len(self.tasks) == 1:
            tensors = first.tensors  # nothing to copy
        else:
            columns = zip(*(task.tensors for task in self.tasks), strict=True)
            tensors = [torch.cat(column) for column in columns]
        result = call(tensors, tuple(task.request for task in self.tasks))
        several = isinstance(result, (tuple, list))
        for tensor in result if several else (result,):
            self._check_result(tensor, nullable=several)
        if len(self.tasks) == 1:
            return [result]
        stops = [0]
        for task in self.tasks:
            stops.append(stops[-1] + task.request.rows)
        return [_rows_of(result, start, stop) for start, stop in pairwise(stops)]

    def _check_result(self, tensor: Any, *, nullable: bool) -> None:
        if tensor is None and nullable:
            return
        if not isinstance(tensor, torch.Tensor) or tensor.ndim == 0 or tensor.shape[0] != self.rows:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise MismatchError(
                f"a pool's function must return a tensor, or a tuple of them, of {self.rows} rows, got {got}"
            )


def _rows_of(result: Any, start: int, stop: int) -> Any:
    return _each(lambda column: column[0][start:stop], [result])


def _joined(results: list[Any]) -> Any:
    return results[0] if len(results) == 1 else _each(torch.cat, results)


def _each(function: Callable[[tuple[torch.Tensor, ...]], torch.Tensor], results: Sequence[Any]) -> Any:
    """Apply a function to corresponding tensors of results; ``None`` stays."""
    if isinstance(results[0], torch.Tensor):
        return function(tuple(results))
    columns = zip(*results, strict=True)
    values = [None if column[0] is None else function(column) for column in columns]
    return values if isinstance(results[0], list) else tuple(values)
