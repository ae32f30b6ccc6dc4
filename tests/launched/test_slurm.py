"""The scripts of ``jobs/`` on a real Slurm of two nodes: they run where they say, stop in time, and go on.

One long training waits for the signal that Slurm sends before the time limit, up to half a minute, for Slurm
looks at limits that often. It is submitted first, and the short tests use the nodes meanwhile::

    interrupted   train .......................... signal, checkpoint, requeue | train ... equal?
    uninterrupted train ....                                                               equal?
    short tests        parse, ranks on nodes, array, chain
    node failure                                                                  train, crash, train, equal?
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.launching import ROOT, find_launcher
from tests.slurm_cluster import BatchJob, SlurmCluster, why_not

JOBS = ROOT / "jobs"
TRAINING = [str(ROOT / "examples/train_digits.py"), *"--no-plot --limit 128 --epochs 20 --device cpu".split()]
TWO_RANKS = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1")
MANY_RANKS = ("--ntasks-per-node=2", "--cpus-per-task=1")

WHERE = """
import os, sys
from mpi4py import MPI

names = ("SLURMD_NODENAME", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES")
rows = MPI.COMM_WORLD.gather([os.environ.get(name, "") for name in names])
if MPI.COMM_WORLD.rank == 0:
    print("WHERE", *map(":".join, rows), flush=True)
    print("ARGUMENTS", *sys.argv[1:], flush=True)
"""
UNFINISHED_TWICE = """
import pathlib, sys
from mpi4py import MPI

comm, marks = MPI.COMM_WORLD, pathlib.Path(sys.argv[1])
starts = comm.bcast(len(list(marks.iterdir())) if comm.rank == 0 else None)
if comm.rank == 0:
    (marks / str(starts)).touch()
comm.Barrier()
MPI.Finalize()
sys.exit(75 if starts < 2 else 0)
"""


@dataclass(frozen=True)
class Training:
    """A job that trains, and where it writes."""

    job: BatchJob
    folder: Path

    def history(self) -> dict[str, Any]:
        history: dict[str, Any] = json.loads((self.folder / "history.json").read_text())
        return history

    def curve(self) -> list[tuple[float, ...]]:
        """What each epoch has come to, to the last bit."""
        names = ("epoch", "train_loss", "test_loss", "test_accuracy")
        return [tuple(epoch[name] for name in names) for epoch in self.history()["epochs"]]

    def is_the_same_as(self, other: Training) -> bool:
        return self.curve() == other.curve() and self.history()["checksums"] == other.history()["checksums"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[SlurmCluster]:
    reason = why_not()
    if reason:
        pytest.skip(reason)
    with SlurmCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    """What the scripts read. The cores of the nodes are not real, so that nothing can be bound to them."""
    launcher = find_launcher()
    unbound = {
        "HYDRA_BINDING": "none",
        "PRTE_MCA_rmaps_default_mapping_policy": "slot",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
    }
    return launcher.environment({"PYTHON": sys.executable, "MPIRUN": launcher.mpirun, **unbound})


def train(
    cluster: SlurmCluster, environment: dict[str, str], name: str, options: list[str], *training: str
) -> Training:
    folder = cluster.folder / "trainings" / name
    folder.mkdir(parents=True)
    where = ["--checkpoints", str(folder / "checkpoints"), "--output", str(folder)]
    script = JOBS / "requeue.sbatch"
    arguments = [*TRAINING, *where, *training]
    job = cluster.submit(script, *TWO_RANKS, *options, arguments=arguments, env=environment)
    return Training(job, folder)


@pytest.fixture(scope="module")
def interrupted(cluster: SlurmCluster, environment: dict[str, str]) -> Training:
    """A training that takes longer than its signal lets it: 60 s before the end of its one minute."""
    options = ["--time=00:01:00", "--signal=B:USR1@60"]
    return train(cluster, environment, "interrupted", options, "--step-delay", "0.8")


@pytest.fixture(scope="module")
def uninterrupted(cluster: SlurmCluster, environment: dict[str, str]) -> Training:
    return train(cluster, environment, "uninterrupted", [])


@pytest.fixture(scope="module")
def once(interrupted: Training, uninterrupted: Training) -> None:
    """For what is the same with every MPI, and is tested with one."""
    if find_launcher().is_openmpi:
        pytest.skip("does not depend on the MPI; tested with MPICH")


def write(cluster: SlurmCluster, name: str, text: str) -> str:
    path = cluster.folder / name
    path.write_text(text)
    return str(path)


def where(job: BatchJob) -> list[list[str]]:
    """[node, threads, GPU] of each rank."""
    job.wait_for_state("COMPLETED")
    return [row.split(":") for row in job.wait_for_log(r"WHERE (.*)")[1].split()]


@pytest.mark.usefixtures("once")
def test_slurm_accepts_every_script(cluster: SlurmCluster) -> None:
    for path in sorted(JOBS.glob("*.sbatch")):
        cluster.command("sbatch", "--test-only", str(path))
    generic = str(JOBS / "sites/generic.sbatch")
    cluster.command("sbatch", "--test-only", "--nodes=2", "--ntasks-per-node=4", generic)


def test_ranks_run_on_the_nodes_that_mpirun_was_given(
    cluster: SlurmCluster, environment: dict[str, str], interrupted: Training, uninterrupted: Training
) -> None:
    program = [write(cluster, "where.py", WHERE), "--epochs", "2"]
    one, two = (
        cluster.submit(JOBS / f"{name}.sbatch", *MANY_RANKS, arguments=program, env=environment)
        for name in ("one_node", "several_nodes_mpirun")
    )
    assert [row[1:] for row in where(one)] == [["1", ""]] * 2
    assert len({node for node, *_ in where(one)}) == 1
    assert Counter(node for node, *_ in where(two)) == {"n1": 2, "n2": 2}
    assert "ARGUMENTS --epochs 2\n" in one.log


def test_srun_places_ranks_and_gives_each_its_gpu(cluster: SlurmCluster, environment: dict[str, str]) -> None:
    protocol = "pmix" if find_launcher().is_openmpi else "pmi2"
    answer = cluster.command("srun", f"--mpi={protocol}", "--ntasks=1", "true", check=False)
    if answer:
        pytest.skip(f"this Slurm does not speak {protocol}: {answer.splitlines()[0]}")
    program = [write(cluster, "where-srun.py", WHERE)]
    environment = {**environment, "SRUN_MPI": protocol}
    two, gpus, without = (
        cluster.submit(JOBS / f"{name}.sbatch", *MANY_RANKS, *options, arguments=program, env=environment)
        for name, *options in (["several_nodes_srun"], ["gpus"], ["gpus", "--gpus-per-node=0"])
    )
    assert Counter(node for node, *_ in where(two)) == {"n1": 2, "n2": 2}
    assert sorted(gpu for _, _, gpu in where(gpus)) == ["0", "1"]
    assert [row[1:] for row in where(without)] == [["1", ""]] * 2
    assert "this job has no GPUs" in without.log


@pytest.mark.usefixtures("once")
def test_array_gives_each_task_its_own_settings(cluster: SlurmCluster, environment: dict[str, str]) -> None:
    program = [write(cluster, "where-array.py", WHERE)]
    log = f"--output={cluster.folder}/jobs/sweep-%a.log"
    options = ["--array=0,2,4", "--ntasks-per-node=1", log]
    job = cluster.submit(JOBS / "array.sbatch", *options, arguments=program, env=environment)
    for task, settings in {
        0: "seed 0, learning rate 0.01",
        2: "seed 0, learning rate 0.05",
        4: "seed 1, ",
    }.items():
        mine = BatchJob(cluster, f"{job.number}_{task}", cluster.folder / f"jobs/sweep-{task}.log")
        mine.wait_for_state("COMPLETED")
        assert f"task {task}: {settings}" in mine.log
        assert f"--output sweep-{job.number}/seed-" in mine.log


@pytest.mark.usefixtures("once")
def test_chain_goes_on_until_the_training_has_finished(
    cluster: SlurmCluster, environment: dict[str, str]
) -> None:
    marks = cluster.folder / "marks"
    marks.mkdir()
    program = [write(cluster, "unfinished.py", UNFINISHED_TWICE), str(marks)]
    log = f"--output={cluster.folder}/jobs/chain-%j.log"
    options = {"SBATCH_OPTIONS": " ".join([*TWO_RANKS, log])}
    printed = cluster.command(str(JOBS / "chain.sh"), "4", *program, env={**environment, **options})
    numbers = printed.split()
    links = [BatchJob(cluster, number, cluster.folder / f"jobs/chain-{number}.log") for number in numbers]
    for link, state in zip(links, ["FAILED", "FAILED", "COMPLETED", "CANCELLED"], strict=True):
        link.wait_for_state(state)
    assert links[0].fields()["ExitCode"] == "75:0"
    assert len(list(marks.iterdir())) == 3


@pytest.mark.timeout_s(180)
def test_signal_before_the_limit_ends_in_a_requeue_and_the_same_training(
    interrupted: Training, uninterrupted: Training
) -> None:
    uninterrupted.job.wait_for_state("COMPLETED")
    job = interrupted.job
    job.wait_for_log("stopped, to go on later: back into the queue", timeout_s=90)
    job.start_now("timelimit=10")  # minutes: one signal is enough
    job.wait_for_state("COMPLETED", timeout_s=90)
    assert job.fields()["Restarts"] == "1"
    for line in ("signal: asking the ranks to stop", "SIGUSR1", "goes on from", "start 2 of job"):
        assert line in job.log, job.log
    assert "goes on from" not in uninterrupted.job.log
    assert len(interrupted.curve()) == 20
    assert interrupted.is_the_same_as(uninterrupted)


@pytest.mark.timeout_s(180)
def test_node_that_fails_costs_the_epochs_since_the_last_checkpoint(
    cluster: SlurmCluster, environment: dict[str, str], uninterrupted: Training
) -> None:
    uninterrupted.job.wait_for_state("COMPLETED")
    often = ["--checkpoint-every", "1", "--step-delay", "0.1"]
    training = train(cluster, environment, "crashed", ["--time=00:10:00"], *often)
    training.job.wait_for_log(r"epoch +4 ")
    cluster.crash_node("n2")
    training.job.wait_for_state("PENDING")
    cluster.repair_node("n2")
    training.job.start_now()
    training.job.wait_for_state("COMPLETED")
    assert training.job.fields()["Restarts"] == "1"
    resumed_after = int(training.job.wait_for_log(r"goes on from .* after (\d+) epochs")[1])
    assert 3 <= resumed_after < 20
    assert training.is_the_same_as(uninterrupted)
