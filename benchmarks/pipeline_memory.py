"""What a stage keeps for backward: 1F1B as many microbatches as stages follow, GPipe all.

``pipeline.py --memory`` trains one perceptron with more and more microbatches of one size. Autograd asks a
hook for every tensor that it saves; each storage counts once, from the first save to the last release, and
parameters and the batch itself, which are there anyway, do not::

    pack      +storage          a forward saves             peak over the step, per stage
    released  -storage          its backward is done

    1F1B, stage s of p     min(m, p - s) microbatches  =  min(m, p - s) x (what a single one saves)
    GPipe                  m microbatches

Both the numbers of microbatches and the bytes are checked against these lines; the numbers exactly.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from common import Environment, new_figure, print_table, save, verdict
from hpcpar.comm import Communicator
from hpcpar.nn import Pipeline

__all__ = ["run"]

SCHEDULES = ("1f1b", "gpipe")
MICROBATCHES = (4, 8, 16, 32)
GOAL = 1.05
"""Bytes of 1f1b by what its microbatches save one by one, at most."""


def run(comm: Communicator, options: argparse.Namespace, environment: Environment) -> None:
    """Run the benchmark, report, and save. **Collective.**"""
    if comm.rank == 0:
        print(f"memory for backward, pipelined\n{environment.text}", flush=True)
    alone = _peaks(comm, "1f1b", 1, options.quick)
    rows = []
    for schedule in SCHEDULES:
        for count in MICROBATCHES:
            peaks = _peaks(comm, schedule, count, options.quick)
            rows.append({"schedule": schedule, "microbatches": count, "stages": peaks})
            _check(comm, rows[-1])
    for row in rows:
        for stage, single in zip(row["stages"], alone, strict=True):
            stage["microbatches_worth"] = stage["bytes"] / single["bytes"]
    if comm.rank == 0:
        _show(rows, comm.size)
        content = {"bytes_of_one_microbatch": [single["bytes"] for single in alone], "results": rows}
        save(options.output, "pipeline_memory", environment, content, _draw(rows, environment))


def _held(schedule: str, count: int, stage: int, stages: int) -> int:
    """Microbatches that a stage keeps at most. **Local.**"""
    return count if schedule == "gpipe" else min(count, stages - stage)


def _peaks(comm: Communicator, schedule: str, count: int, quick: bool) -> list[dict[str, Any]]:
    """Most microbatches and bytes that each stage has held in two steps. **Collective.**"""
    width, rows = (16, 2) if quick else (512, 32)
    torch.manual_seed(0)
    parts = [(nn.Linear(width, width), nn.GELU()) for _ in range(4 * comm.size)]
    model = nn.Sequential(*(layer for part in parts for layer in part))
    pipe = Pipeline(
        model,
        comm,
        microbatches=count,
        schedule=schedule,
        balance=[8] * comm.size,
        loss_fn=F.mse_loss,
    )
    inputs, targets = torch.randn(2, count * rows, width)
    saved = SavedBytes([*pipe.parameters(), inputs, targets])
    for _ in range(2):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            pipe.train_step(inputs, targets)
        if saved.now_bytes != 0:
            raise RuntimeError(f"nothing must be kept after a step, got {saved.now_bytes} bytes")
    mine = {"microbatches": pipe.stats().peak_activations, "bytes": saved.peak_bytes}
    pipe.free()
    return comm.allgather(mine)


def _check(comm: Communicator, row: Mapping[str, Any]) -> None:
    """Raise on all ranks when a stage held more, or fewer, than its schedule says. **Local.**"""
    for stage, peak in enumerate(row["stages"]):
        held = _held(row["schedule"], row["microbatches"], stage, comm.size)
        if peak["microbatches"] != held:
            raise RuntimeError(
                f"stage {stage} of {comm.size} must hold {held} of {row['microbatches']} microbatches with "
                f"{row['schedule']}, got {peak['microbatches']}"
            )


class SavedBytes:
    """Bytes of what autograd keeps for backward: the two functions for ``saved_tensors_hooks``. **Local.**

    Parameters
    ----------
    others
        Tensors whose storages do not count.
    """

    def __init__(self, others: Sequence[torch.Tensor]) -> None:
        self._others = {tensor.untyped_storage().data_ptr() for tensor in others}
        self._users: dict[int, int] = {}
        self.now_bytes = self.peak_bytes = 0

    def pack(self, tensor: torch.Tensor) -> _Holder:
        """Autograd saves a tensor."""
        holder = _Holder(tensor.detach())  # without the graph, which would keep itself alive
        storage = tensor.untyped_storage()
        address, size = storage.data_ptr(), storage.nbytes()
        if address not in self._others and size:
            self._users[address] = self._users.get(address, 0) + 1
            if self._users[address] == 1:
                self.now_bytes += size
                self.peak_bytes = max(self.peak_bytes, self.now_bytes)
            weakref.finalize(holder, self._release, address, size)
        return holder

    def unpack(self, holder: _Holder) -> torch.Tensor:
        """Autograd wants it back."""
        return holder.tensor

    def _release(self, address: int, size: int) -> None:
        self._users[address] -= 1
        if self._users[address] == 0:
            del self._users[address]
            self.now_bytes -= size


class _Holder:
    """What autograd gets instead of a tensor: something whose end can be noticed."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


# ---- reporting ---------------------------------------------------------------------------------------------


def _show(rows: Sequence[Mapping[str, Any]], stages: int) -> None:
    """A line per schedule and number of microbatches, a column per stage. **Local.**"""
    names = [f"stage {stage}" for stage in range(stages)]
    lines = [
        [
            f"{row['schedule']}, {row['microbatches']} microbatches",
            *(f"{peak['microbatches']}: {peak['bytes'] / 2**20:.2f} MiB" for peak in row["stages"]),
            _worst(row, stages),
        ]
        for row in rows
    ]
    print_table("microbatches held, and bytes kept for backward", ["", *names, "x expected"], lines)
    print(
        f"goal: 1f1b keeps at most {GOAL} times what min(m, p - s) microbatches save one by one, on each "
        "stage s of p; x expected is the largest over the stages",
        flush=True,
    )


def _worst(row: Mapping[str, Any], stages: int) -> str:
    """Bytes by those of as many single microbatches as should be held: the largest over the stages."""
    worst = max(
        peak["microbatches_worth"] / _held(row["schedule"], row["microbatches"], stage, stages)
        for stage, peak in enumerate(row["stages"])
    )
    return verdict(worst, GOAL, at_least=False) if row["schedule"] == "1f1b" else f"{worst:.2f}"


def _draw(rows: Sequence[Mapping[str, Any]], environment: Environment) -> Any:
    """Bytes over the number of microbatches: a line per stage, a panel per schedule. **Local.**"""
    canvas = new_figure(len(SCHEDULES))
    if canvas is None:
        return None
    figure, panels = canvas
    highest = max(stage["bytes"] for row in rows for stage in row["stages"]) / 2**20
    for axes, schedule in zip(panels, SCHEDULES, strict=True):
        some = [row for row in rows if row["schedule"] == schedule]
        for stage in range(environment.ranks):
            sizes = [row["stages"][stage]["bytes"] / 2**20 for row in some]
            axes.plot([row["microbatches"] for row in some], sizes, "o-", label=f"stage {stage}")
        axes.set(
            title=schedule, xlabel="microbatches", ylabel="MiB kept for backward", ylim=(0, 1.05 * highest)
        )
        axes.legend()
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure
