"""A language model like GPT-2."""

from typing import Any

import keras

from dist_amp.models import transformer


def build(
    *,
    input_shape: tuple[int | None, ...] = (1024,),
    vocabulary: int = 50_257,
    vocabulary_multiple: int = 64,
    length: int | None = None,
    num_layers: int = 12,
    width: int = 768,
    num_heads: int = 12,
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    tied: bool = True,
) -> keras.Model:
    """Returns a causal transformer with pre-norm blocks; by default GPT-2.

    Tokens `[batch, length]`, integers, -> logits of the token after each,
    `[batch, length, vocabulary]`, float32 in every precision. The matrix
    product of the last layer is in the compute dtype, since it is a third of
    the work. The defaults are GPT-2's smallest, called 124M: 124,439,808
    parameters, and 36,096 more for the vocabulary's rounding.

    Source: Radford et al., "Language Models are Unsupervised Multitask
    Learners", 2019. Weights before each sum start smaller by the square root
    of the number of sums. Unlike there, GELU is exact.

    Args:
        input_shape: Of an example: its length.
        vocabulary: Number of tokens.
        vocabulary_multiple: The vocabulary is rounded up to it: matrix units
            want sizes in multiples of 8, some of 64. Tokens beyond the
            vocabulary never come, and the model learns so.
        length: Most positions. Default: the examples' length.
        num_layers: Blocks of attention and two layers after it.
        width: Of the vector at each position.
        num_heads: Of attention; divides the width.
        dropout: Rate after the embeddings and before each sum.
        attention_dropout: Rate of attention weights; takes the memory of a
            second copy of them.
        tied: The last layer has the embeddings' weights.
    """
    size = -(-vocabulary // vocabulary_multiple) * vocabulary_multiple
    embedding = keras.layers.ReversibleEmbedding(
        size,
        width,
        tie_weights=tied,
        embeddings_initializer=transformer.normal(),
        name="tokens",
    )
    tokens = keras.Input(input_shape, dtype="int32")
    x = transformer.Positions(
        transformer.length_of(input_shape, length), name="positions"
    )(embedding(tokens))
    x = keras.layers.Dropout(dropout)(x)
    stddev = transformer.STDDEV / (2 * num_layers) ** 0.5
    for number in range(num_layers):
        name = f"block_{number}"
        attention = transformer.SelfAttention(
            num_heads,
            is_causal=True,
            dropout=attention_dropout,
            stddev=stddev,
            name=f"{name}_attention",
        )
        y = attention(_norm(f"{name}_norm")(x))
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(y)])
        y = transformer.feed_forward(
            _norm(f"{name}_norm_2")(x), name=name, stddev=stddev
        )
        x = keras.layers.Add()([x, keras.layers.Dropout(dropout)(y)])
    logits = embedding(_norm("last_norm")(x), reverse=True)
    logits = keras.layers.Activation("linear", dtype="float32")(logits)
    return keras.Model(tokens, logits, name="transformer_lm")


def _norm(name: str) -> Any:
    return keras.layers.LayerNormalization(epsilon=1e-5, name=name)
