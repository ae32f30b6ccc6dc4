"""Are the folders of a job writable and the same on all machines, and can HDF5 lock files in them?"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from hpcpar.cli.doctor.findings import Check, Finding, FolderFacts, JobFacts, error, ok, warning

__all__ = ["CHECKS"]

_UNLOCKED = ("FALSE", "0", "BEST_EFFORT")
_ELSEWHERE = "Work in the site's scratch or project folder, and try it: hpcpar doctor --folder <path>"
_REMEDIES = (
    ("EROFS", f"Some sites mount home read-only on compute nodes. {_ELSEWHERE}"),
    ("ENOSPC", "The file system is full: delete something, or ask for more."),
    ("EDQUOT", "Your quota is used up: delete something, or ask for more (`quota -s`, `lfs quota`)."),
    ("ENOENT", "Make it before the job (mkdir -p), or look for a typing error; in containers, bind it."),
    ("EACCES", "Look at its owner and mode (ls -ld), and at those of the folders above."),
    ("no answer", "The file system does not answer on that node: tell the site, and exclude the node."),
)
_LOCAL = ("tmpfs", "overlay", "ext4", "xfs", "btrfs", "ramfs")


def _severity(folder: FolderFacts) -> Callable[[str, str, str], Finding]:
    """What is wrong with a folder that was named is an error; the current one may not be meant."""
    return error if folder.named else warning


def _writable(job: JobFacts) -> Iterator[Finding]:
    """Checkpoints and results have to go somewhere."""
    for folder in job.folders:
        if folder.problem is None:
            yield ok(f"{folder.path} ({folder.file_system}) is writable on {folder.host}")
            continue
        yield _severity(folder)(
            f"{folder.path} ({folder.file_system}) is not writable on {folder.host}: {folder.problem}",
            "Checkpoints and results cannot be written there.",
            next((remedy for phrase, remedy in _REMEDIES if phrase in folder.problem), _ELSEWHERE),
        )


def _shared(job: JobFacts) -> Iterator[Finding]:
    """What rank 0 writes is there for the others."""
    looked = [folder for folder in job.folders if folder.shared is not None]
    for folder in looked:
        if not folder.shared:
            hint = f"; {folder.file_system} is local to a machine" if folder.file_system in _LOCAL else ""
            yield _severity(folder)(
                f"{folder.path} on {folder.host} does not show what rank 0 wrote to it{hint}",
                "Each machine or container has a folder of its own under that name: a checkpoint would be in "
                "parts that no machine has together.",
                "Use a folder on the shared file system; in containers, bind it into all of them.",
            )
    if looked and all(folder.shared for folder in looked):
        yield ok(f"{looked[0].path} is one folder for all machines")


def _locks(job: JobFacts) -> Iterator[Finding]:
    """HDF5 locks files when it opens them, with flock, which some file systems do not have."""
    setting = job.first.environment.get("HDF5_USE_FILE_LOCKING")
    for folder in job.folders:
        if folder.problem is not None:
            continue
        if folder.lock_problem is None:
            yield ok(f"files in {folder.path} can be locked on {folder.host}")
        elif setting is not None and setting.upper() in _UNLOCKED:
            yield ok(
                f"no locks in {folder.path} on {folder.host}; HDF5_USE_FILE_LOCKING={setting} allows for it"
            )
        else:
            yield _severity(folder)(
                f"files in {folder.path} ({folder.file_system}) cannot be locked on {folder.host}: "
                f"{folder.lock_problem}",
                "HDF5 locks what it opens, and then fails with 'unable to lock file'. hpcpar reads without "
                "locks; other programs' h5py.File(...) would fail.",
                "export HDF5_USE_FILE_LOCKING=FALSE, and let no two processes write to one file.",
            )


CHECKS = (
    Check("storage.writable", _writable),
    Check("storage.shared", _shared),
    Check("storage.locks", _locks),
)
