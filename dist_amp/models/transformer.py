"""Parts of transformers: attention, positions, the two layers after it.

Source: Vaswani et al., "Attention Is All You Need", NeurIPS 2017.
"""

from typing import Any

import keras
from keras import ops

STDDEV = 0.02  # of weights, in GPT-2 and BERT
_NEVER = -1e30  # finite: a position that sees nothing is not NaN


def normal(stddev: float = STDDEV) -> keras.initializers.Initializer:
    """How weights begin."""
    return keras.initializers.RandomNormal(stddev=stddev)


@keras.saving.register_keras_serializable(package="dist_amp")
class SelfAttention(keras.layers.Layer):
    """Multi-head attention of a sequence to itself.

    `[batch, length, width]` -> the same shape. Queries, keys and values come
    of one matrix product, and the heads of Keras' `dot_product_attention`,
    whose softmax is in float32. It drops out no attention weights, so where
    there is a rate they are computed here, by the same formula.

    Args:
        num_heads: Divides the width.
        is_causal: Each position sees itself and those before.
        dropout: Rate of attention weights.
        stddev: Of the last projection's weights at the start.
        **options: Of `keras.layers.Layer`.

    Raises:
        ValueError: `num_heads` does not divide the width.
    """

    def __init__(
        self,
        num_heads: int,
        *,
        is_causal: bool = False,
        dropout: float = 0.0,
        stddev: float = STDDEV,
        **options: Any,
    ):
        super().__init__(**options)
        self.num_heads = num_heads
        self.is_causal = is_causal
        self.dropout_rate = dropout
        self.stddev = stddev

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the two projections, and what drops out."""
        width = input_shape[-1] or 0
        if width % self.num_heads:
            raise ValueError(
                "`num_heads` must divide the width. Received "
                f"{self.num_heads} heads and width {width}."
            )
        self.inward = self._projection(3 * width, STDDEV, "inward")
        self.outward = self._projection(width, self.stddev, "outward")
        self.inward.build(input_shape)
        self.outward.build(input_shape)
        self.drop = None
        if self.dropout_rate:
            self.drop = keras.layers.Dropout(
                self.dropout_rate, dtype=self.dtype_policy, name="weights"
            )

    def _projection(self, units: int, stddev: float, name: str) -> Any:
        return keras.layers.Dense(
            units,
            kernel_initializer=normal(stddev),
            dtype=self.dtype_policy,
            name=name,
        )

    def call(self, x: Any, visible: Any = None, training: Any = None) -> Any:
        """Attends.

        Args:
            x: `[batch, length, width]`.
            visible: `[batch, length]`, false where nothing is to be seen.
                Not called a mask, which Keras would pass on by itself.
            training: Whether weights are dropped out.
        """
        length, width = ops.shape(x)[1], x.shape[-1]
        depth = width // self.num_heads
        parts = ops.reshape(
            self.inward(x), (-1, length, 3, self.num_heads, depth)
        )
        query, key, value = ops.unstack(parts, 3, axis=2)
        query *= depth**-0.5  # before the product, which float16 overflows
        mask = None if visible is None else visible[:, None, None, :]
        if self.drop is None:
            heads = ops.dot_product_attention(
                query,
                key,
                value,
                mask=mask,
                scale=1.0,
                is_causal=self.is_causal,
            )
        else:
            weights = self.drop(
                self._weights(query, key, mask), training=training
            )
            heads = ops.einsum("bnts,bsnd->btnd", weights, value)
        return self.outward(ops.reshape(heads, (-1, length, width)))

    def _weights(self, query: Any, key: Any, mask: Any) -> Any:
        """What each position takes of the others, `[batch, heads, to, from]`.

        Args:
            query: `[batch, length, heads, depth]`, scaled.
            key: Of the same shape.
            mask: `[batch, 1, 1, length]`, or None.
        """
        scores = ops.cast(ops.einsum("btnd,bsnd->bnts", query, key), "float32")
        if self.is_causal:
            place = ops.arange(ops.shape(scores)[-1])
            earlier = place[:, None] >= place
            mask = earlier if mask is None else ops.logical_and(mask, earlier)
        if mask is not None:
            scores = ops.where(mask, scores, _NEVER)
        return ops.cast(ops.softmax(scores), query.dtype)

    def compute_output_shape(
        self, input_shape: tuple[int | None, ...], **_: Any
    ) -> tuple[int | None, ...]:
        """That of the input."""
        return input_shape

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        return super().get_config() | {
            "num_heads": self.num_heads,
            "is_causal": self.is_causal,
            "dropout": self.dropout_rate,
            "stddev": self.stddev,
        }


@keras.saving.register_keras_serializable(package="dist_amp")
class Positions(keras.layers.Layer):
    """Adds a learned vector for each position of a sequence.

    `[batch, length, width]` -> the same shape.

    Args:
        max_length: Longest sequence.
        **options: Of `keras.layers.Layer`.

    Raises:
        ValueError: A sequence is longer.
    """

    def __init__(self, max_length: int, **options: Any):
        super().__init__(**options)
        self.max_length = max_length

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the table."""
        self.table = self.add_weight(
            shape=(self.max_length, input_shape[-1]),
            initializer=normal(),
            name="embeddings",
        )

    def call(self, x: Any) -> Any:
        """Adds the first rows of the table."""
        if (x.shape[1] or 0) > self.max_length:
            raise ValueError(
                f"Sequences of {x.shape[1]} are longer than the model's "
                f"{self.max_length} positions (--model_option=length=...)."
            )
        return x + self.table[: ops.shape(x)[1]]

    def get_config(self) -> dict[str, Any]:
        """Keras configuration."""
        return super().get_config() | {"max_length": self.max_length}


def feed_forward(x: Any, *, name: str, stddev: float = STDDEV) -> Any:
    """Two layers of each position, four times as wide between, exact GELU.

    Args:
        x: `[batch, length, width]`.
        name: Of the layers.
        stddev: Of the second layer's weights at the start.
    """
    width = x.shape[-1]
    y = keras.layers.Dense(
        4 * width,
        activation="gelu",
        kernel_initializer=normal(),
        name=f"{name}_inward",
    )(x)
    return keras.layers.Dense(
        width, kernel_initializer=normal(stddev), name=f"{name}_outward"
    )(y)


def length_of(input_shape: tuple[int | None, ...], length: int | None) -> int:
    """How many positions a model needs.

    Args:
        input_shape: Of a sequence of tokens.
        length: As asked for; None: as the data has it.

    Raises:
        ValueError: Neither tells, or the input is no sequence.
    """
    if len(input_shape) != 1:
        raise ValueError(
            "A sequence of tokens has shape [length]. Received inputs of "
            f"shape {list(input_shape)}."
        )
    found = length or input_shape[0]
    if found is None:
        raise ValueError(
            "The data does not tell how long its sequences are: pass "
            "`length` (--model_option=length=512)."
        )
    return found
