"""What only torch-xla itself can show: graphs, transfers, memory, random numbers of devices."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hpcpar.comm import Communicator
from hpcpar.xla import TPUManager
from tests.xla.models import Regression, assert_gradients, close, reference, samples, shares

pytestmark = [pytest.mark.mpi, pytest.mark.xla]

BATCH = 8
ROOT = Path(__file__).resolve().parents[2]


class Wide(Regression):
    """A model of a shape that no other test has, so that its graph is new."""

    def __init__(self, width: int, features: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(features, width)
        self.second = nn.Linear(width, 1)


def train(manager: TPUManager, optimizer: torch.optim.Optimizer, epochs: int) -> int:
    steps = 0
    for _ in range(epochs):
        for _ in manager.epoch():
            optimizer.step()
            manager.update_model_parameters(manager.model.parameters())
            manager.zero_grad()
            steps += 1
    return steps


@pytest.mark.parametrize(("last", "width"), [(5, 11), (4, 12)])
def test_one_graph_serves_all_steps(
    last: int, width: int, comm: Communicator, devices: list[torch.device]
) -> None:
    """Also a short last batch, whether or not it divides, accumulation, new parameters and epochs."""
    model = Wide(width)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    data = samples(BATCH * 2 * len(devices) * 2 + BATCH + last)
    with TPUManager(
        model, data, batch_size_per_device=BATCH, grad_accumulation_steps=2, comm=comm
    ) as manager:
        manager.step()
        assert manager.stats().graphs == 1
        assert train(manager, optimizer, epochs=10) == 30
        assert manager.stats().graphs == 1


@pytest.mark.local
def test_replicas_of_another_manager_need_no_other_graph(comm: Communicator) -> None:
    for expected in (1, 0):
        with TPUManager(Wide(13), samples(40), batch_size_per_device=BATCH, comm=comm) as manager:
            list(manager.epoch())
            assert manager.stats().graphs == expected


@pytest.mark.local
def test_short_batch_costs_a_graph_if_it_is_to_be_compiled(comm: Communicator) -> None:
    data = samples(2 * BATCH + 5)
    options: dict[str, Any] = {"batch_size_per_device": BATCH, "devices": [0], "comm": comm}
    with TPUManager(Wide(14), data, short_batch="compile", **options) as manager:
        list(manager.epoch())
        assert manager.stats().graphs == 2


@pytest.mark.local
def test_new_graphs_of_later_steps_are_reported(comm: Communicator, caplog: pytest.LogCaptureFixture) -> None:
    data = samples(4 * BATCH + 5)
    options: dict[str, Any] = {"batch_size_per_device": BATCH, "devices": [0], "comm": comm}
    with TPUManager(Wide(15), data, short_batch="compile", **options) as manager:
        list(manager.epoch())
    (record,) = [record for record in caplog.records if record.name.startswith("hpcpar.xla")]
    assert "step 5 compiled 1 new graph(s)" in record.getMessage()
    assert f"rank {comm.rank} of {comm.size}" in record.getMessage()


def test_a_step_is_one_transfer_back_and_an_update_one_there(
    comm: Communicator, devices: list[torch.device]
) -> None:
    model = Regression()
    number = 8 * len(devices)
    with TPUManager(
        model, samples(number * BATCH), batch_size_per_device=BATCH, prefetch=number, comm=comm
    ) as manager:
        # Downloads first; batches are uploaded ahead, so uploads are counted over the whole epoch.
        built = manager.stats().uploads
        before = manager.stats()
        for step, _ in enumerate(manager.epoch(), start=1):
            assert manager.stats().downloads - before.downloads == step * len(devices)
        batches = manager.stats().uploads - built
        for step, _ in enumerate(manager.epoch(), start=1):
            if step % 2:  # four updates, of which the devices see each at the next step
                manager.update_model_parameters(Regression(seed=step).parameters())
        assert manager.stats().uploads - built == 2 * batches + 4 * len(devices)
        assert batches == number


@pytest.mark.local
def test_memory_stays_flat_over_100_steps(comm: Communicator) -> None:
    model = Wide(2**17)
    parameters_mb = sum(parameter.nbytes for parameter in model.parameters()) / 2**20
    assert parameters_mb > 1
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    data = samples(BATCH * 20)
    pages = os.sysconf("SC_PAGE_SIZE")

    def resident_mb() -> float:
        gc.collect()
        return int(Path("/proc/self/statm").read_text().split()[1]) * pages / 2**20

    with TPUManager(model, data, batch_size_per_device=BATCH, comm=comm) as manager:
        train(manager, optimizer, epochs=4)
        before = resident_mb()
        steps = train(manager, optimizer, epochs=10)
        assert steps >= 100
        assert (
            resident_mb() - before < 0.2 * steps * parameters_mb
        )  # what one tensor a step would leave, is 1


class Dropped(nn.Module):
    """Its gradient is the mask that dropout has drawn: 0 or 2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(64))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return nn.functional.dropout(self.weight).sum() + 0 * (x.sum() + y.sum())


def masks(comm: Communicator, seed: int, steps: int, devices: list[int]) -> list[Tensor]:
    """The mean over devices and ranks of what dropout has drawn in each step."""
    model, found = Dropped(), []
    data = samples(steps * len(devices))
    with TPUManager(model, data, seed_base=seed, devices=devices, comm=comm) as manager:
        for _ in manager.epoch():
            assert model.weight.grad is not None
            found.append(model.weight.grad.clone())
            manager.zero_grad()
    return found


def test_devices_and_steps_draw_random_numbers_of_their_own_and_seeds_repeat_them(
    comm: Communicator, devices: list[torch.device]
) -> None:
    everywhere = list(range(len(devices)))
    first, second = masks(comm, 7, 2, everywhere)
    assert set(first.unique().tolist()) > {0.0, 2.0}, "all devices have drawn the same"
    assert not torch.equal(first, second)
    again = masks(comm, 7, 2, everywhere)
    assert torch.equal(torch.stack(again), torch.stack([first, second]))
    assert not torch.equal(masks(comm, 8, 1, everywhere)[0], first)


@pytest.mark.local
def test_random_numbers_go_on_from_a_state(comm: Communicator) -> None:
    def start() -> tuple[Dropped, TPUManager]:
        model = Dropped()
        return model, TPUManager(model, samples(4), devices=[0], comm=comm)

    model, manager = start()
    manager.step()
    state = manager.state_dict()
    manager.zero_grad()
    manager.step()
    assert model.weight.grad is not None
    expected = model.weight.grad.clone()
    manager.shutdown()
    model, manager = start()
    manager.load_state_dict(state)
    manager.step()
    assert model.weight.grad is not None
    assert torch.equal(model.weight.grad, expected)
    manager.shutdown()


@pytest.mark.local
@pytest.mark.parametrize("wanted", [[1], ["xla:1"], [torch.device("xla:1")]], ids=str)
def test_one_of_the_devices_may_be_chosen(wanted: list[Any], comm: Communicator) -> None:
    parts = shares([BATCH] * comm.size)
    model = Regression()
    with TPUManager(
        model, parts[comm.rank], batch_size_per_device=BATCH, devices=wanted, comm=comm
    ) as manager:
        assert [str(device) for device in manager.devices] == ["xla:1"]
        loss, _ = manager.step()
    expected, gradients = reference(Regression(), [sample for part in parts for sample in part])
    close(loss, expected)
    assert_gradients(model, gradients)


def test_running_means_of_batch_normalization_are_means_over_the_devices(
    comm: Communicator, devices: list[torch.device]
) -> None:
    """Each device sees a batch of its own; what counts is the mean of what they have made of the buffers."""

    class Normalized(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
            return super().forward(self.norm(x), y)

    parts = shares([BATCH * len(devices)] * comm.size)
    model = Normalized()
    with TPUManager(model, parts[comm.rank], batch_size_per_device=BATCH, comm=comm) as manager:
        manager.step()
    expected = []
    everything = [sample["x"] for part in parts for sample in part]
    for first in range(0, len(everything), BATCH):
        norm = nn.BatchNorm1d(3)
        norm(torch.stack(everything[first : first + BATCH]))
        expected.append(norm)
    close(model.norm.running_mean, torch.stack([norm.running_mean for norm in expected]).mean(0))
    # torch-xla keeps the variance of the samples themselves, with n where torch has n - 1.
    seen = [(norm.running_var - 0.9) * (BATCH - 1) / BATCH for norm in expected]
    close(model.norm.running_var, 0.9 + torch.stack(seen).mean(0))
    assert model.norm.num_batches_tracked.item() == 1


@pytest.mark.local
def test_backward_may_have_run_before_the_devices_were_asked_for() -> None:
    """Autograd makes its threads at the first one, for the devices that there are then."""
    script = """
import torch
torch.ones((), requires_grad=True).backward()
from hpcpar.xla import TPUManager
from tests.xla.models import Regression, samples
with TPUManager(Regression(), samples(2)) as manager:
    assert manager.step()[1] == 2
"""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
