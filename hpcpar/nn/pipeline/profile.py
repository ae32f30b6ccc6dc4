"""Profiles: what each layer of a model costs, measured.

Layers run one after another on one process, on one microbatch, each forward and backward by itself: values
between them are cut off from the graph, as they are between ranks. A layer that is only described is built
for its own measurement and dropped, so the model need not fit. Nothing of the user's changes: gradients are
computed but not accumulated, and buffers and random numbers put back.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.layers import Layers, LayerSpec, SpecUse, Use
from hpcpar.nn.pipeline.microbatch import split
from hpcpar.nn.pipeline.skip import SkipName, SkipTracker, use_tracker
from hpcpar.nn.pipeline.structure import flatten, map_tensors

__all__ = ["LayerProfile", "profile_layers"]


@dataclass(frozen=True)
class LayerProfile:
    """What one layer costs for one microbatch.

    Attributes
    ----------
    name : str
        Of the layer in its model.
    parameters, parameter_bytes : int
        Elements and bytes of its parameters; of tied layers, at the first one only.
    forward_s, backward_s : float
        Medians in seconds; a backward pass without anything to differentiate takes 0.
    saved_bytes : int
        Bytes kept from forward to backward besides parameters and buffers.
    output_bytes : int
        Bytes in the tensors that the layer returns.
    """

    name: str
    parameters: int
    parameter_bytes: int
    forward_s: float
    backward_s: float
    saved_bytes: int
    output_bytes: int


def profile_layers(
    model: Layers | nn.Module | Sequence[nn.Module | LayerSpec], sample_input: Any, *, repetitions: int = 3
) -> list[LayerProfile]:
    """Measure all layers on this process. Local.

    Parameters
    ----------
    model
        As a pipeline takes it. Layers run as they are, in their mode (``train()`` or ``eval()``) and on
        their devices; those built for the measurement are moved to the device of what they get.
    sample_input
        One microbatch, as the first layer gets it; parts may be marked ``Whole``.
    repetitions
        Timed runs of each layer, after one that is not timed.

    Returns
    -------
    list of LayerProfile
        One for each layer. What a layer keeps elsewhere than in tensors saved for backward is not seen.

    Raises
    ------
    MismatchError
        For an input that cannot be a microbatch, or less than one repetition.
    """
    if repetitions < 1:
        raise MismatchError(f"repetitions must be 1 or more, got {repetitions}.")
    layers = model if isinstance(model, Layers) else Layers(model)
    value = map_tensors(_cut_off, split(sample_input, 1)[0].value)
    device = flatten(value)[0][0].device
    workshop = _Workshop(layers, device)
    profiles = []
    with _random_numbers_kept(device), torch.enable_grad(), use_tracker(_CuttingTracker()) as tracker:
        for index in range(len(layers)):
            profile, value = _profile_layer(workshop, index, value, tracker, repetitions)
            profiles.append(profile)
    return profiles


def _profile_layer(
    workshop: _Workshop, index: int, value: Any, tracker: _CuttingTracker, repetitions: int
) -> tuple[LayerProfile, Any]:
    """Measure one layer, which is gone afterwards if it was built for that; and what it returns."""
    module = workshop.module(index)
    saved = _SavedBytes(module)
    with _buffers_kept(module):
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
            _run(module, value, tracker)
        runs = [_run(module, value, tracker) for _ in range(repetitions)]
    output = runs[-1].output
    parameters = workshop.new_parameters(index, module)
    profile = LayerProfile(
        name=workshop.layers.names[index],
        parameters=sum(parameter.numel() for parameter in parameters),
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        forward_s=statistics.median(run.forward_s for run in runs),
        backward_s=statistics.median(run.backward_s for run in runs),
        saved_bytes=saved.total(),
        output_bytes=sum(tensor.nbytes for tensor in flatten(output)[0]),
    )
    return profile, output


class _Workshop:
    """Builds described layers, and keeps those that are used more than once."""

    def __init__(self, layers: Layers, device: torch.device) -> None:
        self.layers = layers
        self._device = device
        self._shared: dict[LayerSpec, nn.Module] = {}
        self._seen: set[int] = set()

    def module(self, index: int) -> nn.Module:
        spec = self.layers.spec(index)
        if spec is None or self.layers.is_built(index):
            return self.layers.build(index)
        module = self._shared[spec] if spec in self._shared else spec.build().to(self._device)
        if self._is_shared(spec):
            self._shared[spec] = module
        item = self.layers.items[index]
        return Use(module, item.function) if isinstance(item, SpecUse) else module

    def new_parameters(self, index: int, module: nn.Module) -> list[nn.Parameter]:
        """Those that no earlier layer has. Only ids of objects that live on are remembered."""
        parameters = [parameter for parameter in module.parameters() if id(parameter) not in self._seen]
        spec = self.layers.spec(index)
        if spec is None or self.layers.is_built(index) or self._is_shared(spec):
            self._seen.update(map(id, parameters))
        return parameters

    def _is_shared(self, spec: LayerSpec) -> bool:
        return sum(self.layers.spec(index) is spec for index in range(len(self.layers))) > 1


class _SavedBytes:
    """Counts the storages that a forward pass saves, without those of the module's own tensors."""

    def __init__(self, module: nn.Module) -> None:
        tensors = (*module.parameters(), *module.buffers())
        self._own = {_storage_key(tensor) for tensor in tensors if tensor.layout == torch.strided}
        self._saved: dict[int, torch.Tensor] = {}

    def pack(self, tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach()  # an output that saved itself would never be freed
        if tensor.layout == torch.strided and (key := _storage_key(tensor)) not in self._own:
            self._saved[key] = tensor  # which keeps its address from being used again
        return tensor

    def total(self) -> int:
        """Bytes of the distinct storages, which are let go."""
        total = sum(tensor.untyped_storage().nbytes() for tensor in self._saved.values())
        self._saved.clear()
        return total


def _storage_key(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass(frozen=True, eq=False)
class _Run:
    output: Any
    forward_s: float
    backward_s: float


def _run(module: nn.Module, value: Any, tracker: _CuttingTracker) -> _Run:
    """One forward and backward pass, without touching ``.grad``."""
    ends = tracker.begin()
    value = map_tensors(ends.enter, value)
    with _timed(ends.inputs) as forward:
        output = module(value)
    outputs = [t for t in (*flatten(output)[0], *ends.outputs) if t.requires_grad]
    inputs = [t for t in (*ends.inputs, *module.parameters()) if t.requires_grad]
    gradients = [torch.ones_like(t) for t in outputs]
    with _timed(ends.inputs) as backward:
        if outputs and inputs:
            torch.autograd.grad(outputs, inputs, gradients, allow_unused=True)
    return _Run(map_tensors(_cut_off, output), forward.seconds, backward.seconds if outputs else 0.0)


class _Ends:
    """Where the graph of one run begins and ends: skips go in and out as well as arguments."""

    def __init__(self) -> None:
        self.inputs: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []

    def enter(self, tensor: torch.Tensor) -> torch.Tensor:
        leaf = _cut_off(tensor)
        self.inputs.append(leaf)
        return leaf.clone()  # layers may change what they get in place, which a leaf forbids


class _CuttingTracker(SkipTracker):
    """Hands skips from layer to layer cut off from the graph."""

    def begin(self) -> _Ends:
        """Ends for a new run."""
        self._ends = _Ends()
        return self._ends

    def stash(self, name: SkipName, value: Any) -> None:
        self._ends.outputs += flatten(value)[0]
        super().stash(name, map_tensors(_cut_off, value))

    def pop(self, name: SkipName) -> Any:
        return map_tensors(self._ends.enter, super().pop(name))


def _cut_off(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().requires_grad_(tensor.requires_grad)


class _Stopwatch:
    seconds = 0.0


@contextmanager
def _timed(tensors: Sequence[torch.Tensor]) -> Iterator[_Stopwatch]:
    """Time the block, on an accelerator up to the end of what it has started there."""
    devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
    stopwatch = _Stopwatch()
    for device in devices:
        torch.accelerator.synchronize(device)
    start = time.perf_counter()
    yield stopwatch
    for device in devices:
        torch.accelerator.synchronize(device)
    stopwatch.seconds = time.perf_counter() - start


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    on_cpu = device.type == "cpu"  # whose generator is kept in any case
    with torch.random.fork_rng([] if on_cpu else [device], device_type="cuda" if on_cpu else device.type):
        yield


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Put back contents and identity of all buffers, such as running statistics."""
    kept = [
        (part, name, buffer, None if buffer is None else buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for part, name, buffer, contents in kept:
                part._buffers[name] = buffer
                if buffer is not None and contents is not None and not torch.equal(buffer, contents):
                    buffer.copy_(contents)
