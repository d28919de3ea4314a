"""Two replicas, one of which is late: the other one waits."""

import sys
import time

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import reduction
from dist_amp.stopwatch import Stopwatch
from tests import support

SECONDS = 0.3


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("late", [0, 1])
def test_who_is_late_does_not_wait(late, on_gpu):
    """`on_gpu` works on CPUs, too: numbers are copied, to no avail."""
    strategy = support.make_strategy(2)
    watch = Stopwatch(0, on_gpu=on_gpu)

    def sleep(gradient, replica):
        if replica == late:
            time.sleep(SECONDS)
        return gradient

    def in_replica(ones):
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group
        gradient = tf.numpy_function(sleep, [ones, replica], tf.float32)
        gradients = [tf.ensure_shape(gradient, [3]), tf.ones([])]
        begin = watch.start(gradients)
        sums = reduction.all_reduce_sum(gradients)
        watch.stop(begin, sums)
        return sums[0]

    @tf.function
    def run(ones):
        sums = strategy.run(in_replica, args=(ones,))
        return strategy.experimental_local_results(sums)[0]

    for _ in range(2):
        np.testing.assert_array_equal(run(tf.ones([3])), [2, 2, 2])
    if late == 1:
        assert watch.seconds() > 1.5 * SECONDS
    else:
        assert 0 < watch.seconds() < SECONDS / 2


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
