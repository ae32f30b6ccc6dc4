"""A job script for a cluster, from a request of a few numbers: what ``hpcpar job`` writes.

A script has five parts, always in this order, and each is a short list of lines::

    header        #SBATCH ...            what the job needs, and where it goes
    environment   module load, export    threads, cores per rank
    launch        srun ... or mpirun     with the site's binding
    wait          trap, wait             only where the job is signalled before its limit
    requeue       scontrol requeue       only where it goes on by itself

The request is checked against the site's nodes first, because a queue answers hours later, or never. What is
written does what the scripts of the folder ``jobs`` do, which carry the reasons in more words.

Invariant: the same request gives the same text; there is no clock, path or host name in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hpcpar.errors import HpcparError
from hpcpar.jobs.preemption import REQUEUE_STATUS
from hpcpar.jobs.sites import NodeKind, Site

__all__ = ["LAUNCHERS", "JobRequest", "seconds_of", "write_script"]

LAUNCHERS = ("srun", "mpirun")
_SIGNAL_BEFORE_S = 120  # long enough for a step and a checkpoint
_MAX_RESTARTS = 50
_TIME = re.compile(r"(?:(?P<d>\d+)-)?(?P<h>\d{1,3}):(?P<m>[0-5]\d):(?P<s>[0-5]\d)")
_WORD = re.compile(r"[\w.@+:/-]+")
_ARRAY = re.compile(r"\d+(-\d+(:\d+)?)?(,\d+(-\d+(:\d+)?)?)*(%\d+)?")
_OUTPUT = re.compile(r"[\w.@+:/%-]+")


@dataclass(frozen=True)
class JobRequest:
    """What is wanted of a job.

    Attributes
    ----------
    command
        The program and its arguments, such as ``("python", "train.py")``.
    nodes, ranks_per_node
        How many.
    time
        The limit, as hours:minutes:seconds or days-hours:minutes:seconds.
    cpus_per_rank
        Cores of each rank; by default an equal share of the node's, one where the site's nodes are not known.
    gpus_per_node
        GPUs on each node, one for each rank; 0 for none. By default none, or all of them where a site has
        no other nodes.
    account, partition, qos, name, output
        As ``sbatch`` takes them; the site's usual ones by default.
    requeue
        Queue again after a stop for the time limit, or a failed node.
    signal_before_s
        Seconds before the limit at which the ranks are told; 120 by default where the job requeues.
    array
        Task numbers as ``sbatch`` takes them, such as ``0-9%2``.
    launcher
        One of :data:`LAUNCHERS`; the site's usual one by default.
    """

    command: Sequence[str]
    nodes: int = 1
    ranks_per_node: int = 1
    time: str = "01:00:00"
    cpus_per_rank: int | None = None
    gpus_per_node: int | None = None
    account: str | None = None
    partition: str | None = None
    qos: str | None = None
    name: str = "train"
    output: str | None = None
    requeue: bool = False
    signal_before_s: int | None = None
    array: str | None = None
    launcher: str | None = None


@dataclass(frozen=True)
class _Plan:
    """A request with all its defaults filled in, and checked."""

    request: JobRequest
    site: Site
    kind: NodeKind
    cores_per_rank: int
    gpus: int
    launcher: str
    signal_before_s: int | None


def write_script(site: Site, request: JobRequest, made_by: str = "hpcpar job") -> str:
    """Return the text of a job script. Local.

    Parameters
    ----------
    site
        For which cluster, from :func:`hpcpar.jobs.sites.find_site`.
    request
        What is wanted.
    made_by
        The command that a comment names, so that the script can be made again.

    Raises
    ------
    HpcparError
        When the request does not fit the site's nodes, lacks what the site wants, or is no valid one.
    """
    plan = _plan(site, request)
    parts = [_header(plan, made_by), _environment(plan), _launch(plan)]
    if plan.signal_before_s is not None:
        parts.append(_wait())
    if request.requeue:
        parts.append(_requeue())
    elif plan.signal_before_s is not None:
        parts.append(['exit "$status"'])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"


def seconds_of(time: str) -> int:
    """Return the seconds of a time limit such as ``02:00:00`` or ``1-12:00:00``. Local.

    Raises
    ------
    HpcparError
        For anything else; ``sbatch`` would take a lone number for minutes.
    """
    match = _TIME.fullmatch(time)
    if match is None:
        raise HpcparError(f"time must be hours:minutes:seconds or days-hours:minutes:seconds, got {time!r}")
    days, hours, minutes, seconds = (int(match[unit] or 0) for unit in "dhms")
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


# ---- checks ------------------------------------------------------------------------------------------------


def _plan(site: Site, request: JobRequest) -> _Plan:
    _check_words(site, request)
    kind, gpus = _kind_of(site, request)
    signal_s = request.signal_before_s
    if signal_s is None and request.requeue:
        signal_s = _SIGNAL_BEFORE_S
    _check_time(request.time, kind, signal_s)
    launcher = request.launcher or site.launcher
    if launcher not in LAUNCHERS:
        raise HpcparError(f"launcher must be one of {', '.join(LAUNCHERS)}, got {launcher!r}")
    return _Plan(request, site, kind, _cores_per_rank(request, kind), gpus, launcher, signal_s)


def _check_words(site: Site, request: JobRequest) -> None:
    if not request.command:
        raise HpcparError("command must be a program and its arguments, got nothing. Put it after --")
    for name in ("nodes", "ranks_per_node"):
        if getattr(request, name) < 1:
            raise HpcparError(f"{name} must be at least 1, got {getattr(request, name)}")
    rules = {
        "account": _WORD,
        "partition": _WORD,
        "qos": _WORD,
        "name": _WORD,
        "output": _OUTPUT,
        "array": _ARRAY,
    }
    for name, rule in rules.items():
        value = getattr(request, name)
        if value is not None and not rule.fullmatch(value):
            form = "like 0-9 or 0-9%2" if name == "array" else "one word of letters, digits and ._-+@:/"
            raise HpcparError(f"{name} must be {form}, got {value!r}")
    if site.needs_account and request.account is None:
        raise HpcparError(f"account must be given on {site.title}, got none. It is the project that pays")


def _kind_of(site: Site, request: JobRequest) -> tuple[NodeKind, int]:
    """Which nodes, and how many GPUs on each."""
    gpus = request.gpus_per_node
    if gpus is None:
        gpus = 0 if site.cpu is not None or site.gpu is None else (site.gpu.gpus or 0)
    kind = site.gpu if gpus else site.cpu
    if kind is None:
        has = "no GPUs" if gpus else "only nodes with GPUs"
        raise HpcparError(f"gpus_per_node must fit {site.title}, which has {has}, got {gpus}")
    if gpus < 0 or (kind.gpus is not None and gpus > kind.gpus):
        raise HpcparError(f"gpus_per_node must be 0 to {kind.gpus} on {site.title}, got {gpus}")
    if gpus and request.ranks_per_node != gpus:
        raise HpcparError(
            f"ranks_per_node must equal gpus_per_node, {gpus}, since each rank computes on one GPU, "
            f"got {request.ranks_per_node}"
        )
    return kind, gpus


def _cores_per_rank(request: JobRequest, kind: NodeKind) -> int:
    ranks, cores = request.ranks_per_node, kind.cores
    if cores is not None and ranks > cores:
        raise HpcparError(f"ranks_per_node must be at most the node's {cores} cores, got {ranks}")
    # A node with unused GPUs keeps their cores: the ranks stay next to their own.
    shares = max(ranks, kind.gpus or 0)
    cpus = request.cpus_per_rank or (1 if cores is None else cores // shares)
    if cpus < 1 or (cores is not None and ranks * cpus > cores):
        raise HpcparError(
            f"cpus_per_rank times ranks_per_node must be at most {cores}, the node's cores, "
            f"got {cpus} x {ranks}"
        )
    if kind.core_groups and cores is not None and cpus > (group := cores // len(kind.core_groups)):
        raise HpcparError(f"cpus_per_rank must be at most {group}, the cores next to a GPU, got {cpus}")
    return cpus


def _check_time(time: str, kind: NodeKind, signal_before_s: int | None) -> None:
    limit_s = seconds_of(time)
    if limit_s < 60:
        raise HpcparError(f"time must be at least a minute, got {time}")
    if kind.longest_h is not None and limit_s > kind.longest_h * 3600:
        raise HpcparError(
            f"time must be at most {kind.longest_h} hours on these nodes, got {time}: see {kind.page}"
        )
    if signal_before_s is not None and not 0 < signal_before_s < limit_s:
        raise HpcparError(
            f"signal_before must be 1 s to less than the time limit of {time}, got {signal_before_s} s"
        )


# ---- parts -------------------------------------------------------------------------------------------------


def _header(plan: _Plan, made_by: str) -> list[str]:
    request = plan.request
    number = "%A_%a" if request.array else "%j"
    options = [
        f"--job-name={request.name}",
        *(f"--account={value}" for value in [request.account] if value),
        *(f"--partition={value}" for value in [request.partition or plan.kind.partition] if value),
        *(f"--qos={value}" for value in [request.qos or plan.kind.qos] if value),
        *plan.kind.directives,
        f"--nodes={request.nodes}",
        f"--ntasks-per-node={request.ranks_per_node}",
        f"--cpus-per-task={plan.cores_per_rank * plan.kind.cpus_per_core}",
        *([plan.kind.gpu_directive.format(gpus=plan.gpus)] if plan.gpus else []),
        f"--time={request.time}",
        *(f"--array={value}" for value in [request.array] if value),
        *([] if plan.signal_before_s is None else [f"--signal=B:USR1@{plan.signal_before_s}"]),
        *(["--requeue", "--open-mode=append"] if request.requeue else []),
        f"--output={request.output or f'%x-{number}.log'}",
    ]
    comments = [
        f"# {plan.site.title}, {plan.kind.title}.",
        f"# After {plan.kind.page}",
        f"# Made by: {made_by}",
        "",
    ]
    return ["#!/bin/bash", *comments, *(f"#SBATCH {option}" for option in options)]


def _environment(plan: _Plan) -> list[str]:
    lines = ["set -euo pipefail", "", "# Your environment, as on the login node:"]
    lines += [f"#   {command}" for command in plan.site.modules]
    lines += ["", "# Threads of each rank, one per core."]
    lines += [f"export OMP_NUM_THREADS={plan.cores_per_rank}"]
    if plan.launcher == "srun":
        lines += ["# srun does not take this over from the job since Slurm 22.05."]
        lines += ["export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK"]
    else:
        lines += ["# Cores of each rank, for MPICH and for Open MPI."]
        lines += ["export HYDRA_BINDING=${HYDRA_BINDING:-core:$OMP_NUM_THREADS}"]
        policy = "PRTE_MCA_rmaps_default_mapping_policy"
        lines += [f"export {policy}=${{{policy}:-slot:PE=$OMP_NUM_THREADS}}"]
    lines += [f"# {hint}" for hint in plan.kind.hints]
    if plan.site.name == "generic" and plan.launcher == "srun":
        lines += [
            "# pmi2 for MPICH, pmix for Open MPI; empty for the site's default.",
            "SRUN_MPI=${SRUN_MPI-pmi2}",
        ]
    return lines


def _launch(plan: _Plan) -> list[str]:
    command = shlex.join(plan.request.command)
    lines = [f"# {plan.kind.note}."] if plan.kind.note else []
    if plan.launcher == "mpirun":
        if plan.gpus and not plan.kind.note:
            lines += ["# mpirun gives no GPUs: each rank takes the one of its number on the node."]
            command = f"{_wrapper_of_mpirun(plan.kind.gpu_variable)} {command}"
        lines += [f'mpirun -n "$SLURM_NTASKS" {command}']
    else:
        options = [option.format(masks=",".join(_masks(plan))) for option in plan.kind.srun_options]
        if plan.site.name == "generic":
            options.insert(0, '${SRUN_MPI:+--mpi="$SRUN_MPI"}')
        # A rank that fails ends the job, whatever the others are waiting for.
        words = ["srun", *options, "--kill-on-bad-exit=1", *filter(None, [plan.kind.wrapper]), command]
        lines += [" ".join(words)]
    if plan.signal_before_s is not None:
        lines[-1] += " &"
        lines += ["launcher=$!"]
    return lines


def _wrapper_of_mpirun(variable: str) -> str:
    """A command in front of the program; the number of the rank on its node is named by MPICH or Open MPI."""
    number = "${MPI_LOCALRANKID:-${OMPI_COMM_WORLD_LOCAL_RANK:?}}"
    return f"bash -c 'export {variable}={number}; exec \"$@\"' --"


def _masks(plan: _Plan) -> Iterator[str]:
    """For each rank of a node the cores next to its GPU but for the first, as hexadecimal bits."""
    for first in plan.kind.core_groups[: plan.request.ranks_per_node]:
        yield f"{((1 << plan.cores_per_rank) - 1) << (first + 1):x}"


def _wait() -> list[str]:
    return [
        "# The launcher passes USR1 on to the ranks; a TERM would make it end them at once.",
        "signalled=",
        "trap 'signalled=yes; kill -USR1 \"$launcher\" 2>/dev/null || true' USR1 TERM",
        "# A signal ends `wait`, though not what it waits for. The last one gives the launcher's own status.",
        'while wait "$launcher" || true; kill -0 "$launcher" 2>/dev/null; do :; done',
        "status=0",
        'wait "$launcher" || status=$?',
    ]


def _requeue() -> list[str]:
    return [
        f"# {REQUEUE_STATUS}: stopped, to go on later. No status tells that a node has failed.",
        'nodes_answer() { timeout 60 srun --overlap --ntasks-per-node=1 --ntasks="$SLURM_NNODES" true; }',
        f"if [[ $status -eq {REQUEUE_STATUS} || ($status -ne 0 && -n $signalled) ]] || ! nodes_answer; then",
        f"    if ((${{SLURM_RESTART_COUNT:-0}} >= {_MAX_RESTARTS})); then",
        f'        echo "not finished after {_MAX_RESTARTS} restarts, giving up" >&2',
        "        exit 1",
        "    fi",
        '    scontrol requeue "$SLURM_JOB_ID" || true',
        "fi",
        'exit "$status"',
    ]
