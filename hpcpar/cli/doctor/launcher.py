"""Was this job started by the launcher that belongs to its MPI library, and does MPI start at all?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from hpcpar.cli.doctor.findings import Check, Finding, JobFacts, error, ok, skipped, warning
from hpcpar.cli.facts import ProcessFacts
from hpcpar.comm.environment import name_library

__all__ = ["CHECKS", "family_of"]

# A phrase of an error of MPI's start; what it means; what to do.
_START_ERRORS = (
    (
        "No module named 'mpi4py'",
        "mpi4py is what lets Python call MPI; without it hpcpar trains on one process only.",
        "Install it: `pip install mpi4py`, and an MPI beside it: `pip install mpich`, or the site's module.",
    ),
    (
        "cannot load MPI library",
        "mpi4py is there, but finds no MPI library: none is on the loader's path and none in the "
        "environment.",
        "Load the site's MPI module before Python starts (`module load ...`), or `pip install mpich`.",
    ),
    (
        "libmpi",
        "mpi4py was built for an MPI that is not loaded here: another module, or another version of it.",
        "Load the module it was built with, or build it anew: `MPICC=mpicc pip install --force-reinstall "
        "--no-cache-dir --no-binary mpi4py mpi4py`.",
    ),
    (
        "undefined symbol",
        "mpi4py was built for another MPI than the one that the loader finds.",
        "Build it for this one: `MPICC=mpicc pip install --force-reinstall --no-cache-dir --no-binary mpi4py "
        "mpi4py`.",
    ),
    (
        "GTL library is not linked",
        "MPICH_GPU_SUPPORT_ENABLED=1 asks Cray MPICH for its GPU transport, which Python did not load.",
        "Unset it (hpcpar stages through host memory and does not need it), or preload the library: "
        "LD_PRELOAD=$CRAY_MPICH_ROOTDIR/gtl/lib/libmpi_gtl_cuda.so (libmpi_gtl_hsa.so for AMD).",
    ),
    (
        "/dev/shm",
        "MPICH keeps its queues in /dev/shm, and ends with a segmentation fault when they do not fit.",
        "docker and podman: `--shm-size=8g` or `--ipc=host`; or delete what dead jobs have left there.",
    ),
    (
        "HPCPAR_TIMEOUT_S",
        "Every wait of hpcpar ends after that time, so nothing starts without knowing it.",
        "Give the variable a number of seconds, 0 for no limit, or unset it: 600 then.",
    ),
    (
        "HPCPAR_RANKS_PER_NODE",
        "hpcpar could not be started on all ranks.",
        "Give the variable a positive number, or unset it.",
    ),
)


def family_of(library: str) -> str:
    """The launchers of which MPI can start this one: MPICH's derivatives start each other. Local."""
    return "MPICH" if library in ("Intel MPI", "MVAPICH", "Cray MPICH") else library


def _starts(job: JobFacts) -> Iterator[Finding]:
    """MPI starts, and sees as many ranks as the launcher started."""
    facts = job.first
    announced = facts.launcher.size or 1
    if facts.mpi_problem is not None and "LauncherError" not in facts.mpi_problem:
        yield _explain(facts.mpi_problem, facts.environment)
    elif facts.mpi is None or (announced > 1 and facts.mpi.size == 1):
        yield _mixed(facts)
    elif facts.launcher.rank is None:
        yield ok("no launcher: a job of one rank (for more: mpirun -n 4 hpcpar doctor)")
    else:
        yield ok(f"{facts.launcher.name} started {facts.mpi.size} rank(s), and MPI sees as many")


def _explain(problem: str, environment: Mapping[str, str]) -> Finding:
    seen = f"MPI does not start: {problem}"
    chosen = [
        f"{name}={environment[name]}" for name in ("MPI4PY_LIBMPI", "MPI4PY_MPIABI") if name in environment
    ]
    if chosen and "HPCPAR" not in problem and "/dev/shm" not in problem:
        return error(
            f"{seen} ({', '.join(chosen)})",
            "The variable tells mpi4py which library to load, or of which MPI, instead of the one it finds.",
            f"unset {' '.join(one.partition('=')[0] for one in chosen)}",
        )
    for phrase, why, remedy in _START_ERRORS:
        if phrase in problem:
            return error(seen, why, remedy)
    return error(
        seen,
        "Without MPI there is no job of several ranks.",
        "If this is a login node, try on a compute node, under the site's launcher: some sites forbid MPI "
        "elsewhere. Else load the MPI module that mpi4py was installed with.",
    )


def _mixed(facts: ProcessFacts) -> Finding:
    launcher, count = facts.launcher, facts.launcher.size
    library = facts.mpi.path if facts.mpi else next(iter(facts.libraries), None)
    seen = (
        f"{launcher.name} started {count} processes ({', '.join(launcher.variables)}), but the MPI library "
        f"{library or 'that Python uses'} takes each for a job of its own"
    )
    why = (
        f"Launcher and library belong to different MPIs. Training would run {count} times on one rank each, "
        "all writing the same files. hpcpar stops such a job with a LauncherError."
    )
    if launcher.name == "Slurm's srun":
        return error(
            seen,
            why,
            "Ask srun what it speaks, `srun --mpi=list`, and try `srun --mpi=pmix` (Open MPI) or "
            "`--mpi=pmi2` "
            "(MPICH); or use the library's own mpirun in the batch script.",
        )
    own = facts.own_mpirun
    start = f"`{own} -n {count} ...`" if own else "the mpirun that was installed with that library"
    return error(seen, why, f"Start the job with {start}, and look what comes first on PATH.")


def _mpirun(job: JobFacts) -> Iterator[Finding]:
    """The mpirun that one would type belongs to the library."""
    facts = job.first
    if facts.mpirun is None:
        beside = f"; {facts.own_mpirun} is beside this Python" if facts.own_mpirun else ""
        yield ok(f"no mpirun on PATH{beside}")
        return
    name = name_library(facts.mpirun_words)[0]
    library = _library_name(facts)
    if "unknown" in (name, library):
        yield skipped(f"whose mpirun {facts.mpirun} is: {facts.mpirun_words or 'it does not say'}")
    elif family_of(name) == family_of(library):
        yield ok(f"mpirun on PATH is {facts.mpirun_words}, the library {library}")
    else:
        own = f", {facts.own_mpirun}" if facts.own_mpirun and facts.own_mpirun != facts.mpirun else ""
        yield warning(
            f"mpirun on PATH, {facts.mpirun}, is {facts.mpirun_words}; the library is {library}",
            "It would start processes that know nothing of each other.",
            f"Put the mpirun of the library first on PATH{own}, or name it in full.",
        )


def _library_name(facts: ProcessFacts) -> str:
    """From the library itself or, before it has started, from what its files are called."""
    if facts.mpi is not None:
        return facts.mpi.name
    for path in facts.libraries:
        if path.endswith((".so.40", ".so.20")):
            return "Open MPI"
        if path.endswith(".so.12"):
            return "MPICH"
    return "unknown"


def _root(job: JobFacts) -> Iterator[Finding]:
    """Open MPI's mpirun refuses root unless told twice."""
    facts = job.first
    if not facts.user_is_root or facts.launcher.rank is not None or _library_name(facts) != "Open MPI":
        return
    variables = ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM")
    if all(facts.environment.get(name) == "1" for name in variables):
        yield ok("Open MPI may be started by root")
        return
    yield warning(
        "this is root, and Open MPI's mpirun refuses root",
        "One often is root in a container; mpirun ends with a long text before anything starts.",
        f"export {variables[0]}=1 {variables[1]}=1",
    )


CHECKS = (
    Check("launcher.starts", _starts),
    Check("launcher.mpirun", _mpirun),
    Check("launcher.root", _root),
)
