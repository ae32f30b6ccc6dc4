"""Buckets: a plan is complete and aligned, and a view looks like the tensor that it stands for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hpcpar.comm import plan_buckets, view_slot

TENSORS = [
    torch.zeros(5, 3),
    torch.zeros(()),
    torch.zeros(7, dtype=torch.bfloat16),
    torch.zeros(0, 4),
    torch.zeros(3, dtype=torch.complex64),
    torch.zeros(0, dtype=torch.complex128),
    torch.zeros(2, 2, dtype=torch.float64),
    torch.zeros(100),
    torch.zeros(2, 3, 4, 5).to(memory_format=torch.channels_last),
    torch.zeros(4, 6).t(),
    torch.zeros(1, 6, 1).transpose(0, 1),
    torch.zeros(6, 8)[:, ::2],
    torch.zeros(1).expand(4),
]


@pytest.mark.parametrize("bucket_bytes", [0, 1, 64, 400, 1 << 20])
def test_every_tensor_has_one_aligned_slot_of_its_own(bucket_bytes: int) -> None:
    layouts = plan_buckets(TENSORS, bucket_bytes)
    slots = [slot for layout in layouts for slot in layout.slots]
    assert sorted(slot.index for slot in slots) == list(range(len(TENSORS)))
    for layout in layouts:
        end = 0
        for slot in layout.slots:
            assert slot.offset >= end
            assert slot.offset * layout.dtype.itemsize % 64 == 0
            assert layout.dtype == TENSORS[slot.index].dtype.to_real()
            end = slot.offset + slot.length
        assert end <= layout.numel
        assert layout.nbytes == layout.numel * layout.dtype.itemsize


def test_bucket_is_closed_when_it_has_reached_its_size() -> None:
    tensors = [torch.zeros(16) for _ in range(5)]
    assert [len(layout.slots) for layout in plan_buckets(tensors, 128)] == [2, 2, 1]
    assert [len(layout.slots) for layout in plan_buckets(tensors, 0)] == [1] * 5
    assert len(plan_buckets(tensors, 1 << 20)) == 1
    assert plan_buckets([], 10) == []


def test_buckets_are_in_the_order_in_which_they_fill() -> None:
    tensors = [torch.zeros(4), torch.zeros(4, dtype=torch.float64), torch.zeros(4), torch.zeros(4).bfloat16()]
    layouts = plan_buckets(tensors, 1 << 20)
    assert [layout.dtype for layout in layouts] == [torch.float64, torch.float32, torch.bfloat16]


def dense(tensor: Tensor) -> bool:
    return tensor.is_contiguous() or tensor.t().is_contiguous() if tensor.dim() == 2 else tensor.dim() == 4


@pytest.mark.parametrize("bucket_bytes", [0, 1 << 20])
def test_views_have_dtype_shape_and_strides_and_do_not_overlap(bucket_bytes: int) -> None:
    layouts = plan_buckets(TENSORS, bucket_bytes)
    views: dict[int, Tensor] = {}
    for layout in layouts:
        flat = torch.zeros(layout.numel, dtype=layout.dtype)
        for slot in layout.slots:
            view = views[slot.index] = view_slot(flat, slot, TENSORS[slot.index])
            view.fill_(slot.index + 1)
            if view.numel():
                assert view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr()
    for index, tensor in enumerate(TENSORS):
        view = views[index]
        assert (view.dtype, view.shape) == (tensor.dtype, tensor.shape)
        assert bool((view == index + 1).all())
        if tensor.numel() and dense(tensor):
            assert view.stride() == tensor.stride()
        else:
            assert view.is_contiguous()
