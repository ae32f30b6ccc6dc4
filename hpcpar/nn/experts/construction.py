"""Construction: the experts of one rank, built so that nothing depends on how many ranks there are.

A factory draws its weights under a seed of its expert, derived from one number that rank 0 draws. Every rank
draws such a number, so that the generators of all ranks stay in step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.batch_norm import SyncBatchNorm
from hpcpar.nn.experts.gate import check_top_k
from hpcpar.nn.model_signature import describe

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["Expert", "build_experts", "describe_layer", "draw_seed"]

Expert = nn.Module | Callable[[], nn.Module]


def describe_layer(
    gate: nn.Module,
    experts: Sequence[Expert],
    top_k: int | None,
    capacity_factor: float | None,
    shared_expert: nn.Module | None,
) -> list[str]:
    """Check the arguments of a layer, and say in some lines what must be the same on all ranks. Local.

    Raises
    ------
    MismatchError
        For arguments that make no sense.
    """
    _check_experts(experts)
    if top_k is not None:
        check_top_k(top_k)
    if capacity_factor is not None and not 0.0 < capacity_factor < float("inf"):
        raise MismatchError(f"capacity_factor must be a positive number or None, got {capacity_factor!r}")
    outputs = getattr(gate, "num_experts", getattr(gate, "out_features", len(experts)))
    if outputs != len(experts):
        raise MismatchError(
            f"a gate must have an output for each of {len(experts)} experts, got {outputs} outputs"
        )
    options = {name: value for name, value in vars(gate).items() if isinstance(value, (bool, int, float))}
    options.pop("training", None)
    kinds = "".join("m" if isinstance(expert, nn.Module) else "f" for expert in experts)
    lines = [f"{len(experts)} experts, modules (m) or factories (f): {kinds}"]
    lines += [f"top_k={top_k}", f"capacity_factor={capacity_factor}", f"gate options {options}"]
    lines += [f"gate {line}" for line in describe(gate)]
    if shared_expert is not None:
        lines += ["with a shared expert", *(f"shared {line}" for line in describe(shared_expert))]
    return lines


def _check_experts(experts: Sequence[Expert]) -> None:
    if not experts:
        raise MismatchError("a mixture of experts must have at least one expert, got none")
    for index, expert in enumerate(experts):
        if not callable(expert):
            raise MismatchError(
                "an expert must be a module or a function without arguments that makes one, got "
                f"{type(expert).__name__} for expert {index}"
            )
    modules = [id(expert) for expert in experts if isinstance(expert, nn.Module)]
    if len(set(modules)) < len(modules):
        raise MismatchError(
            "each expert must be a module of its own, got one module several times. Use copy.deepcopy, or "
            "pass factories"
        )
    given = [expert for expert in experts if isinstance(expert, nn.Module)]
    tensors = [id(p) for expert in given for p in dict.fromkeys(expert.parameters())]
    if len(set(tensors)) < len(tensors):
        raise MismatchError(
            "experts must not share parameters, which would be on different ranks, got some that do. Share "
            "what all need by shared_expert, or outside of the layer"
        )
    if any(isinstance(part, SyncBatchNorm) for expert in given for part in expert.modules()):
        raise MismatchError(
            "an expert must not synchronise over ranks, which have other experts, got a SyncBatchNorm. Use "
            "nn.BatchNorm1d: an expert sees its rows of all ranks anyway"
        )


def draw_seed(experts: Sequence[Expert], comm: Communicator) -> int:
    """The seed of the layer, the same on all ranks. Collective; draws if there are factories."""
    if all(isinstance(expert, nn.Module) for expert in experts):
        return 0
    seed = torch.empty((), dtype=torch.int64).random_()
    comm.Bcast(seed, 0)
    return int(seed)


def build_experts(experts: Sequence[Expert], local: Iterable[int], seed: int) -> dict[str, nn.Module]:
    """The experts with the numbers ``local``, by number. Local; leaves the generators as they were.

    Raises
    ------
    MismatchError
        When a factory makes something else than a module.
    """
    found = {}
    for index in local:
        expert = experts[index]
        module = expert if isinstance(expert, nn.Module) else _made(expert, seed + index)
        if not isinstance(module, nn.Module):
            raise MismatchError(
                f"the factory of an expert must make a module, got {type(module).__name__} for expert {index}"
            )
        found[str(index)] = module
    return found


def _made(factory: Callable[[], nn.Module], seed: int) -> nn.Module:
    cuda = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if cuda else []):
        torch.default_generator.manual_seed(seed & (2**63 - 1))
        if cuda:
            torch.cuda.manual_seed_all(seed & (2**63 - 1))
        return factory()
