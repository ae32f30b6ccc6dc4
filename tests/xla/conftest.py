"""Tests of hpcpar.xla run everywhere: where torch-xla is not installed, on devices that are pretended.

The folder ``pretended`` goes to the end of ``sys.path``, where processes that a test spawns find it, too.
Programs that a test starts do not.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

PRETENDED = Path(__file__).resolve().with_name("pretended")

if importlib.util.find_spec("torch_xla") is None:
    sys.path.append(str(PRETENDED))


@pytest.fixture
def devices() -> list[torch.device]:
    """All of this process."""
    from hpcpar.xla import adapter

    return adapter.local_devices()


@pytest.fixture
def device(devices: list[torch.device]) -> torch.device:
    """One of them, for which this thread may launch."""
    from hpcpar.xla import adapter

    adapter.use_device(devices[0])
    return devices[0]
