"""Pipeline parallelism: a model cut into stages that pass activations on and gradients back."""

from hpcpar.nn.pipeline.builders import build_schedule
from hpcpar.nn.pipeline.layers import LayerSpec
from hpcpar.nn.pipeline.memory import StageMemory, estimate_memory
from hpcpar.nn.pipeline.microbatch import Whole
from hpcpar.nn.pipeline.pipeline import Pipeline
from hpcpar.nn.pipeline.profile import LayerProfile, profile_layers
from hpcpar.nn.pipeline.recorder import PipelineStats
from hpcpar.nn.pipeline.schedule import Action, Kind, Schedule
from hpcpar.nn.pipeline.simulate import Simulation, simulate
from hpcpar.nn.pipeline.skip import Namespace, pop, skippable, stash
from hpcpar.nn.pipeline.timeline import Span, Timeline

__all__ = [
    "Action",
    "Kind",
    "LayerProfile",
    "LayerSpec",
    "Namespace",
    "Pipeline",
    "PipelineStats",
    "Schedule",
    "Simulation",
    "Span",
    "StageMemory",
    "Timeline",
    "Whole",
    "build_schedule",
    "estimate_memory",
    "pop",
    "profile_layers",
    "simulate",
    "skippable",
    "stash",
]
