"""The gate: how well each expert suits each token, and what keeps the experts evenly loaded.

A gate maps tokens to logits, one for each expert; :class:`~hpcpar.nn.experts.layer.MixtureOfExperts` chooses
by them. A router is a tiny part of the arithmetic and decides everything, so it always computes in float32
(float64 for tokens in float64), under autocast too.

Three things keep the load even, and any of them may be off:

* the *balancing loss* (Switch Transformer, Fedus et al. 2021, eq. 4): ``E * sum_e f_e P_e``, where ``f_e`` is
  the fraction of all choices that fell on expert *e* and ``P_e`` its mean probability;
* the *z-loss* (ST-MoE, Zoph et al. 2022, eq. 5), the mean of the squared log of the softmax's denominator,
  which keeps logits small;
* the *bias* (DeepSeek-V3, 2024, section 2.1.2): added to the probabilities for choosing, not for weighting,
  and moved a step up or down after each forward; it needs no loss.

Invariant: all are over the *global* batch. The losses have the same value on every rank, and their gradients
are such that the mean over the ranks' is the gradient of the value.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from hpcpar.errors import MismatchError

__all__ = ["TopKGate", "router_dtype"]


class TopKGate(nn.Module):
    """A linear router for :class:`~hpcpar.nn.MixtureOfExperts`.

    Parameters
    ----------
    in_features
        Features of a token.
    num_experts
        Number of experts.
    top_k
        Experts that each token goes to; all of them where there are fewer.
    balancing_coefficient, z_coefficient
        Of the two losses.
    bias_update_rate
        Step of the bias after each training forward; 0 leaves it.
    normalize
        Let the weights of a token's experts sum to one; ``None``: when there are several.
    jitter
        In training, tokens are multiplied by noise from ``[1 - jitter, 1 + jitter]`` before they are judged.

    Attributes
    ----------
    balancing_loss, z_loss : torch.Tensor
        Of the last forward of the layer, over the batches of all ranks, times their coefficients. Scalars
        with a graph: add them to the loss.
    expert_bias : torch.Tensor
        Shape (num_experts,).

    Raises
    ------
    MismatchError
        For numbers that make no sense.
    """

    expert_bias: torch.Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        top_k: int = 2,
        balancing_coefficient: float = 0.01,
        z_coefficient: float = 0.001,
        bias_update_rate: float = 0.0,
        normalize: bool | None = None,
        jitter: float = 0.0,
    ) -> None:
        super().__init__()
        check_top_k(top_k)
        for name, value in (
            ("balancing_coefficient", balancing_coefficient),
            ("z_coefficient", z_coefficient),
            ("bias_update_rate", bias_update_rate),
            ("jitter", jitter),
        ):
            if not value >= 0.0:
                raise MismatchError(f"{name} of a gate must not be negative, got {value}")
        self.in_features = in_features
        self.num_experts = num_experts
        self.top_k = top_k
        self.balancing_coefficient = balancing_coefficient
        self.z_coefficient = z_coefficient
        self.bias_update_rate = bias_update_rate
        self.normalize = normalize
        self.jitter = jitter
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.register_buffer("expert_bias", torch.zeros(num_experts))
        self.balancing_loss = torch.zeros(())
        self.z_loss = torch.zeros(())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as those of ``nn.Linear``. Local."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits. Local.

        Parameters
        ----------
        tokens
            Shape (tokens, in_features), any floating type.

        Returns
        -------
        torch.Tensor
            Shape (tokens, num_experts), float32 or float64.
        """
        dtype = router_dtype(tokens.dtype)
        with torch.autocast(tokens.device.type, enabled=False):
            tokens = tokens.to(dtype)
            if self.training and self.jitter:
                tokens = tokens * torch.empty_like(tokens).uniform_(1.0 - self.jitter, 1.0 + self.jitter)
            return F.linear(tokens, self.weight.to(dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> TopKGate:
        """Convert or move, but leave the bias in a type in which small steps count. Local."""
        bias = self.expert_bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.expert_bias.dtype.itemsize < 4:
            self.expert_bias = bias.to(self.expert_bias.device)
        return self

    def update_bias(self, load: torch.Tensor) -> None:
        """Make overloaded experts less likely, and the others more. Local.

        Parameters
        ----------
        load
            Choices of each expert over all ranks, shape (num_experts,), int64: integers, so that all ranks do
            exactly the same.
        """
        if self.bias_update_rate:
            below = torch.sign(load.sum() - len(load) * load).to(self.expert_bias)
            self.expert_bias.add_(below, alpha=self.bias_update_rate)

    def extra_repr(self) -> str:
        """The line that ``print`` shows. Local."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}, top_k={self.top_k}"

    def __getstate__(self) -> dict[str, Any]:
        # Tensors with a graph can neither be copied nor pickled.
        losses = {"balancing_loss": self.balancing_loss.detach(), "z_loss": self.z_loss.detach()}
        return {**self.__dict__, **losses}


def router_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a router computes in, for tokens of ``dtype``. Local."""
    return torch.float64 if dtype is torch.float64 else torch.float32


def check_top_k(top_k: object) -> None:
    """Raise unless ``top_k`` is a number of experts. Local."""
    if isinstance(top_k, bool) or not isinstance(top_k, int) or top_k < 1:
        raise MismatchError(f"top_k of a gate must be a positive integer, got {top_k!r}")
