"""A small GPT on bytes: the usual decoder-only transformer, pre-norm, with learned positions.

    bytes (batch, time)
      token + position embedding           (batch, time, width)
      depth x  [ x + attention(norm(x)) ;  x + mlp(norm(x)) ]
      norm, head                           (batch, time, 256)

The vocabulary is the 256 bytes: no tokenizer, and a loss in nats per byte that can be compared
with any compressor's bits per byte. Initialisation as in GPT-2: normal with deviation 0.02,
projections into the residual stream scaled down by the root of their number. There is no dropout,
so the output is a function of weights and input alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

__all__ = ["Gpt", "GptConfig", "Mlp", "generate", "initialise"]

VOCABULARY = 256


@dataclass(frozen=True)
class GptConfig:
    """Size of the model. `context` is the longest input, in bytes; `heads` must divide `width`."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    tied_head: bool = True


class Attention(nn.Module):
    """Causal self-attention with several heads, (batch, time, width) to the same."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.query_key_value = nn.Linear(config.width, 3 * config.width)
        self.projection = nn.Linear(config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, time, width = x.shape
        heads = self.query_key_value(x).view(batch, time, 3 * self.heads, width // self.heads).transpose(1, 2)
        query, key, value = heads.chunk(3, dim=1)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        projected: torch.Tensor = self.projection(mixed.transpose(1, 2).reshape(batch, time, width))
        return projected


class Mlp(nn.Module):
    """A two-layer perceptron, (..., width) to the same."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.expansion = nn.Linear(config.width, 4 * config.width)
        self.projection = nn.Linear(4 * config.width, config.width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        projected: torch.Tensor = self.projection(F.gelu(self.expansion(x)))
        return projected


class Block(nn.Module):
    """One layer: attention, then a perceptron or what takes its place, each beside a residual connection."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp: nn.Module = Mlp(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        x = x + self.mlp(self.mlp_norm(x))
        return x


class Gpt(nn.Module):
    """The model. Input: integers 0 to 255, (batch, time); output: logits, (batch, time, 256)."""

    def __init__(self, config: GptConfig) -> None:
        super().__init__()
        self.config = config
        self.token = nn.Embedding(VOCABULARY, config.width)
        self.position = nn.Embedding(config.context, config.width)
        self.blocks = nn.Sequential(*(Block(config) for _ in range(config.layers)))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, VOCABULARY, bias=False)
        initialise(self, config)
        if config.tied_head:
            self.head.weight = self.token.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token(tokens) + self.position(positions)
        logits: torch.Tensor = self.head(self.norm(self.blocks(x)))
        return logits


def initialise(module: nn.Module, config: GptConfig) -> None:
    """Draw the matrices of a model, or of a part of it, and set its biases to zero."""
    residual_scale = 1.0 / math.sqrt(2 * config.layers)
    for name, parameter in module.named_parameters():
        if parameter.dim() == 1:
            continue  # norms start as the identity, see below for the biases
        into_residual = name.endswith("projection.weight")
        nn.init.normal_(parameter, std=0.02 * (residual_scale if into_residual else 1.0))
    for part in module.modules():
        if isinstance(part, nn.Linear) and part.bias is not None:
            nn.init.zeros_(part.bias)


@torch.no_grad()
def generate(net: Gpt, prompt: bytes, count: int, seed: int, temperature: float = 0.8) -> bytes:
    """Continue a prompt of at least one byte by `count` sampled bytes. Returns them without the prompt.

    Each byte takes one forward of the last `context` bytes.
    """
    device = net.token.weight.device
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.tensor([list(prompt)], dtype=torch.int64, device=device)
    for _ in range(count):
        logits = net(tokens[:, -net.config.context :])[0, -1].float().cpu()
        choice = torch.multinomial(F.softmax(logits / temperature, dim=0), 1, generator=generator)
        tokens = torch.cat([tokens, choice.to(device).unsqueeze(0)], dim=1)
    return bytes(tokens[0, len(prompt) :].tolist())
