"""DataParallel whose gradients may stay inside a node, for an optimizer that knows when they should.

::

    DataParallel           gradients: mean over all ranks, every step
    DataParallelMultiGPU   the same, or the mean over the ranks of this node, as hpcpar.optim.DASO asks for

The name is the one that DASO's users know it by; it takes one rank per GPU, several per node, and ranks on
the host as well. Within a node NCCL sums what lies on GPUs (:mod:`hpcpar.comm.device_group`). The optimizer
is told which tensors replicas share, and switches ``within_node``. Between two switches this is a
:class:`~hpcpar.nn.DataParallel` in everything else.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from hpcpar.comm import DeviceGroup, make_device_group, world
from hpcpar.errors import HpcparError
from hpcpar.nn.data_parallel import DataParallel
from hpcpar.nn.own_gradients import own_gradient_modules, replicated_buffers

if TYPE_CHECKING:
    from hpcpar.comm import Communicator, NodeMap
    from hpcpar.nn.gradient_reduction import GradientReduction

__all__ = ["DataParallelMultiGPU"]


class NodeOptimizer(Protocol):
    """An optimizer that decides whether gradients stay inside a node, and averages the rest itself."""

    def attach_model(self, model: DataParallelMultiGPU) -> None:
        """Take over a model, again when other parameters become trainable. Collective."""

    def finish(self) -> None:
        """Wait for what is under way and apply it. Collective."""


class DataParallelMultiGPU(DataParallel):
    """A module that is trained by :class:`hpcpar.optim.DASO`. Collective to make and to ``free``.

    Parameters
    ----------
    module
        As for :class:`~hpcpar.nn.DataParallel`. In cycling, nodes have parameters and buffers of their own.
    optimizer
        A :class:`hpcpar.optim.DASO` over the module's parameters.
    comm
        The optimizer's ranks, ``hpcpar.comm.world()`` by default.
    **options
        Other keyword options of :class:`~hpcpar.nn.DataParallel`, such as ``bucket_mb`` and
        ``broadcast_buffers``.

    Raises
    ------
    HpcparError
        For a module with experts, whose tokens cross between nodes in every step.
    MismatchError
        When the optimizer was made with other ranks.

    Notes
    -----
    ``state_dict()`` is Local, and in cycling that of this node. ``optimizer.state_dict()`` or
    ``optimizer.synchronize()``, called before on all ranks, makes it the mean of all.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: NodeOptimizer,
        comm: Communicator | None = None,
        **options: Any,
    ) -> None:
        if not hasattr(optimizer, "attach_model"):
            raise TypeError(
                "optimizer of DataParallelMultiGPU must be an hpcpar.optim.DASO, got "
                f"{type(optimizer).__name__}. Other optimizers go with hpcpar.nn.DataParallel"
            )
        if own_gradient_modules(module):
            raise HpcparError(
                "a module of DataParallelMultiGPU must not have experts, which exchange tokens between all "
                "nodes in every step. Use hpcpar.nn.DataParallel"
            )
        comm = world() if comm is None else comm
        self._node_map = comm.node_map
        self._node_optimizer: NodeOptimizer | None = optimizer
        self._within_node = False
        self._device_group: DeviceGroup | None = None
        super().__init__(module, comm, **options)

    @property
    def within_node(self) -> bool:
        """Whether gradients are the mean of this node only; to be switched between steps. Local."""
        return self._within_node

    @within_node.setter
    def within_node(self, within_node: bool) -> None:
        """Switch it, between steps. All ranks must. Local."""
        self._within_node = within_node
        if self._gradients is not None:
            self._gradients.within_node = within_node

    @property
    def flag(self) -> None:
        """None: in cycling, gradients reach the ranks of a node only. Local."""
        return None

    @property
    def node_map(self) -> NodeMap:
        """Which ranks are on which node. Local."""
        return self._node_map

    def replicated_tensors(self) -> dict[str, torch.Tensor]:
        """The parameters by name, and the buffers unless each rank keeps its own. Local."""
        buffers = replicated_buffers(self.module) if self._broadcast_buffers else {}
        return {**dict(self.module.named_parameters()), **buffers}

    @contextlib.contextmanager
    def join(
        self,
        average: str = "ranks",
        *,
        optimizer: torch.optim.Optimizer | None = None,
        step: Callable[[], object] | None = None,
    ) -> Iterator[None]:
        """As in :class:`~hpcpar.nn.DataParallel`, on one node; between nodes steps must be equally many."""
        if self._node_map.num_nodes > 1:
            raise HpcparError(
                f"join() of DataParallelMultiGPU must be used on one node, got {self._node_map.num_nodes}: "
                "all nodes take part in the averages of parameters. Give every rank as many batches"
            )
        with super().join(average, optimizer=optimizer, step=step):
            yield

    def scatter_gradients(self, cut: str | None) -> GradientReduction | None:
        """Refused: in cycling each node has all of its means."""
        raise HpcparError(
            "gradients of DataParallelMultiGPU must not be scattered, got a ShardedOptimizer. Use "
            "hpcpar.nn.DataParallel with it"
        )

    def free(self) -> None:
        """As in :class:`~hpcpar.nn.DataParallel`; what the optimizer has under way is merged. Collective."""
        super().free()
        if self._device_group is not None:
            self._device_group.free()
        self._node_optimizer = self._device_group = None

    def __getstate__(self) -> dict[str, Any]:
        own = {"_node_optimizer": None, "_within_node": False, "_device_group": None}
        return {**super().__getstate__(), **own}

    def _finish_updates(self) -> None:
        if self._node_optimizer is not None:
            self._node_optimizer.finish()

    def _reduce_gradients(self) -> None:
        if self._node_optimizer is not None:
            self._node_optimizer.attach_model(self)  # first: it may refuse
        super()._reduce_gradients()
        self.within_node = self._within_node
        if self._gradients is None or self._node_map.num_nodes == 1:
            return
        if self._device_group is None:
            assert self._comm is not None
            self._device_group = make_device_group(self._comm.node, next(self.module.parameters()).device)
        if self._device_group is not None:
            self._device_group.carry(self._gradients.reducer)
