"""`dist_amp.Trainer.fit`, as a newcomer would write it."""

import keras

import dist_amp
import dist_amp.data
from benchmarks import tensorflow_setup as setup
from benchmarks.passes import Passes, read_setting
from benchmarks.workloads import LEARNING_RATE


def main() -> None:
    """Trains until no more passes are asked for."""
    setting, passes = read_setting(), Passes()
    names = setup.devices(setting.replicas)
    strategy = dist_amp.make_strategy(devices=names)
    with dist_amp.scope(strategy, setting.precision):
        model = setting.work.build(keras)
        optimizer = dist_amp.wrap_optimizer(
            keras.optimizers.Adam(LEARNING_RATE)
        )
    trainer = dist_amp.Trainer(
        model,
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
    )
    work = setting.work
    trainer.fit(
        dist_amp.data.from_arrays(work.make_arrays(), work.batch_size, 0),
        epochs=10**6,
        steps_per_epoch=setting.steps,
        callbacks=[setup.TakeTurns(passes)],
        verbose=0,
    )


if __name__ == "__main__":
    main()
