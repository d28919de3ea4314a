"""The limit: a compiled loop on one batch that lies on the device.

No input, no metrics, no callbacks; the same optimizer as dist_amp.
"""

import keras
import tensorflow as tf

import dist_amp
from benchmarks import keras_models
from benchmarks import tensorflow_setup as setup
from benchmarks.passes import Passes, read_setting
from benchmarks.workloads import LEARNING_RATE


def main() -> None:
    """Trains until no more passes are asked for."""
    setting, passes = read_setting(), Passes()
    names = setup.devices(setting)
    strategy = dist_amp.make_strategy(devices=names)
    with dist_amp.scope(strategy, setting.precision):
        model = keras_models.build(keras, setting.work.sizes)
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.Adam(LEARNING_RATE)
        )
        optimizer.build(model.trainable_variables)
    rows = setting.work.batch_size // setting.replicas
    x, y = (array[:rows] for array in setting.work.make_arrays())
    copies = strategy.experimental_distribute_values_from_function(
        lambda context: (tf.constant(x), tf.constant(y))
    )
    compute_loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def step(batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        x, y = batch
        with tf.GradientTape() as tape:
            loss = compute_loss(y, model(x, training=True)) / setting.replicas
            scaled = optimizer.scale_loss(loss)
        variables = model.trainable_variables
        optimizer.apply(tape.gradient(scaled, variables), variables)
        return loss

    @tf.function
    def loop(num_steps: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(num_steps - 1):
            strategy.run(step, args=(copies,))
        losses = strategy.run(step, args=(copies,))
        return strategy.reduce("SUM", losses, axis=None)

    while passes.wait():
        passes.done(float(loop(tf.constant(setting.steps))))


if __name__ == "__main__":
    main()
