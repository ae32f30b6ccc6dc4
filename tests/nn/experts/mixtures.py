"""A dense mixture of experts in one process, and the parts to make both from.

The reference computes every expert on all tokens of all ranks and masks; each rank computes all of it, and
compares its own part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hpcpar.comm import MPI, Communicator
from hpcpar.nn.experts.gate import TopKGate
from hpcpar.nn.experts.layer import MixtureOfExperts

FEATURES = 6


def expert(seed: int = 0, out: int = FEATURES, dtype: torch.dtype = torch.float64) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1000 + seed)
        return nn.Sequential(nn.Linear(FEATURES, 7), nn.Tanh(), nn.Linear(7, out)).to(dtype)


def gate(num_experts: int, dtype: torch.dtype = torch.float64, **options: Any) -> TopKGate:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(77)
        made = TopKGate(FEATURES, num_experts, **options)
        nn.init.normal_(made.weight)
        return made.to(dtype)


@dataclass
class Dense:
    """The same layer in one process, over the tokens of all ranks."""

    gate: TopKGate
    experts: Sequence[nn.Module]
    capacity_factor: float | None = None
    shared: nn.Module | None = None
    load: Tensor = field(default_factory=lambda: torch.empty(0))
    balancing_loss: Tensor = field(default_factory=lambda: torch.zeros(()))
    z_loss: Tensor = field(default_factory=lambda: torch.zeros(()))

    def parameters(self) -> list[nn.Parameter]:
        modules = [self.gate, *self.experts, *([] if self.shared is None else [self.shared])]
        return [parameter for module in modules for parameter in module.parameters()]

    def __call__(self, x: Tensor) -> Tensor:
        count, top_k = len(self.experts), min(self.gate.top_k, len(self.experts))
        logits = x @ self.gate.weight.T
        probabilities = logits.softmax(-1)
        chosen = (probabilities + self.gate.expert_bias).topk(top_k).indices
        weights = probabilities.gather(1, chosen)
        if self.gate.normalize or (self.gate.normalize is None and top_k > 1):
            weights = weights / weights.sum(-1, keepdim=True)
        kept = self._kept(chosen)
        output = sum(
            ((weights * kept * (chosen == e)).sum(-1, keepdim=True) * module(x))
            for e, module in enumerate(self.experts)
        )
        fractions = torch.stack([(chosen == e).double().sum() for e in range(count)]) / max(chosen.numel(), 1)
        mean = probabilities.sum(0) / max(len(x), 1)
        self.balancing_loss = self.gate.balancing_coefficient * count * (fractions * mean).sum()
        self.z_loss = self.gate.z_coefficient * logits.logsumexp(-1).square().sum() / max(len(x), 1)
        self.load = torch.tensor([int((kept * (chosen == e)).sum()) for e in range(count)])
        demand = torch.tensor([int((chosen == e).sum()) for e in range(count)])
        if self.gate.bias_update_rate:
            below = torch.sign(demand.sum() - count * demand)
            self.gate.expert_bias.add_(below.to(self.gate.expert_bias), alpha=self.gate.bias_update_rate)
        assert isinstance(output, Tensor)
        return output if self.shared is None else output + self.shared(x)

    def _kept(self, chosen: Tensor) -> Tensor:
        if self.capacity_factor is None:
            return torch.ones_like(chosen)
        capacity = math.ceil(self.capacity_factor * chosen.numel() / len(self.experts))
        kept, used = torch.zeros_like(chosen), [0] * len(self.experts)
        for choice in range(chosen.shape[1]):
            for token in range(len(chosen)):
                e = int(chosen[token, choice])
                kept[token, choice] = used[e] < capacity
                used[e] += 1
        return kept


def rows_of(comm: Communicator, counts: Sequence[int], seed: int = 3) -> tuple[Tensor, slice]:
    """Tokens of all ranks, and which are this rank's; ``counts`` repeats for more ranks."""
    sizes = [counts[rank % len(counts)] for rank in range(comm.size)]
    start = sum(sizes[: comm.rank])
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), FEATURES, generator=generator, dtype=torch.float64)
    return x, slice(start, start + sizes[comm.rank])


def pair(comm: Communicator, num_experts: int, **options: Any) -> tuple[MixtureOfExperts, Dense]:
    """The layer, and its reference."""
    capacity, has_shared = options.pop("capacity_factor", None), options.pop("shared", False)
    out = options.pop("out", FEATURES)
    shared = expert(99, out) if has_shared else None
    layer = MixtureOfExperts(
        gate(num_experts, **options),
        [lambda e=e: expert(e, out) for e in range(num_experts)],
        comm,
        capacity_factor=capacity,
        shared_expert=shared,
    )
    dense = Dense(
        gate(num_experts, **options),
        [expert(e, out) for e in range(num_experts)],
        capacity,
        expert(99, out) if has_shared else None,
    )
    return layer, dense


def summed(comm: Communicator, tensor: Tensor | None) -> Tensor:
    assert tensor is not None
    total = tensor.detach().clone()
    comm.Allreduce(MPI.IN_PLACE, total)
    return total


def assert_same(got: Tensor | None, expected: Tensor | None, what: object = "") -> None:
    assert got is not None and expected is not None, what
    torch.testing.assert_close(
        got.detach(), expected.detach(), rtol=1e-10, atol=1e-12, msg=lambda text: f"{what}: {text}"
    )


def assert_expert_gradients(layer: MixtureOfExperts, dense: Dense, what: object = "") -> None:
    for number, module in layer.experts.items():
        for mine, other in zip(module.parameters(), dense.experts[int(number)].parameters(), strict=True):
            expected = torch.zeros_like(other) if other.grad is None else other.grad
            assert_same(mine.grad, expected, f"expert {number} {what}")
