"""PyTorch with autocast, eager or compiled."""

import contextlib

import torch
from torch import nn
from torch.nn import functional

from benchmarks import workloads
from benchmarks.passes import Passes, Setting, read_setting


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
    """Twin of the workload `lm`."""

    def __init__(self) -> None:
        super().__init__()
        width = workloads.LM_WIDTH
        self.tokens = nn.Embedding(workloads.LM_VOCABULARY, width)
        self.positions = nn.Parameter(
            0.02 * torch.randn(workloads.LM_LENGTH, width)
        )
        self.blocks = nn.Sequential(
            *(
                Block(width, workloads.LM_HEADS)
                for _ in range(workloads.LM_BLOCKS)
            )
        )
        self.norm = nn.LayerNorm(width)
        self.logits = nn.Linear(width, workloads.LM_VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[batch, length]` to logits `[batch, classes, length]`."""
        x = self.blocks(self.tokens(tokens) + self.positions)
        return self.logits(self.norm(x)).transpose(1, 2)


def _convolution(
    before: int, width: int, size: int = 3, stride: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, width, size, stride, padding=size // 2, bias=False),
        nn.BatchNorm2d(width),
    )


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, before: int, width: int, stride: int):
        super().__init__()
        self.first = _convolution(before, width, stride=stride)
        self.second = _convolution(width, width)
        self.shortcut = (
            _convolution(before, width, size=1, stride=stride)
            if stride > 1
            else nn.Identity()
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[batch, channels, rows, columns]` images."""
        y = self.second(functional.relu(self.first(x)))
        return functional.relu(y + self.shortcut(x))


def make_model(name: str) -> nn.Module:
    """The twin of a workload's model."""
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    if name == "lm":
        return LanguageModel()
    before = workloads.CONV_WIDTHS[0]
    parts: list[nn.Module] = [_convolution(3, before), nn.ReLU()]
    for width in workloads.CONV_WIDTHS:
        for _ in range(workloads.CONV_BLOCKS):
            parts.append(Residual(before, width, 1 if width == before else 2))
            before = width
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 10)]
    return nn.Sequential(*parts)


def _arrays(setting: Setting) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = map(torch.from_numpy, setting.work.make_arrays())
    if x.ndim == 4 and x.shape[-1] == 3:
        # Indexing keeps the layout: batches are channels last, too.
        x = x.permute(0, 3, 1, 2)
    return x, y.long()


class Training:
    """Model, optimizer, running metrics and the batches to come."""

    def __init__(self, setting: Setting):
        self.setting = setting
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = make_model(setting.workload).to(self.device)
        if setting.workload == "conv":
            model = model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(
            model.parameters(), workloads.LEARNING_RATE, fused=True
        )
        self.scaler = torch.amp.GradScaler(
            self.device, enabled=setting.precision == "mixed_float16"
        )
        self.model = torch.compile(model) if setting.compiles else model
        self.x, self.y = _arrays(setting)
        self.order = torch.empty(0, dtype=torch.long)
        self.reset()

    def reset(self) -> None:
        """Forgets the metrics."""
        self.loss = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), device=self.device)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next examples of a shuffled pass over the data."""
        size = self.setting.work.batch_size
        if len(self.order) < size:
            self.order = torch.randperm(len(self.x))
        indices, self.order = self.order[:size], self.order[size:]
        x, y = self.x[indices], self.y[indices]
        if self.setting.workload == "conv":
            x = x.contiguous(memory_format=torch.channels_last)
        return x.to(self.device), y.to(self.device)

    def precision(self) -> contextlib.AbstractContextManager:
        """Autocast, if the policy is mixed."""
        name = self.setting.precision.removeprefix("mixed_")
        if name == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device, getattr(torch, name))

    def step(self) -> None:
        """Forward, backward, update, metrics."""
        x, y = self.next_batch()
        with self.precision():
            logits = self.model(x)
        loss = functional.cross_entropy(logits.float(), y)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        with torch.no_grad():
            self.loss += loss
            self.correct += (logits.argmax(1) == y).sum()


def main() -> None:
    """Trains until no more passes are asked for."""
    setting, passes = read_setting(), Passes()
    training = Training(setting)
    while passes.wait():
        training.reset()
        for _ in range(setting.steps):
            training.step()
        passes.done(float(training.loss) / setting.steps)


if __name__ == "__main__":
    main()
