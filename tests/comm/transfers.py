"""Every operation that moves data, once, as a function from contributions to (received, expected).

``block(rank, seed)`` makes the block that a rank contributes, ``layout`` places a tensor in memory. Tests run
the table with other dtypes, layouts and communicators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from mpi4py import MPI
from torch import Tensor

from hpcpar.comm import Communicator, wait_all
from tests.comm.samples import Layout, noise

Pairs = Iterator[tuple[Tensor, Tensor]]
TAG = 7


@dataclass(frozen=True)
class Exchange:
    """What a transfer is tried with."""

    comm: Communicator
    dtype: torch.dtype
    shape: tuple[int, ...]
    layout: Layout

    def block(self, rank: int, number: int = 0) -> Tensor:
        return noise(self.dtype, self.shape, 10 * rank + number)

    def blocks(self, rank: int) -> Tensor:
        """One block for each rank, one after the other in the first dimension."""
        return torch.cat([self.block(rank, number) for number in range(self.comm.size)])

    def from_all(self, number: int = 0) -> Tensor:
        return torch.cat([self.block(rank, number) for rank in range(self.comm.size)])

    def empty(self, blocks: int = 1) -> Tensor:
        """Where to receive: full of something else."""
        first, *rest = self.shape
        return self.layout(noise(self.dtype, (blocks * first, *rest), 77))

    def sent(self, values: Tensor) -> Tensor:
        return self.layout(values)


def send_recv(x: Exchange) -> Pairs:
    left, right = (x.comm.rank - 1) % x.comm.size, (x.comm.rank + 1) % x.comm.size
    request, received = x.comm.Isend(x.sent(x.block(x.comm.rank)), right, TAG), x.empty()
    status = MPI.Status()
    x.comm.Recv(received, left, TAG, status)
    request.wait()
    assert (status.source, status.tag) == (left, TAG)
    yield received, x.block(left)
    # Blocking sends, in a chain.
    if x.comm.rank > 0:
        x.comm.Recv(received, x.comm.rank - 1)
        yield received, x.block(x.comm.rank - 1, 1)
    if x.comm.rank < x.comm.size - 1:
        x.comm.Send(x.sent(x.block(x.comm.rank, 1)), x.comm.rank + 1)


def isend_irecv(x: Exchange) -> Pairs:
    """All pairs at once, received in the other order."""
    received = [x.empty() for _ in range(x.comm.size)]
    requests = [x.comm.Irecv(received[rank], rank, TAG) for rank in range(x.comm.size)]
    requests += [x.comm.Isend(x.sent(x.block(x.comm.rank, rank)), rank, TAG) for rank in range(x.comm.size)]
    wait_all(reversed(requests))
    for rank in range(x.comm.size):
        yield received[rank], x.block(rank, x.comm.rank)


def sendrecv(x: Exchange) -> Pairs:
    left, right = (x.comm.rank - 1) % x.comm.size, (x.comm.rank + 1) % x.comm.size
    received, status = x.empty(), MPI.Status()
    x.comm.Sendrecv(x.sent(x.block(x.comm.rank)), right, TAG, received, left, TAG, status)
    assert (status.source, status.tag) == (left, TAG)
    yield received, x.block(left)


def bcast(x: Exchange) -> Pairs:
    for root in range(x.comm.size):
        buffer = x.sent(x.block(root)) if x.comm.rank == root else x.empty()
        x.comm.Bcast(buffer, root)
        yield buffer, x.block(root)


def ibcast(x: Exchange) -> Pairs:
    buffers = [x.sent(x.block(root)) if x.comm.rank == root else x.empty() for root in range(x.comm.size)]
    wait_all(x.comm.Ibcast(buffer, root) for root, buffer in enumerate(buffers))
    for root, buffer in enumerate(buffers):
        yield buffer, x.block(root)


def allgather(x: Exchange) -> Pairs:
    received = x.empty(x.comm.size)
    x.comm.Allgather(x.sent(x.block(x.comm.rank)), received)
    yield received, x.from_all()


def allgather_in_place(x: Exchange) -> Pairs:
    received = x.empty(x.comm.size)
    _own_block(x, received).copy_(x.block(x.comm.rank))
    x.comm.Allgather(MPI.IN_PLACE, received)
    yield received, x.from_all()


def iallgather(x: Exchange) -> Pairs:
    received = x.empty(x.comm.size)
    x.comm.Iallgather(x.sent(x.block(x.comm.rank)), received).wait()
    yield received, x.from_all()


def gather(x: Exchange) -> Pairs:
    for root in range(x.comm.size):
        received = x.empty(x.comm.size)
        untouched = received.clone()
        x.comm.Gather(x.sent(x.block(x.comm.rank)), received if root else _only_on(x, root, received), root)
        yield received, x.from_all() if x.comm.rank == root else untouched


def gather_in_place(x: Exchange) -> Pairs:
    received = x.empty(x.comm.size)
    _own_block(x, received).copy_(x.block(x.comm.rank))
    if x.comm.rank == 0:
        x.comm.Gather(MPI.IN_PLACE, received)
        yield received, x.from_all()
    else:
        x.comm.Gather(x.sent(x.block(x.comm.rank)), None)


def scatter(x: Exchange) -> Pairs:
    for root in range(x.comm.size):
        received = x.empty()
        x.comm.Scatter(_only_on(x, root, x.sent(x.blocks(root))), received, root)
        yield received, x.block(root, x.comm.rank)


def scatter_in_place(x: Exchange) -> Pairs:
    root, received = x.comm.size - 1, x.empty()
    x.comm.Scatter(x.sent(x.blocks(root)), MPI.IN_PLACE if x.comm.rank == root else received, root)
    if x.comm.rank != root:
        yield received, x.block(root, x.comm.rank)


def alltoall(x: Exchange) -> Pairs:
    received = x.empty(x.comm.size)
    x.comm.Alltoall(x.sent(x.blocks(x.comm.rank)), received)
    yield received, x.from_all(x.comm.rank)


def alltoall_in_place(x: Exchange) -> Pairs:
    buffer = x.sent(x.blocks(x.comm.rank))
    x.comm.Alltoall(MPI.IN_PLACE, buffer)
    yield buffer, x.from_all(x.comm.rank)


def ialltoall(x: Exchange) -> Pairs:
    received = x.empty(x.comm.size)
    x.comm.Ialltoall(x.sent(x.blocks(x.comm.rank)), received).wait()
    yield received, x.from_all(x.comm.rank)


def allgatherv(x: Exchange) -> Pairs:
    """Rank r contributes r elements fewer than a block; packed, then with gaps that keep their contents."""
    n, size = x.block(0).numel(), x.comm.size
    counts = [max(n - rank, 0) for rank in range(size)]
    for displs in (None, [n * rank for rank in reversed(range(size))]):
        received = x.empty(size)
        expected = received.clone(memory_format=torch.contiguous_format).view(-1)
        for rank, displ in enumerate(displs or _packed(counts)):
            expected[displ : displ + counts[rank]] = x.block(rank).reshape(-1)[: counts[rank]]
        mine = x.block(x.comm.rank).reshape(-1)[: counts[x.comm.rank]]
        x.comm.Allgatherv(mine, [received, counts] if displs is None else [received, counts, displs])
        yield received, expected.view(received.shape)


def allgatherv_in_place(x: Exchange) -> Pairs:
    n, size = x.block(0).numel(), x.comm.size
    counts = [n - n % (rank + 2) for rank in range(size)]
    received = x.empty(size)
    flat = received.clone(memory_format=torch.contiguous_format).view(-1)
    start, expected = n * x.comm.rank, flat.clone()
    flat[start : start + counts[x.comm.rank]] = x.block(x.comm.rank).reshape(-1)[: counts[x.comm.rank]]
    received.copy_(flat.view(received.shape))
    for rank, count in enumerate(counts):
        expected[n * rank : n * rank + count] = x.block(rank).reshape(-1)[:count]
    x.comm.Allgatherv(MPI.IN_PLACE, [received, (counts, [n * rank for rank in range(size)])])
    yield received, expected.view(received.shape)


def alltoallv(x: Exchange) -> Pairs:
    yield from _vector_exchange(x, lambda *buffers: x.comm.Alltoallv(*buffers))


def ialltoallv(x: Exchange) -> Pairs:
    yield from _vector_exchange(x, lambda *buffers: x.comm.Ialltoallv(*buffers).wait())


def alltoallv_in_place(x: Exchange) -> Pairs:
    buffer = x.sent(x.blocks(x.comm.rank))
    x.comm.Alltoallv(MPI.IN_PLACE, buffer)
    yield buffer, x.from_all(x.comm.rank)


def _vector_exchange(x: Exchange, call: Callable[..., None]) -> Pairs:
    """Rank r sends (r + s) mod 3 elements to rank s; received parts lie in reverse, with gaps."""
    rank, size, n = x.comm.rank, x.comm.size, x.block(0).numel()

    def count(source: int, destination: int) -> int:
        return min((source + destination) % 3 * max(n // 2 - 1, 1), n)

    received, displs = x.empty(size), [n * source for source in reversed(range(size))]
    expected = received.clone(memory_format=torch.contiguous_format).view(-1)
    for source in range(size):
        part = x.block(source, rank).reshape(-1)[: count(source, rank)]
        expected[displs[source] : displs[source] + part.numel()] = part
    sending = [x.sent(x.blocks(rank)), [count(rank, r) for r in range(size)], [n * r for r in range(size)]]
    call(sending, [received, ([count(r, rank) for r in range(size)], displs)])
    yield received, expected.view(received.shape)


def _packed(counts: Sequence[int]) -> list[int]:
    return [sum(counts[:rank]) for rank in range(len(counts))]


def _only_on(x: Exchange, root: int, buffer: Tensor) -> Tensor | None:
    return buffer if x.comm.rank == root else None


def _own_block(x: Exchange, buffer: Tensor) -> Tensor:
    rows = x.shape[0]
    return buffer[x.comm.rank * rows : (x.comm.rank + 1) * rows]


TRANSFERS: dict[str, Callable[[Exchange], Pairs]] = {
    "Send Recv": send_recv,
    "Isend Irecv": isend_irecv,
    "Sendrecv": sendrecv,
    "Bcast": bcast,
    "Ibcast": ibcast,
    "Allgather": allgather,
    "Allgather in place": allgather_in_place,
    "Iallgather": iallgather,
    "Gather": gather,
    "Gather in place": gather_in_place,
    "Scatter": scatter,
    "Scatter in place": scatter_in_place,
    "Alltoall": alltoall,
    "Alltoall in place": alltoall_in_place,
    "Ialltoall": ialltoall,
    "Allgatherv": allgatherv,
    "Allgatherv in place": allgatherv_in_place,
    "Alltoallv": alltoallv,
    "Ialltoallv": ialltoallv,
    "Alltoallv in place": alltoallv_in_place,
}
