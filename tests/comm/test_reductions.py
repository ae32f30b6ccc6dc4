"""Reductions: every dtype that MPI adds, or we, with every operator that it knows."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from mpi4py import MPI
from torch import Tensor

from hpcpar.comm import Communicator
from tests.comm.samples import (
    COMPLEX,
    FLOATS,
    INTEGERS,
    LAYOUTS,
    NARROW,
    SHAPE,
    Layout,
    contiguous,
    digits,
    every_other,
    noise,
    same,
)

pytestmark = pytest.mark.mpi

ARITHMETIC = {"SUM": np.add, "PROD": np.multiply}
ORDER = {"MAX": np.maximum, "MIN": np.minimum}
BITWISE = {"BAND": np.bitwise_and, "BOR": np.bitwise_or, "BXOR": np.bitwise_xor}
LOGICAL = {"LAND": np.logical_and, "LOR": np.logical_or, "LXOR": np.logical_xor}
# What torch means by these on booleans.
BOOLEAN = LOGICAL | {
    "SUM": np.logical_or,
    "PROD": np.logical_and,
    "MAX": np.logical_or,
    "MIN": np.logical_and,
    "BAND": np.logical_and,
    "BOR": np.logical_or,
    "BXOR": np.logical_xor,
}
KINDS: dict[tuple[torch.dtype, ...], dict[str, np.ufunc]] = {
    (torch.bool,): BOOLEAN,
    INTEGERS: ARITHMETIC | ORDER | BITWISE | LOGICAL,
    FLOATS: ARITHMETIC | ORDER,
    COMPLEX: ARITHMETIC,
    (torch.complex32,): ARITHMETIC,
    NARROW: ARITHMETIC | ORDER,
}
CASES = [
    (dtype, name, ufunc)
    for dtypes, table in KINDS.items()
    for dtype in dtypes
    for name, ufunc in table.items()
]


def wide(tensor: Tensor) -> np.ndarray:
    """As numpy, in a type that it can compute with."""
    if tensor.dtype in NARROW:
        tensor = tensor.to(torch.float32)
    if tensor.dtype is torch.complex32:
        tensor = tensor.to(torch.complex64)
    return tensor.numpy()


def reference(rows: list[Tensor], ufunc: np.ufunc) -> Tensor:
    """The reduction in one process, rank 0 first, rounded once."""
    result = functools.reduce(ufunc, map(wide, rows))
    return torch.from_numpy(np.asarray(result)).to(rows[0].dtype)


Pairs = Iterator[tuple[Tensor, Tensor]]


class Reduction:
    """What the operations below are tried with."""

    def __init__(
        self, comm: Communicator, dtype: torch.dtype, name: str, ufunc: np.ufunc, shape, layout: Layout
    ):
        self.comm, self.op, self.ufunc, self.layout = comm, getattr(MPI, name), ufunc, layout
        self.rows = [digits(dtype, shape, rank) for rank in range(comm.size)]
        self.mine = layout(self.rows[comm.rank])

    def empty(self) -> Tensor:
        return self.layout(noise(self.mine.dtype, self.mine.shape, 50))

    def upto(self, count: int) -> Tensor:
        return reference(self.rows[:count], self.ufunc)


def allreduce(x: Reduction) -> Pairs:
    received = x.empty()
    x.comm.Allreduce(x.mine, received, x.op)
    yield received, x.upto(x.comm.size)
    yield x.mine, x.rows[x.comm.rank]


def allreduce_in_place(x: Reduction) -> Pairs:
    x.comm.Allreduce(MPI.IN_PLACE, x.mine, x.op)
    yield x.mine, x.upto(x.comm.size)


def iallreduce(x: Reduction) -> Pairs:
    received, buffer = x.empty(), x.layout(x.rows[x.comm.rank])
    requests = [x.comm.Iallreduce(x.mine, received, x.op), x.comm.Iallreduce(MPI.IN_PLACE, buffer, x.op)]
    for request in reversed(requests):
        request.wait()
    yield received, x.upto(x.comm.size)
    yield buffer, x.upto(x.comm.size)


def reduce(x: Reduction) -> Pairs:
    for root in range(x.comm.size):
        received = x.empty()
        untouched = received.clone()
        x.comm.Reduce(x.mine, received if root or x.comm.rank == root else None, x.op, root)
        yield received, x.upto(x.comm.size) if x.comm.rank == root else untouched


def reduce_in_place(x: Reduction) -> Pairs:
    root = x.comm.size - 1
    if x.comm.rank == root:
        x.comm.Reduce(MPI.IN_PLACE, x.mine, x.op, root)
        yield x.mine, x.upto(x.comm.size)
    else:
        x.comm.Reduce(x.mine, None, x.op, root)
        yield x.mine, x.rows[x.comm.rank]


def scan(x: Reduction) -> Pairs:
    received = x.empty()
    x.comm.Scan(x.mine, received, x.op)
    yield received, x.upto(x.comm.rank + 1)


def scan_in_place(x: Reduction) -> Pairs:
    x.comm.Scan(MPI.IN_PLACE, x.mine, x.op)
    yield x.mine, x.upto(x.comm.rank + 1)


def exscan(x: Reduction) -> Pairs:
    received = x.empty()
    untouched = received.clone()
    x.comm.Exscan(x.mine, received, x.op)
    yield received, x.upto(x.comm.rank) if x.comm.rank else untouched


def exscan_in_place(x: Reduction) -> Pairs:
    x.comm.Exscan(MPI.IN_PLACE, x.mine, x.op)
    yield x.mine, x.upto(x.comm.rank) if x.comm.rank else x.rows[0]


def reduce_scatter_block(x: Reduction) -> Pairs:
    """All ranks contribute a row of blocks; here the rows are the same blocks, rotated by the rank."""
    size, rank = x.comm.size, x.comm.rank
    rows = [torch.cat([x.rows[(r + block) % size] for block in range(size)]) for r in range(size)]
    received = x.empty()
    x.comm.Reduce_scatter_block(x.layout(rows[rank]), received, x.op)
    expected = reference(rows, x.ufunc)
    first = x.mine.shape[0]
    yield received, expected[rank * first : (rank + 1) * first]
    buffer = contiguous(rows[rank])
    x.comm.Reduce_scatter_block(MPI.IN_PLACE, buffer, x.op)
    yield buffer[:first], expected[rank * first : (rank + 1) * first]


REDUCTIONS: dict[str, Callable[[Reduction], Pairs]] = {
    "Allreduce": allreduce,
    "Allreduce in place": allreduce_in_place,
    "Iallreduce": iallreduce,
    "Reduce": reduce,
    "Reduce in place": reduce_in_place,
    "Scan": scan,
    "Scan in place": scan_in_place,
    "Exscan": exscan,
    "Exscan in place": exscan_in_place,
    "Reduce_scatter_block": reduce_scatter_block,
}

each_reduction = pytest.mark.parametrize("operation", REDUCTIONS)


def check(operation: str, comm: Communicator, case, shape, layout: Layout = contiguous) -> None:
    dtype, name, _ = case
    for received, expected in REDUCTIONS[operation](Reduction(comm, *case, shape, layout)):
        assert same(received, expected), f"{operation} of {dtype} by {name} in {shape}, {layout.__name__}"


@each_reduction
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_every_dtype_and_operator(comm: Communicator, operation: str) -> None:
    for case in CASES:
        check(operation, comm, case, SHAPE)


@each_reduction
def test_every_layout(comm: Communicator, operation: str) -> None:
    dtypes = (torch.bool, torch.int32, torch.float64, torch.complex64, torch.bfloat16, torch.float8_e5m2)
    for dtype, layout in itertools.product(dtypes, LAYOUTS):
        ufunc = np.logical_or if dtype is torch.bool else np.add
        check(operation, comm, (dtype, "SUM", ufunc), SHAPE, layout)


@each_reduction
def test_sizes_from_nothing_to_many(comm: Communicator, operation: str) -> None:
    """Fewer elements than ranks, none at all, 0-d, and enough for rendezvous and blocking collectives."""
    shapes = [(0,), (1,), (2,), (5,), (70_001,)] + ([] if operation == "Reduce_scatter_block" else [()])
    for dtype in (torch.int64, torch.float32, torch.bfloat16, torch.float16):
        for shape in shapes:
            check(operation, comm, (dtype, "SUM", np.add), shape)


@each_reduction
def test_what_mpi_cannot_count_is_chunked(chunked: Communicator, operation: str) -> None:
    for shape in ((6,), (7,), (8,), (49,), (30,)):
        for dtype in (torch.uint16, torch.int64, torch.float32, torch.bfloat16):
            check(operation, chunked, (dtype, "SUM", np.add), shape, every_other)
        check(operation, chunked, (torch.int32, "BXOR", np.bitwise_xor), shape)
        check(operation, chunked, (torch.bool, "SUM", np.logical_or), shape)


def test_sum_is_the_default_operator(comm: Communicator) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ones, received = torch.ones(4, dtype=dtype), torch.empty(4, dtype=dtype)
        comm.Allreduce(ones, received)
        assert received.tolist() == [comm.size] * 4
        comm.Iallreduce(ones, received).wait()
        comm.Reduce(ones, received)
        comm.Scan(ones, received)
        assert received.tolist() == [comm.rank + 1] * 4


def test_operators_of_the_callers_own_work_where_mpi_knows_the_type(comm: Communicator) -> None:
    def keep_larger(a, b, _datatype) -> None:
        theirs, ours = np.frombuffer(a, np.int64), np.frombuffer(b, np.int64)
        np.maximum(theirs, ours, out=ours)

    operator = MPI.Op.Create(keep_larger, commute=True)
    received = torch.zeros(3, dtype=torch.int64)
    comm.Allreduce(torch.full((3,), comm.rank), received, operator)
    assert received.tolist() == [comm.size - 1] * 3
    with pytest.raises(TypeError, match="got user-defined operator"):
        comm.Allreduce(torch.zeros(3, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.bfloat16), operator)
    operator.Free()


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.bfloat16, "BAND"),
        (torch.float16, "LOR"),
        (torch.float8_e5m2, "MAXLOC"),
        (torch.float32, "BXOR"),
        (torch.complex64, "MAX"),
        (torch.complex32, "MIN"),
        (torch.int32, "MINLOC"),
        (torch.int32, None),
    ],
)
@pytest.mark.filterwarnings("ignore:ComplexHalf support")
def test_wrong_operator_raises_before_any_message(
    comm: Communicator, dtype: torch.dtype, name: str | None
) -> None:
    op = "sum" if name is None else getattr(MPI, name)
    many, few = digits(dtype, (2 * comm.size,), 0), digits(dtype, (2,), 0)
    for call in (comm.Allreduce, comm.Iallreduce, comm.Scan, comm.Exscan, comm.Reduce):
        with pytest.raises(
            TypeError, match=rf"must be one of MPI\.SUM.*got.*rank {comm.rank} of {comm.size}"
        ):
            call(few, few.clone(), op)
    with pytest.raises(TypeError, match="must be one of"):
        comm.Reduce_scatter_block(many, few, op)


def test_call_that_failed_on_one_rank_can_be_made_again(comm: Communicator) -> None:
    """Nothing of the failed call, not even its number, may be left over on that rank."""
    received = torch.zeros(9, dtype=torch.bfloat16)
    if comm.rank == 0:
        for arguments in (
            (torch.ones(9, dtype=torch.bfloat16), received, MPI.BAND),
            (torch.ones(8, dtype=torch.bfloat16), received),
            (torch.ones(9, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16).expand(9)),
        ):
            with pytest.raises((TypeError, ValueError, RuntimeError)):
                comm.Allreduce(*arguments)
    comm.Allreduce(torch.ones(9, dtype=torch.bfloat16), received)
    assert received.tolist() == [comm.size] * 9


def test_data_of_mpi4py_and_tensors_may_be_mixed(comm: Communicator) -> None:
    """One buffer a tensor, the other one something that only mpi4py understands."""
    from array import array

    received = torch.zeros(3, dtype=torch.float64)
    comm.Allreduce(array("d", [1.0, 2.0, 3.0]), received)
    assert received.tolist() == [1.0 * comm.size, 2.0 * comm.size, 3.0 * comm.size]
    total = array("d", [0.0, 0.0, 0.0])
    comm.Allreduce(received, total)
    assert list(total) == [comm.size**2 * value for value in (1.0, 2.0, 3.0)]
