"""An optimizer whose state is split over the ranks, each of which updates its part of the parameters.

Data parallelism keeps the same parameters and the same optimizer state on every rank, and each rank computes
the same update. Here it is done once (in the spirit of ZeRO; Rajbhandari et al. 2020)::

    gradients     backward leaves each rank the mean of its part only          reduce-scatter
    state         each rank holds that of its part, and updates its part
    parameters    one copy for each node, in shared memory; parts of other     all-gather over
                  nodes arrive over the rails                                  the rails only

So of *p* ranks on one node each holds 1/p of the state and 1/p of the parameters, computes 1/p of the
update, and nothing is gathered at all. Buckets of gradients stay whole on every rank: they are what the sum
is made of.

Who may touch the parameters now: see :mod:`hpcpar.comm.node_copy`. ``step`` waits until every rank of the
node has called it, for as long as one may still read parameters; afterwards all see the new ones.

Algorithms that work element by element are cut anywhere, others between parameters
(:mod:`~hpcpar.optim.sharded.splitting`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import MPI, Alarm, agree, broadcast_packed, check_alike, world
from hpcpar.errors import CheckpointError, CommunicatorFreedError, HpcparError, MismatchError
from hpcpar.optim.sharded.checks import check_model, check_routes, check_whole_rows
from hpcpar.optim.sharded.gradient_parts import GradientParts, SelfReducedGradients
from hpcpar.optim.sharded.residuals import load_residuals, residuals
from hpcpar.optim.sharded.shards import Shards
from hpcpar.optim.sharded.splitting import (
    choose_cut,
    describe,
    digest,
    parameter_groups,
)
from hpcpar.optim.sharded.state import check_shapes, load_state, whole_state
from hpcpar.optim.sharded.verdict import Verdict
from hpcpar.optim.wrapped import WrappedOptimizer

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["ShardedOptimizer"]


class ShardedOptimizer(WrappedOptimizer):
    """A torch optimizer whose state is split over ranks. Collective to make, to step and to ``free``.

    Parameters
    ----------
    params_or_model
        An :class:`hpcpar.nn.DataParallel`, which then scatters its gradients; or a module, parameters or
        groups of them, whose gradients are averaged at ``step()``, if they are not yet.
    optimizer_class
        Of torch's optimizers or another, such as ``torch.optim.AdamW``.
    comm
        The ranks; by default those of the ``DataParallel``, else ``hpcpar.comm.world()``.
    parameters
        With a model: the parameters to train, or groups of them. All by default.
    cut
        ``"anywhere"`` or ``"tensors"``; by default what is known to be right for the class.
    shared
        Whether the ranks of a node hold one copy of the parameters, if they are on the host.
    wire_dtype, transport
        Without a model: as in :class:`hpcpar.comm.Reducer`.
    **kwargs
        For the optimizer: ``lr`` and so on.

    Attributes
    ----------
    optimizer : torch.optim.Optimizer
        The wrapped one. Its parameters are this rank's shards.

    Raises
    ------
    MismatchError
        On every rank, when ranks have different parameters or options.
    HpcparError
        For algorithms that cannot be split, and models with experts (see ``parameters``).

    Notes
    -----
    Parameters start as rank 0's, and live in memory that the node shares until :meth:`free`. Outside
    ``step()`` they are for reading. All ranks may overwrite them with the same values, as
    ``load_state_dict`` of a model does; other changes belong into :meth:`changing_parameters`.

    After backward ``.grad`` only says whether there is a gradient; :meth:`clip_grad_norm_` clips. Parameters
    of 16 bits are updated by way of float32 masters. A ``GradScaler`` and learning-rate schedulers take this
    object as any other optimizer.

    Examples
    --------
    >>> model = hpcpar.nn.DataParallel(net)
    >>> optimizer = hpcpar.optim.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-3)
    """

    # A GradScaler calls step() after an overflow too, which every rank must hear of.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params_or_model: nn.Module | Iterable[Any],
        optimizer_class: type[torch.optim.Optimizer],
        comm: Communicator | None = None,
        *,
        parameters: Iterable[Any] | None = None,
        cut: str | None = None,
        shared: bool = True,
        wire_dtype: torch.dtype | None = None,
        transport: str = "auto",
        **kwargs: Any,
    ) -> None:
        self._cut = choose_cut(optimizer_class, cut)
        model = params_or_model if isinstance(params_or_model, nn.Module) else None
        self._model: Any = model if hasattr(model, "scatter_gradients") else None
        given = parameters if parameters is not None else params_or_model
        self._groups = parameter_groups(given.parameters() if isinstance(given, nn.Module) else given)
        ranks: Any = comm if comm is not None or self._model is None else self._model.comm
        self._comm = (world() if ranks is None else ranks).Dup()
        try:
            self._agree_on(optimizer_class, kwargs, (wire_dtype, transport))
            check_whole_rows(model, shared=shared)
        except Exception:  # on every rank
            self._comm.Free()
            raise
        trainable = [p for group in self._groups for p in group["params"] if p.requires_grad]
        self._reduction: SelfReducedGradients | None = None
        parts = self._scattered(trainable)
        if parts is None:
            parts = self._reduction = SelfReducedGradients(
                trainable, self._comm, self._cut, wire_dtype=wire_dtype, transport=transport
            )
        self._parts: GradientParts = parts
        broadcast_packed([p for group in self._groups for p in group["params"]], self._comm, 0)
        self._shards = Shards(parts, self._comm, whole=self._cut == "tensors", shared=shared)
        self._alarm = Alarm([self._comm])
        self._verdict = Verdict(self._judge)
        super().__init__(optimizer_class(self._shard_groups(), **kwargs))
        self.param_groups[0]["params"].insert(0, self._verdict)
        self._seen: list[tuple[torch.Tensor | None, int]] | None = None
        self._finite: bool | None = None

    # Training --------------------------------------------------------------------------------------------

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters from the gradients of all ranks. Collective.

        Parameters
        ----------
        closure
            Computes the loss with its gradients, once.
        """
        self._check_alive()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_gradients()
        with self._failing_together():
            self._settle()
            if not self._has_overflowed():
                with self._verdict.aside(self.param_groups[0]["params"]):
                    self._shards.update(self.optimizer.step, digest(self.param_groups))
        self._shards.unbind()
        self._seen = self._finite = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters. Local."""
        for group in self._groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if set_to_none or (gradient is not None and self._reduction is None):
                    parameter.grad = None  # what is spread over the ranks cannot be zeroed
                elif gradient is not None:
                    gradient.requires_grad_(False).zero_()
        self._seen = self._finite = None

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Scale the gradients of all parameters so that their norm is at most ``max_norm``. Collective.

        Parameters
        ----------
        max_norm
            Of the vector of all gradients.
        norm_type
            The p of the norm, positive; ``inf`` for the largest element.
        error_if_nonfinite
            Raise when the norm is infinite or NaN, on all ranks.

        Returns
        -------
        torch.Tensor
            The norm before, float64 of no dimension, the same on every rank.
        """
        self._check_alive()
        if not norm_type > 0.0:
            raise MismatchError(f"norm_type of clip_grad_norm_ must be positive, got {norm_type!r}")
        self._check_gradients()
        self._check_not_sitting_out("clip_grad_norm_()")
        with self._failing_together():
            self._settle()
            norm = self._norm(float(norm_type))
        if error_if_nonfinite and not bool(norm.isfinite()):
            raise HpcparError(f"the norm of the gradients must be finite to be clipped, got {float(norm)}")
        factor = min(1.0, float(max_norm) / (float(norm) + 1e-6))
        if factor != 1.0:
            for gradient in self._gradients():
                gradient.mul_(factor)
        return norm

    @contextmanager
    def changing_parameters(self) -> Iterator[None]:
        """Let every rank change the parameters as if it were alone, and alike. Collective.

        Inside the block each rank has a copy of its own; at its end they become one again. For whatever
        is more than to overwrite them with the same values: decay by hand, averages of weights that are
        swapped in and out, ``.data`` that is replaced.
        """
        self._check_alive()
        self._shards.let_go()
        with self._failing_together():
            yield
            self._shards.take_over()

    # State -----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The whole state, on every rank, in the form of the plain optimizer. Collective.

        It loads on any number of ranks, and into ``optimizer_class`` over the same parameters. Tensors are
        on the host. Of 16-bit parameters it has the float32 values, too, as ``master``; with
        ``wire_dtype=torch.int8`` what that has kept back, as ``residuals``.
        """
        self._check_alive()
        with self._failing_together():
            check_alike(self._comm, "the options of a ShardedOptimizer", [str(digest(self.param_groups))])
            states = whole_state(self._shards.own, self.optimizer.state, self._parts, self._comm)
            kept_back = residuals(self._parts)
        everything = [p for group in self._groups for p in group["params"]]
        numbers = {id(p): number for number, p in enumerate(everything)}
        groups = [
            {
                **{name: value for name, value in own.items() if name != "params"},
                "params": [numbers[id(p)] for p in group["params"]],
            }
            for own, group in zip(self.optimizer.param_groups, self._groups, strict=True)
        ]
        number_of = [numbers[id(p)] for p in self._parts.parameters]
        state = {number_of[index]: states[index] for index in states}
        result = {"state": dict(sorted(state.items())), "param_groups": groups}
        if kept_back:
            result["residuals"] = {number_of[index]: kept_back[index] for index in kept_back}
        return result

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, or of the plain optimizer. Local; the same on every rank.

        Call it when the model has its parameters: without ``master`` in the state these are the masters.

        Raises
        ------
        CheckpointError
            When it is of other parameters.
        """
        self._check_alive()
        groups = state_dict["param_groups"]
        counts = [len(group["params"]) for group in groups]
        if counts != [len(group["params"]) for group in self._groups]:
            raise CheckpointError(
                f"a state must have the groups of this optimizer, with "
                f"{[len(group['params']) for group in self._groups]} parameters, got {counts}"
            )
        numbers = [number for group in groups for number in group["params"]]
        everything = [p for group in self._groups for p in group["params"]]
        known = {id(p): state_dict["state"].get(n) for n, p in zip(numbers, everything, strict=True)}
        for parameter in everything if self._cut == "anywhere" else ():
            check_shapes(parameter, known[id(parameter)] or {})
        load_state(self.optimizer, self._shards.own, self._parts, known, groups)
        number_of = {id(p): number for number, p in zip(numbers, everything, strict=True)}
        if "residuals" in state_dict:
            kept_back = state_dict["residuals"]
            places = [(index, number_of[id(p)]) for index, p in enumerate(self._parts.parameters)]
            load_residuals(self._parts, {index: kept_back[n] for index, n in places if n in kept_back})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refused: which rank owns what is decided once, for all parameters."""
        raise HpcparError(
            "a ShardedOptimizer must be made with all its parameters, got another group. Make a new one"
        )

    def free(self) -> None:
        """Give parameters memory of their own, and communicators back; a second call is fine. Collective."""
        if self._comm.is_freed:
            return
        self._comm.Barrier()
        for group in self.param_groups:
            group["params"].clear()  # they lie in what is about to be freed
        self.optimizer.state.clear()
        self._shards.free()
        if self._reduction is not None:
            self._reduction.free()
        elif self._model is not None:
            self._model.scatter_gradients(None)
        self._alarm.free()
        self._comm.Free()

    @property
    def is_shared(self) -> bool:
        """Whether the ranks of this node hold one copy of the parameters. Local."""
        return self._shards.is_shared

    def __repr__(self) -> str:
        return f"ShardedOptimizer({self.optimizer!r}, rank {self._comm.rank} of {self._comm.size})"

    # Parts -----------------------------------------------------------------------------------------------

    def _agree_on(self, kind: Any, options: dict[str, Any], routes: tuple[Any, str]) -> None:
        """Whether all ranks are given what can be used, and the same, before anything is changed."""

        def check() -> None:
            kind([dict(group) for group in self._groups], **options)  # its own checks of the options
            check_routes(*routes, reduces_itself=self._model is not None and routes != (None, "auto"))
            if self._model is not None:
                check_model(self._model, self._groups, self._comm)

        agree([self._comm], "a ShardedOptimizer", check)
        facts = [kind.__name__, self._cut, *map(str, routes)]
        facts += describe([{"params": [], **options}, *self._groups])
        check_alike(self._comm, "a ShardedOptimizer", facts)

    def _scattered(self, trainable: list[nn.Parameter]) -> GradientParts | None:
        """The parts of a model that scatters its gradients itself, if this is for all that it reduces."""
        if self._model is None or len(trainable) < len(self._model.reduced_parameters()):
            return None
        parts: GradientParts | None = self._model.scatter_gradients(self._cut)
        return parts

    def _shard_groups(self) -> list[dict[str, Any]]:
        return [
            {**group, "params": [shard.value for shard in self._shards.of_parameters(group["params"])]}
            for group in self._groups
        ]

    def _settle(self) -> None:
        """Have this step's gradients reduced, and the shards given theirs. Collective without a model."""
        now = [_seen(parameter) for parameter in self._parts.parameters]
        if not self._has_news(now):
            return
        if self._reduction is not None:
            used = self._reduction.reduce()
        else:
            used = [parameter.grad is not None for parameter in self._parts.parameters]
        self._shards.bind(used.__getitem__)
        self._seen, self._finite = now, None

    def _has_news(self, now: list[tuple[torch.Tensor | None, int]]) -> bool:
        """Whether gradients have changed since they were settled; the same on all ranks."""
        if self._seen is None:
            return True
        changed = any(a is not b or m != n for (a, m), (b, n) in zip(self._seen, now, strict=True))
        return changed if self._reduction is None else bool(self._comm.allreduce(changed, MPI.LOR))

    def _check_gradients(self) -> None:
        """Before other ranks are involved: are things as they must be for a step?"""
        self._shards.check()
        for parameter in self._parts.parameters if self._reduction is None else ():
            if type(parameter.grad) is torch.Tensor:
                raise HpcparError(
                    "step() must follow a backward in which the model reduced its gradients, got one of this "
                    "rank only. The last backward of an accumulation must be outside of no_sync()"
                )

    def _check_not_sitting_out(self, what: str) -> None:
        if getattr(self._parts, "sits_out_with_steps_only", False):
            raise HpcparError(
                f"{what} must be done by ranks that have run out of batches, too, got join(optimizer=...). "
                "Use join(step=...) with all that follows a backward"
            )

    def _gradients(self) -> list[torch.Tensor]:
        return [shard.value.grad for shard in self._shards.own if shard.value.grad is not None]

    def _norm(self, kind: float) -> torch.Tensor:
        """Of the gradients of all ranks, each element at its owner."""
        norms = [torch.linalg.vector_norm(g, kind).double().cpu() for g in self._gradients()]
        mine = (
            torch.linalg.vector_norm(torch.stack(norms), kind)
            if norms
            else torch.zeros((), dtype=torch.float64)
        )
        if kind == float("inf"):
            self._comm.Allreduce(MPI.IN_PLACE, mine, MPI.MAX)
            return mine
        powers = mine**kind
        self._comm.Allreduce(MPI.IN_PLACE, powers)
        return powers ** (1.0 / kind)

    def _judge(self) -> bool:
        """Whether the gradients of all ranks are finite. Collective when they are new."""
        self._check_gradients()
        self._check_not_sitting_out("the step of a GradScaler")
        with self._failing_together():
            self._settle()
            if self._finite is None:
                norms = [torch.linalg.vector_norm(g, float("inf")) for g in self._gradients()]
                fine = all(bool(norm.isfinite()) for norm in norms)
                self._finite = bool(self._comm.allreduce(fine, MPI.LAND))
        return self._finite

    def _has_overflowed(self) -> bool:
        """What a GradScaler has found; then all skip the step. Undoes its scale otherwise. Local."""
        found, scale = getattr(self, "found_inf", None), getattr(self, "grad_scale", None)
        if found is not None and float(found) > 0.0:
            return True
        if scale is not None:
            for gradient in self._gradients():
                gradient.mul_(1.0 / float(scale))
        return False

    @contextmanager
    def _failing_together(self) -> Iterator[None]:
        """A failure of one rank reaches the others where they wait."""
        with self._alarm.armed():
            try:
                yield
            except Exception as error:
                self._alarm.sound(f"{type(error).__name__}: {error}")
                raise

    def _check_alive(self) -> None:
        if self._comm.is_freed:
            raise CommunicatorFreedError("a ShardedOptimizer must not be used after free()")


def _seen(parameter: nn.Parameter) -> tuple[torch.Tensor | None, int]:
    """The gradient itself, since another may get its address, and how often it was changed."""
    gradient = parameter.grad
    return gradient, -1 if gradient is None else gradient._version
