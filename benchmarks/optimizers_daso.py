"""DASO against full synchronisation, over two hosts joined by a slow link.

::

    python benchmarks/optimizers_daso.py --hosts                      # makes two hosts; root and iproute2
    mpirun -n 8 python benchmarks/optimizers_daso.py                  # on the nodes there are

With ``--hosts`` the command starts itself under ``mpirun``, once for each speed of the link, on hosts that it
makes out of network namespaces (:mod:`hosts`). Otherwise it is one of the ranks, on two nodes or more.

A perceptron of 0.65 million parameters learns scikit-learn's 1797 images of digits. Each variant has its own
copy from the same seed, sees the same batches, and its learning rate follows the same cosine::

    full sync        DataParallel: 2.6 MB of gradients cross the link in every step, each way
    full sync bf16   the same with 16 bits on the wire, for what that alone brings
    DASO             DataParallelMultiGPU: as full sync in warm-up and cool-down; in between, 16-bit changes
                     of the parameters every few steps, behind the next ones

Epochs take turns: every variant trains its first epoch, then every variant its second, and so on, in an
order that rotates. Nothing is under way between epochs. In the end the replicas of each variant must be
bitwise equal. See `optimizers_daso_training.py` for the training itself.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hpcpar
from common import (
    Environment,
    Timings,
    add_common_options,
    describe,
    largest_over_ranks,
    measure,
    new_figure,
    parse_arguments,
    positive_int,
    print_table,
    save,
    verdict,
)
from hosts import Hosts, find_mpirun, why_not
from hpcpar.comm import Communicator
from optimizers_daso_training import DASO, FULL, FULL_BF16, SAMPLES_PER_STEP, load_digits, make_trainer
from replicas import require_equal_replicas

GOAL_RATE, GOAL_POINTS, GOAL_LINK = 3.0, 1.0, "100mbit"
LINKS = ("1gbit", "100mbit")


# ---- measuring ---------------------------------------------------------------------------------------------


def run(comm: Communicator, options: argparse.Namespace) -> dict[str, Any]:
    """Train all variants, epoch by epoch in turn. **Collective.**"""
    data = load_digits()
    plan = {"epochs": options.repetitions, "warmup": options.warmup, "cooldown": options.cooldown}
    trainers = {name: make_trainer(comm, name, data, **plan) for name in (FULL, FULL_BF16, DASO)}
    timings = measure(
        comm,
        {name: trainer.train_epoch for name, trainer in trainers.items()},
        options.repetitions,
        lambda name: trainers[name].look(),
    )
    variants = {}
    for name, trainer in trainers.items():
        trainer.look()
        require_equal_replicas(comm, name, trainer.module)
        bytes_sent = largest_over_ranks(comm, trainer.bytes_sent)
        variants[name] = summarise(timings, name, data.steps, bytes_sent, trainer.accuracy, options)
        trainer.free()
    return {
        "link": options.link,
        "parameters": sum(p.numel() for p in trainers[FULL].module.parameters()),
        "epochs": options.repetitions,
        "warmup_epochs": options.warmup,
        "cooldown_epochs": options.cooldown,
        "variants": variants,
    }


def summarise(
    timings: Timings,
    name: str,
    steps: int,
    bytes_sent: Sequence[float],
    accuracy: Sequence[float],
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Steps per second of the whole run and of the epochs in which DASO cycles. **Local.**"""
    cycling = slice(options.warmup, options.repetitions - options.cooldown)
    seconds, full = timings.seconds[name], timings.seconds[FULL]
    return {
        "epoch_s": timings.median(name),
        "steps_per_s": steps * len(seconds) / sum(seconds),
        "times_full": sum(full) / sum(seconds),
        "cycling_steps_per_s": steps * len(seconds[cycling]) / sum(seconds[cycling]),
        "cycling_times_full": sum(full[cycling]) / sum(seconds[cycling]),
        "bytes_per_step": sum(bytes_sent) / steps / len(bytes_sent),
        "cycling_bytes_per_step": sum(bytes_sent[cycling]) / steps / len(bytes_sent[cycling]),
        "accuracy": accuracy[-1],
        "accuracy_of_epochs": list(accuracy),
        "seconds_of_epochs": seconds,
    }


# ---- reporting ---------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> None:
    """The table of one link. **Local.**"""
    variants = result["variants"]
    link = f"hosts joined by {result['link']}" if result["link"] else "as the nodes are joined"
    title = (
        f"{link}, {result['parameters'] / 1e6:.2f} million parameters, {result['epochs']} epochs, of which "
        f"{result['warmup_epochs']} warm-up and {result['cooldown_epochs']} cool-down"
    )
    header = (
        "variant", "epoch s", "steps/s", "x full sync", "MB/step", "cycling steps/s", "cycling x",
        "cycling MB/step", "accuracy %", "points less",
    )  # fmt: skip
    print_table(title, header, [line(name, result) for name in variants])
    if result["link"] == GOAL_LINK:
        print(
            f"goals for {DASO!r}: at least {GOAL_RATE:g} x full sync, at most {GOAL_POINTS:g} point less",
            flush=True,
        )
    else:
        print(f"no goal: it is for hosts joined by {GOAL_LINK}", flush=True)


def line(name: str, result: Mapping[str, Any]) -> tuple[str, ...]:
    """A row of the table. **Local.**"""
    figures = result["variants"][name]
    less = result["variants"][FULL]["accuracy"] - figures["accuracy"]
    whole, cycling, points = (
        f"{figures['times_full']:.2f}",
        f"{figures['cycling_times_full']:.2f}",
        f"{less:.2f}",
    )
    if result["link"] == GOAL_LINK and name == DASO:
        whole = verdict(figures["times_full"], GOAL_RATE, at_least=True)
        cycling = verdict(figures["cycling_times_full"], GOAL_RATE, at_least=True)
        points = verdict(less, GOAL_POINTS, at_least=False)
    return (
        name,
        f"{figures['epoch_s']:.2f}",
        f"{figures['steps_per_s']:.1f}",
        whole,
        f"{figures['bytes_per_step'] / 1e6:.2f}",
        f"{figures['cycling_steps_per_s']:.1f}",
        cycling,
        f"{figures['cycling_bytes_per_step'] / 1e6:.2f}",
        f"{figures['accuracy']:.1f}",
        points,
    )


def draw(result: Mapping[str, Any], environment: Environment) -> Any:
    """Accuracy over the seconds of training. **Local.**"""
    canvas = new_figure(1)
    if canvas is None:
        return None
    figure, (axes,) = canvas
    for name, figures in result["variants"].items():
        ends = [sum(figures["seconds_of_epochs"][:epoch]) for epoch in range(result["epochs"] + 1)]
        axes.plot(ends, figures["accuracy_of_epochs"], marker=".", label=name)
    axes.set(xlabel="seconds of training", ylabel="accuracy %", ylim=(80, 100))
    axes.set_title(f"digits, link {result['link'] or 'as it is'}")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.suptitle(f"{environment.mpi}, {environment.ranks} rank(s) on {environment.nodes} node(s)")
    return figure


# ---- commands ----------------------------------------------------------------------------------------------


def main() -> None:
    """Start the ranks, or be one of them."""
    parser = make_parser()
    if "--hosts" in sys.argv[1:]:
        raise SystemExit(start_on_hosts(parser.parse_args()))
    comm = hpcpar.comm.world()
    options = parse_arguments(parser, comm)
    if options.quick:
        options.repetitions, options.warmup, options.cooldown = 3, 1, 1
    mistake = find_mistake(comm, options)
    if mistake is not None:
        if comm.rank == 0:
            print(f"{parser.prog}: error: {mistake}", file=sys.stderr, flush=True)
        raise SystemExit(2)
    environment = describe(comm)
    if comm.rank == 0:
        print(environment.text, flush=True)
    result = run(comm, options)
    if comm.rank == 0:
        show(result)
        name = f"optimizers_daso_{options.link}" if options.link else "optimizers_daso"
        save(options.output, name, environment, {"results": result}, draw(result, environment))


def make_parser() -> argparse.ArgumentParser:
    """The command line. **Local.**"""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_options(parser, repetitions=30)  # a repetition is an epoch
    parser.add_argument(
        "--warmup", type=positive_int, default=2, metavar="N", help="first epochs in full sync (default 2)"
    )
    parser.add_argument(
        "--cooldown", type=positive_int, default=2, metavar="N", help="last epochs in full sync (default 2)"
    )
    parser.add_argument("--hosts", action="store_true", help="make two hosts, and start the ranks on them")
    parser.add_argument(
        "--ranks-per-host", type=positive_int, default=2, metavar="N", help="with --hosts (default 2)"
    )
    parser.add_argument(
        "--link",
        metavar="RATE",
        help=f"speed of the link between hosts, such as 1gbit; {' and '.join(LINKS)} in turn by default",
    )
    return parser


def find_mistake(comm: Communicator, options: argparse.Namespace) -> str | None:
    """What is wrong with ranks and options, for all ranks alike. **Local.**"""
    if comm.num_nodes < 2:
        return "ranks must be on two nodes or more, got one. --hosts makes two"
    if SAMPLES_PER_STEP % comm.size:
        return f"ranks must divide the {SAMPLES_PER_STEP} images of a step, got {comm.size}"
    if options.warmup + options.cooldown >= options.repetitions:
        return (
            f"--warmup and --cooldown must leave epochs between them, got {options.warmup} and "
            f"{options.cooldown} of {options.repetitions}"
        )
    return None


def start_on_hosts(options: argparse.Namespace) -> int:
    """Run this benchmark on two hosts for each link; the exit status. **Local**, outside of ``mpirun``."""
    reason = why_not()
    if reason is not None:
        print(f"skipped: two hosts cannot be made here: {reason}", flush=True)
        return 0
    mpirun, is_openmpi = find_mpirun()
    environment = {
        "OMP_NUM_THREADS": "1",  # each host thinks that it has all cores
        **os.environ,
        **Hosts.variables(is_openmpi),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    for link in [options.link] if options.link else LINKS:
        with Hosts(2, rate=link) as hosts:
            program = [sys.executable, str(Path(__file__).resolve()), *arguments(options, link)]
            command = hosts.command(mpirun, is_openmpi, options.ranks_per_host, program)
            status = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL).returncode
        if status != 0:
            return status
    return 0


def arguments(options: argparse.Namespace, link: str) -> list[str]:
    """What a rank is told. **Local.**"""
    numbers = {
        "--repetitions": options.repetitions,
        "--warmup": options.warmup,
        "--cooldown": options.cooldown,
        "--output": options.output.resolve(),
        "--link": link,
    }
    words = [str(word) for pair in numbers.items() for word in pair]
    return [*words, *(["--quick"] if options.quick else [])]


if __name__ == "__main__":
    main()
