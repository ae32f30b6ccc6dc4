"""Another run beside this one: `--compare FILE` reads its `history.json`, which each run writes.

Its curves are drawn into the same panels, and a line says how far the losses are apart. The file is read
before the training, so it may be the one that is written over at the end.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import UserError
from reporting import Curve

__all__ = ["ComparedRun", "read_compared_run"]

LOSSES = ("train_loss", "validation_loss")


@dataclass(frozen=True)
class ComparedRun:
    """The evaluations of a run, as in its history, and a name for it."""

    name: str
    evaluations: Sequence[Mapping[str, float]]

    def curve(self, label: str, key: str) -> Curve:
        """One of its figures over the steps."""
        steps = [each["step"] for each in self.evaluations]
        return f"{label}, {self.name}", steps, [each[key] for each in self.evaluations]

    def difference(self, evaluations: Sequence[Mapping[str, float]]) -> str:
        """A line that says how far the losses of another run are from this one's at most."""
        theirs = {each["step"]: each for each in self.evaluations}
        differences = [
            (abs(each[key] - theirs[each["step"]][key]), each["step"])
            for each in evaluations
            for key in LOSSES
            if each["step"] in theirs
        ]
        if not differences:
            return f"compared with {self.name}: it has no evaluation at a step of this run"
        largest, step = max(differences)
        return (
            f"compared with {self.name}: losses differ by at most {largest:.2g} nats per byte (step {step}), "
            f"{len(differences) // len(LOSSES)} evaluations"
        )


def read_compared_run(path: Path) -> ComparedRun:
    """Read a history. Raises `UserError` when the file is missing, or none of `train_text.py`."""
    try:
        evaluations: Any = json.loads(path.read_text(encoding="utf-8"))["evaluations"]
        needed = {"step", "bytes_per_s", *LOSSES}
        if not all(needed <= each.keys() for each in evaluations):
            raise KeyError(f"one of {', '.join(sorted(needed))}")
    except OSError as error:
        raise UserError(f"--compare {path}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--compare {path}: is no history of this script ({error})") from error
    return ComparedRun(path.resolve().parent.name, evaluations)
