"""Sharding, sums and schedules that the examples share."""

from __future__ import annotations

import argparse
import itertools

import pytest
import torch

import common


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [0, 1, 2, 3, 10, 64, 101])
def test_shards_partition_every_batch(size: int, world_size: int) -> None:
    shards = [range(size)[common.shard(size, rank, world_size)] for rank in range(world_size)]
    assert [index for shard in shards for index in shard] == list(range(size))
    lengths = [len(shard) for shard in shards]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 3, 8, 13])
def test_mean_of_local_gradients_is_gradient_of_global_mean(size: int, world_size: int) -> None:
    weight = torch.randn(5, dtype=torch.float64, requires_grad=True)
    samples = torch.randn(size, 5, dtype=torch.float64)

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(loss, weight)[0]

    local = [
        gradient(common.local_loss((samples[mine] @ weight).square().sum(), size, world_size))
        for mine in (common.shard(size, rank, world_size) for rank in range(world_size))
    ]
    expected = gradient((samples @ weight).square().mean())
    torch.testing.assert_close(torch.stack(local).mean(dim=0), expected)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.float32])
def test_broadcast_gives_every_rank_the_tensor_of_rank_0(comm, dtype: torch.dtype) -> None:
    tensor = torch.arange(6).reshape(2, 3).to(dtype) if comm.rank == 0 else None
    received = common.broadcast_tensor(tensor, comm)
    assert received.dtype == dtype
    assert received.tolist() == [[0, 1, 2], [3, 4, 5]]


def test_sum_over_ranks_adds_each_value(comm) -> None:
    assert common.sum_over_ranks(comm, comm.rank, 0.5) == [sum(range(comm.size)), 0.5 * comm.size]


def test_user_error_on_one_rank_ends_all_ranks(comm) -> None:
    def fail_on_the_last_rank() -> None:
        with common.user_errors_end_the_job(comm):
            if comm.rank == comm.size - 1:
                raise common.UserError("no such thing")

    with pytest.raises(SystemExit) as ended:
        fail_on_the_last_rank()
    assert ended.value.code == 2


def test_block_without_user_error_goes_on(comm) -> None:
    with common.user_errors_end_the_job(comm):
        pass


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "x"])
def test_learning_rate_must_be_positive_and_finite(text: str) -> None:
    with pytest.raises((argparse.ArgumentTypeError, ValueError)):
        common.positive_float(text)


def test_learning_rate_warms_up_then_falls_to_a_tenth() -> None:
    factors = [common.warmup_cosine(step, total_steps=100, warmup_steps=10) for step in range(101)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert all(after < before for before, after in itertools.pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.1)
