"""The gate by itself, and choosing by its logits."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.gate import TopKGate
from hpcpar.nn.experts.routing import choose

pytestmark = pytest.mark.local


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_router_computes_in_float32(dtype: torch.dtype) -> None:
    gate, x = TopKGate(6, 4), torch.randn(5, 6).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        logits = gate(x)
    assert logits.dtype is torch.float32
    torch.testing.assert_close(logits, x.float() @ gate.weight.T)


def test_router_keeps_float64() -> None:
    gate, x = TopKGate(6, 4), torch.randn(5, 6, dtype=torch.float64)
    assert gate(x).dtype is torch.float64
    torch.testing.assert_close(gate(x), x @ gate.weight.double().T)


def test_router_of_a_bfloat16_model() -> None:
    gate = TopKGate(6, 4).bfloat16()
    logits = gate(torch.randn(5, 6, dtype=torch.bfloat16))
    assert logits.dtype is torch.float32
    logits.sum().backward()
    assert gate.weight.grad is not None and gate.weight.grad.dtype is torch.bfloat16


def test_jitter_only_in_training() -> None:
    gate, x = TopKGate(6, 4, jitter=0.5), torch.randn(5, 6)
    assert not torch.equal(gate(x), gate(x))
    gate.eval()
    torch.testing.assert_close(gate(x), x @ gate.weight.T)


def test_bias_changes_the_choice_and_not_its_order_otherwise() -> None:
    probabilities = torch.tensor([[0.1, 0.5, 0.4], [0.6, 0.1, 0.3]])
    assert choose(probabilities, None, 2).tolist() == [[1, 2], [0, 2]]
    assert choose(probabilities, torch.tensor([0.0, 0.35, 0.0]), 2).tolist() == [[1, 2], [0, 1]]


def test_bias_moves_against_the_load() -> None:
    gate = TopKGate(6, 4, bias_update_rate=0.1)
    gate.update_bias(torch.tensor([3, 1, 2, 2]))
    torch.testing.assert_close(gate.expert_bias, torch.tensor([-0.1, 0.1, 0.0, 0.0]))
    still = TopKGate(6, 4)
    still.update_bias(torch.tensor([3, 1, 2, 2]))
    assert not still.expert_bias.any()


def test_gate_with_losses_can_be_copied_and_pickled() -> None:
    gate = TopKGate(6, 4)
    gate.balancing_loss = gate.weight.sum()
    for twin in (copy.deepcopy(gate), pickle.loads(pickle.dumps(gate))):
        assert torch.equal(twin.balancing_loss, gate.balancing_loss) and twin.balancing_loss.is_leaf
        assert torch.equal(twin.weight, gate.weight)


@pytest.mark.parametrize(
    "options", [{"top_k": 0}, {"top_k": 1.5}, {"jitter": -1.0}, {"bias_update_rate": float("nan")}], ids=str
)
def test_senseless_numbers_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(MismatchError, match=next(iter(options))):
        TopKGate(6, 4, **options)  # type: ignore[arg-type]
