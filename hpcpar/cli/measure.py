"""How fast ranks talk: latency and bandwidth of pairs, allreduce, and copying memory as the yardstick.

Pairs are chosen from the topology and measured one after the other while everybody else sleeps, so that each
has the machine for itself::

    node 0   rank 0 <- inside a node -> rank 1
               ^
               between nodes
               v
    node 1   rank 2 <- inside a node -> rank 3

Times are medians of as many repetitions as fit the budget; the first rank of a pair, or rank 0, decides how
many that are after a trial, and tells the others. Messages go through MPI's own calls: what is measured is
the library and what is below it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from hpcpar.comm import MPI, BucketLayout, Communicator, NodeMap, Reducer

__all__ = [
    "AllreduceResult",
    "Pair",
    "PairResult",
    "choose_pairs",
    "measure_allreduce",
    "measure_memcpy",
    "measure_pair",
]

_FEWEST, _MOST = 3, 2000
_WINDOW_BYTES, _LONGEST_WINDOW = 64 << 20, 32


@dataclass(frozen=True)
class Pair:
    """Two ranks, and whether they are on one node (as ``HPCPAR_RANKS_PER_NODE`` has it)."""

    first: int
    second: int
    one_node: bool


@dataclass(frozen=True)
class PairResult:
    """What a pair achieved with messages of one size.

    ``latency_s`` is half of a round trip, ``bytes_per_s`` that of several messages in flight one way. The
    medians; ``best_latency_s`` and ``best_bytes_per_s`` are what other users of the cores disturbed least.
    """

    pair: Pair
    nbytes: int
    latency_s: float
    bytes_per_s: float
    best_latency_s: float
    best_bytes_per_s: float


@dataclass(frozen=True)
class AllreduceResult:
    """Seconds for one float32 buffer, by MPI's own call and by hpcpar's reducer, slowest rank."""

    nbytes: int
    mpi_s: float
    reducer_s: float
    transport: str


def choose_pairs(nodes: NodeMap, limit: int = 2) -> list[Pair]:
    """Pairs inside of nodes and between neighbouring nodes, at most ``limit`` of each kind. Local.

    The nodes are spread evenly over the job; the first ranks of a node stand for it.
    """
    members = [nodes.ranks_of(node) for node in range(nodes.num_nodes)]
    inside = [Pair(ranks[0], ranks[1], True) for ranks in members if len(ranks) > 1]
    between = [Pair(a[0], b[0], False) for a, b in pairwise(members)]
    return _spread(inside, limit) + _spread(between, limit)


def _spread(pairs: Sequence[Pair], limit: int) -> list[Pair]:
    if len(pairs) <= limit:
        return list(pairs)
    last = max(limit - 1, 1)
    return [pairs[index * (len(pairs) - 1) // last] for index in range(limit)]


def measure_pair(comm: Communicator, pair: Pair, nbytes: int, seconds: float) -> PairResult:
    """Latency and bandwidth of one pair; all get the result. Collective.

    Parameters
    ----------
    comm
        The ranks.
    pair
        Who talks.
    nbytes
        Size of a message, in bytes.
    seconds
        For all repetitions together.
    """
    mine: tuple[list[float], list[float]] | None = None
    if comm.rank in (pair.first, pair.second):
        partner = pair.second if comm.rank == pair.first else pair.first
        mine = _talk(comm, partner, comm.rank == pair.first, nbytes, seconds)
    comm.Barrier()  # polls and sleeps: the others do not take the cores of those who talk
    rounds, windows = comm.bcast(mine, root=pair.first)
    size = _window(nbytes) * nbytes
    return PairResult(
        pair,
        nbytes,
        statistics.median(rounds) / 2,
        size / statistics.median(windows),
        min(rounds) / 2,
        size / min(windows),
    )


def _talk(
    comm: Communicator, partner: int, leads: bool, nbytes: int, seconds: float
) -> tuple[list[float], list[float]]:
    """Seconds of round trips, and of windows of messages; of use on the rank that leads."""
    mpi = comm.mpi
    buffers = np.zeros((2, nbytes), dtype=np.uint8)
    word = np.zeros(1, dtype=np.uint8)

    def ping_pong() -> None:
        if leads:
            mpi.Send(buffers[0], partner)
        mpi.Recv(buffers[1], partner)
        if not leads:
            mpi.Send(buffers[0], partner)

    def window() -> None:
        count = _window(nbytes)
        if leads:
            MPI.Request.Waitall([mpi.Isend(buffers[0], partner) for _ in range(count)])
            mpi.Recv(word, partner)
        else:
            MPI.Request.Waitall([mpi.Irecv(buffers[1], partner) for _ in range(count)])
            mpi.Send(word, partner)

    def agree_on(count: int) -> int:
        number = np.array([count])
        (mpi.Send if leads else mpi.Recv)(number, partner)
        return int(number[0])

    return _times(ping_pong, agree_on, seconds / 2), _times(window, agree_on, seconds / 2)


def _window(nbytes: int) -> int:
    return max(2, min(_LONGEST_WINDOW, _WINDOW_BYTES // nbytes))


def _times(run: Callable[[], None], agree_on: Callable[[int], int], seconds: float) -> list[float]:
    """Seconds of each run; how many is what a trial says fits, as ``agree_on`` passes it on."""
    run()
    start = time.perf_counter()
    run()
    trial_s = max(time.perf_counter() - start, 1e-7)
    samples = []
    for _ in range(agree_on(max(_FEWEST, min(_MOST, int(seconds / trial_s))))):
        start = time.perf_counter()
        run()
        samples.append(time.perf_counter() - start)
    return samples


def measure_memcpy(comm: Communicator | None, nbytes: int, seconds: float) -> float:
    """Bytes per second that each rank copies while all do, the slowest rank's. Collective."""
    source, target = torch.zeros(nbytes, dtype=torch.uint8), torch.zeros(nbytes, dtype=torch.uint8)

    def run() -> None:
        target.copy_(source)

    if comm is None:
        return nbytes / statistics.median(_times(run, int, seconds))
    comm.Barrier()
    times = _times(run, lambda count: int(comm.bcast(count)), seconds)
    slowest_s = max(comm.allgather(statistics.median(times)))
    return float(nbytes / slowest_s)


def measure_allreduce(comm: Communicator, nbytes: int, seconds: float) -> AllreduceResult:
    """One float32 buffer, reduced by MPI and by hpcpar's reducer. Collective.

    Each rank writes the buffer before each run, as a backward pass would; that is not counted.
    """
    numel = max(1, nbytes // 4)
    buffer = torch.zeros(numel)
    reducer = Reducer(comm, [BucketLayout(torch.float32, numel)], name="measured reduction")
    times: dict[str, list[float]] = {"mpi": [], "reducer": []}

    def by_mpi() -> None:
        comm.mpi.Allreduce(MPI.IN_PLACE, buffer.numpy())

    def by_reducer() -> None:
        reducer.begin()
        reducer.publish(0)
        reducer.wait_all()

    def timed(name: str, run: Callable[[], None], target: torch.Tensor) -> float:
        target.fill_(1.0)
        comm.mpi.Barrier()
        start = time.perf_counter()
        run()
        times[name].append(time.perf_counter() - start)
        return times[name][-1]

    def round_() -> float:
        return timed("mpi", by_mpi, buffer) + timed("reducer", by_reducer, reducer.flats[0])

    round_()
    trial_s = max(round_(), 1e-7)
    for _ in range(int(comm.bcast(max(_FEWEST, min(_MOST, int(seconds / trial_s)))))):
        round_()
    medians = {name: statistics.median(values[2:]) for name, values in times.items()}
    slowest = {name: max(comm.allgather(median)) for name, median in medians.items()}
    transport = reducer.stats().transport
    reducer.free()
    return AllreduceResult(nbytes, slowest["mpi"], slowest["reducer"], transport)
