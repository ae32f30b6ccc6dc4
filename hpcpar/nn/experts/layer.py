"""The synchronous mixture of experts: a layer whose experts are spread over the ranks.

Every rank calls the layer with tokens of its own. Each token goes to the ``k`` experts that the gate likes
best for it, wherever they live, and the weighted sum of their answers comes back::

    tokens -> gate -> routing -> dispatch -> experts, each once -> combine -> outputs
                         |       (all-to-all)                     (all-to-all)
                         +-- counts, statistics, capacity: small messages between all ranks

It is the layer of GShard (Lepikhin et al. 2020) and the Switch Transformer (Fedus et al. 2021).

Invariants:

* Outputs and gradients are those of one process that has all experts and the tokens of all ranks.
* A forward is collective, and so is its backward, whatever the routing: ranks without tokens and experts
  without rows take part.
* By itself the layer gives its experts the gradient of the *sum* of all ranks' losses, and gate and shared
  expert that of this rank's tokens; within :class:`~hpcpar.nn.DataParallel` all become that of the mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hpcpar.comm import broadcast_packed, world
from hpcpar.comm.agreement import agree, check_alike
from hpcpar.errors import HpcparError
from hpcpar.nn.experts.call import Call, agree_on_call, agree_on_output, judge
from hpcpar.nn.experts.construction import Expert, build_experts, describe_layer, draw_seed
from hpcpar.nn.experts.dispatch import combine, dispatch, without_rows
from hpcpar.nn.experts.eager import never_compiled
from hpcpar.nn.experts.exchange import Exchange
from hpcpar.nn.experts.gate import TopKGate
from hpcpar.nn.experts.local_experts import LocalExperts
from hpcpar.nn.experts.losses import balancing_loss, z_loss
from hpcpar.nn.experts.placement import Placement
from hpcpar.nn.experts.replay import RoutingMemory
from hpcpar.nn.experts.routing import Routing, choose, route
from hpcpar.nn.experts.state import expert_number, ignore_absent_experts
from hpcpar.nn.reduction_options import ReductionOptions

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["MixtureOfExperts"]


class MixtureOfExperts(nn.Module):
    """Experts on all ranks, tokens on all ranks. Collective to make, to call and to ``free``.

    Parameters
    ----------
    gate
        A :class:`TopKGate`, or any module that returns logits (tokens, num_experts), such as ``nn.Linear``.
        Rank 0's values are broadcast.
    experts
        **All** experts, as modules or as functions without arguments that make one; at best functions, of
        which only those of this rank's experts are called, with random numbers that do not depend on the
        number of ranks. Each maps (rows, d) to (rows, d_out); a rank's own must be the same everywhere.
    comm
        The ranks, ``hpcpar.comm.world()`` for ``None``. The layer uses a duplicate.
    top_k
        Experts of a token; ``None`` for the gate's own, 2 for a gate that has none.
    capacity_factor
        Each expert takes ``ceil(capacity_factor * k * tokens / experts)`` slots of the global batch, and what
        exceeds that contributes nothing. ``None`` drops no token.
    shared_expert
        A module that every token goes to besides; rank 0's values are broadcast.

    Attributes
    ----------
    load : torch.Tensor
        Rows of each expert in the last forward over all ranks, shape (num_experts,), int64, on the host.

    Raises
    ------
    MismatchError
        On every rank, for arguments that do not fit together or are not the same on all ranks.
    RankFailedError
        In forward or backward, when an expert of another rank raises.

    Notes
    -----
    A copy by ``copy.deepcopy`` shares the communicator. The layer cannot be pickled; save
    :meth:`full_state_dict`.

    All ranks run the backward through the layer's output, or none does.

    Examples
    --------
    >>> gate = hpcpar.nn.TopKGate(512, 8)
    >>> layer = hpcpar.nn.MixtureOfExperts(gate, [make_expert] * 8, comm)
    >>> loss = loss_fn(layer(x), y) + gate.balancing_loss + gate.z_loss
    """

    def __init__(
        self,
        gate: nn.Module,
        experts: Sequence[Expert],
        comm: Communicator | None = None,
        *,
        top_k: int | None = None,
        capacity_factor: float | None = None,
        shared_expert: nn.Module | None = None,
    ) -> None:
        super().__init__()
        experts = list(experts)
        self._exchange = Exchange(world() if comm is None else comm)
        ranks = self._exchange.comm
        lines = agree(
            [ranks],
            "a mixture of experts",
            lambda: describe_layer(gate, experts, top_k, capacity_factor, shared_expert),
        )
        check_alike(ranks, "a mixture of experts", lines)
        self.gate = gate
        self.num_experts = len(experts)
        chosen = getattr(gate, "top_k", 2) if top_k is None else top_k
        self.top_k: int = min(chosen, self.num_experts)
        self.capacity_factor = capacity_factor
        self.placement = Placement(self.num_experts, ranks.size)
        seed = draw_seed(experts, ranks)
        local = self.placement.experts_of(ranks.rank)
        built = agree([ranks], "experts", lambda: build_experts(experts, local, seed))
        self.experts = LocalExperts(built, self.placement, self._exchange)
        self.shared_expert = shared_expert
        replicated = [module for module in (gate, shared_expert) if module is not None]
        broadcast_packed([t for m in replicated for t in (*m.parameters(), *m.buffers())], ranks, 0)
        self.load = torch.zeros(self.num_experts, dtype=torch.int64)
        self.routing_memory = RoutingMemory()
        self._loss_scale = 0.0
        self._bias_version = 0
        self._is_freed = False
        # By the type of the tokens, what experts returned when they last had rows.
        self._outputs: dict[torch.dtype, tuple[int, torch.dtype]] = {}
        self.register_load_state_dict_pre_hook(ignore_absent_experts)  # type: ignore[no-untyped-call]

    # Running ---------------------------------------------------------------------------------------------

    @never_compiled
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Send tokens through their experts. Collective, as is the backward.

        Parameters
        ----------
        inputs
            Shape (..., d); float32, float64, bfloat16 or float16. The number of tokens may differ between
            ranks and be zero. Under autocast, float32 travels in autocast's type.

        Returns
        -------
        torch.Tensor
            Shape (..., d_out), in the type of the experts' outputs.
        """
        self._exchange.check_usable(is_freed=self._is_freed)
        with self._exchange.armed():
            pass  # hears of failures since the last forward, before anything is computed
        judged = judge(self.gate, inputs)
        call = agree_on_call(
            self._exchange,
            self.routing_memory,
            judged,
            num_experts=self.num_experts,
            training=self.training,
            trainable=any(p.requires_grad for p in self.experts.parameters()),
        )
        is_replay = self.routing_memory.is_replay
        if is_replay and call.replayed is None and self._moves_bias:
            raise HpcparError(
                "a recomputation must repeat a forward that is remembered, got none like it. Its bias has "
                "moved since; let fewer forwards wait for their backward"
            )
        if call.needs_graph and not is_replay:
            self.experts.prepare()
        output = self._compute(inputs, judged.tokens, judged.logits, call)
        if call.needs_graph:
            self.experts.watch(output)
        return output

    def inject_losses(self, scale: float | None) -> None:
        """From now on give the gate's losses the gradient ``scale`` in every backward of the output. Local.

        For places where nobody can add them to the loss. 0 or ``None`` ends it.
        """
        self._loss_scale = scale or 0.0

    def _compute(
        self, inputs: torch.Tensor, tokens: torch.Tensor, logits: torch.Tensor, call: Call
    ) -> torch.Tensor:
        exchange, scales = self._exchange, self.experts.scales
        probabilities = logits.softmax(-1)
        routing = call.replayed or self._route(logits.detach(), probabilities.detach())
        weights = self._weights(probabilities, routing)
        losses = self._losses(logits, probabilities, routing)
        tether, rows = dispatch(tokens, exchange, routing, scales, needs_gradient=call.rows_need_gradient)
        with exchange.sounding():
            answers = self.experts.answer(rows)
        empty = self._empty_answer(answers, routing, tokens)
        # Before combine, which must be the last to save tensors for a checkpoint: see there.
        shared = self._shared(inputs, empty)
        output = combine(
            tether,
            self.experts.complete(answers, empty),
            weights,
            losses if self._loss_scale else None,
            exchange,
            routing,
            scales,
            self._loss_scale,
            needs_gradient=call.needs_graph,
        )
        if not self.routing_memory.is_replay:
            self._remember(routing, has_graph=call.needs_graph)
        output = output.view(*inputs.shape[:-1], output.shape[-1])
        return output if shared is None else output + shared

    def _route(self, logits: torch.Tensor, probabilities: torch.Tensor) -> Routing:
        """Decide, and exchange counts. Collective."""
        bias = self.gate.expert_bias if isinstance(self.gate, TopKGate) else None
        with self._exchange.armed():
            return route(
                logits,
                probabilities,
                choose(probabilities, bias, self.top_k),
                self.placement,
                self._exchange.comm,
                self.capacity_factor,
                self.routing_memory.next_serial,
            )

    def _weights(self, probabilities: torch.Tensor, routing: Routing) -> torch.Tensor:
        weights = probabilities.gather(1, routing.experts)
        normalize = getattr(self.gate, "normalize", None)
        if self.top_k > 1 if normalize is None else normalize:
            smallest = torch.finfo(weights.dtype).tiny
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(smallest)
        return weights

    def _losses(
        self, logits: torch.Tensor, probabilities: torch.Tensor, routing: Routing
    ) -> torch.Tensor | None:
        """The gate's losses, which it is also told of, unless this is a recomputation."""
        gate = self.gate
        if not isinstance(gate, TopKGate):
            return None
        size, statistics = self._exchange.comm.size, routing.statistics
        balance = balancing_loss(probabilities, statistics, size, gate.balancing_coefficient)
        square = z_loss(logits, statistics, size, gate.z_coefficient)
        if not self.routing_memory.is_replay:
            gate.balancing_loss, gate.z_loss = balance, square
        return balance + square

    def _empty_answer(
        self, answers: Sequence[torch.Tensor | None], routing: Routing, tokens: torch.Tensor
    ) -> torch.Tensor:
        """What an expert returns for no rows; other ranks may know. Collective, not in a replay."""
        if routing.output is None:
            known = agree_on_output(self._exchange, answers)
            if known is not None:
                self._outputs[tokens.dtype] = known
            routing.output = self._outputs.get(tokens.dtype, (tokens.shape[1], tokens.dtype))
        features, dtype = routing.output
        return torch.empty((0, features), dtype=dtype, device=tokens.device)

    def _shared(self, inputs: torch.Tensor, empty: torch.Tensor) -> torch.Tensor | None:
        if self.shared_expert is None:
            return None
        if not inputs.shape[:-1].numel():
            nothing = without_rows(empty, list(self.shared_expert.parameters()))
            return nothing.view(*inputs.shape[:-1], empty.shape[1])
        with self._exchange.sounding():
            shared: torch.Tensor = self.shared_expert(inputs)
        return shared

    @property
    def _moves_bias(self) -> bool:
        return self.training and isinstance(self.gate, TopKGate) and self.gate.bias_update_rate > 0.0

    def _remember(self, routing: Routing, *, has_graph: bool) -> None:
        self.load = routing.load
        routing.training, routing.has_graph = self.training, has_graph
        routing.bias_version = self._bias_version
        self.routing_memory.remember(routing)
        if self._moves_bias:
            assert isinstance(self.gate, TopKGate)
            self._bias_version += 1
            self.gate.update_bias(self.experts.summed_over_layers(routing.statistics.choices.sum(0)))

    def share_gradients(self, comm: Communicator, *, average: bool, options: ReductionOptions) -> None:
        """Keep experts equal on all ranks of ``comm``: :meth:`LocalExperts.share_gradients`. Collective."""
        self.experts.share_gradients(comm, average=average, options=options)

    @property
    def comm(self) -> Communicator:
        """The layer's own communicator. Local."""
        return self._exchange.comm

    def free(self) -> None:
        """Give communicators and memory back; the layer cannot be called any more. Collective.

        After a failure, Local: what other ranks may still use is left to the end of the process.
        """
        if self._exchange.has_failed:
            self.experts.give_up()  # other ranks may never come to free theirs
            return
        if not self._is_freed:
            self._is_freed = True
            self.experts.free()
            self._exchange.free()

    def __enter__(self) -> MixtureOfExperts:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error other ranks may never come to free theirs.
        if kind is None:
            self.free()

    # State and copies ------------------------------------------------------------------------------------

    def full_state_dict(self) -> dict[str, Any]:
        """The state with all experts, as one process would have it, on the host. Collective.

        Returns
        -------
        dict
            Complete on every rank. ``load_state_dict`` takes it on any number of ranks, and picks this rank's
            experts.
        """
        ranks = self._exchange.comm
        mine = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        first = {
            name: value
            for name, value in mine.items()
            if (number := expert_number(name)) is not None
            and self.placement.ranks_of(number)[0] == ranks.rank
        }
        with self._exchange.armed():
            parts = ranks.allgather(first)
        experts = {name: value for part in parts for name, value in part.items()}
        before = {name: value for name, value in mine.items() if name.startswith("gate.")}
        after = {name: value for name, value in mine.items() if name.startswith("shared_expert.")}
        return {**before, **experts, **after}

    def full_state_names(self) -> list[str]:
        """The names in :meth:`full_state_dict`, without the values. Collective."""
        with self._exchange.armed():
            parts = self._exchange.comm.allgather(list(self.state_dict()))
        return sorted({name for part in parts for name in part})

    def extra_repr(self) -> str:
        """The line that ``print`` shows. Local."""
        ranks = self._exchange.comm
        return f"{self.num_experts} experts, top_k={self.top_k}, rank {ranks.rank} of {ranks.size}"
