"""Served experts where callers and servers get in each other's way."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
import time

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hpcpar.comm import Communicator
from hpcpar.errors import HpcparError, MismatchError, RankFailedError, RemoteExpertError
from hpcpar.nn import (
    BatchTensorDescriptor,
    ExpertBackend,
    ExpertServer,
    RemoteExpert,
    RemoteMixtureOfExperts,
)
from tests.nn.experts.serving import WIDTH, backend, backends_of, expert

DOUBLE = torch.float64


def x_of(rows: int = 4) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=DOUBLE)


def one(comm: Communicator, module: nn.Module, uid: str = "e") -> dict[str, ExpertBackend]:
    return {uid: backend(uid, module)} if comm.rank == 0 else {}


def test_cooperative_server_in_the_middle_of_a_backward(comm: Communicator) -> None:
    """A rank that waits for its own backward computes experts with dropout for others."""
    own = {f"e.{comm.rank}": backend(f"e.{comm.rank}", expert(comm.rank, dropout=0.5))}
    with ExpertServer(comm, own, threaded=False):
        remote = RemoteExpert(f"e.{(comm.rank + 1) % comm.size}", comm)
        for step in range(5):
            x = x_of().requires_grad_()
            run = remote if step % 2 else (lambda x: checkpoint(remote, x, use_reentrant=False))
            nn.functional.dropout(run(x), 0.3).sum().backward()
            assert x.grad is not None and bool(x.grad.isfinite().all())


def test_tensor_without_memory_is_an_error_and_the_block_ends(comm: Communicator) -> None:
    with ExpertServer(comm, one(comm, expert(0))):
        remote = RemoteExpert("e", comm)
        with pytest.raises(RuntimeError), torch.no_grad():
            torch.vmap(remote)(x_of(6).view(2, 3, WIDTH))
        remote(x_of())


def test_expert_that_calls_another_is_told(comm: Communicator) -> None:
    class Outer(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return RemoteExpert("e", comm)(x)

    schema = BatchTensorDescriptor(WIDTH, dtype=DOUBLE)
    served = one(comm, expert(0))
    if comm.rank == 0:
        served["outer"] = ExpertBackend("outer", Outer(), None, args_schema=schema, outputs_schema=schema)
    with ExpertServer(comm, served):
        with pytest.raises(RemoteExpertError, match="must not call other experts"):
            RemoteExpert("outer", comm)(x_of())
        RemoteExpert("e", comm)(x_of())


def test_calls_of_other_threads_end_when_the_block_fails(comm: Communicator) -> None:
    class Slow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            time.sleep(1.0)
            return x

    schema = BatchTensorDescriptor(WIDTH, dtype=DOUBLE)
    served = (
        {"slow": ExpertBackend("slow", Slow(), None, args_schema=schema, outputs_schema=schema)}
        if comm.rank == 0
        else {}
    )

    def call() -> None:
        with contextlib.suppress(HpcparError):
            RemoteExpert("slow", comm)(x_of())

    callers = [threading.Thread(target=call) for _ in range(2)]
    with pytest.raises((ValueError, RankFailedError)), ExpertServer(comm, served):
        for caller in callers:
            caller.start()
        time.sleep(0.3)
        raise ValueError("enough")
    for caller in callers:
        caller.join(30.0)
        assert not caller.is_alive()


def test_outputs_without_sums_are_of_the_best_that_answered(comm: Communicator) -> None:
    class Counting(nn.Module):
        def __init__(self, broken: bool) -> None:
            super().__init__()
            self.broken = broken

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            if self.broken:
                raise ValueError("broken")
            return x, torch.full((len(x),), 6)

    schema = BatchTensorDescriptor(WIDTH, dtype=DOUBLE)
    outputs = (schema, BatchTensorDescriptor(dtype=torch.int64))
    served = {
        f"expert.{n}": ExpertBackend(
            f"expert.{n}", Counting(n == 0), None, args_schema=schema, outputs_schema=outputs
        )
        for n in range(2)
        if comm.rank == 0
    }
    with ExpertServer(comm, served):
        mixture = RemoteMixtureOfExperts(WIDTH, (2,), comm, k_best=2).double()
        with torch.no_grad():
            mixture.gate.projection.bias.copy_(torch.tensor([100.0, 0.0]))  # the broken one is the best
        _, counts = mixture(x_of(3))
        assert counts.tolist() == [6, 6, 6]


def test_batch_without_rows_keeps_axes_of_any_length(comm: Communicator) -> None:
    schema = BatchTensorDescriptor(None, WIDTH, dtype=DOUBLE)
    served = {
        "expert.0": ExpertBackend("expert.0", nn.Identity(), None, args_schema=schema, outputs_schema=schema)
    }
    with ExpertServer(comm, served if comm.rank == 0 else {}):
        mixture = RemoteMixtureOfExperts(WIDTH, (1,), comm, k_best=1).double()
        assert mixture(torch.zeros(0, 5, WIDTH, dtype=DOUBLE)).shape == (0, 5, WIDTH)
        assert mixture(torch.zeros(2, 5, WIDTH, dtype=DOUBLE)).shape == (2, 5, WIDTH)


def test_backend_on_two_servers_is_an_error(comm: Communicator) -> None:
    other = comm.Dup()
    served = one(comm, expert(0))
    with ExpertServer(comm, served):
        with pytest.raises(MismatchError, match="served once at a time"), ExpertServer(other, served):
            pass
        RemoteExpert("e", comm)(x_of())
    with ExpertServer(other, served):
        RemoteExpert("e", other)(x_of())
    other.Free()


def test_wrong_backends_and_uids_are_errors_on_all_ranks(comm: Communicator) -> None:
    for served in ({"e": nn.Linear(2, 2)}, {3: backend("e", expert(0))}):
        with (
            pytest.raises(MismatchError, match=r"must be (an ExpertBackend|words with dots)"),
            ExpertServer(comm, served if comm.rank == comm.size - 1 else {}),  # type: ignore[arg-type]
        ):
            pass


def test_copy_of_a_mixture_in_use(comm: Communicator) -> None:
    with ExpertServer(comm, backends_of(comm, ["expert.0", "expert.1"], expert)):
        mixture = RemoteMixtureOfExperts(WIDTH, (2,), comm, k_best=2).double()
        x = x_of()
        with torch.no_grad():
            mixture(x)
            twin = copy.deepcopy(mixture)
            assert torch.equal(twin(x), mixture(x))


def test_autocast_converts_what_is_sent(comm: Communicator) -> None:
    net = nn.Linear(WIDTH, WIDTH)
    served = {"e": ExpertBackend("e", net, None, args_schema=BatchTensorDescriptor(WIDTH))}
    with ExpertServer(comm, served if comm.rank == 0 else {}):
        remote = RemoteExpert("e", comm)
        x = torch.randn(3, WIDTH, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = remote(nn.functional.linear(x, torch.eye(WIDTH)))
        assert y.dtype is torch.float32
        y.sum().backward()
        with pytest.raises(MismatchError, match="dtype"):
            remote(x.bfloat16())


@pytest.mark.mpi(min_size=2)
def test_rank_that_waits_at_the_end_says_for_whom(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "hpcpar"):
        with ExpertServer(comm, one(comm, expert(0))):
            if comm.rank == 0:
                monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.2")
            else:
                time.sleep(1.0)
        monkeypatch.delenv("HPCPAR_TIMEOUT_S", raising=False)
    said = [record.getMessage() for record in caplog.records if "still call experts" in record.getMessage()]
    assert bool(said) == (comm.rank == 0)
    assert all("rank 0 of" in text and "rank(s) 1" in text for text in said)
