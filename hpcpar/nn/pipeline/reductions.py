"""Gradients that several ranks must add up: replicas of a stage, and copies of a parameter on several stages.

::

                 stage 0 (embedding)      stage 1      stage 2 (head, a copy of the embedding)
    replica 0        rank 0                rank 1          rank 2
    replica 1        rank 3                rank 4          rank 5

    data parallel    0 ~ 3                 1 ~ 4           2 ~ 5         mean, bucket by bucket, from the
                                                                         last backward of each stage on
    copies           0 ~ 2,  3 ~ 5                                       sum, when all backwards are done
    experts          those that have the same ones                       mean, when all backwards are done

The mean over replicas starts inside the last backward of each stage, which comes at different times on
different ranks: the last stages reduce while the first still compute (the cool-down). Parameters in several
stages of one rank are complete only at the end, and have a reduction of their own.

Invariant: gradients that were there before the step (accumulation) count once. All replicas hold the same, or
under ``no_sync`` their own, so the mean may include them. All copies hold the same sum, so only the first one
keeps it during the step, and the others start from nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from hpcpar.comm import MPI, broadcast_packed
from hpcpar.nn.gradient_reduction import GradientReduction
from hpcpar.nn.own_gradients import own_gradient_modules
from hpcpar.nn.pipeline.layers import Layers
from hpcpar.nn.pipeline.plan import PipelinePlan
from hpcpar.nn.pipeline.stage import Stage
from hpcpar.nn.reduction_options import ReductionOptions

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["PipelineReductions"]


class PipelineReductions:
    """All reductions of this rank's gradients. Collective to make and to free.

    Parameters
    ----------
    layers, plan
        What lives where.
    stages
        Those of this rank.
    comm
        The ranks of the pipeline.
    data_comm
        The replicas of this rank's stages; ``None`` without data parallelism.
    options
        How the mean over replicas is taken.
    """

    def __init__(
        self,
        layers: Layers,
        plan: PipelinePlan,
        stages: dict[int, Stage],
        comm: Communicator,
        data_comm: Communicator | None,
        options: ReductionOptions,
    ) -> None:
        self.synchronize = True
        self._names = _names_of(layers, stages)
        self._stages = stages
        self._data = data_comm if data_comm is not None and data_comm.size > 1 else None
        self._options = options
        self._copies: list[_Copies] = []
        for ranks, parameters in _copied_parameters(layers, plan, comm.rank):
            group = comm.Split(0 if comm.rank in ranks else MPI.UNDEFINED, comm.rank)
            if group is not None:
                self._copies.append(_Copies(group, parameters))
        self._of_stage: dict[int, GradientReduction] = {}
        self._of_several: list[GradientReduction] = []
        self._finished: set[int] = set()
        self._experts = [
            part
            for stage in stages.values()
            for layer in stage.layers
            for part in own_gradient_modules(layer)
        ]
        self._apart = {id(p) for experts in self._experts for p in experts.own_parameters()}
        for experts in self._experts:
            if self._data is not None:
                experts.share_gradients(self._data, average=True, options=options)
            experts.synchronize = False
        self._open()

    def begin(self) -> None:
        """Before the first backward of a step. Local, unless parameters were frozen or unfrozen.

        In that case, which must be so on all replicas and copies, Collective over these.
        """
        if self._trainable != self._trainable_now():
            self._close()
            self._open()
        self._finished = set()
        for copies in self._copies:
            copies.begin()

    def _open(self) -> None:
        """Make the reductions of what is trainable now."""
        self._trainable = self._trainable_now()
        for copies in self._copies:
            copies.open(self._names, self._options)
        if self._data is None:
            return
        for owner, some in _by_owner(self._stages, self._apart).items():
            named = [(self._names[id(p)], p) for p in some]
            reduction = GradientReduction(named, [], dict, self._data, self._options)
            _let_owner_end(reduction)
            if owner is None:
                self._of_several.append(reduction)
            else:
                self._of_stage[owner] = reduction

    def _close(self) -> None:
        for reduction in (*self._of_stage.values(), *self._of_several):
            reduction.free()
        for copies in self._copies:
            copies.close()
        self._of_stage, self._of_several = {}, []

    def _trainable_now(self) -> list[bool]:
        return [
            parameter.requires_grad
            for stage in self._stages.values()
            for parameter in stage.parameters
            if id(parameter) not in self._apart
        ]

    @contextmanager
    def backward_of(self, stage: int, is_last: bool) -> Iterator[None]:
        """Around a backward that adds to a stage's gradients; the last one starts their reduction."""
        reduction = self._of_stage.get(stage) if is_last and self.synchronize else None
        if reduction is None:
            yield
            return
        reduction.synchronize = True
        yield
        reduction.finish()
        reduction.synchronize = False
        self._finished.add(stage)

    def finish(self) -> None:
        """After the last backward of a step: wait until ``.grad`` is what it should be. Collective."""
        if self.synchronize:
            for stage, reduction in self._of_stage.items():
                if stage not in self._finished:
                    reduction.finish()
            for reduction in self._of_several:
                reduction.finish()
            for reduction in (*self._of_stage.values(), *self._of_several):
                reduction.wait_all()
            for experts in self._experts:
                experts.reduce_now()
        for copies in self._copies:
            copies.finish()

    @property
    def copies(self) -> list[tuple[Communicator, list[nn.Parameter]]]:
        """The ranks that have copies of the same parameters as this one, and these, in one order. Local."""
        return [(copies.group, copies.parameters) for copies in self._copies]

    @property
    def later_copies(self) -> set[int]:
        """Identities of the copied parameters of which this rank has another copy. Local."""
        return {id(p) for copies in self._copies if not copies.is_first for p in copies.parameters}

    def give_up(self) -> None:
        """Leave what is under way unfinished, after a failure. Local."""
        for reduction in (*self._of_stage.values(), *self._of_several):
            reduction.give_up()
        for experts in self._experts:
            experts.give_up()
        for copies in self._copies:
            copies.give_up()

    def free(self) -> None:
        """Give windows and communicators back. Collective."""
        self._close()
        for copies in self._copies:
            copies.group.Free()


class _Copies:
    """Parameters of which the same ranks have a copy each. Their gradients are summed."""

    def __init__(self, group: Communicator, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        self.group = group
        self.is_first = group.rank == 0
        self._reduction: GradientReduction | None = None
        broadcast_packed(self.parameters, group, 0)

    def open(self, names: dict[int, str], options: ReductionOptions) -> None:
        trainable = [(names[id(p)], p) for p in self.parameters if p.requires_grad]
        self._reduction = GradientReduction(trainable, [], dict, self.group, options, average=False)
        _let_owner_end(self._reduction)

    def begin(self) -> None:
        if not self.is_first:
            for parameter in self.parameters:
                parameter.grad = None

    def finish(self) -> None:
        assert self._reduction is not None
        self._reduction.finish()
        self._reduction.wait_all()

    def give_up(self) -> None:
        if self._reduction is not None:
            self._reduction.give_up()

    def close(self) -> None:
        if self._reduction is not None:
            self._reduction.free()


def _let_owner_end(reduction: GradientReduction) -> None:
    """Hooks do nothing until the owner says so; backward does not wait for what they start."""
    reduction.synchronize = False
    reduction.ends_with_backward = False
    reduction.overlapped = lambda: None


def _by_owner(stages: dict[int, Stage], apart: set[int]) -> dict[int | None, list[nn.Parameter]]:
    """The trainable parameters of each local stage, and under ``None`` those that several stages have.

    Without those whose identities are in ``apart``.
    """
    owners: dict[int, set[int]] = {}
    parameters: dict[int, nn.Parameter] = {}
    for index, stage in stages.items():
        for parameter in stage.parameters:
            if parameter.requires_grad and id(parameter) not in apart:
                owners.setdefault(id(parameter), set()).add(index)
                parameters[id(parameter)] = parameter
    groups: dict[int | None, list[nn.Parameter]] = {}
    for identity, indices in owners.items():
        owner = next(iter(indices)) if len(indices) == 1 else None
        groups.setdefault(owner, []).append(parameters[identity])
    return groups


def _names_of(layers: Layers, stages: dict[int, Stage]) -> dict[int, str]:
    """For each local parameter its first name in the unsplit model."""
    names: dict[int, str] = {}
    for stage in stages.values():
        for index, module in zip(stage.plan.layers, stage.layers, strict=True):
            for name, parameter in module.named_parameters():
                names.setdefault(id(parameter), f"{layers.names[index]}.{name}")
    return names


def _copied_parameters(
    layers: Layers, plan: PipelinePlan, rank: int
) -> list[tuple[tuple[int, ...], list[nn.Parameter]]]:
    """Ranks that have copies of the same parameters, and these parameters if this rank is one of them.

    In the same order on all ranks: identities of modules, of specs and of what specs are given as arguments
    are found alike everywhere.
    """
    holders: dict[int, set[int]] = {}
    found: dict[int, list[nn.Parameter]] = {}
    for group in layers.tied_groups():
        for index in group:
            place = plan.rank_of_layer(index)
            visible = layers.visible_parameters(index)
            for parameter in visible:
                holders.setdefault(id(parameter), set()).add(place)
                found[id(parameter)] = [parameter]
            spec = layers.spec(index)
            if spec is not None:
                holders.setdefault(id(spec), set()).add(place)
                if place == rank:
                    known = {id(parameter) for parameter in visible}
                    built = layers.build(index).parameters()
                    found[id(spec)] = [p for p in built if id(p) not in known]
    merged: dict[tuple[int, ...], list[nn.Parameter]] = {}
    for identity, places in holders.items():
        if len(places) > 1:
            mine = found.get(identity, []) if rank in places else []
            merged.setdefault(tuple(sorted(places)), []).extend(mine)
    return list(merged.items())
