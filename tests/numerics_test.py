"""What `numerics.report` counts, by numbers worked out by hand."""

import json
import math
import re
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import heat_map, numerics
from dist_amp.optimizer import layers_of
from dist_amp.ranges import Window, range_of
from tests import support

# --------------------------------------------------------------------- ranges


def test_shares_and_exponents_are_exact():
    values = [0, 0, 1, -1.5, 3, 70000, 2**-15, -(2**-24), 2**-25]
    found = range_of(values)
    assert found.exponents == {-25: 1, -24: 1, -15: 1, 0: 2, 1: 1, 16: 1}
    assert (found.num_values, found.num_zeros, found.num_nonzero) == (9, 2, 7)
    assert (found.largest, found.smallest) == (70000.0, 2**-25)
    assert found.share_below_normal == 3 / 7
    assert found.share_below_smallest == 1 / 7
    assert found.share_over == 1 / 7
    assert found.share_lost(2.0**10) == 0.0
    assert found.share_lost(2.0**-10) == 3 / 7
    assert found.sum == 65536 + 2 + 2 + 2**-15 + 2**-24 + 2**-25
    assert found.is_finite


def test_infinity_and_nan_are_counted_apart():
    found = range_of([np.inf, -np.inf, np.nan, 2.0, 0.0])
    assert (found.num_infinite, found.num_nan, found.num_over) == (2, 1, 2)
    assert found.num_nonzero == 3
    assert found.share_over == 2 / 3
    assert (found.largest, found.smallest) == (2.0, 2.0)
    assert not found.is_finite


@pytest.mark.parametrize(
    ("values", "smallest", "largest"),
    [
        ([1.0], 2.0**-24, 2.0**15),
        ([1.999, 1.0], 2.0**-24, 2.0**15),
        ([1.9999], 2.0**-24, 2.0**14),  # times 2**15 exceeds 65504
        ([65504.0], 2.0**-39, 1.0),
        ([65505.0], 2.0**-39, 0.5),
        ([2.0**-24, 3.0], 1.0, 2.0**14),
        ([2.0**-30, 2.0**20], 2.0**6, 2.0**-5),  # 50 powers of two
    ],
)
def test_the_window_keeps_all_in_range(values, smallest, largest):
    window = range_of(values).window
    assert window == Window(smallest, largest)
    assert window.is_empty == (smallest > largest)
    for scale, is_within in ((largest, True), (2 * largest, False)):
        scaled = np.array(values, np.float32) * scale
        assert (np.abs(scaled) <= 65504).all() == is_within
    scaled = np.array(values, np.float32) * smallest
    assert (np.abs(scaled) >= 2.0**-24).all()
    assert not (np.abs(scaled / 2) >= 2.0**-24).all()


def test_zeros_alone_fit_at_any_scale():
    found = range_of(np.zeros(3))
    assert found.window is None
    assert found.ceiling == math.inf
    assert found.share_lost(2.0**-14) == found.sum_lost(1.0) == 0.0


def test_what_is_merged_is_as_if_it_had_been_one():
    one, other = [0, 1e-9, 5.0, np.nan], [7e4, 3.0, np.inf]
    assert range_of(one).merged(range_of(other)) == range_of([*one, *other])


# --------------------------------------------------------------------- layers


def linear(kernel=2.0, **options):
    initializer = keras.initializers.Constant(kernel)
    return keras.layers.Dense(
        1, use_bias=False, kernel_initializer=initializer, **options
    )


def by_path(report):
    return {layer.path: layer for layer in report.layers}


def test_ranges_of_a_linear_model_by_hand():
    """Outputs 2 and 6, loss (4 + 36) / 2, by them 2 and 6, by the kernel 20."""
    model = keras.Sequential([keras.Input((1,)), linear(name="line")])
    batch = (tf.constant([[1.0], [3.0]]), tf.zeros([2, 1]))
    report = numerics.report(model, batch, loss="mean_squared_error")
    line = by_path(report)["line"]
    assert report.loss == 20.0
    assert line.inputs == range_of([1, 3])
    assert line.output == line.output_gradient == range_of([2, 6])
    assert line.input_gradient is None  # nothing before it learns
    (variable,) = report.variables
    assert variable.layer == "line"
    assert variable.gradient == range_of([20])
    assert line.float16_error == line.bfloat16_error == 0.0
    # 20 fits up to 2**11, 6 up to 2**13; no scale is too small.
    assert report.advice.window == Window(2.0**-14, 2.0**11)
    assert report.advice.loss_scale == 2.0**11
    assert not report.advice.pins


@pytest.mark.parametrize(
    ("value", "float16", "bfloat16"),
    [
        (1 + 2**-11, 2**-11 / (1 + 2**-11), 2**-11 / (1 + 2**-11)),
        (2049.0, 1 / 2049, 1 / 2049),
        (1 + 2**-10, 0.0, 2**-10 / (1 + 2**-10)),
        (70000.0, math.inf, 0.0),
    ],
)
def test_errors_are_those_of_rounding(value, float16, bfloat16):
    if value == 70000.0:
        value = 71680.0  # 1.09375 * 2**16, which bfloat16 has
    layer = keras.layers.Rescaling(1.0, name="same")
    model = keras.Sequential([keras.Input((1,)), layer])
    same = by_path(numerics.report(model, tf.constant([[value]])))["same"]
    assert same.float16_error == pytest.approx(float16, rel=1e-6)
    assert same.bfloat16_error == pytest.approx(bfloat16, rel=1e-6)


def test_a_layer_called_twice_counts_both_calls():
    layer = linear(10.0, name="twice")
    inputs = keras.Input((1,))
    model = keras.Model(inputs, layer(layer(inputs)))
    batch = (tf.constant([[1.0]]), tf.zeros([1, 1]))
    report = numerics.report(model, batch, loss="mean_squared_error")
    twice = by_path(report)["twice"]
    assert twice.num_calls == 2
    assert twice.output == range_of([10, 100])
    assert twice.output_gradient == range_of([200, 2000])
    # d loss / d kernel: 200 * 10 by the last call, 2000 * 1 by the first.
    assert report.variables[0].gradient == range_of([4000])


def test_several_batches_are_put_together():
    model = keras.Sequential([keras.Input((1,)), linear(name="line")])
    x = tf.constant([[1.0], [3.0], [5.0]])
    dataset = tf.data.Dataset.from_tensor_slices((x, 0 * x)).batch(2)
    for many in (dataset, iter(list(dataset))):
        report = numerics.report(model, many, loss="mean_squared_error")
        assert report.loss == (20 + 100) / 2
        assert by_path(report)["line"].output == range_of([2, 6, 10])
        assert report.variables[0].gradient == range_of([20, 100])


def test_several_outputs_and_a_variable_without_a_gradient():
    inputs = keras.Input((2,))
    one = keras.layers.Dense(1, name="one")(inputs)
    other = keras.layers.Dense(3, name="other")(inputs)
    left = keras.layers.Dense(1, name="left")(inputs)
    model = keras.Model(inputs, {"one": one, "other": other, "left": left})
    y = {"one": tf.zeros([4, 1]), "other": tf.zeros([4], tf.int32)}
    losses = {
        "one": "mean_squared_error",
        "other": keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    }
    report = numerics.report(model, (tf.ones([4, 2]), y), loss=losses)
    has = {v.path: v.gradient is not None for v in report.variables}
    assert has == {
        f"{name}/{kind}": name != "left"
        for name in ("one", "other", "left")
        for kind in ("kernel", "bias")
    }
    assert "left/kernel: the loss does not depend on it" in report.advice.notes
    assert by_path(report)["left"].output_gradient is None


def test_without_a_loss_there_are_activations_only():
    model = keras.Sequential([keras.Input((1,)), linear(name="line")])
    report = numerics.report(model, tf.constant([[4.0]]))
    assert report.loss is report.advice.window is None
    assert by_path(report)["line"].output == range_of([8])
    assert not report.advice.notes


class Block(keras.layers.Layer):
    """Attention and a cell, with arithmetic of its own between them."""

    def __init__(self, **options):
        super().__init__(**options)
        self.norm = keras.layers.LayerNormalization()
        self.attention = keras.layers.MultiHeadAttention(2, 2, name="attention")
        self.drop = keras.layers.Dropout(0.5)

    def call(self, x, training=None):
        y = self.norm(x)
        return x + self.drop(self.attention(y, y), training=training)


class Subclassed(keras.Model):
    """An embedding, a block, a recurrent layer, a nested model."""

    def __init__(self):
        super().__init__()
        self.embedding = keras.layers.Embedding(9, 4, name="embedding")
        self.block = Block(name="block")
        self.rnn = keras.layers.GRU(3, name="gru")
        self.head = keras.Sequential(
            [
                keras.layers.BatchNormalization(),
                keras.layers.Dense(2, name="logits"),
            ],
            name="head",
        )

    def call(self, x, training=None):
        x = self.block(self.embedding(x), training=training)
        return self.head(self.rnn(x), training=training)


TOKENS = (np.arange(24).reshape(4, 6) % 9, np.array([0, 1, 0, 1]))


@pytest.mark.parametrize(
    "policy", ["float32", "mixed_float16", "mixed_bfloat16", "float16"]
)
def test_a_subclassed_model_in_any_policy(policy):
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        keras.utils.set_random_seed(0)
        model = Subclassed()
        model(TOKENS[0])
    finally:
        keras.config.set_dtype_policy(before)
    policies = [layer.dtype_policy for layer in layers_of(model)]
    report = numerics.report(model, TOKENS, loss=support.make_loss())
    layers = by_path(report)
    # Once a time step, and once for its shapes.
    assert layers["gru/gru_cell"].num_calls == 7
    assert layers["gru/gru_cell"].unit == "gru"
    assert layers["block/attention/query"].unit == "block"
    assert layers["head/logits"].unit == "head/logits"
    assert layers["embedding"].inputs is None
    for path in ("block/attention", "gru", "head/logits"):
        assert 0 < layers[path].float16_error < 0.01
        assert layers[path].float16_error < layers[path].bfloat16_error < 0.05
        assert layers[path].output_gradient.largest > 0
    assert all(variable.gradient for variable in report.variables)
    assert not report.advice.pins
    assert layers["gru"].compute_dtype == policy.removeprefix("mixed_")
    for layer, before in zip(layers_of(model), policies, strict=True):
        assert layer.dtype_policy is before


def make_noisy():
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(3, dtype="float32"),
        ]
    )


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_a_report_leaves_no_trace(num_replicas):
    """A fit with a report before each epoch is a fit without, bit by bit."""

    def fit(*callbacks):
        trainer = support.make_trainer(
            make_noisy, precision="mixed_float16", num_replicas=num_replicas
        )
        callbacks = [callback(trainer) for callback in callbacks]
        trainer.fit(dataset, epochs=3, verbose=0, callbacks=callbacks)
        return trainer

    def looks(trainer):
        return keras.callbacks.LambdaCallback(
            on_epoch_begin=lambda epoch, logs: reports.append(
                numerics.report(trainer, dataset.take(1))
            )
        )

    dataset, reports = support.make_dataset(), []
    for one, other in zip(
        fit(looks).model.variables, fit().model.variables, strict=True
    ):
        for a, b in zip(
            support.local_copies(one), support.local_copies(other), strict=True
        ):
            np.testing.assert_array_equal(a, b)
    assert len({report.loss for report in reports}) == 3
    assert not tf.config.functions_run_eagerly()


# --------------------------------------------------------------------- advice


def tiny(y, prediction):
    return 1e-13 * tf.reduce_sum((y - prediction) ** 2, axis=-1)


def huge(y, prediction):
    return 1e11 * tf.reduce_sum((y - prediction) ** 2, axis=-1)


def reasons_of(model, batch, loss, **options):
    advice = numerics.report(model, batch, loss=loss, **options).advice
    return {pin.layer: pin.reasons for pin in advice.pins}, advice


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (tiny, "100.0% of the gradient of odd/kernel is lost even at the best"),
        (huge, "the gradient of odd/kernel reaches"),
    ],
)
def test_a_gradient_far_from_all_others_is_pinned(other, words):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    outputs = [
        keras.layers.Dense(1, name=name)(inputs) for name in ("a", "b", "odd")
    ]
    model = keras.Model(inputs, outputs)
    x = tf.random.stateless_normal([8, 4], [1, 2])
    batch = (x, (tf.ones([8, 1]),) * 3)
    found, advice = reasons_of(
        model, batch, ["mean_squared_error", "mean_squared_error", other]
    )
    assert list(found) == ["odd"]
    assert found["odd"][0].startswith(words)
    assert advice.loss_scale == advice.window.largest >= 2.0**10


def test_an_activation_too_large_and_what_reads_it_are_pinned():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Dense(4, name="first"),
            keras.layers.Rescaling(1e6, name="large"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(1, name="last"),
        ]
    )
    batch = (tf.ones([4, 2]), tf.zeros([4, 1]))
    found, _ = reasons_of(model, batch, "mean_squared_error")
    assert list(found) == ["large", "norm"]
    assert "beyond float16's 65504" in found["norm"][0]
    # What is in float32 among half precision needs no advice.
    for name in found:
        model.get_layer(name).dtype_policy = "float32"
    for name in ("first", "last"):
        model.get_layer(name).dtype_policy = "mixed_float16"
    assert not reasons_of(model, batch, "mean_squared_error")[0]


class Cancels(keras.layers.Layer):
    """Adds a number and takes it away: float16 has not enough bits."""

    def call(self, x):
        return (x + self.number) - self.number

    def __init__(self, number, **options):
        super().__init__(**options)
        self.number = number


@pytest.mark.parametrize(
    ("number", "words"),
    [(1000.0, "its output is off by"), (1e5, "it overflows within")],
)
def test_what_is_lost_within_a_layer_is_seen(number, words):
    model = keras.Sequential([keras.Input((4,)), Cancels(number, name="c")])
    x = tf.random.stateless_uniform([8, 4], [1, 2])
    found, _ = reasons_of(model, x, None)
    assert found["c"][0].startswith(words)
    loose, _ = reasons_of(model, x, None, max_error=10.0)
    assert ("c" in loose) == (number == 1e5)


def test_a_bias_before_a_normalization_has_no_gradient_to_lose():
    """It is 0 but for rounding, which no layer is pinned for."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((4,)),
            keras.layers.Dense(8, name="dense"),
            keras.layers.BatchNormalization(),
            keras.layers.Dense(1),
        ]
    )
    x = tf.random.stateless_normal([64, 4], [1, 2])
    batch = (x, 1e4 * tf.ones([64, 1]))
    found, _ = reasons_of(model, batch, "mean_squared_error")
    assert not found


def test_what_is_not_finite_anyway_is_no_fault_of_float16():
    model = keras.Sequential(
        [keras.Input((1,)), keras.layers.Rescaling(1e38, name="r")]
    )
    found, advice = reasons_of(model, tf.constant([[100.0]]), None)
    assert not found
    assert "r: its output is not finite in float32 either" in advice.notes


# -------------------------------------------------------------------- results


@pytest.fixture
def report():
    model = keras.Sequential(
        [
            keras.Input((2,)),
            keras.layers.Rescaling(1e6, name="large"),
            keras.layers.LayerNormalization(name="norm"),
            keras.layers.Dense(1, name="<last>"),
        ]
    )
    batch = (tf.constant([[1.0, 2.0]]), tf.ones([1, 1]))
    return numerics.report(model, batch, loss="mean_squared_error")


def test_a_report_is_plain_json(report):
    values = json.loads(report.to_json())
    assert values == report.to_dict()
    layers = {layer["path"]: layer for layer in values["layers"]}
    assert layers["large"]["float16_error"] == "inf"
    assert layers["large"]["output"]["exponents"] == {"19": 1, "20": 1}
    assert layers["large"]["output"]["loss_scales"] == [2.0**-43, 2.0**-5]
    assert [pin["layer"] for pin in values["advice"]["pins"]] == (
        ["large", "norm"]
    )


def test_the_page_needs_nothing_beside_itself(report):
    page = heat_map.to_html(report)
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)
    assert "&lt;last&gt;" in page
    assert "<last>" not in page
    assert "2 layers need float32" in page
    assert page.count("<section") == 3
    assert 'name="viewport"' in page


def test_the_picture_is_a_png(report, tmp_path):
    pytest.importorskip("matplotlib")
    heat_map.write_png(report, tmp_path / "numerics.png")
    assert (tmp_path / "numerics.png").read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_the_error_names_the_page(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib.*page"):
        heat_map.write_png(report, "numerics.png")


# --------------------------------------------------------------------- errors


def test_a_trainer_brings_its_loss():
    trainer = support.make_trainer()
    with pytest.raises(ValueError, match="`loss` would be ignored"):
        numerics.report(trainer, support.make_dataset(), loss="mse")


def test_no_model_and_no_data_are_refused():
    with pytest.raises(TypeError, match=r"`model` must be a keras\.Model"):
        numerics.report(keras.layers.Dense(1), tf.ones([1, 1]))
    model = keras.Sequential([keras.Input((1,)), linear()])
    with pytest.raises(ValueError, match="The dataset is empty"):
        numerics.report(model, iter([]))


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_gradients_are_those_of_a_replica(num_replicas):
    """Each differentiates its share of the mean over the global batch."""
    trainer = support.make_trainer(
        lambda: keras.Sequential([keras.Input((1,)), linear(name="line")]),
        num_replicas=num_replicas,
        loss="mean_squared_error",
    )
    x = tf.constant([[1.0], [3.0], [5.0]])
    report = numerics.report(trainer, (x, 0 * x))
    # Of two slices the second one is the larger.
    inputs = [1.0, 3.0, 5.0] if num_replicas == 1 else [3.0, 5.0]
    assert by_path(report)["line"].inputs == range_of(inputs)
    gradient = sum(2 * (2 * value) * value / 3 for value in inputs)
    found = report.variables[0].gradient.largest
    assert found == pytest.approx(gradient)


def test_the_loss_is_the_trainers():
    trainer = support.make_trainer()
    dataset = support.make_dataset().take(1)
    report = dist_amp.numerics.report(trainer, dataset)
    assert report.loss == pytest.approx(trainer.evaluate(dataset)["loss"])


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
