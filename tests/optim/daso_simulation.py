"""DASO in one process: a copy of the model for each node, and everything that crosses the network by hand.

The schedule of skips is the library's (tests/optim/test_daso_schedule.py); steps, merging and the averages
between the phases are written here once more, in the plainest way.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hpcpar.optim.daso.schedule import Phase, SkipSchedule
from tests.nn.training import FEATURES, Batch, MakeOptimizer, loss_of

__all__ = ["Simulation", "batch_norm_net"]


def batch_norm_net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Linear(FEATURES, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 7), nn.Tanh(), nn.Linear(7, 3)
    ).to(dtype)


class Simulation:
    """The models of all nodes.

    Parameters
    ----------
    nodes
        The node of each rank.
    """

    def __init__(
        self, net: nn.Module, make: MakeOptimizer, nodes: Sequence[int], schedule: SkipSchedule
    ) -> None:
        self.sizes = [nodes.count(node) for node in range(max(nodes) + 1)]
        self.ranks = [[r for r, other in enumerate(nodes) if other == n] for n in range(max(nodes) + 1)]
        self.nets = [copy.deepcopy(net) for _ in self.sizes]
        self.optimizers = [make(one.parameters()) for one in self.nets]
        self.schedule = schedule

    @property
    def cycles(self) -> bool:
        return self.schedule.phase is Phase.CYCLING and len(self.nets) > 1

    def train_epoch(self, batches: Sequence[Batch], loss: float) -> None:
        mean: list[Tensor] | None = None
        age = 0
        for index, (x, y) in enumerate(batches):
            is_last = index == len(batches) - 1
            self._step(x, y)
            if not self.cycles:
                continue
            age += 1
            if mean is not None and (is_last or age == self.schedule.batches_to_wait):
                self._merge(mean, age)
                mean = None
            if (index + 1) % self.schedule.global_skip == 0:
                assert mean is None
                mean, age = self._mean(), 0
                if is_last:
                    self._merge(mean, 0)
        self._end_epoch(loss)

    def _step(self, x: Tensor, y: Tensor) -> None:
        """Gradients of each rank's part with its node's model; means; the nodes' optimizers."""
        gradients = []
        for net, ranks in zip(self.nets, self.ranks, strict=True):
            gradients.append(self._gradients_of(net, ranks, x, y))
        if not self.cycles:
            total = sum(self.sizes)
            pairs = zip(*gradients, strict=True)
            means = [sum(g * s for g, s in zip(p, self.sizes, strict=True)) / total for p in pairs]
            gradients = [means] * len(self.nets)
            for net in self.nets[1:]:
                net.load_state_dict({**net.state_dict(), **dict(self.nets[0].named_buffers())})
        for net, optimizer, values in zip(self.nets, self.optimizers, gradients, strict=True):
            for parameter, value in zip(net.parameters(), values, strict=True):
                parameter.grad = value.clone()
            optimizer.step()

    def _gradients_of(self, net: nn.Module, ranks: Sequence[int], x: Tensor, y: Tensor) -> list[Tensor]:
        """The mean of the ranks' gradients; buffers are those of the first rank."""
        size = sum(self.sizes)
        sums = [torch.zeros_like(parameter) for parameter in net.parameters()]
        after: dict[str, Tensor] = {}
        for rank in ranks:
            twin = copy.deepcopy(net)
            twin.zero_grad()
            loss_of(twin, x.chunk(size)[rank], y.chunk(size)[rank]).backward()
            for total, parameter in zip(sums, twin.parameters(), strict=True):
                total += parameter.grad
            after = after or dict(twin.named_buffers())
        net.load_state_dict({**net.state_dict(), **after})
        return [total / len(ranks) for total in sums]

    def _weighted(self, tensors: Sequence[Tensor]) -> Tensor:
        total: Any = sum(t.detach() * size for t, size in zip(tensors, self.sizes, strict=True))
        return total / sum(self.sizes)

    def _floats(self) -> list[list[Tensor]]:
        return [
            [t for t in (*net.parameters(), *net.buffers()) if t.is_floating_point()] for net in self.nets
        ]

    def _mean(self) -> list[Tensor]:
        return [self._weighted(tensors) for tensors in zip(*self._floats(), strict=True)]

    def _merge(self, mean: list[Tensor], waited: int) -> None:
        nodes = len(self.nets)
        with torch.no_grad():
            for tensors in self._floats():
                for tensor, average in zip(tensors, mean, strict=True):
                    tensor.copy_((2 * waited * tensor + nodes * average) / (2 * waited + nodes))

    def _end_epoch(self, loss: float) -> None:
        cycled = self.cycles
        self.schedule.end_epoch(loss)
        if not cycled or self.cycles:
            return
        self._merge(self._mean(), 0)
        parameters = zip(*(net.parameters() for net in self.nets), strict=True)
        for same in parameters:
            states = [o.state[p] for o, p in zip(self.optimizers, same, strict=True)]
            for key, value in states[0].items():
                if value.dim():
                    average = self._weighted([state[key] for state in states])
                    for state in states:
                        state[key].copy_(average)
