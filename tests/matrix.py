"""Run the tests on every MPI with every number of ranks: what ``make test`` runs.

::

                  1 rank   2 ranks   3 ranks   4 ranks   launched
    MPICH            x         x         x         x         x
    Open MPI         x         x         x         x         x
    torch-xla        x         x                          marked xla

A cell is one ``mpirun -n N`` of pytest; "launched" is one ordinary pytest of ``tests/launched``, whose tests
start ``mpirun`` themselves. Cells run one after the other, for each uses all cores. What tests scripts rather
than the library, such as the examples, is marked ``one_mpi`` and runs on that one if both are chosen; so does
what is ``local``, on the first, unless it tests hpcpar.comm.

The last row is a run of its own, ``make test-xla``: MPICH again, with torch-xla and the oldest torch that
hpcpar supports. Of what starts ``mpirun``, only that which needs torch-xla runs there.

Rank 0 writes to the screen, the others to ``build/tests/<mpi>-<ranks>/rank<r>.txt``, of which the ends are
shown on failure.

A cell over its time limit prints the stacks of its ranks, is ended with everything it started, and has
failed. The last line reads ``N passed, M failed, K skipped``, over all cells; the exit status is 0 if none
failed and every cell ran something. With ``-k`` a cell may find nothing to run, as long as some other does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.launching import Job, find_launcher

ROOT = Path(__file__).resolve().parent.parent
LAUNCHED = ROOT / "tests" / "launched"
OUTPUT = ROOT / "build" / "tests"
VARIABLES = {
    "HPCPAR_TIMEOUT_S": "60",  # below a test's own limit, so that a stall shows as our error, with names
    "OMP_NUM_THREADS": "1",
    "PYTHONUNBUFFERED": "1",  # rank 0 is at the screen: show each test as it ends
}
STACKS_S = 2.0
SHOWN_LINES = 80


@dataclass(frozen=True)
class Environment:
    """One row of the table: an interpreter, which finds its MPI, and what its tests need."""

    python: str
    target: str = "make env"  # what builds it
    ranks: Sequence[int] = (1, 2, 3, 4)
    variables: Mapping[str, str] = field(default_factory=dict)
    launched_mark: str | None = None  # of the launched tests, only those that are marked so


ENVIRONMENTS = {
    "mpich": Environment(str(ROOT / ".venv/bin/python")),
    "openmpi": Environment(str(ROOT / ".venv-openmpi/bin/python")),
    "xla": Environment(
        str(ROOT / ".venv-xla/bin/python"),
        target="make env-xla",
        ranks=(1, 2),
        variables={"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": "2"},  # two devices in every rank
        launched_mark="xla",
    ),
    # Whatever MPI the interpreter that runs this finds, for trying a cluster's own.
    "site": Environment(sys.executable),
}


@dataclass(frozen=True)
class Cell:
    """One run of pytest; without ranks it is not under ``mpirun``."""

    mpi: str
    ranks: int | None
    paths: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.mpi}-{'launched' if self.ranks is None else self.ranks}"


@dataclass
class Result:
    """How a cell went; ``trouble`` is what went wrong besides tests that failed."""

    cell: Cell
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    duration_s: float = 0.0
    trouble: list[str] = field(default_factory=list)

    @property
    def ran_nothing(self) -> bool:
        return self.passed + self.failed == 0


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    missing = [mpi for mpi in options.mpi if not Path(ENVIRONMENTS[mpi].python).exists()]
    for mpi in missing:
        print(f"no environment for {mpi}; `{ENVIRONMENTS[mpi].target}` builds it", file=sys.stderr)
    if missing:
        return 2
    # A plain `kill` must end what we have started, too.
    signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
    results = []
    for cell in plan(options.mpi, options.ranks, options.paths):
        result = run(cell, options)
        results.append(result)
        if options.exitfirst and result.failed:
            break
    return summarise(results, may_be_empty=options.expression is not None)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files, folders or test names (default: tests)")
    parser.add_argument(
        "--mpi", nargs="+", metavar="MPI", default=["mpich", "openmpi"], help=", ".join(ENVIRONMENTS)
    )
    parser.add_argument("--ranks", nargs="+", metavar="N", default=[], help="default: the table's")
    parser.add_argument("-k", dest="expression", metavar="EXPR", help="only tests that match, as in pytest")
    parser.add_argument("-x", dest="exitfirst", action="store_true", help="stop at the first failure")
    parser.add_argument("--large", action="store_true", help="with the tests that need much memory or time")
    parser.add_argument("--limit-s", type=float, default=1800.0, help="time limit of a cell (default 1800)")
    options = parser.parse_args(arguments)
    # In `--ranks 3 tests/comm` argparse takes the path for another number of ranks; we know better.
    paths = [word for word in options.mpi if word not in ENVIRONMENTS]
    paths += [word for word in options.ranks if not word.isdigit()]
    options.paths += paths
    options.mpi = [word for word in options.mpi if word in ENVIRONMENTS]
    options.ranks = [int(word) for word in options.ranks if word.isdigit()]
    for path in options.paths:
        if not Path(path.partition("::")[0]).exists():
            parser.error(
                f"{path} must be an MPI ({', '.join(ENVIRONMENTS)}), a number of ranks or an existing path"
            )
    options.paths = options.paths or [str(ROOT / "tests")]
    return options


def plan(mpis: Sequence[str], ranks: Sequence[int], paths: Sequence[str]) -> Iterator[Cell]:
    """Yield the cells: in-process tests on each number of ranks (if none is given, the table's), then the
    launched ones once per MPI.
    """
    full = {path: Path(path.partition("::")[0]).resolve() for path in paths}
    in_process = tuple(path for path in paths if not full[path].is_relative_to(LAUNCHED))
    launched = tuple(path for path in paths if path not in in_process)
    if not launched and any(LAUNCHED.is_relative_to(folder) for folder in full.values()):
        launched = (str(LAUNCHED),)
    for mpi in mpis:
        for size in (ranks or ENVIRONMENTS[mpi].ranks) if in_process else ():
            yield Cell(mpi, size, in_process)
    for mpi in mpis if launched else ():
        yield Cell(mpi, None, launched)


def run(cell: Cell, options: argparse.Namespace) -> Result:
    folder = OUTPUT / cell.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    print(f"\n=== {cell.name} ".ljust(100, "="), flush=True)
    result = Result(cell)
    with start(cell, options, folder) as job:
        if not job.wait(options.limit_s):
            result.trouble.append(f"not done in {options.limit_s:g} s")
            print(f"\n{cell.name} is not done in {options.limit_s:g} s; the stacks of its ranks:", flush=True)
            job.signal_ranks(signal.SIGUSR1)
            time.sleep(STACKS_S)
        job.end()
        result.duration_s = time.monotonic() - job.started_s
        if job.process.returncode != 0:
            result.trouble.append(f"exit status {job.process.returncode}")
    read_tally(folder / "tally.json", result)
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    if result.failed:
        show_other_ranks(folder)
    return result


def start(cell: Cell, options: argparse.Namespace, folder: Path) -> Job:
    environment = ENVIRONMENTS[cell.mpi]
    launcher = find_launcher(environment.python)
    mark = environment.launched_mark if cell.ranks is None else None
    selection = [
        "-q",
        *(["-m", mark] if mark else []),
        *(["-k", options.expression] if options.expression else []),
        *(["-x"] if options.exitfirst else []),
        *(["--large"] if options.large else []),
    ]
    rank_main = str(ROOT / "tests/rank_main.py")
    program = [environment.python, rank_main, str(folder), *selection, *cell.paths]
    command = program if cell.ranks is None else launcher.command(cell.ranks, program)
    which = {"HPCPAR_TEST_MPI": cell.mpi, "HPCPAR_TEST_MPIS": " ".join(options.mpi)}
    return Job(command, env=launcher.environment({**VARIABLES, **environment.variables, **which}))


def read_tally(path: Path, result: Result) -> None:
    tally = json.loads(path.read_text()) if path.exists() else {}
    result.passed, result.failed, result.skipped = (
        tally.get(key, 0) for key in ("passed", "failed", "skipped")
    )
    if not tally.get("finished", False):
        result.trouble.append(f"ended in {tally.get('running') or 'start-up or collection'}")
    if result.trouble:  # the test it ended in, or the cell itself when there was none, has failed
        result.failed += 1


def show_other_ranks(folder: Path) -> None:
    for path in sorted(folder.glob("rank*.txt")):
        lines = path.read_text(errors="replace").splitlines()
        left_out = f", the last {SHOWN_LINES} lines" if len(lines) > SHOWN_LINES else ""
        print(f"\n--- {path.relative_to(ROOT)}{left_out}", *lines[-SHOWN_LINES:], sep="\n")


def summarise(results: Sequence[Result], *, may_be_empty: bool) -> int:
    """Print the closing table and return the exit status."""
    print(f"\n{'mpi':<10}{'ranks':>9}{'time':>10}{'passed':>9}{'failed':>9}{'skipped':>9}")
    for result in results:
        if result.ran_nothing and not may_be_empty:
            result.trouble.append("ran no test")
            result.failed += 1
        ranks = result.cell.ranks or "launched"
        counts = f"{result.passed:>9}{result.failed:>9}{result.skipped:>9}"
        row = (
            f"{result.cell.mpi:<10}{ranks:>9}{result.duration_s:>8.1f} s{counts}  {'; '.join(result.trouble)}"
        )
        print(row.rstrip())
    passed, failed, skipped = (
        sum(getattr(result, key) for result in results) for key in ("passed", "failed", "skipped")
    )
    if passed + failed == 0:
        print("no run executed a test")
    print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return 1 if failed or passed == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
