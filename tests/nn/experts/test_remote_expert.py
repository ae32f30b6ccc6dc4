"""A remote expert computes and learns what the same module would here."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError, RemoteExpertError, StalledError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.client import RemoteExpert
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.network import ExpertNetwork
from hpcpar.nn.experts.server import ExpertServer
from tests.nn.experts.serving import WIDTH, backend, expert, sgd

DOUBLE = torch.float64


class Pair(nn.Module):
    """Nested arguments, keywords, integers, and an output that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, WIDTH, dtype=DOUBLE)
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=DOUBLE)

    def forward(self, x: Tensor, more: dict[str, Any], *, token: Tensor, scale: Tensor) -> dict[str, Any]:
        y = self.linear(x) * scale.unsqueeze(-1) + self.embedding(token)
        masked = y.masked_fill(~more["mask"], 0.0)
        return {"y": masked, "rest": [more["bias"][0] * 2, y.argmax(-1)]}


def pair_backend(module: nn.Module) -> ExpertBackend:
    return ExpertBackend(
        "pair",
        module,
        sgd(module),
        args_schema=(
            BatchTensorDescriptor(WIDTH, dtype=DOUBLE),
            {
                "mask": BatchTensorDescriptor(WIDTH, dtype=torch.bool),
                "bias": (BatchTensorDescriptor(2, dtype=DOUBLE),),
            },
        ),
        kwargs_schema={
            "token": BatchTensorDescriptor(dtype=torch.int64),
            "scale": BatchTensorDescriptor(dtype=DOUBLE),
        },
    )


class Keywords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=DOUBLE)

    def forward(self, *, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(a), self.linear(b) * a


def last(comm: Communicator) -> bool:
    """Whether this rank is the one that calls; rank 0 serves."""
    return comm.rank == comm.size - 1


def x_of(rows: int = 5, **options: Any) -> Tensor:
    return torch.randn(rows, WIDTH, **{"dtype": DOUBLE, **options})


def test_training_through_it_equals_training_here(comm: Communicator) -> None:
    module, local = expert(1), expert(1)
    optimizer = sgd(local)
    with ExpertServer(comm, {"e": backend("e", module)} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("e", comm)
            for rows in (4, 1, 7):
                x = x_of(rows, requires_grad=True)
                weights = torch.randn(rows, WIDTH, dtype=DOUBLE)
                y = remote(x)
                (y * weights).sum().backward()
                x_here = x.detach().clone().requires_grad_()
                y_here = local(x_here)
                optimizer.zero_grad()
                (y_here * weights).sum().backward()
                optimizer.step()
                assert torch.equal(y, y_here)
                assert x.grad is not None
                assert torch.equal(x.grad, x_here.grad)
            assert remote.get_stats() == {"updates": 3, "examples_processed": 12}
    ours = comm.bcast([p.detach() for p in module.parameters()], 0)
    if last(comm):
        assert all(torch.equal(p, q) for p, q in zip(ours, local.parameters(), strict=True))


def test_nested_arguments_keywords_and_integers(comm: Communicator) -> None:
    torch.manual_seed(0)
    module = Pair()
    local = copy.deepcopy(module)
    with ExpertServer(comm, {"pair": pair_backend(module)} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("pair", comm)
            leaves = [x_of(3), torch.randn(3, 2, dtype=DOUBLE), torch.randn(3, dtype=DOUBLE)]
            token, mask = torch.tensor([0, 4, 2]), torch.rand(3, WIDTH) < 0.5
            results = []
            for call in (remote, local):
                x, bias, scale = (leaf.clone().requires_grad_() for leaf in leaves)
                out = call(x, {"bias": (bias,), "mask": mask}, scale=scale, token=token)
                (out["y"].sum() + (out["rest"][0] ** 2).sum()).backward()
                results.append([out["y"], *out["rest"], x.grad, bias.grad, scale.grad])
                assert not out["rest"][1].requires_grad
            for ours, reference in zip(*results, strict=True):
                torch.testing.assert_close(ours, reference, rtol=0, atol=0)


def test_expert_with_keywords_only(comm: Communicator) -> None:
    torch.manual_seed(0)
    module = Keywords()
    local = copy.deepcopy(module)
    schema = {name: BatchTensorDescriptor(WIDTH, dtype=DOUBLE) for name in ("b", "a")}
    served = ExpertBackend("k", module, sgd(module), kwargs_schema=schema)
    with ExpertServer(comm, {"k": served} if comm.rank == 0 else {}):
        if last(comm):
            values = x_of(), x_of()
            results = []
            for call in (RemoteExpert("k", comm), local):
                a, b = (value.clone().requires_grad_() for value in values)
                first, _ = call(b=b, a=a)  # the second output is not used
                first.square().sum().backward()
                results.append([first, a.grad, b.grad if b.grad is not None else torch.zeros_like(b)])
            for ours, reference in zip(*results, strict=True):
                assert torch.equal(ours, reference)


def test_bfloat16(comm: Communicator) -> None:
    local = expert(2, dtype=torch.bfloat16)
    served = backend("e", expert(2, dtype=torch.bfloat16), dtype=torch.bfloat16)
    with ExpertServer(comm, {"e": served} if comm.rank == 0 else {}):
        if last(comm):
            x = x_of(dtype=torch.bfloat16, requires_grad=True)
            y = RemoteExpert("e", comm)(x)
            y.sum().backward()
            x_here = x.detach().clone().requires_grad_()
            local(x_here).sum().backward()
            assert y.dtype == torch.bfloat16
            assert torch.equal(y, local(x))
            assert x.grad is not None
            assert torch.equal(x.grad, x_here.grad)


def linear_dropout() -> nn.Module:
    """Its output is its input times the mask, so that the gradient shows the mask of the backward pass."""
    return nn.Sequential(nn.Dropout(0.5), nn.Identity())


def untrained(uid: str, module: nn.Module) -> ExpertBackend:
    return ExpertBackend(uid, module, None, args_schema=BatchTensorDescriptor(WIDTH, dtype=DOUBLE))


def test_dropout_has_one_mask_in_both_passes_and_follows_the_callers_seed(comm: Communicator) -> None:
    with ExpertServer(comm, {"d": untrained("d", linear_dropout())} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("d", comm)
            x = torch.ones(50, WIDTH, dtype=DOUBLE, requires_grad=True)
            masks = []
            for seed in (3, 3, 4):
                torch.manual_seed(seed)
                masks.append(remote(x))
                x.grad = None
                masks[-1].sum().backward()
                assert torch.equal(x.grad, masks[-1])
            assert torch.equal(masks[0], masks[1])
            assert not torch.equal(masks[0], masks[2])
            assert set(masks[0].unique().tolist()) == {0.0, 2.0}
            remote.eval()
            assert torch.equal(remote(x), x)


def test_activation_checkpointing_repeats_the_mask(comm: Communicator) -> None:
    with ExpertServer(comm, {"d": untrained("d", linear_dropout())} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("d", comm)
            x = torch.ones(20, WIDTH, dtype=DOUBLE, requires_grad=True)
            y = checkpoint(lambda value: remote(value) ** 2, x, use_reentrant=False)
            y.sum().backward()
            assert torch.equal(x.grad, 2 * y.detach())  # y = (x * mask)**2, mask is 0 or 2


def test_evaluation_mode_gives_gradients_and_trains_nothing(comm: Communicator) -> None:
    module, local = expert(1, dropout=0.5), expert(1).eval()
    with ExpertServer(comm, {"e": backend("e", module)} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("e", comm).eval()
            x = x_of(requires_grad=True)
            y = remote(x)
            y.sum().backward()
            x_here = x.detach().clone().requires_grad_()
            local(x_here).sum().backward()
            assert torch.equal(y, local(x))
            assert torch.equal(x.grad, x_here.grad)
            assert remote.get_stats() == {"updates": 0, "examples_processed": 0}
    if comm.rank == 0:
        assert module.training
        assert all(torch.equal(p, q) for p, q in zip(module.parameters(), local.parameters(), strict=True))


def test_it_learns_without_gradients_of_inputs_and_not_without_a_graph(comm: Communicator) -> None:
    with ExpertServer(comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("e", comm)
            with torch.no_grad():
                assert not remote(x_of()).requires_grad
            remote(x_of(3)).sum().backward()
            assert remote.get_stats() == {"updates": 1, "examples_processed": 3}


def test_batches_without_rows_and_larger_than_the_largest(comm: Communicator) -> None:
    local = expert(1)
    served = backend("e", expert(1), max_batch_size=4)
    with ExpertServer(comm, {"e": served} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("e", comm)
            for rows in (0, 11):
                x = x_of(rows, requires_grad=True)
                y = remote(x)
                torch.testing.assert_close(y, local(x))
                y.sum().backward()
                assert x.grad is not None
                assert x.grad.shape == x.shape
            assert remote.get_stats()["examples_processed"] == 11


def test_called_twice_in_one_graph(comm: Communicator) -> None:
    with ExpertServer(comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}):
        if last(comm):
            remote, local = RemoteExpert("e", comm).eval(), expert(1)
            grads = []
            for call in (remote, local):
                x = torch.ones(2, WIDTH, dtype=DOUBLE, requires_grad=True)
                (call(call(x) * 2) + call(x)).sum().backward()
                grads.append(x.grad)
            assert torch.equal(*grads)


def test_autocast_and_inference_of_the_caller_do_not_matter(comm: Communicator) -> None:
    local = expert(1)
    for threaded in (None, False):
        server = ExpertServer(
            comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}, threaded=threaded
        )
        with server:
            if last(comm):
                remote = RemoteExpert("e", comm)
                x = x_of()
                here = local(x)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    assert torch.equal(remote(x), here)
                with torch.inference_mode():
                    assert torch.equal(remote(x), here)


def test_nan_passes_through(comm: Communicator) -> None:
    with ExpertServer(comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}):
        if last(comm):
            remote = RemoteExpert("e", comm).eval()
            x = x_of(3)
            x[1] = torch.nan
            y = remote(x)
            assert y[1].isnan().all()
            assert torch.equal(y[[0, 2]], remote(x[[0, 2]]))


def test_wrong_calls_raise_before_anything_is_sent(comm: Communicator) -> None:
    with ExpertServer(comm, {"expert.0": backend("expert.0", expert(1))} if comm.rank == 0 else {}):
        remote = RemoteExpert("expert.0", comm)
        before = ExpertNetwork.of(comm).calls.bytes_sent
        wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((torch.ones(3, WIDTH + 1, dtype=DOUBLE),), {}),
            ((torch.ones(3, WIDTH),), {}),
            ((torch.ones(WIDTH, dtype=DOUBLE),), {}),
            ((x_of(), x_of()), {}),
            ((x_of(),), {"mask": x_of()}),
            (([1.0],), {}),
            ((), {}),
        ]
        for args, kwargs in wrong:
            with pytest.raises(MismatchError):
                remote(*args, **kwargs)
        with pytest.raises(RemoteExpertError, match=r"got 'expert\.9'\. Did you mean expert\.0\?"):
            RemoteExpert("expert.9", comm)
        assert ExpertNetwork.of(comm).calls.bytes_sent == before


def test_call_outside_of_the_block_says_so(comm: Communicator) -> None:
    remote = RemoteExpert("e", comm)
    with pytest.raises(HpcparError, match="inside `with ExpertServer"):
        remote(x_of())
    with ExpertServer(comm, {"e": backend("e", expert(1))} if comm.rank == 0 else {}):
        y = remote(x_of())
    with pytest.raises(HpcparError, match="before its server's `with` block ends"):
        y.sum().backward()


class Sleepy(nn.Module):
    def __init__(self, until: Any) -> None:
        super().__init__()
        self.until = until

    def forward(self, x: Tensor) -> Tensor:
        if len(x) == 3:
            self.until.wait(20.0)
        return x


def test_no_reply_in_time_is_an_error_and_the_next_call_works(comm: Communicator) -> None:
    until = threading.Event()
    with ExpertServer(comm, {"s": untrained("s", Sleepy(until))} if comm.rank == 0 else {}):
        if last(comm):
            with pytest.raises(StalledError):
                RemoteExpert("s", comm, forward_timeout=0.1)(x_of(3))
        comm.Barrier()
        until.set()
        if last(comm):
            x = x_of(5)
            assert torch.equal(RemoteExpert("s", comm)(x), x)
