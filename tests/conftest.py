"""What every test gets: the ranks in step, a time limit, equal seeds and a fresh communicator.

Under ``mpirun`` every rank runs every test and a test is collective; agreement.py makes its outcome the same
on all ranks. Without ``mpirun`` only what needs no other rank runs, and ``tests/launched``, whose tests start
``mpirun`` themselves and so must not be ranks. MPI is initialised only where it is used.

A test over its limit (120 s, or its ``timeout_s`` mark) ends the run: all ranks print the stacks of all their
threads, and a little later exit. Both are done in C, by a signal handler and a thread that needs no
interpreter lock, so they work when Python is stuck in an MPI call.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import os
import random
import signal
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.agreement import FAILED, InStep
from tests.launching import launched_rank, launched_size

LAUNCHED = Path(__file__).resolve().parent / "launched"
COMM = Path(__file__).resolve().parent / "comm"
LIMIT_S = 120.0
LAST_WORDS_S = 2.0
# Found, not imported; and here, before tests/xla pretends one.
HAS_XLA = importlib.util.find_spec("torch_xla") is not None


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--large", action="store_true", help="run the tests that need much memory or time")


@pytest.hookimpl(trylast=True)  # after pytest-mpi, which would report on MPI at length
def pytest_configure(config: pytest.Config) -> None:
    # A copy of stderr, made while pytest has no file in its place: stacks go to the screen.
    faulthandler.register(signal.SIGALRM, file=os.dup(2), all_threads=True)
    if launched_rank() is not None:
        config.option.with_mpi = True  # pytest-mpi's --with-mpi, so that nobody need remember it
        config.pluginmanager.register(InStep(), "in-step")


# ---- which tests run ---------------------------------------------------------------------------------------


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if launched_rank() is not None and collection_path == LAUNCHED else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if (launched_size() or 1) > 1:  # one rank is enough for what needs no other
        local = [item for item in items if "local" in item.keywords]
        config.hook.pytest_deselected(items=local)
        items[:] = [item for item in items if "local" not in item.keywords]
    elsewhere = [item for item in items if runs_on_another_mpi(item)]
    config.hook.pytest_deselected(items=elsewhere)
    items[:] = [item for item in items if item not in elsewhere]
    for item in items:
        if item.path.is_relative_to(LAUNCHED):
            item.add_marker("launch")
        if "large" in item.keywords and not config.getoption("--large"):
            item.add_marker(pytest.mark.skip(reason="needs much memory or time: --large"))
        if item.get_closest_marker("xla") and not HAS_XLA:  # the folder tests/xla is a keyword, too
            item.add_marker(pytest.mark.skip(reason="needs torch-xla: make test-xla"))
        if "cuda" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def runs_on_another_mpi(item: pytest.Item) -> bool:
    """Whether a test needs one MPI only, and tests/matrix.py runs it on that one.

    That is the one it names, or the first for what needs no other rank and is not about ranks at all.
    """
    here, everywhere = os.environ.get("HPCPAR_TEST_MPI"), os.environ.get("HPCPAR_TEST_MPIS", "").split()
    mark = item.get_closest_marker("one_mpi")
    if mark is not None:
        return mark.args[0] in everywhere and mark.args[0] != here
    is_about_ranks = item.path.is_relative_to(COMM)
    return "local" in item.keywords and not is_about_ranks and here in everywhere[1:]


# ---- time limit --------------------------------------------------------------------------------------------


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    mark = item.get_closest_marker("timeout_s")
    limit_s = float(mark.args[0]) if mark else LIMIT_S
    # First all ranks print; only then may one exit, since that makes mpirun kill the others.
    with open(os.devnull, "w") as nowhere:
        signal.setitimer(signal.ITIMER_REAL, limit_s)
        faulthandler.dump_traceback_later(limit_s + LAST_WORDS_S, exit=True, file=nowhere)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            signal.setitimer(signal.ITIMER_REAL, 0)


# ---- fixtures ----------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def equal_seeds(request: pytest.FixtureRequest) -> None:
    """Seed torch, numpy and random with the test's name: equal on all ranks, and from run to run."""
    seed = zlib.crc32(request.node.nodeid.encode())
    torch.manual_seed(seed)
    np.random.seed(seed)  # noqa: NPY002 - the global generator is what code under test may use
    random.seed(seed)


@pytest.fixture
def comm(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A Communicator over all ranks that no other test has touched."""
    from mpi4py import MPI

    import hpcpar

    mpi_comm = MPI.COMM_WORLD.Dup()
    communicator = hpcpar.comm.Communicator(mpi_comm)
    yield communicator
    if request.node.stash.get(FAILED, False):
        return  # messages may still be under way: rather leak it than free it under them
    with contextlib.suppress(hpcpar.errors.CommunicatorFreedError):  # a test may have freed it
        communicator.Free()
    mpi_comm.Free()
