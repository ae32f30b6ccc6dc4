"""Random numbers of one request: drawn from a generator of its own, not from the process's.

A process has one generator per device, and torch's layers draw from it. A server thread that seeded it for a
request would change what the program's own dropout draws at that moment in another thread, and the other way
round. So the operations that a block runs are looked at, in this thread only, and those that draw are given
another generator::

    expert(x) ──> dropout ──> aten.bernoulli_(x, 0.9)              process's generator, untouched
                              aten.bernoulli_(x, 0.9, generator=)  the request's, from its seed

Operations that draw and take no generator are few (``rand_like`` and its kin on older versions of torch);
they run with the process's generator, under a seed from the private one, and its state is put back.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from hpcpar.errors import HpcparError

__all__ = ["PrivateRandom"]


class PrivateRandom(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A block whose random numbers come from a seed, and disturb nobody's. Local; for one thread.

    Parameters
    ----------
    seed
        Of the generators, one for each device that draws.

    Attributes
    ----------
    has_drawn : bool
        Whether anything was drawn so far.

    Raises
    ------
    HpcparError
        Inside of the block, when a backward pass draws: a part of the module is computed again, by
        activation checkpointing, and would draw other numbers than before.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed
        self.has_drawn = False
        self._generators: dict[torch.device, torch.Generator] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, with a generator if it draws."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if not _draws(func, args, kwargs):
            return func(*args, **kwargs)
        if torch._C._current_graph_task_id() != -1:
            raise HpcparError(
                "an expert that draws random numbers must not use activation checkpointing inside, got "
                f"{func} in its backward pass. A server computes an expert's forward again anyway"
            )
        self.has_drawn = True
        generator = self._generator(_device_of(args, kwargs))
        if func is torch.ops.aten.native_dropout.default:
            return _dropout(*args, generator=generator, **kwargs)
        taking = _with_generator(func)
        if taking is not None:
            return taking(*args, **{**kwargs, "generator": generator})
        return self._run_seeded(func, args, kwargs, generator)

    def _generator(self, device: torch.device) -> torch.Generator:
        if device not in self._generators:
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        return self._generators[device]

    @staticmethod
    def _run_seeded(func: Any, args: Any, kwargs: Any, generator: torch.Generator) -> Any:
        devices = [generator.device] if generator.device.type == "cuda" else []
        seed = int(torch.empty((), dtype=torch.int64, device=generator.device).random_(generator=generator))
        with torch.random.fork_rng(devices):
            torch.default_generator.manual_seed(seed)
            for device in devices:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            return func(*args, **kwargs)


def _draws(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether this call draws: attention may drop weights, and draws only then."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool(args[place] if place < len(args) else kwargs.get("dropout_p", 0.0))


def _device_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.device:
    """Of the tensor that the operation works on, or of the one that it makes."""
    tensors = (value for value in args if isinstance(value, torch.Tensor))
    first = next(tensors, None)
    device = torch.device(kwargs.get("device") or "cpu") if first is None else first.device
    return torch.device("cuda", torch.cuda.current_device()) if str(device) == "cuda" else device


def _dropout(
    x: torch.Tensor, p: float, train: bool | None, *, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a GPU's fused dropout returns: the outputs, and the mask for the backward."""
    mask = torch.empty_like(x, dtype=torch.bool)
    if train is False:
        return x.clone(), mask.fill_(True)
    mask.bernoulli_(1.0 - p, generator=generator)
    return x * mask * (1.0 / (1.0 - p) if p < 1.0 else 0.0), mask


@functools.cache
def _with_generator(func: Any) -> Any:
    """The operation, or its overload, that takes a generator; ``None`` when there is none."""
    if "generator" in dict(_arguments(func)):
        return func
    for name in func.overloadpacket.overloads():
        overload = getattr(func.overloadpacket, name)
        others = [argument for argument in _arguments(overload) if argument[0] != "generator"]
        if others == _arguments(func) and len(others) < len(_arguments(overload)):
            return overload
    return None


def _arguments(func: Any) -> list[tuple[str, str]]:
    return [(argument.name, str(argument.type)) for argument in func._schema.arguments]
