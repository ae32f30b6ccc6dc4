"""What it costs to call an expert on another rank, beyond computing it and beyond sending its bytes.

Rank 0 serves, rank 1 calls. In each repetition rank 1 times, in turn::

    local          the module itself, here
    ping-pong      mpi4py's Send and Recv of the same bytes, there and back, nothing else
    remote         RemoteExpert

*Extra* is remote - local - ping-pong. While rank 1 computes or calls, the main thread of rank 0 sleeps, as
that of a rank that only serves does, and its service thread works.

Under load, several threads of rank 1 call several experts as fast as they can. The slowest request, compared
with the median, tells whether anybody is kept waiting; the mean batch, whether requests are batched.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from common import order
from hpcpar.comm import Communicator
from hpcpar.nn import BatchTensorDescriptor, ExpertBackend, ExpertServer, RemoteExpert

__all__ = ["FEATURES", "Latency", "Load", "measure_latency", "measure_load"]

FEATURES = 512
SERVER, CLIENT = 0, 1
CALLS = 150
WARM_UP = 30


@dataclass(frozen=True)
class Latency:
    """Seconds of one call, medians over repetitions; ``extra`` is the median of the differences."""

    rows: int
    direction: str
    local: float
    ping_pong: float
    remote: float
    extra: float


@dataclass(frozen=True)
class Load:
    """Calls by several threads at once."""

    experts: int
    threads: int
    clients: int
    requests_per_s: float
    median_s: float
    slowest_s: float
    mean_batch: float


def make_backend(uid: str) -> ExpertBackend:
    """An expert of one layer, which is never updated by more than rounding."""
    torch.manual_seed(0)
    net = nn.Linear(FEATURES, FEATURES)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-12)
    return ExpertBackend(
        uid, net, optimizer, args_schema=BatchTensorDescriptor(FEATURES), max_batch_size=4096
    )


def measure_latency(comm: Communicator, rows: int, repetitions: int) -> list[Latency]:
    """Forward, and forward with backward, of one batch. **Collective**; the result is rank 1's."""
    backends = {"expert": make_backend("expert")} if comm.rank == SERVER else {}
    with ExpertServer(comm, backends):
        return [_latency(comm, rows, repetitions, backward) for backward in (False, True)]


def _latency(comm: Communicator, rows: int, repetitions: int, backward: bool) -> Latency:
    batch = torch.randn(rows, FEATURES)
    calls = _calls(comm, batch, backward)
    trips = 2 if backward else 1  # backward sends inputs and gradients, and gets gradients
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for repetition in range(repetitions):
        for name in order(list(calls), repetition):
            comm.Barrier()
            if comm.rank == SERVER and name != "ping-pong":
                _rest(comm)
                continue
            own = [_timed(calls[name]) for _ in range(WARM_UP + CALLS)]
            seconds[name].append(statistics.median(own[WARM_UP:]))
            if name != "ping-pong":
                comm.mpi.Send(bytearray(1), SERVER)
    comm.Barrier()
    if comm.rank == SERVER:
        return Latency(rows, "", 0.0, 0.0, 0.0, 0.0)
    extras = [
        remote - local - ping
        for remote, local, ping in zip(seconds["remote"], seconds["local"], seconds["ping-pong"], strict=True)
    ]
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    direction = "forward + backward" if trips == 2 else "forward"
    return Latency(
        rows, direction, medians["local"], medians["ping-pong"], medians["remote"], statistics.median(extras)
    )


def _rest(comm: Communicator) -> None:
    """Leave the cores to others until rank 1 has done its calls."""
    while not comm.mpi.Iprobe(CLIENT):
        time.sleep(0.02)
    comm.mpi.Recv(bytearray(1), CLIENT)


def _timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _calls(comm: Communicator, batch: torch.Tensor, backward: bool) -> dict[str, Callable[[], object]]:
    local = make_backend("local").expert.requires_grad_(backward)
    remote = RemoteExpert("expert", comm)

    def run(module: nn.Module) -> Callable[[], object]:
        def forward() -> object:
            with torch.no_grad():
                return module(batch)

        def both() -> object:
            x = batch.detach().requires_grad_()
            module(x).backward(batch)
            return x.grad

        return both if backward else forward

    out, back = batch.numpy(), torch.empty_like(batch).numpy()
    mpi = comm.mpi

    def ping_pong() -> None:
        """Forward: the batch there and back. Backward: the batch and a gradient there, one back."""
        for there in (1, 2) if backward else (1,):
            for _ in range(there):
                if comm.rank == CLIENT:
                    mpi.Send(out, SERVER)
                else:
                    mpi.Recv(back, CLIENT)
            if comm.rank == CLIENT:
                mpi.Recv(back, SERVER)
            else:
                mpi.Send(back, CLIENT)

    return {"local": run(local), "ping-pong": ping_pong, "remote": run(remote)}


def measure_load(comm: Communicator, experts: int, threads: int, seconds: float) -> Load:
    """Calls of random experts by threads of each client rank. **Collective.**"""
    uids = [f"expert.{number}" for number in range(experts)]
    backends = {uid: make_backend(uid) for uid in uids} if comm.rank == SERVER else {}
    latencies: list[float] = []
    rows = tasks = batches = 0
    with ExpertServer(comm, backends):
        if comm.rank != SERVER:
            latencies = _hammer(comm, uids, threads, seconds)
        comm.Barrier()
        for backend in backends.values():
            stats = backend.get_pools()[0].stats()
            rows, tasks, batches = rows + stats.rows, tasks + stats.tasks, batches + stats.batches
    gathered = [value for part in comm.allgather(latencies) for value in part]
    tasks, batches = comm.bcast((tasks, batches), SERVER)
    return Load(
        experts,
        threads,
        comm.size - 1,
        len(gathered) / seconds,
        statistics.median(gathered),
        max(gathered),
        tasks / max(1, batches),
    )


def _hammer(comm: Communicator, uids: list[str], threads: int, seconds: float) -> list[float]:
    """Call random experts from several threads until the time is over; the latencies."""
    remotes = [RemoteExpert(uid, comm) for uid in uids]
    batch = torch.randn(64, FEATURES)
    found: list[list[float]] = [[] for _ in range(threads)]
    start = threading.Barrier(threads)

    def work(index: int) -> None:
        choose = random.Random(1000 * comm.rank + index)
        with torch.no_grad():
            start.wait()
            for remote in remotes[index::threads]:
                remote(batch)  # not counted: pages, threads, first messages
            end = time.perf_counter() + seconds
            while (begin := time.perf_counter()) < end:
                choose.choice(remotes)(batch)
                found[index].append(time.perf_counter() - begin)

    workers = [threading.Thread(target=work, args=(index,)) for index in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return [value for part in found for value in part]
