"""Do messages take the way that they should, inside a machine and between machines, and do clocks agree?

Bounds are rough on purpose: shared memory and fabrics are an order of magnitude away from what replaces them
when they are not used. They are judged only where ranks have a core each, since a rank that waits for its
turn measures the scheduler.

Settings that are known to slow messages down: leaving ``sm`` out of Open MPI's ``btl``
(docs.open-mpi.org, "TCP": it "will likely result in lower performance" on one host), ``UCX_TLS`` without a
shared-memory transport (openucx.readthedocs.io, "Frequently asked questions", which lists the transports),
and libfabric's ``sockets`` provider (``man fi_sockets``: for development, not for speed).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hpcpar.cli.doctor.findings import (
    Check,
    Finding,
    JobFacts,
    error,
    name_ranks,
    ok,
    skipped,
    spread,
    warning,
)
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.measure import PairResult
from hpcpar.cli.output import format_rate, format_seconds

__all__ = ["CHECKS"]

_TRANSPORTS = ("OMPI_MCA_btl", "UCX_TLS", "FI_PROVIDER", "MPIR_CVAR_ASYNC_PROGRESS", "MPICH_ASYNC_PROGRESS")
_CLOCK_S = 1.0
_SLOW_NODE_LATENCY_S = 20e-6
_SLOW_NODE_SHARE = 0.1
_TCP_LATENCY_S = 20e-6
_SLOW_NETWORK_LATENCY_S = 100e-6
_SLOW_NETWORK_BYTES_PER_S = 1e9
_FROM_BYTES = 1 << 20


def _shared_memory(job: JobFacts) -> Iterator[Finding]:
    """Ranks on one machine can share memory, as MPI sees it."""
    if job.first.mpi is None:
        yield skipped("who shares memory: MPI does not start")
        return
    apart = False
    for numbers in job.machines.values():
        groups = {job.ranks[number].sharer for number in numbers}
        spaces = {(job.ranks[number].sharer, job.ranks[number].shm_device) for number in numbers}
        if len(spaces) > len(groups):
            apart = True
            yield _crash(job, numbers)
        elif len(groups) > 1:
            apart = True
            yield warning(
                f"{name_ranks(numbers)} are all on {job.ranks[numbers[0]].host}, but MPI sees "
                f"{len(groups)} nodes "
                "there",
                "Gradients then travel by messages instead of shared memory. Each rank in a container of "
                "its own, "
                "with its own /dev/shm or process ids, looks so.",
                "Start one container per node with all its ranks, or share /dev/shm and the namespaces of "
                "IPC and "
                "process ids (docker: --ipc=host --pid=host; Apptainer does by default).",
            )
    if not apart:
        yield ok(f"ranks share memory on {len(job.machines)} machine(s)")


def _crash(job: JobFacts, numbers: list[int]) -> Finding:
    """MPI goes by host names or process ids, and these ranks do not see the same files."""
    devices: dict[str, list[int]] = {}
    for number in numbers:
        devices.setdefault(job.ranks[number].shm_device, []).append(number)
    return error(
        f"{name_ranks(numbers)} are on one machine, {job.ranks[numbers[0]].host}, and MPI wants to share "
        "memory "
        f"between them, but they have {len(devices)} different /dev/shm: "
        + "; ".join(name_ranks(ranks) for ranks in devices.values()),
        "Each opens a file that the other does not have: training ends in a segmentation fault, or computes "
        "with memory that nobody else sees. Each rank in a container of its own looks so.",
        "Start one container per node with all its ranks, or give all the machine's /dev/shm (docker: "
        "--ipc=host; Apptainer does by default).",
    )


def _hosts(job: JobFacts) -> Iterator[Finding]:
    """Machines have names of their own."""
    names: dict[str, set[str]] = {}
    for facts in job.ranks:
        names.setdefault(facts.host, set()).add(facts.machine)
    for host, machines in names.items():
        if len(machines) > 1:
            yield warning(
                f"{len(machines)} machines are all called {host}",
                "Launchers and logs tell machines apart by name.",
                "Set host names; in containers, `--hostname` or the host's network.",
            )
        if host.startswith("localhost") and len(job.machines) > 1:
            yield warning(
                "a machine of this job is called localhost",
                "Other machines cannot reach it under that name, but themselves.",
                "Set its host name.",
            )


def _clocks(job: JobFacts) -> Iterator[Finding]:
    """Times of files and logs can be compared."""
    wrong = {rank: offset for rank, offset in job.clock_offsets_s.items() if abs(offset) > _CLOCK_S}
    for rank, offset in wrong.items():
        yield warning(
            f"the clock of {job.ranks[rank].host} is {offset:+.1f} s off that of {job.first.host}",
            "Logs of ranks cannot be put in order, and tools that compare times of files are misled.",
            "Ask the site to run NTP or chrony on that node.",
        )
    if job.clock_offsets_s and not wrong:
        largest = max(abs(offset) for offset in job.clock_offsets_s.values())
        yield ok(f"clocks agree within {format_seconds(largest)}")


def _settings(job: JobFacts) -> Iterator[Finding]:
    """No setting that is known to slow messages down."""
    found = [
        finding
        for facts, where in spread(job, lambda facts: [facts.environment.get(name) for name in _TRANSPORTS])
        for finding in _slow_settings(facts.environment, where)
    ]
    yield from found or [ok("no settings that are known to slow messages down")]


def _slow_settings(settings: Mapping[str, str], where: str) -> Iterator[Finding]:
    btl = settings.get("OMPI_MCA_btl")
    if btl is not None and _leaves_out(btl, ("sm", "vader")):
        yield warning(
            f"OMPI_MCA_btl={btl} leaves out sm, shared memory{where}",
            "Without UCX or another fabric, messages between ranks of one node go by TCP.",
            "Unset it, or add sm: OMPI_MCA_btl=self,sm,tcp",
        )
    tls = settings.get("UCX_TLS")
    if tls is not None and tls != "all" and _leaves_out(tls, ("sm", "shm", "mm", "posix", "sysv", "xpmem")):
        yield warning(
            f"UCX_TLS={tls} names no shared-memory transport{where}",
            "Messages between ranks of one node then go through the network adapter or TCP.",
            "Unset it, or add sm: UCX_TLS=sm,...",
        )
    if settings.get("FI_PROVIDER") == "sockets":
        yield warning(
            f"FI_PROVIDER=sockets{where}",
            "libfabric's sockets provider is for development; it is slow.",
            "Unset it, and libfabric takes the fastest; or name the fabric's: verbs, cxi, psm3, efa; tcp.",
        )
    asynchronous = [n for n in ("MPIR_CVAR_ASYNC_PROGRESS", "MPICH_ASYNC_PROGRESS") if settings.get(n) == "1"]
    if asynchronous:
        yield warning(
            f"{asynchronous[0]}=1{where}",
            "MPI runs a thread that polls, one per rank: it takes the core of a thread of PyTorch, and every "
            "message pays for locks. hpcpar makes its own progress.",
            "Unset it.",
        )


def _leaves_out(value: str, wanted: tuple[str, ...]) -> bool:
    """Lists of components: ``a,b`` takes these only, ``^a,b`` all but these."""
    names = {name.strip() for name in value.removeprefix("^").split(",")}
    return bool(names & set(wanted)) if value.startswith("^") else not names & set(wanted)


def _speed(job: JobFacts) -> Iterator[Finding]:
    """Latency and bandwidth are what shared memory and a fabric give."""
    if not job.links:
        alone = len(job.ranks) == 1
        yield skipped("messages: this is one rank" if alone else "messages: they were not measured")
        return
    pairs: dict[tuple[int, int], list[PairResult]] = {}
    for link in job.links:
        pairs.setdefault((link.pair.first, link.pair.second), []).append(link)
    for (first, second), links in pairs.items():
        one, other = job.ranks[first], job.ranks[second]
        latency_s = min(link.best_latency_s for link in links)
        rate = max(link.best_bytes_per_s for link in links)
        where = f"on {one.host}" if one.machine == other.machine else f"from {one.host} to {other.host}"
        seen = f"rank {first} to rank {second} {where}: {format_seconds(latency_s)}, {format_rate(rate)}"
        if _is_crowded(job, one.machine) or _is_crowded(job, other.machine):
            yield ok(f"{seen}; not judged, as ranks outnumber their cores")
        elif one.machine == other.machine:
            yield _judge_inside(job, seen, latency_s, rate, links)
        else:
            yield _judge_between(one, seen, latency_s, rate)


def _is_crowded(job: JobFacts, machine: str) -> bool:
    numbers = job.machines[machine]
    return len(numbers) > len({core for number in numbers for core in job.ranks[number].cores})


def _judge_inside(
    job: JobFacts, seen: str, latency_s: float, rate: float, links: list[PairResult]
) -> Finding:
    copied = job.memcpy_bytes_per_s
    large = any(link.nbytes >= _FROM_BYTES for link in links)
    if latency_s > _SLOW_NODE_LATENCY_S or (large and copied and rate < _SLOW_NODE_SHARE * copied):
        yardstick = f"; copying memory reaches {format_rate(copied)}" if copied else ""
        return warning(
            seen + yardstick,
            "That is too slow for shared memory: messages inside the node take another way, or somebody else "
            "uses these cores.",
            "Look at the findings about settings and /dev/shm. In containers, MPI copies between processes "
            "only if it may (docker: --cap-add=SYS_PTRACE, or OMPI_MCA_btl_sm_single_copy_mechanism=none).",
        )
    return ok(seen)


def _judge_between(facts: ProcessFacts, seen: str, latency_s: float, rate: float) -> Finding:
    fabric = ", ".join(facts.fast_networks)
    limit_s = _TCP_LATENCY_S if fabric else _SLOW_NETWORK_LATENCY_S
    if latency_s <= limit_s and rate >= _SLOW_NETWORK_BYTES_PER_S:
        return ok(seen)
    there = f", although the node has {fabric}" if fabric else ""
    return warning(
        seen + there,
        "That is what TCP over Ethernet gives, or less. A fabric takes a few microseconds and gives 10 GB/s "
        "and more.",
        "An MPI from a wheel may know nothing of the site's fabric: use the site's (docs/installation.md). "
        "Without a fabric, train with larger batches, wire_dtype=torch.bfloat16, or DASO.",
    )


CHECKS = (
    Check("network.memory", _shared_memory),
    Check("network.hosts", _hosts),
    Check("network.clocks", _clocks),
    Check("network.settings", _settings),
    Check("network.speed", _speed),
)
