"""Are the packages complete, made for each other, and the same on all ranks? What can MPI do?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

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
from hpcpar.cli.doctor.launcher import family_of
from hpcpar.cli.facts import ProcessFacts
from hpcpar.comm.environment import name_library

__all__ = ["CHECKS"]

_OLDEST = {"torch": (2, 9), "mpi4py": (4, 0)}
# What should be there; why it matters; what to do; whether training fails without it.
_ABILITIES = {
    "numpy arrays in torch": (
        "torch and numpy cannot exchange arrays: they were built for different versions of numpy's ABI.",
        "pip install --upgrade torch numpy, in an environment without packages of another one (PYTHONPATH).",
        True,
    ),
    "gzip in HDF5": (
        "Compressed data sets cannot be read: this HDF5 was built without zlib.",
        "Use the wheel (pip install h5py), or build h5py against an HDF5 that has zlib.",
        False,
    ),
    "HDF5 as h5py was built for": (
        "h5py loads another HDF5 than it was built with, which ends in crashes. Modules put one on "
        "LD_LIBRARY_PATH.",
        "module unload hdf5, or build h5py against it: pip install --no-binary h5py h5py.",
        False,
    ),
    "LAPACK": (
        "torch was built without LAPACK: torch.linalg does not work.",
        "Install the official wheel of torch.",
        False,
    ),
    "oneDNN": (
        "torch was built without oneDNN: convolutions and matrix products on the CPU are many times slower.",
        "Install the official wheel of torch.",
        False,
    ),
}


def _packages(job: JobFacts) -> Iterator[Finding]:
    """Everything can be imported, and is not too old."""
    found = False
    for facts, where in spread(job, lambda facts: (facts.broken, facts.versions)):
        for finding in _package_faults(facts, where):
            found = True
            yield finding
    if not found:
        yield ok(", ".join(f"{name} {version}" for name, version in job.first.versions.items()))


def _package_faults(facts: ProcessFacts, where: str) -> Iterator[Finding]:
    for name, problem in facts.broken.items():
        if name != "mpi4py":  # launcher.starts explains that one
            yield error(
                f"{name} cannot be imported{where}: {problem}",
                "hpcpar needs it. A compiled part that is missing or was built for another Python looks so "
                "too.",
                f"pip install --force-reinstall --no-cache-dir {name}, with the pip of {facts.executable}",
            )
    for name, oldest in _OLDEST.items():
        version = facts.versions.get(name)
        if version is not None and _parse(version) < oldest:
            wanted = ".".join(map(str, oldest))
            yield error(
                f"{name} is {version}{where}",
                f"hpcpar needs {wanted} or newer.",
                f"pip install --upgrade '{name}>={wanted}'",
            )


def _parse(version: str) -> tuple[int, ...]:
    numbers = (part for part in version.split("+")[0].split("."))
    return tuple(int(number) for number in numbers if number.isdigit())


def _abilities(job: JobFacts) -> Iterator[Finding]:
    """Nothing that is needed was left out when packages were compiled."""
    found = False
    for name, (why, remedy, fatal) in _ABILITIES.items():
        for facts, where in spread(job, partial(_lacks, name=name)):
            if _lacks(facts, name):
                found = True
                yield (error if fatal else warning)(f"missing: {name}{where}", why, remedy)
    if not found:
        there = (name for name, there in job.first.abilities.items() if there)
        yield ok(f"compiled in: {', '.join(there)}")


def _lacks(facts: ProcessFacts, name: str) -> bool:
    return facts.abilities.get(name) is False


def _wheels(job: JobFacts) -> Iterator[Finding]:
    """One MPI wheel per environment."""
    for facts, where in spread(job, lambda facts: facts.mpi_wheels):
        folders: dict[str, list[str]] = {}
        for wheel in facts.mpi_wheels:
            name, _, folder = wheel.partition(" in ")
            folders.setdefault(folder, []).append(name)
        for folder, names in folders.items():
            if len(names) == 1:
                yield ok(f"{names[0]} is the only MPI wheel in {folder}{where}")
                continue
            yield error(
                f"{' and '.join(names)} are both installed in {folder}{where}",
                "Both bring bin/mpirun and lib/libmpi.so; the second has overwritten parts of the first.",
                f"pip uninstall -y {' '.join(name.split()[0] for name in names)}, then install one of them.",
            )


def _loaded(job: JobFacts) -> Iterator[Finding]:
    """One MPI library in the process, and the one that mpi4py was compiled for."""
    for facts, where in spread(job, lambda facts: (facts.libraries, _mpi_version(facts), _built_for(facts))):
        if len(facts.libraries) > 1:
            used = f"; mpi4py uses {facts.mpi.path}" if facts.mpi and facts.mpi.path else ""
            yield error(
                f"{len(facts.libraries)} MPI libraries are loaded in one process{where}: "
                f"{', '.join(facts.libraries)}{used}",
                "Some calls go to the one, some to the other. Often h5py was built with a parallel HDF5 of "
                "another MPI.",
                "Build mpi4py and h5py against one MPI, or use the wheel of h5py, which has no MPI.",
            )
        if facts.mpi is None:
            continue
        built = name_library(facts.mpi.built_for)[0]
        if "unknown" not in (built, facts.mpi.name) and family_of(built) != family_of(facts.mpi.name):
            yield error(
                f"mpi4py was compiled for {facts.mpi.built_for}, the library is {facts.mpi.name} "
                f"{facts.mpi.version}{where}",
                "Their binary interfaces differ: constants mean other things.",
                "MPICC=mpicc pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py",
            )
        elif len(facts.libraries) <= 1:
            yield ok(f"{facts.mpi.name} {facts.mpi.version} from {facts.mpi.path}{where}")


def _built_for(facts: ProcessFacts) -> str | None:
    return None if facts.mpi is None else facts.mpi.built_for


def _alike(job: JobFacts) -> Iterator[Finding]:
    """The same versions and settings on all ranks."""
    versions = _unlike(job, _comparable)
    for name, texts in versions.items():
        yield error(
            f"ranks have different versions of {name}: {texts}",
            "Ranks that compute or pack things differently end in wrong results, or hang.",
            "Use one environment on a shared file system, or one container image, on all nodes.",
        )
    settings = _unlike(job, _settings)
    for name, texts in settings.items():
        yield warning(
            f"ranks have different settings of {name}: {texts}",
            "mpirun may pass on only some variables to other nodes.",
            "mpirun -x NAME (Open MPI), -genv NAME value (MPICH), or set it in the job script under srun.",
        )
    gpus = _unlike(job, lambda facts: {"GPUs in torch": str(len(facts.gpus))})
    for name, texts in gpus.items():
        yield warning(
            f"ranks have different numbers of {name}: {texts}",
            "The ranks without compute on the CPU, and all others wait for them in each step; or the program "
            "stops there.",
            "Look at nvidia-smi on that node, and at CUDA_VISIBLE_DEVICES of its ranks (hpcpar info); "
            "exclude "
            "the node.",
        )
    if len(job.ranks) > 1 and not versions and not settings and not gpus:
        yield ok("versions and settings are the same on all ranks")


def _comparable(facts: ProcessFacts) -> dict[str, str]:
    """What must be alike, but for abilities of which a check of their own speaks."""
    others = {name: str(there) for name, there in facts.abilities.items() if name not in _ABILITIES}
    return {"python": facts.python, **facts.versions, **_mpi_version(facts), **others}


def _mpi_version(facts: ProcessFacts) -> dict[str, str]:
    return {} if facts.mpi is None else {"the MPI library": f"{facts.mpi.name} {facts.mpi.version}"}


def _settings(facts: ProcessFacts) -> dict[str, str]:
    names = ("HPCPAR_", "HDF5_", "OMP_NUM", "UCX_", "MPICH_")
    return {name: value for name, value in facts.environment.items() if name.startswith(names)}


def _unlike(job: JobFacts, read: Callable[[ProcessFacts], dict[str, str]]) -> dict[str, str]:
    """Names whose values differ, each with the ranks that have each value."""
    values = [read(facts) for facts in job.ranks]
    found = {}
    for name in dict.fromkeys(name for one in values for name in one):
        groups: dict[str, list[int]] = {}
        for rank, one in enumerate(values):
            groups.setdefault(one.get(name, "none"), []).append(rank)
        if len(groups) > 1:
            found[name] = "; ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in groups.items())
    return found


def _threads(job: JobFacts) -> Iterator[Finding]:
    """Several threads may call MPI."""
    for facts, where in spread(job, lambda facts: facts.mpi and facts.mpi.thread_level):
        if facts.mpi is None:
            yield skipped(f"thread level{where}: MPI does not start")
        elif facts.mpi.thread_level == "multiple":
            yield ok(f"several threads may call MPI (MPI_THREAD_MULTIPLE){where}")
        else:
            yield warning(
                f"the thread level of MPI is {facts.mpi.thread_level!r}{where}",
                "hpcpar then reduces without its progress thread, and experts that serve in threads do not "
                "work.",
                "Set the library's switch, such as MPICH_MAX_THREAD_SAFETY=multiple (Cray), or use a build "
                "with threads. A program that starts MPI itself must ask for it: mpi4py.rc.thread_level.",
            )


def _fault_tolerance(job: JobFacts) -> Iterator[Finding]:
    """For information: without it a dead rank ends the job, which is what most jobs want."""
    mpi = job.first.mpi
    if mpi is None:
        return
    if mpi.revokes and mpi.survives:
        yield ok("fault tolerance (ULFM) is on: ranks may outlive one that dies")
    elif mpi.revokes:
        yield ok("fault tolerance (ULFM) is there and off: mpirun --with-ft ulfm turns it on")
    else:
        yield ok("no fault tolerance (ULFM) in this MPI: a rank that dies ends the job")


CHECKS = (
    Check("libraries.packages", _packages),
    Check("libraries.compiled", _abilities),
    Check("libraries.wheels", _wheels),
    Check("libraries.loaded", _loaded),
    Check("libraries.alike", _alike),
    Check("libraries.threads", _threads),
    Check("libraries.ulfm", _fault_tolerance),
)
