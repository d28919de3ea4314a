"""The workloads' models, for PyTorch."""

import itertools
import math

import torch
from torch import nn
from torch.nn import functional

from benchmarks.workloads import Dense, ResNet, Sizes, Transformer


def build(sizes: Sizes) -> nn.Module:
    """The twin of `keras_models.build`."""
    if isinstance(sizes, Dense):
        return _dense(sizes)
    if isinstance(sizes, Transformer):
        return LanguageModel(sizes)
    return _resnet(sizes)


def _dense(sizes: Dense) -> nn.Module:
    widths = (math.prod(sizes.shape), *sizes.widths)
    parts: list[nn.Module] = [nn.Flatten()]
    for before, width in itertools.pairwise(widths):
        parts += [nn.Linear(before, width), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.first_norm = nn.LayerNorm(width)
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.second_norm = nn.LayerNorm(width)
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, length, width]` to the same."""
        batch, length, width = x.shape
        heads = self.queries_keys_values(self.first_norm(x)).view(
            batch, length, 3, self.heads, width // self.heads
        )
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(
            query, key, value, is_causal=True
        )
        x = x + self.projection(mixed.transpose(1, 2).reshape(x.shape))
        wide = functional.gelu(self.widen(self.second_norm(x)))
        return x + self.narrow(wide)


class LanguageModel(nn.Module):
    """A decoder with learned positions."""

    def __init__(self, sizes: Transformer):
        super().__init__()
        width = sizes.width
        self.tokens = nn.Embedding(sizes.vocabulary, width)
        self.positions = nn.Parameter(0.02 * torch.randn(sizes.length, width))
        self.blocks = nn.Sequential(
            *(Block(width, sizes.heads) for _ in range(sizes.blocks))
        )
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, sizes.vocabulary)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch, length]` to logits `[batch, classes, length]`."""
        x = self.blocks(self.tokens(tokens) + self.positions)
        return self.logits(self.norm(x)).transpose(1, 2)


def _convolution(
    before: int, width: int, size: int, stride: int = 1
) -> nn.Sequential:
    padding = size // 2
    return nn.Sequential(
        nn.Conv2d(before, width, size, stride, padding, bias=False),
        nn.BatchNorm2d(width),
    )


class Residual(nn.Module):
    """Convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int, is_wide: bool):
        super().__init__()
        after = 4 * width if is_wide else width
        if is_wide:
            self.branch = nn.Sequential(
                _convolution(before, width, 1),
                nn.ReLU(),
                _convolution(width, width, 3, stride),
                nn.ReLU(),
                _convolution(width, after, 1),
            )
        else:
            self.branch = nn.Sequential(
                _convolution(before, width, 3, stride),
                nn.ReLU(),
                _convolution(width, width, 3),
            )
        self.shortcut: nn.Module = nn.Identity()
        if before != after:
            self.shortcut = _convolution(before, after, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, rows, columns]` images."""
        return functional.relu(self.branch(x) + self.shortcut(x))


def _resnet(sizes: ResNet) -> nn.Module:
    before, is_wide = sizes.widths[0], sizes.has_bottlenecks
    if is_wide:
        stem = _convolution(3, before, 7, 2)
        parts = [stem, nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    else:
        parts = [_convolution(3, before, 3), nn.ReLU()]
    for width, stride in sizes.strides():
        parts.append(Residual(before, width, stride, is_wide))
        before = 4 * width if is_wide else width
    head = nn.Linear(before, sizes.classes)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
