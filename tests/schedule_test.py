"""Learning-rate schedules."""

import sys

import keras
import numpy as np
import pytest

from dist_amp.schedule import WarmupSchedule


def rates(schedule, steps):
    return [float(schedule(step)) for step in range(steps)]


def test_warm_up_then_constant():
    schedule = WarmupSchedule(2.0, warmup_steps=4)
    assert rates(schedule, 6) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


def test_cosine_passes_the_half_in_the_middle_and_ends_at_zero():
    schedule = WarmupSchedule(1.0, total_steps=10, decay="cosine")
    np.testing.assert_allclose(
        [schedule(0), schedule(5), schedule(10), schedule(99)],
        [1.0, 0.5, 0.0, 0.0],
        atol=1e-6,
    )


def test_survives_keras_serialization():
    schedule = WarmupSchedule(
        1.0, warmup_steps=2, total_steps=9, decay="linear"
    )
    copy = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(schedule)
    )
    assert rates(copy, 10) == rates(schedule, 10)


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match="`decay` must be one of"):
        WarmupSchedule(1.0, decay="exponential")
    with pytest.raises(ValueError, match="`total_steps` must be more"):
        WarmupSchedule(1.0, warmup_steps=5, total_steps=5, decay="cosine")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
