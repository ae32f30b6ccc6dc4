"""The state of all random numbers of a process, as tensors and numbers."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from hpcpar.checkpoint.tree import PerRank
from hpcpar.errors import CheckpointError

__all__ = ["load_rng_state", "rng_state"]


def rng_state() -> dict[str, Any]:
    """The generators of ``random``, of numpy (the global one), of torch, and of CUDA if it is in use. Local.

    Save it as ``PerRank(rng_state())``: ranks draw different numbers.
    """
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # noqa: NPY002 - the one in use
    uses_cuda = torch.cuda.is_available() and torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return {
        "python": {"version": version, "words": np.array(words, dtype=np.uint32), "gauss": gauss},
        "numpy": {
            "name": name,
            "keys": np.array(keys),
            "position": position,
            "has_gauss": has_gauss,
            "cached": cached,
        },
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if uses_cuda else [],
    }


def load_rng_state(state: Mapping[str, Any] | PerRank[Any] | None) -> None:
    """Go on with the numbers that would have followed :func:`rng_state`. Local.

    Parameters
    ----------
    state
        What that returned, after a checkpoint or not. ``None``, which is what a rank loads that did not exist
        when the checkpoint was saved, leaves the generators as they are.

    Raises
    ------
    CheckpointError
        For anything else.
    """
    found: Any = state.value if isinstance(state, PerRank) else state
    if found is None:
        return
    try:
        python, legacy = found["python"], found["numpy"]
        words = tuple(int(word) for word in python["words"])
        random.setstate((python["version"], words, python["gauss"]))
        np.random.set_state(  # noqa: NPY002 - the one in use
            (legacy["name"], legacy["keys"], legacy["position"], legacy["has_gauss"], legacy["cached"])
        )
        torch.set_rng_state(found["torch"])
        if found["cuda"] and torch.cuda.is_available():
            devices = range(min(len(found["cuda"]), torch.cuda.device_count()))
            for device in devices:
                torch.cuda.set_rng_state(found["cuda"][device], device)
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"a state of random numbers must come from rng_state(), got {error!r}"
        ) from error
