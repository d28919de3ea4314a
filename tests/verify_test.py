"""The certificate: wrong trainings are caught and named, right ones pass."""

import dataclasses
import functools
import json
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import difference, random_state, subject
from dist_amp import strategy as strategy_lib
from dist_amp.certificate import Case, Certificate
from dist_amp.verify import SUITES, num_cases, restart_tolerance
from tests import support

F, C = support.NUM_FEATURES, support.NUM_CLASSES
layers = keras.layers


def certify(make_model=support.make_mlp, **options):
    """A short certificate of a small model."""
    defaults = {
        "optimizer_fn": support.make_sgd,
        "loss": support.make_loss(),
        "precision": "float32",
        "num_steps": 3,
        "num_replicas": [2],
        "suites": ["replicas"],
    }
    dataset = options.pop("dataset", support.make_dataset())
    return dist_amp.verify(make_model, dataset, **{**defaults, **options})


def around(*inner):
    """A classifier with some layers in it."""
    return keras.Sequential(
        [
            keras.Input((F,)),
            layers.Dense(8, activation="tanh"),
            *inner,
            layers.Dense(C, dtype="float32"),
        ]
    )


def images():
    x = np.random.default_rng(2).normal(size=(24, 6, 6, 2)).astype("float32")
    return support.batched((x, support.make_arrays(24)[1]))


def tokens(num_examples=24):
    random = np.random.default_rng(3)
    x = random.integers(1, 11, size=(num_examples, 5))
    return support.batched((x, support.make_arrays(num_examples)[1]))


# ------------------------------------------------------- what must not pass


class Overridden(dist_amp.Trainer):
    """A train step of the user's own, to be made wrong."""

    def train_step(self, batch):
        with tf.GradientTape() as tape:
            predictions = self.model(batch.x, training=True)
            loss = self.loss_of(batch, predictions)
            scaled = self.optimizer.scale_loss(loss)
        variables = self.model.trainable_variables
        self.update(tape.gradient(scaled, variables), variables)
        self.metrics.update(
            batch, self.compute_loss(batch, predictions), predictions
        )

    def loss_of(self, batch, predictions):
        return self.compute_loss(batch, predictions)

    def update(self, gradients, variables):
        self.optimizer.apply(gradients, variables)


class MeanOfSlice(Overridden):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            predictions = self.model(batch.x, training=True)
            loss = tf.reduce_mean(self.loss.call(batch.y, predictions))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.metrics.update(
            batch, self.compute_loss(batch, predictions), predictions
        )


class MeanOfMeans(MeanOfSlice):
    def train_step(self, batch):
        context = tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            predictions = self.model(batch.x, training=True)
            loss = tf.reduce_mean(self.loss.call(batch.y, predictions))
            loss /= context.num_replicas_in_sync
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.metrics.update(
            batch, self.compute_loss(batch, predictions), predictions
        )


class TellsMean(Overridden):
    def train_step(self, batch):
        _, predictions, gradients = self.compute_gradients(batch)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        mean = tf.reduce_mean(self.loss.call(batch.y, predictions))
        self.metrics.update(batch, mean, predictions)


class KeepsCenter(dist_amp.Trainer):
    """Adds up means of slices as if they were shares of one mean."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with self.strategy.scope():
            self.center = tf.Variable(tf.zeros([F]), name="center")

    def state(self):
        return {**super().state(), "center": [self.center]}

    def train_step(self, batch):
        super().train_step(batch)
        context = tf.distribute.get_replica_context()
        mean = tf.reduce_mean(batch.x, axis=0)
        self.center.assign(context.all_reduce("SUM", mean))


class CountsReplicas(keras.optimizers.SGD):
    """Keeps a number that is of no use, and another on two replicas."""

    def build(self, variables):
        super().build(variables)
        self.seen = self.add_variable((), name="seen")

    def update_step(self, gradient, variable, learning_rate):
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        self.assign_add(self.seen, float(replicas))
        super().update_step(gradient, variable, learning_rate)


class DividesTwice(Overridden):
    def loss_of(self, batch, predictions):
        context = tf.distribute.get_replica_context()
        loss = self.compute_loss(batch, predictions)
        return loss / context.num_replicas_in_sync


class ClipsFirst(Overridden):
    def train_step(self, batch):
        _, predictions, gradients = self.compute_gradients(batch)
        gradients, _ = tf.clip_by_global_norm(gradients, 0.05)
        self.optimizer.apply(gradients, self.model.trainable_variables)
        loss = self.compute_loss(batch, predictions)
        self.metrics.update(batch, loss, predictions)


class Unsummed(Overridden):
    def update(self, gradients, variables):
        for gradient, variable in zip(gradients, variables, strict=True):
            variable.assign_sub(0.1 * gradient)


class RegularizesTwice(Overridden):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            predictions = self.model(batch.x, training=True)
            values = self.loss.call(batch.y, predictions)
            loss = tf.reduce_sum(values * batch.weight)
            loss += tf.add_n(self.model.losses)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.metrics.update(
            batch, self.compute_loss(batch, predictions), predictions
        )


class Untracked(Overridden):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        with self.strategy.scope():
            self.count = tf.Variable(0.0, trainable=False, name="my_count")

    def update(self, gradients, variables):
        self.count.assign_add(1.0)
        factor = 1.0 / (1.0 + self.count)
        self.optimizer.apply([g * factor for g in gradients], variables)


class Centers(layers.Layer):
    def call(self, inputs):
        return inputs - tf.reduce_mean(inputs, axis=0)


class RemembersItsSlice(layers.Layer):
    def build(self, shape):
        self.mean = self.add_weight(
            shape=(shape[-1],),
            initializer="zeros",
            trainable=False,
            name="mean",
        )

    def call(self, inputs, training=False):
        if training:
            self.mean.assign(tf.reduce_max(tf.abs(inputs), axis=0))
        return inputs


class Noise(layers.Layer):
    def call(self, inputs):
        return inputs + tf.random.normal(tf.shape(inputs))


class Jitters(layers.Layer):
    def __init__(self):
        super().__init__()
        self.seed_generator = keras.random.SeedGenerator(5)

    def call(self, inputs):
        noise = keras.random.normal(
            tf.shape(inputs), seed=self.seed_generator, dtype=inputs.dtype
        )
        return inputs + noise


class Counts(layers.Layer):
    """Its factor is another one in every trace."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def call(self, inputs):
        self.calls += 1
        return inputs * (1.0 + 0.1 * self.calls)


class BuiltCenters(Centers):
    """Keras gives it no path."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.built = True


class ClipsScaled(Overridden):
    """Clips what is multiplied by the loss scale."""

    def update(self, gradients, variables):
        gradients, _ = tf.clip_by_global_norm(gradients, 1e-3)
        self.optimizer.apply(gradients, variables)


class Speaks(layers.Layer):
    def call(self, inputs):
        text = tf.strings.length(tf.strings.as_string(inputs))
        return inputs + 0.0 * tf.cast(text, inputs.dtype)


class MeanOfMeansMetric(keras.metrics.Metric):
    def __init__(self, name="mean_of_means", **kwargs):
        super().__init__(name=name, **kwargs)
        self.total = self.add_weight(name="total", initializer="zeros")
        self.count = self.add_weight(name="count", initializer="zeros")

    def update_state(self, y, predictions, sample_weight=None):
        self.total.assign_add(
            tf.reduce_mean(tf.cast(predictions, "float32") ** 2)
        )
        self.count.assign_add(1.0)

    def result(self):
        return self.total / self.count


def contrastive(y, predictions):
    """Values for each example, of all pairs in its batch."""
    similarity = tf.matmul(predictions, predictions, transpose_b=True)
    return tf.reduce_logsumexp(similarity, axis=-1)


def scaled_sgd():
    strategy = tf.distribute.get_strategy()
    return support.make_sgd(0.05 * strategy.num_replicas_in_sync)


def make_regularized():
    return support.make_mlp(kernel_regularizer=keras.regularizers.L2(0.1))


def make_large():
    """Its activations leave float16's range and come back."""
    return around(layers.Rescaling(1e5), layers.LayerNormalization())


def make_rounded():
    """A thousand is added and taken away, which bfloat16 cannot do."""
    return keras.Sequential(
        [
            keras.Input((F,)),
            layers.Dense(8, bias_initializer=keras.initializers.Constant(1e3)),
            layers.Rescaling(1.0, offset=-1e3),
            layers.Dense(C),
        ]
    )


def make_overflowing():
    """At a loss scale of 2**15 its whole gradient is too large by half."""
    return keras.Sequential(
        [keras.Input((1,)), layers.Dense(C, kernel_initializer="zeros")]
    )


def overflowing_dataset():
    arrays = np.full([24, 1], 4.5, "float32"), np.zeros(24, "int32")
    return support.batched(arrays)


WRONG = {
    "batch norm": (
        {"make_model": lambda: around(layers.BatchNormalization())},
        r"BatchNormalization without synchronized=True \(.*batch_norm.*\): "
        "statistics are per replica",
    ),
    "mean of the slice": (
        {"trainer": MeanOfSlice},
        "2 times too large on 2 replicas: your `train_step` divides by the "
        "local batch",
    ),
    "divided twice": (
        {"trainer": DividesTwice},
        "2 times too small on 2 replicas: your `train_step` divides by the "
        "number of replicas a second time",
    ),
    "mean of means": (
        {"trainer": MeanOfMeans},
        "weighted wrongly: your `train_step` averages over each replica's",
    ),
    "clipped first": (
        {"trainer": ClipsFirst},
        r"clipped on each replica before they are summed.*verify_test.py:\d+",
    ),
    "not summed": (
        {"trainer": Unsummed},
        "not summed over the replicas.*self.optimizer.apply",
    ),
    "regularized on every replica": (
        {"trainer": RegularizesTwice, "make_model": make_regularized},
        r"own losses \(regularization\) are added whole on every replica",
    ),
    "not in the checkpoint": (
        {"trainer": Untracked, "suites": ["restart"]},
        "checkpoints do not hold my_count.*Trainer.state",
    ),
    "mixes examples": (
        {"make_model": lambda: around(Centers(name="centers"))},
        "layer .*centers mixes the examples of a batch",
    ),
    "mixes examples, built at once": (
        {"make_model": lambda: around(BuiltCenters(name="at_once"))},
        "layer at_once mixes the examples of a batch",
    ),
    "counts in Python": (
        {"make_model": lambda: around(Counts())},
        r"`call` of layer .*counts.* changes an attribute .*\(calls\)",
    ),
    "clipped before the scale is divided out": (
        {
            "trainer": ClipsScaled,
            "precision": "mixed_float16",
            "suites": ["precision"],
        },
        "your `train_step` clips or divides gradients that are multiplied",
    ),
    "state of a slice": (
        {"make_model": lambda: around(RemembersItsSlice(name="memory"))},
        "memory/mean is .* each replica's own slice",
    ),
    "noise without a seed": (
        {"make_model": lambda: around(Noise())},
        "random numbers that no seed fixes.*or depends on what Python keeps",
    ),
    "noise with a seed": (
        {"make_model": lambda: around(Jitters())},
        "draws random numbers, other ones on each replica",
    ),
    "loss of pairs": (
        {"loss": contrastive},
        "loss of an example depends on the other examples",
    ),
    "scaled learning rate": (
        {"optimizer_fn": scaled_sgd},
        "learning rate depends on the number of replicas",
    ),
    "metric of means": (
        {"metrics": [MeanOfMeansMetric()]},
        "metric mean_of_means averages what replicas averaged",
    ),
    "loss told wrongly": (
        {"trainer": TellsMean},
        "loss that is told differs, the gradients do not",
    ),
    "optimizer counts replicas": (
        {"optimizer_fn": CountsReplicas},
        "optimizer's variable counts_replicas.*/seen depends on the number",
    ),
    "state of the trainer's own": (
        {"trainer": KeepsCenter},
        r"center \(of `Trainer.state`\) depends on how a batch is split",
    ),
    "loss is not scaled": (
        {
            "trainer": MeanOfSlice,
            "precision": "mixed_float16",
            "suites": ["precision"],
        },
        "your `train_step` does not scale the loss",
    ),
    "not finite at all": (
        {"make_model": lambda: around(layers.Activation(keras.ops.log))},
        "not finite on one device in float32: update 1, loss",
    ),
    "rewritten to bfloat16": (
        {
            "make_model": make_rounded,
            "precision": "graph_bfloat16",
            "suites": ["precision"],
        },
        "bfloat16 loses what this model needs",
    ),
    "not for XLA": (
        {"make_model": lambda: around(Speaks()), "suites": ["xla"]},
        "AsString",
    ),
    "too large for float16": (
        {
            "make_model": make_large,
            "precision": "mixed_float16",
            "suites": ["replicas", "precision"],
        },
        r"one update after another was skipped[\s\S]*launch.numerics[\s\S]*"
        "float16 overflows at any loss scale",
    ),
    "skipped on one device only": (
        {
            "make_model": make_overflowing,
            "dataset": overflowing_dataset(),
            "optimizer_fn": lambda: dist_amp.wrap_optimizer(
                support.make_sgd(), loss_scale=2.0**15
            ),
            "precision": "mixed_float16",
        },
        "not on both, .* lower loss scale",
    ),
}


@functools.cache
def certificate_of(name):
    return certify(**{"num_steps": 2, **WRONG[name][0]})


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_training_is_caught_and_named(name):
    _, cause = WRONG[name]
    certificate = certificate_of(name)
    failed = [case for case in certificate.cases if not case.passed]
    assert not certificate.passed
    assert failed
    causes = "\n".join(case.cause for case in failed)
    assert re.search(cause, causes), causes
    assert "NOT EQUIVALENT" in str(certificate)


# ----------------------------------------------------------- what must pass


def make_convnet():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.Conv2D(4, 3),  # with a bias, whose gradient is noise
            layers.BatchNormalization(synchronized=True),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(C, dtype="float32"),
        ]
    )


def make_augmented():
    return keras.Sequential(
        [
            keras.Input((6, 6, 2)),
            layers.RandomFlip("horizontal", name="flip"),
            layers.RandomTranslation(0.2, 0.2, name="shift"),
            layers.Flatten(),
            layers.Dense(C, dtype="float32"),
        ]
    )


def make_transformer():
    inputs = keras.Input((5,), dtype="int32")
    x = layers.Embedding(11, 8)(inputs)
    attended = layers.MultiHeadAttention(2, 4, dropout=0.1)(x, x)
    x = layers.LayerNormalization()(x + layers.Dropout(0.2)(attended))
    x = layers.GlobalAveragePooling1D()(x)
    return keras.Model(inputs, layers.Dense(C, dtype="float32")(x))


def make_rnn():
    return keras.Sequential(
        [
            keras.Input((5,), dtype="int32"),
            layers.Embedding(11, 4, mask_zero=True),
            layers.LSTM(6, dropout=0.1),
            layers.Dense(C, dtype="float32"),
        ]
    )


def make_two_heads():
    inputs = keras.Input((F,))
    x = layers.Dense(8, activation="tanh")(inputs)
    return keras.Model(
        inputs,
        {
            "kind": layers.Dense(C, dtype="float32")(x),
            "size": layers.Dense(1, dtype="float32")(x),
        },
    )


def make_shared():
    left, right = keras.Input((3,)), keras.Input((3,))
    shared = layers.Dense(4, activation="tanh")
    x = layers.Concatenate()([shared(left), shared(right)])
    return keras.Model([left, right], layers.Dense(C, dtype="float32")(x))


class ForgetsScale(Overridden):
    def train_step(self, batch):
        with tf.GradientTape() as tape:
            predictions = self.model(batch.x, training=True)
            loss = self.compute_loss(batch, predictions)
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        self.metrics.update(batch, loss, predictions)


class Tempered(Overridden):
    """Takes an argument of its own."""

    def __init__(self, *args, temperature, **kwargs):
        super().__init__(*args, **kwargs)
        self.temperature = temperature

    def loss_of(self, batch, predictions):
        return self.compute_loss(batch, predictions / self.temperature)


def make_frozen():
    model = support.make_mlp()
    model.layers[0].trainable = False
    return model


def two_heads_dataset():
    x, y = support.make_arrays(24)
    return support.batched((x, {"kind": y, "size": x[:, :1]}))


def shared_dataset():
    x, y = support.make_arrays(24)
    return support.batched(((x[:, :3], x[:, 3:]), y))


RIGHT = {
    "an overflow in float16": {
        "precision": "mixed_float16",
        "suites": ["overflow"],
    },
    "float16 that overflows as a whole": {
        "make_model": make_overflowing,
        "dataset": overflowing_dataset,
        "optimizer_fn": lambda: dist_amp.wrap_optimizer(
            support.make_sgd(), initial_scale=2.0**17
        ),
        "precision": "mixed_float16",
        "num_steps": 4,
        "suites": ["replicas", "precision"],
        "told": "2 replicas, full batches: update 3 was skipped on one side",
    },
    "layers that float16 fails, in float32": {
        "make_model": make_large,
        "precision": "auto_layers",
        "suites": ["replicas", "precision"],
        "told": "one device before the first update: rescaling.*, layer_norm",
    },
    "convolutions, synchronized": {
        "make_model": make_convnet,
        "dataset": images,
        "optimizer_fn": keras.optimizers.Adam,
        "num_replicas": [4],
    },
    "augmented": {
        "make_model": make_augmented,
        "dataset": images,
        "told": "turned off: flip, shift",
    },
    "a loss that only float16 would have to scale": {
        "trainer": ForgetsScale,
        "precision": "mixed_bfloat16",
        "suites": ["replicas", "precision"],
        "told": "`train_step` never called `optimizer.scale_loss`: in float16",
    },
    "transformer with dropout": {
        "make_model": make_transformer,
        "dataset": tokens,
        "optimizer_fn": lambda: keras.optimizers.AdamW(
            1e-2, global_clipnorm=1.0
        ),
        "told": "turned off: multi_head_attention.*/dropout.*, dropout",
    },
    "recurrent, masked": {"make_model": make_rnn, "dataset": tokens},
    "two losses": {
        "make_model": make_two_heads,
        "dataset": two_heads_dataset,
        "loss": lambda: {
            "kind": support.make_loss(),
            "size": keras.losses.MeanSquaredError(),
        },
    },
    "shared layers": {"make_model": make_shared, "dataset": shared_dataset},
    "frozen layers": {"make_model": make_frozen},
    "regularized": {"make_model": make_regularized, "metrics": ["accuracy"]},
    "a step of the user's own": {
        "trainer": functools.partial(Tempered, temperature=2.0)
    },
    "averaged weights": {
        "optimizer_fn": lambda: support.make_sgd(
            use_ema=True, ema_momentum=0.9
        ),
    },
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_right_training_passes(name):
    options = dict(RIGHT[name])
    for key in ("dataset", "loss"):
        if key in options:
            options[key] = options[key]()
    told = options.pop("told", "EQUIVALENT")
    certificate = certify(**options)
    assert certificate.passed, str(certificate)
    assert all(case.cause is None for case in certificate.cases)
    assert re.search(told, str(certificate)), str(certificate)


# ---------------------------------------------------------- the certificate


def test_it_names_the_first_update_and_variable():
    certificate = certificate_of("mean of the slice")
    again, full, *_ = certificate.cases
    assert (again.name, again.passed) == ("1 device again, full batches", True)
    assert full.first_step == 0
    assert "dense" in full.first_variable
    assert full.first_variable.endswith("(gradient)")
    assert full.max_error == pytest.approx(1.0, rel=1e-3)
    assert full.tolerance == 1e-4


def test_it_is_json():
    case = Case(name="2 replicas", passed=False, max_error=float("inf"))
    certificate = Certificate(
        cases=(case,), precision="float32", num_steps=2, turned_off=("a",)
    )
    content = json.loads(certificate.as_json())
    assert content["passed"] is False
    assert content["precision"] == "float32"
    assert content["turned_off"] == ["a"]
    names = {"name", "passed", "max_error", "tolerance", "first_step"}
    assert set(content["cases"][0]) == names | {"first_variable", "cause"}
    assert content["cases"][0]["max_error"] == "inf"


def test_where_nothing_was_compared_nothing_is_proved():
    certificate = certify(suites=["precision"])
    assert not certificate.passed
    assert str(certificate).endswith("nothing was compared")


def test_every_suite_has_its_cases():
    told = []
    certificate = certify(
        on_case=told.append,
        suites=SUITES,
        num_steps=2,
        precision="mixed_bfloat16",
        metrics=["accuracy"],
    )
    assert certificate.passed, str(certificate)
    assert certificate.devices == ("CPU:0", "CPU:1")
    names = [case.name for case in certificate.cases]
    assert names == [
        "1 device again, full batches",
        "2 replicas, full batches",
        "1 device again, smaller batches",
        "2 replicas, smaller batches",
        "2 replicas, overflow on replica 1",
        "2 replicas, 2 accumulated batches",
        "1 device, XLA",
        "2 replicas, XLA",
        "2 replicas, after a save and a restore",
        "losses in bfloat16 and in float32",
    ]
    assert told == list(certificate.cases)
    assert len(names) == num_cases(SUITES, [2])
    assert not certificate.notes[1:]  # but of the overflow


def test_what_cannot_be_compared_is_left_out_and_told():
    certificate = certify(
        make_convnet, dataset=images(), suites=["xla"], num_steps=2
    )
    assert certificate.passed
    (reason,) = certificate.left_out
    assert reason.startswith("2 replicas, XLA: ")
    assert reason in str(certificate)


def test_without_a_loss_scale_there_is_no_overflow_to_skip():
    certificate = certify(
        optimizer_fn=lambda: dist_amp.DistributedOptimizer(support.make_sgd()),
        precision="mixed_float16",
        suites=["overflow"],
    )
    assert not certificate.passed
    (reason,) = certificate.left_out
    assert "--loss_scale" in reason


def test_one_gpu_is_too_few_for_replicas_and_their_reference(monkeypatch):
    names = {"GPU": ["GPU:0"], "CPU": ["CPU:0", "CPU:1"]}
    monkeypatch.setattr(strategy_lib, "_names", names.__getitem__)
    assert subject.find_devices(2) == ["CPU:0", "CPU:1"]
    names["GPU"].append("GPU:1")
    assert subject.find_devices(2) == ["GPU:0", "GPU:1"]


def test_rounding_may_change_the_class_of_an_example():
    def is_beyond(precision, accuracy, num_examples=8):
        return difference.of_metric(
            "accuracy",
            accuracy,
            0.5,
            tolerance=difference.TOLERANCES[precision],
            num_examples=num_examples,
        ).is_beyond

    assert not is_beyond("float16", 0.625)
    assert is_beyond("float16", 0.75)
    assert is_beyond("float16", 0.625, num_examples=64)
    assert is_beyond("float32", 0.625)


def compared(gradients, others):
    """What of some gradients is beyond the tolerance of float32."""

    def record(arrays):
        return subject.Record(
            loss=1.0,
            metrics={},
            num_examples=8.0,
            settings={},
            gradients=arrays,
            trainable=[[array] for array in arrays],
            others=[],
            optimizer=[],
            extras=[],
            is_skipped=False,
        )

    names = difference.Names(
        trainable=["kernel", "bias"],
        others=[],
        optimizer=[],
        owners=[],
        extras=[],
    )
    found = difference.differences(
        record(gradients),
        record(others),
        before=[np.zeros_like(array) for array in others],
        names=names,
        tolerance=difference.TOLERANCES["float32"],
    )
    return [(one.what, one.name) for one in found if one.is_beyond]


def test_a_bias_before_batch_norm_has_a_gradient_of_rounding_only():
    kernel, nothing = np.ones([40]), np.full([8], 1e-6)
    # Seen: errors of up to 1e-5 of the mean size of all entries.
    assert not compared([kernel, nothing + 1e-5], [kernel, nothing])
    small = np.full([8], 1e-3)
    assert compared([kernel, 2 * small], [kernel, small]) == [
        ("gradient", "bias")
    ]
    assert ("gradient", "kernel") in compared(
        [kernel * 1.001, small], [kernel, small]
    )


def test_one_device_beside_one_is_not_blamed_on_replicas(monkeypatch):
    tight = dataclasses.replace(difference.TOLERANCES["float32"], gradient=1e-9)
    monkeypatch.setitem(difference.TOLERANCES, "float32", tight)
    certificate = certify(make_convnet, dataset=images(), suites=["xla"])
    one, *_ = certificate.cases
    assert one.name == "1 device, XLA"
    assert "(gradient)" in one.first_variable
    assert one.cause.startswith("unknown: the first gradient to differ")


def test_a_restart_gives_the_same_bits_on_cpus_only():
    tolerance = difference.TOLERANCES["float32"]
    assert restart_tolerance(["CPU:0", "CPU:1"], tolerance) == 0
    assert restart_tolerance(["GPU:0", "GPU:1"], tolerance) == 1e-3


def test_a_loss_near_zero_may_differ_by_rounding():
    tolerance = difference.TOLERANCES["float32"].loss
    assert difference.relative_loss(1e-5 + 1e-7, 1e-5) < tolerance
    assert difference.relative_loss(1e-5 + 1e-5, 1e-5) > tolerance
    assert difference.relative_loss(2.0, 1.0) == 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"suites": ["replica"]}, "--suites"),
        ({"num_replicas": [8]}, r"use_logical_cpus\(8\)` in a new process"),
        ({"dataset": support.make_dataset(2, 2)}, "--global_batch_size"),
    ],
)
def test_wrong_arguments_are_told(options, told):
    with pytest.raises(ValueError, match=told):
        certify(**options)


def test_devices_that_are_there_are_not_split_any_more():
    with pytest.raises(RuntimeError, match=r"comes too late.*new process"):
        strategy_lib.use_logical_cpus(8)


def test_augmentation_draws_other_numbers_on_each_replica():
    strategy = support.make_strategy(2)
    with dist_amp.scope(strategy, "float32"):
        model = make_augmented()
        trainer = dist_amp.Trainer(
            model, support.make_sgd(), loss=support.make_loss()
        )
    trainer.build(images())
    flip = model.get_layer("flip")
    (state,) = random_state.variables_of_layer(flip)
    assert any(state is one for one in random_state.variables_of(model))
    one, other = support.local_copies(state)
    assert one[0] != other[0]


@pytest.mark.parametrize(("kind", "number"), [(ForgetsScale, 1), (Tempered, 0)])
def test_a_loss_that_is_not_scaled_is_told_once(kind, number, caplog):
    options = {"temperature": 2.0} if kind is Tempered else {}
    with dist_amp.scope(support.make_strategy(2), "mixed_float16"):
        optimizer = dist_amp.LossScaleOptimizer(support.make_sgd())
        trainer = kind(
            support.make_mlp(), optimizer, loss=support.make_loss(), **options
        )
    trainer.trace(support.make_dataset())
    told = [r for r in caplog.messages if "scale_loss" in r]
    assert len(told) == number


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
