"""docs/moving.md runs, and our optimizer works in other people's code."""

import importlib.util
import pathlib
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from tests import support

ROOT = pathlib.Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "moving.md").read_text()
SETUP, *SECTIONS = re.split(r"^## From ", PAGE, flags=re.MULTILINE)
NAMES = [section.partition("\n")[0] for section in SECTIONS]
# They may be absent: Orbit is where it is installed, Horovod for no TensorFlow
# of today.
OTHERS = ("orbit", "horovod")


def blocks(text):
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def run(code):
    names = {"__name__": "moving"}
    for part in (*blocks(SETUP), code):
        exec(compile(part, "moving.md", "exec"), names)
    return names


@pytest.fixture(autouse=True)
def _policy():
    yield
    keras.config.set_dtype_policy("float32")


@pytest.mark.parametrize("section", SECTIONS, ids=NAMES)
def test_before_and_after_train(section):
    before, after = blocks(section)
    keras.utils.set_random_seed(0)
    history = run(after)["history"].history
    assert history["loss"][1] < history["loss"][0]
    module = re.search(r"^import (\w+)", before, re.MULTILINE)
    is_here = module and importlib.util.find_spec(module[1]) is not None
    if module and module[1] in OTHERS and not is_here:
        compile(before, "moving.md", "exec")
        return
    run(before)


def test_after_is_as_before():
    """In float32 on one device Keras fit and the trainer do the same."""
    weights = []
    for code in blocks(SECTIONS[NAMES.index("Keras fit")]):
        keras.utils.set_random_seed(0)
        names = run(code.replace('"auto"), "auto"', '"auto"), "float32"'))
        weights.append(names["model"].get_weights())
        accuracy = names["results"]["accuracy"]
        predicted = np.argmax(names["predictions"], axis=1)
        assert np.mean(predicted == names["y"]) == pytest.approx(accuracy)
    support.assert_close(*weights)


class Custom(keras.Model):
    """Its train step is written as Keras' documentation writes one."""

    def __init__(self):
        super().__init__()
        self.inner = support.make_mlp()

    def call(self, x, training=False):
        return self.inner(x, training=training)

    def train_step(self, data):
        x, y = data
        with tf.GradientTape() as tape:
            predictions = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=predictions)
            scaled_loss = self.optimizer.scale_loss(loss)
        variables = self.trainable_variables
        gradients = tape.gradient(scaled_loss, variables)
        self.optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return self.compute_metrics(x, y, predictions)


@pytest.mark.parametrize("overflows", [False, True])
def test_a_models_own_train_step_on_replicas(overflows):
    """The same as Keras' own step on one device; replicas skip alike."""
    # A gradient of 1 is inf in float16 at 2**16; each skip halves the scale.
    scale = 2.0**24 if overflows else 2.0**10
    options = {
        "precision": "mixed_float16",
        "loss_scale_options": {"initial_scale": scale},
    }
    dataset = support.make_dataset().repeat(4)
    one, two = (
        support.fit_keras(dataset, Custom, num_replicas=n, **options)
        for n in (1, 2)
    )
    plain = support.fit_keras(dataset, **options)
    support.assert_close(two.weights, one.weights, "mixed_float16")
    support.assert_close(one.weights, plain.weights, "mixed_float16")
    support.assert_same_on_replicas(two.model.variables)
    skipped = [
        int(support.read([x.optimizer.skipped_updates])[0]) for x in (one, two)
    ]
    assert skipped[0] == skipped[1]
    assert (skipped[0] > 0) == overflows
    assert isinstance(two.model.optimizer, dist_amp.LossScaleOptimizer)


def test_orbits_controller_drives_our_steps():
    """Runs where Orbit is installed; it is no requirement of ours."""
    orbit = pytest.importorskip("orbit")
    trainer = support.make_trainer(num_replicas=2)
    step = tf.Variable(0, dtype=tf.int64)

    class Steps(orbit.AbstractTrainer):
        def train(self, num_steps):
            dataset = support.make_dataset().repeat()
            logs = trainer.train_on(dataset, num_steps=int(num_steps))
            step.assign_add(tf.cast(num_steps, tf.int64))
            return {"loss": logs["loss"]}

    controller = orbit.Controller(
        trainer=Steps(), global_step=step, steps_per_loop=2
    )
    controller.train(steps=4)
    assert int(trainer.optimizer.iterations.numpy()) == 4


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
