"""The workloads' models, for Keras 3 and for tf_keras."""

from typing import Any

from benchmarks.workloads import Dense, ResNet, Sizes, Transformer


def build(keras: Any, sizes: Sizes) -> Any:
    """A model whose outputs are float32 logits.

    Args:
        keras: The module `keras` or `tf_keras`.
        sizes: Of a workload.
    """
    if isinstance(sizes, Dense):
        return _dense(keras, sizes)
    if isinstance(sizes, Transformer):
        return _transformer(keras, sizes)
    return _resnet(keras, sizes)


def _dense(keras: Any, sizes: Dense) -> Any:
    layers = keras.layers
    *hidden, classes = sizes.widths
    return keras.Sequential(
        [
            layers.Input(sizes.shape),
            layers.Flatten(),
            *(layers.Dense(width, activation="relu") for width in hidden),
            layers.Dense(classes, dtype="float32"),
        ]
    )


def _transformer(keras: Any, sizes: Transformer) -> Any:
    layers, width = keras.layers, sizes.width

    class Positions(layers.Layer):
        def build(self, shape: Any) -> None:
            self.table = self.add_weight(
                shape=tuple(shape[1:]), initializer="normal", name="table"
            )

        def call(self, x: Any) -> Any:
            return x + self.table

    tokens = layers.Input((sizes.length,), dtype="int32")
    x = Positions()(layers.Embedding(sizes.vocabulary, width)(tokens))
    for _ in range(sizes.blocks):
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        attention = layers.MultiHeadAttention(sizes.heads, width // sizes.heads)
        x = layers.Add()([x, attention(y, y, use_causal_mask=True)])
        y = layers.LayerNormalization(epsilon=1e-5)(x)
        y = layers.Dense(4 * width, activation="gelu")(y)
        x = layers.Add()([x, layers.Dense(width)(y)])
    x = layers.LayerNormalization(epsilon=1e-5)(x)
    logits = layers.Dense(sizes.vocabulary)(x)
    return keras.Model(
        tokens, layers.Activation("linear", dtype="float32")(logits)
    )


def _resnet(keras: Any, sizes: ResNet) -> Any:
    layers = keras.layers

    def convolve(x: Any, width: int, size: int, strides: int = 1) -> Any:
        x = layers.Conv2D(
            width, size, strides=strides, padding="same", use_bias=False
        )(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    def residual(x: Any, width: int, strides: int) -> Any:
        if sizes.has_bottlenecks:
            y = layers.ReLU()(convolve(x, width, 1))
            y = layers.ReLU()(convolve(y, width, 3, strides))
            y = convolve(y, 4 * width, 1)
        else:
            y = layers.ReLU()(convolve(x, width, 3, strides))
            y = convolve(y, width, 3)
        if x.shape[-1] != y.shape[-1]:
            x = convolve(x, y.shape[-1], 1, strides)
        return layers.ReLU()(layers.Add()([x, y]))

    images = layers.Input((sizes.side, sizes.side, 3))
    if sizes.has_bottlenecks:
        x = layers.ReLU()(convolve(images, sizes.widths[0], 7, 2))
        x = layers.MaxPooling2D(3, strides=2, padding="same")(x)
    else:
        x = layers.ReLU()(convolve(images, sizes.widths[0], 3))
    for width, strides in sizes.strides():
        x = residual(x, width, strides)
    x = layers.GlobalAveragePooling2D()(x)
    return keras.Model(images, layers.Dense(sizes.classes, dtype="float32")(x))
