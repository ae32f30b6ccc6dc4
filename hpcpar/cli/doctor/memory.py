"""Is there room: in ``/dev/shm``, under the container's limit, and under the limits of the process?"""

from __future__ import annotations

from collections.abc import Iterator

from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, error, ok, warning
from hpcpar.cli.output import format_bytes

__all__ = ["CHECKS"]

_MIB = 1 << 20
_SHM_PER_RANK = 256 * _MIB
_MEMORY_PER_RANK = 1 << 30
_LOCKED = 64 * _MIB
_FEWEST_FILES = 1024


def _shared_memory(job: JobFacts) -> Iterator[Finding]:
    """Gradients of the ranks of a node meet in ``/dev/shm``."""
    for numbers in _shared_by(job):
        facts = min((job.ranks[number] for number in numbers), key=lambda one: one.shm_free)
        per_rank = facts.shm_free // len(numbers)
        free, total = format_bytes(facts.shm_free), format_bytes(facts.shm_total)
        seen = f"{free} free of {total} in /dev/shm of {facts.host}"
        if facts.shm_total == 0:
            yield error(
                f"{facts.host} has no /dev/shm",
                "MPI itself needs it between ranks of one node, and so does hpcpar's reducer.",
                "Mount it: `docker run --shm-size=8g`; with Apptainer, do not use --contain without --bind "
                "/dev/shm.",
            )
        elif facts.shm_problem is not None:
            yield error(
                f"nothing can be written to /dev/shm of {facts.host}: {facts.shm_problem}",
                "MPI and hpcpar's reducer share memory through files there; MPICH ends with a segmentation "
                "fault.",
                "mount -o remount,rw /dev/shm, or give the container one: docker and podman "
                "`--shm-size=8g`; or "
                "delete what dead jobs have left there.",
            )
        elif per_rank < _SHM_PER_RANK:
            millions = per_rank / 4e6
            yield warning(
                f"{seen}, for {len(numbers)} rank(s)",
                f"Each rank puts its gradients there: float32 models of up to {millions:.0f} million "
                "parameters "
                "fit. Larger ones go by MPI messages, which is slower; and MPI wants some room as well.",
                "docker and podman: `--shm-size=8g` or `--ipc=host`; Kubernetes: an emptyDir with medium "
                "Memory; "
                "or delete what dead jobs have left there.",
            )
        else:
            yield ok(f"{seen}, for {len(numbers)} rank(s)")


def _shared_by(job: JobFacts) -> list[list[int]]:
    """Ranks for each ``/dev/shm``; containers on one machine may have their own."""
    groups: dict[tuple[str, str], list[int]] = {}
    for rank, facts in enumerate(job.ranks):
        groups.setdefault((facts.machine, facts.shm_device), []).append(rank)
    return list(groups.values())


def _available(job: JobFacts) -> Iterator[Finding]:
    """Memory of the machine, or what the control group of the job or container grants."""
    for numbers in job.machines.values():
        facts = job.ranks[numbers[0]]
        limit = facts.memory_limit
        # Each container has a limit of its own, ranks inside one share it.
        rooms = {job.ranks[n].mount_space: job.ranks[n].memory_room for n in numbers}
        room = facts.memory_available
        if None not in rooms.values():
            room = min(room, sum(left or 0 for left in rooms.values()))
        limited = "" if limit is None else f", limited to {format_bytes(limit)} by its control group"
        seen = f"{facts.host} has {format_bytes(room)} for {len(numbers)} rank(s){limited}"
        if room // len(numbers) >= _MEMORY_PER_RANK:
            yield ok(seen)
            continue
        yield warning(
            seen,
            "Python with PyTorch takes about 0.5 GB per rank before the model. What is in /dev/shm counts "
            "too. "
            "A process over the limit is killed without a word.",
            "Ask for more: Slurm `--mem=0` (the whole node) or `--mem-per-cpu`; docker `--memory`.",
        )


def _limits(job: JobFacts) -> Iterator[Finding]:
    """Soft limits: open files, locked memory, processes."""
    for numbers in job.machines.values():
        facts = job.ranks[numbers[0]]
        files, locked, processes = (facts.limits.get(name, -1) for name in ("nofile", "memlock", "nproc"))
        needed = 1024 + 4 * len(job.ranks)
        few = 0 <= files < _FEWEST_FILES or (0 <= files < min(needed, 4096) and len(job.ranks) > 64)
        many = f", for a job of {len(job.ranks)} ranks" if len(job.ranks) > 1 else ""
        threads = sum(job.ranks[number].torch_threads + 16 for number in numbers)
        found = False
        if few:
            found = True
            yield warning(
                f"ulimit -n is {files} on {facts.host}" + many,
                "Each rank may hold a connection to each other one, besides files and data loaders' "
                "pipes; MPI "
                "itself crashes when it cannot open more.",
                "ulimit -n 65536 in the job script, or have the site raise it.",
            )
        if facts.fast_networks and 0 <= locked < _LOCKED:
            found = True
            yield warning(
                f"ulimit -l is {format_bytes(locked)} on {facts.host}, which has "
                f"{', '.join(facts.fast_networks)}",
                "The fast network needs memory that is locked; MPI then fails to start or falls back to TCP.",
                "ulimit -l unlimited in the job script. Under Slurm the limit of slurmd counts "
                "(LimitMEMLOCK=infinity, or PropagateResourceLimitsExcept=MEMLOCK).",
            )
        if not facts.user_is_root and 0 <= processes < threads:
            found = True
            yield warning(
                f"ulimit -u is {processes} on {facts.host}; {len(numbers)} rank(s) make about {threads} "
                "threads",
                "The limit counts threads of all processes of the user; PyTorch ends with 'Resource "
                "temporarily "
                "unavailable'.",
                "ulimit -u 65536, or fewer threads by OMP_NUM_THREADS.",
            )
        if not found:
            yield ok(f"limits of the process on {facts.host}: {files} files, {processes} processes")


CHECKS = (
    Check("memory.shared", _shared_memory),
    Check("memory.available", _available),
    Check("memory.limits", _limits),
)
