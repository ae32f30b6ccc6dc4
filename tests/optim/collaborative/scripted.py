"""Collaborative training by a script, and the same in one process.

A *script* says what each rank does between two global steps: a list of rounds, each with the batch sizes of
every rank. The target is chosen so that a round is due exactly when all have done their part: the ranks meet
in a barrier before the last batch of a round is counted. Data are drawn from the place in the script, so the
reference can draw them too.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.optim import CollaborativeOptimizer
from tests.nn.training import FEATURES, assert_close, assert_replicas_equal, mlp

Script = Sequence[Sequence[Sequence[int]]]
"""Batch sizes: ``script[round][rank]`` is a list of them."""

MakeOptimizer = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]


def adam(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, lr=0.05)


def momentum(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def data(number: int, rank: int, place: int, size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number * 10_007 + rank * 101 + place)
    draw = torch.randn(size, FEATURES + 3, generator=generator, dtype=torch.float64)
    return draw[:, :FEATURES], draw[:, FEATURES:]


def mean_loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    dtype = next(net.parameters()).dtype
    return nn.functional.mse_loss(net(x.to(dtype)), y.to(dtype))


def all_samples(script: Script, number: int) -> Iterator[tuple[Tensor, Tensor]]:
    for rank, sizes in enumerate(script[number]):
        for place, size in enumerate(sizes):
            yield data(number, rank, place, size)


def reference(net: nn.Module, script: Script, make: MakeOptimizer, make_scheduler: Any = None) -> nn.Module:
    """One process, one batch of all samples per global step."""
    net = copy.deepcopy(net)
    optimizer = make(net.parameters())
    scheduler = make_scheduler(optimizer) if make_scheduler else None
    for number in range(len(script)):
        batches = list(all_samples(script, number))
        optimizer.zero_grad()
        x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
        mean_loss(net, x, y).backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
    return net


def target_of(script: Script) -> int:
    """The same in every round, which is what one target needs."""
    totals = {sum(sum(sizes) for sizes in of_ranks) for of_ranks in script}
    assert len(totals) == 1, totals
    return totals.pop()


def play(
    comm: Communicator,
    net: nn.Module,
    opt: CollaborativeOptimizer,
    script: Script,
    *,
    zero: bool = True,
    each: Callable[[nn.Module], None] = lambda net: None,
) -> None:
    """Do this rank's part; ranks that have none left in a round assist until it is over."""
    for number, of_ranks in enumerate(script):
        for place, size in enumerate(of_ranks[comm.rank]):
            if zero:
                opt.zero_grad()
            mean_loss(net, *data(number, comm.rank, place, size)).backward()
            each(net)
            opt.step(size)
        while opt.local_step == number:
            opt.step_aux()


def check_parity(
    comm: Communicator,
    script: Script,
    make: MakeOptimizer = adam,
    *,
    make_scheduler: Any = None,
    zero: bool = True,
    **options: Any,
) -> None:
    net = mlp(seed=comm.rank)  # rank 0's is broadcast
    expected = reference(mlp(seed=0), script, make, make_scheduler)
    inner = make(net.parameters())
    scheduler = make_scheduler(inner) if make_scheduler else None
    options = {"target_batch_size": target_of(script), "scheduler": scheduler, **options}
    with CollaborativeOptimizer(inner, comm, **options) as opt:
        play(comm, net, opt, script, zero=zero)
        assert opt.local_step == len(script)
    assert_close(net, expected)
    assert_replicas_equal(comm, net.parameters())
