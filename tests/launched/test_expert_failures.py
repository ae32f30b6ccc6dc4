"""A rank that is killed takes down neither the servers of experts nor their other callers.

This needs a launcher and an MPI that let the other ranks live: Open MPI's with ULFM.
"""

from __future__ import annotations

import pytest

from tests.launching import LaunchResult, find_launcher, launch

pytestmark = pytest.mark.skipif(
    not find_launcher().is_openmpi,
    reason="the launcher ends the job when a rank is killed; `mpirun --with-ft ulfm` of Open MPI does not",
)

RANKS = 3
PREPARE = """
import os, signal, time
import torch, hpcpar
from torch import nn
from hpcpar.errors import HpcparError, RankFailedError
from hpcpar.nn.experts.backend import ExpertBackend
from hpcpar.nn.experts.client import RemoteExpert
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.remote_mixture import RemoteMixtureOfExperts
from hpcpar.nn.experts.server import ExpertServer

comm = hpcpar.comm.world()
DEADLY = 7.0


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        if (x == DEADLY).any():
            victim()
        return x * self.factor


def victim():
    os.kill(os.getpid(), signal.SIGKILL)


def backend():
    schema = BatchTensorDescriptor(4)
    expert = Scale()
    optimizer = torch.optim.SGD(expert.parameters(), lr=0.0)
    return ExpertBackend('e', expert, optimizer, args_schema=schema, outputs_schema=schema)


def leave():
    # MPI cannot be finalised with a dead rank.
    print('left', comm.rank, flush=True)
    time.sleep(0.5)
    os._exit(0)
"""


def run(body: str) -> LaunchResult:
    arguments = ("--with-ft", "ulfm")
    return launch(
        RANKS, PREPARE + body, env={"HPCPAR_TIMEOUT_S": "20"}, timeout_s=60.0, mpirun_args=arguments
    )


def test_callers_of_a_killed_server_get_an_error_and_a_mixture_goes_on_without_it() -> None:
    result = run(
        """
with ExpertServer(comm, {f'e.{comm.rank}': backend()}):
    comm.Barrier()
    x = torch.ones(5, 4, requires_grad=True)
    if comm.rank == 0:
        mixture = RemoteMixtureOfExperts(4, (RANKS,), comm, uid_prefix='e', k_best=3, k_min=1)
        assert torch.allclose(mixture(x), 2 * x)
        for _ in range(2):
            try:
                RemoteExpert('e.1', comm)(torch.full((2, 4), DEADLY))
            except RankFailedError as error:
                print('failed', error.ranks, flush=True)
        y = mixture(x)
        assert torch.allclose(y, 2 * x)
        y.sum().backward()
        assert torch.allclose(x.grad, torch.full_like(x, 2.0))
        print('masked', flush=True)
    if comm.rank == 2:
        for uid in ('e.0', 'e.2'):
            assert torch.equal(RemoteExpert(uid, comm)(x), 2 * x)
leave()
""".replace("RANKS", str(RANKS))
    )
    assert result.stdout.count("failed (1,)") == 2, result.stderr
    assert "masked" in result.stdout, result.stderr
    assert result.stdout.count("left") == 2, result.stderr


def test_server_outlives_a_caller_that_is_killed_in_a_request() -> None:
    result = run(
        """
victim = lambda: time.sleep(1.0)  # the expert is slow, and its caller is killed meanwhile
with ExpertServer(comm, {'e': backend()} if comm.rank == 0 else {}):
    comm.Barrier()
    if comm.rank == 1:
        import threading
        threading.Timer(0.3, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
        RemoteExpert('e', comm)(torch.full((2, 4), DEADLY))
    if comm.rank == 2:
        time.sleep(0.5)
        x = torch.ones(100_000, 4, requires_grad=True)
        y = RemoteExpert('e', comm)(x)
        y.sum().backward()
        assert torch.equal(y, 2 * x)
        print('served', flush=True)
leave()
"""
    )
    assert "served" in result.stdout, result.stderr
    assert result.stdout.count("left") == 2, result.stderr
