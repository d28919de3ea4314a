"""Keras 3 `compile` and `fit`."""

import keras

from benchmarks import keras_models
from benchmarks import tensorflow_setup as setup
from benchmarks.passes import Passes, read_setting
from benchmarks.workloads import LEARNING_RATE


def main() -> None:
    """Trains until no more passes are asked for."""
    setting, passes = read_setting(), Passes()
    keras.mixed_precision.set_global_policy(setting.precision)
    with setup.stock_strategy(setting).scope():
        model = keras_models.build(keras, setting.work.sizes)
        model.compile(
            keras.optimizers.Adam(LEARNING_RATE),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            metrics=["accuracy"],
            steps_per_execution=min(setting.steps_per_call, setting.steps),
            jit_compile=setting.compiles,
        )
    model.fit(
        setup.dataset(setting),
        epochs=10**6,
        steps_per_epoch=setting.steps,
        callbacks=[setup.TakeTurns(passes)],
        verbose=0,
    )


if __name__ == "__main__":
    main()
