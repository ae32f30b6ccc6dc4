"""Some ranks serve experts, the others train a language model through them.

    mpirun -n 3 python examples/serve_experts.py                       # two clients, one server
    mpirun -n 4 python examples/serve_experts.py --servers 2 --grid 2x4 --k-best 4
    mpirun -n 3 python examples/serve_experts.py --servers 2 --slow-expert 1 --forward-timeout 0.2
    python examples/serve_experts.py                                   # one process does both

    rank 0   client    embedding, attention, head  ─┐ requests, by
    rank 1   client    embedding, attention, head  ─┤ the gate's choice    trunk: data parallel over clients
    rank 2   server    experts block0.0.0 ...      <┘                      experts: trained by their server

The model is the byte-level GPT of `train_text.py`, but each feed-forward layer is a grid of experts on other
ranks. A client sends each byte's vector to the few that its gate likes best, and in the backward pass the
gradient; the server answers with that of the input, and updates the expert. Servers know nothing of the
model, of steps, or of how many clients there are, and an expert that does not answer in time is left out. A
server computes one batch after the other, so an expert that is slow delays those beside it; the others go on.

At the end there is a line per expert, and ``expert_load.png`` shows how the gates chose in each step.
"""

from __future__ import annotations

import argparse
import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import common
import hpcpar
import remote_experts
import reporting
import text_corpus
from expert_load import ExpertLoad, write_expert_load
from gpt import Gpt, GptConfig
from hpcpar.comm import MPI, Communicator

OUTPUT = Path(__file__).resolve().parent / "output" / "served"


@dataclass(frozen=True)
class Options:
    """The command line."""

    servers: int
    grid: tuple[int, ...]
    switch: bool
    k_best: int
    balancing: float
    forward_timeout: float | None
    backward_timeout: float | None
    samples_per_update: int | None
    slow_expert: float
    layers: int
    width: int
    heads: int
    context: int
    steps: int
    batch_size: int
    lr: float
    report_every: int
    text: Path | None
    limit: int | None
    seed: int
    output: Path
    plot: bool

    @property
    def config(self) -> GptConfig:
        """Of the model."""
        return GptConfig(self.layers, self.width, self.heads, self.context)


@dataclass(frozen=True)
class Served:
    """What an expert has done, as its server knows it."""

    uid: str
    rank: int
    updates: int
    examples: int
    requests: int
    batches: int
    mean_batch: float
    waited_ms: float

    def __str__(self) -> str:
        return (
            f"{self.uid:12s} rank {self.rank}  {self.updates:6d} updates of {self.examples:8d} samples  "
            f"{self.requests:6d} requests in {self.batches:6d} batches of {self.mean_batch:6.1f} samples  "
            f"waited {self.waited_ms:6.2f} ms"
        )


# ---------------------------------------------------------------------------------------------- clients


def train(
    clients: Communicator, comm: Communicator, options: Options, text: torch.Tensor
) -> tuple[list[dict[str, float]], torch.Tensor, float]:
    """Train through the experts. **Collective** over the clients.

    Returns a row per report, how often experts were chosen (layers, experts, steps), and the seconds it took.
    """
    torch.manual_seed(options.seed)
    net = Gpt(options.config)
    load = remote_experts.use_remote_experts(
        net,
        comm,
        options.grid,
        switch=options.switch,
        k_best=options.k_best,
        forward_timeout=options.forward_timeout,
        backward_timeout=options.backward_timeout,
    )
    model = hpcpar.nn.DataParallel(net, clients)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr)
    rows: list[dict[str, float]] = []
    recent = torch.zeros((), dtype=torch.float64)
    start_s = time.perf_counter()
    with reporting.Reporter(clients, options.steps) as reporter:
        for step in range(options.steps):
            recent += train_step(model, optimizer, step, text, options, clients)
            end_step(load, reporter)
            if (step + 1) % options.report_every and step + 1 < options.steps:
                continue
            steps = step + 1 - (int(rows[-1]["step"]) if rows else 0)
            total = common.sum_over_ranks(clients, float(recent))[0]
            loss = total / (steps * options.batch_size * options.context)
            seconds = time.perf_counter() - start_s
            rows.append({"step": step + 1, "loss": loss, "seconds": seconds})
            reporter.line(f"step {step + 1:5d}  loss {loss:.4f} nats/byte  {seconds / (step + 1):.3f} s/step")
            recent.zero_()
    model.free()
    return rows, load.table(clients, MPI.SUM), rows[-1]["seconds"]


def train_step(
    model: hpcpar.nn.DataParallel,
    optimizer: torch.optim.Optimizer,
    step: int,
    text: torch.Tensor,
    options: Options,
    clients: Communicator,
) -> torch.Tensor:
    """One step of the trunk; the experts take theirs by themselves. Returns this client's summed loss."""
    offsets = text_corpus.windows_of_step(options.seed, step, options.batch_size, len(text), options.context)
    mine = offsets[common.shard(len(offsets), clients.rank, clients.size)]
    inputs, targets = text_corpus.cut_windows(text, mine, options.context)
    optimizer.zero_grad()
    loss_sum = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="sum")
    loss = common.local_loss(loss_sum, options.batch_size * options.context, clients.size)
    if options.switch:
        loss = loss + options.balancing * remote_experts.balancing_loss(model)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    common.set_learning_rate(optimizer, options.lr * common.warmup_cosine(step, options.steps, 10))
    optimizer.step()
    return loss_sum.detach()


def end_step(load: ExpertLoad, reporter: reporting.Reporter) -> None:
    """What is counted per step."""
    load.end_step()
    reporter.step()


# ---------------------------------------------------------------------------------------------- servers


def describe(backends: dict[str, hpcpar.nn.ExpertBackend], pools: dict[str, Any], rank: int) -> list[Served]:
    """What the experts of this rank have done; the pools are those in which requests became batches."""
    rows = []
    for uid, backend in backends.items():
        both = [pool.stats() for pool in pools[uid]]
        tasks, batches = sum(s.tasks for s in both), sum(s.batches for s in both)
        waited_s = sum(s.waiting_mean_s * s.tasks for s in both) / max(1, tasks)
        updates, examples = (backend.get_stats()[key] for key in ("updates", "examples_processed"))
        mean_batch = sum(s.rows for s in both) / max(1, batches)
        rows.append(Served(uid, rank, updates, examples, tasks, batches, mean_batch, 1e3 * waited_s))
    return rows


# ----------------------------------------------------------------------------------------------- script


def grid_of(text: str) -> tuple[int, ...]:
    """An argparse type: 2x4."""
    return tuple(common.positive_int(length) for length in text.split("x"))


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a byte-level GPT whose feed-forward layers are experts on other MPI ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument_group("experts").add_argument
    seconds, count = common.positive_float, common.positive_int
    add("--servers", type=count, default=1, metavar="N", help="ranks that serve, the last ones")
    add("--grid", type=grid_of, default="2x4", metavar="AxB", help="experts of each layer")
    add("--switch", action="store_true", help="one expert for each byte, and a balancing loss")
    add("--k-best", type=count, default=2, metavar="K", help="experts for each byte, without --switch")
    add("--balancing", type=common.non_negative_float, default=0.01, help="weight of the loss of --switch")
    add("--forward-timeout", type=seconds, metavar="S", help="seconds until an expert is left out")
    add("--backward-timeout", type=seconds, metavar="S", help="the same for gradients")
    add("--samples-per-update", type=count, metavar="N", help="of an expert; each batch if not given")
    add(
        "--slow-expert",
        type=common.non_negative_float,
        default=0.0,
        metavar="S",
        help="make one pause so long",
    )
    add = parser.add_argument_group("model and training").add_argument
    add("--layers", type=count, default=2, help="transformer blocks")
    add("--width", type=count, default=64, help="of the residual stream")
    add("--heads", type=count, default=4, help="attention heads, a divisor of --width")
    add("--context", type=count, default=64, help="bytes the model sees")
    add("--steps", type=count, default=200, help="optimizer steps of the trunk")
    add("--batch-size", type=count, default=16, help="windows per step, over all clients")
    add("--lr", type=seconds, default=3e-3, help="peak learning rate of the trunk, and that of the experts")
    add("--report-every", type=count, default=20, help="steps between lines")
    add = parser.add_argument
    add("--text", type=Path, metavar="DIR", help="folder with text files; the standard library if not given")
    add("--limit", type=count, metavar="N", help="use only the first N bytes of the text")
    add("--seed", type=common.non_negative_int, default=0, help="of weights and batches")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="for history and heat map")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the heat map")
    return parser


def read_options(comm: Communicator) -> Options:
    """The command line, checked. **Collective.**"""
    options = Options(**vars(common.parse_arguments(build_parser(), comm)))
    with common.user_errors_end_the_job(comm):
        if options.width % options.heads:
            raise common.UserError(f"--heads {options.heads} must divide --width {options.width}")
        if options.servers >= max(2, comm.size):
            raise common.UserError(f"--servers {options.servers} leaves no client of {comm.size} rank(s)")
    return options


def run(comm: Communicator, options: Options, text: torch.Tensor) -> None:
    """Serve and train, then report. **Collective.**"""
    first_server = 0 if comm.size == 1 else comm.size - options.servers
    is_client = comm.rank < max(1, first_server)
    clients = comm.Split(0 if is_client else MPI.UNDEFINED, comm.rank)
    backends = {}
    if comm.rank >= first_server:
        backends = remote_experts.make_backends(
            options.config,
            options.grid,
            comm.rank - first_server,
            comm.size - first_server,
            learning_rate=options.lr,
            samples_per_update=options.samples_per_update,
            slow_s=options.slow_expert,
            seed=options.seed,
        )
    masked = remote_experts.MaskedExperts()
    logging.getLogger("hpcpar.nn.experts").addHandler(masked)
    rows: list[dict[str, float]] = []
    chosen, seconds = torch.zeros(0), 0.0
    with hpcpar.nn.ExpertServer(comm, backends):
        pools = {uid: backend.get_pools() for uid, backend in backends.items()}
        if clients is not None:
            rows, chosen, seconds = train(clients, comm, options, text)
        # A server has nothing to do here: it waits at the end of the block until all clients are there.
    served = [row for part in comm.allgather(describe(backends, pools, comm.rank)) for row in part]
    times = sum(comm.allgather(masked.times), start=type(masked.times)())
    if comm.rank == 0:
        print("\n".join(map(str, served)))
        for uid, count in sorted(times.items()):
            print(f"{uid} was left out {count} times")
        requests = sum(row.requests for row in served)
        print(f"{requests} requests, {requests / seconds:.0f} per second; final loss {rows[-1]['loss']:.4f}")
        write_results(options, comm.size, rows, served, dict(times), chosen)


def write_results(
    options: Options,
    world_size: int,
    rows: list[dict[str, float]],
    served: list[Served],
    left_out: dict[str, int],
    chosen: torch.Tensor,
) -> None:
    """Write history and heat map and print where they are. For rank 0."""
    history = {
        "options": asdict(options),
        "world_size": world_size,
        "reports": rows,
        "experts": [asdict(row) for row in served],
        "left_out": left_out,
    }
    print(f"history: {reporting.write_history(options.output, history)}")
    layers = [f"block{index}" for index in range(options.layers)]
    for path in write_expert_load(options.output, layers, chosen, 0, options.plot):
        print(f"experts: {path}")


def main() -> None:
    """Read, serve or train, report."""
    comm = hpcpar.comm.world()
    options = read_options(comm)
    corpus = None
    with common.user_errors_end_the_job(comm):
        if comm.rank == 0:
            corpus = text_corpus.read_corpus(options.text, options.limit)
            text_corpus.split_corpus(corpus, options.context)  # long enough? say so before sending it
            reporting.prepare_output(options.output)
    run(comm, options, common.broadcast_tensor(corpus, comm))


if __name__ == "__main__":
    main()
