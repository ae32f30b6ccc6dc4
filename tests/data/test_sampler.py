from __future__ import annotations

import random
from itertools import islice
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from hpcpar.comm import Communicator
from hpcpar.data import DistributedSampler
from hpcpar.errors import MismatchError
from tests.data.files import PROPERTY

local = pytest.mark.local


def sampler(length: int, rank: int = 0, ranks: int = 1, **options: Any) -> DistributedSampler:
    made = DistributedSampler(length, **options)
    made._rank, made._ranks = rank, ranks
    return made


@local
@PROPERTY
@given(st.integers(0, 50), st.lists(st.tuples(st.integers(1, 6), st.integers(0, 9)), max_size=4))
def test_interruptions_lose_and_repeat_nothing(length: int, runs: list[tuple[int, int]]) -> None:
    seen: list[int] = []
    state = sampler(length).state_dict()
    for ranks, taken in [*runs, (3, length)]:
        everyone = [sampler(length, rank, ranks) for rank in range(ranks)]
        for own in everyone:
            own.load_state_dict(state)
            size = len(own)
            indices = list(own)
            assert size == len(indices)
            seen += indices[:taken]
            own.load_state_dict(state)
        state = everyone[0].state_dict(taken)
    assert sorted(seen) == list(range(length))


@local
@PROPERTY
@given(st.integers(0, 50), st.lists(st.lists(st.integers(0, 9), min_size=1, max_size=6), max_size=4))
def test_ranks_at_paces_of_their_own_lose_and_repeat_nothing(length: int, runs: list[list[int]]) -> None:
    seen: list[int] = []
    state = sampler(length).state_dict()
    for run in [*runs, [length] * 3]:
        taken = []
        for rank, samples in enumerate(run):
            own = sampler(length, rank, len(run))
            own.load_state_dict(state)
            indices = list(islice(own, samples))
            seen += indices
            taken.append(len(indices))
        state = own._state(taken)
    assert sorted(seen) == list(range(length))
    assert (state["consumed"], state["rounds"]) == (length, [])


@local
def test_a_look_at_the_first_index_does_not_use_up_what_was_loaded() -> None:
    own, other = sampler(20), sampler(20)
    other.load_state_dict(own.state_dict(15))
    next(iter(other))
    assert list(other) == list(own)[15:]
    assert len(other) == 20 and other.state_dict()["consumed"] == 20


@local
@pytest.mark.parametrize("steps", [0, 3, 5])
def test_a_restart_forgets_what_was_loaded_and_handed_out(steps: int) -> None:
    own, other = sampler(20), sampler(20)
    other.load_state_dict(own.state_dict(15))
    for _ in islice(other, steps):
        continue
    other.restart()
    assert len(other) == 20 and list(other) == list(own)


@local
def test_global_batches_do_not_depend_on_the_number_of_ranks() -> None:
    def batches(ranks: int) -> list[set[int]]:
        shares = [list(sampler(24, rank, ranks)) for rank in range(ranks)]
        each = 12 // ranks
        return [{i for share in shares for i in share[at * each : (at + 1) * each]} for at in range(2)]

    assert batches(1) == batches(2) == batches(3) == batches(4)


@local
def test_the_same_ranks_go_on_in_the_same_order() -> None:
    for rank in range(3):
        whole = list(sampler(20, rank, 3))
        own = sampler(20, rank, 3)
        taken = [index for index, _ in zip(own, range(4), strict=False)]
        other = sampler(20, rank, 3)
        other.load_state_dict(own.state_dict(4))
        assert taken + list(other) == whole
        assert list(other) == whole  # later on an epoch is whole again


@local
def test_epochs_differ_and_the_global_generators_are_left_alone() -> None:
    own = sampler(30)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    first = list(own)
    assert list(own) == first
    own.set_epoch(1)
    assert list(own) != first and sorted(own) == sorted(first)
    assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[2]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert list(sampler(5, shuffle=False)) == [0, 1, 2, 3, 4]


@local
def test_a_loader_without_workers_is_counted_exactly() -> None:
    own = sampler(20, 1, 2)
    loader = DataLoader(torch.arange(20), batch_size=3, sampler=own)
    batches = iter(loader)
    seen = [*next(batches).tolist(), *next(batches).tolist()]
    other = sampler(20, 1, 2)
    other.load_state_dict(own.state_dict())
    assert sorted(seen + list(other)) == sorted(sampler(20, 1, 2))
    own.set_epoch(1)
    list(batches)  # what goes on of an earlier epoch is not counted
    assert own.state_dict()["consumed"] == 0


@local
@pytest.mark.parametrize(
    ("change", "message"),
    [({"length": 21}, "length 21"), ({"seed": 9}, "seed 9"), ({"shuffle": None}, "shuffle")],
)
def test_a_foreign_state_is_refused(change: dict[str, Any], message: str) -> None:
    own = sampler(20)
    with pytest.raises(ValueError, match=message):
        own.load_state_dict({**own.state_dict(), **change})
    for wrong in ({"consumed": 21}, {"rounds": [[11, 10]]}, {"consumed": 15, "rounds": [[1, 1], [4]]}):
        with pytest.raises(ValueError, match="must have consumed some of 20"):
            own.load_state_dict({**own.state_dict(), **wrong})
    with pytest.raises(ValueError, match="got none of"):
        own.load_state_dict({"epoch": 1})


@local
def test_wrong_arguments_are_named() -> None:
    with pytest.raises(TypeError, match="dataset must have a length"):
        DistributedSampler(iter([1]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be"):
        DistributedSampler(3, seed=-1)
    for length in (np.int64(5), torch.tensor(5), [0] * 5, torch.zeros(5)):
        assert sorted(DistributedSampler(length, seed=np.int64(1))) == [0, 1, 2, 3, 4]  # type: ignore[arg-type]


def test_ranks_share_exactly_and_states_are_equal(comm: Communicator) -> None:
    own = DistributedSampler(range(4 * comm.size + 1), comm, seed=3)
    everything = comm.allgather(list(own))
    assert sorted(i for share in everything for i in share) == list(range(4 * comm.size + 1))
    assert len({str(state) for state in comm.allgather(own.state_dict(2))}) == 1
    assert own.state_dict()["consumed"] == 4 * comm.size + 1  # at the end, too
    own.set_epoch(1)
    taken = list(islice(own, comm.rank + 1))
    state = own.gather_state()
    assert comm.allgather(state) == [state] * comm.size
    own.load_state_dict(state)
    everything = comm.allgather(taken + list(own))
    assert sorted(i for share in everything for i in share) == list(range(4 * comm.size + 1))


@pytest.mark.mpi(min_size=2)
def test_what_differs_between_ranks_is_an_error_on_all(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match="9 samples"):
        DistributedSampler(9 if comm.rank == 1 else 8, comm)
    with pytest.raises((MismatchError, ValueError), match="seed must be"):
        DistributedSampler(8, comm, seed=-1 if comm.rank == 1 else 0)
    own = DistributedSampler(8, comm, seed=np.int64(3) if comm.rank == 1 else 3)
    with pytest.raises((MismatchError, ValueError), match="samples must be"):
        own.gather_state(-1 if comm.rank == 1 else 0)
    own.set_epoch(comm.rank)
    with pytest.raises(MismatchError, match="epoch 1"):
        own.gather_state(0)
