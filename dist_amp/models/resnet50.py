"""ResNet-50 and its kin of bottleneck blocks."""

import dataclasses
from typing import Any

import keras

from dist_amp.models.batch_norm import batch_norm

_EXPANSION = 4
_LARGEST_SMALL_IMAGE = 64


def build(
    *,
    input_shape: tuple[int | None, ...] = (224, 224, 3),
    num_classes: int = 1000,
    blocks: tuple[int, ...] = (3, 4, 6, 3),
    width: int = 64,
    small_images: bool | None = None,
    stochastic_depth: float = 0.0,
    synchronized: bool | None = None,
) -> keras.Model:
    """Returns a residual net of bottlenecks; by default ResNet-50, v1.5.

    Images `[batch, height, width, channels]` -> logits `[batch, classes]`,
    float32 in every precision. 25,557,032 trainable parameters with 1000
    classes. Made of Keras' own layers.

    Sources: He et al., "Deep Residual Learning for Image Recognition", CVPR
    2016; v1.5 halves the image in the 3x3 convolution rather than in the 1x1
    before it. The last scale of each block starts at 0, and the last layer at
    a standard deviation of 0.01: Goyal et al., "Accurate, Large Minibatch
    SGD", 2017. Stochastic depth: Huang et al., ECCV 2016; here each example
    draws by itself, and what is kept is scaled up while training.

    Args:
        input_shape: Of an image: height, width, channels.
        num_classes: Number of logits.
        blocks: Blocks of each stage; the image is halved between stages.
        width: Channels within the first stage's blocks, doubled each stage.
        small_images: Begins with a 3x3 convolution and no pooling, so that
            the image keeps its size; None: for images up to 64x64.
        stochastic_depth: Rate at which the last block is left out; it grows
            from 0 in proportion to the depth.
        synchronized: Batch norm over all replicas; None: if there are
            several.
    """
    images = keras.Input(input_shape)
    if small_images is None:
        side = input_shape[0]
        small_images = side is not None and side <= _LARGEST_SMALL_IMAGE
    x = _stem(images, width, synchronized, is_small=small_images)
    for number, block in enumerate(blocks_of(blocks, width, stochastic_depth)):
        x = _residual(x, block, synchronized, f"block_{number}")
    x = keras.layers.GlobalAveragePooling2D()(x)
    logits = keras.layers.Dense(
        num_classes,
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        dtype="float32",
        name="logits",
    )(x)
    return keras.Model(images, logits, name="resnet")


@dataclasses.dataclass(frozen=True)
class Block:
    """A residual block: channels within, stride, rate of being left out."""

    width: int
    strides: int
    drop_rate: float


def blocks_of(
    numbers: tuple[int, ...], width: int, drop_rate: float
) -> list[Block]:
    """All blocks of a net, in order.

    Args:
        numbers: Blocks of each stage.
        width: Of the first stage.
        drop_rate: Of the last block.
    """
    total = sum(numbers)
    blocks: list[Block] = []
    for stage, number in enumerate(numbers):
        for index in range(number):
            strides = 2 if stage and not index else 1
            rate = drop_rate * (len(blocks) + 1) / total
            blocks.append(Block(width * 2**stage, strides, rate))
    return blocks


def _stem(
    images: Any, width: int, synchronized: bool | None, *, is_small: bool
) -> Any:
    size, strides = (3, 1) if is_small else (7, 2)
    x = _convolve(images, (width, size, strides), "stem")
    x = keras.layers.ReLU(name="stem_relu")(
        batch_norm(synchronized, name="stem_norm")(x)
    )
    if is_small:
        return x
    return keras.layers.MaxPooling2D(3, strides=2, padding="same")(x)


def _residual(
    x: Any, block: Block, synchronized: bool | None, name: str
) -> Any:
    out = _EXPANSION * block.width
    steps = (
        (block.width, 1, 1),
        (block.width, 3, block.strides),
        (out, 1, 1),
    )
    y = x
    for number, step in enumerate(steps):
        is_last = number == len(steps) - 1
        part = f"{name}_{number}"
        y = batch_norm(
            synchronized,
            gamma_initializer="zeros" if is_last else "ones",
            name=f"{part}_norm",
        )(_convolve(y, step, part))
        if not is_last:
            y = keras.layers.ReLU(name=f"{part}_relu")(y)
    if block.drop_rate:
        y = keras.layers.Dropout(
            block.drop_rate, noise_shape=(None, 1, 1, 1), name=f"{name}_depth"
        )(y)
    if block.strides > 1 or x.shape[-1] != out:
        x = _convolve(x, (out, 1, block.strides), f"{name}_shortcut")
        x = batch_norm(synchronized, name=f"{name}_shortcut_norm")(x)
    return keras.layers.ReLU(name=f"{name}_relu")(keras.layers.Add()([x, y]))


def _convolve(x: Any, step: tuple[int, int, int], name: str) -> Any:
    """A convolution of `(width, size, strides)`, without bias."""
    width, size, strides = step
    return keras.layers.Conv2D(
        width,
        size,
        strides=strides,
        padding="same",
        use_bias=False,
        kernel_initializer="he_normal",
        name=name,
    )(x)
