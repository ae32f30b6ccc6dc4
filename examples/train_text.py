"""Train a small byte-level GPT on real text, on any number of MPI ranks.

    python examples/train_text.py                                # one process
    mpirun -n 4 python examples/train_text.py                    # four
    mpirun -n 4 python examples/train_text.py --text ~/books --steps 2000 --sample 400
    mpirun -n 2 python examples/train_text.py --pipeline 2 --schedule zero_bubble --trace step.json
    mpirun -n 4 python examples/train_text.py --pipeline 2 --data-parallel 2
    mpirun -n 4 python examples/train_text.py --experts 8 --save run
    mpirun -n 2 python examples/train_text.py --experts 8 --steps 600 --resume run/step-300
    PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 mpirun -n 2 python examples/train_text.py --xla

The default text are the Python sources of the interpreter's standard library, about 10 MB.

On top of `train_digits.py` this shows what a language model needs: gradient clipping (after
``backward()`` every rank holds the same mean gradient, so each clips by itself and no norm is
communicated), mixed precision by autocast, and a head tied to the embedding. All are plain
PyTorch. The batch of step k is a function of seed and k, sliced by ranks, so the loss curve does
not depend on the number of ranks, up to rounding.

With ``--forward-overlap`` the gradients of a step are still on their way when ``backward()``
returns, and each layer waits for its own just before the next forward runs it. Clipping needs the
norm of all of them, so it waits for all; ``--clip 0`` leaves the overlap whole.

``--pipeline`` cuts the model into stages instead, see `pipeline_trainer.py`; the curve stays the same.
``--experts`` puts mixtures of experts in the place of every second perceptron, see `expert_gpt.py`; the load
of each expert in each step is drawn into ``expert_load.png``. What ``--save`` writes at each evaluation goes
on with ``--resume`` on any number of ranks.

``--xla`` trains on the devices of torch-xla that each rank has, see `xla_trainer.py`. ``--compare`` draws the
curves of another run, such as one without ``--xla``, beside.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import common
import expert_gpt
import expert_load
import hpcpar
import pipeline_trainer
import reporting
import text_corpus
import xla_trainer
from compared_run import ComparedRun, read_compared_run
from gpt import Gpt, GptConfig, generate
from hpcpar.comm import MPI, Communicator
from trainer import DataParallelTrainer, Options, Trainer

OUTPUT = Path(__file__).resolve().parent / "output" / "text"


@dataclass(frozen=True)
class Evaluation:
    """What is reported every so many steps; the same on every rank. Losses in nats per byte."""

    step: int
    train_loss: float
    validation_loss: float
    bytes_per_s: float
    waiting_share: float

    def __str__(self) -> str:
        return (
            f"step {self.step:5d}  train loss {self.train_loss:.4f} nats/byte = "
            f"{self.train_loss / math.log(2):.3f} bits/byte  validation {self.validation_loss:.4f}  "
            f"{self.bytes_per_s:8.0f} bytes/s  waiting {100 * self.waiting_share:4.1f} %"
        )


def train(
    trainer: Trainer, options: Options, first_step: int, training: torch.Tensor, validation: torch.Tensor
) -> list[Evaluation]:
    """The whole run, or the rest of it: stretches of steps, with an evaluation after each."""
    evaluations: list[Evaluation] = []
    with reporting.Reporter(trainer.comm, options.steps - first_step) as reporter:
        for first in range(first_step, options.steps, options.eval_every):
            steps = range(first, min(first + options.eval_every, options.steps))
            train_loss, bytes_per_s, waiting_share = trainer.run_stretch(steps, training, reporter)
            validation_loss = trainer.validate(validation)
            evaluations.append(
                Evaluation(steps.stop, train_loss, validation_loss, bytes_per_s, waiting_share)
            )
            reporter.line(str(evaluations[-1]))
            if options.save is not None:
                with common.user_errors_end_the_job(trainer.comm):
                    reporter.line(f"saved {trainer.save(options.save, steps.stop)}")
    return evaluations


# ----------------------------------------------------------------------------------------- script


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a small byte-level GPT on text, data parallel over MPI ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    _add_model_options(parser)
    _add_expert_options(parser)
    _add_training_options(parser)
    _add_pipeline_options(parser)
    _add_xla_options(parser)
    add = parser.add_argument
    add("--text", type=Path, metavar="DIR", help="folder with text files; the standard library if not given")
    add("--limit", type=common.positive_int, metavar="N", help="use only the first N bytes of the text")
    add("--eval-every", type=common.positive_int, default=50, help="steps between evaluations")
    add("--eval-windows", type=common.positive_int, default=128, help="validation windows per evaluation")
    add("--sample", type=common.non_negative_int, default=0, metavar="N", help="generate N bytes at the end")
    add("--save", type=Path, metavar="DIR", help="write the whole state to DIR/step-N at each evaluation")
    add("--resume", type=Path, metavar="DIR", help="go on from such a state, on any number of ranks")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="for history and curves")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the curves")
    add("--compare", type=Path, metavar="FILE", help="history.json of another run, to be drawn beside")
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


def _add_expert_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("mixtures of experts").add_argument
    add(
        "--experts", type=common.non_negative_int, default=0, metavar="N", help="experts per mixture; 0: none"
    )
    add("--experts-every", type=common.positive_int, default=2, metavar="N", help="blocks for one mixture")
    add("--top-k", type=common.positive_int, default=2, metavar="K", help="experts that each byte goes to")
    add(
        "--capacity-factor",
        type=common.positive_float,
        metavar="F",
        help="an expert takes at most F times its even share of a batch; no limit if not given",
    )
    add("--balancing", type=common.non_negative_float, default=0.01, help="weight of the balancing loss")
    add("--z-loss", type=common.non_negative_float, default=0.001, help="weight of the gates' z-loss")


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


def _add_pipeline_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("pipeline").add_argument
    add("--pipeline", type=common.positive_int, default=1, metavar="N", help="ranks that share one model")
    add("--data-parallel", type=common.positive_int, metavar="N", help="replicas; the ranks that are left")
    schedules = ["gpipe", "1f1b", "interleaved", "zero_bubble"]
    add("--schedule", choices=schedules, default="1f1b", help="order of forwards and backwards")
    add("--microbatches", type=common.positive_int, default=8, help="parts of each replica's batch")
    add("--chunks", type=common.positive_int, default=1, help="stages per rank")
    modes = ["never", "except_last", "always"]
    add("--checkpoint", choices=modes, default="never", help="microbatches to compute again in backward")
    add("--reuse", choices=["route", "replicate"], default="route", help="what a tied head does")
    add("--trace", type=Path, metavar="FILE", help="write one step for chrome://tracing, and a picture")


def _add_xla_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("devices of torch-xla").add_argument
    add(
        "--xla",
        action="store_true",
        help="train on the devices that each rank has; PJRT_DEVICE=CPU CPU_NUM_DEVICES=2 in the environment "
        "makes two on any host, PJRT_DEVICE=TPU takes those of a TPU",
    )
    add("--accumulate", type=common.positive_int, default=1, metavar="N", help="passes of a device in a step")


def read_options(comm: Communicator) -> Options:
    """The command line, checked for what concerns two options at once. **Collective.**"""
    arguments = common.parse_arguments(build_parser(), comm)
    with common.user_errors_end_the_job(comm):
        if arguments.width % arguments.heads:
            raise common.UserError(f"--heads {arguments.heads} must divide --width {arguments.width}")
        if arguments.data_parallel is None:
            arguments.data_parallel = max(1, comm.size // arguments.pipeline)
        if arguments.experts and arguments.experts_every > arguments.layers:
            raise common.UserError(
                f"--experts-every {arguments.experts_every} must not exceed --layers {arguments.layers}"
            )
        if arguments.resume is not None and not arguments.resume.is_dir():
            raise common.UserError(f"--resume {arguments.resume}: no such folder")
        options = Options(**vars(arguments))
        if options.pipeline > 1:
            pipeline_trainer.check_options(options, comm)
        elif options.trace is not None:
            raise common.UserError("--trace shows the stages of a pipeline; give --pipeline 2 or more")
        if options.xla:
            xla_trainer.check_options(options)
        elif options.accumulate > 1:
            raise common.UserError("--accumulate is for the devices of --xla")
    return options


def make_trainer(net: Gpt, comm: Communicator, options: Options, device: torch.device) -> Trainer:
    """The way to take steps that was asked for. **Collective.**"""
    if options.xla:
        return xla_trainer.XlaTrainer(net, comm, options, device)
    if options.pipeline > 1:
        return pipeline_trainer.PipelineTrainer(net, comm, options, device)
    return DataParallelTrainer(net, comm, options, device)


def start(trainer: Trainer, options: Options) -> int:
    """Go on from a saved run, if there is one. **Collective.** Returns the steps done so far."""
    first_step = 0
    with common.user_errors_end_the_job(trainer.comm):
        if options.resume is not None:
            first_step = trainer.resume(options.resume)
        if first_step >= options.steps:
            raise common.UserError(f"--resume {options.resume} has done {first_step} steps; raise --steps")
    return first_step


def write_results(
    options: Options, world_size: int, evaluations: list[Evaluation], compared: ComparedRun | None
) -> None:
    """Write history and curves and print where they are. For rank 0."""
    rows = [asdict(evaluation) for evaluation in evaluations]
    history = {"options": asdict(options), "world_size": world_size, "evaluations": rows}
    print(f"history: {reporting.write_history(options.output, history)}")
    if compared is not None:
        print(compared.difference(rows))
    if options.plot and (picture := draw_results(options.output / "curves.png", rows, compared)):
        print(f"curves:  {picture}")


def draw_results(path: Path, rows: list[dict[str, float]], compared: ComparedRun | None) -> Path | None:
    """Draw the curves, with those of another run beside them."""
    steps = [each["step"] for each in rows]
    figures = {
        "loss, nats per byte": [("training", "train_loss"), ("validation", "validation_loss")],
        "bytes per second": [("training", "bytes_per_s")],
    }
    panels = {
        title: [(label, steps, [each[key] for each in rows]) for label, key in figure]
        for title, figure in figures.items()
    }
    beside = {
        title: [compared.curve(label, key) for label, key in figure]
        for title, figure in figures.items()
        if compared is not None
    }
    return reporting.draw_curves(path, "step", panels, beside)


def main() -> None:
    """Read, train, report."""
    comm = hpcpar.comm.world()
    options = read_options(comm)
    corpus = compared = None
    with common.user_errors_end_the_job(comm):
        device = common.choose_device(comm, "cpu" if options.xla else options.device)
        if comm.rank == 0:
            if options.compare is not None:
                compared = read_compared_run(options.compare)
            corpus = text_corpus.read_corpus(options.text, options.limit)
            text_corpus.split_corpus(corpus, options.context)  # long enough? say so before sending it
            reporting.prepare_output(options.output)
    parts = text_corpus.split_corpus(common.broadcast_tensor(corpus, comm), options.context)

    torch.manual_seed(options.seed)
    net = Gpt(GptConfig(options.layers, options.width, options.heads, options.context, options.tied_head))
    trainer = make_trainer(net.to(device), comm, options, device)
    first_step = start(trainer, options)
    if comm.rank == 0:
        parameters = expert_gpt.count_parameters(net)
        print(
            f"{parameters} parameters, {sum(len(part) for part in parts)} bytes of text, {comm.size} rank(s)"
        )
    evaluations = train(trainer, options, first_step, *parts)
    trainer.gather_into(net)
    trainer.close()
    text = b""
    if options.sample and (comm.rank == 0 or options.experts):
        # The plain net, not the wrapped one: without experts, sampling is one rank's own affair. With them
        # all ranks sample the same text together, since each has only some of the experts.
        text = generate(net.eval(), b"\n", options.sample, options.seed)
    load = trainer.expert_load.table(comm, MPI.MAX)  # of a layer all its ranks know the same, the others zero
    if comm.rank == 0:
        print(f"final validation loss {evaluations[-1].validation_loss:.4f} nats/byte")
        if options.sample:
            print(f"--- sample\n{text.decode(errors='replace')}\n---")
        write_results(options, comm.size, evaluations, compared)
        if options.experts:
            layers = trainer.expert_load.layers
            for path in expert_load.write_expert_load(options.output, layers, load, first_step, options.plot):
                print(f"experts: {path}")


if __name__ == "__main__":
    main()
