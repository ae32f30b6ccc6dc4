"""Variables that were meant for hpcpar or OpenMP and that nobody understands."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator

from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, ok, spread, warning

__all__ = ["CHECKS", "KNOWN"]

KNOWN = (
    "HPCPAR_DEBUG",
    "HPCPAR_LOG_DIR",
    "HPCPAR_LOG_LEVEL",
    "HPCPAR_RANKS_PER_NODE",
    "HPCPAR_SKIP_LAUNCHER_CHECK",
    "HPCPAR_TIMEOUT_S",
)
"""Every variable that hpcpar reads."""

_OPENMP_LIST = re.compile(r"\s*[1-9]\d*\s*(,\s*[1-9]\d*\s*)*")


def _names(job: JobFacts) -> Iterator[Finding]:
    """Variables of hpcpar are spelt as hpcpar reads them."""
    found = False
    for facts, where in spread(job, lambda facts: sorted(filter(_is_unknown, facts.environment))):
        for name in filter(_is_unknown, facts.environment):
            found = True
            close = difflib.get_close_matches(name, KNOWN, 1)
            guess = f"; perhaps {close[0]} was meant" if close else ""
            yield warning(
                f"{name} is set{where}, which hpcpar does not know{guess}",
                "It has no effect.",
                f"Unset it. hpcpar reads {', '.join(KNOWN)}.",
            )
    if not found:
        yield ok("no variable HPCPAR_* that hpcpar does not know")


def _is_unknown(name: str) -> bool:
    return name.startswith("HPCPAR_") and name not in KNOWN and not name.startswith("HPCPAR_TEST_")


def _openmp(job: JobFacts) -> Iterator[Finding]:
    """OMP_NUM_THREADS is a number, or a list of numbers."""
    for facts, where in spread(job, lambda facts: facts.omp_threads):
        text = facts.omp_threads
        if text is not None and not _OPENMP_LIST.fullmatch(text):
            yield warning(
                f"OMP_NUM_THREADS is {text!r}{where}, which is no positive number",
                "OpenMP ignores it, and each rank may take all cores.",
                "Give it a positive number, or unset it: hpcpar.comm.world() then divides the cores itself.",
            )


CHECKS = (
    Check("settings.names", _names),
    Check("settings.openmp", _openmp),
)
