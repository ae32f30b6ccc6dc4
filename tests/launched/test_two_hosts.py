"""What crosses the network between two real hosts: as much as between two nodes, not between four ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.hosts import facts_from_two_hosts

SCRIPT = """
import json
import time

import torch
import hpcpar

NUMEL, STEPS = 1 << 20, 3
comm = hpcpar.comm.world()


class Four(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = torch.nn.ParameterList([torch.zeros(NUMEL // 4) for _ in range(4)])

    def forward(self, x):
        return sum((part * x).sum() for part in self.parts)


def crossed():
    for line in open("/proc/net/dev"):
        if "eth0" in line:
            numbers = line.split(":")[1].split()
            return int(numbers[0]), int(numbers[8])


def step(model):
    model.zero_grad()
    model(torch.ones(1) * (comm.rank + 1)).backward()


for wire_dtype in (None, torch.bfloat16):
    model = hpcpar.nn.DataParallel(Four(), comm, wire_dtype=wire_dtype)
    step(model)
    comm.Barrier()
    time.sleep(0.3)
    before = crossed()
    comm.Barrier()  # nobody sends before everybody has read
    for _ in range(STEPS):
        step(model)
    comm.Barrier()
    time.sleep(0.3)
    after = crossed()
    comm.Barrier()
    mean = (comm.size + 1) / 2
    assert all((p.grad == mean).all() for p in model.parameters())
    facts = {
        "nodes": comm.num_nodes,
        "transport": model.stats().transport,
        "gradients": [
            (b - a) / STEPS / (NUMEL * (4 if wire_dtype is None else 2)) for a, b in zip(before, after)
        ],
    }
    everyone = comm.gather(facts)
    if comm.rank == 0:
        print("FACTS " + json.dumps(everyone), flush=True)
    model.free()
"""


@pytest.mark.timeout_s(150)
def test_one_gradient_crosses_the_link_each_way(tmp_path: Path) -> None:
    results = facts_from_two_hosts(SCRIPT, tmp_path, rate="1gbit", timeout_s=120)
    assert len(results) == 2
    for ranks in results:
        for facts in ranks:
            assert facts["nodes"] == 2
            assert facts["transport"] == "shared_memory+rails"
            for share in facts["gradients"]:  # received, sent; protocol headers take some percent
                assert 0.9 < share < 1.3, results
