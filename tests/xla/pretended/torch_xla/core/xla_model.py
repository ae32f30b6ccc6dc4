"""Devices ``cpu:0``, ``cpu:1``, as many as ``HPCPAR_PRETENDED_XLA_DEVICES`` says; 2 by default."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch

from torch_xla.debug import metrics

__all__ = ["get_rng_state", "get_xla_supported_devices", "send_cpu_data_to_device", "set_rng_state"]

_RANDOM_STATES: dict[str, int] = {}  # kept, and of no effect on random numbers


def get_xla_supported_devices() -> list[str]:
    return [f"cpu:{index}" for index in range(int(os.environ.get("HPCPAR_PRETENDED_XLA_DEVICES", "2")))]


def send_cpu_data_to_device(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    metrics.count_upload()
    return [tensor.detach().clone() for tensor in tensors]


def get_rng_state(device: str) -> int:
    return _RANDOM_STATES.get(device, 0)


def set_rng_state(seed: int, device: str) -> None:
    _RANDOM_STATES[device] = seed
