"""What is told of a skipped update: replica, variables, scale, batch."""

import logging
import pathlib
import sys

import keras
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import replay, storage
from tests import support

NUM_BATCHES = 5
BAD_BATCH = 3  # from 1
# Finite in float32, infinite in float16.
TOO_LARGE = 1e30


def poisoned(row=0):
    """One example of a batch is too large for float16."""
    x, y = support.make_arrays(NUM_BATCHES * support.GLOBAL_BATCH)
    x[(BAD_BATCH - 1) * support.GLOBAL_BATCH + row] = TOO_LARGE
    return support.batched((x, y))


def make_trainer(num_replicas=1, **options):
    return support.make_trainer(
        num_replicas=num_replicas, precision="mixed_float16", **options
    )


def lines(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.name == "dist_amp.overflow"
    ]


@pytest.mark.parametrize("steps_per_loop", [1, 2, "auto"])
@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_the_log_names_replica_variables_scale_and_batch(
    caplog, num_replicas, steps_per_loop
):
    caplog.set_level(logging.WARNING)
    trainer = make_trainer(num_replicas)
    row = 5
    trainer.fit(
        poisoned(row), epochs=2, steps_per_loop=steps_per_loop, verbose=0
    )
    replica = row * num_replicas // support.GLOBAL_BATCH
    paths = [v.path for v in trainer.model.trainable_variables]
    first, second = lines(caplog)
    first, _, advice = first.partition(". If it goes on: ")
    assert "launch.replay --step=3" in advice
    assert "--precision=auto_layers" in advice
    assert [first, second] == [
        f"step {step} skipped: not finite on replica {replica} of "
        f"{num_replicas}: {', '.join(paths)} (4 of 4 variables); loss scale "
        f"{scale}, now {scale // 2}; batch 3 of epoch {epoch}"
        for epoch, step, scale in [(1, 3, 2**15), (2, 8, 2**14)]
    ]


def test_only_what_is_not_finite_is_named():
    trainer = make_trainer()
    optimizer = trainer.optimizer
    trainer.build(support.make_dataset())
    variables = trainer.model.trainable_variables
    gradients = [tf.ones(v.shape) for v in variables]
    gradients[2] = gradients[2] * float("inf")
    optimizer.apply(gradients, variables)
    found = optimizer.overflows.read()
    assert found.paths == ((variables[2].path,),)
    assert (found.attempt, found.loss_scale) == (0, 2.0**15)
    optimizer.apply([tf.ones(v.shape) for v in variables], variables)
    assert optimizer.overflows.read() == found  # good updates change nothing


def test_it_is_no_state_of_the_optimizer():
    trainer = make_trainer(2)
    trainer.fit(poisoned(), verbose=0)
    mine = {id(v) for v in trainer.optimizer.overflows.variables}
    assert not mine & {id(v) for v in trainer.optimizer.variables}
    assert trainer.untracked(poisoned()) == []


def test_accumulated_gradients_are_told_too(caplog):
    trainer = make_trainer(
        2,
        make_optimizer=lambda: support.make_sgd(gradient_accumulation_steps=2),
    )
    trainer.fit(poisoned(), verbose=0)
    (line,) = lines(caplog)
    assert line.startswith("step 2 skipped: not finite on replica 0 of 2: ")
    assert "batch 3 of epoch 1. If it goes on: " in line


def test_what_is_not_finite_in_the_data_is_told_each_time(caplog):
    x, y = support.make_arrays(NUM_BATCHES * support.GLOBAL_BATCH)
    x[(BAD_BATCH - 1) * support.GLOBAL_BATCH] = float("nan")
    trainer = make_trainer()
    trainer.fit(support.batched((x, y)), epochs=2, verbose=0)
    first, second = lines(caplog)
    for epoch, line in enumerate((first, second), start=1):
        assert line.endswith(
            f"batch 3 of epoch {epoch}; the data hold NaN or infinite numbers, "
            "clean them"
        )


def test_skips_without_end_end_in_an_error_with_the_report():
    x, y = support.make_arrays(40 * support.GLOBAL_BATCH)
    x[::8] = TOO_LARGE
    trainer = make_trainer(
        2, loss_scale_options={"initial_scale": 1.0, "min_scale": 1.0}
    )
    with pytest.raises(FloatingPointError) as caught:
        trainer.fit(support.batched((x, y)), verbose=0)
    first = trainer.model.trainable_variables[0].path
    assert "20 updates in a row were skipped" in str(caught.value)
    told = f"The one before it was not finite on replica 0 of 2: {first}"
    assert told in str(caught.value)
    assert "`python -m launch.replay --step=" in str(caught.value)
    assert "--precision=auto_layers" in str(caught.value)


def test_lines_end_when_there_were_many(caplog):
    x, y = support.make_arrays(60 * support.GLOBAL_BATCH)
    x[::8] = TOO_LARGE
    trainer = make_trainer(
        loss_scale_options={"initial_scale": 2.0**20, "min_scale": 2.0**-60}
    )
    trainer.fit(support.batched((x, y)), steps_per_loop=1, verbose=0)
    assert len(lines(caplog)) == 50
    assert lines(caplog)[-1].endswith("(no more lines like this)")


# ------------------------------------------------------------------- replays


def make_steep():
    """Its second layer's output is where float16 ends."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            layers.Dense(8, name="first"),
            layers.Rescaling(100.0, name="steep"),
            layers.LayerNormalization(name="norm"),
            layers.Dense(support.NUM_CLASSES, dtype="float32", name="head"),
        ]
    )


def steep_data():
    x, y = support.make_arrays(NUM_BATCHES * support.GLOBAL_BATCH)
    x[(BAD_BATCH - 1) * support.GLOBAL_BATCH + 5] = 2e3
    return support.batched((x, y))


@pytest.mark.parametrize("has_checkpoint", [True, False])
@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_replay_finds_the_layer(tmp_path, num_replicas, has_checkpoint):
    def make():
        return make_trainer(num_replicas, make_model=make_steep)

    run = make()
    run.fit(steep_data(), epochs=2, checkpoint_dir=tmp_path / "a", verbose=0)
    found = replay.replay(
        make(),
        steep_data(),
        8,
        checkpoint_dir=str(tmp_path / ("a" if has_checkpoint else "none")),
    )
    assert (found.step, found.epoch, found.batch) == (8, 2, 3)
    assert found.loss_scale == 2.0**14
    assert found.is_skipped
    assert [bool(paths) for paths in found.replicas] == [
        replica == num_replicas - 1 for replica in range(num_replicas)
    ]
    assert found.activation.startswith("steep (its output reaches ")


def test_a_replay_of_a_good_update_finds_nothing(tmp_path):
    run = make_trainer(2, make_model=make_steep)
    run.fit(steep_data(), checkpoint_dir=tmp_path, verbose=0)
    trainer = make_trainer(2, make_model=make_steep)
    found = replay.replay(trainer, steep_data(), 2)
    assert not found.is_skipped
    assert (found.batch, found.activation) == (2, None)


def test_a_replay_arrives_with_the_runs_weights(tmp_path):
    """The update itself, made after the replay, is that of the run."""
    run = make_trainer(2)
    run.fit(poisoned(), epochs=2, checkpoint_dir=tmp_path, verbose=0)
    again = make_trainer(2)
    replay.replay(again, poisoned(), 10, checkpoint_dir=str(tmp_path))
    last = poisoned().skip(NUM_BATCHES - 1)
    again.train_on(last)
    support.assert_close(
        support.read(again.model.variables),
        support.read(run.model.variables),
    )


@pytest.mark.parametrize("is_told", [True, False], ids=["later", "policy"])
def test_a_replay_passes_over_what_the_run_went_back_for(tmp_path, is_told):
    x, y = support.make_arrays(NUM_BATCHES * support.GLOBAL_BATCH)
    x[(BAD_BATCH - 1) * support.GLOBAL_BATCH] = float("nan")
    policy = dist_amp.RollbackPolicy(lower="learning_rate")
    options = {"checkpoint_dir": str(tmp_path), "rollback": policy}

    def dataset(number):
        return support.batched((x, y))

    run = support.make_trainer()
    run.fit(dataset, verbose=0, **options)
    assert run.model.history.history["rollbacks"] == [1]
    if not is_told:
        storage.remove(storage.find(str(tmp_path))[-1])
    again = support.make_trainer()
    found = replay.replay(again, dataset, 4, **options)
    assert (found.batch, found.is_skipped) == (NUM_BATCHES, False)
    again.train_on(dataset(0).skip(NUM_BATCHES - 1))
    support.assert_close(
        support.read(again.model.variables), support.read(run.model.variables)
    )
    assert float(again.optimizer.learning_rate) == pytest.approx(
        float(run.optimizer.learning_rate)
    )


def test_a_replay_starts_from_a_whole_checkpoint(tmp_path):
    run = make_trainer()
    run.fit(poisoned(), epochs=2, checkpoint_dir=tmp_path, verbose=0)
    first, last = storage.find(str(tmp_path))
    assert replay.newest_before(str(tmp_path), 11) == last
    (file,) = pathlib.Path(last).glob("tensors.data-*")
    file.write_bytes(file.read_bytes()[:-1])
    assert replay.newest_before(str(tmp_path), 11) == first
    assert replay.newest_before(str(tmp_path), 5) is None


class _Ends(keras.callbacks.Callback):
    def on_epoch_end(self, epoch, logs=None):
        self.model.stop_training = True


def test_a_step_beyond_the_run_is_told():
    dataset = support.make_dataset(8)
    with pytest.raises(ValueError, match="--step"):
        replay.replay(make_trainer(), dataset, 9, callbacks=[_Ends()])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
