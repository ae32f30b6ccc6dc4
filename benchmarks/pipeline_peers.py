"""The ways to train one model over two ranks: hpcpar's schedules, torch's, the least there is, and none.

All variants do the same: drop the gradients, and leave those of the whole batch in ``.grad``. Each has its
own copy of the model, from the same seed, of which it uses this rank's layers::

                          gradients of     messages by       knows in advance
    hpcpar                local stages     MPI               nothing; shapes are learnt in the first step
    torch                 local stages     gloo              nothing, likewise
    mpi4py                local stages     MPI, bare         all shapes, the schedule, that messages are one
                                                             contiguous float32 tensor, that nothing fails
    unsplit               all, on rank 0   none

What hpcpar takes more than *mpi4py* is its price; what *mpi4py* takes more than the ideal is the price of
messages on this machine. torch divides the loss by the number of microbatches here and does not scale the
gradients afterwards, which costs it less; its targets are cut by itself.

Where two stages share a parameter, each has a copy, and the step ends with the sum of the gradients.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
import torch.distributed
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B

from common import largest_over_ranks
from hpcpar.comm import MPI, Communicator
from hpcpar.nn import Pipeline
from pipeline_workloads import PipelineWorkload

__all__ = [
    "FLOOR",
    "INTERLEAVED",
    "ONE_F_ONE_B",
    "SCHEDULES",
    "TORCH",
    "UNSPLIT",
    "UNSPLIT_PARTS",
    "ZERO_BUBBLE",
    "Variant",
    "check",
    "make_variants",
]

ONE_F_ONE_B, INTERLEAVED, ZERO_BUBBLE = "hpcpar 1f1b", "hpcpar interleaved", "hpcpar zero_bubble"
TORCH, FLOOR = "torch 1f1b over gloo", "bare mpi4py 1f1b"
UNSPLIT, UNSPLIT_PARTS = "unsplit", "unsplit in microbatches"
SCHEDULES = {ONE_F_ONE_B: ("1f1b", 1), INTERLEAVED: ("interleaved", 2), ZERO_BUBBLE: ("zero_bubble", 1)}
TOLERANCE = 1e-3


class Variant(Protocol):
    """A way to train."""

    module: nn.Module
    """The parameters of this rank, named as in the whole model."""

    def step(self) -> float | None:
        """Compute the gradients; returns the loss on the rank that knows it. **Collective.**"""

    def free(self) -> None:
        """Give communicators back. **Collective.**"""


def make_variants(comm: Communicator, work: PipelineWorkload) -> dict[str, Variant]:
    """All of them, in the order of the table. gloo must be up. **Collective.**"""
    variants: dict[str, Variant] = {name: _Hpcpar(comm, work, *how) for name, how in SCHEDULES.items()}
    variants[TORCH] = _Torch(comm, work)
    variants[FLOOR] = _Bare(comm, work)
    variants[UNSPLIT] = _Unsplit(comm, work, 1)
    variants[UNSPLIT_PARTS] = _Unsplit(comm, work, work.microbatches)
    return variants


def check(comm: Communicator, work: PipelineWorkload, variants: dict[str, Variant]) -> dict[str, float]:
    """Run one step of each, and compare loss and gradients with a plain computation. **Collective.**

    Returns the largest difference of a gradient, in units of the largest element of that gradient.

    Raises RuntimeError on all ranks when a variant is wrong.
    """
    reference = work.build()
    inputs, targets = work.batch()
    loss = work.loss(reference(inputs), targets)
    loss.backward()
    wanted = {name: p.grad for name, p in reference.named_parameters(remove_duplicate=False)}
    differences = {}
    for name, variant in variants.items():
        found = variant.step()
        worst = 0.0 if found is None else abs(found / float(loss.detach()) - 1)
        for key, parameter in variant.module.named_parameters():
            expected, got = wanted[key], parameter.grad
            if expected is None or got is None:
                worst = float("inf")
            else:
                worst = max(worst, float((got - expected).abs().max() / expected.abs().max()))
        (differences[name],) = largest_over_ranks(comm, [worst])
        if not differences[name] <= TOLERANCE:
            raise RuntimeError(
                f"{name}, {work.label}: loss and gradients must be those of the unsplit model within "
                f"{TOLERANCE:g}, got a difference of {differences[name]:g}"
            )
    return differences


class _Hpcpar:
    """The library as it comes."""

    def __init__(self, comm: Communicator, work: PipelineWorkload, schedule: str, chunks: int) -> None:
        self.pipe = Pipeline(
            work.build(),
            comm,
            microbatches=work.microbatches,
            schedule=schedule,
            chunks=chunks,
            balance=work.balance(comm.size * chunks),
            loss_fn=work.loss,
            reuse="replicate",
        )
        self.module = self.pipe.layers
        self._inputs, self._targets = work.batch()

    def step(self) -> float:
        self.pipe.zero_grad(set_to_none=True)
        return float(self.pipe.train_step(self._inputs, self._targets))

    def free(self) -> None:
        self.pipe.free()


class _Torch:
    """``torch.distributed.pipelining`` over gloo."""

    def __init__(self, comm: Communicator, work: PipelineWorkload) -> None:
        self._is_first, self._is_last = comm.rank == 0, comm.rank == comm.size - 1
        self.module = work.stage(work.build(), comm.rank, comm.size)
        stage = PipelineStage(self.module, comm.rank, comm.size, torch.device("cpu"))
        self._schedule = Schedule1F1B(
            stage,
            work.microbatches,
            loss_fn=lambda output, targets: work.loss(output, targets) / work.microbatches,
            scale_grads=False,
        )
        self._inputs, self._targets = work.batch()
        self._group = None
        if work.is_tied and comm.size > 1:
            self._group = torch.distributed.new_group([0, comm.size - 1])

    def step(self) -> float | None:
        self.module.zero_grad(set_to_none=True)
        losses: list[torch.Tensor] = []
        arguments = [self._inputs] if self._is_first else []
        targets = self._targets if self._is_last else None
        self._schedule.step(*arguments, target=targets, losses=losses, return_outputs=False)
        if self._group is not None and (self._is_first or self._is_last):
            torch.distributed.all_reduce(_shared_gradient(self.module), group=self._group)
        return float(torch.stack(losses).detach().sum()) if self._is_last else None

    def free(self) -> None:
        """Its groups go with the process group."""


class _Bare:
    """1F1B by hand: as many forwards as stages follow, then one forward and one backward in turn.

    All receives are posted before the first action, into buffers that are there already, and the sends are
    completed after the last one. A probe after each action lets MPI move large messages on.
    """

    def __init__(self, comm: Communicator, work: PipelineWorkload) -> None:
        self._comm = comm.Dup()
        self._mpi, self._rank = self._comm.mpi, comm.rank
        self._is_first, self._is_last = comm.rank == 0, comm.rank == comm.size - 1
        self._count = work.microbatches
        self._warm_up = min(comm.size - comm.rank - 1, self._count)
        self._loss = work.loss
        model = work.build()
        self.module = work.stage(model, comm.rank, comm.size)
        inputs, targets = work.batch()
        self._inputs, self._targets = inputs.chunk(self._count), targets.chunk(self._count)
        ends = [sum(work.balance(comm.size)[: rank + 1]) for rank in range(comm.rank - 1, comm.rank + 1)]
        with torch.no_grad():
            shapes = [model[:end](self._inputs[0]).shape if end else torch.Size() for end in ends]
        self._arrived = [torch.empty(shapes[0]) for _ in range(self._count)]
        self._gradients = [torch.empty(shapes[1]) for _ in range(self._count)]
        is_end = work.is_tied and comm.size > 1 and (self._is_first or self._is_last)
        self._ends = self._comm.Split(0 if is_end else MPI.UNDEFINED, comm.rank)

    def step(self) -> float | None:
        self.module.zero_grad(set_to_none=True)
        self._losses: list[torch.Tensor] = []
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._sent: list[tuple[MPI.Request, torch.Tensor]] = []
        indices = range(self._count)
        self._forward_receives = [] if self._is_first else [self._receive(i, forward=True) for i in indices]
        self._backward_receives = [] if self._is_last else [self._receive(i, forward=False) for i in indices]
        for i in range(self._warm_up):
            self._forward(i)
        for i in range(self._count - self._warm_up):
            self._forward(self._warm_up + i)
            self._backward(i)
        for i in range(self._count - self._warm_up, self._count):
            self._backward(i)
        MPI.Request.Waitall([request for request, _ in self._sent])
        if self._ends is not None:
            self._ends.mpi.Allreduce(MPI.IN_PLACE, _shared_gradient(self.module).numpy())
        return float(torch.stack(self._losses).sum()) if self._is_last else None

    def free(self) -> None:
        if self._ends is not None:
            self._ends.Free()
        self._comm.Free()

    def _forward(self, index: int) -> None:
        if self._is_first:
            x = self._inputs[index]
        else:
            self._forward_receives[index].Wait()
            x = self._arrived[index].detach().requires_grad_()
        y = self.module(x)
        if self._is_last:
            y = self._loss(y, self._targets[index]) / self._count
            self._losses.append(y.detach())
        else:
            self._send(y.detach(), self._rank + 1, index)
        self._kept[index] = x, y

    def _backward(self, index: int) -> None:
        x, y = self._kept.pop(index)
        if self._is_last:
            y.backward()
        else:
            self._backward_receives[index].Wait()
            y.backward(self._gradients[index])
        if not self._is_first:
            assert x.grad is not None
            self._send(x.grad, self._rank - 1, self._count + index)
        self._mpi.Iprobe()

    def _send(self, tensor: torch.Tensor, dest: int, tag: int) -> None:
        tensor = tensor.contiguous()
        self._sent.append((self._mpi.Isend(tensor.numpy(), dest, tag), tensor))
        self._mpi.Iprobe()

    def _receive(self, index: int, *, forward: bool) -> MPI.Request:
        if forward:
            return self._mpi.Irecv(self._arrived[index].numpy(), self._rank - 1, index)
        return self._mpi.Irecv(self._gradients[index].numpy(), self._rank + 1, self._count + index)


class _Unsplit:
    """Rank 0 trains the whole model alone; the other ranks sleep until it is done."""

    def __init__(self, comm: Communicator, work: PipelineWorkload, parts: int) -> None:
        self._comm = comm.Dup()
        self._mpi = self._comm.mpi
        self.module = work.build() if comm.rank == 0 else nn.Sequential()
        self._loss, self._parts = work.loss, parts
        inputs, targets = work.batch()
        self._batches = list(zip(inputs.chunk(parts), targets.chunk(parts), strict=True))
        self._word = torch.zeros(1).numpy()

    def step(self) -> float | None:
        if self._mpi.rank > 0:
            waiting = self._mpi.Irecv(self._word, 0, 0)
            while not waiting.Test():
                time.sleep(1e-4)  # not Wait, which would keep a core busy that rank 0 may share
            return None
        self.module.zero_grad(set_to_none=True)
        total = 0.0
        for inputs, targets in self._batches:
            loss = self._loss(self.module(inputs), targets) / self._parts
            loss.backward()
            total += loss.detach()
        for rank in range(1, self._mpi.size):
            self._mpi.Send(self._word, rank, 0)
        return float(total)

    def free(self) -> None:
        self._comm.Free()


def _shared_gradient(module: nn.Module) -> torch.Tensor:
    """The gradient of the parameter that first and last stage share. **Local.**"""
    gradient = next(p for name, p in module.named_parameters() if name.endswith("shared")).grad
    if gradient is None:
        raise RuntimeError("the shared parameter must have a gradient, got None")
    return gradient
