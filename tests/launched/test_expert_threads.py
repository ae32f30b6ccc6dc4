"""Experts are served without a thread where MPI allows none."""

from __future__ import annotations

from tests.launching import launch

SCRIPT = """
import mpi4py
mpi4py.rc.thread_level = "serialized"
from mpi4py import MPI
import torch, hpcpar
from torch import nn
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.client import RemoteExpert
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.server import ExpertServer

comm = hpcpar.comm.world()
assert not hpcpar.comm.threads_allowed()
torch.manual_seed(0)
net = nn.Linear(4, 4)
backend = ExpertBackend("e", net, torch.optim.SGD, args_schema=BatchTensorDescriptor(4))
with ExpertServer(comm, {f"e.{comm.rank}": backend}) as server:
    assert server._service._thread is None
    for rank in range(comm.size):
        x = torch.ones(3, 4, requires_grad=True)
        RemoteExpert(f"e.{rank}", comm)(x).sum().backward()
        assert x.grad is not None
assert backend.get_stats()["examples_processed"] == 3 * comm.size
print("trained", flush=True)
"""


def test_ranks_serve_each_other_without_mpi_thread_multiple() -> None:
    result = launch(3, SCRIPT, env={"HPCPAR_TIMEOUT_S": "20"})
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained") == 3
