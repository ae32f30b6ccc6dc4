"""Several ranks save and load together, on as many as saved and on others; a failure on one is one on all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from hpcpar.checkpoint import PerRank, info, load, load_rng_state, rng_state, save, saving
from hpcpar.comm import MPI, Communicator
from hpcpar.errors import CheckpointError
from hpcpar.nn import Pipeline
from hpcpar.optim import ShardedOptimizer


@pytest.fixture
def folder(comm: Communicator) -> Iterator[Path]:
    """One for all ranks."""
    path = Path(comm.bcast(tempfile.mkdtemp() if comm.rank == 0 else None))
    yield path
    comm.Barrier()
    if comm.rank == 0:
        shutil.rmtree(path, ignore_errors=True)


def common() -> dict[str, Any]:
    """The same on all ranks, more than one slice."""
    generator = torch.Generator().manual_seed(7)
    return {
        "w": torch.randn(1_500_000, generator=generator),
        "half": torch.randn(33, generator=generator).bfloat16(),
        "lr": 0.5,
    }


def part_of(comm: Communicator, size: int) -> Communicator | None:
    """A communicator of the first ranks."""
    return comm.Split(0 if comm.rank < size else MPI.UNDEFINED, comm.rank)


def test_each_rank_gets_back_what_it_saved_and_what_all_have_is_written_once(
    comm: Communicator, folder: Path
) -> None:
    state = {
        **common(),
        "rank": comm.rank,
        f"of{comm.rank}": torch.full((2,), comm.rank),
        "mine": PerRank([comm.rank]),
    }
    save(folder / "run", state, comm)
    loaded = load(folder / "run", comm=comm)
    assert loaded["rank"] == comm.rank and loaded["mine"] == [comm.rank] and loaded["lr"] == 0.5
    assert torch.equal(loaded["w"], state["w"]) and torch.equal(loaded["half"], state["half"])
    assert list(loaded) == list(state) and loaded[f"of{comm.rank}"].tolist() == [comm.rank] * 2
    everything = load(folder / "run", {f"of{rank}": None for rank in range(comm.size)}, comm)
    assert all(everything[f"of{rank}"].tolist() == [rank] * 2 for rank in range(comm.size))
    found = info(folder / "run")
    assert found.ranks == comm.size and found.nbytes < 1.2 * state["w"].nbytes + 10_000 * comm.size
    files = [path.stat().st_size for path in (folder / "run").glob("*.h5")]
    assert len(files) == comm.size or comm.size > 2


@pytest.mark.parametrize("by", ["threads", "files"])
def test_background_saves_the_state_of_the_call(
    by: str, comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if by == "files":
        monkeypatch.setattr(saving, "threads_allowed", lambda: False)
    for number in range(2):  # the second reuses the memory of the first
        state = {**common(), "n": number, "rank": PerRank(comm.rank)}
        expected = state["w"].clone()
        handle = save(folder / f"step-{number}", state, comm, asynchronous=True, keep=1)
        state["w"].zero_()
        comm.Allreduce(MPI.IN_PLACE, torch.ones(1000))  # the program's own messages go on meanwhile
        handle.wait()
        loaded = load(folder / f"step-{number}", comm=comm)
        assert torch.equal(loaded["w"], expected) and loaded["n"] == number and loaded["rank"] == comm.rank
    comm.Barrier()
    assert not (folder / "step-0").exists()


def test_failure_on_one_rank_is_one_on_all_and_the_checkpoint_before_stays(
    comm: Communicator, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, bad = folder / "run", comm.size - 1
    save(path, {"n": 1, **common()}, comm)
    for asynchronous in (False, True):
        with pytest.raises(CheckpointError, match=r"state\['x'\] must be made of.*object"):
            save(path, {"x": object() if comm.rank == bad else 1}, comm, asynchronous=asynchronous)
        with monkeypatch.context() as patch:
            if comm.rank == bad:
                patch.setattr("os.pwrite", _full_disk)
            with pytest.raises(
                CheckpointError, match=rf"rank{bad}\.h5 must be writable, got No space"
            ) as error:
                save(path, {"n": 2, **common()}, comm, asynchronous=asynchronous).wait()
        assert len(set(comm.allgather(str(error.value)))) == 1
        assert load(path, {"n": 0}, comm) == {"n": 1}
        comm.Barrier()
        assert len(list(path.glob("*.h5"))) == sum(1 for _ in path.glob("*-rank*.h5")) <= comm.size
    with pytest.raises(CheckpointError, match="same on all ranks") if comm.size > 1 else _nothing():
        save(folder / f"run-{comm.rank}", {}, comm)


def _full_disk(*args: Any) -> int:
    raise OSError(28, "No space left on device")


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


def test_failure_to_load_on_one_rank_is_one_on_all(comm: Communicator, folder: Path) -> None:
    save(folder / "run", common(), comm)
    wrong = {"w": torch.zeros(3 if comm.rank == comm.size - 1 else 1_500_000)}
    with pytest.raises(CheckpointError, match=r"state\['w'\] must be of shape \[1500000\].*got \[3\]"):
        load(folder / "run", wrong, comm)
    with pytest.raises(CheckpointError, match=r"nothing.manifest\.json must be"):
        load(folder / "nothing", comm=comm)


@pytest.mark.mpi(min_size=2)
def test_values_of_single_ranks_on_another_number_of_ranks(comm: Communicator, folder: Path) -> None:
    state = {"rng": PerRank(rng_state()), "mine": PerRank(comm.rank), "differs": comm.rank, "same": 1}
    save(folder / "all", state, comm)
    alone = part_of(comm, 1)
    if alone is not None:
        with alone:
            with pytest.raises(CheckpointError, match=r"as many as saved them.*state\['differs'\].*PerRank"):
                load(folder / "all", comm=alone)
            assert load(folder / "all", {"mine": 5, "same": 0}, alone) == {"mine": 0, "same": 1}
            loaded = load(folder / "all", comm=alone, strict=False)
            assert "differs" not in loaded and loaded["mine"] == 0
            load_rng_state(loaded["rng"])
            save(folder / "one", {"mine": PerRank(9)}, alone)
    comm.Barrier()
    template = {"mine": PerRank(-comm.rank)}
    load(folder / "one", template, comm)
    assert template["mine"].value == (9 if comm.rank == 0 else -comm.rank)
    assert load(folder / "one", comm=comm) == {"mine": 9 if comm.rank == 0 else None}


def test_all_ranks_of_the_job_save_together_by_default(comm: Communicator, folder: Path) -> None:
    save(folder / "run", {"rank": PerRank(comm.rank), "differs": comm.rank})
    assert info(folder / "run").ranks == comm.size
    assert load(folder / "run") == {"rank": comm.rank, "differs": comm.rank}
    comm.Barrier()


# ---- models and optimizers over ranks ----------------------------------------------------------------------


def make_net() -> torch.nn.Sequential:
    torch.manual_seed(3)
    return torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(4)])


def train_alone(net: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        net(torch.full((2, 4), 0.1 * step + 0.1)).square().sum().backward()
        optimizer.step()


def train_sharded(net: torch.nn.Module, comm: Communicator, path: Path, first: bool) -> None:
    """Two steps before the checkpoint, or two after it."""
    optimizer = ShardedOptimizer(net.parameters(), torch.optim.AdamW, comm, lr=0.1)
    state = {"model": net, "optimizer": optimizer}
    if not first:
        load(path, state, comm)
    train_alone(net, optimizer, 2)
    if first:
        save(path, state, comm)
    optimizer.free()


@pytest.mark.parametrize("fewer_first", [True, False])
def test_sharded_training_moves_to_another_number_of_ranks(
    fewer_first: bool, comm: Communicator, folder: Path
) -> None:
    fewer = part_of(comm, max(1, comm.size - 1))
    for first in (True, False):
        group = fewer if fewer_first == first else comm
        if group is not None:
            net = make_net()
            train_sharded(net, group, folder / "run", first)
        comm.Barrier()
    if fewer is not None:
        fewer.Free()
    expected = make_net()
    optimizer = torch.optim.AdamW(expected.parameters(), lr=0.1)
    train_alone(expected, optimizer, 2)
    train_alone(expected, optimizer, 2)
    if not fewer_first and comm.rank == comm.size - 1 and comm.size > 1:
        return  # has not gone on
    for a, b in zip(net.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_pipeline_moves_to_another_number_of_stages(comm: Communicator, folder: Path) -> None:
    fewer = part_of(comm, max(1, comm.size - 1))
    inputs = torch.ones(4, 4)

    def make(group: Communicator) -> tuple[Pipeline, torch.optim.Optimizer]:
        pipe = Pipeline(make_net(), group, microbatches=2, loss_fn=torch.nn.functional.mse_loss)
        return pipe, torch.optim.AdamW(pipe.parameters(), lr=0.1)

    def step(pipe: Pipeline, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        pipe.train_step(inputs, torch.zeros(4, 4))
        optimizer.step()

    pipe, optimizer = make(comm)
    step(pipe, optimizer)
    own = pipe.state_dict(full=False)  # each stage writes its own layers
    save(folder / "run", {"model": own, "optimizer": pipe.optimizer_state_dict(optimizer)}, comm)
    step(pipe, optimizer)
    expected = pipe.state_dict()
    pipe.free()
    if fewer is not None:
        pipe, optimizer = make(fewer)
        template = {"model": pipe, "optimizer": None}
        load(folder / "run", template, fewer)
        pipe.load_optimizer_state_dict(optimizer, template["optimizer"])
        step(pipe, optimizer)
        for name, value in pipe.state_dict(full=False).items():
            torch.testing.assert_close(value, expected[name])
        pipe.free()
        fewer.Free()
    alone = make_net()
    load(folder / "run", {"model": alone})
    assert [name for name, _ in alone.named_parameters()] == list(expected)


@pytest.mark.parametrize("same", [True, False])
def test_large_state_is_written_by_a_guess_that_may_be_wrong(
    comm: Communicator, folder: Path, same: bool
) -> None:
    """That all ranks have the same, and so write equal parts of it."""
    drawn = torch.Generator().manual_seed(0 if same else comm.rank)
    state = {str(n): torch.randn(1 << 20, generator=drawn) for n in range(5)}
    save(folder / "large", state, comm)
    loaded = load(folder / "large", comm=comm)
    assert all(torch.equal(loaded[name], state[name]) for name in state)
    nbytes = [path.stat().st_size for path in (folder / "large").glob("*.h5")]
    assert sum(nbytes) < (1 if same else comm.size) * 21 * 2**20
