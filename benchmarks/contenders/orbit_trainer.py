"""Orbit's `StandardTrainer`, which stays on tf_keras."""

import orbit
import tensorflow as tf
import tf_keras

from benchmarks import keras_models
from benchmarks import tensorflow_setup as setup
from benchmarks.passes import Passes, Setting, read_setting
from benchmarks.workloads import LEARNING_RATE


class Trainer(orbit.StandardTrainer):
    """Orbit's loop around a step as its documentation writes it."""

    def __init__(self, setting: Setting, strategy: tf.distribute.Strategy):
        self.strategy, self.replicas = strategy, setting.replicas
        with strategy.scope():
            self.model = keras_models.build(tf_keras, setting.work.sizes)
            self.optimizer = tf_keras.optimizers.Adam(LEARNING_RATE)
            self.scales = setting.precision == "mixed_float16"
            if self.scales:
                self.optimizer = tf_keras.mixed_precision.LossScaleOptimizer(
                    self.optimizer
                )
            self.optimizer.build(self.model.trainable_variables)
            self.mean_loss = tf_keras.metrics.Mean()
            self.accuracy = tf_keras.metrics.SparseCategoricalAccuracy()
        self.compute_loss = tf_keras.losses.SparseCategoricalCrossentropy(
            from_logits=True, reduction="none"
        )
        batches = setup.dataset(setting)
        if setting.replicas > 1:
            batches = strategy.experimental_distribute_dataset(batches)
        super().__init__(batches)

    def train_loop_begin(self) -> None:
        """Forgets the last pass."""
        self.mean_loss.reset_states()
        self.accuracy.reset_states()

    def train_step(self, iterator: tf.data.Iterator) -> None:
        """One step of all replicas."""
        self.strategy.run(self._step, args=(next(iterator),))

    def _step(self, batch: tuple[tf.Tensor, tf.Tensor]) -> None:
        x, y = batch
        with tf.GradientTape() as tape:
            predictions = self.model(x, training=True)
            loss = tf.reduce_mean(self.compute_loss(y, predictions))
            scaled = loss / self.replicas
            if self.scales:
                scaled = self.optimizer.get_scaled_loss(scaled)
        variables = self.model.trainable_variables
        gradients = tape.gradient(scaled, variables)
        if self.scales:
            gradients = self.optimizer.get_unscaled_gradients(gradients)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        self.mean_loss.update_state(loss)
        self.accuracy.update_state(y, predictions)

    def train_loop_end(self) -> dict[str, tf.Tensor]:
        """The metrics of the pass."""
        return {
            "loss": self.mean_loss.result(),
            "accuracy": self.accuracy.result(),
        }


def main() -> None:
    """Trains until no more passes are asked for."""
    setting, passes = read_setting(), Passes()
    tf_keras.mixed_precision.set_global_policy(setting.precision)
    trainer = Trainer(setting, setup.stock_strategy(setting))
    while passes.wait():
        logs = trainer.train(tf.constant(setting.steps))
        passes.done(float(logs["loss"]))


if __name__ == "__main__":
    main()
