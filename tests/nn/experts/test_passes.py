"""Passes of served experts: they equal plain torch, however requests are batched."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.task_pool import Request
from tests.nn.experts.backends import (
    DIM,
    Attention,
    D,
    Keywords,
    Moody,
    Returning,
    assert_equal,
    backend_of,
    mlp,
    parameters_of,
    reference_step,
)

pytestmark = pytest.mark.local


# ---- passes ------------------------------------------------------------------------------------------------


def test_passes_equal_plain_torch() -> None:
    expert = mlp()
    plain = copy.deepcopy(expert)
    backend = backend_of(expert)
    for rows in (1, 5):
        x, grad = torch.randn(rows, DIM), torch.randn(rows, DIM)
        (output,) = backend.forward(x)
        assert torch.equal(output, plain(x)) and not output.requires_grad
        assert_equal(backend.backward(x, grad), reference_step(plain, [x], [grad]))
        assert_equal(parameters_of(expert), parameters_of(plain))
        assert all(parameter.grad is None for parameter in expert.parameters())
    assert backend.get_stats() == {"updates": 2, "examples_processed": 6}


def test_keyword_inputs_only_in_any_order_and_nested_outputs() -> None:
    expert = Keywords()
    plain = copy.deepcopy(expert)
    kwargs_schema = {"x": D(DIM), "index": D(dtype=torch.int64), "mask": D(dtype=torch.bool), "unused": D(2)}
    backend = backend_of(expert, args_schema=None, kwargs_schema=kwargs_schema)
    kwargs = {
        "unused": torch.randn(4, 2),
        "x": torch.randn(4, DIM),
        "mask": torch.tensor([True, False, False, False]),
        "index": torch.tensor([0, 1, 4, 1]),
    }
    flat = [kwargs[name] for name in ("index", "mask", "unused", "x")]
    want = plain(**kwargs)
    outputs = backend.forward(**kwargs)
    assert_equal(outputs, [want["a"][0], want["a"][1], want["z"]])
    assert_equal(backend.forward(*flat), outputs)
    assert backend.schema.unflatten_outputs(outputs)["a"][2] is None

    def call(module: nn.Module, leaves: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = module(**dict(zip(("index", "mask", "unused", "x"), leaves, strict=True)))
        return [outputs["a"][0], outputs["z"]]

    grads = [torch.randn(4), torch.randn(4, 3)]
    got = backend.backward(*flat, *grads)
    wanted = reference_step(plain, flat, grads, call)
    assert got[0] is None and got[1] is None
    assert torch.equal(got[2], torch.zeros(4, 2)) and wanted[2] is None
    assert_equal(got[3:], wanted[3:])
    assert_equal(parameters_of(expert), parameters_of(plain))
    info = backend.get_info()
    assert info["forward_schema"] == ((), kwargs_schema)
    assert info["outputs_schema"] == {"a": (D(), D(dtype=torch.int64), None), "z": D(3)}
    assert info["keyword_names"] == ("index", "mask", "unused", "x")


@pytest.mark.filterwarnings("ignore:Complex modules")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.complex64])
def test_experts_of_other_dtypes(dtype: torch.dtype) -> None:
    expert = nn.Linear(DIM, 3).to(dtype)
    plain = copy.deepcopy(expert)
    backend = backend_of(expert, args_schema=D(DIM, dtype=dtype))
    x, grad = torch.randn(4, DIM, dtype=dtype), torch.randn(4, 3, dtype=dtype)
    assert_equal(backend.forward(x), [plain(x)])
    (got,) = backend.backward(x, grad)
    x.requires_grad_()
    plain(x).backward(grad)
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_equal([got], [x.grad])
    assert_equal(parameters_of(expert), parameters_of(plain))


def test_evaluation_mode_is_for_one_call() -> None:
    expert = mlp(nn.Dropout(0.5), nn.BatchNorm1d(8))
    expert[3].eval()  # frozen statistics inside of a training expert
    backend = backend_of(expert)
    x = torch.randn(4, DIM)
    got = backend.forward(x, training=False)
    backend.backward(x, x, training=False)
    assert [module.training for module in expert] == [True, True, True, False, True]
    assert expert.training and torch.equal(expert[3].running_mean, torch.zeros(8))
    assert len({output.sum() for (output,) in (backend.forward(x, seed=n) for n in range(4))}) == 4
    expert.eval()
    plain = copy.deepcopy(expert)
    backend_of(plain).forward(x, training=True)
    assert not plain.training and (plain[3].running_mean != 0).any()
    assert got[0].shape == (4, DIM)


@pytest.mark.parametrize("output", ["input", "view", "parameter", "part", "twice", "constant", "inplace"])
def test_outputs_that_share_memory_are_copies(output: str) -> None:
    functions = {
        "input": lambda x, w: x,
        "view": lambda x, w: x.view(len(x), 2, DIM // 2),
        "parameter": lambda x, w: w.expand(len(x), -1),
        "part": lambda x, w: (x * w)[:, 1:],
        "twice": lambda x, w: [x * w] * 2,
        "constant": lambda x, w: torch.ones(len(x), 1),
        "inplace": lambda x, w: x.mul_(w).relu_(),
    }
    expert = Returning(functions[output])
    plain = copy.deepcopy(expert)
    backend = backend_of(expert)
    x = torch.randn(3, DIM)
    before = x.clone()
    outputs = backend.forward(x)
    want = plain(x.clone())
    assert_equal(outputs, list(want) if isinstance(want, list) else [want.detach()])
    grads = [torch.randn_like(one) for one in outputs]
    grads_before = [grad.clone() for grad in grads]
    (got,) = backend.backward(x, *grads)
    assert torch.equal(x, before)
    leaf = before.clone().requires_grad_()
    wanted = plain(leaf.clone())
    wanted = wanted if isinstance(wanted, list) else [wanted]
    if wanted[0].requires_grad:
        torch.autograd.backward(wanted, grads)
        torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_equal([got], [torch.zeros(3, DIM) if leaf.grad is None else leaf.grad])
    assert_equal(parameters_of(expert), parameters_of(plain))
    got.add_(1.0)
    for one in outputs:
        one.clone().add_(1.0)
        if output not in ("twice", "constant"):
            one.add_(1.0)
    assert torch.equal(x, before)
    assert_equal(grads, grads_before)
    assert_equal(parameters_of(expert), parameters_of(plain))


def test_frozen_parameters_stay() -> None:
    expert = mlp()
    expert[0].weight.requires_grad_(False)
    frozen = expert[0].weight.clone()
    plain = copy.deepcopy(expert)
    backend = backend_of(expert)
    x = torch.randn(4, DIM)
    assert_equal(backend.backward(x, x), reference_step(plain, [x], [x]))
    assert_equal(parameters_of(expert), parameters_of(plain))
    assert torch.equal(expert[0].weight, frozen)


def test_expert_without_optimizer_only_gives_gradients_of_inputs() -> None:
    expert = mlp()
    before = parameters_of(expert)
    backend = backend_of(expert, None, samples_per_update=2)
    x = torch.randn(3, DIM)
    assert_equal(backend.backward(x, x), reference_step(copy.deepcopy(expert), [x], [x]))
    assert_equal(parameters_of(expert), before)
    assert backend.get_stats() == {"updates": 0, "examples_processed": 3}
    assert backend_of(nn.Tanh()).backward(x, x)[0] is not None


@pytest.mark.parametrize("expert", [mlp(nn.BatchNorm1d(8)), Moody()])
def test_batch_without_rows(expert: nn.Module) -> None:
    expert = copy.deepcopy(expert)
    backend = backend_of(expert)
    state = copy.deepcopy(expert.state_dict())
    empty = torch.zeros(0, DIM)
    assert backend.forward(empty)[0].shape == (0, DIM)
    assert backend.backward(empty, empty)[0].shape == (0, DIM)
    assert backend.get_stats() == {"updates": 0, "examples_processed": 0}
    assert_equal(list(expert.state_dict().values()), list(state.values()))


def test_batch_without_rows_of_any_length() -> None:
    backend = backend_of(Attention(), args_schema=(D(None, DIM), D(None, dtype=torch.bool)))
    (output,) = backend.forward(torch.zeros(0, 3, DIM), torch.zeros(0, 3, dtype=torch.bool))
    assert output.shape == (0, 3, DIM)


def test_autocast_of_the_caller_is_not_the_experts() -> None:
    backend = backend_of(mlp())
    x = torch.randn(3, DIM)
    want = backend.forward(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(backend.forward(x), want)
        assert backend.backward(x, x)[0].dtype == torch.float32
        assert backend_of(mlp()).schema.outputs == D(DIM)


@pytest.mark.cuda
def test_expert_on_a_gpu_serves_callers_on_the_host() -> None:
    expert = mlp(nn.Dropout(0.5)).cuda()
    random_state = torch.cuda.get_rng_state()
    backend = backend_of(expert)
    x = torch.randn(4, DIM)
    requests = [Request(1, 5), Request(3, 6)]
    (output,) = backend.forward(x, requests=requests)
    (grad,) = backend.backward(x, x, requests=requests)
    assert grad is not None
    assert (output.device, grad.device) == (x.device, x.device)
    assert backend.forward(x.cuda(), training=False)[0].is_cuda
    assert torch.equal(torch.cuda.get_rng_state(), random_state)


# ---- probing -----------------------------------------------------------------------------------------------


def test_probing_leaves_no_trace() -> None:
    expert = mlp(nn.Dropout(0.5), nn.BatchNorm1d(8))
    expert[0].weight.grad = torch.ones(8, DIM)
    expert.eval()
    state, random_state = copy.deepcopy(expert.state_dict()), torch.get_rng_state()
    backend = backend_of(expert)
    assert backend.schema.outputs == D(DIM) and backend.traits.draws
    assert torch.equal(torch.get_rng_state(), random_state)
    assert_equal(list(expert.state_dict().values()), list(state.values()))
    assert not any(module.training for module in expert.modules())
    assert torch.equal(expert[0].weight.grad, torch.ones(8, DIM))
    assert expert[0].bias.grad is None


def test_probing_finds_axes_of_any_length() -> None:
    backend = backend_of(Attention(), args_schema=[D(None, DIM), D(None, dtype=torch.bool)])
    assert backend.schema.outputs == D(None, DIM)
    x, mask = torch.randn(2, 3, DIM), torch.zeros(2, 3, dtype=torch.bool)
    assert backend.forward(x, mask)[0].shape == (2, 3, DIM)
    assert backend.forward(x[:, :2], mask[:, :2])[0].shape == (2, 2, DIM)


def test_traits_are_found() -> None:
    assert not backend_of(mlp()).traits.draws
    assert backend_of(mlp(nn.Dropout())).traits.draws
    assert backend_of(nn.Sequential(nn.ReLU(inplace=True))).traits.writes_inputs
    assert not backend_of(mlp(nn.ReLU(inplace=True))).traits.writes_inputs


def test_expert_that_cannot_run_on_zeros_needs_outputs_schema() -> None:
    def picky(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not x.any():
            raise ValueError("zeros")
        return x * weight

    with pytest.raises(MismatchError, match=r"ValueError: zeros.*outputs_schema"):
        backend_of(Returning(picky))
    backend = backend_of(Returning(picky), outputs_schema=D(DIM))
    x = torch.ones(2, DIM)
    assert torch.equal(backend.forward(x)[0], x * torch.arange(1.0, DIM + 1))


def test_lazy_expert_gets_its_parameters_before_its_optimizer() -> None:
    backend = backend_of(nn.LazyLinear(3), lambda parameters: torch.optim.Adam(parameters))
    x, grad = torch.randn(4, DIM), torch.randn(4, 3)
    before = parameters_of(backend.expert)
    backend.backward(x, grad)
    assert not torch.equal(before[0], parameters_of(backend.expert)[0])


@pytest.mark.parametrize("function", [lambda x, w: x.sum(), lambda x, w: "text", lambda x, w: x[:1]])
def test_expert_that_returns_no_batch_is_refused(function: Any) -> None:
    with pytest.raises(MismatchError):
        backend_of(Returning(function))


def test_outputs_schema_that_is_wrong_is_refused() -> None:
    assert backend_of(mlp(), outputs_schema=D(None)).schema.outputs == D(None)
    with pytest.raises(MismatchError, match="output must have dtype"):
        backend_of(mlp(), outputs_schema=D(DIM, dtype=torch.float64))


# ---- random numbers ----------------------------------------------------------------------------------------


def masks_of(backend: ExpertBackend, requests: Sequence[Request]) -> tuple[torch.Tensor, torch.Tensor]:
    """Where dropout let rows of ones through, in forward and in backward."""
    x = torch.ones(sum(request.rows for request in requests), DIM)
    (output,) = backend.forward(x, requests=requests)
    (grad,) = backend.backward(x, torch.ones_like(x), requests=requests)
    assert grad is not None
    return output, grad


def dropout() -> ExpertBackend:
    return backend_of(nn.Sequential(nn.Dropout(0.5)))


def test_dropout_is_equal_in_forward_and_backward_however_batched() -> None:
    backend = dropout()
    requests = [Request(3, 11), Request(0, 12), Request(1, 13), Request(4, 14)]
    random_state = torch.get_rng_state()
    output, grad = masks_of(backend, requests)
    assert torch.equal(output, grad) and 0 < (output == 0).sum() < output.numel()
    others = [masks_of(backend, [request])[1] for request in reversed(requests)]
    assert torch.equal(torch.cat(others[::-1]), output)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_seed_of_a_direct_call_is_for_the_whole_batch() -> None:
    backend = dropout()
    x = torch.ones(5, DIM)
    (output,) = backend.forward(x, seed=3)
    assert torch.equal(output, masks_of(backend, [Request(5, 3)])[0])
    assert torch.equal(output, backend.backward(x, x, seed=3)[0])
    assert not torch.equal(backend.forward(x)[0], backend.forward(x)[0])


def test_requests_with_seeds_still_make_one_update() -> None:
    expert = mlp(nn.Dropout(0.5))
    plain = copy.deepcopy(expert)
    backend = backend_of(expert)
    x, grad = torch.randn(5, DIM), torch.randn(5, DIM)
    got = backend.backward(x, grad, requests=[Request(2, 1), Request(3, 2)])
    leaf = x.clone().requires_grad_()
    for rows, seed in ((slice(0, 2), 1), (slice(2, 5), 2)):
        torch.manual_seed(seed)
        plain(leaf[rows]).backward(grad[rows])
    torch.optim.SGD(plain.parameters(), lr=0.1).step()
    assert_equal(got, [leaf.grad])
    assert_equal(parameters_of(expert), parameters_of(plain))
    assert backend.get_stats()["updates"] == 1


def test_expert_that_begins_to_draw_can_be_told_so() -> None:
    expert = nn.Sequential(nn.Dropout(0.0))
    backend = backend_of(expert)
    assert not backend.traits.draws
    expert[0].p = 0.5
    backend.traits = replace(backend.traits, draws=True)
    output, grad = masks_of(backend, [Request(2, 5), Request(2, 6)])
    assert torch.equal(output, grad)


def test_threads_do_not_draw_from_each_others_seeds() -> None:
    backends = [dropout() for _ in range(2)]
    requests = [Request(64, 5)] * 4
    want = masks_of(dropout(), requests)[0]

    def run(backend: ExpertBackend) -> bool:
        return all(torch.equal(mask, want) for _ in range(20) for mask in masks_of(backend, requests))

    with ThreadPoolExecutor(2) as executor:
        assert all(executor.map(run, backends))


@pytest.mark.parametrize(
    "requests", [[], [Request(2, 1)], [Request(2, 1, True), Request(1, 1, False)], [Request(4, None)]]
)
def test_requests_that_do_not_fit_are_refused(requests: list[Request]) -> None:
    x = torch.ones(3, DIM)
    with pytest.raises(MismatchError, match="must"):
        dropout().forward(x, requests=requests)
    with pytest.raises(MismatchError, match="must"):
        dropout().backward(x, x, requests=requests)
