"""Random numbers that do not depend on how a model is cut, and contexts that a recomputation must restore.

Dropout draws from the process's generator, so its masks would depend on which layers share a rank, on the
schedule and on the order of arrival. Instead each layer that draws gets a seed of its own for each
microbatch, a function of

    (seed of the job, step, replica, microbatch, layer)

so a pipeline over any number of ranks, one included, under any schedule, draws the same masks, and a
recomputation draws those of the first time without anything being stored. Layers that cannot draw pay
nothing: those that consist of torch's own modules, dropout and the like excepted. Of any other nobody knows:
it may begin to draw in the thousandth step, when its rate is no longer zero.

The generator of the process is left as it was: what the user draws between steps is not disturbed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

__all__ = ["Contexts", "LayerSeeds", "may_draw", "mix", "without_autocast"]

_MASK = (1 << 64) - 1
_DRAWING = (
    nn.modules.dropout._DropoutNd,
    nn.MultiheadAttention,
    nn.RNNBase,
    nn.RReLU,
    nn.FractionalMaxPool2d,
    nn.FractionalMaxPool3d,
)


def mix(*numbers: int) -> int:
    """A 63-bit hash of some integers (the finaliser of SplitMix64, Steele et al. 2014). Local."""
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def may_draw(layer: object) -> bool:
    """Whether a layer, or a function, could use random numbers, now or later. Local."""
    if not isinstance(layer, nn.Module):
        return getattr(layer, "__module__", "") != "torch.nn.functional"  # of losses; dropout is none
    return any(
        isinstance(module, _DRAWING)
        or not type(module).__module__.startswith("torch.nn.modules.")
        or bool(module._forward_hooks or module._forward_pre_hooks)
        for module in layer.modules()
    )


class LayerSeeds:
    """Seeds the layers of one rank. Local.

    Parameters
    ----------
    seed
        The same on all ranks of a pipeline, another one in each of its data-parallel replicas.
    device
        Where the layers compute.
    """

    def __init__(self, seed: int, device: torch.device) -> None:
        self._seed = seed
        self._device = device
        self._steps = {True: 0, False: 0}
        self._training = True

    def begin(self, *, training: bool) -> None:
        """Count a step, those of training apart: evaluating must not change what training draws. Local."""
        self._training = training
        self._steps[training] += 1

    def seeded(self, number: int, microbatch: int, function: Callable[..., Any], *args: Any) -> Any:
        """``function(*args)``, with random numbers of its own for this microbatch. Local."""
        before = self._states()
        self._seed_generators(
            mix(self._seed, self._training, self._steps[self._training], microbatch, number)
        )
        try:
            return function(*args)
        finally:
            self._restore(before)

    def _states(self) -> list[torch.Tensor]:
        states = [torch.get_rng_state()]
        if self._device.type == "cuda":
            states.append(torch.cuda.get_rng_state(self._device))
        return states

    def _seed_generators(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed asks every kind of device
        if self._device.type == "cuda":
            torch.cuda.manual_seed(seed)

    def _restore(self, states: list[torch.Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(states[1], self._device)


@dataclass(frozen=True)
class Contexts:
    """What surrounded a forward: autocast on each kind of device."""

    autocast: tuple[tuple[str, bool, torch.dtype], ...]

    @classmethod
    def capture(cls, device: torch.device) -> Contexts:
        """The present contexts of this thread. Local."""
        kinds = ["cpu"] if device.type == "cpu" else ["cpu", device.type]
        return cls(tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in kinds))

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Enter them again, without autocast's cache of converted weights.

        The cache would hand a weight converted under ``no_grad`` to the recomputation, which needs one that
        is connected to the parameter.
        """
        with ExitStack() as stack:
            for kind, enabled, dtype in self.autocast:
                if enabled or torch.is_autocast_enabled(kind):
                    stack.enter_context(
                        torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False)
                    )
            yield


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """Backward runs outside of autocast, whatever surrounds the step: operations keep their types. Local."""
    kinds = [kind for kind in {"cpu", device.type} if torch.is_autocast_enabled(kind)]
    if not kinds:
        return nullcontext()  # the rule, and this is called for each action
    stack = ExitStack()
    for kind in kinds:
        stack.enter_context(torch.autocast(kind, enabled=False))
    return stack
