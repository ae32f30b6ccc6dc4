"""State of a pipeline: named as in the unsplit model, so it fits any number of ranks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError
from hpcpar.nn import Pipeline
from tests.nn.pipeline.models import (
    assert_gradients,
    assert_same_tensors,
    batch,
    mlp,
    pipeline,
    reference_step,
    squares,
    text_batch,
    text_loss,
    text_model,
    train,
)

pytestmark = pytest.mark.mpi


def with_buffers() -> nn.Sequential:
    model = text_model()
    return nn.Sequential(*model[:3], nn.BatchNorm1d(3).double(), *model[4:])


@pytest.mark.parametrize("reuse", ["route", "replicate"])
def test_full_state_is_that_of_the_unsplit_model(comm: Communicator, reuse: str) -> None:
    model = with_buffers()
    expected = model.state_dict()
    with pipeline(model, comm, microbatches=2, reuse=reuse) as pipe:
        state = pipe.state_dict()
        assert list(state) == list(expected)
        assert_same_tensors(state, expected, rtol=0.0)
        local = pipe.state_dict(full=False)
        assert_same_tensors(local, expected, rtol=0.0)
        assert sum(map(len, comm.allgather(list(local)))) == len(expected)
        fresh = with_buffers()
        fresh.load_state_dict(state)
        assert list(pipe.state_dict(prefix="model.", full=False)) == [f"model.{name}" for name in local]
        assert {name for name, _ in pipe.named_parameters(remove_duplicate=False)} <= set(expected)
        assert {name for name, _ in pipe.named_buffers()} <= set(expected)


def test_state_moves_to_other_numbers_of_ranks(comm: Communicator) -> None:
    source, target = text_model(seed=1), text_model(seed=2)
    with pipeline(source, comm, microbatches=2, reuse="replicate") as pipe:
        state = pipe.state_dict()
    fewer = comm.Split(int(comm.rank < (comm.size + 1) // 2), comm.rank)
    assert fewer is not None
    for reuse in ("route", "replicate"):
        with pipeline(target, fewer, microbatches=2, reuse=reuse, loss_fn=text_loss) as pipe:
            result = pipe.load_state_dict(state)
            assert (result.missing_keys, result.unexpected_keys) == ([], [])
            assert_same_tensors(pipe.state_dict(), source.state_dict(), rtol=0.0)
            x, tokens = text_batch(5)
            train(pipe, x, tokens)
            assert_gradients(pipe, reference_step(source, x, tokens, text_loss)[1])
    fewer.Free()
    target.load_state_dict(state)


def test_wrong_state_is_refused_where_it_is_wrong(comm: Communicator) -> None:
    with pipeline(mlp(), comm, microbatches=2) as pipe:
        state = pipe.state_dict()
        more = {**state, "99.weight": torch.zeros(1)}
        with pytest.raises(MismatchError, match=r"99\.weight.* that no stage knows"):
            pipe.load_state_dict(more)
        result = pipe.load_state_dict(more, strict=False)
        assert (result.missing_keys, result.unexpected_keys) == ([], ["99.weight"])
        own = next(iter(pipe.state_dict(full=False)))
        less = {name: tensor for name, tensor in state.items() if name != own}
        with pytest.raises(MismatchError, match=f"{own}.* missing for rank {comm.rank}"):
            pipe.load_state_dict(less)
        assert pipe.load_state_dict(less, strict=False).missing_keys == [own]
        with pytest.raises(RuntimeError, match="size mismatch"):
            pipe.load_state_dict({**state, own: torch.zeros(1)})


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Two groups, of which the second has another rate and no decay."""
    named = list(model.named_parameters())
    if not named:
        return torch.optim.AdamW([{"params": list(model.parameters())}, {"params": []}], lr=0.02)
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for _, p in named if p.dim() <= 1], "lr": 0.05, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.02)


def steps(pipe: Pipeline, optimizer: torch.optim.Optimizer, seeds: range) -> None:
    for seed in seeds:
        optimizer.zero_grad()
        train(pipe, *text_batch(5, seed))
        optimizer.step()


@pytest.mark.parametrize("reuse", ["route", "replicate"])
def test_training_goes_on_from_a_checkpoint_on_other_ranks(comm: Communicator, reuse: str) -> None:
    reference = text_model()
    optimizer = make_optimizer(reference)
    for seed in range(4):
        optimizer.zero_grad()
        x, target = text_batch(5, seed)
        text_loss(reference(x), target).backward()
        optimizer.step()
    with pipeline(text_model(), comm, microbatches=2, reuse=reuse, loss_fn=text_loss) as pipe:
        mine = make_optimizer(pipe)
        steps(pipe, mine, range(2))
        state, optimizer_state = pipe.state_dict(), pipe.optimizer_state_dict(mine)
        kept = copy.deepcopy(optimizer_state)
        assert [group["lr"] for group in optimizer_state["param_groups"]] == [0.02, 0.05]
        steps(pipe, mine, range(2, 4))
        everything = dict(reference.named_parameters(remove_duplicate=False))
        assert_same_tensors(dict(pipe.named_parameters(remove_duplicate=False)), everything)
    for name, entries in optimizer_state["state"].items():  # a state is a copy
        assert_same_tensors(entries, kept["state"][name], rtol=0.0)
    fewer = comm.Split(int(comm.rank < (comm.size + 1) // 2), comm.rank)
    assert fewer is not None
    for other_reuse in ("route", "replicate"):
        with pipeline(
            text_model(seed=5), fewer, microbatches=3, reuse=other_reuse, loss_fn=text_loss
        ) as pipe:
            mine = make_optimizer(pipe)
            pipe.load_state_dict(state)
            pipe.load_optimizer_state_dict(mine, copy.deepcopy(optimizer_state))  # torch takes it as it is
            steps(pipe, mine, range(2, 4))
            assert_same_tensors(dict(pipe.named_parameters(remove_duplicate=False)), everything)
    fewer.Free()


def test_wrong_optimizer_is_refused(comm: Communicator) -> None:
    with pipeline(mlp(), comm, microbatches=2, loss_fn=squares) as pipe:
        mine = make_optimizer(pipe)
        train(pipe, *batch(4))
        mine.step()
        state = pipe.optimizer_state_dict(mine)
        with pytest.raises(MismatchError, match="as many parameter groups as its state, got 1 groups"):
            pipe.load_optimizer_state_dict(torch.optim.AdamW(pipe.parameters()), state)
        with pytest.raises(MismatchError, match="must hold parameters of this pipeline"):
            pipe.optimizer_state_dict(torch.optim.SGD([nn.Parameter(torch.zeros(2))]))


def test_rank_without_parameters_takes_part(comm: Communicator) -> None:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 2), *(nn.Tanh() for _ in range(comm.size))).double()
    balance = [1] * (comm.size - 1) + [2]
    with pipeline(model, comm, microbatches=2, balance=balance, loss_fn=squares) as pipe:
        optimizer = torch.optim.AdamW(pipe.parameters(), lr=0.1)
        reference = torch.optim.AdamW(model.parameters(), lr=0.1)
        for seed in range(3):
            x, target = batch(5, seed)
            for one in (optimizer, reference):
                one.zero_grad()
            train(pipe, x, target)
            pipe.clip_grad_norm_(0.5)
            squares(model(x), target).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            for one in (optimizer, reference):
                one.step()
        assert_same_tensors(dict(pipe.named_parameters()), dict(model.named_parameters()), rtol=1e-6)
        assert set(pipe.optimizer_state_dict(optimizer)["state"]) == {"0.weight", "0.bias"}


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clipped_norm_is_that_of_the_unsplit_model(comm: Communicator, norm_type: float) -> None:
    x, target = text_batch(5)
    for reuse in ("route", "replicate"):
        with pipeline(text_model(), comm, microbatches=2, reuse=reuse, loss_fn=text_loss) as pipe:
            for share in (0.3, 3.0):
                model = text_model()
                text_loss(model(x), target).backward()
                norm = nn.utils.get_total_norm([p.grad for p in model.parameters()], norm_type)
                nn.utils.clip_grad_norm_(model.parameters(), share * float(norm), norm_type)
                pipe.zero_grad()
                train(pipe, x, target)
                got = pipe.clip_grad_norm_(share * float(norm), norm_type)
                assert abs(float(got) - float(norm)) <= 1e-10 * float(norm)
                named = model.named_parameters(remove_duplicate=False)
                assert_gradients(pipe, {name: p.grad for name, p in named}, (reuse, share))
