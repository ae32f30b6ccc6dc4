"""The MPI library: loaded and started on first use, and checked against the launcher.

Importing hpcpar must not start MPI (a login node, a documentation build and ``pickle`` in a helper
process import it too), yet the modules of this package want to write ``MPI.SUM`` as everybody does. So
``MPI`` below is a stand-in for ``mpi4py.MPI`` whose first attribute access loads and starts the library.

A program started by the launcher of one MPI with the library of another does not fail by itself: it runs
as *N* jobs of one rank each, all of which write the same checkpoint. We compare what the launcher said in
the environment with the library, before ``MPI_Init`` where that is telling (MPICH ends the process there
with a riddle) and by the number of ranks afterwards.

Invariant: after the first attribute access MPI is initialised, with ``MPI_THREAD_MULTIPLE`` where the
library grants it, and finalised by mpi4py at exit. An MPI that the user has started is left as it is.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from hpcpar.errors import LauncherError

__all__ = ["MPI", "check_launcher", "threads_allowed"]

# Open MPI's UCX component for windows prints an error for every window where it finds no fast network, and
# windows shared inside a node never use it. Set on import, because the program may start MPI before we do;
# other MPIs do not read it.
os.environ.setdefault("OMPI_MCA_osc", "^ucx")

_REMEDY = (
    "Start the program with the mpirun of the MPI library that Python uses (`python -m mpi4py "
    "--mpi-library` names it; the PyPI wheels put it beside the python of their environment), or set "
    "HPCPAR_SKIP_LAUNCHER_CHECK=1 if you know better."
)


class _LazyMPI:
    """Stands for ``mpi4py.MPI``; the first attribute access starts the library (Local, as MPI_Init)."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # inspect, doctest, pytest and others ask every object for such names
            raise AttributeError(name)
        value = getattr(_start(), name)
        setattr(self, name, value)  # later reads find it in the instance and cost nothing
        return value


if TYPE_CHECKING:
    from mpi4py import MPI
else:
    MPI = _LazyMPI()


def threads_allowed() -> bool:
    """Whether several threads may call MPI at once (``MPI_THREAD_MULTIPLE``). Local."""
    return bool(MPI.Query_thread() == MPI.THREAD_MULTIPLE)


def check_launcher(world_size: int, environ: dict[str, str] | None = None) -> None:
    """Compare the size of the world with what the launcher announced. Local.

    Parameters
    ----------
    world_size
        Ranks in ``MPI.COMM_WORLD``.
    environ
        Environment to read, ``os.environ`` by default.

    Raises
    ------
    LauncherError
        When the launcher started several processes and MPI sees only this one.
    """
    env = dict(os.environ) if environ is None else environ
    announced = _announced_size(env)
    if announced is None or env.get("HPCPAR_SKIP_LAUNCHER_CHECK") == "1":
        return
    variable, size = announced
    if size > 1 and world_size == 1:
        raise LauncherError(
            f"the launcher must belong to the MPI library that Python uses, got {size} processes by "
            f"{variable} but a world of 1 rank: this is one of {size} jobs that know nothing of each "
            f"other. {_REMEDY}"
        )


def _announced_size(env: dict[str, str]) -> tuple[str, int] | None:
    """How many processes the innermost launcher started: variable and number, None when unknown.

    mpirun inside a Slurm job leaves Slurm's variables in place, hence the order. ``SLURM_NTASKS`` is set
    in every batch script, also for processes that ``srun`` did not start; those have no step id.
    """
    names = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"]
    if "SLURM_STEP_ID" in env:
        names.append("SLURM_NTASKS")
    for name in names:
        if env.get(name, "").isdigit():
            return name, int(env[name])
    return None


def _start() -> ModuleType:
    """Import ``mpi4py.MPI``, check the launcher, and initialise MPI unless somebody has."""
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        # Import without initialising, so that the library can be looked at first. The options are
        # restored: nothing else in the process should notice.
        before = mpi4py.rc.initialize, mpi4py.rc.finalize
        mpi4py.rc.initialize, mpi4py.rc.finalize = False, before[0] is not False and before[1] is not False
        try:
            from mpi4py import MPI as library
        finally:
            mpi4py.rc.initialize, mpi4py.rc.finalize = before
    else:
        from mpi4py import MPI as library
    if not library.Is_initialized():
        _check_process(dict(os.environ))
        _check_library(library.Get_library_version())
        library.Init_thread(library.THREAD_MULTIPLE)
    check_launcher(library.COMM_WORLD.Get_size())
    return library


def _check_process(env: dict[str, str]) -> None:
    """A child of a rank has the rank's environment, and would take its place with the launcher."""
    announced = _announced_size(env)
    if multiprocessing.parent_process() is None or announced is None:
        return
    if env.get("HPCPAR_SKIP_LAUNCHER_CHECK") != "1":
        raise LauncherError(
            f"MPI must be used by ranks only, got {multiprocessing.current_process().name!r}, a child that "
            "one has started by multiprocessing, itself or for a DataLoader. Such a process reads the script "
            "again: put what only ranks should do under `if __name__ == '__main__':`"
        )


def _check_library(version: str) -> None:
    """MPICH ends a process that Open MPI's mpirun started inside ``MPI_Init``; say why before that."""
    env = os.environ
    started_by_open_mpi = "OMPI_COMM_WORLD_SIZE" in env and "PMI_SIZE" not in env
    speaks_pmix = env.get("MPIR_CVAR_PMI_VERSION", "").lower() == "pmix"
    if env.get("HPCPAR_SKIP_LAUNCHER_CHECK") == "1" or not started_by_open_mpi or speaks_pmix:
        return
    if "MPICH" in version and int(env["OMPI_COMM_WORLD_SIZE"]) > 1:
        raise LauncherError(
            "the launcher must belong to the MPI library that Python uses, got Open MPI's mpirun with "
            f"the library {version.split('MPICH Release')[0].strip()!r}. {_REMEDY}"
        )
