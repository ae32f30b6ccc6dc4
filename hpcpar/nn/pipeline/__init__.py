"""Pipeline parallelism: a model cut into stages that pass activations on and gradients back."""

from hpcpar.nn.pipeline.builders import build_schedule
from hpcpar.nn.pipeline.layers import LayerSpec
from hpcpar.nn.pipeline.microbatch import Whole
from hpcpar.nn.pipeline.pipeline import Pipeline
from hpcpar.nn.pipeline.schedule import Action, Kind, Schedule
from hpcpar.nn.pipeline.simulate import Simulation, simulate
from hpcpar.nn.pipeline.skip import Namespace, pop, skippable, stash
from hpcpar.nn.pipeline.timeline import Span, Timeline

__all__ = [
    "Action",
    "Kind",
    "LayerSpec",
    "Namespace",
    "Pipeline",
    "Schedule",
    "Simulation",
    "Span",
    "Timeline",
    "Whole",
    "build_schedule",
    "pop",
    "simulate",
    "skippable",
    "stash",
]
