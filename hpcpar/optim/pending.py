"""Pending parameters: their first use makes them what they should be.

After ``step()`` of an optimizer that overlaps the next forward, a parameter's new value does not exist yet.
Any code may look at it, through its module, a tied name, a cached list, ``state_dict``, an EMA; none of them
may see the old value. So the parameter itself intercepts: while it is pending its class is a subclass whose
``__torch_function__`` settles it before any torch operation or attribute sees it. Settling restores the
class, waits for the gradient, applies the update; afterwards the parameter is an ordinary one again and costs
nothing. Reading what an update cannot change (shape, dtype, device, ``requires_grad``) settles nothing.

The interception is Python's; compiled and scripted code that holds a parameter by its C++ handle is not
seen by it, and :class:`~hpcpar.nn.DataParallel` settles everything before it runs such a module. Not seen
either are compiled functions and ``torch.func`` transforms that get a parameter outside of any module: call
``finish()`` of the optimizer before these.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn

__all__ = ["make_pending", "restore"]

_SETTLE = "_hpcpar_settle"
Tensor: Any = torch.Tensor

_UNCHANGED = frozenset(
    [
        *(
            getattr(torch.Tensor, name).__get__
            for name in ("shape", "dtype", "device", "layout", "ndim", "requires_grad", "is_leaf", "is_cuda")
        ),
        # Not size(): it is how vmap first looks at a tensor, the rest of which happens in C++.
        *(getattr(torch.Tensor, name) for name in ("dim", "numel", "stride", "element_size")),
        *(getattr(torch.Tensor, name) for name in ("is_floating_point", "is_complex", "is_contiguous")),
        Tensor.register_post_accumulate_grad_hook,
        Tensor.__len__,
    ]
)


def make_pending(parameter: nn.Parameter, settle: Callable[[], None]) -> None:
    """Let the first use of ``parameter`` call ``settle``, which must :func:`restore` it. Local."""
    kind = type(parameter)
    if not issubclass(kind, _Pending):
        parameter.__class__ = _pending_class(kind)
    setattr(parameter, _SETTLE, settle)


def restore(parameter: nn.Parameter) -> None:
    """Make a pending parameter an ordinary one; nothing happens to one that is. Local."""
    kind = type(parameter)
    if issubclass(kind, _Pending):
        parameter.__class__ = kind._original
        delattr(parameter, _SETTLE)


class _Pending:
    """Mixed into the class of a pending parameter."""

    _original: type[nn.Parameter]

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _UNCHANGED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for parameter in _pending_in((args, kwargs)):
            getattr(parameter, _SETTLE)()
        return func(*args, **kwargs)

    # Python calls these by type, so that __torch_function__ would see them too late.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        getattr(self, _SETTLE)()
        return self.__deepcopy__(memo)  # now the original class's

    def __reduce_ex__(self, protocol: Any) -> Any:
        getattr(self, _SETTLE)()
        return self.__reduce_ex__(protocol)

    def __repr__(self) -> str:
        getattr(self, _SETTLE)()
        return repr(self)


@functools.cache
def _pending_class(kind: type[nn.Parameter]) -> type[Any]:
    metaclass: Any = type(kind)
    return cast("type[Any]", metaclass(f"Pending{kind.__name__}", (_Pending, kind), {"_original": kind}))


def _pending_in(value: Any) -> Iterator[Any]:
    if isinstance(value, _Pending):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _pending_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _pending_in(item)
