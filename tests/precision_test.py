"""What "auto" means, and what the scope sets and restores."""

import sys

import keras
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import precision


@pytest.mark.parametrize(
    ("capabilities", "name"),
    [
        ([(9, 0)], "mixed_bfloat16"),
        ([(8, 0), (8, 6)], "mixed_bfloat16"),
        ([(7, 5)], "mixed_float16"),
        ([(9, 0), (7, 0)], "mixed_float16"),
        ([(6, 1)], "float32"),
        ([None], "float32"),
        ([], "float32"),
    ],
)
def test_auto_follows_the_weakest_gpu(capabilities, name):
    assert precision._for_gpus(capabilities).name == name


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ("fpu avx512_bf16", "mixed_bfloat16"),
        ("fpu amx_bf16 avx2", "mixed_bfloat16"),
        ("fpu avx2 avx512f", "float32"),
    ],
)
def test_auto_reads_the_flags_of_the_cpu(tmp_path, flags, name):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: {flags}\n")
    found = precision._for_cpu(precision._cpu_flags(str(cpuinfo)))
    assert found.name == name


def test_auto_is_float32_where_the_cpu_does_not_tell():
    assert precision._for_cpu(precision._cpu_flags("/nowhere")).name == (
        "float32"
    )


def test_auto_on_this_machine_has_a_reason():
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    resolved = precision.resolve("auto", strategy)
    assert resolved.name in ("float32", "mixed_bfloat16")
    assert "CPU" in resolved.reason


def test_scope_restores_policy_strategy_and_precision():
    strategy = dist_amp.make_strategy("mirrored", devices=["CPU:0", "CPU:1"])
    with dist_amp.scope(strategy, "mixed_float16") as resolved:
        assert keras.config.dtype_policy().name == "mixed_float16"
        assert tf.distribute.get_strategy() is strategy
        assert precision.current() is resolved
    assert keras.config.dtype_policy().name == "float32"
    assert not tf.distribute.has_strategy()
    assert precision.current().name == "float32"


def test_scope_restores_after_an_error():
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    with pytest.raises(KeyError), dist_amp.scope(strategy, "mixed_bfloat16"):
        raise KeyError
    assert keras.config.dtype_policy().name == "float32"


@pytest.mark.parametrize(
    ("name", "scaled"),
    [
        ("float32", False),
        ("mixed_bfloat16", False),
        ("mixed_float16", True),
        ("auto_layers", True),
        ("graph_float16", True),
        ("graph_bfloat16", False),
    ],
)
def test_only_float16_needs_a_loss_scale(name, scaled):
    assert dist_amp.Precision(name).needs_loss_scale is scaled


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="must be one of auto, float32"):
        dist_amp.Precision("float8")


def test_grappler_has_no_float16_on_a_cpu():
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    with (
        pytest.raises(ValueError, match="pass mixed_float16"),
        dist_amp.scope(strategy, "graph_float16"),
    ):
        pass


def test_grappler_rewrites_a_model_not_made_of_keras_layers():
    """The product differs from float32's by bfloat16's rounding."""
    options = tf.config.optimizer.get_experimental_options()
    strategy = dist_amp.make_strategy("one_device", devices=["CPU:0"])
    x = tf.random.stateless_normal([64, 64], [1, 2])
    w = tf.random.stateless_normal([64, 64], [3, 4])

    def product():
        return tf.function(lambda a: tf.nn.relu(tf.matmul(a, w)))(x)

    exact = product()
    try:
        with dist_amp.scope(strategy, "graph_bfloat16"):
            rewritten = product()
    finally:
        tf.config.optimizer.set_experimental_options(
            {**options, "auto_mixed_precision_onednn_bfloat16": False}
        )
    error = float(tf.reduce_max(tf.abs(rewritten - exact)))
    assert 1e-4 < error < 0.5


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
