"""The reducer: means of buckets, whatever the order in which ranks publish; and who is late is named."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Sequence

import pytest
import torch

from hpcpar.comm import BucketLayout, Communicator, Reducer
from hpcpar.comm import reducer as reducer_module
from hpcpar.comm.progress import ENGINE
from hpcpar.comm.staging import Staging
from hpcpar.errors import CommunicatorFreedError, HpcparError, MismatchError, StalledError
from tests.nn.training import ROUTES, assert_replicas_equal, pretended_nodes

pytestmark = pytest.mark.mpi

LAYOUTS = [
    BucketLayout(torch.float64, 1000),
    BucketLayout(torch.float32, 77),
    BucketLayout(torch.bfloat16, 640),
    BucketLayout(torch.float64, 1),
]


def contents(bucket: int, rank: int, step: int) -> torch.Tensor:
    layout = LAYOUTS[bucket]
    generator = torch.Generator().manual_seed(1000 * step + 10 * bucket + rank)
    return torch.randint(-8, 9, (layout.numel,), generator=generator).to(layout.dtype)


def mean(bucket: int, step: int, weights: Sequence[float]) -> torch.Tensor:
    parts = [contents(bucket, rank, step).double() * weight for rank, weight in enumerate(weights)]
    return torch.stack(parts).sum(0) / sum(weights)


def check(reducer: Reducer, step: int, weights: Sequence[float]) -> None:
    for bucket, flat in enumerate(reducer.flats):
        assert reducer.is_done(bucket)
        tolerance = 2e-2 if flat.dtype is torch.bfloat16 else 1e-6
        torch.testing.assert_close(
            flat.double().cpu(), mean(bucket, step, weights), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("thread", [False, True])
def test_ranks_publish_in_any_order(comm: Communicator, thread: bool) -> None:
    for route, (ranks_per_node, transport) in ROUTES.items():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            reducer = Reducer(nodes, LAYOUTS, transport=transport)
            reducer.use_progress_thread(thread)
            order = list(range(len(LAYOUTS)))
            for step in range(6):
                reducer.begin()
                random.Random(10 * step + comm.rank).shuffle(order)
                for bucket in order:
                    reducer.flats[bucket].copy_(contents(bucket, comm.rank, step))
                    reducer.publish(bucket)
                    reducer.progress()
                if step % 2:
                    for bucket in order:
                        reducer.wait(bucket)
                else:
                    reducer.wait_all()
                assert reducer.is_idle
                check(reducer, step, [1.0] * comm.size)
                assert_replicas_equal(comm, reducer.flats, route)
            assert reducer.step == 6
            stats = reducer.stats()
            assert (stats.steps, stats.buckets) == (6, len(LAYOUTS))
            assert stats.bytes_reduced == 6 * sum(layout.nbytes for layout in LAYOUTS)
            reducer.free()
            reducer.free()


def test_weighted_means_and_active_ranks(comm: Communicator) -> None:
    weights = [0.0, 3.0, 1.5, 0.25][: comm.size] if comm.size > 1 else [2.0]
    for ranks_per_node, transport in ROUTES.values():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            reducer = Reducer(nodes, LAYOUTS, transport=transport)
            for step in range(3):
                weight = weights[comm.rank]
                reducer.begin(weight, active=weight > 0)
                for bucket, flat in enumerate(reducer.flats):
                    flat.copy_(contents(bucket, comm.rank, step) * weight)
                    reducer.publish(bucket)
                if step == 1:
                    assert reducer.active_ranks() == sum(w > 0 for w in weights)
                reducer.wait_all()
                check(reducer, step, weights)
            reducer.begin()
            assert reducer.active_ranks() == comm.size
            publish_all(reducer, comm, 3)
            reducer.wait_all()
            check(reducer, 3, [1.0] * comm.size)
            reducer.free()


def publish_all(reducer: Reducer, comm: Communicator, step: int) -> None:
    for bucket, flat in enumerate(reducer.flats):
        flat.copy_(contents(bucket, comm.rank, step))
        reducer.publish(bucket)


def test_nobody_active_and_abandoned(comm: Communicator) -> None:
    reducer = Reducer(comm, LAYOUTS)
    reducer.begin(0.0, active=False)
    assert reducer.active_ranks() == 0
    reducer.abandon()
    assert reducer.is_idle
    reducer.begin()
    reducer.abandon()
    reducer.begin()
    publish_all(reducer, comm, 0)
    reducer.wait_all()
    check(reducer, 0, [1.0] * comm.size)
    reducer.free()


def test_waiting_elsewhere_completes_what_others_need(comm: Communicator) -> None:
    """Weights that come late hold the sending up; the rank must still send while it waits in a barrier."""
    for ranks_per_node, transport in ROUTES.values():
        for weight in (None, 1.0):
            with pretended_nodes(comm, ranks_per_node) as nodes:
                reducer = Reducer(nodes, LAYOUTS, transport=transport)
                if comm.rank == 0:
                    time.sleep(0.01)
                reducer.begin(weight)
                publish_all(reducer, comm, 0)
                if comm.rank == 0:
                    reducer.wait_all()
                comm.Barrier()
                reducer.wait_all()
                check(reducer, 0, [1.0] * comm.size)
                reducer.free()


# ---- mistakes ----------------------------------------------------------------------------------------------


def test_wrong_order_of_calls_raises(comm: Communicator) -> None:
    reducer = Reducer(comm, LAYOUTS)
    with pytest.raises(HpcparError, match="bucket 0 in step 0 before"):
        reducer.publish(0)
    reducer.begin()
    with pytest.raises(HpcparError, match="must be complete before the next begins"):
        reducer.begin()
    reducer.publish(1)
    with pytest.raises(HpcparError, match="bucket 1 in step 1 twice"):
        reducer.publish(1)
    with pytest.raises(HpcparError, match="must not be abandoned"):
        reducer.abandon()
    for bucket in (0, 2, 3):
        reducer.publish(bucket)
    reducer.wait_all()
    with pytest.raises(HpcparError, match="bucket 0 in step 1 twice"):
        reducer.publish(0)
    reducer.free()


def test_freed_reducer_raises(comm: Communicator) -> None:
    reducer = Reducer(comm, LAYOUTS)
    reducer.free()
    for call in (reducer.begin, lambda: reducer.publish(0)):
        with pytest.raises(CommunicatorFreedError, match="after free"):
            call()
    reducer.progress()


def test_unknown_transport_is_refused(comm: Communicator) -> None:
    with pytest.raises(MismatchError, match="'auto', 'shared_memory', 'mpi', got 'pigeon'"):
        Reducer(comm, LAYOUTS, transport="pigeon")


@pytest.mark.parametrize("route", ROUTES)
def test_deadline_names_the_late_rank_and_the_bucket(
    comm: Communicator, route: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.size == 1:
        pytest.skip("nobody to wait for")
    ranks_per_node, transport = ROUTES[route]
    late = comm.size - 1
    with pretended_nodes(comm, ranks_per_node) as nodes:
        reducer = Reducer(nodes, LAYOUTS, transport=transport)
        reducer.begin()
        for bucket in (0, 1):
            reducer.publish(bucket)
        reducer.wait(1)
        others = comm.Split(int(comm.rank == late), comm.rank)
        if comm.rank != late:
            for bucket in (2, 3):
                reducer.publish(bucket)
            others.Barrier()
            monkeypatch.setenv("HPCPAR_TIMEOUT_S", "0.5")
            with pytest.raises(StalledError, match="bucket 2 of 4 in step 1 must end within") as caught:
                reducer.wait(2)
            assert caught.value.waiting_for == (late,)
            monkeypatch.undo()
        else:
            time.sleep(0.8)
            for bucket in (2, 3):
                reducer.publish(bucket)
        reducer.wait_all()  # a wait that has raised may be repeated
        others.Free()
        reducer.free()


def test_full_dev_shm_means_messages_and_one_warning(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if comm.size == 1:
        pytest.skip("one rank needs no shared memory")
    # Only one rank sees the full file system; all must come to the same conclusion.
    monkeypatch.setattr(
        "hpcpar.comm.shared_memory._free_bytes", lambda: 0 if comm.rank == comm.size - 1 else 1 << 40
    )
    with caplog.at_level(logging.WARNING, "hpcpar"):
        reducer = Reducer(comm, LAYOUTS)
    assert [("no room" in record.getMessage()) for record in caplog.records] == [True] * (comm.rank == 0)
    assert reducer.stats().transport == "mpi"
    reducer.begin()
    publish_all(reducer, comm, 0)
    reducer.wait_all()
    check(reducer, 0, [1.0] * comm.size)
    reducer.free()
    with pytest.raises(HpcparError, match="must find room") as caught:
        Reducer(comm, LAYOUTS, transport="shared_memory")
    assert len(set(comm.allgather(str(caught.value)))) == 1


def test_transport_is_the_best_that_fits(comm: Communicator) -> None:
    expected = {
        "shared memory": "shared_memory",
        "nodes of one, by window": "shared_memory+rails",
        "nodes of one": "mpi",
        "nodes of two": "shared_memory" if comm.size == 2 else "shared_memory+rails",
        "nodes of three": "shared_memory" if comm.size <= 3 else "shared_memory+rails",
        "messages": "mpi",
    }
    for route, (ranks_per_node, transport) in ROUTES.items():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            reducer = Reducer(nodes, LAYOUTS, transport=transport)
            assert reducer.stats().transport == ("none" if comm.size == 1 else expected[route])
            reducer.free()


def test_idle_reducers_leave_the_engine(comm: Communicator) -> None:
    reducer = Reducer(comm, LAYOUTS)
    for step in range(3):
        reducer.begin()
        publish_all(reducer, comm, step)
        reducer.wait_all()
        assert not any(item is reducer for item in ENGINE._items)
    reducer.begin()
    reducer.publish(2)
    for bucket in (0, 1, 3):
        reducer.publish(bucket)
    reducer.wait_all()
    reducer.free()


# ---- staging -----------------------------------------------------------------------------------------------


class SlowStaging(Staging):
    """A copy that takes a few looks to arrive, as one from a GPU."""

    looks = 3

    def __init__(self, storage: torch.Tensor, device: torch.device) -> None:
        super().__init__(storage, device, separate=True)

    def begin_out(self) -> None:
        super().begin_out()
        self.looks = 3

    def is_out(self) -> bool:
        self.looks -= 1
        return self.looks < 0


@pytest.mark.parametrize("thread", [False, True])
def test_staged_buckets_are_reduced_alike(
    comm: Communicator, thread: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reducer_module, "Staging", SlowStaging)
    for ranks_per_node, transport in ROUTES.values():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            reducer = Reducer(nodes, LAYOUTS, transport=transport)
            reducer.use_progress_thread(thread)
            for step in range(3):
                reducer.begin()
                publish_all(reducer, comm, step)
                comm.Barrier()
                reducer.wait_all()
                check(reducer, step, [1.0] * comm.size)
            reducer.free()


def devices_of(count: int) -> list[torch.device]:
    return [torch.device("cuda", torch.cuda.current_device())] * count


def on_default_stream(run: Callable[[], None]) -> None:
    run()


def on_side_stream(run: Callable[[], None]) -> None:
    with torch.cuda.stream(torch.cuda.Stream()):
        run()
    torch.cuda.synchronize()


@pytest.mark.cuda
@pytest.mark.parametrize("stream", [on_default_stream, on_side_stream])
@pytest.mark.parametrize("thread", [False, True])
def test_buckets_on_a_gpu_equal_those_on_the_host(
    comm: Communicator, stream: Callable[[Callable[[], None]], None], thread: bool
) -> None:
    for ranks_per_node, transport in ROUTES.values():
        with pretended_nodes(comm, ranks_per_node) as nodes:
            host = Reducer(nodes, LAYOUTS, transport=transport)
            device = Reducer(nodes, LAYOUTS, transport=transport, devices=devices_of(len(LAYOUTS)))
            device.use_progress_thread(thread)
            assert all(flat.is_cuda for flat in device.flats)

            def run(host: Reducer = host, device: Reducer = device) -> None:
                for step in range(4):
                    for reducer in (host, device):
                        reducer.begin()
                        publish_all(reducer, comm, step)
                    host.wait_all()
                    device.wait_all()
                    # Later kernels of this stream must see the mean, without the host waiting for it.
                    seen = [flat.clone() for flat in device.flats]
                    for expected, got in zip(host.flats, seen, strict=True):
                        assert torch.equal(got.cpu(), expected)

            stream(run)
            device.free()
            host.free()


@pytest.mark.cuda
def test_bucket_on_a_gpu_is_sent_only_when_its_kernels_are_done(comm: Communicator) -> None:
    reducer = Reducer(comm, LAYOUTS, devices=devices_of(len(LAYOUTS)))
    for step in range(3):
        reducer.begin()
        for bucket, flat in enumerate(reducer.flats):
            torch.cuda._sleep(20_000_000)  # cycles; the copy below waits behind them
            flat.copy_(contents(bucket, comm.rank, step).pin_memory(), non_blocking=True)
            reducer.publish(bucket)
        reducer.wait_all()
        check(reducer, step, [1.0] * comm.size)
    reducer.free()
