"""What differs from site to site in a job script, as data.

The skeleton of a script is the same everywhere (:mod:`hpcpar.jobs.scripts`). A site adds the size of its
nodes, by which a request is checked before the queue refuses it, and the directives, variables and options of
``srun`` that its own documentation advises. Each kind of node names the page that it follows; facts without a
page do not belong here.

::

    Site  "perlmutter" --+-- NodeKind "CPU nodes": 128 cores, --constraint=cpu, ...
                         +-- NodeKind "GPU nodes":  64 cores, 4 GPUs, --constraint=gpu, ...

Pages change and so do machines: the scripts that are made from this are a start, to be read before use.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcpar.errors import HpcparError

__all__ = ["SITES", "NodeKind", "Site", "find_site"]


@dataclass(frozen=True)
class NodeKind:
    """One kind of a site's nodes, and how its site wants jobs on it to be written.

    Attributes
    ----------
    title
        What a comment in the script calls them.
    page
        Address of the page whose advice this follows.
    cores
        Cores that a job may use on a node; None: not known.
    gpus
        GPUs of a node, counted as Slurm does (a die of an MI250X is one); None: not known.
    cpus_per_core
        What ``--cpus-per-task`` counts for a core: 2 where it counts hardware threads.
    partition, qos
        Where jobs go that do not say where.
    longest_h
        Hours that a job may last there; None: not checked.
    directives
        Further lines of ``#SBATCH``; ``{gpus}`` stands for the GPUs per node.
    gpu_directive
        How GPUs are asked for.
    hints
        Further comments on the environment.
    srun_options
        How to bind; ``{masks}`` stands for the cores of each rank as masks, from ``core_groups``.
    core_groups
        For each GPU the first core of the group next to it, where binding is done by masks.
    wrapper
        A command in front of the program, which chooses the rank's GPU.
    note
        What the program should know.
    gpu_variable
        By which a rank that no ``srun`` gives a GPU chooses its own.
    """

    title: str
    page: str
    cores: int | None = None
    gpus: int | None = 0
    cpus_per_core: int = 1
    partition: str | None = None
    qos: str | None = None
    longest_h: int | None = None
    directives: tuple[str, ...] = ()
    gpu_directive: str = "--gpus-per-node={gpus}"
    hints: tuple[str, ...] = ()
    srun_options: tuple[str, ...] = ("--cpu-bind=cores",)
    core_groups: tuple[int, ...] = ()
    wrapper: str = ""
    note: str = ""
    gpu_variable: str = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Site:
    """A cluster: its kinds of nodes, and what it wants to know of every job."""

    name: str
    title: str
    cpu: NodeKind | None
    gpu: NodeKind | None
    needs_account: bool = True
    launcher: str = "srun"
    modules: tuple[str, ...] = ("module load ...",)


_SCHEDMD = "https://slurm.schedmd.com/sbatch.html"
_GPU_AWARE_CRAY = (
    "hpcpar moves GPU tensors through pinned memory unless MPI takes them itself. Cray's does after",
    "export MPICH_GPU_SUPPORT_ENABLED=1, and stops at once if mpi4py was linked without its GPU library.",
)
_SEES_ALL_GPUS = (
    "Each rank sees all GPUs of its node, and takes its own by torch.cuda.set_device(comm.node.rank)"
)

_GENERIC = Site(
    name="generic",
    title="A cluster with Slurm",
    cpu=NodeKind(title="CPU nodes", page=_SCHEDMD),
    gpu=NodeKind(
        title="GPU nodes", page=_SCHEDMD, gpus=None, srun_options=("--gpus-per-task=1", "--cpu-bind=cores")
    ),
    needs_account=False,
    launcher="mpirun",
    modules=("module load python openmpi", "source train/bin/activate"),
)

_PERLMUTTER_PAGE = "https://docs.nersc.gov/systems/perlmutter/running-jobs/"
_PERLMUTTER = Site(
    name="perlmutter",
    title="Perlmutter, NERSC",
    cpu=NodeKind(
        title="CPU nodes",
        page=_PERLMUTTER_PAGE,
        cores=128,
        cpus_per_core=2,
        qos="regular",
        directives=("--constraint=cpu",),
    ),
    gpu=NodeKind(
        title="GPU nodes",
        page=_PERLMUTTER_PAGE,
        cores=64,
        gpus=4,
        cpus_per_core=2,
        qos="regular",
        directives=("--constraint=gpu",),
        hints=_GPU_AWARE_CRAY,
        srun_options=("--gpus-per-task=1", "--gpu-bind=none", "--cpu-bind=cores"),
        note=_SEES_ALL_GPUS,
    ),
    modules=("module load python", "source $CFS/<project>/train/bin/activate"),
)

_FRONTIER = Site(
    name="frontier",
    title="Frontier, OLCF",
    cpu=None,
    gpu=NodeKind(
        title="GPU nodes: 56 cores for jobs (one of each group of eight is the system's), 8 GPUs",
        page="https://docs.olcf.ornl.gov/systems/frontier_user_guide.html",
        cores=56,
        gpus=8,
        partition="batch",
        gpu_directive="--gpus-per-node={gpus}",
        hints=_GPU_AWARE_CRAY,
        srun_options=("--gpus-per-task=1", "--gpu-bind=closest", "--cpu-bind=cores"),
        gpu_variable="ROCR_VISIBLE_DEVICES",
    ),
    modules=("module load PrgEnv-gnu rocm cray-python", "source train/bin/activate"),
)

_LUMI_PAGES = "https://docs.lumi-supercomputer.eu/runjobs/scheduled-jobs/"
_LUMI = Site(
    name="lumi",
    title="LUMI, CSC",
    cpu=NodeKind(
        title="LUMI-C",
        page=_LUMI_PAGES + "lumic-job/",
        cores=128,
        partition="standard",
        longest_h=48,
        directives=("--mem=0",),
        srun_options=("--cpu-bind=cores",),
    ),
    gpu=NodeKind(
        title="LUMI-G: 56 cores for jobs (one of each group of eight is the system's), 8 GPUs",
        page=_LUMI_PAGES + "lumig-job/",
        cores=56,
        gpus=8,
        partition="standard-g",
        longest_h=48,
        directives=("--mem=0",),
        hints=_GPU_AWARE_CRAY,
        srun_options=("--cpu-bind=mask_cpu:{masks}",),
        core_groups=(48, 56, 16, 24, 0, 8, 32, 40),  # which cores are next to GPU 0, 1, ...
        wrapper="bash -c 'export ROCR_VISIBLE_DEVICES=$SLURM_LOCALID; exec \"$@\"' --",
        gpu_variable="ROCR_VISIBLE_DEVICES",
    ),
    modules=("module load LUMI cray-python", "source train/bin/activate"),
)

_ARCHER2 = Site(
    name="archer2",
    title="ARCHER2, EPCC",
    cpu=NodeKind(
        title="CPU nodes",
        page="https://docs.archer2.ac.uk/user-guide/scheduler/",
        cores=128,
        partition="standard",
        qos="standard",
        longest_h=24,
        srun_options=("--distribution=block:block", "--hint=nomultithread"),
    ),
    gpu=None,
    modules=("module load cray-python", "source /work/<project>/train/bin/activate"),
)

_JUWELS_PAGE = "https://apps.fz-juelich.de/jsc/hps/juwels/batchsystem.html"
_JUWELS = Site(
    name="juwels",
    title="JUWELS, JSC",
    cpu=NodeKind(
        title="Cluster",
        page=_JUWELS_PAGE,
        cores=48,
        partition="batch",
        longest_h=24,
        srun_options=("--cpu-bind=cores", "--hint=nomultithread"),
    ),
    gpu=NodeKind(
        title="Booster",
        page=_JUWELS_PAGE,
        cores=48,
        gpus=4,
        partition="booster",
        longest_h=24,
        gpu_directive="--gres=gpu:{gpus}",
        srun_options=("--cpu-bind=cores", "--hint=nomultithread"),
        note=_SEES_ALL_GPUS,
    ),
    modules=("module load Stages GCC OpenMPI Python", "source train/bin/activate"),
)

SITES = {site.name: site for site in (_GENERIC, _PERLMUTTER, _FRONTIER, _LUMI, _ARCHER2, _JUWELS)}
"""The sites, by the names that :func:`find_site` takes."""


def find_site(name: str) -> Site:
    """Return a site by its name. Local.

    Raises
    ------
    HpcparError
        For a name that is not in :data:`SITES`.
    """
    if name not in SITES:
        raise HpcparError(f"the site must be one of {', '.join(SITES)}, got {name!r}")
    return SITES[name]
