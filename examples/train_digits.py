"""Train a small convolutional net on handwritten digits, on any number of MPI ranks.

    python examples/train_digits.py                      # one process
    mpirun -n 4 python examples/train_digits.py          # four
    mpirun -n 4 python examples/train_digits.py --data /usr/share/datasets/fashion-mnist

The default data are the 1797 images of 8 x 8 pixels that scikit-learn brings along; ``--data``
takes a folder with the four IDX files of MNIST, Fashion-MNIST or a set like them. ``--optimizer`` chooses
how ranks make a step together: see `digits_trainers` and `digits_collaborative`.

What makes this a data-parallel script is little: the communicator, the wrapped model, and that
each rank computes on its slice of every batch. In full, it is this:

    comm  = hpcpar.comm.world()
    model = hpcpar.nn.DataParallel(net, comm)
    for batch in batches:                                   # the same global batch on all ranks
        mine = batch[shard(len(batch), comm.rank, comm.size)]
        optimizer.zero_grad()
        loss_sum = cross_entropy(model(images[mine]), labels[mine], reduction="sum")
        (loss_sum * comm.size / len(batch)).backward()      # .grad is now the global mean
        optimizer.step()

In a batch job it stops when the system says so, or just before the time is up, and goes on when it is started
again with the same ``--checkpoints``: see `hpcpar.jobs.Preemption` and the scripts in ``jobs/``.

The result does not depend on the number of ranks, up to rounding: the order of samples is a
function of seed and epoch, no sample is padded or dropped, and the net normalises each image by
itself (group norm, not batch norm) and has no dropout. Two of the optimizers give that up on purpose: DASO
and the collaborative one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any, NoReturn

import torch

import common
import digits_trainers
import hpcpar
import reporting
import saved_run
from digits import Dataset, broadcast_dataset, build_net, load_digits, load_idx_folder
from digits_collaborative import CollaborativeTrainer, draw_contributions
from digits_options import Options, build_parser, check_options
from hpcpar.comm import Communicator

TRAINERS = {
    "sgd": digits_trainers.DataParallelTrainer,
    "sharded": digits_trainers.ShardedTrainer,
    "daso": digits_trainers.DasoTrainer,
    "collaborative": CollaborativeTrainer,
}


SAME_TRAINING = ("optimizer", "data", "limit", "batch_size", "target_batch_size", "lr", "seed")
"""What must be the same when a training goes on; --epochs may grow, and with it the end of the schedule."""


@dataclass(frozen=True)
class EpochResult:
    """What is reported of one epoch; the same on every rank."""

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_s: float
    exposed_share: float
    note: str

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}  train loss {self.train_loss:.4f}  "
            f"test accuracy {100 * self.test_accuracy:6.2f} %  {self.samples_per_s:8.0f} samples/s  "
            f"exposed communication {100 * self.exposed_share:4.1f} %" + (self.note and f"  {self.note}")
        )


def run_epochs(
    trainer: digits_trainers.Trainer,
    dataset: Dataset,
    results: list[EpochResult],
    reporter: reporting.Reporter,
    preemption: hpcpar.jobs.Preemption,
) -> None:
    """Train and evaluate the epochs that are left, with a checkpoint now and then. **Collective.**

    When the job is to stop, be it in the middle of an epoch, a checkpoint is written and the script ends.
    """
    options = trainer.options
    for epoch in range(len(results) + 1, options.epochs + 1):
        try:
            trained = trainer.train_epoch(epoch, reporter)
        except digits_trainers.Interrupted:
            leave(trainer, results, reporter, preemption)
        test_loss, accuracy = trainer.evaluate(dataset.test)
        figures = (trained.samples_per_s, trained.exposed_share, trained.note)
        results.append(EpochResult(epoch, trained.loss, test_loss, accuracy, *figures))
        reporter.line(str(results[-1]))
        if epoch < options.epochs and preemption.requested(now=True):
            leave(trainer, results, reporter, preemption)
        if epoch == options.epochs or epoch % options.checkpoint_every == 0:
            save(trainer, results)


def make_preemption(trainer: digits_trainers.Trainer) -> hpcpar.jobs.Preemption:
    """What says that the job is to stop; nothing does where no checkpoint can be written. **Collective.**"""
    if trainer.options.checkpoints is None:
        return hpcpar.jobs.Preemption(trainer.comm, signals=(), margin_s=None)
    return hpcpar.jobs.Preemption(trainer.comm, model=trainer.flag_carrier)


def leave(
    trainer: digits_trainers.Trainer,
    results: list[EpochResult],
    reporter: reporting.Reporter,
    preemption: hpcpar.jobs.Preemption,
) -> NoReturn:
    """Write a checkpoint and end the script, with a status that asks to be started again. **Collective.**"""
    save(trainer, results)
    reporter.line(f"stopped after step {trainer.steps_done}: {preemption.reason}")
    trainer.close()
    preemption.leave()


def save(trainer: digits_trainers.Trainer, results: list[EpochResult]) -> None:
    """Write everything that the next step depends on, if there is a place for it. **Collective.**"""
    options, folder = trainer.options, trainer.options.checkpoints
    if folder is None:
        return
    state = {
        "options": {name: str(getattr(options, name)) for name in SAME_TRAINING},
        "results": [asdict(result) for result in results],
        "trainer": trainer.state_dict(),
    }
    with common.user_errors_end_the_job(trainer.comm), saved_run.reported():
        hpcpar.checkpoint.save(folder / f"step-{trainer.steps_done}", state, trainer.comm, keep=options.keep)


def check_same_training(newest: Path, saved: dict[str, str], options: Options) -> None:
    """Raise `UserError` if this would be another training than the one that was saved. Local."""
    for name, value in saved.items():
        if value != str(getattr(options, name)):
            flag = "--" + name.replace("_", "-")
            raise common.UserError(
                f"{newest} is of a training with {flag} {value}, got {getattr(options, name)}. Go on as it "
                "was begun, or give another --checkpoints"
            )


def resume(trainer: digits_trainers.Trainer, reporter: reporting.Reporter) -> list[EpochResult]:
    """Go on from the newest checkpoint, if there is one. **Collective.** Returns the epochs done so far."""
    options, comm = trainer.options, trainer.comm
    with common.user_errors_end_the_job(comm), saved_run.reported():
        newest = hpcpar.checkpoint.latest(options.checkpoints) if options.checkpoints else None
        newest = comm.bcast(newest, root=0)
        if newest is None:
            return []
        saved = hpcpar.checkpoint.load(newest, comm=comm)
        check_same_training(newest, saved["options"], options)
    trainer.load_state_dict(saved["trainer"])
    results = [EpochResult(**result) for result in saved["results"]]
    reporter.line(f"goes on from {newest}, after {len(results)} epochs")
    return results


def write_results(
    options: Options, comm: Communicator, results: list[EpochResult], figures: dict[str, Any]
) -> None:
    """Write history and curves and print the last lines. For rank 0."""
    epochs = [result.epoch for result in results]
    history = {"options": asdict(options), "world_size": comm.size, "epochs": [asdict(r) for r in results]}
    print(f"history: {reporting.write_history(options.output, {**history, **figures})}")
    if not options.plot:
        return
    panels = {
        "loss": [
            ("training", epochs, [r.train_loss for r in results]),
            ("test", epochs, [r.test_loss for r in results]),
        ],
        "accuracy": [("test", epochs, [r.test_accuracy for r in results])],
    }
    if picture := reporting.draw_curves(options.output / "curves.png", "epoch", panels):
        print(f"curves:  {picture}")
    if samples := figures.get("samples_per_rank"):
        picture = draw_contributions(options.output / "samples_per_rank.png", samples, figures["first_step"])
        if picture:
            print(f"samples: {picture}")


def main() -> None:
    """Read, train, report."""
    comm = hpcpar.comm.world()
    options = Options(**vars(common.parse_arguments(build_parser(), comm)))
    sets = None
    with common.user_errors_end_the_job(comm):
        check_options(options, comm.size)
        device = common.choose_device(comm, options.device)
        if comm.rank == 0:
            sets = load_idx_folder(options.data) if options.data else load_digits()
            reporting.prepare_output(options.output)
    dataset = broadcast_dataset(sets, options.limit, comm)

    torch.manual_seed(options.seed)
    net = build_net(dataset.train.images, dataset.classes).to(device)
    trainer = TRAINERS[options.optimizer](net, dataset.train, comm, options, device)
    with (
        reporting.Reporter(comm, options.epochs * trainer.steps_per_epoch) as reporter,
        make_preemption(trainer) as preemption,
    ):
        trainer.stops = preemption.requested
        results = resume(trainer, reporter)
        reporter.skip(trainer.steps_done)
        run_epochs(trainer, dataset, results, reporter, preemption)
    # An epoch of which a restarted job had nothing left to do has no rate.
    rate = harmonic_mean([result.samples_per_s for result in results if result.samples_per_s > 0] or [0.0])
    accuracy = 100 * results[-1].test_accuracy
    reporter.line(f"final test accuracy {accuracy:.2f} %, {rate:.0f} samples/s on {comm.size} rank(s)")
    figures = {"checksums": trainer.close(), **trainer.figures()}
    if comm.rank == 0:
        write_results(options, comm, results, figures)


if __name__ == "__main__":
    main()
