"""A state file gives back what was written, and says what is wrong with what was not."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch

from hpcpar.checkpoint import read_state, write_state
from hpcpar.errors import CheckpointError

pytestmark = pytest.mark.local

STATE = {
    "none": None,
    "flags": (True, False),
    "numbers": [1, -(2**62), 2.5, math.inf],
    "text": "größer",
    "groups": {0: {"lr": 0.1, "params": [0, 1]}, "a": {}, None: (), 1.5: []},
}
DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int64, torch.float16, torch.bfloat16, torch.float32,
    torch.float64, torch.complex64, torch.float8_e4m3fn,
]  # fmt: skip


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    write_state(tmp_path / "new" / "state.h5", STATE)
    assert read_state(tmp_path / "new" / "state.h5") == STATE


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (2, 3, 4)], ids=str)
def test_tensors_come_back_bit_for_bit(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensor = (torch.randn(shape) * 3).to(dtype)
    write_state(tmp_path / "state.h5", [tensor, tensor.T if tensor.ndim == 2 else tensor])
    read, transposed = read_state(tmp_path / "state.h5")
    assert read.dtype == dtype and read.shape == tensor.shape
    assert torch.equal(_bits(read), _bits(tensor))
    assert transposed.shape == (tensor.T if tensor.ndim == 2 else tensor).shape


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0)


def test_state_of_a_module_and_an_optimizer_goes_on_exactly(tmp_path: Path) -> None:
    net = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    write_state(tmp_path / "state.h5", {"net": dict(net.state_dict()), "optimizer": optimizer.state_dict()})
    state = read_state(tmp_path / "state.h5")
    twin = torch.nn.Linear(3, 3)
    twin.load_state_dict(state["net"])
    other = torch.optim.AdamW(twin.parameters())
    other.load_state_dict(state["optimizer"])
    for parameter, twins in zip(net.parameters(), twin.parameters(), strict=True):
        twins.grad = parameter.grad
    optimizer.step()
    other.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("value", [object(), {"a": {1, 2}}, [lambda: 0], {(1, 2): 3}], ids=str)
def test_what_a_file_cannot_hold_is_named(value: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="state"):
        write_state(tmp_path / "state.h5", value)
    assert list(tmp_path.iterdir()) == []


def test_missing_foreign_truncated_and_damaged_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "state.h5"
    with pytest.raises(CheckpointError, match=r"state\.h5 must be a file"):
        read_state(path)
    path.write_bytes(b"not HDF5 at all")
    with pytest.raises(CheckpointError, match=r"state\.h5 must be a whole state"):
        read_state(path)
    with h5py.File(path, "w") as file:
        file["data"] = [1, 2]
    with pytest.raises(CheckpointError, match="another HDF5 file"):
        read_state(path)
    write_state(path, {"x": torch.arange(1000.0)})
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"state\.h5 must be a whole state"):
        read_state(path)
    place = whole.index(torch.arange(1000.0).numpy().tobytes()) + 40
    path.write_bytes(whole[:place] + b"?" + whole[place + 1 :])
    with pytest.raises(CheckpointError, match="checksum"):
        read_state(path)


def test_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="must be writable"):
        write_state(tmp_path / "file" / "state.h5", {})


def test_writer_that_dies_leaves_a_whole_file(tmp_path: Path) -> None:
    """Kill a process that writes again and again, at different moments."""
    script = (
        "import sys, torch; from hpcpar.checkpoint import write_state\n"
        "for n in range(10**6): write_state(sys.argv[1], {'n': n, 'x': torch.full((200_000,), float(n))}); "
        "print(n, flush=True)\n"
    )
    path = tmp_path / "state.h5"
    for delay_s in (0.0, 0.003, 0.011):
        command = [sys.executable, "-c", script, str(path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(delay_s)
            os.kill(process.pid, signal.SIGKILL)
        state = read_state(path)
        assert torch.equal(state["x"], torch.full((200_000,), float(state["n"])))
