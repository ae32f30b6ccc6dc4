"""Are the packages complete, made for each other, and the same on all ranks? What can MPI do?"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, error, name_ranks, ok, skipped, warning
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
    facts = job.first
    for name, problem in facts.broken.items():
        if name != "mpi4py":  # launcher.starts explains that one
            yield error(
                f"{name} cannot be imported: {problem}",
                "hpcpar needs it. A compiled part that is missing or was built for another Python looks so "
                "too.",
                f"pip install --force-reinstall --no-cache-dir {name}, with the pip of {facts.executable}",
            )
    for name, oldest in _OLDEST.items():
        version = facts.versions.get(name)
        if version is not None and _parse(version) < oldest:
            wanted = ".".join(map(str, oldest))
            yield error(
                f"{name} is {version}",
                f"hpcpar needs {wanted} or newer.",
                f"pip install --upgrade '{name}>={wanted}'",
            )
    if not facts.broken:
        yield ok(", ".join(f"{name} {version}" for name, version in facts.versions.items()))


def _parse(version: str) -> tuple[int, ...]:
    numbers = (part for part in version.split("+")[0].split("."))
    return tuple(int(number) for number in numbers if number.isdigit())


def _abilities(job: JobFacts) -> Iterator[Finding]:
    """Nothing that is needed was left out when packages were compiled."""
    facts = job.first
    missing = [name for name in _ABILITIES if facts.abilities.get(name) is False]
    for name in missing:
        why, remedy, fatal = _ABILITIES[name]
        yield (error if fatal else warning)(f"missing: {name}", why, remedy)
    if facts.gpu_devices and not facts.gpus:
        built = facts.abilities.get("GPU support in torch")
        yield warning(
            f"{facts.host} has {facts.gpu_devices} GPU(s) in /dev, torch sees none",
            "torch finds no driver that fits, or CUDA_VISIBLE_DEVICES hides them."
            if built
            else "This torch was built for the CPU only.",
            "nvidia-smi shows the driver's version; the wheel must not need a newer one."
            if built
            else "pip install torch without the CPU index, for the CUDA of the driver.",
        )
    if not missing:
        yield ok(f"compiled in: {', '.join(name for name, there in facts.abilities.items() if there)}")


def _wheels(job: JobFacts) -> Iterator[Finding]:
    """One MPI wheel per environment."""
    folders: dict[str, list[str]] = {}
    for wheel in job.first.mpi_wheels:
        name, _, folder = wheel.partition(" in ")
        folders.setdefault(folder, []).append(name)
    for folder, names in folders.items():
        if len(names) > 1:
            yield error(
                f"{' and '.join(names)} are both installed in {folder}",
                "Both bring bin/mpirun and lib/libmpi.so; the second has overwritten parts of the first.",
                f"pip uninstall -y {' '.join(name.split()[0] for name in names)}, then install one of them.",
            )
        else:
            yield ok(f"{names[0]} is the only MPI wheel in {folder}")


def _loaded(job: JobFacts) -> Iterator[Finding]:
    """One MPI library in the process, and the one that mpi4py was compiled for."""
    facts = job.first
    files = {str(Path(path).name): path for path in facts.libraries}
    if len(files) > 1:
        yield error(
            f"this process has loaded {len(files)} MPI libraries: {', '.join(files.values())}",
            "Some calls go to the one, some to the other. Often h5py was built with a parallel HDF5 of "
            "another "
            "MPI.",
            "Build mpi4py and h5py against one MPI, or use the wheel of h5py, which has no MPI.",
        )
    if facts.mpi is None:
        return
    built = name_library(facts.mpi.built_for)[0]
    if "unknown" not in (built, facts.mpi.name) and family_of(built) != family_of(facts.mpi.name):
        yield error(
            f"mpi4py was compiled for {facts.mpi.built_for}, the library is {facts.mpi.name} "
            f"{facts.mpi.version}",
            "Their binary interfaces differ: constants mean other things.",
            "MPICC=mpicc pip install --force-reinstall --no-cache-dir --no-binary mpi4py mpi4py",
        )
    elif len(files) <= 1:
        yield ok(f"{facts.mpi.name} {facts.mpi.version} from {facts.mpi.path}")


def _alike(job: JobFacts) -> Iterator[Finding]:
    """The same versions and settings on all ranks."""
    versions = _unlike(job, lambda facts: {"python": facts.python, **facts.versions, **_mpi_version(facts)})
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
    if len(job.ranks) > 1 and not versions and not settings:
        yield ok("versions and settings are the same on all ranks")


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
    mpi = job.first.mpi
    if mpi is None:
        yield skipped("thread level: MPI does not start")
    elif mpi.thread_level == "multiple":
        yield ok("several threads may call MPI (MPI_THREAD_MULTIPLE)")
    else:
        yield warning(
            f"the thread level of MPI is {mpi.thread_level!r}",
            "hpcpar then reduces without its progress thread, and experts that serve in threads do not work.",
            "Set the library's switch, such as MPICH_MAX_THREAD_SAFETY=multiple (Cray), or use a build with "
            "threads. A program that starts MPI itself must ask for it: mpi4py.rc.thread_level.",
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


def _gpu(job: JobFacts) -> Iterator[Finding]:
    """A library that claims to take device buffers must not harm them."""
    facts = job.first
    if job.gpu is not None and job.gpu.wrong:
        yield error(
            job.gpu.summary,
            "Programs that hand device buffers to MPI compute with wrong data. hpcpar hands over none: it "
            "goes "
            "by pinned host memory, and is safe.",
            "Do not use this MPI with device buffers; report it to the site. Known cures: "
            "UCX_MEMTYPE_CACHE=n "
            "(UCX), another version of the library.",
        )
    elif job.gpu is not None:
        yield ok(job.gpu.summary)
    elif facts.gpus:
        claim = facts.mpi.gpu_claim if facts.mpi else None
        said = {True: "claims", False: "denies", None: "does not say"}[claim]
        yield ok(f"device buffers were not tried: MPI {said} that it takes them; hpcpar needs it not")


CHECKS = (
    Check("libraries.packages", _packages),
    Check("libraries.compiled", _abilities),
    Check("libraries.wheels", _wheels),
    Check("libraries.loaded", _loaded),
    Check("libraries.alike", _alike),
    Check("libraries.threads", _threads),
    Check("libraries.ulfm", _fault_tolerance),
    Check("libraries.gpu", _gpu),
)
