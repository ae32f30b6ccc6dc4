"""``hpcpar info``: one process, many ranks, and where they differ."""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from hpcpar.cli.device_check import DeviceVerdict
from hpcpar.cli.facts import ProcessFacts, gather_process_facts
from hpcpar.cli.info import describe, describe_ranks, differences
from hpcpar.cli.main import main
from hpcpar.cli.output import (
    compact_ranges,
    format_bytes,
    format_rate,
    format_seconds,
    format_table,
    parse_size,
)
from hpcpar.comm.environment import LauncherFacts, MpiFacts, loaded_libraries, name_library, read_launcher

pytestmark = pytest.mark.local

MPI = MpiFacts(
    name="Open MPI",
    version="5.0.11",
    standard="3.1",
    description="Open MPI v5.0.11",
    built_for="Open MPI 5.0.11",
    path="/lib/libmpi.so.40",
    thread_level="multiple",
    rank=0,
    size=2,
    gpu_claim=True,
    revokes=True,
    survives=False,
)
FACTS = ProcessFacts(
    host="n1",
    cores=(0, 1, 2),
    machine_cores=tuple(range(8)),
    physical_cores={core: f"{core // 4}/{core % 4}" for core in range(8)},
    torch_threads=3,
    memory_total=8 << 30,
    memory_available=6 << 30,
    memory_limit=4 << 30,
    shm_total=64 << 20,
    shm_free=32 << 20,
    versions={"torch": "2.9.0"},
    broken={"h5py": "ImportError: no"},
    mpi=MPI,
)


def test_one_process_describes_itself() -> None:
    result = CliRunner().invoke(main, ["info", "--json"], prog_name="hpcpar")
    assert result.exit_code == 0, result.output
    content = json.loads(result.stdout)
    (facts,) = content["ranks"]
    assert facts["problems"] == [] and facts["broken"] == {}
    assert facts["versions"].keys() >= {"hpcpar", "torch", "numpy", "h5py", "mpi4py"}
    assert facts["mpi"]["size"] == 1 and facts["mpi"]["thread_level"] == "multiple"
    assert facts["mpi"]["path"] in facts["libraries"]
    assert content["nodes"] == [0] and content["gpu_messages"] is None


def test_description_names_what_matters() -> None:
    text = "\n".join(f"{label}: {value}" for label, value in describe(FACTS, DeviceVerdict(2, (8,), ())))
    for phrase in (
        "torch 2.9.0; h5py cannot be imported: ImportError: no",
        "Open MPI 5.0.11 (standard 3.1), /lib/libmpi.so.40",
        "claimed; device buffers arrive unharmed",
        "mpirun --with-ft ulfm",
        "n1, 2 socket(s)",
        "0-2 of 0-7; 3 thread(s) in torch, OMP_NUM_THREADS not set",
        "6 GiB available of 8 GiB, limited to 4 GiB",
        "32 MiB free of 64 MiB",
    ):
        assert phrase in text, text


def test_torch_xla_is_named_without_being_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    version = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "2.9.0" if name == "torch_xla" else version(name)
    )
    monkeypatch.setitem(sys.modules, "torch_xla", None)  # so that importing it fails
    facts = gather_process_facts({})
    assert facts.versions["torch_xla"] == "2.9.0"
    assert "torch_xla" not in facts.broken


def test_mpi_that_does_not_start_is_said() -> None:
    rows = dict(describe(replace(FACTS, mpi=None, mpi_problem="RuntimeError: cannot load MPI library")))
    assert "does not start: RuntimeError: cannot load" in rows["MPI"] and "doctor" in rows["MPI"]


def test_ranks_are_one_table_that_marks_what_differs() -> None:
    other = replace(FACTS, host="n2", cores=(4, 5), versions={"torch": "2.10.0"})
    head, first, second = describe_ranks([FACTS, other], [0, 1]).splitlines()
    assert head.split() == ["rank", "node", "host", "cores", "threads", "GPUs", "/dev/shm", "free"]
    assert first.split()[:4] == ["0", "0", "n1", "0-2"] and not first.endswith("*")
    assert second.split()[:4] == ["1", "1", "n2", "4-5"] and second.endswith("*")
    assert differences([FACTS, other]) == ["* rank 1: torch is 2.10.0, rank 0 has 2.9.0"]
    assert differences([FACTS, FACTS]) == []


LAUNCHERS = {
    "none": ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, ("none", None, None)),
    "hydra": ({"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}, ("Hydra (MPICH's mpirun)", 1, 4)),
    "hydra in Slurm": (
        {
            "PMI_RANK": "1",
            "PMI_SIZE": "4",
            "MPI_LOCALRANKID": "1",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
        },
        ("Hydra (MPICH's mpirun)", 1, 4),
    ),
    "open mpi in Slurm": (
        {
            "OMPI_COMM_WORLD_RANK": "3",
            "OMPI_COMM_WORLD_SIZE": "4",
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "0",
        },
        ("Open MPI's mpirun", 3, 4),
    ),
    "srun": (
        {
            "SLURM_STEP_ID": "0",
            "SLURM_PROCID": "2",
            "SLURM_STEP_NUM_TASKS": "8",
            "PMI_RANK": "2",
            "PMI_SIZE": "8",
        },
        ("Slurm's srun", 2, 8),
    ),
}


@pytest.mark.parametrize(("environ", "expected"), LAUNCHERS.values(), ids=LAUNCHERS)
def test_launcher_is_read_from_its_variables(
    environ: dict[str, str], expected: tuple[str, int | None, int | None]
) -> None:
    facts = read_launcher(environ)
    assert (facts.name, facts.rank, facts.size) == expected


def test_ranks_on_the_node_are_counted() -> None:
    environ = {"PMI_RANK": "1", "PMI_SIZE": "4", "MPI_LOCALNRANKS": "2"}
    assert read_launcher(environ).local_size == 2
    assert read_launcher({}) == LauncherFacts("none", "none", None, None)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("Open MPI v5.0.11, package: Open MPI x Distribution", ("Open MPI", "5.0.11")),
        ("mpirun (Open MPI) 4.1.4", ("Open MPI", "4.1.4")),
        ("MPICH Version: 5.0.2 MPICH Release date: x", ("MPICH", "5.0.2")),
        ("HYDRA build details: Version: 4.2.0", ("MPICH", "4.2.0")),
        ("Intel(R) MPI Library 2021.14 for Linux* OS", ("Intel MPI", "2021.14")),
        ("MPI VERSION : CRAY MPICH version 8.1.29.26 (ANL base 3.4a2)", ("Cray MPICH", "8.1.29.26")),
        ("something else", ("unknown", "unknown")),
    ],
)
def test_library_is_named_by_its_own_words(words: str, expected: tuple[str, str]) -> None:
    assert name_library(words) == expected


def test_libraries_are_found_in_the_memory_map() -> None:
    line = "7f00-7f01 r-xp 00000000 08:01 {} {}"
    paths = [
        "/env/lib/libmpi.so.12",
        "/opt/cray/lib/libmpi_gnu_123.so.12",
        "/env/lib/libmpi_mpifh.so.40",
        "/env/lib/libmpicxx.so.12",
        "/opt/cray/lib/libmpi_gtl_cuda.so.0",
        "/env/lib/python3.11/site-packages/mpi4py/MPI.mpich.so",
        "/dev/shm/mpich_shm_1",
    ]
    lines = [line.format(inode, path) for inode, path in enumerate(paths)] * 2
    assert loaded_libraries(lines) == (
        "/env/lib/libmpi.so.12",
        "/opt/cray/lib/libmpi_gnu_123.so.12",
    )


def test_facts_that_cannot_be_found_are_problems_and_not_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> dict[str, int]:
        raise OSError("no such thing")

    monkeypatch.setattr("hpcpar.cli.facts._memory", fail)
    facts = gather_process_facts({})
    assert "memory: OSError: no such thing" in facts.problems
    assert facts.memory_total == 0 and facts.cores


def test_units_and_tables() -> None:
    assert [format_bytes(n) for n in (8, 1536, 64 << 20)] == ["8 B", "1.5 KiB", "64 MiB"]
    assert [format_seconds(s) for s in (2e-9, 1.5e-6, 0.002, 3)] == ["2 ns", "1.5 us", "2 ms", "3 s"]
    assert [format_rate(r) for r in (5e6, 1.2e10)] == ["5 MB/s", "12 GB/s"]
    assert compact_ranges([3, 0, 1, 2, 8]) == "0-3,8"
    assert [parse_size(text) for text in ("8", "1KiB", "1.5m", "2 GB")] == [8, 1024, 1572864, 2 << 30]
    assert format_table(["a", "size"], [["xyz", "8 B"], ["x", "64 MiB"]]).splitlines() == [
        "a      size",
        "xyz     8 B",
        "x    64 MiB",
    ]


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1XB", "KiB"])
def test_wrong_sizes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be sizes such as"):
        parse_size(text)
