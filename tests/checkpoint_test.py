"""What a checkpoint holds, and going on from one."""

import sys

import keras
import numpy as np
import pytest

from dist_amp.checkpoint import Checkpointer
from tests import support


def make_dropout_model():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(8, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


def train(directory, *, stop_after=None, num_replicas=2, precision="float32"):
    """Trains three epochs of four steps, or until a step."""
    trainer = support.make_trainer(
        make_dropout_model,
        lambda: keras.optimizers.Adam(0.01),
        num_replicas=num_replicas,
        precision=precision,
        metrics=["accuracy"],
    )

    def stop(batch, logs):
        if trainer.global_step == stop_after:
            trainer.request_stop("the test says so")

    dataset = support.batched(support.make_arrays(30)).cache()
    history = trainer.fit(
        dataset,
        epochs=3,
        steps_per_loop=1,
        verbose=0,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)],
        checkpoint_dir=directory,
    )
    return trainer, history.history


@pytest.mark.parametrize("stop_after", [1, 4, 6])
@pytest.mark.parametrize(
    ("num_replicas", "precision"),
    [(1, "float32"), (2, "mixed_float16"), (4, "mixed_bfloat16")],
)
def test_an_interrupted_run_ends_bit_for_bit_like_a_straight_one(
    tmp_path, stop_after, num_replicas, precision
):
    options = {"num_replicas": num_replicas, "precision": precision}
    straight, history = train(tmp_path / "straight", **options)
    train(tmp_path / "parts", stop_after=stop_after, **options)
    resumed, resumed_history = train(tmp_path / "parts", **options)
    for one, other in zip(
        [*resumed.model.variables, *resumed.optimizer.variables],
        [*straight.model.variables, *straight.optimizer.variables],
        strict=True,
    ):
        np.testing.assert_array_equal(
            support.local_copies(one), support.local_copies(other)
        )
    for name in ("loss", "accuracy"):
        assert (
            resumed_history[name]
            == (history[name][-len(resumed_history[name]) :])
        )


def test_a_run_goes_on_with_another_number_of_replicas(tmp_path):
    """Every variable and counter moves over; the next steps are as right."""

    def fit(num_replicas, epochs, directory):
        trained = support.fit_trainer(
            support.make_dataset(30),
            num_replicas=num_replicas,
            fit={"epochs": epochs, "checkpoint_dir": directory},
        )
        return trained.weights

    straight = fit(1, 3, tmp_path / "straight")
    for epochs, num_replicas in enumerate([1, 4, 2], start=1):
        moved = fit(num_replicas, epochs, tmp_path / "moved")
    support.assert_close(moved, straight)


@pytest.mark.parametrize(("saved", "restored"), [(4, 4), (4, 2), (1, 2)])
def test_metrics_under_way_move_to_any_number_of_replicas(
    tmp_path, saved, restored
):
    def make(num_replicas):
        with support.make_strategy(num_replicas).scope():
            metric = keras.metrics.Mean()
        return metric, Checkpointer(
            tmp_path, {}, per_replica=metric.variables, counters=["step"]
        )

    metric, checkpointer = make(saved)
    for index, copies in enumerate(
        zip(*map(copies_of, metric.variables), strict=True)
    ):
        for copy, value in zip(copies, (0.1 + index, 1.0 + index), strict=True):
            copy.assign(value)
    checkpointer.save(1, {"step": 1})
    other, checkpointer = make(restored)
    checkpointer.restore()
    assert float(other.result()) == pytest.approx(float(metric.result()))
    if saved == restored:
        for one, two in zip(other.variables, metric.variables, strict=True):
            assert support.local_copies(one) == support.local_copies(two)


def copies_of(variable):
    return getattr(variable.value, "values", (variable.value,))


def test_keeps_the_newest_and_returns_the_counters(tmp_path):
    variable = keras.Variable([1.0, 2.0])
    checkpointer = Checkpointer(
        tmp_path, {"model": [variable]}, counters=["step"], max_to_keep=2
    )
    assert checkpointer.restore() is None
    for step in (5, 6, 7):
        variable.assign([float(step), 0.0])
        checkpointer.save(step, {"step": step})
    variable.assign([0.0, 0.0])
    assert checkpointer.restore() == {"step": 7}
    np.testing.assert_array_equal(variable, [7.0, 0.0])
    assert sorted(path.stem for path in tmp_path.glob("*.index")) == [
        "ckpt-6",
        "ckpt-7",
    ]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
