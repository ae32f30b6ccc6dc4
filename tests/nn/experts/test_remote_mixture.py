"""Mixtures of remote experts equal those of local ones, and do without experts that fail."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError, RemoteExpertError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.network import ExpertNetwork
from hpcpar.nn.experts.remote_mixture import RemoteMixtureOfExperts, RemoteSwitchMixtureOfExperts
from hpcpar.nn.experts.server import ExpertServer
from tests.nn.experts.serving import WIDTH, backends_of, expert

DOUBLE = torch.float64
GRID = (2, 3)
UIDS = [f"expert.{i}.{j}" for i in range(2) for j in range(3)]


def x_of(rows: int = 7) -> Tensor:
    return torch.randn(rows, WIDTH, dtype=DOUBLE, requires_grad=True)


def mixture(comm: Communicator, **options: Any) -> RemoteMixtureOfExperts:
    torch.manual_seed(5)
    return RemoteMixtureOfExperts(WIDTH, GRID, comm, **options).double()


def switch(comm: Communicator, **options: Any) -> RemoteSwitchMixtureOfExperts:
    torch.manual_seed(5)
    return RemoteSwitchMixtureOfExperts(WIDTH, GRID, comm, **options).double()


def sums_of(scores: Sequence[Tensor]) -> Tensor:
    """Of all experts of the grid, (batch, experts)."""
    return (scores[0].unsqueeze(2) + scores[1].unsqueeze(1)).flatten(1)


def weighted(x: Tensor, weights: Tensor, experts: Sequence[nn.Module]) -> Tensor:
    outputs = torch.stack([module(x) for module in experts], 1)
    return (outputs * weights.unsqueeze(-1)).sum(1)


def reference(gate: nn.Module, experts: Sequence[nn.Module], x: Tensor, k: int, without: Any = ()) -> Tensor:
    """The mixture in one process; experts in ``without`` are chosen, but do not answer."""
    sums = sums_of(gate(x))
    chosen = torch.zeros_like(sums, dtype=torch.bool).scatter_(1, sums.topk(k).indices, True)
    chosen[:, list(without)] = False
    return weighted(x, sums.masked_fill(~chosen, -torch.inf).softmax(1), experts)


class Faulty(nn.Module):
    """Waits or raises, in the passes it is told to; otherwise a linear layer."""

    def __init__(self, seed: int, forward: Any = None, backward: Any = None) -> None:
        super().__init__()
        self.inner = expert(seed)
        self.armed = False
        self.fault = {False: forward, True: backward}

    def forward(self, x: Tensor) -> Tensor:
        fault = self.fault[torch.is_grad_enabled()] if self.armed else None
        if fault == "raise":
            raise ValueError("broken")
        if fault is not None:
            fault.wait(30.0)
        return self.inner(x)


def faulty_backends(
    comm: Communicator, uids: Sequence[str], faults: dict[int, dict[str, Any]]
) -> dict[str, ExpertBackend]:
    """Backends with the faults of each, by place; armed when all are made, for that runs the experts."""
    served = backends_of(comm, uids, lambda i: Faulty(i, **faults.get(i, {})))
    for own in served.values():
        own.expert.armed = True
    return served


# ---- the mixture -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, 6])
def test_training_equals_one_process(comm: Communicator, k: int) -> None:
    local = [expert(i) for i in range(6)]
    optimizers = [torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9) for module in local]
    served = backends_of(comm, UIDS, expert)
    with ExpertServer(comm, served):
        if comm.rank == comm.size - 1:
            remote = mixture(comm, k_best=k)
            gate = copy.deepcopy(remote.gate)
            for _ in range(3):
                x = x_of()
                y = remote(x)
                y.square().sum().backward()
                x_here = x.detach().clone().requires_grad_()
                y_here = reference(gate, local, x_here, k)
                for optimizer in optimizers:
                    optimizer.zero_grad()
                y_here.square().sum().backward()
                chosen = sums_of(gate(x_here)).topk(k).indices.unique().tolist()
                for place in chosen:
                    optimizers[place].step()
                torch.testing.assert_close(y, y_here)
                torch.testing.assert_close(x.grad, x_here.grad)
            torch.testing.assert_close(remote.gate.projection.weight.grad, gate.projection.weight.grad)
    everything = {uid: list(b.expert.parameters()) for uid, b in served.items()}
    merged = {uid: ps for part in comm.allgather(everything) for uid, ps in part.items()}
    if comm.rank == comm.size - 1:
        for uid, module in zip(UIDS, local, strict=True):
            for ours, theirs in zip(merged[uid], module.parameters(), strict=True):
                torch.testing.assert_close(ours, theirs)


def test_one_message_for_each_expert_and_call(comm: Communicator, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []
    start = ExpertNetwork.start

    def counting(self: ExpertNetwork, record: Any, *args: Any, **kwargs: Any) -> Any:
        begun.append(record.uid)
        return start(self, record, *args, **kwargs)

    monkeypatch.setattr(ExpertNetwork, "start", counting)
    with ExpertServer(comm, backends_of(comm, UIDS, expert)):
        y = mixture(comm, k_best=6)(x_of(40))
        assert sorted(begun) == UIDS
        y.sum().backward()
        assert sorted(begun) == sorted(UIDS * 2)


def test_missing_experts_and_batches_without_rows(comm: Communicator) -> None:
    served = backends_of(comm, UIDS[1:4], lambda i: expert(i + 1))
    with ExpertServer(comm, served):
        remote = mixture(comm, k_best=4).eval()
        x = x_of()
        local = [expert(i) for i in range(6)]
        missing = [0, 4, 5]
        torch.testing.assert_close(remote(x), reference(remote.gate, local, x, 6, without=missing))
        empty = x_of(0)
        y = remote(empty)
        assert y.shape == (0, WIDTH)
        y.sum().backward()
        assert empty.grad is not None
        with pytest.raises(MismatchError, match="k_min must be at most the experts served, 3, got 4"):
            mixture(comm, k_best=4, k_min=4)(x)
        with pytest.raises(MismatchError, match="must have one that is served"):
            mixture(comm, uid_prefix="other")(x)


def test_wrong_options_and_arguments_are_refused(comm: Communicator) -> None:
    for options in ({"k_min": 5}, {"k_best": 0, "k_min": 0}, {"k_min": -1}):
        with pytest.raises(MismatchError, match="k_min must be from 0 to k_best"):
            mixture(comm, **options)
    for wrong in ({"k_min": 2}, {"jitter": 1.0}, {"capacity_factor": 0.0}):
        with pytest.raises(MismatchError):
            switch(comm, **wrong)
    with ExpertServer(comm, backends_of(comm, UIDS, expert)):
        with pytest.raises(MismatchError):
            mixture(comm)(x_of(), x_of())
        assert ExpertNetwork.of(comm)._busy == 0


def test_expert_that_raises_is_masked_and_its_weight_goes_to_the_others(comm: Communicator) -> None:
    with ExpertServer(comm, faulty_backends(comm, UIDS, {2: {"forward": "raise"}})):
        remote = mixture(comm, k_best=6).eval()
        gate = copy.deepcopy(remote.gate)
        x = x_of()
        x_here = x.detach().clone().requires_grad_()
        y = remote(x)
        y_here = reference(gate, [expert(i) for i in range(6)], x_here, 6, without=[2])
        torch.testing.assert_close(y, y_here)
        y.sum().backward()
        y_here.sum().backward()
        torch.testing.assert_close(x.grad, x_here.grad)
        torch.testing.assert_close(remote.gate.projection.weight.grad, gate.projection.weight.grad)
        with pytest.raises(RemoteExpertError, match=r"must have 6 experts that answer.*7 of 7 samples"):
            mixture(comm, k_best=6, k_min=6).eval()(x)


def test_expert_that_raises_in_backward_gives_no_gradient(comm: Communicator) -> None:
    with ExpertServer(comm, faulty_backends(comm, UIDS, {2: {"backward": "raise"}})):
        remote = mixture(comm, k_best=6).eval()
        x = x_of()
        (grad,) = torch.autograd.grad(remote(x).sum(), x)
        leaf = x.detach().clone().requires_grad_()
        local = [expert(i) for i in range(6)]
        outputs = [module(leaf if place != 2 else leaf.detach()) for place, module in enumerate(local)]
        weights = sums_of(remote.gate(leaf)).softmax(1)
        (torch.stack(outputs, 1) * weights.unsqueeze(-1)).sum().backward()
        torch.testing.assert_close(grad, leaf.grad)
        with pytest.raises(RemoteExpertError, match="in backward"):
            mixture(comm, k_best=6, k_min=6).eval()(x).sum().backward()


@pytest.mark.mpi(min_size=2)
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_expert_that_is_late_is_masked(comm: Communicator, when: str) -> None:
    """Each rank serves one expert, so that the late one holds up no other."""
    until = threading.Event()
    uids = [f"expert.{rank}" for rank in range(comm.size)]
    late = comm.size - 1
    served = faulty_backends(comm, uids, {late: {when: until}})
    with ExpertServer(comm, served):
        if comm.rank == 0:
            torch.manual_seed(5)
            remote = RemoteMixtureOfExperts(
                WIDTH, (comm.size,), comm, k_best=comm.size, **{f"{when}_timeout": 1.5}
            ).double()
            remote.eval()
            x = x_of(3)
            y = remote(x)
            local = [expert(i) for i in range(comm.size)]
            weights = remote.gate(x)[0]
            if when == "forward":
                weights = weights.masked_fill(torch.arange(comm.size) == late, -torch.inf)
            torch.testing.assert_close(y, weighted(x, weights.softmax(1), local))
            y.sum().backward()
            assert x.grad is not None
        comm.Barrier()
        until.set()


# ---- the switch --------------------------------------------------------------------------------------------


def test_switch_equals_one_process(comm: Communicator) -> None:
    local = [expert(i) for i in range(6)]
    with ExpertServer(comm, backends_of(comm, UIDS, expert)):
        remote = switch(comm).eval()
        gate = copy.deepcopy(remote.gate)
        x = x_of(20)
        x_here = x.detach().clone().requires_grad_()
        y, loss = remote(x)
        (y.square().sum() + loss).backward()
        first, second = (of_axis.softmax(1) for of_axis in gate(x_here))
        probabilities = (first.unsqueeze(2) * second.unsqueeze(1)).flatten(1)
        best = probabilities.argmax(1)
        chosen = nn.functional.one_hot(best, 6)
        y_here = weighted(x_here, probabilities * chosen, local)
        shares = [chosen.view(-1, 2, 3).double().mean(0).sum(axis) for axis in (1, 0)]
        loss_here = sum(
            len(share) * (share * p.mean(0)).sum() for share, p in zip(shares, (first, second), strict=True)
        )
        (y_here.square().sum() + loss_here).backward()
        torch.testing.assert_close(y, y_here)
        torch.testing.assert_close(loss, loss_here)
        torch.testing.assert_close(x.grad, x_here.grad)
        torch.testing.assert_close(remote.gate.projection.weight.grad, gate.projection.weight.grad)


def test_balancing_loss_is_even_at_best_and_has_a_gradient(comm: Communicator) -> None:
    with ExpertServer(comm, backends_of(comm, UIDS, expert)):
        remote = switch(comm, jitter=0.0).eval()
        _, loss = remote(x_of(30))
        loss.backward()
        assert remote.gate.projection.weight.grad.abs().sum() > 0
        with torch.no_grad():
            remote.gate.projection.weight.zero_()
            remote.gate.projection.bias.zero_()
        _, even = remote(x_of(30))
        assert even.item() == pytest.approx(2.0)  # one for each axis


def test_jitter_only_in_training(comm: Communicator) -> None:
    with ExpertServer(comm, backends_of(comm, UIDS, expert, samples_per_update=10**6)):
        remote = switch(comm, jitter=0.5)
        x = x_of()
        losses = {remote(x)[1].item() for _ in range(4)}
        assert len(losses) > 1
        remote.eval()
        assert len({remote(x)[1].item() for _ in range(4)}) == 1


def test_capacity_takes_those_that_come_first(comm: Communicator) -> None:
    with ExpertServer(comm, backends_of(comm, UIDS, expert)):
        remote = switch(comm, capacity_factor=1.0).eval()
        x = x_of(1).detach().expand(12, WIDTH)  # all want the same expert, which takes 12 / 6
        y, _ = remote(x)
        assert (y[:2] != 0).all()
        assert torch.equal(y[0], y[1])
        assert (y[2:] == 0).all()


def test_switch_does_without_its_expert_only_where_it_may(comm: Communicator) -> None:
    with ExpertServer(comm, faulty_backends(comm, UIDS, {i: {"forward": "raise"} for i in range(6)})):
        x = x_of()
        y, _ = switch(comm, k_min=0).eval()(x)
        assert (y == 0).all()
        with pytest.raises(RemoteExpertError):
            switch(comm).eval()(x)
