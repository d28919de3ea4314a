"""`Trainer.predict`: every example once, in order, on any replicas."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from tests import support

# Batches of 8, then one of 3: with four replicas one of them gets nothing.
NUM_EXAMPLES = 27


def make_two_outputs():
    x = keras.Input((support.NUM_FEATURES,))
    hidden = keras.layers.Dense(4, activation="gelu")(x)
    return keras.Model(x, {"hidden": hidden, "sum": keras.ops.sum(x, axis=1)})


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_every_example_in_order(num_replicas, precision):
    trainer = support.make_trainer(
        num_replicas=num_replicas, precision=precision
    )
    x, _ = support.make_arrays(NUM_EXAMPLES)
    predicted = trainer.predict(support.make_dataset(NUM_EXAMPLES))
    expected = trainer.model(x).numpy()
    assert predicted.shape == (NUM_EXAMPLES, support.NUM_CLASSES)
    support.assert_close([predicted], [expected], precision)


def test_inputs_alone_and_several_outputs():
    """Metrics wait for targets: a trainer may predict before it is built."""
    trainer = support.make_trainer(
        make_two_outputs, num_replicas=2, metrics={"sum": ["mae"]}, loss=None
    )
    x, _ = support.make_arrays(NUM_EXAMPLES)
    predicted = trainer.predict(support.batched(x))
    np.testing.assert_allclose(predicted["sum"], x.sum(axis=1), rtol=1e-5)
    assert predicted["hidden"].shape == (NUM_EXAMPLES, 4)


def test_of_data_without_end_or_length():
    trainer = support.make_trainer(num_replicas=2)
    dataset = support.make_dataset(NUM_EXAMPLES)
    whole = trainer.predict(dataset.filter(lambda x, y: True))
    some = trainer.predict(dataset.repeat(), steps=2)
    np.testing.assert_array_equal(some, whole[: 2 * support.GLOBAL_BATCH])
    with pytest.raises(ValueError, match="`steps` is needed"):
        trainer.predict(dataset.repeat())
    with pytest.raises(ValueError, match="it yields no batch"):
        trainer.predict(dataset.take(0))


def test_another_predict_step():
    class Classes(dist_amp.Trainer):
        def predict_step(self, batch):
            logits = super().predict_step(batch)
            return tf.argmax(logits, axis=-1)

    one = support.make_trainer(num_replicas=2)
    trainer = Classes(one.model, one.optimizer, loss=support.make_loss())
    dataset = support.make_dataset(NUM_EXAMPLES)
    expected = np.argmax(one.predict(dataset), axis=-1)
    np.testing.assert_array_equal(trainer.predict(dataset), expected)


def test_it_leaves_training_as_it_was():
    trainer = support.make_trainer(num_replicas=2)
    dataset = support.make_dataset(NUM_EXAMPLES)
    trainer.fit(dataset, epochs=1, verbose=0)
    before = trainer.evaluate(dataset)
    logs = trainer.metrics.num_examples
    trainer.predict(dataset)
    assert trainer.metrics.num_examples == logs
    assert trainer.evaluate(dataset) == before


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
