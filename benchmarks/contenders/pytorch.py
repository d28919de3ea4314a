"""PyTorch with autocast, eager or compiled."""

import contextlib

import torch
from torch.nn import functional

from benchmarks import torch_models
from benchmarks.passes import Passes, Setting, read_setting
from benchmarks.workloads import LEARNING_RATE, ResNet


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
        self.has_images = isinstance(setting.work.sizes, ResNet)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.backends.cuda.matmul.allow_tf32 = setting.allows_tf32
        torch.backends.cudnn.allow_tf32 = setting.allows_tf32
        model = torch_models.build(setting.work.sizes).to(self.device)
        if self.has_images:
            model = model.to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.Adam(
            model.parameters(), LEARNING_RATE, fused=True
        )
        self.scaler = torch.amp.GradScaler(
            self.device, enabled=setting.precision == "mixed_float16"
        )
        self.model = torch.compile(model) if setting.compiles else model
        self.x, self.y = (a.to(self.device) for a in _arrays(setting))
        self.order = torch.empty(0, dtype=torch.long, device=self.device)
        self.reset()

    def reset(self) -> None:
        """Forgets the metrics."""
        self.loss = torch.zeros((), device=self.device)
        self.correct = torch.zeros((), device=self.device)

    def next_batch(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The next examples of a shuffled pass over the data."""
        size = self.setting.work.batch_size
        if len(self.order) < size:
            self.order = torch.randperm(len(self.x), device=self.device)
        indices, self.order = self.order[:size], self.order[size:]
        x, y = self.x[indices], self.y[indices]
        if self.has_images:
            x = x.contiguous(memory_format=torch.channels_last)
        return x, y

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
        loss = float(training.loss) / setting.steps
        passes.done(loss, torch.cuda.max_memory_allocated())


if __name__ == "__main__":
    main()
