"""``hpcpar info``: what a bug report should begin with.

Alone it describes this process; under a launcher it describes all ranks at once. What is the same everywhere
is said once, what is particular to a rank stands in a table, and what *should* be the same but is not is
marked, against rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import click

from hpcpar.cli.device_check import CRASHED, DeviceVerdict, check_device_messages
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.output import (
    compact_ranges,
    format_bytes,
    format_table,
    is_first_process,
    paragraph,
    print_json,
    styled,
    terminal_width,
)
from hpcpar.cli.session import Watcher, start, timeout_option, watched
from hpcpar.comm import Communicator

__all__ = ["describe", "describe_ranks", "differences", "info"]

_LABEL_WIDTH = 18


@click.command(epilog="Example: mpirun -n 4 hpcpar info")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object: facts per rank.")
@timeout_option
def info(as_json: bool, timeout: float) -> None:
    """Show versions, the MPI library, cores, memory, GPUs and settings: of this process or of all ranks.

    Under mpirun or srun, rank 0 prints one table over all ranks. Alone, MPI is started as a job of one rank.
    """
    with watched(timeout, "info") as watcher:
        facts, comm = start(watcher)
        watcher.enter("the exchange of facts")
        everyone = [facts] if comm is None else comm.allgather(facts)
        verdict = _try_gpu(everyone, comm, watcher)
    if not is_first_process():
        return
    if as_json:
        content = {"ranks": [asdict(one) for one in everyone], "gpu_messages": verdict and asdict(verdict)}
        print_json({**content, "nodes": _nodes(comm)})
        return
    click.echo("\n".join(_lines(describe(facts, verdict))))
    if len(everyone) > 1:
        click.echo("\n" + describe_ranks(everyone, _nodes(comm)))
        for line in differences(everyone):
            click.echo(styled(line, fg="yellow", bold=True))


def _nodes(comm: Communicator | None) -> list[int]:
    return [0] if comm is None else list(comm.node_map.nodes)


def _try_gpu(
    everyone: Sequence[ProcessFacts], comm: Communicator | None, watcher: Watcher
) -> DeviceVerdict | None:
    """Only where every rank has a GPU and MPI says that it knows them: others would crash."""
    if comm is None or not all(one.gpus and one.mpi and one.mpi.gpu_claim for one in everyone):
        return None
    watcher.expect(CRASHED)
    return check_device_messages(comm)


def _lines(rows: Sequence[tuple[str, str]]) -> list[str]:
    return [paragraph(label, text, _LABEL_WIDTH, terminal_width()) for label, text in rows]


def describe(facts: ProcessFacts, verdict: DeviceVerdict | None = None) -> list[tuple[str, str]]:
    """Labels and texts about one process and its machine. Local."""
    packages = ", ".join(f"{name} {version}" for name, version in facts.versions.items())
    missing = "".join(f"; {name} cannot be imported: {text}" for name, text in facts.broken.items())
    parallel = "with" if facts.abilities.get("parallel HDF5") else "without"
    environment = ", ".join(f"{name}={value}" for name, value in facts.environment.items()) or "nothing"
    locking = facts.environment.get("HDF5_USE_FILE_LOCKING", "not set: on where the file system can lock")
    return [
        ("packages", packages + missing),
        ("python", f"{facts.python}, {facts.executable}"),
        ("HDF5", f"{facts.hdf5 or 'unknown'}, {parallel} MPI; HDF5_USE_FILE_LOCKING {locking}"),
        *_describe_mpi(facts, verdict),
        ("launcher", " ".join([facts.launcher.name, *facts.launcher.variables])),
        ("mpirun", f"{facts.mpirun} ({facts.mpirun_words})" if facts.mpirun else "none on PATH"),
        ("node", _describe_machine(facts)),
        ("cores", _describe_cores(facts)),
        ("memory", _describe_memory(facts)),
        ("/dev/shm", f"{format_bytes(facts.shm_free)} free of {format_bytes(facts.shm_total)}"),
        ("GPUs", ", ".join(facts.gpus) or f"none in torch; {facts.gpu_devices} in /dev"),
        ("environment", environment),
        *[("not found out", problem) for problem in facts.problems],
    ]


def _describe_mpi(facts: ProcessFacts, verdict: DeviceVerdict | None) -> list[tuple[str, str]]:
    mpi = facts.mpi
    if mpi is None:
        problem = facts.mpi_problem or "not started"
        return [("MPI", f"does not start: {problem}. `hpcpar doctor` says more")]
    claim = {True: "claimed", False: "no", None: "the library does not say"}[mpi.gpu_claim]
    proof = "" if verdict is None else f"; {verdict.summary}"
    tolerance = "yes" if mpi.revokes and mpi.survives else "no"
    if mpi.revokes and not mpi.survives:
        tolerance = "in the library, but the launcher ends a job that loses a rank: mpirun --with-ft ulfm"
    return [
        ("MPI", f"{mpi.name} {mpi.version} (standard {mpi.standard}), {mpi.path or 'path unknown'}"),
        ("mpi4py built for", mpi.built_for),
        ("thread level", mpi.thread_level),
        ("GPU-aware MPI", claim + proof),
        ("ULFM", tolerance),
    ]


def _describe_machine(facts: ProcessFacts) -> str:
    networks = ", ".join(facts.fast_networks)
    sockets = len({place.split("/")[0] for place in facts.physical_cores.values()})
    return f"{facts.host}, {sockets} socket(s)" + (f", network {networks}" if networks else "")


def _describe_cores(facts: ProcessFacts) -> str:
    quota = "" if facts.cpu_quota is None else f", time for {facts.cpu_quota:g} of them"
    threads = facts.omp_threads or "not set"
    return (
        f"{compact_ranges(facts.cores)} of {compact_ranges(facts.machine_cores)}{quota}; "
        f"{facts.torch_threads} thread(s) in torch, OMP_NUM_THREADS {threads}"
    )


def _describe_memory(facts: ProcessFacts) -> str:
    limit = "" if facts.memory_limit is None else f", limited to {format_bytes(facts.memory_limit)}"
    total = format_bytes(facts.memory_total)
    return f"{format_bytes(facts.memory_available)} available of {total}{limit}"


def describe_ranks(everyone: Sequence[ProcessFacts], nodes: Sequence[int]) -> str:
    """A table with a row per rank. Local.

    Parameters
    ----------
    everyone
        Facts of all ranks, in order.
    nodes
        Node of each rank.
    """
    rows = [
        [
            str(rank),
            str(nodes[rank]),
            one.host,
            compact_ranges(one.cores),
            str(one.torch_threads),
            str(len(one.gpus)),
            format_bytes(one.shm_free),
            "*" if _different(one, everyone[0]) else "",
        ]
        for rank, one in enumerate(everyone)
    ]
    head = ["rank", "node", "host", "cores", "threads", "GPUs", "/dev/shm free", ""]
    return format_table(head, rows)


def differences(everyone: Sequence[ProcessFacts]) -> list[str]:
    """Where a rank's versions or settings are not those of rank 0. Local."""
    return [
        f"* rank {rank}: {name} is {theirs}, rank 0 has {ours}"
        for rank, one in enumerate(everyone)
        for name, theirs, ours in _different(one, everyone[0])
    ]


def _different(one: ProcessFacts, first: ProcessFacts) -> list[tuple[str, Any, Any]]:
    mine, theirs = _comparable(one), _comparable(first)
    names = [*mine, *(name for name in theirs if name not in mine)]
    return [
        (name, mine.get(name, "missing"), theirs.get(name, "missing"))
        for name in names
        if mine.get(name) != theirs.get(name)
    ]


def _comparable(facts: ProcessFacts) -> dict[str, str]:
    """What ranks of one job should have alike."""
    mpi = {} if facts.mpi is None else {"MPI": f"{facts.mpi.name} {facts.mpi.version}"}
    level = {} if facts.mpi is None else {"thread level": facts.mpi.thread_level}
    settings = {name: value for name, value in facts.environment.items() if _is_setting(name)}
    return {"python": facts.python, "HDF5": facts.hdf5, **facts.versions, **mpi, **level, **settings}


def _is_setting(name: str) -> bool:
    """Launchers give each rank variables of its own; those say nothing."""
    return name.startswith(("HPCPAR_", "HDF5_", "OMP_", "MKL_", "UCX_", "FI_", "MPIR_CVAR_", "MPICH_"))
