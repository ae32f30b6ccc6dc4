"""The GPT with mixtures of experts: every second perceptron becomes many, of which each byte uses two.

    rank 0                          rank 1
    attention                       attention          every rank its own windows
    gate                            gate
      rows ──────── all-to-all ───────── rows
    experts 0 1 2 3                 experts 4 5 6 7    every rank its own experts
      rows ──────── all-to-all ───────── rows
    attention ...                   attention ...

All but the experts is the same on all ranks, so it is data parallel. The experts are not, and three things
must take that into account:

* **Initialisation.** Each expert is made by a function, which the layer calls with random numbers that belong
  to the expert, wherever it lives. So the model does not depend on the number of ranks.
* **Losses.** The gate's own losses are over the batch of all ranks already; every rank adds them to its
  loss.
* **Clipping.** The norm of the gradient is that of the whole model, by `hpcpar.nn.clip_grad_norm_`. A rank
  that took the norm of what it has would scale by another number than its neighbours, and the common part
  would not stay common.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn

from expert_load import ExpertLoad
from gpt import Gpt, GptConfig, Mlp, initialise
from hpcpar.comm import Communicator
from hpcpar.nn import MixtureOfExperts, TopKGate

if TYPE_CHECKING:
    from trainer import Options

__all__ = ["count_parameters", "expert_layers", "gate_losses", "put_in_experts", "watch_load"]


def put_in_experts(net: Gpt, options: Options, comm: Communicator) -> None:
    """Replace the perceptron of every `experts_every`-th block. **Collective.**

    `comm` has the ranks that share the experts of a layer: those that train on different data.
    """
    device = net.token.weight.device
    for block in list(net.blocks)[options.experts_every - 1 :: options.experts_every]:
        gate = TopKGate(
            net.config.width,
            options.experts,
            top_k=options.top_k,
            balancing_coefficient=options.balancing,
            z_coefficient=options.z_loss,
        )
        experts = [functools.partial(make_expert, net.config)] * options.experts
        layer = MixtureOfExperts(gate, experts, comm, capacity_factor=options.capacity_factor)
        block.mlp = layer.to(device)


def make_expert(config: GptConfig) -> Mlp:
    """A perceptron with initial weights."""
    expert = Mlp(config)
    initialise(expert, config)
    return expert


def expert_layers(net: nn.Module) -> dict[str, MixtureOfExperts]:
    """The mixtures of a model, by name; empty without experts."""
    return {name: part for name, part in net.named_modules() if isinstance(part, MixtureOfExperts)}


def gate_losses(layers: Iterable[MixtureOfExperts]) -> torch.Tensor | int:
    """What the gates of the last forward add to the loss: the same value on every rank, with a graph."""
    gates = [layer.gate for layer in layers]
    return sum(gate.balancing_loss + gate.z_loss for gate in gates if isinstance(gate, TopKGate))


def watch_load(layers: dict[str, MixtureOfExperts]) -> ExpertLoad:
    """Count the rows of the experts, over all ranks of a layer, in every forward of training."""
    load = ExpertLoad(list(layers), max((layer.num_experts for layer in layers.values()), default=0))

    def count(index: int, layer: nn.Module, inputs: object, output: object) -> None:
        assert isinstance(layer, MixtureOfExperts)
        if layer.training and not layer.routing_memory.is_replay:  # a recomputation is no second forward
            load.add(index, layer.load)

    for index, layer in enumerate(layers.values()):
        layer.register_forward_hook(functools.partial(count, index))
    return load


def count_parameters(net: nn.Module) -> int:
    """Parameters of the whole model, with the experts of all ranks."""
    count = sum(parameter.numel() for parameter in net.parameters())
    for layer in expert_layers(net).values():
        here = sum(parameter.numel() for parameter in layer.experts.parameters())
        count += here * layer.num_experts // len(layer.experts) - here
    return count
