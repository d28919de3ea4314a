"""What gradients lose on their way, and that all replicas lose the same."""

import sys

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import reduction
from tests import support


def summed(values, wire_dtype):
    """Sums of two replicas' gradients, a dense and a sparse one, on each."""
    strategy = support.make_strategy(2)

    @tf.function
    def reduce():
        def in_replica():
            context = tf.distribute.get_replica_context()
            own = tf.gather(values, context.replica_id_in_sync_group)
            shape = tf.constant([3, len(values[0])])
            slices = tf.IndexedSlices(own[None], tf.constant([1]), shape)
            dense, sparse = reduction.all_reduce_sum([own, slices], wire_dtype)
            return dense, tf.convert_to_tensor(sparse)[1]

        return strategy.run(in_replica)

    return [
        [one.numpy() for one in strategy.experimental_local_results(result)]
        for result in reduce()
    ]


@pytest.mark.parametrize("wire_dtype", [None, "float16", "bfloat16"])
def test_sums_are_rounded_to_the_wire(wire_dtype):
    values = np.float32([[1.0, 1 / 3, 1e-3], [1.0, 1 / 3, 1e-3]])
    sent = tf.cast(values[0], wire_dtype or "float32")
    expected = 2 * tf.cast(sent, "float32")
    for replicas in summed(values, wire_dtype):
        for one in replicas:
            assert one.dtype == np.float32
            np.testing.assert_array_equal(one, expected)


def test_an_overflow_on_the_way_is_no_finite_number():
    for replicas in summed(np.float32([[7e4, 1.0], [1.0, 1.0]]), "float16"):
        for one in replicas:
            np.testing.assert_array_equal(one, [np.inf, 2.0])


def test_small_gradients_lie_together_and_come_apart_again():
    ones = [tf.ones([2, 3]), tf.ones([]), tf.ones([0, 4]), tf.ones([5])]
    halves = [tf.ones([3], "float16"), tf.ones([2], "float16")]
    alone = [
        tf.ones([128, 129]),  # large
        tf.ones([2], "float64"),  # the only one of its dtype
        tf.IndexedSlices(tf.ones([1, 2]), [3], tf.constant([5, 2])),
    ]
    gradients = [g * i for i, g in enumerate(ones[:2] + halves[:1] + ones[2:])]
    gradients = [alone[0], *gradients, alone[1], halves[1], alone[2]]
    packed = reduction.pack(gradients)
    vectors = [[0.0] * 6 + [1.0] + [4.0] * 5, [2.0] * 3 + [1.0] * 2]
    assert len(packed.tensors) == 5
    for tensor, expected in zip(packed.tensors, vectors, strict=False):
        np.testing.assert_array_equal(tensor, expected)
    for was, found in zip(gradients, packed.unpack(), strict=True):
        assert type(was) is type(found)
        assert (was.dtype, was.shape) == (found.dtype, found.shape)
        values = reduction.values_of
        np.testing.assert_array_equal(values(was), values(found))


def test_nothing_packed_is_nothing():
    assert reduction.pack([]).unpack() == []


def test_collectives_send_several_packs_of_a_large_model():
    mib = tf.zeros([2**18])
    assert reduction.bytes_per_pack([mib] * 2) == 4 * 2**20
    assert reduction.bytes_per_pack([mib] * 40) == 10 * 2**20
    assert reduction.bytes_per_pack([mib] * 1000) == 32 * 2**20
    slices = tf.IndexedSlices(mib[None], [0], tf.constant([1, 2**18]))
    assert reduction.bytes_per_pack([mib, slices]) == 0


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_replicas_stay_equal_and_close_to_one_device(precision):
    dataset = support.make_dataset(21)
    options = {"loss_scale": "dynamic", "wire_dtype": "float16"}
    trained = support.fit_trainer(
        dataset,
        num_replicas=2,
        precision=precision,
        loss_scale_options=options,
    )
    support.assert_same_on_replicas(trained.trainer.model.variables)
    reference = support.fit_reference(dataset)
    for own, other in zip(trained.weights, reference.weights, strict=True):
        np.testing.assert_allclose(own, other, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
