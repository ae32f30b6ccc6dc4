"""Train a small convolutional net on handwritten digits, on any number of MPI ranks.

    python examples/train_digits.py                      # one process
    mpirun -n 4 python examples/train_digits.py          # four
    mpirun -n 4 python examples/train_digits.py --data /usr/share/datasets/fashion-mnist

The default data are the 1797 images of 8 x 8 pixels that scikit-learn brings along; ``--data``
takes a folder with the four IDX files of MNIST, Fashion-MNIST or a set like them.

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
itself (group norm, not batch norm) and has no dropout.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import harmonic_mean
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

import common
import hpcpar
import idx
import reporting
from hpcpar.comm import Communicator

OUTPUT = Path(__file__).resolve().parent / "output" / "digits"
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4


@dataclass(frozen=True)
class Options:
    """The command line."""

    data: Path | None
    limit: int | None
    epochs: int
    batch_size: int
    lr: float
    seed: int
    forward_overlap: bool
    blocking: bool
    device: str
    output: Path
    plot: bool


@dataclass(frozen=True)
class LabelledImages:
    """Images, bytes of shape (count, 1, height, width), and labels, int64 of shape (count,)."""

    images: torch.Tensor
    labels: torch.Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A training set, a test set and the number of classes."""

    train: LabelledImages
    test: LabelledImages
    classes: int


@dataclass(frozen=True)
class EpochResult:
    """What is reported of one epoch; the same on every rank."""

    epoch: int
    train_loss: float
    test_loss: float
    test_accuracy: float
    samples_per_s: float
    exposed_share: float

    def __str__(self) -> str:
        return (
            f"epoch {self.epoch:3d}  train loss {self.train_loss:.4f}  "
            f"test accuracy {100 * self.test_accuracy:6.2f} %  {self.samples_per_s:8.0f} samples/s  "
            f"exposed communication {100 * self.exposed_share:4.1f} %"
        )


# ------------------------------------------------------------------------------------------- data


def load_digits() -> tuple[LabelledImages, LabelledImages]:
    """scikit-learn's handwritten digits, every class divided 80 / 20 into training and test set."""
    try:
        from sklearn.datasets import load_digits as bundled_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise common.UserError(
            "the default data need scikit-learn: install it, or give --data DIR"
        ) from error
    pixels, labels = bundled_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels.reshape(-1, 8, 8).astype(np.uint8), labels, test_size=0.2, stratify=labels, random_state=0
    )
    return labelled_images(train_x, train_y), labelled_images(test_x, test_y)


def load_idx_folder(folder: Path) -> tuple[LabelledImages, LabelledImages]:
    """The training and test set of a folder with four IDX files."""
    train = labelled_images(*idx.read_labelled_images(folder, "train"))
    test = labelled_images(*idx.read_labelled_images(folder, "t10k"))
    if train.images.shape[1:] != test.images.shape[1:]:
        raise idx.IdxError(
            f"{folder}: training images are {tuple(train.images.shape[2:])} pixels, "
            f"but test images {tuple(test.images.shape[2:])}"
        )
    return train, test


def labelled_images(images: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> LabelledImages:
    """Tensors of bytes, with a channel axis."""
    return LabelledImages(torch.tensor(images).unsqueeze(1), torch.tensor(labels, dtype=torch.int64))


def broadcast_dataset(
    sets: tuple[LabelledImages, LabelledImages] | None, limit: int | None, comm: Communicator
) -> Dataset:
    """Give every rank what rank 0 has read. **Collective.**

    One rank reads the files: a thousand ranks opening the same ones is what file systems hate.
    """
    tensors = [None] * 4 if sets is None else [part for s in sets for part in (s.images, s.labels)]
    train_x, train_y, test_x, test_y = (common.broadcast_tensor(tensor, comm) for tensor in tensors)
    classes = int(max(train_y.max(), test_y.max())) + 1
    train_x, train_y, test_x, test_y = (each[:limit] for each in (train_x, train_y, test_x, test_y))
    return Dataset(LabelledImages(train_x, train_y), LabelledImages(test_x, test_y), classes)


def epoch_batches(samples: int, batch_size: int, seed: int, epoch: int) -> list[torch.Tensor]:
    """The global batches of an epoch: a permutation drawn from seed and epoch, cut into pieces.

    The last batch is as large as what is left. All ranks get the same list.
    """
    order = np.random.default_rng([seed, epoch]).permutation(samples)
    return list(torch.from_numpy(order).split(batch_size))


# ------------------------------------------------------------------------------------------ model


class Standardise(nn.Module):
    """Bytes in, floats out, with mean 0 and variance 1 over the images that it was made from.

    The two figures are buffers: they are saved with the model and `DataParallel` gives all ranks
    those of rank 0.
    """

    mean: torch.Tensor
    scale: torch.Tensor

    def __init__(self, images: torch.Tensor) -> None:
        super().__init__()
        values = images.float()
        self.register_buffer("mean", values.mean())
        self.register_buffer("scale", values.std(correction=0).clamp_min(1e-6))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return (images.float() - self.mean) / self.scale


def build_net(train_images: torch.Tensor, classes: int) -> nn.Sequential:
    """Two convolutions and two linear layers for images of one channel and at least 2 x 2 pixels."""
    return nn.Sequential(
        Standardise(train_images),
        nn.Conv2d(1, 32, 3, padding=1),
        nn.GroupNorm(8, 32),
        nn.GELU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.GroupNorm(8, 64),
        nn.GELU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.GELU(),
        nn.Linear(128, classes),
    )


class Trainer:
    """The wrapped model, its optimizer and the two loops, over training and test set."""

    def __init__(self, net: nn.Module, comm: Communicator, options: Options, device: torch.device) -> None:
        self.comm, self.options, self.device = comm, options, device
        self.sgd = torch.optim.SGD(
            net.parameters(), lr=options.lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY
        )
        self.optimizer: Any = self.sgd
        if options.forward_overlap:
            # The wrapped optimizer lets each layer's update wait until that layer runs again, so
            # that the reduction overlaps the next forward as well as the backward.
            self.optimizer = hpcpar.optim.DataParallelOptimizer(self.sgd)
            self.model = hpcpar.nn.DataParallel(net, comm, optimizer=self.optimizer)
        else:
            self.model = hpcpar.nn.DataParallel(net, comm, blocking_parameter_updates=options.blocking)

    def train_epoch(
        self, epoch: int, train: LabelledImages, reporter: reporting.Reporter
    ) -> tuple[float, float, float]:
        """Run one epoch. Returns mean loss, samples per second, exposed communication share."""
        batches = epoch_batches(len(train), self.options.batch_size, self.options.seed, epoch)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        exposed_before_s, start_s = self.model.stats().exposed_s, time.perf_counter()
        self.model.train()
        for number, batch in enumerate(batches):
            step = (epoch - 1) * len(batches) + number
            factor = common.warmup_cosine(step, self.options.epochs * len(batches), warmup_steps=0)
            loss_sum += self.train_step(batch, train, self.options.lr * factor)
            reporter.step()
        exposed_s = self.model.stats().exposed_s - exposed_before_s
        loss, exposed_s = common.sum_over_ranks(self.comm, float(loss_sum), exposed_s)
        wall_s = time.perf_counter() - start_s
        return loss / len(train), len(train) / wall_s, exposed_s / self.comm.size / wall_s

    def train_step(self, batch: torch.Tensor, train: LabelledImages, learning_rate: float) -> torch.Tensor:
        """One optimizer step on a global batch. Returns the summed loss of this rank's slice.

        A rank whose slice is empty does the same with a batch of size zero: its gradients are
        zeros and it takes part in the reduction.
        """
        mine = batch[common.shard(len(batch), self.comm.rank, self.comm.size)]
        images, labels = train.images[mine].to(self.device), train.labels[mine].to(self.device)
        self.optimizer.zero_grad()
        loss_sum = F.cross_entropy(self.model(images), labels, reduction="sum")
        common.local_loss(loss_sum, len(batch), self.comm.size).backward()
        common.set_learning_rate(self.sgd, learning_rate)
        self.optimizer.step()
        return loss_sum.detach()

    @torch.no_grad()
    def evaluate(self, test: LabelledImages) -> tuple[float, float]:
        """Mean loss and accuracy over the test set, of which each rank takes a slice. **Collective.**"""
        self.model.eval()
        mine = common.shard(len(test), self.comm.rank, self.comm.size)
        loss_sum, correct = 0.0, 0
        slices = test.images[mine].split(500), test.labels[mine].split(500)
        for images, labels in zip(*slices, strict=True):
            scores, labels = self.model(images.to(self.device)), labels.to(self.device)
            loss_sum += float(F.cross_entropy(scores, labels, reduction="sum"))
            correct += int((scores.argmax(dim=1) == labels).sum())
        loss, right = common.sum_over_ranks(self.comm, loss_sum, correct)
        return loss / len(test), right / len(test)


# ----------------------------------------------------------------------------------------- script


def build_parser() -> argparse.ArgumentParser:
    """The command line of this script."""
    parser = argparse.ArgumentParser(
        description="Train a small convolutional net on images of digits, data parallel over MPI ranks.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder with MNIST-like IDX files (plain or .gz)")
    add("--limit", type=common.positive_int, metavar="N", help="use only the first N images of each set")
    add("--epochs", type=common.positive_int, default=20, help="passes over the training set")
    add("--batch-size", type=common.positive_int, default=64, help="samples per step, over all ranks")
    add("--lr", type=common.positive_float, default=0.02, help="initial learning rate")
    add("--seed", type=common.non_negative_int, default=0, help="of the weights and the order of samples")
    overlap = parser.add_mutually_exclusive_group()
    overlap.add_argument("--forward-overlap", action="store_true", help="overlap reduction and next forward")
    overlap.add_argument("--blocking", action="store_true", help="reduce each gradient inside its hook")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where to compute")
    add("--output", type=Path, default=OUTPUT, metavar="DIR", help="for history and curves")
    add("--plot", action=argparse.BooleanOptionalAction, default=True, help="draw the curves")
    return parser


def write_results(options: Options, world_size: int, results: list[EpochResult]) -> None:
    """Write history and curves and print the last lines. For rank 0."""
    epochs = [result.epoch for result in results]
    history = {"options": asdict(options), "world_size": world_size, "epochs": [asdict(r) for r in results]}
    print(f"history: {reporting.write_history(options.output, history)}")
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


def main() -> None:
    """Read, train, report."""
    comm = hpcpar.comm.world()
    options = Options(**vars(common.parse_arguments(build_parser(), comm)))
    sets = None
    with common.user_errors_end_the_job(comm):
        device = common.choose_device(comm, options.device)
        if comm.rank == 0:
            sets = load_idx_folder(options.data) if options.data else load_digits()
            reporting.prepare_output(options.output)
    dataset = broadcast_dataset(sets, options.limit, comm)

    torch.manual_seed(options.seed)
    trainer = Trainer(build_net(dataset.train.images, dataset.classes).to(device), comm, options, device)
    results: list[EpochResult] = []
    steps = options.epochs * math.ceil(len(dataset.train) / options.batch_size)
    with reporting.Reporter(comm.rank, steps) as reporter:
        for epoch in range(1, options.epochs + 1):
            train_loss, samples_per_s, exposed_share = trainer.train_epoch(epoch, dataset.train, reporter)
            test_loss, accuracy = trainer.evaluate(dataset.test)
            results.append(EpochResult(epoch, train_loss, test_loss, accuracy, samples_per_s, exposed_share))
            reporter.line(str(results[-1]))
    rate = harmonic_mean(result.samples_per_s for result in results)
    reporter.line(f"final test accuracy {100 * accuracy:.2f} %, {rate:.0f} samples/s on {comm.size} rank(s)")
    if comm.rank == 0:
        write_results(options, comm.size, results)


if __name__ == "__main__":
    main()
