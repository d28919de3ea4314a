"""The loop of TensorFlow's tutorials: a compiled step in a Python `for`."""

import keras
import tensorflow as tf

from benchmarks import keras_models
from benchmarks import tensorflow_setup as setup
from benchmarks.passes import Passes, read_setting
from benchmarks.workloads import LEARNING_RATE


def main() -> None:
    """Trains until no more passes are asked for."""
    setting, passes = read_setting(), Passes()
    keras.mixed_precision.set_global_policy(setting.precision)
    strategy = setup.stock_strategy(setting)
    with strategy.scope():
        model = keras_models.build(keras, setting.work.sizes)
        optimizer = keras.optimizers.Adam(LEARNING_RATE)
        if setting.precision == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
        optimizer.build(model.trainable_variables)
        mean_loss = keras.metrics.Mean()
        accuracy = keras.metrics.SparseCategoricalAccuracy()
    compute_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(x: tf.Tensor, y: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            predictions = model(x, training=True)
            loss = compute_loss(y, predictions)
            scaled = optimizer.scale_loss(loss / setting.replicas)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(scaled, variables), variables)
        mean_loss.update_state(loss)
        accuracy.update_state(y, predictions)

    @tf.function
    def train_step(x: tf.Tensor, y: tf.Tensor) -> None:
        strategy.run(step, args=(x, y))

    batches = setup.dataset(setting)
    if setting.replicas > 1:
        batches = strategy.experimental_distribute_dataset(batches)
    iterator = iter(batches)
    while passes.wait():
        mean_loss.reset_state()
        accuracy.reset_state()
        for _ in range(setting.steps):
            train_step(*next(iterator))
        passes.done(float(mean_loss.result()))


if __name__ == "__main__":
    main()
