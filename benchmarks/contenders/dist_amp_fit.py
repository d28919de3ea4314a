"""`dist_amp.Trainer.fit`, as a newcomer would write it."""

import tempfile
from typing import Any

import keras

import dist_amp
import dist_amp.data
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
            keras.optimizers.Adam(LEARNING_RATE),
            loss_scale=None
            if setting.loss_scale == "none"
            else setting.loss_scale,
            wire_dtype=setting.wire_dtype or None,
        )
    trainer = dist_amp.Trainer(
        model,
        optimizer,
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=setting.compiles,
    )
    work = setting.work
    with tempfile.TemporaryDirectory() as directory:
        saving: dict[str, Any] = {}
        if setting.save_every:
            policy = dist_amp.SavePolicy(every_steps=setting.save_every)
            saving = {"checkpoint_dir": directory, "save_policy": policy}
        trainer.fit(
            setup.dataset(setting)
            if setting.records
            else dist_amp.data.from_arrays(
                work.make_arrays(), work.batch_size, 0
            ),
            epochs=10**6,
            steps_per_epoch=setting.steps,
            callbacks=[setup.TakeTurns(passes)],
            verbose=0,
            **saving,
        )


if __name__ == "__main__":
    main()
