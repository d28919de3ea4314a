"""Histograms of gradients: those of one device, whatever computed them."""

import functools
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import data
from dist_amp.callbacks import Histograms
from launch import train
from launch.config import TrainConfig
from launch.run_dir import RunDir
from tests import support

BATCH, NUM_BATCHES = 8, 3


class Spare(keras.layers.Layer):
    """Has a weight that the loss does not depend on."""

    def build(self, input_shape):
        self.add_weight(shape=(2,), name="spare")

    def call(self, x):
        return x


def make_model():
    """The embedding's gradient is sparse."""
    return keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            keras.layers.Embedding(5, 6, name="tokens"),
            keras.layers.GlobalAveragePooling1D(),
            Spare(name="nothing"),
            keras.layers.Dense(3, dtype="float32", name="last"),
        ]
    )


def make_arrays():
    random = np.random.default_rng(4)
    number = BATCH * NUM_BATCHES
    x = random.integers(0, 5, size=(number, 4)).astype("int32")
    return x, random.integers(0, 3, size=number).astype("int32")


def expected_gradients(model, rows):
    """By hand, on one device, in float32."""
    weights = [tf.Variable(value) for value in support.read(model.variables)]
    table, _, kernel, bias = weights
    x, y = (array[rows] for array in make_arrays())
    with tf.GradientTape() as tape:
        embedded = tf.reduce_mean(tf.gather(table, x), axis=1)
        logits = embedded @ kernel + bias
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(y, logits)
        loss = tf.reduce_mean(losses)
    found = tape.gradient(loss, [table, kernel, bias])
    return [tf.convert_to_tensor(gradient).numpy() for gradient in found]


def read_events(folder):
    """Of each histogram the steps, and buckets `[n, 3]`: from, to, number."""
    found = {}
    for path in sorted(folder.glob("events*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                steps = found.setdefault(value.tag, {})
                steps[event.step] = tf.make_ndarray(value.tensor)
    return found


@pytest.mark.parametrize(
    ("num_replicas", "precision", "parts"),
    [(1, "float32", 1), (2, "mixed_float16", 1), (2, "mixed_float16", 3)],
)
def test_they_are_those_of_the_newest_update(
    tmp_path, num_replicas, precision, parts
):
    """The rate is 0, so that every update sees the first weights."""
    trainer = support.make_trainer(
        make_model,
        functools.partial(
            support.make_sgd,
            0.0,
            clipvalue=1e-6,  # what is kept is not clipped yet
            gradient_accumulation_steps=parts if parts > 1 else None,
        ),
        num_replicas=num_replicas,
        precision=precision,
    )
    batches = data.from_arrays(make_arrays(), BATCH)
    trainer.build(batches)
    log = trainer.keep_gradients()
    assert log.read() == {}
    histograms = Histograms(
        tmp_path,
        gradients=log.read,
        global_step=lambda: trainer.global_step,
        every_epochs=2,
    )
    trainer.fit(batches, epochs=3, callbacks=[histograms], verbose=0)
    newest = slice(-BATCH * parts, None)
    expected = expected_gradients(trainer.model, newest)
    kept = log.read()
    paths = ["tokens/embeddings", "last/kernel", "last/bias"]
    assert [path.partition("/")[2] for path in kept] == paths
    support.assert_close(list(kept.values()), expected, precision)
    support.assert_same_on_replicas(log.variables)
    assert not trainer.untracked(batches)  # checkpoints are what they were
    events = read_events(tmp_path)
    variables = trainer.model.trainable_variables
    shown = {f"gradients/{path}": value for path, value in kept.items()}
    shown |= {
        f"weights/{variable.path}": value
        for variable, value in zip(
            variables, support.read(variables), strict=True
        )
    }
    assert set(events) == set(shown)
    for tag, values in shown.items():
        ((step, buckets),) = events[tag].items()
        assert step == 2 * NUM_BATCHES // parts
        assert buckets[:, 2].sum() == values.size
        ends = [buckets[0, 0], buckets[-1, 1]]
        np.testing.assert_allclose(ends, [values.min(), values.max()])
        if ends[0] < ends[1]:
            counts, _ = np.histogram(values, bins=len(buckets))
            assert np.abs(counts - buckets[:, 2]).sum() <= 2  # on a border


def test_a_skipped_update_leaves_the_newest_that_was_applied():
    trainer = support.make_trainer(
        make_model, num_replicas=2, precision="mixed_float16"
    )
    batches = data.from_arrays(make_arrays(), BATCH)
    trainer.build(batches)
    log = trainer.keep_gradients()
    trainer.train_on(batches(tf.constant(0, tf.int64)), num_steps=2)
    before = list(log.read().values())
    trainer.model.layers[-1].kernel.assign(np.full((6, 3), 1e38))
    logs = trainer.train_on(batches(tf.constant(0, tf.int64)))
    assert logs["skipped_updates"] == 1
    support.assert_close(list(log.read().values()), before)
    assert np.abs(before[0]).max() > 0


def test_flags_write_them_and_the_graph_beside_the_scalars(tmp_path):
    config = TrainConfig(
        run_dir=str(tmp_path),
        epochs=1,
        histogram_every_epochs=1,
        tensorboard_graph=True,
        precision="float32",
    )
    assert train.train(config, RunDir(config.directory)) == 0
    tags = read_events(tmp_path / "tensorboard" / "histograms")
    kinds = {tag.partition("/")[0] for tag in tags}
    assert kinds == {"gradients", "weights"}
    assert len(tags) == 8
    (graph,) = (
        event.graph_def
        for path in (tmp_path / "tensorboard" / "train").glob("events*")
        for event in tf.compat.v1.train.summary_iterator(str(path))
        if event.graph_def
    )
    assert b"train_loop" in graph or b"while" in graph


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
