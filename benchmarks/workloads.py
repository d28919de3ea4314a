"""What every contender trains: a model, examples in memory, a batch size.

The models are written once for Keras 3 and tf_keras, whose layers have the
same names; `contenders.pytorch` has their twins.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

LEARNING_RATE = 1e-3

LM_VOCABULARY, LM_LENGTH, LM_WIDTH, LM_HEADS, LM_BLOCKS = 2048, 128, 256, 4, 4
CONV_WIDTHS, CONV_BLOCKS = (16, 32, 64), 3


@dataclasses.dataclass(frozen=True)
class Workload:
    """One row of the results.

    Attributes:
        name: As in the tables.
        batch_size: Global batch.
        steps: Steps in a pass, so that one takes seconds on a CPU.
        flops_per_example: Multiplications and additions of the matrix
            products and convolutions, forward and backward.
        make_arrays: Returns inputs and targets, `[num_examples, ...]`.
        build: Takes the module `keras` or `tf_keras`; returns a model whose
            outputs are float32 logits.
    """

    name: str
    batch_size: int
    steps: int
    flops_per_example: float
    make_arrays: Callable[[], tuple[np.ndarray, np.ndarray]]
    build: Callable[[Any], Any]


def _images(*shape: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    images = generator.random((number, *shape), np.float32)
    labels = generator.integers(0, 10, number, np.int32)
    return images, labels


def _tokens() -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    size = (1024, LM_LENGTH + 1)
    tokens = generator.integers(0, LM_VOCABULARY, size, np.int32)
    return tokens[:, :-1].copy(), tokens[:, 1:].copy()


def _mlp(keras: Any) -> Any:
    return keras.Sequential(
        [
            keras.layers.Input((28, 28, 1)),
            keras.layers.Flatten(),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(10, dtype="float32"),
        ]
    )


def _lm(keras: Any) -> Any:
    layers = keras.layers

    class Positions(layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(
                shape=tuple(shape[1:]), initializer="normal", name="table"
            )

        def call(self, x: Any) -> Any:
            return x + self.table

    tokens = layers.Input((LM_LENGTH,), dtype="int32")
    x = layers.Embedding(LM_VOCABULARY, LM_WIDTH)(tokens)
    x = Positions()(x)
    for _ in range(LM_BLOCKS):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        attention = layers.MultiHeadAttention(LM_HEADS, LM_WIDTH // LM_HEADS)
        x = layers.Add()([x, attention(y, y, use_causal_mask=True)])
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        y = layers.Dense(4 * LM_WIDTH, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(LM_WIDTH)(y)])
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    logits = layers.Dense(LM_VOCABULARY)(x)
    logits = layers.Activation("linear", dtype="float32")(logits)
    return keras.Model(tokens, logits)


def _conv(keras: Any) -> Any:
    layers = keras.layers

    def convolve(x: Any, width: int, size: int = 3, strides: int = 1) -> Any:
        x = layers.Conv2D(
            width, size, strides=strides, padding="same", use_bias=False
        )(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    images = layers.Input((32, 32, 3))
    x = layers.ReLU()(convolve(images, CONV_WIDTHS[0]))
    for width in CONV_WIDTHS:
        for _ in range(CONV_BLOCKS):
            strides = 1 if x.shape[-1] == width else 2
            y = layers.ReLU()(convolve(x, width, strides=strides))
            y = convolve(y, width)
            if strides > 1:
                x = convolve(x, width, size=1, strides=strides)
            x = layers.ReLU()(layers.Add()([x, y]))
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(10, dtype="float32")(x))


def _lm_flops() -> float:
    weights = LM_BLOCKS * 12 * LM_WIDTH**2 + LM_WIDTH * LM_VOCABULARY
    attention = LM_BLOCKS * 2 * LM_LENGTH * LM_WIDTH
    return 6 * LM_LENGTH * (weights + attention)


def _conv_flops() -> float:
    total, side, before = 32 * 32 * 27 * CONV_WIDTHS[0], 32, CONV_WIDTHS[0]
    for width in CONV_WIDTHS:
        if width != before:
            side //= 2
            total += side**2 * before * width  # the shortcut
        total += side**2 * 9 * before * width
        total += side**2 * 9 * width**2 * (2 * CONV_BLOCKS - 1)
        before = width
    return 6 * total


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "mlp",
            64,
            1000,
            6 * (784 * 64 + 64 * 10),
            lambda: _images(28, 28, 1, number=51_200),
            _mlp,
        ),
        Workload("lm", 16, 10, _lm_flops(), _tokens, _lm),
        Workload(
            "conv",
            64,
            20,
            _conv_flops(),
            lambda: _images(32, 32, 3, number=4096),
            _conv,
        ),
    )
}
