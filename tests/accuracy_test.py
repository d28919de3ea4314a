"""Fewer bits teach as much: within what seeds of float32 are apart.

`benchmarks.accuracy` has the whole table; these are its settings on the
tutorial's model, with fewer updates and seeds.
"""

import dataclasses
import functools
import sys

import pytest

from benchmarks import accuracy

SEEDS = 3
TASK = dataclasses.replace(accuracy.TASKS["MyModel"], steps=400)


@functools.cache
def exact():
    return accuracy.cell(TASK, *accuracy.EXACT, SEEDS)


@pytest.mark.parametrize(
    ("setting", "num_replicas"),
    [("auto_layers", 1), ("mixed_float16", 2), ("int8 wire", 2)],
)
def test_it_is_like_float32(setting, num_replicas):
    found = accuracy.cell(TASK, setting, num_replicas, SEEDS)
    assert exact().mean > 0.9
    assert 0 < exact().spread < 0.03
    assert found.is_like(exact()), (found, exact())


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
