"""How a script with an overlapped step under way may end: without free(), and by ranks at different times."""

from __future__ import annotations

import pytest

from tests.launching import launch

SCRIPT = """
import sys, time
import torch, hpcpar
from torch import nn

transport, ending = sys.argv[1:]
comm = hpcpar.comm.world()
torch.manual_seed(comm.rank)
net = nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 50), nn.Linear(50, 3))
optimizer = hpcpar.optim.DataParallelOptimizer(torch.optim.Adam(net.parameters()))
model = hpcpar.nn.DataParallel(net, comm, optimizer=optimizer, transport=transport, bucket_mb=0.001)
for _ in range(3):
    optimizer.zero_grad()
    model(torch.randn(4, 50)).sum().backward()
    optimizer.step()
if ending == "rank 0 saves" and comm.rank == 0:
    time.sleep(0.3)  # the others are gone, as far as they can be
    print("saved", len(model.state_dict()), flush=True)
if ending == "last rank saves" and comm.rank == comm.size - 1:
    time.sleep(0.3)
    print("saved", len(model.state_dict()), flush=True)
if ending == "free":
    model.free()
"""


@pytest.mark.parametrize(
    ("transport", "ending", "ranks_per_node"),
    [
        ("auto", "nothing", ""),
        ("mpi", "nothing", ""),
        ("auto", "rank 0 saves", "2"),
        ("auto", "last rank saves", ""),
        ("mpi", "rank 0 saves", ""),
        ("auto", "free", ""),
    ],
)
def test_script_ends(transport: str, ending: str, ranks_per_node: str) -> None:
    env = {"HPCPAR_RANKS_PER_NODE": ranks_per_node, "HPCPAR_TIMEOUT_S": "20"}
    result = launch(3, SCRIPT, transport, ending, env=env, timeout_s=50.0)
    assert not result.timed_out, result.stderr
    assert result.returncode == 0, result.stderr
    assert result.duration_s < 19.0
    assert ("saved 6" in result.stdout) == ending.endswith("saves")
