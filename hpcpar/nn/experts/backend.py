"""The expert backend: a module that answers requests and trains itself.

Two functions, both on batches: ``forward`` returns outputs, ``backward`` takes the same inputs with gradients
of the outputs, returns gradients of the inputs, and updates the expert. Nothing is kept between the two: the
backward pass computes the forward pass again, since requests come from many callers in any order, and some
callers never come back.

How the two passes agree is in :mod:`~hpcpar.nn.experts.passes`, what makes an update in
:mod:`~hpcpar.nn.experts.updates`; here they are put together under one lock. A pass that fails leaves the
expert as it was. :class:`~hpcpar.nn.experts.task_pool.TaskPool` makes batches of requests
(:meth:`ExpertBackend.get_pools`).
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from hpcpar.errors import MismatchError
from hpcpar.nn.experts.descriptor import BatchTensorDescriptor
from hpcpar.nn.experts.passes import ExpertPasses, joined
from hpcpar.nn.experts.probe import Traits, device_of, in_mode, probe
from hpcpar.nn.experts.replica_states import joined_state, own_part, state_without_part
from hpcpar.nn.experts.task_pool import Request, TaskPool
from hpcpar.nn.experts.updates import ExpertUpdates, OptimizerLike, SchedulerLike, collected_gradients

__all__ = ["ExpertBackend"]

_STATE_KEYS = ("stats", "model", "optimizer", "scheduler", "pending")


class ExpertBackend:
    """An expert that is served: computes and trains on batches of requests. Thread-safe. Local.

    Parameters
    ----------
    name
        Of the expert, such as ``"expert.3.5"``.
    expert
        The module. Its gradients belong to the backend.
    optimizer
        A torch optimizer over the expert's parameters, or a function that makes one from them. ``None``: the
        expert is not trained, and backward only gives gradients of the inputs.
    scheduler
        Of the learning rate, stepped with each update: over that optimizer, or a function that makes it,
        ``scheduler(optimizer, num_warmup_steps, num_total_steps)``, without the numbers that are not given.
        ``None``: linear warm-up, then linear decay to zero at ``num_total_steps``, as far as these are given.
    num_warmup_steps, num_total_steps
        Numbers of updates.
    args_schema
        Descriptors of the positional arguments: a tuple or list, or a single descriptor.
    kwargs_schema
        Descriptors of the keyword arguments.
    outputs_schema
        Descriptors of the outputs; found by running the expert on zeros when ``None``.
    clip_grad_norm
        Largest norm of the gradient of an update.
    min_batch_size, max_batch_size, timeout
        Of the pools, see :class:`~hpcpar.nn.experts.task_pool.TaskPool`; rows, rows, and seconds. The timeout
        matters only with a ``min_batch_size`` above one.
    max_queued
        Rows that may wait in a pool; a server then lets its callers wait. ``64 * max_batch_size`` by default.
    samples_per_update
        Examples whose summed gradients make an update; ``None``: each call of :meth:`backward` makes one.
    replicas
        For whoever reduces gradients over several copies of this expert: unless it is ``None``,
        :meth:`backward` only accumulates, and :meth:`take_gradients` and :meth:`apply_summed` do the rest.

    Attributes
    ----------
    is_served : bool
        Whether a server has it now.
    lock : threading.RLock
        Held by whoever reads or changes the expert.
    schema : ExpertSchema
        Of inputs and outputs.

    Raises
    ------
    MismatchError
        When the expert does not run on zeros of its schema.
    HpcparError
        When options do not fit together.

    Examples
    --------
    >>> backend = ExpertBackend("expert.0", net, torch.optim.Adam, args_schema=BatchTensorDescriptor(512))
    >>> (outputs,) = backend.forward(x)
    >>> (grad_x,) = backend.backward(x, grad_outputs)  # and the expert is updated
    """

    def __init__(
        self,
        name: str,
        expert: nn.Module,
        optimizer: OptimizerLike,
        *,
        scheduler: SchedulerLike = None,
        num_warmup_steps: int | None = None,
        num_total_steps: int | None = None,
        args_schema: Sequence[Any] | BatchTensorDescriptor | None = None,
        kwargs_schema: Mapping[str, Any] | None = None,
        outputs_schema: Any = None,
        clip_grad_norm: float | None = None,
        min_batch_size: int = 1,
        max_batch_size: int = 4096,
        timeout: float = 0.01,
        max_queued: int | None = None,
        samples_per_update: int | None = None,
        replicas: Any = None,
    ) -> None:
        args = (args_schema,) if isinstance(args_schema, BatchTensorDescriptor) else tuple(args_schema or ())
        self.name = name
        self.is_served = False
        self.expert = expert
        self.replicas = replicas
        self.lock = threading.RLock()
        # Before the optimizer is made: the first run of a lazy module makes its parameters.
        schema, traits = probe(expert, args, dict(kwargs_schema or {}), outputs_schema)
        self.schema = schema
        self._passes = ExpertPasses(expert, schema, traits)
        self._updates = ExpertUpdates(
            expert,
            optimizer,
            scheduler,
            num_warmup_steps=num_warmup_steps,
            num_total_steps=num_total_steps,
            clip_grad_norm=clip_grad_norm,
            samples_per_update=samples_per_update,
        )
        self.samples_per_update = samples_per_update
        self._batching = {
            "min_batch_size": min_batch_size,
            "max_batch_size": max_batch_size,
            "timeout": timeout,
            "max_queued": max_queued,
        }
        self._pools: tuple[TaskPool, TaskPool] | None = None

    # Computing -------------------------------------------------------------------------------------------

    def forward(
        self,
        *inputs: Any,
        requests: Sequence[Request] | None = None,
        training: bool = True,
        seed: int | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, ...]:
        """Outputs of the expert, without a graph. Local.

        Parameters
        ----------
        *inputs
            All input tensors in the flat order of the schema; or, with keywords, the positional arguments.
        requests
            Whose rows these are, in order; one request without a seed by default.
        training
            Of that default: ``False`` runs the expert in evaluation mode.
        seed
            Of that default.
        **kwargs
            Keyword arguments of the expert by name. One that is called like a parameter of this method can
            only be passed in flat order.

        Returns
        -------
        tuple of torch.Tensor
            The output tensors in flat order, on the device of the inputs.

        Raises
        ------
        MismatchError
            When the inputs do not fit the schema.
        """
        structured = kwargs or not all(isinstance(tensor, torch.Tensor) for tensor in inputs)
        tensors = self.schema.flatten_call(inputs, kwargs) if structured else list(inputs)
        rows = self.schema.check_inputs(tensors)
        asked = _asked(requests, rows, training, seed)
        with self.lock:
            moved = self._moved(tensors)
            outputs = self._passes.forward(moved, asked) if rows else self._passes.empty_outputs(moved)
        return _on_device(outputs, tensors[0].device)

    def backward(
        self,
        *inputs_and_grad_outputs: torch.Tensor,
        requests: Sequence[Request] | None = None,
        training: bool = True,
        seed: int | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Gradients of the inputs; and train the expert. Local.

        Parameters
        ----------
        *inputs_and_grad_outputs
            The flat inputs of a forward pass, then the gradient of each differentiable output.
        requests, training, seed
            As in that forward pass.

        Returns
        -------
        tuple of torch.Tensor or None
            For each flat input its gradient, zeros when it was not used, ``None`` when its dtype has none.

        Raises
        ------
        MismatchError
            When the tensors do not fit the schema.

        Notes
        -----
        Gradients of parameters are summed over the rows. In evaluation mode they are dropped: the expert is
        not updated and nothing is counted. When this raises, the expert, its gradients and its
        counts are as before; a failure of the optimizer itself may leave it half-way.
        """
        rows = self.schema.check_backward(inputs_and_grad_outputs)
        asked = _asked(requests, rows, training, seed)
        device = inputs_and_grad_outputs[0].device
        with self.lock:
            moved = self._moved(inputs_and_grad_outputs)
            if rows == 0:
                flags = zip(self.schema.differentiable_inputs, moved, strict=False)
                return _on_device([torch.zeros_like(t) if flag else None for flag, t in flags], device)
            segments = self._updates.segments(rows) if self.replicas is None else [(0, rows)]
            with in_mode(self.expert, asked[0].training), self._undone_on_failure(len(segments) > 1):
                parts = [part for segment in segments for part in self._train(asked, *segment, moved)]
        return _on_device(joined(parts), device)

    def apply_gradients(self) -> None:
        """Update the expert with the gradients accumulated so far, if there are any. Local."""
        with self.lock:
            self._updates.apply()

    def _moved(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """The tensors where the expert is, apart from any graph."""
        device = device_of(self.expert)
        return [tensor.detach() if device is None else tensor.detach().to(device) for tensor in tensors]

    def _train(
        self, requests: Sequence[Request], start: int, stop: int, tensors: Sequence[torch.Tensor]
    ) -> list[list[torch.Tensor | None]]:
        """Backward of the rows from ``start`` to ``stop``, and the update if it is due."""
        with collected_gradients(self.expert) as gradients:
            parts = self._passes.backward(tensors, requests, start, stop)
        if not requests[0].training:
            return parts
        self._updates.add(gradients, stop - start)
        if self.replicas is None and self._updates.is_due:
            self._updates.apply()
        return parts

    @contextmanager
    def _undone_on_failure(self, has_updates: bool) -> Iterator[None]:
        """Updates between two parts of a batch are rare, and a failure after one rarer; then it costs."""
        state = self.get_full_state() if has_updates else None
        try:
            with self._updates.undone_on_failure():
                yield
        except BaseException:
            if state is not None:
                self._load(state)
            raise

    # Replicas --------------------------------------------------------------------------------------------

    @property
    def accumulated_samples(self) -> int:
        """Examples whose gradients wait for an update. Local."""
        return self._updates.accumulated_samples

    def take_gradients(self) -> tuple[list[torch.Tensor], int]:
        """Take the accumulated gradients away, to reduce them. Local.

        Returns
        -------
        gradients : list of torch.Tensor
            One for each trainable parameter, of its shape, contiguous; zeros where there was none.
        samples : int
            Examples that they are summed over.
        """
        with self.lock:
            return self._updates.take()

    def apply_summed(self, gradients: Sequence[torch.Tensor], samples: int) -> None:
        """Update the expert with reduced gradients; nothing when they are of no examples. Local.

        Parameters
        ----------
        gradients
            One for each trainable parameter, of its size, in any shape. They may be scaled in place.
        samples
            Examples that they are summed over, on all replicas.
        """
        with self.lock:
            self._updates.apply_summed(gradients, samples)

    # Pools -----------------------------------------------------------------------------------------------

    def get_pools(self, start: bool = True) -> tuple[TaskPool, TaskPool]:
        """The pools of forward and of backward tasks, made by the first call, and after a shutdown. Local.

        Parameters
        ----------
        start
            Whether the pools run their own threads, or someone calls their ``process_batch``. Only the first
            call decides.
        """
        with self.lock:
            if self._pools is None:
                schema = self.schema
                self._pools = (
                    self._pool("forward", start, lambda *tensors: schema.check_inputs(tensors)),
                    self._pool("backward", start, lambda *tensors: schema.check_backward(tensors)),
                )
            return self._pools

    def _pool(self, direction: str, start: bool, check: Any) -> TaskPool:
        return TaskPool(
            getattr(self, direction),
            name=f"{self.name}_{direction}",
            start=start,
            with_requests=True,
            check=check,
            **self._batching,  # type: ignore[arg-type]
        )

    def shutdown(self, wait: bool = True) -> None:
        """Shut the pools down, if there are any; see :meth:`TaskPool.shutdown`. Local."""
        with self.lock:
            pools, self._pools = self._pools or (), None
        for pool in pools:  # not under the lock: their threads need it to finish
            pool.shutdown(wait)

    @property
    def traits(self) -> Traits:
        """What the expert does besides computing, as far as a run on zeros tells. Local.

        Assign another one for an expert that begins to draw random numbers, or to write to its inputs, later.
        """
        return self._passes.traits

    @traits.setter
    def traits(self, traits: Traits) -> None:
        with self.lock:
            self._passes.traits = traits

    # Facts and state -------------------------------------------------------------------------------------

    def get_info(self) -> dict[str, Any]:
        """``forward_schema``, a tuple (args, kwargs), ``outputs_schema`` and ``keyword_names``. Local."""
        return {
            "forward_schema": (self.schema.args, dict(self.schema.kwargs)),
            "outputs_schema": self.schema.outputs,
            "keyword_names": self.schema.keyword_names,
        }

    def get_stats(self) -> dict[str, int]:
        """``updates`` of the expert, and ``examples_processed`` by backward. Local."""
        with self.lock:
            return self._updates.stats()

    def get_full_state(self) -> dict[str, Any]:
        """A copy of the expert's whole state at one moment, for :meth:`load_full_state`. Local.

        Returns
        -------
        dict
            ``stats``, ``model``, ``optimizer``, ``scheduler`` (``None`` where there is none), and
            ``pending``: gradients that wait for an update and the number of their samples.
        """
        with self.lock:
            model = copy.deepcopy(dict(self.expert.state_dict()))
            return {"model": model, **self._updates.state()}

    def load_full_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state, exactly; it is copied. Local.

        Raises
        ------
        MismatchError
            When it is not a full state of such an expert; this one is then as before.
        """
        missing = [key for key in _STATE_KEYS if key not in state]
        if missing:
            raise MismatchError(
                f"full state of expert {self.name!r} must have the keys {', '.join(_STATE_KEYS)}, got "
                f"{', '.join(map(str, state))}"
            )
        with self.lock:
            before = self.get_full_state()
            try:
                self._load(state)
            except (RuntimeError, ValueError, KeyError, TypeError) as error:
                self._load(before)
                raise MismatchError(
                    f"full state of expert {self.name!r} must be one of such an expert: {error}"
                ) from error

    # Of replicas, for a checkpoint with one file for all of them.
    replica_part = staticmethod(own_part)
    with_replica_parts = staticmethod(joined_state)
    without_replica_part = staticmethod(state_without_part)

    def _load(self, state: Mapping[str, Any]) -> None:
        self.expert.load_state_dict(state["model"])
        self._updates.load_state(state)


def _asked(
    requests: Sequence[Request] | None, rows: int, training: bool, seed: int | None
) -> Sequence[Request]:
    if requests is None:
        return (Request(rows, seed, training),)
    if not requests or sum(request.rows for request in requests) != rows:
        raise MismatchError(
            f"rows of the requests must add up to the batch size {rows}, got {[r.rows for r in requests]}"
        )
    if len({request.training for request in requests}) > 1:
        raise MismatchError("requests of a batch must agree in training, got both. Run them apart")
    return requests


def _on_device(tensors: Sequence[Any], device: torch.device) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.to(device) for tensor in tensors)
