"""One rank of a test run: ``python tests/rank_main.py FOLDER [pytest arguments]``, started by matrix.py.

Rank 0 writes to the screen; the others write to ``FOLDER/rank<r>.txt``, from the first line on, so that
four copies of pytest do not talk at once. Rank 0 keeps ``FOLDER/tally.json`` up to date after every test, so
that a run that crashes or is ended still tells how far it came. SIGUSR1 prints the stacks of all threads.

A rank whose pytest came to an orderly end exits with 0 whatever the tests said, which the tally tells: a
launcher answers another status by killing the remaining ranks before they have printed their reports.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest

from tests.launching import launched_rank

# INTERRUPTED: by errors in collection, which the tally counts.
ORDERLY = (
    pytest.ExitCode.OK,
    pytest.ExitCode.TESTS_FAILED,
    pytest.ExitCode.INTERRUPTED,
    pytest.ExitCode.NO_TESTS_COLLECTED,
)


class Tally:
    """A pytest plugin that counts outcomes in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._counts = {"passed": 0, "failed": 0, "skipped": 0}
        self._running: str | None = None
        self._finished = False
        self._write()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running = nodeid
        self._write()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # Set-up and tear-down count only when something is wrong with them, as in pytest's own summary.
        if report.when == "call" or not report.passed:
            self._counts[report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if not report.passed:
            self._counts[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        self._running, self._finished = None, True
        self._write()

    def _write(self) -> None:
        content = {**self._counts, "running": self._running, "finished": self._finished}
        scratch = self._path.with_suffix(".tmp")
        scratch.write_text(json.dumps(content))
        scratch.replace(self._path)  # a reader never sees half a file


def main(folder: Path, arguments: list[str]) -> int:
    rank = launched_rank() or 0
    if rank != 0:
        with open(folder / f"rank{rank}.txt", "w") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
    stacks = os.fdopen(os.dup(2), "w")  # pytest puts something else in the place of 2 while a test runs
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True)
    plugins = [Tally(folder / "tally.json")] if rank == 0 else []
    # No cache and a folder for each rank: several ranks would write to the same ones.
    scratch = folder / "tmp" / f"rank{rank}"
    scratch.parent.mkdir(exist_ok=True)
    own = ["-p", "no:cacheprovider", f"--basetemp={scratch}"]
    code = pytest.main([*own, *arguments], plugins=plugins)
    return 0 if code in ORDERLY else int(code)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
