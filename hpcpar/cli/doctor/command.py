"""``hpcpar doctor``: gather, judge, explain; the exit status tells a job script whether to go on.

The table of checks is here; what they do is in the files of their groups. Rank 0 judges and speaks; where MPI
takes a job for many jobs of one rank, the launcher's first process does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from hpcpar.cli.doctor import binding, gpus, launcher, libraries, memory, network, settings, storage
from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, Severity, judge, warning, worst
from hpcpar.cli.doctor.gather import gather
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.output import is_first_process, paragraph, print_json, styled, terminal_width
from hpcpar.cli.session import start, timeout_option, watched

__all__ = ["CHECKS", "doctor", "examine", "report"]

_INDENT = 9
_SHOWN_ALIKE = 4
_COLOURS = {Severity.OK: "green", Severity.SKIPPED: "blue", Severity.WARNING: "yellow", Severity.ERROR: "red"}


def _gathered(job: JobFacts) -> list[Finding]:
    """What could not be found out is a finding as well."""
    first = {problem: f"on {facts.host}" for facts in job.ranks for problem in facts.problems}
    together = {f"{name}: {text}": "together" for name, text in job.problems.items()}
    return [
        warning(
            f"not found out {where}: {text}",
            "The checks that need it say nothing.",
            "Report this as a fault of hpcpar, with the output of `hpcpar info --json`.",
        )
        for text, where in {**first, **together}.items()
    ]


CHECKS: tuple[Check, ...] = (
    *launcher.CHECKS,
    *settings.CHECKS,
    *libraries.CHECKS,
    *gpus.CHECKS,
    *binding.CHECKS,
    *memory.CHECKS,
    *storage.CHECKS,
    *network.CHECKS,
    Check("doctor.facts", _gathered),
)


@click.command(
    epilog="Example: mpirun -n 4 hpcpar doctor --folder /scratch/me && mpirun -n 4 python train.py"
)
@click.option(
    "--folder",
    "folders",
    type=click.Path(path_type=Path),
    multiple=True,
    help="A folder that the job reads or writes, besides the current one; may be given several times.",
)
@click.option("--strict", is_flag=True, help="Exit with status 1 for warnings, too.")
@click.option("--quiet", is_flag=True, help="Show what is wrong only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: status and findings.")
@timeout_option
def doctor(folders: tuple[Path, ...], strict: bool, quiet: bool, as_json: bool, timeout: float) -> int:
    """Find out what is wrong with an installation or a job, why it matters, and what to do.

    Start it as you start your training, with the same launcher, ranks, nodes and modules; alone it looks at
    this process and machine. It takes a few seconds.

    Rank 0 speaks for all. Its exit status is 0 when nothing or only warnings were found, 1 for errors (with
    --strict: for warnings, too), and 2 for mistakes in the command line.
    """
    wanted = [(folder.absolute(), True) for folder in folders]
    if (Path.cwd(), True) not in wanted:
        wanted.insert(0, (Path.cwd(), False))
    with watched(timeout, "doctor") as watcher:
        facts, comm = start(watcher, _last_words, _complaint)
        if comm is None and not is_first_process():
            return 0  # the first one explains; any other status would end it before it has
        job = gather(facts, comm, wanted, watcher)
    findings = examine(job)
    severity = worst(findings)
    if is_first_process():
        if as_json:
            print_json(_content(job, findings))
        else:
            click.echo(report(findings, quiet=quiet))
    bad = (Severity.ERROR, Severity.WARNING) if strict else (Severity.ERROR,)
    return int(severity in bad)


def _complaint(facts: ProcessFacts) -> str:
    """What a rank says that is the only one to have a problem: the others are waiting for it in MPI."""
    found = judge((*launcher.CHECKS, *libraries.CHECKS), JobFacts([facts]))
    return "this rank is without MPI\n" + "\n".join(
        _block(finding) for finding in found if finding.severity is Severity.ERROR
    )


def _last_words(facts: ProcessFacts) -> str:
    """What is wrong as far as one process can tell, in case MPI ends it."""
    suspects = [f for f in judge(memory.CHECKS, JobFacts([facts])) if f.severity is not Severity.OK]
    others = (facts.launcher.size or 1) > 1
    who = "MPI ended this process when it started" + (", or another rank's end did" if others else "")
    if not suspects:
        return (
            f"{who}, and nothing on this machine shows why. Start a single rank, look at what MPI itself has "
            "printed, and check that its mpirun belongs to its library"
        )
    return f"{who}. What was seen before:\n" + "\n".join(map(_block, suspects))


def examine(job: JobFacts) -> list[Finding]:
    """Findings of all checks. Local."""
    return judge(CHECKS, job)


def _content(job: JobFacts, findings: Sequence[Finding]) -> dict[str, Any]:
    return {
        "status": worst(findings).value,
        "ranks": len(job.ranks),
        "machines": len(job.machines),
        "findings": [{**asdict(finding), "severity": finding.severity.value} for finding in findings],
        "messages": [asdict(link) for link in job.links],
        "memcpy_bytes_per_s": job.memcpy_bytes_per_s,
    }


def report(findings: Sequence[Finding], *, quiet: bool = False) -> str:
    """Text for people: a line for what is well, a paragraph for what is not, worst last. Local.

    Of many machines with the same finding the first ones are shown.
    """
    order = [Severity.OK, Severity.SKIPPED, Severity.WARNING, Severity.ERROR]
    shown = sorted(findings, key=lambda finding: order.index(finding.severity))
    bad = {severity: sum(f.severity is severity for f in findings) for severity in order[2:]}
    groups: dict[tuple[Severity, str], list[Finding]] = {}
    for finding in shown:
        if not quiet or finding.severity in bad:
            groups.setdefault((finding.severity, finding.check), []).append(finding)
    blocks = [block for group in groups.values() for block in _blocks(group)]
    verdict = ", ".join(f"{count} {severity.value}(s)" for severity, count in bad.items() if count)
    return "\n".join([*blocks, verdict or "Nothing is wrong."])


def _blocks(group: Sequence[Finding]) -> list[str]:
    blocks = [_block(finding) for finding in group[:_SHOWN_ALIKE]]
    rest = len(group) - _SHOWN_ALIKE
    if rest > 0:
        word = group[0].severity.value.ljust(_INDENT)
        blocks.append(f"{word}{group[0].check}: and {rest} more like these (--json shows all)")
    return blocks


def _block(finding: Finding) -> str:
    columns = terminal_width()
    text = paragraph(finding.severity.value, f"{finding.check}: {finding.seen}", _INDENT, columns)
    word = finding.severity.value
    lines = [styled(word, fg=_COLOURS[finding.severity], bold=True) + text[len(word) :]]
    for label, words in (("why", finding.why), ("remedy", finding.remedy)):
        if words:
            lines.append(paragraph(" " * _INDENT + label, words, _INDENT + 8, columns))
    return "\n".join(lines) + ("\n" if finding.why else "")
