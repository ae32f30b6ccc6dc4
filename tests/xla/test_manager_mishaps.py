"""What users do by mistake, and what datasets and models do that they should not."""

from __future__ import annotations

import itertools
import logging
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset, default_collate

import hpcpar
from hpcpar.comm import Communicator
from hpcpar.errors import RankFailedError, StalledError
from hpcpar.xla import TPUManager
from tests.xla.models import Regression, Sample, assert_gradients, reference, samples, shares


def is_guilty(comm: Communicator) -> bool:
    """The last rank."""
    return comm.rank == comm.size - 1


# ---- one rank alone ----------------------------------------------------------------------------------------


@pytest.mark.local
@pytest.mark.parametrize(
    "wrap", [hpcpar.nn.DataParallel, lambda net: nn.Sequential(hpcpar.nn.DataParallel(net))]
)
def test_model_that_communicates_itself_is_refused(wrap: Any) -> None:
    with pytest.raises(
        TypeError, match=r"must not communicate itself, got DataParallel .*give the plain module"
    ):
        TPUManager(wrap(Regression()), samples(4))


@pytest.mark.local
def test_collate_function_may_take_its_samples_apart() -> None:
    """Also in a short batch, in which the same samples come again."""

    def collate(batch: list[Sample]) -> Sample:
        targets = [sample.pop("y") for sample in batch]
        return default_collate(batch) | {"y": torch.stack(targets)}

    data = samples(3)
    model = Regression()
    given = [dict(sample) for sample in data]
    with TPUManager(model, given, collate_fn=collate, batch_size_per_device=8, devices=[0]) as manager:
        manager.step()
    assert_gradients(model, reference(model, data)[1])


class EndsEarly:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        if index == 2:
            raise StopIteration
        return samples(1)[0]


def ends_early(batch: list[Sample]) -> Sample:
    raise StopIteration


@pytest.mark.local
@pytest.mark.parametrize(
    ("options", "who"),
    [({"dataset": EndsEarly()}, "the dataset"), ({"collate_fn": ends_early}, "the collate function")],
    ids=["dataset", "collate function"],
)
def test_stop_iteration_of_what_is_no_iterator_does_not_end_the_epoch(options: Any, who: str) -> None:
    given = {"dataset": samples(8), "batch_size_per_device": 4, "devices": [0]} | options
    with (
        TPUManager(Regression(), **given) as manager,
        pytest.raises(RuntimeError, match=f"{who} must not raise StopIteration"),
    ):
        manager.step()


@pytest.mark.local
def test_dataset_is_read_on_to_its_end_behind_a_sample_that_fails() -> None:
    """It is longer than what has been read when the error is raised."""

    class Faulty:
        def __len__(self) -> int:
            return 40

        def __getitem__(self, index: int) -> Sample:
            if index == 2:
                raise OSError("cannot read")
            return samples(1)[0]

    seen = 0
    with TPUManager(Regression(), Faulty(), batch_size_per_device=2, prefetch=1, devices=[0]) as manager:
        seen += manager.step()[1]
        with pytest.raises(OSError, match="cannot read"):
            manager.step()
        while count := manager.step()[1]:
            seen += count
    assert seen == 38


class ChainedModel(Regression):
    """Raises one error because of another, in its third pass."""

    def __init__(self) -> None:
        super().__init__()
        self.passes = 0

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        if self.passes == 3:
            try:
                self.fail(x)
            except KeyError as error:
                raise ValueError("told to") from error
        return super().forward(x, y)

    def fail(self, x: Tensor) -> None:
        hidden = self.first(x)
        raise KeyError(tuple(hidden.shape))


@pytest.mark.local
@pytest.mark.xla
def test_error_that_is_kept_costs_no_graph() -> None:
    kept = []
    with TPUManager(ChainedModel(), samples(40), batch_size_per_device=4, devices=[0]) as manager:
        manager.step()
        graphs = manager.stats().graphs
        for _ in range(5):
            try:
                manager.step()
            except ValueError as error:
                kept.append(error)
        assert len(kept) == 1
        assert manager.stats().graphs == graphs


class Leaves:
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Sample:
        sys.exit("no more")


class LeavingModel(Regression):
    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        sys.exit("no more")


@pytest.mark.local
@pytest.mark.parametrize(
    ("options", "who"),
    [({"dataset": Leaves()}, "the dataset"), ({"model": LeavingModel()}, "the model")],
    ids=["dataset", "model"],
)
def test_system_exit_in_a_thread_is_an_error_of_the_step(options: Any, who: str) -> None:
    given = {"model": Regression(), "dataset": samples(4), "devices": [0]} | options
    words = rf"{who} must not end a thread .* got SystemExit\('no more'\)"
    with TPUManager(**given) as manager, pytest.raises(RuntimeError, match=words):
        manager.step()


@pytest.mark.local
def test_processes_that_would_each_read_everything_are_refused() -> None:
    with pytest.raises(TypeError, match="of which each would read all"):
        TPUManager(Regression(), itertools.cycle(samples(4)), num_workers=2)


class Draws:
    """What a process draws at random, so that augmentation can be told apart."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(1)


class Shared(IterableDataset[Tensor]):
    """Shares its numbers among the processes that read it."""

    def __iter__(self) -> Iterator[Tensor]:
        info = torch.utils.data.get_worker_info()
        first, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter(torch.arange(8.0)[first::step, None])


class Remembers(nn.Module):
    """Its loss is the mean of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return (self.weight * x).mean()


@pytest.mark.local
def test_processes_draw_other_numbers_in_each_epoch() -> None:
    with TPUManager(Remembers(), Draws(), batch_size_per_device=2, num_workers=1, devices=[0]) as manager:
        first, second = (loss for _ in range(2) for loss, _ in manager.epoch())
    assert first != second


@pytest.mark.local
def test_stream_that_processes_share_goes_on_where_it_was() -> None:
    options: Any = {"batch_size_per_device": 1, "num_workers": 2, "devices": [0]}
    with TPUManager(Remembers(), Shared(), **options) as manager:
        seen = [manager.step()[0] for _ in range(3)]
        state = manager.state_dict()
    with TPUManager(Remembers(), Shared(), **options) as manager:
        manager.load_state_dict(state)
        seen += [loss for loss, _ in manager.epoch()]
    assert sorted(seen) == list(range(8))


# ---- over ranks --------------------------------------------------------------------------------------------


class Counting(Regression):
    """Counts its passes, and raises when it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))
        self.fails = [False]

    def __deepcopy__(self, memo: dict[int, Any]) -> Counting:
        copied = type(self).__new__(type(self))
        nn.Module.__init__(copied)
        for name, child in self.named_children():
            setattr(copied, name, type(child).__new__(type(child)))
            getattr(copied, name).__dict__.update(
                {k: dict(v) if isinstance(v, dict) else v for k, v in child.__dict__.items()}
            )
            for key, parameter in child._parameters.items():
                getattr(copied, name)._parameters[key] = memo[id(parameter)]
        copied.register_buffer("passes", memo[id(self.passes)])
        copied.fails = self.fails  # the same list, so that the test reaches the replica
        return copied

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        self.passes += 1
        if self.fails[0]:
            raise ValueError("told to")
        return super().forward(x, y)


@pytest.mark.mpi
def test_failed_step_leaves_no_trace_in_buffers(comm: Communicator) -> None:
    parts = shares([12] * comm.size)
    model = Counting()
    options: Any = {"batch_size_per_device": 2, "grad_accumulation_steps": 2, "devices": [0], "comm": comm}
    with TPUManager(model, parts[comm.rank], **options) as manager:
        manager.step()
        assert model.passes == 2
        model.fails[0] = is_guilty(comm)
        with pytest.raises((ValueError, RankFailedError)):
            manager.step()
        model.fails[0] = False
        manager.step()
    assert model.passes == 4


@pytest.mark.mpi
def test_failures_that_are_everybodys_leak_no_communicators(comm: Communicator) -> None:
    class Fails(Regression):
        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            raise ValueError("every time")

    managers = []
    for _ in range(3):
        with pytest.raises(ValueError, match="every time"):  # noqa: SIM117 - that is what is tested
            with TPUManager(Fails(), samples(4), devices=[0], comm=comm) as manager:
                managers.append(manager)
                manager.step()
    assert all(manager._comm is not None and manager._comm.is_freed for manager in managers)


class Blocks:
    """Its fifth sample takes longer than anybody waits."""

    def __init__(self, guilty: bool) -> None:
        self.guilty = guilty

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Sample:
        if self.guilty and index == 4:
            time.sleep(6)
        return samples(1)[0]


@pytest.mark.mpi
def test_rank_whose_dataset_blocks_says_so_at_once(
    comm: Communicator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also when the others have given up on it before."""
    with caplog.at_level(logging.ERROR, "hpcpar.xla"):
        manager = TPUManager(Regression(), Blocks(is_guilty(comm)), devices=[0], comm=comm)
        for _ in range(4):
            manager.step()
        monkeypatch.setenv("HPCPAR_TIMEOUT_S", "1.5")  # only now, for compiling takes its time
        with pytest.raises((StalledError, RankFailedError)) as caught:
            manager.step()
    if is_guilty(comm):
        assert "waiting for batch 1 of a step from the dataset" in str(caught.value)
        assert "waiting for batch 1 of a step from the dataset" in caplog.text
    manager.shutdown()


@pytest.mark.mpi
def test_replaced_parameter_is_refused_on_all_ranks_and_may_be_put_back(comm: Communicator) -> None:
    parts = shares([6] * comm.size)
    model = Regression()
    with TPUManager(model, parts[comm.rank], batch_size_per_device=2, devices=[0], comm=comm) as manager:
        manager.step()
        weight = model.first.weight
        if is_guilty(comm):
            model.first.weight = nn.Parameter(weight.detach().clone())
        with pytest.raises(hpcpar.errors.HpcparError, match="must keep its parameters"):
            manager.step()
        model.first.weight = weight
        manager.zero_grad()
        manager.step()
    # The guilty rank has read nothing for the step that failed, the others have lost two samples.
    last = [part[2:4] if rank == comm.size - 1 else part[4:] for rank, part in enumerate(parts)]
    assert_gradients(model, reference(model, [sample for part in last for sample in part])[1])
