"""The optimizers by themselves; on several replicas see parity/."""

import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import optimizer as optimizer_lib


def make(initial_scale=8.0, **options):
    optimizer = dist_amp.LossScaleOptimizer(
        keras.optimizers.SGD(1.0), initial_scale=initial_scale, **options
    )
    variable = keras.Variable([1.0, 2.0], name="weights")
    optimizer.build([variable])
    return optimizer, variable


def test_gradients_are_unscaled():
    optimizer, variable = make()
    assert float(optimizer.scale_loss(tf.constant(1.0))) == 8.0
    assert bool(optimizer.apply([tf.constant([8.0, 16.0])], [variable]))
    np.testing.assert_array_equal(variable, [0.0, 0.0])


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_a_skip_moves_nothing_but_the_scale(bad):
    optimizer, variable = make()
    assert not bool(optimizer.apply([tf.constant([1.0, bad])], [variable]))
    np.testing.assert_array_equal(variable, [1.0, 2.0])
    assert float(optimizer.loss_scale) == 4.0
    assert int(optimizer.skipped_updates) == 1
    assert int(optimizer.iterations) == 0


def test_the_loss_scale_is_set_within_its_limits():
    optimizer, _ = make(min_scale=1.0, max_scale=64.0)
    for wanted, found in ((16.0, 16.0), (0.5, 1.0), (128.0, 64.0)):
        optimizer.set_loss_scale(wanted)
        assert float(optimizer.loss_scale) == found


def test_twenty_skips_at_the_floor_name_the_variable():
    optimizer, variable = make(initial_scale=2.0, min_scale=1.0)
    bad = [tf.constant([np.nan, 1.0])]
    for _ in range(20):  # the first one goes to the floor
        optimizer.apply(bad, [variable])
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"floor \(1\).*"
    ) as caught:
        optimizer.apply(bad, [variable])
    assert variable.path in caught.value.message


def test_keras_fit_compiles_it_with_xla():
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    with dist_amp.scope(strategy, "mixed_float16"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        optimizer = dist_amp.LossScaleOptimizer(keras.optimizers.Adam())
        model.compile(optimizer, loss="mse", jit_compile=True)
    x, y = np.full((8, 3), 1e30, "float32"), np.zeros((8, 2), "float32")
    model.fit(x, y, epochs=2, verbose=0)
    assert int(optimizer.skipped_updates) == 2


def test_apply_outside_of_a_replica_says_where_to_call_it():
    strategy = dist_amp.make_strategy("mirrored")
    with strategy.scope():
        optimizer = dist_amp.DistributedOptimizer(keras.optimizers.SGD())
        variable = keras.Variable(1.0)
        optimizer.build([variable])
        with pytest.raises(RuntimeError, match=r"strategy\.run"):
            optimizer.apply([tf.constant(1.0)], [variable])


def test_a_good_update_forgives_earlier_skips_at_the_floor():
    optimizer, variable = make(initial_scale=1.0, min_scale=1.0)
    for _ in range(3):
        for _ in range(19):
            optimizer.apply([tf.constant([np.inf, 0.0])], [variable])
        optimizer.apply([tf.constant([0.0, 0.0])], [variable])


def test_a_fixed_scale_skips_and_stays():
    optimizer = dist_amp.wrap_optimizer(
        keras.optimizers.SGD(1.0), loss_scale=128
    )
    variable = keras.Variable([1.0])
    optimizer.apply([tf.constant([np.inf])], [variable])
    assert float(optimizer.loss_scale) == 128.0
    assert int(optimizer.skipped_updates) == 1


@pytest.mark.parametrize(
    ("precision", "kind"),
    [
        ("float32", dist_amp.DistributedOptimizer),
        ("mixed_bfloat16", dist_amp.DistributedOptimizer),
        ("mixed_float16", dist_amp.LossScaleOptimizer),
    ],
)
def test_wrap_follows_the_scope(precision, kind):
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    with dist_amp.scope(strategy, precision):
        wrapped = dist_amp.wrap_optimizer(keras.optimizers.Adam())
    assert type(wrapped) is kind
    assert dist_amp.wrap_optimizer(wrapped) is wrapped


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"loss_scale": "static"}, '"auto", "dynamic", None or a positive'),
        ({"loss_scale": -1.0}, "Received -1.0"),
        ({"loss_scale": None, "initial_scale": 2.0}, "would be ignored"),
        ({"loss_scale": "dynamic", "initial_scale": 2.0**30}, "between"),
        ({"loss_scale": "dynamic", "growth_interval": 0}, "at least 1"),
    ],
)
def test_wrong_loss_scales_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        dist_amp.wrap_optimizer(keras.optimizers.SGD(), **arguments)


@pytest.mark.parametrize(
    "inner",
    [
        "adam",
        keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD()),
        dist_amp.DistributedOptimizer(keras.optimizers.SGD()),
    ],
)
def test_what_cannot_be_wrapped_is_refused(inner):
    with pytest.raises(TypeError, match="`inner` must"):
        dist_amp.LossScaleOptimizer(inner)


def test_config_survives_with_the_settings_that_the_wrapper_took_over():
    optimizer = dist_amp.LossScaleOptimizer(
        keras.optimizers.Adam(
            0.5, global_clipnorm=2.0, gradient_accumulation_steps=3
        ),
        growth_interval=7,
        min_scale=0.25,
    )
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(optimizer)
    )
    assert copy.get_config() == optimizer.get_config()
    assert copy.gradient_accumulation_steps == 3
    assert copy.inner_optimizer.global_clipnorm == 2.0


def test_a_compiled_model_is_saved_and_loaded_with_its_optimizer(tmp_path):
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    model.compile(
        dist_amp.LossScaleOptimizer(keras.optimizers.Adam()), loss="mse"
    )
    x, y = np.ones((8, 3), "float32"), np.zeros((8, 2), "float32")
    model.fit(x, y, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert isinstance(loaded.optimizer, dist_amp.LossScaleOptimizer)
    for one, other in zip(
        loaded.optimizer.variables, model.optimizer.variables, strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_compile_takes_the_wrapper_as_it_is():
    """Keras wraps anything else under mixed_float16."""
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    with dist_amp.scope(strategy, "mixed_float16"):
        model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
        optimizer = dist_amp.wrap_optimizer(keras.optimizers.SGD())
        model.compile(optimizer, loss="mse")
    assert model.optimizer is optimizer


def test_learning_rate_is_the_inner_ones_and_can_be_set():
    optimizer = dist_amp.DistributedOptimizer(keras.optimizers.SGD(0.5))
    optimizer.learning_rate = 0.25
    assert float(optimizer.inner_optimizer.learning_rate) == 0.25


def test_variables_without_a_gradient_stay_as_they_are():
    optimizer = dist_amp.DistributedOptimizer(keras.optimizers.SGD(1.0))
    used, unused = keras.Variable(1.0), keras.Variable(1.0)
    optimizer.build([used, unused])
    with pytest.warns(UserWarning, match="Gradients do not exist"):
        optimizer.apply([tf.constant(1.0), None], [used, unused])
    assert (float(used), float(unused)) == (0.0, 1.0)


def test_a_list_of_another_length_is_refused():
    optimizer = dist_amp.DistributedOptimizer(keras.optimizers.SGD(1.0))
    with pytest.raises(ValueError, match="2 gradients and 1 variables"):
        optimizer.apply([tf.constant(1.0)] * 2, [keras.Variable(1.0)])


@pytest.mark.parametrize(
    ("owner", "key"),
    [
        (keras.optimizers.Adam(), "keras 3.15, Optimizer"),
        (keras.layers.Dense(1), "keras 3.15, Layer"),
        (keras.Input((1,)), "keras 3.15, KerasTensor"),
        (keras.layers.Dense(1), "keras 3.15, Operation"),
        (keras.DTypePolicy("float32"), "keras 3.15, DTypePolicy"),
        (
            tf.distribute.MirroredStrategy(["CPU:0"]).extended,
            "tensorflow 2.21, StrategyExtended",
        ),
    ],
)
def test_the_private_names_are_still_there(owner, key):
    if isinstance(owner, keras.optimizers.Optimizer):
        owner.gradient_accumulation_steps = 2
        owner.build([keras.Variable(1.0)])
    missing = [
        name
        for name in optimizer_lib._PRIVATE_NAMES[key]
        if not hasattr(owner, name)
    ]
    assert not missing


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
