"""Findings: what a check has to say, and the runner that turns a crash of a check into one more of them.

A check is a function from the facts of a job to findings. It measures nothing and touches nothing, so every
one can be tried with facts that are made up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from hpcpar.cli.device_check import DeviceVerdict
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.measure import PairResult

__all__ = [
    "Check",
    "Finding",
    "FolderFacts",
    "JobFacts",
    "Severity",
    "error",
    "judge",
    "name_ranks",
    "ok",
    "skipped",
    "spread",
    "warning",
    "worst",
]


class Severity(Enum):
    """How bad it is."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """What was seen, why it matters, and what to do; ``check`` is filled in by :func:`judge`."""

    severity: Severity
    seen: str
    why: str = ""
    remedy: str = ""
    check: str = ""


@dataclass(frozen=True)
class FolderFacts:
    """How a folder looks from one machine.

    Attributes
    ----------
    named : bool
        Whether the user asked for it, rather than starting the command there.
    problem : str or None
        Why nothing can be written there.
    lock_problem : str or None
        Why ``flock`` fails there.
    shared : bool or None
        Whether a file of rank 0 shows up here; ``None`` where there was none to look for.
    """

    path: str
    host: str
    named: bool = False
    file_system: str = "unknown"
    problem: str | None = None
    lock_problem: str | None = None
    shared: bool | None = None


@dataclass(frozen=True)
class JobFacts:
    """What is judged: facts of all ranks, and what they measured together.

    Attributes
    ----------
    ranks, nodes
        Facts of each rank, in order; the node of each, pretended ones included.
    clock_offsets_s
        Seconds by which the clock of a rank is ahead of rank 0's, one rank per machine.
    links, memcpy_bytes_per_s
        Measured pairs; what each rank copies per second while all do.
    gpu
        What came of sending device buffers.
    problems
        What could not be gathered: name and error.
    """

    ranks: Sequence[ProcessFacts]
    nodes: Sequence[int] = (0,)
    folders: Sequence[FolderFacts] = ()
    clock_offsets_s: Mapping[int, float] = field(default_factory=dict)
    links: Sequence[PairResult] = ()
    memcpy_bytes_per_s: float | None = None
    gpu: DeviceVerdict | None = None
    problems: Mapping[str, str] = field(default_factory=dict)

    @property
    def first(self) -> ProcessFacts:
        """Rank 0's."""
        return self.ranks[0]

    @property
    def machines(self) -> dict[str, list[int]]:
        """Ranks on each real machine."""
        found: dict[str, list[int]] = {}
        for rank, facts in enumerate(self.ranks):
            found.setdefault(facts.machine, []).append(rank)
        return found


@dataclass(frozen=True)
class Check:
    """A name such as ``"binding.cores"``, and what judges."""

    name: str
    function: Callable[[JobFacts], Iterable[Finding]]


def ok(seen: str) -> Finding:
    """All is well. Local."""
    return Finding(Severity.OK, seen)


def skipped(reason: str) -> Finding:
    """Nothing can be said. Local."""
    return Finding(Severity.SKIPPED, reason)


def warning(seen: str, why: str, remedy: str) -> Finding:
    """It works, but slowly, or not everywhere. Local."""
    return Finding(Severity.WARNING, seen, why, remedy)


def error(seen: str, why: str, remedy: str) -> Finding:
    """Training fails, or is wrong. Local."""
    return Finding(Severity.ERROR, seen, why, remedy)


def judge(checks: Iterable[Check], facts: JobFacts) -> list[Finding]:
    """Findings of all checks, in order, those of one that crashes too. Local."""
    findings: list[Finding] = []
    for check in checks:
        try:
            found = list(check.function(facts))
        except Exception as problem:
            found = [
                warning(
                    f"the check itself failed: {type(problem).__name__}: {problem}",
                    "What it looks at is not known to be well.",
                    "Report this as a fault of hpcpar, with the output of `hpcpar info --json`.",
                )
            ]
        findings += [replace(finding, check=check.name) for finding in found]
    return findings


def worst(findings: Iterable[Finding]) -> Severity:
    """The severity of the worst; skipped ones count as well. Local."""
    severities = {finding.severity for finding in findings}
    return next((s for s in (Severity.ERROR, Severity.WARNING) if s in severities), Severity.OK)


def spread(job: JobFacts, key: Callable[[ProcessFacts], object]) -> list[tuple[ProcessFacts, str]]:
    """Facts of one rank for each distinct ``key``, and " on ranks 3 and 4" where others differ. Local.

    A check that looks at what usually is the same everywhere looks once then, and names who is the odd one.
    """
    groups: dict[str, list[int]] = {}
    for rank, facts in enumerate(job.ranks):
        groups.setdefault(repr(key(facts)), []).append(rank)
    only = len(groups) == 1
    return [(job.ranks[ranks[0]], "" if only else f" on {name_ranks(ranks)}") for ranks in groups.values()]


def name_ranks(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 0 and 1``, ``ranks 0, 1, 2 and 61 more``. Local."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 6:
        return f"ranks {', '.join(map(str, ranks[:3]))} and {len(ranks) - 3} more"
    return f"ranks {', '.join(map(str, ranks[:-1]))} and {ranks[-1]}"
