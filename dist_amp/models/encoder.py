"""A transformer that classifies sequences, like BERT."""

from typing import Any

import keras
from keras import ops

from dist_amp.models import transformer

_POOLINGS = ("first", "mean")


def build(
    *,
    input_shape: tuple[int | None, ...] = (512,),
    num_classes: int = 2,
    vocabulary: int = 30_522,
    length: int | None = None,
    num_layers: int = 12,
    width: int = 768,
    num_heads: int = 12,
    dropout: float = 0.1,
    attention_dropout: float = 0.0,
    pooling: str = "first",
    padding: int = 0,
) -> keras.Model:
    """Returns a bidirectional transformer; by default as large as BERT-base.

    Tokens `[batch, length]`, integers, -> logits `[batch, classes]`, float32
    in every precision. Positions that hold `padding` are seen by no other.

    Source: Devlin et al., "BERT: Pre-training of Deep Bidirectional
    Transformers for Language Understanding", NAACL 2019. Unlike there, no
    segments are told apart, and by default no attention weights dropped out.

    Args:
        input_shape: Of an example: its length.
        num_classes: Number of logits.
        vocabulary: Number of tokens.
        length: Most positions. Default: the examples' length.
        num_layers: Blocks of attention and two layers after it.
        width: Of the vector at each position.
        num_heads: Of attention; divides the width.
        dropout: Rate after the embeddings, before each sum, and at the end.
        attention_dropout: Rate of attention weights, 0.1 in the paper; takes
            the memory of a second copy of them.
        pooling: "first" classifies by the first position, where BERT has
            [CLS]; "mean" by the mean of all that are no padding.
        padding: The token that fills up sequences.

    Raises:
        ValueError: `pooling` is neither of these.
    """
    if pooling not in _POOLINGS:
        raise ValueError(
            f"`pooling` must be one of {', '.join(_POOLINGS)}. Received "
            f"{pooling!r} (--model_option=pooling=...)."
        )
    tokens = keras.Input(input_shape, dtype="int32")
    is_token = ops.not_equal(tokens, padding)
    x = keras.layers.Embedding(
        vocabulary,
        width,
        embeddings_initializer=transformer.normal(),
        name="tokens",
    )(tokens)
    most = transformer.length_of(input_shape, length)
    x = _norm("norm")(transformer.Positions(most, name="positions")(x))
    x = keras.layers.Dropout(dropout)(x)
    for number in range(num_layers):
        name = f"block_{number}"
        attention = transformer.SelfAttention(
            num_heads, dropout=attention_dropout, name=f"{name}_attention"
        )
        y = keras.layers.Dropout(dropout)(attention(x, visible=is_token))
        x = _norm(f"{name}_norm")(keras.layers.Add()([x, y]))
        y = transformer.feed_forward(x, name=name)
        y = keras.layers.Dropout(dropout)(y)
        x = _norm(f"{name}_norm_2")(keras.layers.Add()([x, y]))
    x = keras.layers.Dropout(dropout)(_pooled(x, is_token, pooling))
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer=transformer.normal(),
        dtype="float32",
        name="logits",
    )(x)
    return keras.Model(tokens, logits, name="encoder")


def _norm(name: str) -> Any:
    return keras.layers.LayerNormalization(epsilon=1e-12, name=name)


def _pooled(x: Any, is_token: Any, pooling: str) -> Any:
    """One vector for each sequence, `[batch, width]`."""
    if pooling == "mean":  # in float32: a sum of thousands; 0 of no token
        weight = ops.expand_dims(ops.cast(is_token, "float32"), -1)
        total = ops.sum(ops.cast(x, "float32") * weight, axis=1)
        return total / ops.maximum(ops.sum(weight, axis=1), 1.0)
    return keras.layers.Dense(
        x.shape[-1],
        activation="tanh",
        kernel_initializer=transformer.normal(),
        name="pooler",
    )(x[:, 0])
