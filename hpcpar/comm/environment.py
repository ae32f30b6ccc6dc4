"""What surrounds a rank: the launcher, the MPI library that was loaded, and what that library can do.

Training needs none of this; ``hpcpar info`` and ``hpcpar doctor`` show it. Facts come from where they cannot
be wrong for long: the launcher from the variables it sets, the library from the memory map of the process,
fault tolerance from revoking a communicator, and not from names or versions.

Invariant: everything here is Local but :func:`memory_sharers`, and only :func:`read_mpi` starts MPI.
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hpcpar.comm.mpi import MPI

if TYPE_CHECKING:
    from mpi4py import MPI as MPITypes

__all__ = [
    "LauncherFacts",
    "MpiFacts",
    "job_key",
    "library_of",
    "loaded_libraries",
    "memory_sharers",
    "name_library",
    "read_launcher",
    "read_mpi",
]


@dataclass(frozen=True)
class LauncherFacts:
    """What the innermost launcher says about this process.

    Attributes
    ----------
    name : str
        Such as ``"Hydra (MPICH's mpirun)"``; ``"none"`` for a process that was started by itself.
    family : str
        The MPI that it starts: ``"MPICH"``, ``"Open MPI"``, ``"any"`` (srun, PALS) or ``"none"``.
    rank, size, local_size : int or None
        As it announced them; the last is the number of ranks on this node.
    variables : tuple of str
        The variables that told, such as ``"PMI_RANK=0"``.
    """

    name: str
    family: str
    rank: int | None
    size: int | None
    variables: tuple[str, ...] = ()
    local_size: int | None = None


@dataclass(frozen=True)
class MpiFacts:
    """The MPI library of this process, after it has started.

    Attributes
    ----------
    name, version, standard : str
        Such as ``"Open MPI"``, ``"5.0.11"`` and ``"3.1"``.
    description : str
        The first line of the library's own words.
    built_for : str
        The MPI for which mpi4py's extension module was compiled.
    path : str or None
        The file from which the library was loaded.
    thread_level : str
        ``"single"``, ``"funneled"``, ``"serialized"`` or ``"multiple"``.
    rank, size : int
        In ``MPI.COMM_WORLD``.
    gpu_claim : bool or None
        Whether the library says that it takes GPU memory; ``None`` when it says nothing.
    revokes : bool
        Whether a revoked communicator raises, as fault tolerance (ULFM) needs.
    survives : bool
        Whether the launcher was told to let a job outlive a rank.
    """

    name: str
    version: str
    standard: str
    description: str
    built_for: str
    path: str | None
    thread_level: str
    rank: int
    size: int
    gpu_claim: bool | None
    revokes: bool
    survives: bool


# Name, the MPI that it starts, and the variables of rank and size. The innermost comes first: mpirun inside a
# Slurm job leaves Slurm's variables in place.
_LAUNCHERS = (
    ("Open MPI's mpirun", "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
    ("PALS (Cray's mpiexec)", "any", "PALS_RANKID", "PALS_SIZE"),
    ("Slurm's srun", "any", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"),
    ("Hydra (MPICH's mpirun)", "MPICH", "PMI_RANK", "PMI_SIZE"),
    ("a PMIx launcher", "any", "PMIX_RANK", "PMIX_SIZE"),
)

_LOCAL_SIZES = (
    "OMPI_COMM_WORLD_LOCAL_SIZE",
    "PALS_LOCAL_SIZE",
    "MPI_LOCALNRANKS",
    "SLURM_STEP_TASKS_PER_NODE",
)

_LIBRARY = re.compile(r"/lib(?:p?mpi|mpich|mpi_cray|mpi_gnu|mpi_intel)[^/]*?\.so[.\d]*$")
_NOT_THE_LIBRARY = re.compile(r"/lib(?:mpi(?:cxx|f|_cxx|_f|_usempi|_mpifh|_java|gi|java|_gtl)|mpifort)")

# A phrase of MPI_Get_library_version, and whose it is; the derived libraries before the one they derive from.
_NAMES = (
    ("CRAY MPICH", "Cray MPICH"),
    ("Intel(R) MPI", "Intel MPI"),
    ("MVAPICH", "MVAPICH"),
    ("Open MPI", "Open MPI"),
    ("MPICH", "MPICH"),
)


def read_launcher(environ: Mapping[str, str] | None = None) -> LauncherFacts:
    """Who started this process, as its environment tells. Local."""
    env = os.environ if environ is None else environ
    for name, family, rank, size in _LAUNCHERS:
        if rank not in env or (rank == "SLURM_PROCID" and not _started_by_srun(env)):
            continue
        seen = tuple(f"{variable}={env[variable]}" for variable in (rank, size) if variable in env)
        local = next((n for n in map(partial(_number, env), _LOCAL_SIZES) if n is not None), None)
        return LauncherFacts(name, family, _number(env, rank), _number(env, size), seen, local)
    return LauncherFacts("none", "none", None, None)


def _started_by_srun(env: Mapping[str, str]) -> bool:
    """Hydra starts its proxies by srun inside a Slurm job; a batch script has Slurm's rank but no step."""
    by_hydra = "HYDI_CONTROL_FD" in env or "MPI_LOCALRANKID" in env
    return "SLURM_STEP_ID" in env and not by_hydra


def _number(env: Mapping[str, str], name: str) -> int | None:
    return int(env[name]) if env.get(name, "").isdigit() else None


def job_key(environ: Mapping[str, str] | None = None) -> str | None:
    """Something that the ranks of a job have in common on one machine, and no others have. Local.

    ``None`` without a launcher. It is the launcher's name for the job or, where it gives none, the process
    that started the ranks: the closest one above that is no rank itself, since scripts may be between.
    """
    env = os.environ if environ is None else environ
    launcher = read_launcher(env)
    if launcher.rank is None:
        return None
    if launcher.name == "Slurm's srun" and "SLURM_JOB_ID" in env:
        return f"{_boot()}-{env['SLURM_JOB_ID']}.{env['SLURM_STEP_ID']}"
    if "PMIX_NAMESPACE" in env:
        namespace = re.sub(r"[^\w.@-]", "_", env["PMIX_NAMESPACE"])
        return f"{_boot()}-{namespace}"
    variable = launcher.variables[0].partition("=")[0]
    pid = os.getppid()
    with suppress(OSError, ValueError):
        while pid > 1 and f"\0{variable}=".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return f"{_boot()}-pid{pid}"


def _boot() -> str:
    """Temporary folders may be on a file system that machines share."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]
    except OSError:
        return os.uname().nodename


def name_library(description: str) -> tuple[str, str]:
    """Name and version of a library, from its own description or that of its ``mpirun``. Local."""
    name = next((name for phrase, name in _NAMES if phrase.lower() in description.lower()), "unknown")
    if name == "unknown" and "HYDRA" in description:
        name = "MPICH"
    version = re.search(r"\d+\.\d+(?:\.\d+)*[a-z]*\d*", description)
    return name, version.group() if version else "unknown"


def loaded_libraries(maps: Iterable[str] | None = None) -> tuple[str, ...]:
    """The MPI libraries that this process has loaded; more than one is one too many. Local.

    Parameters
    ----------
    maps
        Lines as in ``/proc/self/maps``, which is read by default.
    """
    if maps is None:
        try:
            maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
        except OSError:
            return ()
    found: dict[tuple[str, str], str] = {}
    for line in maps:
        fields = line.rstrip("\n").split(maxsplit=5)
        path = fields[-1]
        if "/lib" in path and _LIBRARY.search(path) and not _NOT_THE_LIBRARY.search(path):
            device, inode = fields[3:5]  # one file may have several names
            found.setdefault((device, inode), path)
    return tuple(sorted(found.values()))


class _Place(ctypes.Structure):
    """What ``dladdr`` tells of an address."""

    _fields_ = (
        ("file", ctypes.c_char_p),
        ("base", ctypes.c_void_p),
        ("name", ctypes.c_char_p),
        ("symbol", ctypes.c_void_p),
    )


def library_of(module_file: str) -> str | None:
    """The file that holds the ``MPI_Init`` which an extension module calls. Local.

    The loader looks among what is visible to the whole process first, then among what the module was linked
    to.
    """
    with suppress(OSError, AttributeError):
        process = ctypes.CDLL(None)
        holder = process if hasattr(process, "MPI_Init") else ctypes.CDLL(module_file)
        place = _Place()
        if process.dladdr(ctypes.cast(holder.MPI_Init, ctypes.c_void_p), ctypes.byref(place)):
            return str(place.file.decode())
    return None


def read_mpi() -> MpiFacts:
    """Start MPI if need be and ask it about itself. Local, as MPI_Init.

    Raises
    ------
    LauncherError
        When the job was started by the launcher of another MPI.
    ImportError, RuntimeError
        When mpi4py is missing, or finds no library.
    """
    description = " ".join(MPI.Get_library_version().replace("\0", "").split())
    name, version = name_library(description)
    vendor, numbers = MPI.get_vendor()
    libraries = loaded_libraries()
    path = libraries[0] if len(libraries) == 1 else library_of(sys.modules["mpi4py.MPI"].__file__ or "")
    return MpiFacts(
        name=name,
        version=version,
        standard=".".join(map(str, MPI.Get_version())),
        description=description.split(" MPICH Release")[0].split(", package")[0],
        built_for=f"{vendor} {'.'.join(map(str, numbers))}",
        path=path,
        thread_level=_thread_level(),
        rank=MPI.COMM_WORLD.Get_rank(),
        size=MPI.COMM_WORLD.Get_size(),
        # Of several the wrong one would answer, and end the process since it was never started.
        gpu_claim=_claims_gpu(path if len(libraries) == 1 else None),
        revokes=_revokes(),
        survives=os.environ.get("OMPI_MCA_mpi_ft_enable", "0").lower() in ("1", "true", "yes"),
    )


def _thread_level() -> str:
    levels = {
        MPI.THREAD_SINGLE: "single",
        MPI.THREAD_FUNNELED: "funneled",
        MPI.THREAD_SERIALIZED: "serialized",
        MPI.THREAD_MULTIPLE: "multiple",
    }
    return levels[MPI.Query_thread()]


def _claims_gpu(path: str | None) -> bool | None:
    """What the library answers when asked; a standard way to ask came with MPI 4.1."""
    with suppress(Exception):
        info = MPI.COMM_WORLD.Get_info()
        kinds = info.Get("mpi_memory_alloc_kinds") or ""
        info.Free()
        if any(kind.split(":")[0] in ("cuda", "rocm", "level_zero") for kind in kinds.split(",")):
            return True
    if path is None:
        return None
    try:
        library = ctypes.CDLL(path)
    except OSError:
        return None
    names = ("MPIX_Query_cuda_support", "MPIX_Query_rocm_support", "MPIX_Query_hip_support")
    answers = [getattr(library, name)() for name in names if hasattr(library, name)]
    return any(answers) if answers else None


def _revokes() -> bool:
    """Revoke a communicator of this rank alone, and see whether it notices."""
    alone = MPI.COMM_SELF.Dup()
    try:
        alone.Revoke()
        alone.Barrier()
    except NotImplementedError:
        return False
    except MPI.Exception as error:
        return bool(error.Get_error_class() == MPI.ERR_REVOKED)
    finally:
        with suppress(MPI.Exception):
            alone.Free()
    return False


def memory_sharers(mpi: MPITypes.Intracomm) -> int:
    """The lowest rank with which this one can share memory, as MPI sees it. Collective.

    Pretended nodes (``HPCPAR_RANKS_PER_NODE``) do not count.
    """
    shared = mpi.Split_type(MPI.COMM_TYPE_SHARED, key=mpi.rank)
    lowest = int(shared.bcast(mpi.rank, 0))
    shared.Free()
    return lowest
