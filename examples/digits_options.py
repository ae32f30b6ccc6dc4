"""The command line of the digits example: what there is, and what goes together."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import common

__all__ = ["Options", "build_parser", "check_options"]

OUTPUT = Path(__file__).resolve().parent / "output" / "digits"
OPTIMIZERS = {
    "sgd": ("forward_overlap", "blocking"),
    "sharded": (),
    "daso": ("warmup_epochs", "cooldown_epochs"),
    "collaborative": (
        "target_batch_size",
        "micro_batch_size",
        "slow",
        "delayed_averaging",
        "averaging_timeout",
    ),
}
"""The optimizers, each with the options that no other has."""


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: Path | None
    limit: int | None
    optimizer: str
    epochs: int
    batch_size: int
    lr: float
    seed: int
    forward_overlap: bool
    blocking: bool
    warmup_epochs: int | None
    cooldown_epochs: int | None
    target_batch_size: int | None
    micro_batch_size: int | None
    slow: list[tuple[int, float]]
    delayed_averaging: bool
    averaging_timeout: float | None
    checkpoints: Path | None
    checkpoint_every: int
    keep: int
    step_delay: float
    device: str
    output: Path
    plot: bool


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a small convolutional net on images of digits, over MPI ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with MNIST-like IDX files (plain or .gz)")
    add("--limit", type=common.positive_int, metavar="N", help="use only the first N images of each set")
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="how ranks make a step together")
    add("--epochs", type=common.positive_int, default=20, help="passes over the training set")
    add("--batch-size", type=common.positive_int, default=64, help="samples per step, over all ranks")
    add("--lr", type=common.positive_float, default=0.02, help="initial learning rate")
    add("--seed", type=common.non_negative_int, default=0, help="of the weights and the order of samples")
    _add_optimizers(parser)
    add(
        "--checkpoints", type=Path, metavar="DIR", help="write states to DIR, and go on from the newest there"
    )
    add("--checkpoint-every", type=common.positive_int, default=5, metavar="N", help="epochs between them")
    add("--keep", type=common.positive_int, default=2, metavar="N", help="how many of them stay")
    add("--step-delay", type=common.non_negative_float, default=0.0, metavar="S", help="sleep in each step")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="for history and curves")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the curves")
    return parser


def _add_optimizers(parser: argparse.ArgumentParser) -> None:
    """What only one of the optimizers has."""
    overlap = parser.add_argument_group("sgd").add_mutually_exclusive_group()
    overlap.add_argument("--forward-overlap", action="store_true", help="overlap reduction and next forward")
    overlap.add_argument("--blocking", action="store_true", help="reduce each gradient inside its hook")

    add = parser.add_argument_group("daso").add_argument
    common_help = "epochs at the {} that average in every step; a fifth of all if not given"
    add("--warmup-epochs", type=common.non_negative_int, metavar="N", help=common_help.format("beginning"))
    add("--cooldown-epochs", type=common.non_negative_int, metavar="N", help=common_help.format("end"))

    add = parser.add_argument_group("collaborative").add_argument
    add("--target-batch-size", type=common.positive_int, metavar="N", help="instead of --batch-size")
    add(
        "--micro-batch-size",
        type=common.positive_int,
        metavar="N",
        help="samples that a rank draws at once; a quarter of its even share if not given",
    )
    add(
        "--slow",
        type=_slow_rank,
        metavar="RANK:FACTOR",
        action="append",
        default=[],
        help="let this rank take so many times as long; may be given for several ranks",
    )
    add("--delayed-averaging", action="store_true", help="let a round run behind the next micro-batches")
    add(
        "--averaging-timeout",
        type=common.positive_float,
        metavar="S",
        help="seconds after which a round goes on without ranks that are late",
    )


def check_options(options: Options, world_size: int) -> None:
    """Raise `UserError` for options that do not go together. Local."""
    for optimizer, names in OPTIMIZERS.items():
        for name in names:
            # Of these options, what is not given is None, False or empty; --warmup-epochs 0 is given.
            is_given = getattr(options, name) not in (None, [], False) or (
                name.endswith("_epochs") and getattr(options, name) == 0
            )
            if is_given and optimizer != options.optimizer:
                flag = "--" + name.replace("_", "-")
                raise common.UserError(
                    f"{flag} goes with --optimizer {optimizer}, got --optimizer {options.optimizer}"
                )
    synchronous = (options.warmup_epochs or 0) + (options.cooldown_epochs or 0)
    if synchronous > options.epochs:
        raise common.UserError(
            f"--warmup-epochs and --cooldown-epochs must fit into --epochs, got {synchronous} of "
            f"{options.epochs}"
        )
    for rank, factor in options.slow:
        if rank >= world_size:
            raise common.UserError(f"--slow {rank}:{factor:g}: there are ranks 0 to {world_size - 1} only")


def _slow_rank(text: str) -> tuple[int, float]:
    """An argparse type: RANK:FACTOR."""
    rank, _, factor = text.partition(":")
    if not rank.isdecimal() or common.positive_float(factor) < 1.0:
        raise argparse.ArgumentTypeError(f"must be a rank and how many times as long it takes, got {text}")
    return int(rank), float(factor)
