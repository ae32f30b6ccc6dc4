"""The one file that calls torch_xla (2.9): another version, or what succeeds it, touches nothing else.

torch-xla is lazy: an operation on a device's tensors only notes what to compute. :func:`launch` hands all
that was noted to the device, compiled into one graph, and does not wait for it; the same notes again find the
compiled graph again. :func:`download` waits. Which device :func:`launch` means is a matter of each thread,
said by :func:`use_device`.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


@contextmanager
def _root_logger_kept() -> Iterator[None]:
    """torch-xla gives the root logger a handler, which would take hpcpar's records from its own."""
    root = logging.getLogger()
    handlers = list(root.handlers)
    try:
        yield
    finally:
        root.handlers[:] = handlers


try:
    with _root_logger_kept():
        import torch_xla
        import torch_xla.core.xla_model as xm
        import torch_xla.debug.metrics as metrics
except (ImportError, OSError) as error:  # OSError: a library that does not fit this torch
    raise ImportError(
        "hpcpar.xla must have torch-xla, of the same release as torch, got "
        f"{type(error).__name__}: {error}. Install both, such as: pip install 'hpcpar[xla]' torch==2.9.0 "
        f"torch_xla==2.9.0; torch here is {torch.__version__}",
        name="torch_xla",
    ) from error

__all__ = [
    "compilations",
    "download",
    "downloads",
    "launch",
    "local_devices",
    "random_state",
    "set_random_state",
    "upload",
    "uploads",
    "use_device",
]


def local_devices() -> list[torch.device]:
    """The devices that this process may use. Local. Starts the runtime."""
    with _root_logger_kept():
        return [torch.device(name) for name in xm.get_xla_supported_devices()]


def use_device(device: torch.device) -> None:
    """From now on :func:`launch` in this thread means this one. Local."""
    torch_xla.device(device.index)


def upload(tensors: Sequence[torch.Tensor], device: torch.device) -> list[torch.Tensor]:
    """Copies of host tensors on a device, in one transfer. Local.

    The host tensors may be written to as soon as this returns.
    """
    if not tensors:
        return []
    copies: list[torch.Tensor] = xm.send_cpu_data_to_device([t.detach() for t in tensors], device)
    return copies


def launch() -> None:
    """Start what was noted for this thread's device; compiles it when it is new. Local, does not wait."""
    torch_xla.sync()


def download(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the host, in one transfer. Local, waits for the device."""
    return tensor.cpu()


def random_state(device: torch.device) -> int:
    """State of a device's random generator. Local."""
    return int(xm.get_rng_state(str(device)))


def set_random_state(device: torch.device, state: int) -> None:
    """Seed a device's random generator, or put it back to an earlier state. Local."""
    xm.set_rng_state(state, str(device))


def compilations() -> int:
    """Graphs that this process has compiled so far. Local."""
    return int(metrics.counter_value("UncachedCompile") or 0)


def downloads() -> int:
    """Transfers from devices to the host so far. Local."""
    return _samples("TransferFromDeviceTime")


def uploads() -> int:
    """Transfers from the host to devices so far. Local."""
    return _samples("TransferToDeviceTime")


def _samples(metric: str) -> int:
    data = metrics.metric_data(metric)
    return 0 if data is None else int(data[0])
