"""Ranks that miss rounds, come later, or resume get the newest state, and end as the same replica."""

from __future__ import annotations

import copy
import logging
import time

import pytest
import torch

from hpcpar.comm import Communicator
from hpcpar.optim import CollaborativeOptimizer
from hpcpar.optim.collaborative.state_exchange import StateExchange
from tests.nn.training import assert_close, assert_replicas_equal, mlp
from tests.optim.collaborative.scripted import adam, data, mean_loss, reference

pytestmark = [pytest.mark.mpi, pytest.mark.timeout_s(30)]


def batch(net, opt, place: int, rank: int, size: int = 4) -> None:
    opt.zero_grad()
    mean_loss(net, *data(7, rank, place, size)).backward()
    opt.step(size)


def steps_of_others(opt: CollaborativeOptimizer, comm: Communicator, steps: int) -> None:
    """The last rank hears that the others have made so many steps, without any part in them."""
    while opt.collaboration_state.optimizer_step < steps:
        time.sleep(0.005)


def is_late(comm: Communicator) -> bool:
    if comm.size == 1:
        pytest.skip("needs another rank")
    return comm.rank == comm.size - 1


# ---- partial rounds ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("delayed", [False, True])
def test_rounds_go_on_without_a_late_rank_which_catches_up(comm: Communicator, delayed: bool) -> None:
    late = is_late(comm)
    net = mlp()
    options = {"target_batch_size": 4, "averaging_timeout": 0.05, "delayed_averaging": delayed}
    with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
        if late:
            steps_of_others(opt, comm, 3)
            assert not opt.is_synchronized
            assert opt.local_step == 0
            opt.step_aux()
            assert opt.local_step >= 3
            batch(net, opt, 9, comm.rank)
        else:
            while opt.local_step < 3:
                batch(net, opt, opt.local_step, comm.rank)
    assert len(set(comm.allgather(opt.local_step))) == 1
    assert_replicas_equal(comm, net.parameters())
    assert_replicas_equal(comm, [s["exp_avg"] for s in opt.state.values()])


def test_partial_round_is_the_mean_over_its_members(comm: Communicator) -> None:
    late = is_late(comm)
    net = mlp()
    script = [[*[[2 + rank] for rank in range(comm.size - 1)], []]]
    expected = reference(net, script, adam)
    total = sum(2 + rank for rank in range(comm.size - 1))
    options = {"target_batch_size": total, "averaging_timeout": 0.2}
    with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
        if late:
            steps_of_others(opt, comm, 1)
            while opt.local_step == 0:
                opt.step_aux()
        else:
            opt.zero_grad()
            mean_loss(net, *data(0, comm.rank, 0, 2 + comm.rank)).backward()
            opt.step(2 + comm.rank)
            while opt.local_step == 0:
                opt.step_aux()
        assert opt.local_step == 1
    assert_close(net, expected)
    assert_replicas_equal(comm, net.parameters())


@pytest.mark.parametrize("tolerance", [0, 9])
def test_gradients_that_are_too_old_are_dropped(
    comm: Communicator, caplog: pytest.LogCaptureFixture, tolerance: int
) -> None:
    late = is_late(comm)
    net = mlp()
    caplog.set_level(logging.WARNING)
    options = {"target_batch_size": 100, "averaging_timeout": 0.05, "step_tolerance": tolerance}
    with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
        if late:
            batch(net, opt, 0, comm.rank)
        comm.Barrier()
        if late:
            steps_of_others(opt, comm, 1)
            opt.step_aux()
            assert opt.training_state.samples_accumulated == (4 if tolerance else 0)
            assert ("drops 4 samples" in caplog.text) == (not tolerance)
        elif comm.rank == 0:
            batch(net, opt, 1, 0, 100)
        else:
            while opt.local_step == 0:
                opt.step_aux()
    assert_replicas_equal(comm, net.parameters())


# ---- states from peers -------------------------------------------------------------------------------------


def spoil(net: torch.nn.Module, seed: int) -> None:
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(seed)))


def test_one_rank_loads_parameters_optimizer_and_random_numbers(comm: Communicator) -> None:
    late = is_late(comm)
    net = mlp()
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=4 * comm.size) as opt:
        batch(net, opt, 0, comm.rank)
        while opt.local_step == 0:
            opt.step_aux()
        torch.manual_seed(40 + (1 if late else 0))
        if late:
            spoil(net, 3)
            next(iter(opt.state.values()))["exp_avg"].fill_(9.0)
            opt.load_state_from_peers()
    assert_replicas_equal(comm, net.parameters())
    assert_replicas_equal(comm, [s["exp_avg"] for s in opt.state.values()])
    assert len({tuple(draw) for draw in comm.allgather(torch.rand(3).tolist())}) == 1


def test_all_ranks_may_ask_at_once(comm: Communicator) -> None:
    net = mlp()
    before = [p.detach().clone() for p in net.parameters()]
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=4) as opt:
        for _ in range(3):
            opt.load_state_from_peers()
        assert opt.local_step == 0
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("asks", [True, False])
def test_everybody_gets_what_one_rank_has_loaded(comm: Communicator, asks: bool) -> None:
    """By asking, or in the next call of the training loop."""
    net = mlp()
    inner = adam(net.parameters())
    scheduler = torch.optim.lr_scheduler.ExponentialLR(inner, 0.5)
    saved = {}
    options = {"target_batch_size": 4, "scheduler": scheduler}
    with CollaborativeOptimizer(inner, comm, **options) as opt:
        if comm.rank == 0:
            saved = copy.deepcopy(opt.state_dict())
            saved["collaborative"].update(version=70, step=60)
            saved["collaborative"]["scheduler"]["last_epoch"] = 60
            spoil(net, 8)
            opt.load_state_dict(saved)
        comm.Barrier()
        if asks:
            opt.load_state_from_peers()
        else:
            while opt.local_step < 60:
                opt.step_aux()
        assert opt.local_step == 60
        assert scheduler.last_epoch == 60
        assert_replicas_equal(comm, net.parameters())
        batch(net, opt, 1, comm.rank)
        assert opt.local_step == 61
    assert_replicas_equal(comm, net.parameters())


def test_state_dict_resumes_and_loads_into_the_plain_optimizer(comm: Communicator) -> None:
    """Two runs of one and two steps, against three steps in one go; the plain optimizer makes the last."""
    script = [[[4] for _ in range(comm.size)]] * 3
    nets = [mlp()]
    options = {"target_batch_size": 4 * comm.size}
    state, done = None, 0
    for steps in (1, 1):
        net = copy.deepcopy(nets[-1])
        with CollaborativeOptimizer(adam(net.parameters()), comm, **options) as opt:
            if state is not None:
                opt.load_state_dict(state)
            assert opt.local_step == done
            comm.Barrier()
            for _ in range(steps):
                opt.zero_grad()
                mean_loss(net, *data(done, comm.rank, 0, 4)).backward()
                opt.step(4)
                while opt.local_step == done:
                    opt.step_aux()
                done += 1
            state = copy.deepcopy(opt.state_dict())
        nets.append(net)
    plain = adam(nets[-1].parameters())
    plain.load_state_dict(state)
    x, y = (torch.cat(parts) for parts in zip(*[data(2, r, 0, 4) for r in range(comm.size)], strict=True))
    plain.zero_grad()
    mean_loss(nets[-1], x, y).backward()
    plain.step()
    assert_close(nets[-1], reference(nets[0], script, adam))


def test_older_state_on_all_ranks_takes_them_back(comm: Communicator) -> None:
    net = mlp()
    with CollaborativeOptimizer(adam(net.parameters()), comm, target_batch_size=4 * comm.size) as opt:
        old = copy.deepcopy(opt.state_dict())
        for number in range(3):
            if number == 2:
                comm.Barrier()
                opt.load_state_dict(old)
                comm.Barrier()
            batch(net, opt, number, comm.rank)
            while opt.local_step < (1, 2, 1)[number]:
                opt.step_aux()
        assert opt.local_step == 1
    assert_replicas_equal(comm, net.parameters())


def test_state_travels_in_chunks(comm: Communicator) -> None:
    from hpcpar.optim.collaborative.replica import Packed

    contents = torch.arange(1000, dtype=torch.int64).view(torch.uint8) + comm.rank
    packed = Packed(torch.full((5,), comm.rank, dtype=torch.uint8), contents)
    exchange = StateExchange(comm, lambda: packed, chunk_bytes=300)
    donor = (comm.rank + 1) % comm.size
    abandoned = exchange.download(donor, 1)
    abandoned.abandon()
    download = exchange.download(donor, 2)
    while not download.advance():
        exchange.progress()
    assert download.chunks == -(-8000 // 300)
    assert torch.equal(download.packed.contents, contents - comm.rank + donor)
    assert download.packed.structure.tolist() == [donor] * 5
    comm.Barrier()
    exchange.free()
