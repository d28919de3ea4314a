"""What the logs tell of speed, and what time goes to."""

import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import data, meter
from dist_amp.meter import Meter, StepTimes
from dist_amp.mfu import Mfu, peak_of_gpu, peak_of_replica
from dist_amp.stopwatch import Stopwatch
from tests import support

NUM_STEPS = 60
WANTED = {"step_ms_p50", "step_ms_p95", "input_wait"}


def slow_dataset(seconds):
    """Batches that take so long to make, one after another."""

    def wait(x):
        time.sleep(seconds)
        return x

    def slow(x, y):
        waited = tf.numpy_function(wait, [x], tf.float32)
        return tf.ensure_shape(waited, x.shape), y

    dataset = support.make_dataset(NUM_STEPS * support.GLOBAL_BATCH)
    return dataset.map(slow)


def fit(dataset, **options):
    options = {"steps_per_loop": 20} | options
    return support.fit_trainer(dataset, fit=options).history


def test_percentiles_are_of_steps_in_calls():
    times = StepTimes()
    assert times.percentile(50) is None
    times.add(90, 90 * 0.010)
    times.add(6, 6 * 0.020)
    times.add(4, 4 * 0.500)
    found = [times.percentile(p) for p in (50, 90, 95, 97)]
    np.testing.assert_allclose(found, [0.01, 0.01, 0.02, 0.5], rtol=0.01)


@pytest.mark.parametrize("steps_per_loop", [1, 20])
def test_a_slow_input_is_seen_and_said(monkeypatch, caplog, steps_per_loop):
    monkeypatch.setattr(meter, "_LEAST_SECONDS", 0.1)
    history = fit(slow_dataset(0.01), steps_per_loop=steps_per_loop, epochs=3)
    assert min(history["input_wait"]) > 0.5
    assert history["step_ms_p50"][1] > 9
    said = [r for r in caplog.records if "waited for input" in r.message]
    assert [r.args[1] for r in said] == [1, 2]  # then of 4, of 8
    assert "of epoch 1: the input, not the device" in said[0].message


def test_a_fast_input_is_not_blamed(caplog):
    arrays = support.make_arrays(NUM_STEPS * support.GLOBAL_BATCH)
    stacked = data.from_arrays(arrays, global_batch_size=8, shuffle_seed=1)
    for dataset in (stacked, support.batched(arrays).cache()):
        history = fit(dataset, epochs=3)
        assert set(history) >= WANTED
        assert min(history["input_wait"]) < 0.5
        assert all(
            p50 <= p95
            for p50, p95 in zip(
                history["step_ms_p50"], history["step_ms_p95"], strict=True
            )
        )
    assert "waited for input" not in caplog.text


def test_a_share_of_the_time_is_that_of_the_all_reduces():
    stopwatch = Stopwatch(0, on_gpu=False)
    iterator = iter(support.make_dataset().prefetch(1))
    total = stopwatch.variables[0]
    total.assign_add(7.0)  # before
    measured = Meter(support.make_dataset(), stopwatch)
    measured.restart(iterator)
    total.assign_add(0.5)
    measured.add(iterator, 10, 2.0)
    assert measured.read(100.0)["all_reduce_share"] == pytest.approx(0.25)


@pytest.mark.parametrize(
    ("x", "tokens"),
    [
        (np.zeros([4, 6], "int32"), 6),
        (np.zeros([4, 6], "float32"), None),
        (np.zeros([4, 6, 2], "int32"), None),
        (np.zeros([4], "int32"), None),
        ({"words": np.zeros([4, 6], "int32")}, None),
    ],
)
def test_the_data_tell_whether_there_are_tokens(x, tokens):
    only_x = support.batched(x)
    with_y = support.batched((x, np.zeros([4])))
    assert meter.tokens_per_example(only_x) == tokens
    assert meter.tokens_per_example(lambda number: with_y) == tokens


def test_tokens_are_examples_times_their_length():
    dataset = support.batched(np.zeros([4, 6], "int32"))
    fields = Meter(dataset).read(100.0)
    assert fields.pop("tokens_per_sec") == 600.0
    # A History has a number for each epoch, be it none.
    assert set(fields) == {"step_ms_p50", "step_ms_p95", "input_wait"}
    assert all(np.isnan(value) for value in fields.values())


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_mfu_is_the_flops_of_a_step_by_its_time_by_the_peak(num_replicas):
    trainer = support.make_trainer(num_replicas=num_replicas)
    dataset = support.make_dataset()
    mfu = Mfu(
        trainer,
        dataset,
        per_replica_batch_size=8 // num_replicas,
        peak_flops_per_sec=1e9,
    )
    history = trainer.fit(dataset, verbose=0, callbacks=[mfu]).history
    # 6 x 8 and 8 x 3, forward and for the kernels; once for the activations.
    flops = 2 * 8 // num_replicas * (2 * (48 + 24) + 24)
    expected = flops * history["steps_per_sec"][0] / 1e9
    assert history["mfu"] == [pytest.approx(expected)]


def test_where_no_peak_is_known_there_is_no_mfu():
    trainer = support.make_trainer()
    mfu = Mfu(trainer, support.make_dataset(), per_replica_batch_size=8)
    history = trainer.fit(support.make_dataset(), verbose=0, callbacks=[mfu])
    assert "mfu" not in history.history


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("Tesla V100-PCIE-16GB", 112e12),
        ("Tesla V100S-PCIE-32GB", 130e12),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40S", None),
        ("Tesla T4", 65e12),
        ("NVIDIA GeForce RTX 3090", None),
        ("", None),
    ],
)
def test_peaks_are_known_by_the_devices_names(name, peak):
    assert peak_of_gpu(name) == peak


@pytest.mark.parametrize(
    ("kind", "num_replicas", "peak"),
    [
        ("v3-8", 8, 61.5e12),
        ("v4-8", 4, 275e12),
        ("v4-8", 8, 137.5e12),
        ("v5litepod-4", 4, 197e12),
        ("v5p-16", 8, 459e12),
        ("v6e-8", 8, 918e12),
        ("v9-8", 8, None),
        ("", 8, None),
    ],
)
def test_a_replica_has_its_part_of_a_tpus_peak(kind, num_replicas, peak):
    assert peak_of_replica(kind, num_replicas) == peak


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
