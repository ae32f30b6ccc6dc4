"""Assembly: from the arguments of a pipeline to its parts on this rank.

Every step that can fail on one rank only is agreed upon by all ranks of the pipeline, and by the replicas of
each of its stages, so that no rank is left in a collective that another will never enter.

Layers that are only described are built here, on the rank where they live, each with random numbers of its
own: a function of the job's seed and the layer's number, so that the weights of the model do not depend on
how many ranks it is spread over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import broadcast_packed
from hpcpar.comm.agreement import agree
from hpcpar.nn.model_signature import check_same_model
from hpcpar.nn.own_gradients import own_tensors
from hpcpar.nn.pipeline.batch_norm import convert_deferred_batch_norm
from hpcpar.nn.pipeline.blueprint import Blueprint
from hpcpar.nn.pipeline.layers import Layers
from hpcpar.nn.pipeline.plan import PipelinePlan
from hpcpar.nn.pipeline.randomness import LayerSeeds, mix
from hpcpar.nn.pipeline.reductions import PipelineReductions
from hpcpar.nn.pipeline.stage import Stage
from hpcpar.nn.reduction_options import ReductionOptions

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Assembly", "assemble"]

_SUBJECT = "a pipeline"
_WEIGHTS = -2  # tells the seeds of weights from those of layers at work


@dataclass(frozen=True)
class Assembly:
    """The parts of a pipeline on one rank.

    Attributes
    ----------
    balance : tuple of int
        Layers of each stage of the schedule that was asked for.
    plan : PipelinePlan
        What lives where; the same on all ranks.
    names : tuple of str
        Of all layers.
    stages : dict of int to Stage
        Those of this rank.
    device : torch.device
        Where they compute.
    seeds : LayerSeeds
        Their random numbers.
    reductions : PipelineReductions
        Of their gradients.
    """

    balance: tuple[int, ...]
    plan: PipelinePlan
    names: tuple[str, ...]
    stages: dict[int, Stage]
    device: torch.device
    seeds: LayerSeeds
    reductions: PipelineReductions


def assemble(
    module: Any,
    comm: Communicator,
    data: Communicator | None,
    container: nn.Module,
    *,
    options: dict[str, Any],
    device: torch.device | str | None,
    sample_input: Any,
) -> Assembly:
    """Plan the pipeline and build this rank's part of it. Collective over ``comm`` and ``data``.

    Parameters
    ----------
    module
        The model.
    comm, data
        The ranks of the pipeline; the replicas of this rank's stages.
    container
        Where this rank's layers are registered.
    options
        The arguments of :class:`~hpcpar.nn.Pipeline` that must be the same on all ranks.
    device, sample_input
        As there.

    Raises
    ------
    MismatchError, ScheduleError
        On every rank of every replica.
    """
    groups = [comm] if data is None else [comm, data]

    def draw() -> tuple[Layers, Blueprint, ReductionOptions]:
        layers = Layers(module)
        blueprint = Blueprint.draw(layers, comm, options=options, sample_input=sample_input)
        wire = {name: options[name] for name in ("bucket_mb", "wire_dtype", "transport")}
        return layers, blueprint, ReductionOptions(blocking=False, progress="hooks", **wire)

    layers, drawn, reduction = agree(groups, _SUBJECT, draw)
    blueprint = agree(groups, _SUBJECT, lambda: drawn.adopted_by_all(comm))
    plan = agree(groups, _SUBJECT, lambda: blueprint.plan(layers, options["reuse"]))
    mine = [stage for stage in plan.stages if stage.rank == comm.rank]
    indices = [index for stage in mine for index in stage.layers]
    deferred = bool(options["deferred_batch_norm"])
    agree(groups, _SUBJECT, lambda: _build(layers, indices, container, blueprint.seed, device, deferred))
    if data is not None:
        facts = {"plan": plan.describe(), **options}
        agree(groups, _SUBJECT, lambda: check_same_model(container, data, facts))
        apart = own_tensors(container)
        shared = [t for t in (*container.parameters(), *container.buffers()) if id(t) not in apart]
        broadcast_packed(shared, data, 0)
    parameter = next(container.parameters(), None)
    place = torch.device(device or ("cpu" if parameter is None else parameter.device))
    seeds = LayerSeeds(mix(blueprint.seed, 0 if data is None else data.rank), place)
    stages = {}
    for stage in mine:
        names = [layers.names[index] for index in stage.layers]
        stages[stage.index] = Stage(stage, [_child(container, name) for name in names], names, seeds)
    reductions = PipelineReductions(layers, plan, stages, comm, data, reduction)
    return Assembly(blueprint.balance, plan, layers.names, stages, place, seeds, reductions)


def _build(
    layers: Layers,
    indices: Sequence[int],
    container: nn.Module,
    seed: int,
    device: torch.device | str | None,
    deferred_batch_norm: bool,
) -> None:
    """Build layers and register them under their names in the unsplit model."""
    converted: dict[int, nn.Module] = {}
    for index in indices:
        layer = _build_layer(layers, index, seed)
        if deferred_batch_norm:
            if id(layer) not in converted:  # a layer may come twice
                converted[id(layer)] = convert_deferred_batch_norm(layer)
            layer = converted[id(layer)]
        # Not add_module: a layer may have the name of one of the container's attributes.
        container._modules[layers.names[index]] = layer if device is None else layer.to(device)


def _build_layer(layers: Layers, index: int, seed: int) -> nn.Module:
    if layers.is_built(index):
        return layers.build(index)
    with torch.random.fork_rng():
        torch.manual_seed(mix(seed, _WEIGHTS, layers.first_use(index)))
        return layers.build(index)


def _child(container: nn.Module, name: str) -> nn.Module:
    child = container._modules[name]
    assert child is not None
    return child
