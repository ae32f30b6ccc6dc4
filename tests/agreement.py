"""Keep the ranks of a test run in step: what happened to a test on one rank, happened on all of them.

Every rank runs the same tests in the same order, and a test is collective. Suppose that rank 1 fails on its
own and goes on to the next test, while the others wait for it in this one: that run hangs, or worse, pairs
messages of two tests. So after every phase of every test the ranks exchange how it went, and the worst
outcome holds for all::

    rank 0   test passes ──┐                ┌── failed on rank 1: assert 3 == 4
    rank 1   test fails  ──┼── Iallgather ──┼── assert 3 == 4
    rank 2   test skips  ──┘                └── failed on rank 1: assert 3 == 4

Invariant: ranks leave an agreement with equal outcomes, or not at all. A rank that never arrives, because it
still hangs in the test, is the time limit's business (conftest.py); until then the waiting ranks sleep, since
ranks may outnumber cores.
"""

from __future__ import annotations

import os
import sys
import time
import zlib
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import pytest

from tests.launching import launched_size

__all__ = ["FAILED", "InStep"]

FAILED = pytest.StashKey[bool]()

OUTCOMES = ("passed", "skipped", "failed")  # in order of badness
PATIENCE_S = 5.0
TEXT_LIMIT = 8000


class InStep:
    """A pytest plugin for runs under ``mpirun``. Made on all ranks together; every hook is collective."""

    def __init__(self) -> None:
        # The library sets this itself, but here MPI is up before the library; see docs/installation.md.
        os.environ.setdefault("OMPI_MCA_osc", "^ucx")
        # Here and not above: merely importing MPI initialises it, which tests that start mpirun must not.
        from mpi4py import MPI

        self._mpi = MPI.COMM_WORLD.Dup()
        self.rank, self.size = self._mpi.rank, self._mpi.size
        self._library = " ".join(MPI.Get_library_version().partition(",")[0].splitlines()[0].split())
        started = launched_size() or self.size
        if started != self.size:  # every rank would test by itself, and all would pass
            pytest.exit(
                f"the launcher must belong to the MPI library ({self._library}), got {started} ranks from "
                f"the launcher and {self.size} from the library",
                returncode=3,
            )

    # ---- hooks

    def pytest_report_header(self) -> str:
        return f"mpi: {self.size} ranks, {self._library}"

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        names = "\n".join(item.nodeid for item in session.items)
        mine = (len(session.items), session.testsfailed, zlib.crc32(names.encode()))
        seen = self._mpi.allgather(mine)
        if any(other != mine for other in seen):
            counts = ", ".join(
                f"rank {rank}: {tests} ({errors} errors)" for rank, (tests, errors, _) in enumerate(seen)
            )
            pytest.exit(f"all ranks must collect the same tests, got {counts}", returncode=3)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        self._settle(report, _reason(report, call))
        if report.failed:
            item.stash[FAILED] = True
        return report

    def pytest_keyboard_interrupt(self, excinfo: pytest.ExceptionInfo[BaseException]) -> None:
        # pytest's own kinds (exit, -x, errors in collection) come here too, but on all ranks.
        if excinfo.type is KeyboardInterrupt:
            self._abort("interrupted", 130)

    def pytest_internalerror(self, excrepr: Any) -> None:
        self._abort(f"pytest has failed itself:\n{excrepr}", 3)

    def pytest_unconfigure(self) -> None:
        self._mpi.Free()

    # ---- agreeing

    def _settle(self, report: pytest.TestReport, reason: str) -> None:
        """Give a report the worst outcome of all ranks."""
        step = f"{report.nodeid} ({report.when})"
        outcomes = self._exchange(
            OUTCOMES.index(report.outcome), step, lambda: _early_words(self.rank, report)
        )
        worst = max(outcomes)
        if worst == 0:
            return
        texts = self._mpi.allgather((reason, report.longreprtext[-TEXT_LIMIT:]))
        guilty = [rank for rank, outcome in enumerate(outcomes) if outcome == worst]
        if OUTCOMES[worst] == "failed":
            self._fail(report, {rank: texts[rank] for rank in guilty})
        elif report.outcome == "passed":
            report.outcome = "skipped"
            path, line, _ = report.location
            report.longrepr = (path, line or 0, f"Skipped: on rank {guilty[0]}: {texts[guilty[0]][0]}")

    def _fail(self, report: pytest.TestReport, guilty: dict[int, tuple[str, str]]) -> None:
        others = [
            f"failed on rank {rank}: {reason}" for rank, (reason, _) in guilty.items() if rank != self.rank
        ]
        if report.outcome != "failed":
            report.outcome, report.longrepr = "failed", "\n".join(others)
            # Whoever reads this rank's output wants to see one whole traceback.
            first = min(guilty)
            report.sections.append((f"traceback of rank {first}", guilty[first][1]))
        elif others:
            report.sections.append(("other ranks", "\n".join(others)))

    def _exchange(self, outcome: int, step: str, if_it_takes_long: Callable[[], None]) -> list[int]:
        mine = np.array([outcome, zlib.crc32(step.encode())], dtype=np.int64)
        everyones = np.empty((self.size, 2), dtype=np.int64)
        request = self._mpi.Iallgather(mine, everyones)
        start_s, pause_s, patient = time.monotonic(), 20e-6, True
        while not request.Test():
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 5e-3)
            if patient and time.monotonic() - start_s > PATIENCE_S:
                patient = False
                if_it_takes_long()
        if (everyones[:, 1] != mine[1]).any():
            self._abort(f"the ranks are out of step; this one has reached {step}", 3)
        return [int(value) for value in everyones[:, 0]]

    def _abort(self, reason: str, status: int) -> None:
        """Take all ranks down: this one cannot go on and the others would wait for it."""
        print(f"\nrank {self.rank} of {self.size}: {reason}", file=sys.stderr, flush=True)
        self._mpi.Abort(status)


def _reason(report: pytest.TestReport, call: pytest.CallInfo[None]) -> str:
    """Return a few lines on why a test failed or was skipped."""
    if report.passed:
        return ""
    text = call.excinfo.exconly() if call.excinfo is not None else report.longreprtext
    return "\n".join(text.strip().splitlines()[:6])


def _early_words(rank: int, report: pytest.TestReport) -> None:
    # Said now, for if the others never come, no report is ever printed.
    if report.failed:
        print(
            f"\nrank {rank}: {report.nodeid} has failed here ({report.when}); other ranks are still in it:\n"
            f"{report.longreprtext}",
            file=sys.stderr,
            flush=True,
        )
