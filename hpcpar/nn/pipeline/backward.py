"""Backward of one stage and microbatch, whole or split into input gradients (I) and weight gradients (W).

Whole: one run of autograd from the stage's outputs. It starts from *gradient edges*, so that the outputs
themselves, which have long been sent, need not be kept.

Split, for zero-bubble schedules (Qi et al. 2023): the previous stage waits for the gradients of this stage's
inputs, but nobody waits for those of its weights. The graph is walked once::

    output ── n1 ────── n2 ────── input          R: nodes from which an input is reached (n1, n2)
              │          │
              c1         c2                      boundary: edges from a node of R to one outside that
              │          │                       leads to parameters (n1-c1, n2-c2)
            weight1    weight2

*I* runs autograd to the inputs only, so it executes exactly R, and each node computes only what flows
along R. A hook on each boundary node notes the gradient that arrived there. *W* runs autograd from each
boundary node, with that gradient, to the parameters behind its boundary edges; autograd then computes no
other edge.

Invariant: each parameter gets each contribution once. If a parameter can be reached over two different
boundary edges (a weight used twice in a stage), then a run from n1 would follow the path through n2, too.
Such parameters are *settled in I*, where autograd sums all paths itself. So are those behind custom autograd
functions, which compute all their gradients whatever is asked, and would do it twice. Reentrant checkpoints
allow no partial run at all; then I is the whole backward and W has nothing left.

A stage whose inputs need no gradient, such as the first, has an empty R: all of its backward is W.

Hooks that a model registers on its own intermediate tensors run in I and again in W; those that change the
gradient would do so twice for the weights. What nodes do in W costs a walk through the graph below each of
them, so stages of hundreds of tiny layers are better off with an undivided backward.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["DeferredWeights", "backward_inputs", "backward_whole", "separate", "storages"]


def backward_whole(roots: Sequence[GradientEdge], gradients: Sequence[torch.Tensor]) -> None:
    """Run autograd from ``roots``; gradients accumulate in the leaves' ``.grad``. Local."""
    if roots:
        torch.autograd.backward(list(roots), list(gradients))


def storages(tensors: Iterable[torch.Tensor | None]) -> set[int]:
    """The memory of dense tensors, to be recognised. Local."""
    return {t.untyped_storage().data_ptr() for t in tensors if t is not None and t.layout is torch.strided}


def separate(parameters: Iterable[torch.Tensor], others: set[int]) -> None:
    """Give gradients that share memory with something else memory of their own. Local.

    Autograd makes the gradient that it computed the ``.grad`` of a parameter, without a copy, when nobody
    else holds that tensor. It does not see another tensor on the same memory, such as the gradient of an
    input in ``x.view(n) + p.view(n)``; that one is being sent while the next microbatch adds to ``.grad``.
    """
    for parameter in parameters:
        if parameter.grad is not None and storages([parameter.grad]) & others:
            parameter.grad = parameter.grad.clone()


class DeferredWeights:
    """The weight gradients of a backward whose input gradients have been computed. Made by
    :func:`backward_inputs`.
    """

    def __init__(self, graph: _Graph | None) -> None:
        self._graph = graph
        self._captured: dict[Node, Sequence[torch.Tensor | None]] = {}

    def run(self) -> None:
        """Compute them and accumulate them in ``.grad``, once. Local."""
        graph, self._graph = self._graph, None
        if graph is None:
            return
        if graph.deferred_roots:
            edges, gradients = zip(*graph.deferred_roots, strict=True)
            _run_to(graph.leaves_of([edge.node for edge in edges]), edges, gradients)
        while self._captured:
            node, arrived = self._captured.popitem()  # each gradient is let go as soon as it is used
            outputs = [
                (GradientEdge(node, k), gradient)
                for k, gradient in enumerate(arrived)
                if gradient is not None
            ]
            if outputs:
                edges, gradients = zip(*outputs, strict=True)
                _run_to(graph.leaves_of(graph.boundaries[node]), edges, gradients)

    def capture(self, node: Node, arrived: Sequence[torch.Tensor | None]) -> None:
        """Note what gradient arrived at a boundary node. Called by its hook."""
        self._captured[node] = arrived


def backward_inputs(
    roots: Sequence[GradientEdge], gradients: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[list[torch.Tensor | None], DeferredWeights]:
    """Compute the gradients of ``inputs`` now and those of the weights later. Local.

    Parameters
    ----------
    roots, gradients
        Edges of the outputs and the gradients that arrived for them.
    inputs
        Leaves that require grad. Their ``.grad`` is not touched.

    Returns
    -------
    list of torch.Tensor or None, DeferredWeights
        A gradient per input, ``None`` where no path leads to it; and what is left to do.
    """
    if not roots:
        return [None] * len(inputs), DeferredWeights(None)
    graph = _Graph(roots, gradients, inputs)
    if graph.is_indivisible:
        torch.autograd.backward(list(roots), list(gradients))
        found = [leaf.grad for leaf in inputs]
        for leaf in inputs:
            leaf.grad = None
        return found, DeferredWeights(None)
    deferred = DeferredWeights(graph)
    handles: list[RemovableHandle] = [
        node.register_prehook(lambda arrived, node=node: deferred.capture(node, arrived))
        for node in graph.boundaries
    ]
    wanted = [*inputs, *graph.settled]
    try:
        computed: Sequence[torch.Tensor | None] = [None] * len(wanted)
        if wanted and graph.live_roots:
            computed = torch.autograd.grad(
                [edge for edge, _ in graph.live_roots],
                wanted,
                [gradient for _, gradient in graph.live_roots],
                retain_graph=True,
                allow_unused=True,
            )
    finally:
        for handle in handles:
            handle.remove()
    for parameter, gradient in zip(graph.settled, computed[len(inputs) :], strict=True):
        _accumulate(parameter, gradient)
    return list(computed[: len(inputs)]), deferred


class _Graph:
    """The autograd graph of a stage, walked once. See the module's description.

    Attributes
    ----------
    boundaries : dict of Node to list of Node
        Nodes of R with their children outside of it that lead to parameters left to W.
    live_roots, deferred_roots : list of (GradientEdge, torch.Tensor)
        Outputs that lead to an input or to a settled parameter, and those that lead to others only. The edges
        are those of the caller: besides them, nobody may keep the node of a Python function alive.
    settled : list of torch.Tensor
        Parameters whose gradients are computed in I.
    is_indivisible : bool
        Whether the backward must be run as a whole.
    """

    def __init__(
        self,
        roots: Sequence[GradientEdge],
        gradients: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
    ) -> None:
        # Python's objects for nodes are the same object only as long as somebody keeps them: these dicts do.
        self._inputs = {get_gradient_edge(leaf).node for leaf in inputs}
        self._order = _postorder([root.node for root in roots])
        self.is_indivisible = any(node.name() == "CheckpointFunctionBackward" for node in self._order)
        self._reaching: set[Node] = set()
        # Sets of parameters as bits: the sets of all nodes together would be quadratic in their number.
        self._leaves: list[Node] = []
        self._parameters: dict[Node, int] = {}
        for node in self._order:
            self._classify(node)
        parents: dict[Node, set[Node | None]] = {}
        for node in self._reaching:
            for child in self._outward(node):
                parents.setdefault(child, set()).add(node)
        for root in roots:
            if root.node not in self._reaching and self._parameters[root.node]:
                parents.setdefault(root.node, set()).add(None)
        self._settled = _settle(parents, self._parameters)
        self.settled = self._members(self._settled)
        self.boundaries: dict[Node, list[Node]] = {}
        for child, nodes in parents.items():
            if self._parameters[child] & ~self._settled:
                for parent in nodes:
                    if parent is not None:
                        self.boundaries.setdefault(parent, []).append(child)
        pairs = list(zip(roots, gradients, strict=True))
        self.live_roots = [(edge, g) for edge, g in pairs if self._is_live(edge.node)]
        self.deferred_roots = [(edge, g) for edge, g in pairs if self._is_deferred(edge.node)]

    def leaves_of(self, nodes: Sequence[Node]) -> list[torch.Tensor]:
        """The parameters below ``nodes`` that are left to W."""
        below = 0
        for node in nodes:
            below |= self._parameters[node]
        return self._members(below & ~self._settled)

    def _members(self, bits: int) -> list[torch.Tensor]:
        members = []
        while bits:
            lowest = bits & -bits
            members.append(_variable(self._leaves[lowest.bit_length() - 1]))
            bits ^= lowest
        return members

    def _is_live(self, node: Node) -> bool:
        return node in self._reaching or bool(self._parameters[node] & self._settled)

    def _is_deferred(self, node: Node) -> bool:
        return node not in self._reaching and bool(self._parameters[node] & ~self._settled)

    def _classify(self, node: Node) -> None:
        """Children come first, so their verdicts are known."""
        children = [child for child, _ in node.next_functions if child is not None]
        if node in self._inputs or any(child in self._reaching for child in children):
            self._reaching.add(node)
        is_custom = isinstance(node, torch.autograd.function.BackwardCFunction)  # may have any attribute
        if node not in self._inputs and hasattr(node, "variable") and not is_custom:
            self._parameters[node] = 1 << len(self._leaves)
            self._leaves.append(node)
        else:
            bits = 0
            for child in children:
                bits |= self._parameters[child]
            self._parameters[node] = bits

    def _outward(self, node: Node) -> set[Node]:
        return {
            child
            for child, _ in node.next_functions
            if child is not None and child not in self._reaching and self._parameters[child]
        }


def _settle(parents: dict[Node, set[Node | None]], parameters: dict[Node, int]) -> int:
    """Parameters that are reached over several boundary edges, or behind a Python function."""
    seen = settled = 0
    for child, above in parents.items():
        below = parameters[child]
        is_python = any(isinstance(node, torch.autograd.function.BackwardCFunction) for node in above)
        settled |= below if is_python or len(above) > 1 else below & seen
        seen |= below
    return settled


def _postorder(roots: Sequence[Node]) -> list[Node]:
    """All nodes below ``roots``, each once, children first. Iterative: graphs are deep."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, children_done = stack.pop()
        if children_done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None)
    return order


def _run_to(
    leaves: Sequence[torch.Tensor], edges: Sequence[GradientEdge], gradients: Sequence[torch.Tensor]
) -> None:
    """Run autograd from edges to these leaves only, which also tells each node what not to compute."""
    torch.autograd.backward(list(edges), list(gradients), inputs=list(leaves))


def _variable(node: Node) -> torch.Tensor:
    """The leaf of an accumulator node."""
    leaf: Any = node
    return leaf.variable  # type: ignore[no-any-return]


def _accumulate(parameter: torch.Tensor, gradient: torch.Tensor | None) -> None:
    if gradient is None:
        return
    if parameter.grad is None:
        # A copy: autograd may have returned one tensor for several inputs, one of which is being sent.
        parameter.grad = gradient.detach().clone()
    else:
        parameter.grad = (
            parameter.grad + gradient if parameter.grad.is_sparse else parameter.grad.add_(gradient)
        )
