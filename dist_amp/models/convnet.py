"""A small convolutional net for images of 8x8 to 32x32."""

import keras

from dist_amp.models.batch_norm import batch_norm


def build(
    *,
    input_shape: tuple[int | None, ...] = (8, 8, 1),
    num_classes: int = 10,
    widths: tuple[int, ...] = (32, 64),
    dropout: float = 0.0,
    synchronized: bool | None = None,
) -> keras.Model:
    """Pairs of 3x3 convolutions, each pair before a pooling by two.

    Images `[batch, height, width, channels]` -> logits `[batch, classes]`,
    float32 in every precision. Made of Keras' own layers.

    Sources: Simonyan and Zisserman, "Very Deep Convolutional Networks", ICLR
    2015, for the pairs; Lin, Chen and Yan, "Network In Network", ICLR 2014,
    for the mean over the image before the last layer.

    Args:
        input_shape: Of an image: height, width, channels.
        num_classes: Number of logits.
        widths: Channels of each pair; the image is halved after each.
        dropout: Rate before the last layer.
        synchronized: Batch norm over all replicas; None: if there are
            several.
    """
    images = keras.Input(input_shape)
    x = images
    for width in widths:
        for _ in range(2):
            x = keras.layers.Conv2D(
                width,
                3,
                padding="same",
                use_bias=False,
                kernel_initializer="he_normal",
            )(x)
            x = keras.layers.ReLU()(batch_norm(synchronized)(x))
        x = keras.layers.MaxPooling2D(2, padding="same")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    x = keras.layers.Dropout(dropout)(x)
    logits = keras.layers.Dense(num_classes, dtype="float32")(x)
    return keras.Model(images, logits, name="convnet")
