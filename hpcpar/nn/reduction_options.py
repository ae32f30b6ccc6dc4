"""How gradients are reduced: the choices that wrappers of models pass on, checked in one place."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hpcpar.comm import WIRE_DTYPES, TransportKind
from hpcpar.errors import MismatchError
from hpcpar.nn.progress_trial import PROGRESS_CHOICES

__all__ = ["ReductionOptions"]

_MIB = 1 << 20


class ReductionOptions:
    """How gradients are reduced; the keyword options of :class:`~hpcpar.nn.DataParallel`.

    Raises
    ------
    MismatchError
        For an option that is none of the choices.
    """

    def __init__(
        self,
        *,
        bucket_mb: float | None,
        blocking: bool,
        wire_dtype: torch.dtype | None,
        transport: str,
        progress: str,
    ) -> None:
        _check_choice("transport", transport, [kind.value for kind in TransportKind])
        _check_choice("progress", progress, PROGRESS_CHOICES)
        _check_choice("wire_dtype", wire_dtype, WIRE_DTYPES)
        self.bucket_bytes = 0 if blocking else int((8.0 if bucket_mb is None else bucket_mb) * _MIB)
        self.blocking = blocking
        self.wire_dtype = wire_dtype
        self.transport = transport
        self.progress = progress


def _check_choice(name: str, value: object, choices: Sequence[object]) -> None:
    if value not in choices:
        raise MismatchError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
