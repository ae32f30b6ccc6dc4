"""Sparse gradients (``nn.Embedding(sparse=True)``): gathered, not reduced.

Ranks have gradients for different rows. Every rank gathers the rows of all, scaled by its weight, and
coalesces them; duplicates add up in rank order, the same on every rank. Traffic is proportional to the rows
that were touched, not to the size of the table.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from hpcpar.comm import Communicator

__all__ = ["average_sparse", "sparse_parameters"]


def sparse_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Parameters whose gradients torch makes sparse. Local."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    found = dict.fromkeys(m.weight for m in module.modules() if isinstance(m, kinds) and m.sparse)
    return [p for p in found if isinstance(p, nn.Parameter) and p.requires_grad]


def average_sparse(parameter: nn.Parameter, comm: Communicator, weight: float) -> None:
    """Replace ``parameter.grad`` by the weighted mean over the ranks. Collective.

    Parameters
    ----------
    parameter
        Of any shape; its gradient is sparse in the first axis, or ``None`` on ranks that did not use it.
    comm
        The ranks.
    weight
        Of this rank's gradient.
    """
    gradient = parameter.grad
    row_shape = parameter.shape[1:]
    if gradient is None:
        rows, values = torch.empty(0, dtype=torch.int64), parameter.new_empty((0, *row_shape))
    else:
        gradient = (gradient if gradient.is_sparse else gradient.to_sparse(1)).coalesce()
        rows, values = gradient.indices()[0], gradient.values() * weight
    facts = torch.tensor([float(gradient is not None), float(rows.numel()), weight], dtype=torch.float64)
    table = torch.empty(comm.size, 3, dtype=torch.float64)
    comm.Allgather(facts, table)
    if not table[:, 0].any():
        return
    counts = [int(count) for count in table[:, 1]]
    width = row_shape.numel()
    all_rows = torch.empty(sum(counts), dtype=torch.int64)
    all_values = torch.empty(sum(counts), width, dtype=parameter.dtype)
    comm.Allgatherv(rows.cpu(), [all_rows, counts])
    comm.Allgatherv(values.detach().reshape(-1, width), [all_values, [count * width for count in counts]])
    mean = all_values.reshape(-1, *row_shape) / table[:, 2].sum().item()
    parameter.grad = torch.sparse_coo_tensor(
        all_rows[None].to(parameter.device),
        mean.to(parameter.device),
        parameter.shape,
        check_invariants=False,  # the ranks' own gradients have passed them
    ).coalesce()
