"""Partition: which layers make a stage, what they cost, and what memory a stage will need.

::

    costs      4  1  1  1  2  1      three stages
    balance    1  2     3            blocks of 4, 2 and 4: no cut has a largest block below 4

Stages are contiguous, and a pipeline is as slow as its slowest stage, so the largest block is made as small
as possible: exactly, by dynamic programming. Of all such cuts, of which alike layers have many, the one with
the most even numbers of layers is taken, larger stages last: a late stage keeps the activations of fewer
microbatches.

Costs are measured rather than derived. Layers run one after another on one process, on one microbatch, each
forward and backward by itself: values between them are cut off from the graph, as they are between ranks. A
layer that is only described is built for its own measurement and dropped, so the model need not fit. Nothing
of the user's changes: gradients are computed but not accumulated, and buffers and random numbers put back.
"""

from __future__ import annotations

import statistics
import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, pairwise
from math import inf, isfinite
from typing import Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.pipeline.layers import Layers, LayerSpec, SpecUse, Use
from hpcpar.nn.pipeline.microbatch import split
from hpcpar.nn.pipeline.skip import SkipName, SkipTracker, use_tracker
from hpcpar.nn.pipeline.structure import flatten, map_tensors

__all__ = [
    "LayerProfile",
    "StageMemory",
    "balance_layers",
    "check_balance",
    "estimate_memory",
    "profile_layers",
]

# Sums of costs in another order differ in their last digits, which must not decide between cuts.
_TOLERANCE = 1e-9


# ---- balance -----------------------------------------------------------------------------------------------


def balance_layers(costs: Sequence[float], parts: int) -> list[int]:
    """Cut layers into contiguous blocks whose largest cost is as small as possible. Local.

    Parameters
    ----------
    costs
        Of the layers in order, in any unit; zero is allowed.
    parts
        Number of blocks; each has at least one layer.

    Returns
    -------
    list of int
        Number of layers of each block.

    Raises
    ------
    MismatchError
        When there are fewer layers than blocks, or a cost is negative or not finite.
    """
    _check_parts(len(costs), parts)
    for layer, cost in enumerate(costs):
        if not isfinite(cost) or cost < 0:
            raise MismatchError(f"the cost of a layer must be zero or more, got {cost} for layer {layer}.")
    sums = [0.0, *accumulate(map(float, costs))]
    return _most_even(sums, parts, _smallest_maximum(sums, parts) * (1 + _TOLERANCE))


def _smallest_maximum(sums: list[float], parts: int) -> float:
    """The cost of the largest block in the best cut; ``sums[i]`` is the cost of the first ``i`` layers."""
    layers = len(sums) - 1
    best = sums[:]  # best[end]: of the first `end` layers, cut into as many blocks as there were rounds
    for blocks in range(2, parts + 1):
        previous, best = best, [inf] * (layers + 1)
        for end in range(blocks, layers + 1):
            # As the last block starts later, it gets cheaper and what is before it dearer: the best start is
            # the first at which the latter weighs more, or the one before.
            starts = range(blocks - 1, end)
            crossing = bisect_left(starts, True, key=lambda start: previous[start] >= sums[end] - sums[start])
            for start in starts[max(0, crossing - 1) : crossing + 1]:
                best[end] = min(best[end], max(previous[start], sums[end] - sums[start]))
    return best[layers]


def _most_even(sums: list[float], parts: int, limit: float) -> list[int]:
    """The cut into blocks of at most ``limit`` with the smallest sum of squared numbers of layers."""
    layers = len(sums) - 1
    best = [0.0] + [inf] * layers
    starts_of: list[list[int]] = []
    for blocks in range(1, parts + 1):
        previous, best = best, [inf] * (layers + 1)
        starts = [0] * (layers + 1)
        for end in range(blocks, layers - parts + blocks + 1):
            for start in range(end - 1, blocks - 2, -1):
                if sums[end] - sums[start] > limit:
                    break
                squares = previous[start] + (end - start) ** 2
                if squares <= best[end]:  # of equal ones the earlier start: larger blocks last
                    best[end], starts[end] = squares, start
        starts_of.append(starts)
    ends = [layers]
    for starts in reversed(starts_of):
        ends.append(starts[ends[-1]])
    return [end - start for start, end in pairwise(reversed(ends))]


def check_balance(balance: Sequence[int], layers: int, parts: int) -> list[int]:
    """A user's numbers of layers for each block, checked. Local.

    Raises
    ------
    MismatchError
        When they are not ``parts`` positive integers that sum to ``layers``.
    """
    _check_parts(layers, parts)
    counts = list(balance)
    if len(counts) != parts:
        raise MismatchError(f"balance must have a number for each of {parts} stages, got {counts}.")
    if any(type(count) is not int or count < 1 for count in counts):
        raise MismatchError(f"balance must give at least one layer to each stage, got {counts}.")
    if sum(counts) != layers:
        raise MismatchError(f"balance must sum to the {layers} layers, got {counts}, which is {sum(counts)}.")
    return counts


def _check_parts(layers: int, parts: int) -> None:
    if parts < 1:
        raise MismatchError(f"a pipeline must have at least one stage, got {parts}.")
    if parts > layers:
        raise MismatchError(
            f"a pipeline must have at least one layer per stage, got {parts} stages for {layers} layers. Use "
            "fewer ranks or chunks."
        )


# ---- memory ------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class StageMemory:
    """Estimated bytes of one stage; the total is the sum of the others."""

    stage: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    total_bytes: int


def estimate_memory(
    profiles: Sequence[LayerProfile],
    balance: Sequence[int],
    peak_activations: Sequence[int],
    *,
    optimizer_states: int = 2,
) -> list[StageMemory]:
    """Estimate the memory of each stage. Local.

    It is an upper bound for activations, since a storage that two layers save is counted twice, and knows
    nothing of temporary memory within a layer or of buffers for messages.

    Parameters
    ----------
    profiles
        Of all layers.
    balance
        Number of layers of each stage.
    peak_activations
        For each stage, of how many microbatches it keeps the activations at most; its schedule tells.
    optimizer_states
        Tensors like the parameters that the optimizer keeps: 2 for Adam, 0 for plain SGD.

    Raises
    ------
    MismatchError
        When the numbers of layers or stages do not fit together.
    """
    counts = check_balance(balance, len(profiles), len(peak_activations))
    stages, start = [], 0
    for stage, (count, peak) in enumerate(zip(counts, peak_activations, strict=True)):
        block = profiles[start : start + count]
        start += count
        parameters = sum(profile.parameter_bytes for profile in block)
        optimizer = optimizer_states * parameters
        activations = (sum(profile.saved_bytes for profile in block) + block[-1].output_bytes) * peak
        total = 2 * parameters + optimizer + activations
        stages.append(StageMemory(stage, parameters, parameters, optimizer, activations, total))
    return stages


# ---- measuring ---------------------------------------------------------------------------------------------


def profile_layers(layers: Layers, sample_input: Any, *, repetitions: int = 3) -> list[LayerProfile]:
    """Measure all layers on this process. Local.

    Parameters
    ----------
    layers
        Run as they are, in their mode (``train()`` or ``eval()``) and on their devices; those built for the
        measurement are moved to the device of what they get.
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
