"""Which worker is named, of what all have measured."""

import sys

import numpy as np
import pytest

from dist_amp.beacon import Beacon
from dist_amp.stopwatch import Stopwatch
from dist_amp.stragglers import Stragglers

NAMES = ["worker 0 (a:1)", "worker 1 (b:1)", "worker 2 (c:1)"]


def make():
    return Stragglers(NAMES, Stopwatch(0, on_gpu=False), Beacon())


def compare(stragglers, *windows, starved=(0, 0, 0)):
    """What is said after each window of 100 steps of so many ms."""
    totals = np.zeros((3, 4), np.int64)
    said = [stragglers.compare(totals, 0)]
    for number, milliseconds in enumerate(windows):
        window = [
            (100, int(1e5 * ms), 10, looks)
            for ms, looks in zip(milliseconds, starved, strict=True)
        ]
        totals = totals + np.array(window)
        said.append(stragglers.compare(totals, 100 * (number + 1)))
    return said[1:]


SLOW, EVEN = (100, 150, 101), (100, 110, 101)


def test_a_worker_that_is_slow_twice_running_is_named():
    first, second = compare(make(), SLOW, SLOW)
    assert first is None
    assert second == (
        "worker 1 (b:1) is slow: its own part of a step takes 150 ms, that of "
        "the others 100 ms, and they wait for it (step 200). Its input is not "
        "the reason: look for other load on its host, throttling, or a slower "
        "device."
    )


def test_once_is_chance():
    assert compare(make(), SLOW, EVEN, SLOW, EVEN) == [None] * 4


def test_two_that_take_turns_are_not_named():
    other = (150, 100, 100)
    assert compare(make(), SLOW, other, SLOW, other) == [None] * 4


def test_its_input_is_named_if_it_is_the_reason():
    *_, said = compare(make(), SLOW, SLOW, starved=(0, 7, 0))
    assert said.endswith(
        "It was waiting for input in 70% of the looks: its input is slow."
    )


def test_it_is_said_again_more_and_more_rarely():
    said = [bool(text) for text in compare(make(), *[SLOW] * 9)]
    assert [i + 1 for i, has_text in enumerate(said) if has_text] == [2, 4, 8]


def test_after_it_was_well_it_is_said_anew():
    said = compare(make(), SLOW, SLOW, EVEN, SLOW, SLOW)
    assert [bool(text) for text in said] == [False, True, False, False, True]


def test_a_short_time_is_not_compared():
    assert compare(make(), *[(1, 20, 1)] * 2) == [None, None]  # 2 s each
    *_, said = compare(make(), *[(1, 20, 1)] * 6)
    assert said is not None  # those add up


def test_a_call_that_traces_does_not_count():
    stragglers = make()
    stragglers.add(1, 30.0, counts=False)
    stragglers.add(10, 0.5, counts=True)
    assert stragglers.numbers() == [10, 500_000, 0, 0]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
