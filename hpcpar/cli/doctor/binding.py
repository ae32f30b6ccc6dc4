"""Do ranks have cores of their own, do they use all that there are, and no more threads than cores?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, error, name_ranks, ok, warning
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.output import compact_ranges

__all__ = ["CHECKS"]

# Sites keep some cores for the system (one of eight on Frontier and LUMI): that is not a mistake.
_IDLE_SHARE = 0.25
_MORE_CORES = (
    "Open MPI: `mpirun --map-by slot:PE=<cores> --bind-to core`, or `--bind-to none`; MPICH: `-bind-to "
    "none`; Slurm: `srun --cpus-per-task=<cores>` (give it to srun itself, not to sbatch alone)."
)


@dataclass(frozen=True)
class _Machine:
    """The ranks of one machine, and its cores; ``host`` also tells of machines that are just the same."""

    host: str
    numbers: Sequence[int]
    ranks: Sequence[ProcessFacts]

    @property
    def used(self) -> set[int]:
        return {core for facts in self.ranks for core in facts.cores}

    @property
    def idle(self) -> int:
        """Logical cores that the job may use and no rank does; Slurm's word counts as well."""
        return max(0, self._granted - len(self.used))

    @property
    def physical(self) -> int:
        """Physical cores that the job may use."""
        everything = self._everything
        places = len({self.place(core) for core in everything})
        return self._granted * places // max(1, len(everything))

    @property
    def idle_physical(self) -> int:
        """Those of which no rank uses any thread: a sibling of a busy one has little to give."""
        return max(0, self.physical - len({self.place(core) for core in self.used}))

    @property
    def _everything(self) -> set[int]:
        return {core for facts in self.ranks for core in facts.machine_cores}

    @property
    def _granted(self) -> int:
        granted = self.ranks[0].environment.get("SLURM_CPUS_ON_NODE", "")
        count = len(self._everything)
        return min(count, int(granted)) if granted.isdigit() else count

    @property
    def share(self) -> bool:
        """Whether any two ranks may use one core."""
        return any(set(a.cores) & set(b.cores) for a, b in combinations(self.ranks, 2))

    def place(self, core: int) -> str:
        return self.ranks[0].physical_cores.get(core, f"?/{core}")


def _machines(job: JobFacts) -> list[_Machine]:
    """One for all machines on which ranks are bound alike: a large job has one mistake, not one per node."""
    alike: dict[str, list[list[int]]] = {}
    for numbers in job.machines.values():
        ranks = [job.ranks[number] for number in numbers]
        key = repr([(r.cores, r.machine_cores, r.cpu_quota, _threads_wanted(r)) for r in ranks])
        alike.setdefault(key, []).append(numbers)
    found = []
    for machines in alike.values():
        numbers, more = machines[0], len(machines) - 1
        others = f" and {more} machine(s) alike" if more else ""
        host = f"{job.ranks[numbers[0]].host}{others}"
        found.append(_Machine(host, numbers, [job.ranks[number] for number in numbers]))
    return found


def _cores(job: JobFacts) -> Iterator[Finding]:
    """Each rank has a core, and no core is idle while ranks are short of them."""
    for machine in _machines(job):
        count, used = len(machine.ranks), len(machine.used)
        who = f"{name_ranks(machine.numbers)} on {machine.host}"
        verb = "uses" if count == 1 else "use"
        where = f"core(s) {compact_ranges(machine.used)}"
        if count > used and machine.idle:
            yield error(
                f"{who} share {where}, while {machine.idle} core(s) are idle",
                "Ranks that take turns on a core are many times slower, and each waits for the others' turn.",
                "Bind each rank to cores of its own, or none at all. Several launchers inside one batch "
                "script "
                f"may bind to the same core. {_MORE_CORES}",
            )
        elif count > used:
            yield warning(
                f"{count} ranks run on {used} core(s) of {machine.host}",
                "Ranks take turns, and MPI's waiting loops burn the turns of those who have work.",
                "Start no more ranks per node than cores; for tests on a small machine it is fine.",
            )
        elif machine.idle_physical >= max(count, _IDLE_SHARE * machine.physical):
            each = max(1, used // count)
            yield warning(
                f"{who} {verb} {where} ({each} each), while {machine.idle_physical} core(s) are idle",
                f"PyTorch computes with as many threads as a rank has cores: {each} here.",
                f"Give each rank {each + machine.idle_physical // count} cores. {_MORE_CORES}",
            )
        else:
            yield ok(f"{who} {verb} {where}")


def _hyperthreads(job: JobFacts) -> Iterator[Finding]:
    """Ranks with logical cores of their own may still share a physical one."""
    for machine in _machines(job):
        owners: dict[str, set[int]] = {}
        for number, facts in zip(machine.numbers, machine.ranks, strict=True):
            for core in facts.cores:
                owners.setdefault(machine.place(core), set()).add(number)
        crowded = [place for place, ranks in owners.items() if len(ranks) > 1]
        if crowded and not machine.share and len(owners) > len(crowded):
            yield warning(
                f"ranks on {machine.host} have logical cores of {len(crowded)} physical core(s) in common",
                "Two threads of a core share its arithmetic units: each is about half as fast.",
                "Bind to physical cores: Slurm `--hint=nomultithread`, Open MPI `--bind-to core`.",
            )


def _threads(job: JobFacts) -> Iterator[Finding]:
    """No more threads than cores, or than the container's share of time."""
    for machine in _machines(job):
        threads = sum(map(_threads_wanted, machine.ranks))
        cores = min(len(machine.used), int(machine.ranks[0].cpu_quota or len(machine.used)) or 1)
        most = max(map(_threads_wanted, machine.ranks))
        if threads <= cores or most == 1:
            yield ok(f"{threads} thread(s) on {len(machine.used)} core(s) of {machine.host}")
            continue
        setting = machine.ranks[0].omp_threads
        fair = max(1, cores // len(machine.ranks))
        given = f"OMP_NUM_THREADS={setting}" if setting else f"{most} thread(s) each"
        yield warning(
            f"{len(machine.ranks)} rank(s) with {given}: {threads} threads on {cores} core(s) of "
            f"{machine.host}",
            "Threads of PyTorch meet at the end of each operation; one that has no core holds up the others.",
            f"Set OMP_NUM_THREADS={fair}, or unset it: hpcpar.comm.world() then divides the cores itself.",
        )


def _threads_wanted(facts: ProcessFacts) -> int:
    """PyTorch may limit itself to the cores; what else reads the variable does not."""
    first = (facts.omp_threads or "").split(",")[0]
    return max(facts.torch_threads, int(first) if first.isdigit() else 1)


def _sockets(job: JobFacts) -> Iterator[Finding]:
    """On a machine of several sockets ranks should stay on one."""
    for machine in _machines(job):
        sockets = {machine.place(core).split("/")[0] for core in machine.used}
        roaming = all(set(facts.cores) == machine.used for facts in machine.ranks)
        if len(sockets) > 1 and roaming and len(machine.ranks) > 1:
            yield warning(
                f"no rank is bound on {machine.host}, which has {len(sockets)} sockets",
                "A rank that moves to another socket leaves its memory behind, and reads it more slowly.",
                "Bind each rank to a part of a socket: Open MPI `--map-by socket:PE=<cores>`, MPICH "
                "`-bind-to "
                "socket -map-by socket`, Slurm `--cpu-bind=sockets`.",
            )


def _pinned_threads(job: JobFacts) -> Iterator[Finding]:
    """OpenMP's own binding, equal on ranks that share cores, puts all their threads on the same ones."""
    for machine in _machines(job):
        settings = machine.ranks[0].environment
        pinning = [
            f"{name}={settings[name]}"
            for name in ("OMP_PROC_BIND", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")
            if settings.get(name, "false").lower() not in ("false", "", "none", "disabled")
        ]
        if pinning and machine.share:
            yield warning(
                f"{', '.join(pinning)} on {machine.host}, whose ranks may use the same cores",
                "OpenMP pins thread i of every rank to the same core i: the ranks crowd there, others are "
                "idle.",
                "Unset it, or have the launcher bind each rank to cores of its own.",
            )


CHECKS = (
    Check("binding.cores", _cores),
    Check("binding.hyperthreads", _hyperthreads),
    Check("binding.threads", _threads),
    Check("binding.sockets", _sockets),
    Check("binding.openmp", _pinned_threads),
)
