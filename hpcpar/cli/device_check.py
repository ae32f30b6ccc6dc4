"""Are GPU buffers safe in the hands of this MPI? A ring of messages that are compared afterwards.

A library that claims to know GPU memory may copy it wrongly, too early, or only in part. hpcpar itself never
hands it any: it stages through pinned host memory. Programs that do want to know.

Each rank sends a pattern of its own to the next and compares what came from the one before, for sizes on both
sides of the library's usual protocol changes::

    rank 0 --> rank 1 --> rank 2 --> rank 0

The message is a parameter, so that a fake one that corrupts data proves the test.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from hpcpar.comm import MPI, Communicator

__all__ = ["CRASHED", "DeviceVerdict", "Exchange", "check_device_messages"]

Exchange = Callable[[torch.Tensor, torch.Tensor, int, int], None]
"""Sends its first argument to a rank (the third) and receives its second from another (the fourth)."""

_SIZES = (8, 4 << 10, 256 << 10, 4 << 20)
_ROUNDS = 3

CRASHED = (
    "this process ended while MPI sent device buffers, which it claims to support. Do not hand it any; "
    "hpcpar "
    "does not, it stages through host memory"
)
"""What a watcher should say when the test ends the process."""


@dataclass(frozen=True)
class DeviceVerdict:
    """What came of it: the sizes in bytes at which data arrived wrongly, on any rank."""

    ranks: int
    sizes: tuple[int, ...]
    wrong: tuple[int, ...]

    @property
    def summary(self) -> str:
        """One sentence."""
        if not self.wrong:
            return f"device buffers arrive unharmed over {self.ranks} rank(s)"
        return f"device buffers ARRIVE CORRUPTED at sizes of {', '.join(map(str, self.wrong))} bytes"


def check_device_messages(
    comm: Communicator, device: torch.device | None = None, exchange: Exchange | None = None
) -> DeviceVerdict:
    """Send device buffers around the ring and compare. Collective.

    Parameters
    ----------
    comm
        The ranks.
    device
        Where the buffers live; by default a GPU by the rank's place on its node.
    exchange
        What sends and receives, by default MPI with the addresses on the device.
    """
    if device is None:
        device = torch.device("cuda", comm.node.rank % torch.cuda.device_count())
    move = exchange if exchange is not None else _exchange(comm)
    wrong = {nbytes for nbytes in _SIZES if not _arrives(comm, device, nbytes, move)}
    everywhere = set().union(*comm.allgather(wrong))
    return DeviceVerdict(comm.size, _SIZES, tuple(sorted(everywhere)))


def _arrives(comm: Communicator, device: torch.device, nbytes: int, exchange: Exchange) -> bool:
    right, left = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    intact = True
    for turn in range(_ROUNDS):
        received = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        exchange(_pattern(nbytes, comm.rank, turn, device), received, right, left)
        intact &= bool(torch.equal(received, _pattern(nbytes, left, turn, device)))
    return intact


def _pattern(nbytes: int, rank: int, turn: int, device: torch.device) -> torch.Tensor:
    """Bytes that differ between neighbours, turns and ranks."""
    numbers = (torch.arange(251, device=device) * 7 + 31 * rank + 101 * turn + 1) % 251
    return numbers.to(torch.uint8).repeat(-(-nbytes // 251))[:nbytes].contiguous()


def _exchange(comm: Communicator) -> Exchange:
    def exchange(sent: torch.Tensor, received: torch.Tensor, target: int, source: int) -> None:
        torch.cuda.synchronize(sent.device)  # MPI knows nothing of streams
        comm.mpi.Sendrecv(_memory(sent), target, 0, _memory(received), source, 0)
        torch.cuda.synchronize(sent.device)

    return exchange


def _memory(tensor: torch.Tensor) -> list[object]:
    return [MPI.memory.fromaddress(tensor.data_ptr(), tensor.nbytes), MPI.BYTE]
