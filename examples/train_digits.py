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

The result does not depend on the number of ranks, up to rounding: the order of samples is a
function of seed and epoch, no sample is padded or dropped, and the net normalises each image by
itself (group norm, not batch norm) and has no dropout. Two of the optimizers give that up on purpose: DASO
and the collaborative one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

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
    trainer: digits_trainers.Trainer, dataset: Dataset, first: int, reporter: reporting.Reporter
) -> list[EpochResult]:
    """Train, evaluate and, if wanted, save, from the first of the epochs to the last. **Collective.**"""
    options, results = trainer.options, []
    for epoch in range(first, options.epochs + 1):
        trained = trainer.train_epoch(epoch, reporter)
        test_loss, accuracy = trainer.evaluate(dataset.test)
        figures = (trained.samples_per_s, trained.exposed_share, trained.note)
        results.append(EpochResult(epoch, trained.loss, test_loss, accuracy, *figures))
        reporter.line(str(results[-1]))
        if options.save and (epoch % options.save_every == 0 or epoch == options.epochs):
            save(options.save / f"epoch-{epoch}.h5", trainer, epoch)
    return results


def save(path: Path, trainer: digits_trainers.Trainer, epoch: int) -> None:
    """Write everything that the next epoch depends on. **Collective.**"""
    state = {"optimizer": trainer.options.optimizer, "epoch": epoch, "state": trainer.state_dict()}
    saved_run.write_shared(path, state, trainer.comm)


def resume(path: Path, trainer: digits_trainers.Trainer) -> int:
    """Read what `save` wrote. **Collective.** Returns the epochs done so far."""
    saved = saved_run.read_shared(path, trainer.comm)
    options, epoch = trainer.options, int(saved["epoch"])
    with common.user_errors_end_the_job(trainer.comm):
        if saved["optimizer"] != options.optimizer:
            raise common.UserError(f"--resume {path}: that is a training by --optimizer {saved['optimizer']}")
        if epoch >= options.epochs:
            raise common.UserError(f"--resume {path}: has {epoch} epochs, so --epochs must be more than that")
    trainer.load_state_dict(saved["state"])
    return epoch


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
            if options.resume and not options.resume.is_file():
                raise common.UserError(f"--resume {options.resume}: no such file")
            sets = load_idx_folder(options.data) if options.data else load_digits()
            reporting.prepare_output(options.output)
    dataset = broadcast_dataset(sets, options.limit, comm)

    torch.manual_seed(options.seed)
    net = build_net(dataset.train.images, dataset.classes).to(device)
    trainer = TRAINERS[options.optimizer](net, dataset.train, comm, options, device)
    done = resume(options.resume, trainer) if options.resume else 0
    with reporting.Reporter(comm.rank, (options.epochs - done) * trainer.steps_per_epoch) as reporter:
        results = run_epochs(trainer, dataset, done + 1, reporter)
    rate = harmonic_mean(result.samples_per_s for result in results)
    accuracy = 100 * results[-1].test_accuracy
    reporter.line(f"final test accuracy {accuracy:.2f} %, {rate:.0f} samples/s on {comm.size} rank(s)")
    figures = {"checksums": trainer.close(), **trainer.figures()}
    if comm.rank == 0:
        write_results(options, comm, results, figures)


if __name__ == "__main__":
    main()
