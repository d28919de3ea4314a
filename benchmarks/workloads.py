"""What every contender trains: sizes of a model, examples in memory, a batch.

The models themselves stand in `keras_models` (for Keras 3 and tf_keras, whose
layers have the same names) and in `torch_models`.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import TypeAlias

import numpy as np

LEARNING_RATE = 1e-3


@dataclasses.dataclass(frozen=True)
class Dense:
    """Dense layers on a flattened input, the last one with the classes."""

    shape: tuple[int, ...]
    widths: tuple[int, ...]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.widths[-1]

    @property
    def flops(self) -> float:
        """Of the matrix products, forward and backward, for one example."""
        inputs = (math.prod(self.shape), *self.widths)
        return 6.0 * sum(
            a * b for a, b in zip(inputs, self.widths, strict=False)
        )

    def make_arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Random inputs and classes."""
        return _images(self.shape, self.classes, number)


@dataclasses.dataclass(frozen=True)
class Transformer:
    """A decoder like GPT-2: pre-norm blocks, learned positions."""

    vocabulary: int
    length: int
    width: int
    heads: int
    blocks: int

    @property
    def flops(self) -> float:
        """Of the matrix products, forward and backward, for one example."""
        weights = self.blocks * 12 * self.width**2
        weights += self.width * self.vocabulary
        attention = self.blocks * 2 * self.length * self.width
        return 6.0 * self.length * (weights + attention)

    def make_arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Random tokens and those that follow."""
        generator = np.random.default_rng(0)
        size = (number, self.length + 1)
        tokens = generator.integers(0, self.vocabulary, size, np.int32)
        return tokens[:, :-1].copy(), tokens[:, 1:].copy()


@dataclasses.dataclass(frozen=True)
class ResNet:
    """Stages of residual blocks; bottlenecks and a large stem, or neither."""

    side: int
    classes: int
    widths: tuple[int, ...]
    blocks: tuple[int, ...]
    has_bottlenecks: bool

    def strides(self) -> Iterator[tuple[int, int]]:
        """Width and stride of each block."""
        stages = zip(self.widths, self.blocks, strict=True)
        for stage, (width, number) in enumerate(stages):
            for block in range(number):
                yield width, 2 if stage and not block else 1

    @property
    def flops(self) -> float:
        """Of the convolutions, forward and backward, for one example."""
        side, before = self.side, self.widths[0]
        stem = 27 * before
        if self.has_bottlenecks:
            side //= 2
            stem = 3 * 49 * before
        total = side**2 * stem
        if self.has_bottlenecks:
            side //= 2
        for width, stride in self.strides():
            out = side // stride
            after = 4 * width if self.has_bottlenecks else width
            if self.has_bottlenecks:
                total += side**2 * before * width
                total += out**2 * (9 * width**2 + width * after)
            else:
                total += out**2 * 9 * (before * width + width**2)
            if before != after:
                total += out**2 * before * after
            side, before = out, after
        return 6.0 * (total + before * self.classes)

    def make_arrays(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Random images and classes."""
        return _images((self.side, self.side, 3), self.classes, number)


Sizes: TypeAlias = Dense | Transformer | ResNet


@dataclasses.dataclass(frozen=True)
class Workload:
    """One model and its data.

    Attributes:
        name: As in the tables.
        sizes: Of the model.
        batch_size: Global batch.
        num_examples: In memory, shuffled anew each pass over them.
        steps: Steps in a timed pass, which then takes seconds.
    """

    name: str
    sizes: Sizes
    batch_size: int
    num_examples: int
    steps: int

    def make_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, `[num_examples, ...]`."""
        return self.sizes.make_arrays(self.num_examples)


def _images(
    shape: tuple[int, ...], classes: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.random((number, *shape), np.float32)
    return images, generator.integers(0, classes, number, np.int32)


def _deep(num_variables: int) -> Workload:
    """Nothing but overhead: as many variables, all of them small."""
    widths = (16,) * (num_variables // 2)
    return Workload(
        f"deep{num_variables}",
        Dense((16,), widths),
        32,
        3200,
        4000 // num_variables,
    )


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("mlp", Dense((28, 28, 1), (64, 10)), 64, 51_200, 1000),
        Workload("lm", Transformer(2048, 128, 256, 4, 4), 16, 1024, 10),
        Workload(
            "conv", ResNet(32, 10, (16, 32, 64), (3, 3, 3), False), 64, 4096, 20
        ),
        _deep(10),
        _deep(100),
        _deep(1000),
        Workload(
            "resnet50",
            ResNet(224, 1000, (64, 128, 256, 512), (3, 4, 6, 3), True),
            256,
            1024,
            20,
        ),
        Workload("gpt2", Transformer(50_304, 1024, 768, 12, 12), 16, 512, 20),
        Workload("tiny_resnet", ResNet(32, 10, (8, 16), (1, 1), True), 4, 8, 2),
        Workload("tiny_gpt", Transformer(64, 16, 16, 2, 1), 4, 8, 2),
    )
}
