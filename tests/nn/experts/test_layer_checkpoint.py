"""Activation checkpointing computes forwards again, and must send tokens where they went the first time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError
from hpcpar.nn.experts.gate import TopKGate
from hpcpar.nn.experts.layer import MixtureOfExperts
from hpcpar.nn.experts.replay import replaying, to_be_replayed
from tests.nn.experts.mixtures import expert, gate, rows_of

Run = Callable[..., Tensor]

PLAIN: Run = lambda layer, x: layer(x)  # noqa: E731
NON_REENTRANT: Run = partial(checkpoint, use_reentrant=False)
REENTRANT: Run = partial(checkpoint, use_reentrant=True)


def make(comm: Communicator, num_experts: int = 4, **options: Any) -> MixtureOfExperts:
    router = gate(num_experts, bias_update_rate=0.3, jitter=0.3)
    torch.manual_seed(comm.rank)
    layer = MixtureOfExperts(router, [lambda e=e: expert(e) for e in range(num_experts)], comm, **options)
    torch.manual_seed(comm.rank)
    return layer


def router_of(layer: MixtureOfExperts) -> TopKGate:
    assert isinstance(layer.gate, TopKGate)
    return layer.gate


def results(layer: MixtureOfExperts, inputs: list[Tensor]) -> list[Tensor | None]:
    gradients = [p.grad for p in layer.parameters()] + [x.grad for x in inputs]
    return [*gradients, *layer.gate.buffers(), layer.load]


def train(
    comm: Communicator, layer: MixtureOfExperts, run: Run, order: list[int], *, losses: bool
) -> list[Tensor | None]:
    """Several forwards, then their backwards in the given order; everything that may come of it."""
    inputs, totals = [], []
    for number in range(len(order)):
        x, mine = rows_of(comm, [4, 0, 3], seed=number % 2)  # forwards 0 and 2 have the same tokens
        inputs.append(x[mine].clone().requires_grad_())
        total = run(layer, inputs[-1]).sin().sum()
        router = router_of(layer)
        totals.append(total + router.balancing_loss + router.z_loss if losses else total)
    for number in order:
        totals[number].backward()
    return results(layer, inputs)


def assert_bitwise(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for index, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert (one is None) == (other is None), index
        assert one is None or other is None or torch.equal(one, other), (index, one, other)


@pytest.mark.parametrize("order", [[0], [0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
@pytest.mark.parametrize("kind", ["non-reentrant", "reentrant"])
def test_checkpointing_changes_no_bit(comm: Communicator, kind: str, order: list[int]) -> None:
    run = NON_REENTRANT if kind == "non-reentrant" else REENTRANT
    for num_experts, capacity in ((4, None), (4, 0.8), (2, None)):  # two experts: replicas
        # A reentrant checkpoint has no graph for what leaves it by another way than as an output.
        losses = kind == "non-reentrant"
        options = {"num_experts": num_experts, "capacity_factor": capacity}
        with make(comm, **options) as layer, make(comm, **options) as other:
            torch.manual_seed(comm.rank)
            expected = train(comm, other, PLAIN, order, losses=losses)
            torch.manual_seed(comm.rank)
            assert_bitwise(train(comm, layer, run, order, losses=losses), expected)


def test_injected_losses_come_through_every_checkpoint(comm: Communicator) -> None:
    with make(comm) as layer, make(comm) as other, make(comm) as third:
        for one in (layer, other, third):
            one.inject_losses(0.5)
        runs = [(layer, PLAIN), (other, NON_REENTRANT), (third, REENTRANT)]
        found = []
        for one, run in runs:
            torch.manual_seed(comm.rank)
            found.append(train(comm, one, run, [0, 1, 2], losses=False))
        assert_bitwise(found[1], found[0])
        assert_bitwise(found[2], found[0])


def test_several_layers_in_one_checkpoint(comm: Communicator) -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([make(comm), make(comm, shared_expert=expert(9))])

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x).tanh()
            return x

    found = []
    for run in (PLAIN, NON_REENTRANT):
        block = Block()
        torch.manual_seed(comm.rank)
        x, mine = rows_of(comm, [4, 0, 3])
        part = x[mine].clone().requires_grad_()
        run(block, part).sin().sum().backward()
        found.append([*(p.grad for p in block.parameters()), *block.buffers(), part.grad])
        for layer in block.layers:
            layer.free()
    assert_bitwise(found[1], found[0])


def test_recomputation_leaves_statistics_alone(comm: Communicator) -> None:
    with make(comm) as layer:
        x, mine = rows_of(comm, [4, 3])
        outputs = [NON_REENTRANT(layer, x[mine]) for _ in range(2)]
        router = router_of(layer)
        seen = (router.balancing_loss, router.z_loss, layer.load)
        bias = router.expert_bias.clone()
        outputs[0].sum().backward()
        assert (router.balancing_loss, router.z_loss, layer.load) == seen
        assert torch.equal(router.expert_bias, bias)


def test_replay_on_request(comm: Communicator) -> None:
    """For a checkpoint that computes again outside of a backward."""
    with make(comm) as layer:
        router_of(layer).jitter = 0.0
        x, mine = rows_of(comm, [4, 0, 3])
        model = nn.Sequential(layer)
        forwards = []
        for key in ("a", "b"):
            with torch.no_grad(), to_be_replayed(model, key):
                forwards.append((layer(x[mine]), layer(x[mine])))
        bias = router_of(layer).expert_bias.clone()
        for key, (first, second) in zip(("a", "b"), forwards, strict=True):  # the bias moved each time
            with replaying(model, key):
                outputs = layer(x[mine]), layer(x[mine])
            assert torch.equal(outputs[0], first) and torch.equal(outputs[1], second)
        assert torch.equal(router_of(layer).expert_bias, bias)
        outputs[0].sum().backward()


def test_forwards_that_nobody_can_tell_apart_are_an_error(comm: Communicator) -> None:
    with make(comm) as layer:
        router_of(layer).jitter = 0.0
        x, mine = rows_of(comm, [4, 0, 3])
        output = REENTRANT(layer, x[mine].clone().requires_grad_())
        with torch.no_grad():
            layer(x[mine])  # the same tokens, in training mode, and the bias has moved
        with pytest.raises(HpcparError, match="told from other forwards"):
            output.sum().backward()


def test_recomputation_in_eval_mode_is_its_own(comm: Communicator) -> None:
    found = []
    for run in (PLAIN, REENTRANT):
        with make(comm) as layer:
            router_of(layer).jitter = 0.0
            x, mine = rows_of(comm, [4, 0, 3])
            alive = layer(x[mine] + 1.0)  # a forward in training, whose graph lives
            layer.eval()
            part = x[mine].clone().requires_grad_()
            run(layer, part).sin().sum().backward()
            found.append(results(layer, [part]))
            del alive
    assert_bitwise(found[1], found[0])


def test_routings_live_as_long_as_their_graphs(comm: Communicator) -> None:
    with make(comm) as layer:
        x, mine = rows_of(comm, [4, 3])
        for _ in range(5):
            layer(x[mine]).sum().backward()
        assert len(list(layer.routing_memory._living())) <= 1


def test_checkpointing_in_bfloat16_under_autocast(comm: Communicator) -> None:
    found = []
    for run in (PLAIN, NON_REENTRANT):
        router = gate(4, torch.float32, bias_update_rate=0.3)
        experts = [expert(e, dtype=torch.float32) for e in range(4)]
        with MixtureOfExperts(router, experts, comm) as layer:
            x, mine = rows_of(comm, [4, 0, 3])
            part = x[mine].float().requires_grad_()
            with torch.autocast("cpu", torch.bfloat16):
                output = run(layer, part)
            output.float().sin().sum().backward()
            found.append(results(layer, [part]))
    assert_bitwise(found[1], found[0])
