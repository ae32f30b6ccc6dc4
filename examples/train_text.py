"""Train a small byte-level GPT on real text, on any number of MPI ranks.

    python examples/train_text.py                                # one process
    mpirun -n 4 python examples/train_text.py                    # four
    mpirun -n 4 python examples/train_text.py --text ~/books --steps 2000 --sample 400

The default text are the Python sources of the interpreter's standard library, about 10 MB.

On top of `train_digits.py` this shows what a language model needs: gradient clipping (after
``backward()`` every rank holds the same mean gradient, so each clips by itself and no norm is
communicated), mixed precision by autocast, and a head tied to the embedding. All are plain
PyTorch. The batch of step k is a function of seed and k, sliced by ranks, so the loss curve does
not depend on the number of ranks, up to rounding.

With ``--forward-overlap`` the gradients of a step are still on their way when ``backward()``
returns, and each layer waits for its own just before the next forward runs it. Clipping needs the
norm of all of them, so it waits for all; ``--clip 0`` leaves the overlap whole.
"""

from __future__ import annotations

import argparse
import math
import time
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import common
import hpcpar
import reporting
import text_corpus
from gpt import Gpt, GptConfig, generate
from hpcpar.comm import Communicator

OUTPUT = Path(__file__).resolve().parent / "output" / "text"
VALIDATION_MICROBATCH = 32
BETAS = (0.9, 0.95)
# Large enough that Adam does not blow up gradients which are nothing but rounding: those of the key
# biases are zero in exact arithmetic, and differ with the order of summation, so with the ranks.
EPSILON = 1e-6


@dataclass(frozen=True)
class Options:
    """The command line."""

    text: Path | None
    limit: int | None
    layers: int
    width: int
    heads: int
    context: int
    tied_head: bool
    steps: int
    batch_size: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    bf16: bool
    forward_overlap: bool
    blocking: bool
    eval_every: int
    eval_windows: int
    sample: int
    seed: int
    device: str
    output: Path
    plot: bool


@dataclass(frozen=True)
class Evaluation:
    """What is reported every so many steps; the same on every rank. Losses in nats per byte."""

    step: int
    train_loss: float
    validation_loss: float
    bytes_per_s: float
    exposed_share: float

    def __str__(self) -> str:
        return (
            f"step {self.step:5d}  train loss {self.train_loss:.4f} nats/byte = "
            f"{self.train_loss / math.log(2):.3f} bits/byte  validation {self.validation_loss:.4f}  "
            f"{self.bytes_per_s:8.0f} bytes/s  exposed communication {100 * self.exposed_share:4.1f} %"
        )


class Trainer:
    """The wrapped model and its optimizer: one step, a stretch of steps, an evaluation."""

    def __init__(self, net: Gpt, comm: Communicator, options: Options, device: torch.device) -> None:
        self.comm, self.options, self.device = comm, options, device
        decayed = [p for p in net.parameters() if p.dim() >= 2]
        undecayed = [p for p in net.parameters() if p.dim() < 2]
        groups = [
            {"params": decayed, "weight_decay": options.weight_decay},
            {"params": undecayed, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=options.lr, betas=BETAS, eps=EPSILON)
        self.optimizer: Any = self.adamw
        if options.forward_overlap:
            self.optimizer = hpcpar.optim.DataParallelOptimizer(self.adamw)
            self.model = hpcpar.nn.DataParallel(net, comm, optimizer=self.optimizer)
        else:
            self.model = hpcpar.nn.DataParallel(net, comm, blocking_parameter_updates=options.blocking)

    def run_stretch(
        self, steps: range, text: torch.Tensor, reporter: reporting.Reporter
    ) -> tuple[float, float, float]:
        """Train for some steps. Returns mean loss, bytes per second, exposed communication share."""
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        exposed_before_s, start_s = self.model.stats().exposed_s, time.perf_counter()
        self.model.train()
        for step in steps:
            loss_sum += self.train_step(step, text)
            reporter.step()
        exposed_s = self.model.stats().exposed_s - exposed_before_s
        loss, exposed_s = common.sum_over_ranks(self.comm, float(loss_sum), exposed_s)
        wall_s = time.perf_counter() - start_s
        trained_bytes = len(steps) * self.options.batch_size * self.options.context
        return loss / trained_bytes, trained_bytes / wall_s, exposed_s / self.comm.size / wall_s

    def train_step(self, step: int, text: torch.Tensor) -> torch.Tensor:
        """One optimizer step on the global batch of `step`. Returns the summed loss of this rank."""
        options = self.options
        offsets = text_corpus.windows_of_step(
            options.seed, step, options.batch_size, len(text), options.context
        )
        mine = offsets[common.shard(len(offsets), self.comm.rank, self.comm.size)]
        self.optimizer.zero_grad()
        loss_sum = self.summed_loss(*text_corpus.cut_windows(text, mine, options.context))
        global_bytes = options.batch_size * options.context
        common.local_loss(loss_sum, global_bytes, self.comm.size).backward()
        if options.clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), options.clip)
        factor = common.warmup_cosine(step, options.steps, options.warmup)
        common.set_learning_rate(self.adamw, options.lr * factor)
        self.optimizer.step()
        return loss_sum.detach()

    def summed_loss(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Cross entropy in nats, summed over all bytes of this rank's windows."""
        with self._autocast():
            logits = self.model(inputs.to(self.device))
        return F.cross_entropy(
            logits.float().flatten(0, 1), targets.to(self.device).flatten(), reduction="sum"
        )

    @torch.no_grad()
    def validate(self, text: torch.Tensor) -> float:
        """Mean loss over windows spread through the text, shared among ranks. **Collective.**"""
        self.model.eval()
        context = self.options.context
        offsets = text_corpus.spread_windows(self.options.eval_windows, len(text), context)
        mine = offsets[common.shard(len(offsets), self.comm.rank, self.comm.size)]
        loss_sum = 0.0
        for start in range(0, len(mine), VALIDATION_MICROBATCH):
            windows = text_corpus.cut_windows(text, mine[start : start + VALIDATION_MICROBATCH], context)
            loss_sum += float(self.summed_loss(*windows))
        return common.sum_over_ranks(self.comm, loss_sum)[0] / (len(offsets) * context)

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.options.bf16)


def train(
    trainer: Trainer, options: Options, training: torch.Tensor, validation: torch.Tensor
) -> list[Evaluation]:
    """The whole run: stretches of steps, with an evaluation after each."""
    evaluations: list[Evaluation] = []
    with reporting.Reporter(trainer.comm.rank, options.steps) as reporter:
        for first in range(0, options.steps, options.eval_every):
            steps = range(first, min(first + options.eval_every, options.steps))
            train_loss, bytes_per_s, exposed_share = trainer.run_stretch(steps, training, reporter)
            validation_loss = trainer.validate(validation)
            evaluations.append(
                Evaluation(steps.stop, train_loss, validation_loss, bytes_per_s, exposed_share)
            )
            reporter.line(str(evaluations[-1]))
    return evaluations


# ----------------------------------------------------------------------------------------- script


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a small byte-level GPT on text, data parallel over MPI ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_options(parser)
    _add_training_options(parser)
    add = parser.add_argument
    add("--text", type=Path, metavar="DIR", help="folder with text files; the standard library if not given")
    add("--limit", type=common.positive_int, metavar="N", help="use only the first N bytes of the text")
    add("--eval-every", type=common.positive_int, default=50, help="steps between evaluations")
    add("--eval-windows", type=common.positive_int, default=128, help="validation windows per evaluation")
    add("--sample", type=common.non_negative_int, default=0, metavar="N", help="generate N bytes at the end")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="for history and curves")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the curves")
    return parser


def _add_model_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("model").add_argument
    default = GptConfig()
    add("--layers", type=common.positive_int, default=default.layers, help="transformer blocks")
    add("--width", type=common.positive_int, default=default.width, help="of the residual stream")
    add(
        "--heads",
        type=common.positive_int,
        default=default.heads,
        help="attention heads, a divisor of --width",
    )
    add("--context", type=common.positive_int, default=default.context, help="bytes the model sees")
    add("--tied-head", action=argparse.BooleanOptionalAction, default=True, help="share embedding and head")


def _add_training_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    add = group.add_argument
    add("--steps", type=common.positive_int, default=300, help="optimizer steps")
    add("--batch-size", type=common.positive_int, default=16, help="windows per step, over all ranks")
    add("--lr", type=common.positive_float, default=3e-3, help="peak learning rate")
    add("--warmup", type=common.non_negative_int, default=20, help="steps of linear warm-up; then a cosine")
    add("--weight-decay", type=common.non_negative_float, default=0.1, help="of matrices and embeddings")
    add("--clip", type=common.non_negative_float, default=1.0, help="largest gradient norm; 0: any")
    add("--bf16", action="store_true", help="autocast to bfloat16")
    overlap = group.add_mutually_exclusive_group()
    overlap.add_argument("--forward-overlap", action="store_true", help="overlap reduction and next forward")
    overlap.add_argument("--blocking", action="store_true", help="reduce each gradient inside its hook")
    add("--seed", type=common.non_negative_int, default=0, help="of the weights, the batches and the sample")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")


def read_options(comm: Communicator) -> Options:
    """The command line, checked for what concerns two options at once. **Collective.**"""
    arguments = common.parse_arguments(build_parser(), comm)
    with common.user_errors_end_the_job(comm):
        if arguments.width % arguments.heads:
            raise common.UserError(f"--heads {arguments.heads} must divide --width {arguments.width}")
    return Options(**vars(arguments))


def write_results(options: Options, world_size: int, evaluations: list[Evaluation]) -> None:
    """Write history and curves and print where they are. For rank 0."""
    history = {
        "options": asdict(options),
        "world_size": world_size,
        "evaluations": [asdict(evaluation) for evaluation in evaluations],
    }
    print(f"history: {reporting.write_history(options.output, history)}")
    if not options.plot:
        return
    steps = [each.step for each in evaluations]
    panels = {
        "loss, nats per byte": [
            ("training", steps, [each.train_loss for each in evaluations]),
            ("validation", steps, [each.validation_loss for each in evaluations]),
        ],
        "bytes per second": [("training", steps, [each.bytes_per_s for each in evaluations])],
    }
    if picture := reporting.draw_curves(options.output / "curves.png", "step", panels):
        print(f"curves:  {picture}")


def main() -> None:
    """Read, train, report."""
    comm = hpcpar.comm.world()
    options = read_options(comm)
    corpus = None
    with common.user_errors_end_the_job(comm):
        device = common.choose_device(comm, options.device)
        if comm.rank == 0:
            corpus = text_corpus.read_corpus(options.text, options.limit)
            text_corpus.split_corpus(corpus, options.context)  # long enough? say so before sending it
            reporting.prepare_output(options.output)
    parts = text_corpus.split_corpus(common.broadcast_tensor(corpus, comm), options.context)

    torch.manual_seed(options.seed)
    net = Gpt(GptConfig(options.layers, options.width, options.heads, options.context, options.tied_head))
    trainer = Trainer(net.to(device), comm, options, device)
    if comm.rank == 0:
        parameters = sum(parameter.numel() for parameter in net.parameters())
        print(
            f"{parameters} parameters, {sum(len(part) for part in parts)} bytes of text, {comm.size} rank(s)"
        )
    evaluations = train(trainer, options, *parts)
    if comm.rank == 0:
        print(f"final validation loss {evaluations[-1].validation_loss:.4f} nats/byte")
        if options.sample:
            # The plain net, not the wrapped one: sampling is this rank's own affair.
            text = generate(net.eval(), b"\n", options.sample, options.seed)
            print(f"--- sample\n{text.decode(errors='replace')}\n---")
        write_results(options, comm.size, evaluations)


if __name__ == "__main__":
    main()
