"""Operations that move data: every dtype, layout and size arrives bit by bit."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from mpi4py import MPI

from hpcpar.comm import Communicator
from hpcpar.errors import MismatchError
from tests.comm.samples import DTYPES, LAYOUTS, SHAPE, bits, contiguous, every_other, noise, same
from tests.comm.transfers import TRANSFERS, Exchange

pytestmark = pytest.mark.mpi

each_transfer = pytest.mark.parametrize("name", TRANSFERS)


def check(name: str, exchange: Exchange) -> None:
    for received, expected in TRANSFERS[name](exchange):
        assert same(received, expected), (
            f"{name} of {exchange.dtype} in {exchange.shape}, {exchange.layout.__name__}"
        )


@each_transfer
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_arrives_in_every_layout(comm: Communicator, name: str) -> None:
    for dtype, layout in itertools.product(DTYPES, LAYOUTS):
        check(name, Exchange(comm, dtype, SHAPE, layout))


@each_transfer
def test_empty_blocks_are_fine(comm: Communicator, name: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        check(name, Exchange(comm, dtype, (0, 3), contiguous))


@each_transfer
def test_long_blocks_arrive(comm: Communicator, name: str) -> None:
    """Long enough for rendezvous and for the blocking collectives; small blocks use others."""
    for dtype in (torch.float32, torch.bfloat16):
        check(name, Exchange(comm, dtype, (1, 70_001), contiguous))


@each_transfer
def test_what_mpi_cannot_count_is_chunked(chunked: Communicator, name: str) -> None:
    shapes = ((1, 6), (1, 7), (1, 8), (5, 6), (7, 7))
    dtypes = (torch.int8, torch.bfloat16, torch.complex128)
    for dtype, shape, layout in itertools.product(dtypes, shapes, (contiguous, every_other)):
        check(name, Exchange(chunked, dtype, shape, layout))


def test_scalars_travel(comm: Communicator) -> None:
    for dtype in DTYPES:
        value = noise(dtype, (), comm.rank)
        received, everything = noise(dtype, (), 9), noise(dtype, (comm.size,), 9)
        comm.Sendrecv(value, (comm.rank + 1) % comm.size, 0, received, (comm.rank - 1) % comm.size)
        assert same(received, noise(dtype, (), (comm.rank - 1) % comm.size))
        comm.Allgather(value, everything)
        assert all(same(everything[r], noise(dtype, (), r)) for r in range(comm.size))
        comm.Bcast(value)
        assert same(value, noise(dtype, (), 0))


def test_negated_view_is_sent_and_received(comm: Communicator) -> None:
    def view(values: torch.Tensor) -> torch.Tensor:
        negated = torch.complex(torch.zeros_like(values), -values).conj().imag
        assert negated.is_neg()
        return negated

    for dtype in (torch.float32, torch.float64):
        check("Allgather", Exchange(comm, dtype, SHAPE, view))
        check("Bcast", Exchange(comm, dtype, SHAPE, view))


def test_expanded_tensor_can_be_sent(comm: Communicator) -> None:
    mine = torch.tensor([float(comm.rank)]).expand(4, 3)
    received = torch.empty(comm.size, 4, 3)
    comm.Allgather(mine, received)
    assert same(received, torch.arange(comm.size).float().view(-1, 1, 1).expand(-1, 4, 3))


@pytest.mark.parametrize(
    "call", ["Irecv", "Bcast", "Allgather", "Alltoall", "Alltoallv", "Allreduce", "Reduce_scatter_block"]
)
def test_expanded_tensor_cannot_receive(comm: Communicator, call: str) -> None:
    """The error comes before anything is sent, so the communicator works on."""
    bad, good = torch.zeros(1).expand(comm.size), torch.zeros(comm.size)
    arguments = {
        "Irecv": (bad,),
        "Bcast": (bad, (comm.rank + 1) % comm.size),
        "Allgather": (good[:1], bad),
        "Reduce_scatter_block": (torch.zeros(comm.size * comm.size), bad),
    }.get(call, (good, bad))
    if comm.size > 1:
        with pytest.raises(ValueError, match=r"memory of its own for each element.*\.contiguous\(\)"):
            getattr(comm, call)(*arguments)
    comm.Barrier()


def test_numpy_arrays_travel(comm: Communicator) -> None:
    for dtype in (np.bool_, np.uint16, np.int64, np.float16, np.float64, np.complex64):
        mine = np.arange(6).astype(dtype).reshape(2, 3) + dtype(comm.rank)
        received = np.zeros((comm.size, 2, 3), dtype)
        comm.Allgather(mine, received)
        for rank in range(comm.size):
            assert (received[rank] == np.arange(6).astype(dtype).reshape(2, 3) + dtype(rank)).all()
        strided = np.zeros((2, 6), dtype)[:, ::2]
        strided[:] = mine
        comm.Bcast(strided)
        assert (strided == received[0]).all()


def test_what_only_mpi4py_understands_goes_through(comm: Communicator) -> None:
    record = np.dtype([("a", "i4"), ("b", "f8")])
    buffers = [
        bytearray([comm.rank] * 3),
        np.arange(3).astype(">i4") + comm.rank,
        memoryview(bytearray([comm.rank])),
    ]
    expected = [bytearray(3), np.arange(3).astype(">i4"), memoryview(bytearray(1))]
    pairs = np.zeros(4, record)["b"]  # its stride is no multiple of its size
    with pytest.raises((ValueError, BufferError)):
        comm.Bcast(pairs)
    for buffer, wanted in zip(buffers, expected, strict=True):
        comm.Bcast([buffer, MPI.BYTE])
        assert np.array_equal(buffer, wanted)
    total = np.zeros(1, np.longdouble)
    comm.Allreduce(np.full(1, comm.rank, np.longdouble), total)
    assert total[0] == sum(range(comm.size))


@pytest.mark.parametrize("call", ["Irecv", "Bcast", "Allgather", "Allgatherv", "Alltoallv", "Allreduce"])
def test_read_only_array_cannot_receive(comm: Communicator, call: str) -> None:
    frozen = np.zeros(comm.size)
    frozen.flags.writeable = False
    mine = np.zeros(comm.size if call in ("Alltoallv", "Allreduce") else 1)
    arguments = {"Irecv": (frozen,), "Bcast": (frozen, (comm.rank + 1) % comm.size)}.get(call, (mine, frozen))
    if comm.size > 1:
        with pytest.raises(ValueError, match="read-only"):
            getattr(comm, call)(*arguments)
    comm.Bcast(frozen if comm.rank == 0 else np.ones(comm.size))  # sending it is fine


@pytest.mark.parametrize(
    "specify",
    [
        lambda data: [data, 3],
        lambda data: [data, np.int64(3)],
        lambda data: [data, (3, 0)],
        lambda data: [data, 3, MPI.FLOAT],
        lambda data: [data, 3, 0, MPI.FLOAT],
        lambda data: (data, (3, 0), "f"),
    ],
)
def test_count_is_that_of_a_block(comm: Communicator, specify) -> None:
    received = torch.full((4 * comm.size,), -1.0)
    comm.Allgather(specify(torch.arange(5.0) + comm.rank), specify(received))
    parts = [torch.arange(3.0) + rank for rank in range(comm.size)]
    assert torch.equal(received, torch.cat([*parts, torch.full((comm.size,), -1.0)]))


def test_displacement_is_respected(comm: Communicator) -> None:
    received = torch.zeros(6)
    comm.Sendrecv([torch.arange(6.0), (2, 3)], comm.rank, 0, [received, 2, 1, MPI.FLOAT], comm.rank)
    assert received.tolist() == [0.0, 3.0, 4.0, 0.0, 0.0, 0.0]
    with pytest.raises(MismatchError, match="must fit"):
        comm.Isend([torch.arange(6.0), (4, 3)], comm.rank)


def test_type_of_the_callers_own_is_respected(comm: Communicator) -> None:
    column = MPI.FLOAT.Create_vector(3, 1, 2).Commit()
    values, received = torch.arange(6.0), torch.zeros(3)
    comm.Sendrecv([values, 1, column], comm.rank, 0, received, comm.rank)
    assert received.tolist() == [0.0, 2.0, 4.0]
    column.Free()
    comm.Sendrecv([values, 8, MPI.BYTE], comm.rank, 0, received, comm.rank)
    assert received.tolist() == [0.0, 1.0, 4.0]


def test_short_message_leaves_the_rest_of_the_buffer(comm: Communicator, chunked: Communicator) -> None:
    for communicator in (comm, chunked):
        for layout in LAYOUTS:
            received = layout(noise(torch.float32, SHAPE, 5))
            expected = received.clone(memory_format=torch.contiguous_format)
            expected.view(-1)[:10] = torch.arange(10.0)
            status = MPI.Status()
            request = communicator.Isend(torch.arange(10.0), comm.rank, 3)
            communicator.Recv(received, MPI.ANY_SOURCE, MPI.ANY_TAG, status)
            request.wait()
            assert same(received, expected)
            assert (status.source, status.tag) == (comm.rank, 3)


def test_null_rank_completes_at_once(comm: Communicator) -> None:
    received = torch.arange(3.0)
    comm.Sendrecv(torch.zeros(3), MPI.PROC_NULL, 0, received, MPI.PROC_NULL)
    comm.Send(received, MPI.PROC_NULL)
    comm.Recv(received, MPI.PROC_NULL)
    assert received.tolist() == [0.0, 1.0, 2.0]


def test_counts_may_be_arrays_tensors_or_tuples(comm: Communicator) -> None:
    numbers = [2] * comm.size
    for counts in (
        numbers,
        tuple(numbers),
        np.array(numbers),
        torch.tensor(numbers),
        tuple(np.array(numbers)),
    ):
        received = torch.zeros(2 * comm.size)
        comm.Allgatherv(torch.full((2,), float(comm.rank)), [received, counts])
        assert torch.equal(received, torch.arange(comm.size).float().repeat_interleave(2))


def test_allgatherv_displacements_may_differ_between_ranks(comm: Communicator, chunked: Communicator) -> None:
    for communicator in (comm, chunked):
        room = 10 * comm.size
        received = torch.full((room,), -1)
        displs = [10 * r if comm.rank % 2 else 2 * r for r in range(comm.size)]
        communicator.Allgatherv(torch.full((2,), comm.rank), [received, [2] * comm.size, displs])
        expected = torch.full((room,), -1)
        for rank, displ in enumerate(displs):
            expected[displ : displ + 2] = rank
        assert torch.equal(received, expected)


def test_tensor_that_requires_grad_travels(comm: Communicator) -> None:
    parameter = torch.nn.Parameter(torch.full((3,), float(comm.rank)))
    comm.Bcast(parameter)
    assert parameter.tolist() == [0.0] * 3
    assert parameter.requires_grad


def test_barriers_meet(comm: Communicator) -> None:
    request = comm.Ibarrier()
    comm.Barrier()
    comm.barrier()
    request.wait()
    assert request.test()


@pytest.mark.parametrize(
    ("call", "arguments", "kind", "text"),
    [
        ("Bcast", (torch.zeros(1), 99), MismatchError, "root of Bcast must be a rank from 0 to"),
        ("Gather", (torch.zeros(1), None, -1), MismatchError, "root of Gather"),
        ("Reduce", (torch.zeros(1), None, MPI.SUM, 99), MismatchError, "root of Reduce"),
        ("Allgather", (torch.zeros(2), torch.zeros(1)), MismatchError, "blocks? of Allgather|must divide"),
        (
            "Allgather",
            (torch.zeros(1), torch.zeros(64, dtype=torch.int32)),
            MismatchError,
            "must be equal|must divide",
        ),
        ("Allgather", (None, torch.zeros(12)), TypeError, "sendbuf of Allgather must be a buffer, got None"),
        ("Allreduce", (torch.zeros(12), None), TypeError, "recvbuf of Allreduce must be a buffer, got None"),
        ("Bcast", (None,), TypeError, "buf of Bcast must be a buffer"),
        ("Allreduce", (torch.zeros(2), torch.zeros(3)), MismatchError, "same number of elements"),
        ("Allgatherv", (torch.zeros(2), [torch.zeros(9), [1]]), MismatchError, "counts|must hold"),
        ("Alltoallv", (torch.zeros(12), [torch.zeros(12), [99] * 99]), MismatchError, "entries"),
        ("Alltoallv", (torch.zeros(12), torch.zeros(12, dtype=torch.int32)), MismatchError, "one dtype"),
        ("Isend", (torch.zeros(2, 2).to_sparse(), 0), TypeError, "dense"),
        ("Isend", ([torch.zeros(2), 3], 0), MismatchError, "must fit"),
    ],
)
def test_wrong_arguments_are_clear_errors(comm: Communicator, call: str, arguments, kind, text: str) -> None:
    if call == "Allgatherv" and comm.size == 1:
        pytest.skip("one count is right for one rank, and the error is another")
    with pytest.raises(kind, match=text):
        getattr(comm, call)(*arguments)
    comm.Barrier()  # nothing was sent


def test_bits_tell_nan_from_nan() -> None:
    assert same(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert not torch.equal(bits(torch.tensor([0.0])), bits(torch.tensor([-0.0])))
