"""Trying things out finds what is wrong, and only that."""

import sys

import pytest
import tensorflow as tf

from dist_amp import preflight
from dist_amp.preflight import SumCheck, Transfer
from tests import support


def test_a_device_that_works():
    assert preflight.check_device("CPU:1") == ""
    assert preflight.check_device("CPU:0", jit_compile=True) == ""


def test_a_device_that_is_not_there():
    """TensorFlow goes to the CPU without a word."""
    told = preflight.check_device("GPU:7")
    assert told.startswith("TensorFlow computed on ")
    assert told.endswith("CPU:0 instead")


def test_a_device_that_computes_wrongly(monkeypatch):
    def wrong(one, other):
        return one @ other + tf.cast(one.dtype == tf.bfloat16, one.dtype)

    monkeypatch.setattr(tf, "matmul", wrong)
    assert preflight.check_device("CPU:0") == "wrong results in bfloat16"


@pytest.mark.parametrize("num_replicas", support.NUM_REPLICAS)
def test_sums_that_are_right(num_replicas):
    strategy = support.make_strategy(num_replicas)
    assert preflight.check_sums(strategy) == [
        SumCheck(dtype, ()) for dtype in preflight.WIRE_DTYPES
    ]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_replica_that_is_left_out_shows(monkeypatch, lost):
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def lose(self, op, value):
        me = tf.cast(self.replica_id_in_sync_group == lost, value.dtype)
        return all_reduce(self, op, value * (1 - me))

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", lose)
    checks = preflight.check_sums(support.make_strategy(2))
    assert [check.wrong_workers for check in checks] == [(0,)] * len(checks)


def test_a_replica_that_is_counted_twice_in_one_dtype_shows(monkeypatch):
    all_reduce = tf.distribute.ReplicaContext.all_reduce

    def repeat(self, op, value):
        total = all_reduce(self, op, value)
        return total * 2 if value.dtype == tf.float16 else total

    monkeypatch.setattr(tf.distribute.ReplicaContext, "all_reduce", repeat)
    checks = preflight.check_sums(support.make_strategy(2))
    wrong = [check.dtype for check in checks if check.wrong_workers]
    assert wrong == ["float16"]


def test_bandwidths_are_those_of_nccl_tests():
    transfer = Transfer(num_bytes=1000, num_replicas=4, seconds=0.5)
    assert transfer.algorithm_bandwidth == 2000
    assert transfer.bus_bandwidth == 3000


def test_sizes_grow_while_there_is_time():
    strategy = support.make_strategy(2)
    assert preflight.measure_latency(strategy).seconds > 0
    measured = preflight.measure_bandwidth(
        strategy, max_bytes=2**19, seconds=60
    )
    assert [one.num_bytes for one in measured] == [2**16, 2**19]
    assert all(0 < one.seconds < 1 for one in measured)
    (only,) = preflight.measure_bandwidth(strategy, seconds=0)
    assert only.num_bytes == 2**16


@pytest.mark.parametrize("place", ["disk", "ram://preflight"])
def test_tokens(tmp_path, place):
    folder = str(tmp_path / "a" / "b") if place == "disk" else f"{place}/a"
    assert preflight.write_token(folder, "one") == ""
    assert preflight.read_token(folder, "one", patience=0) == ""
    error = preflight.read_token(folder, "two", patience=0)
    assert error == "two is not there"
    with tf.io.gfile.GFile(f"{folder}/two", "w") as file:
        file.write("another")
    error = preflight.read_token(folder, "two", patience=0)
    assert error == "two holds something else"
    preflight.remove_tokens(folder)
    assert preflight.read_token(folder, "one", patience=0)


def test_a_token_where_no_folder_can_be_made(tmp_path):
    (tmp_path / "file").touch()
    error = preflight.write_token(str(tmp_path / "file" / "run"), "one")
    assert "is not a directory" in error


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
