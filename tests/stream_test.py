"""Where epochs end in the data, and going on from any place in it."""

import sys

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import arrays, data
from dist_amp.stream import Stream, stacks_of

NUM_BATCHES = 5


def batches(num_batches=NUM_BATCHES):
    return tf.data.Dataset.range(2 * num_batches).batch(2)


def stacked(num_batches=NUM_BATCHES):
    """A function of the pass, which also comes in stacks of two batches."""
    return data.from_arrays(np.arange(2 * num_batches), 2, shuffle_seed=7)


def shuffled(num_batches=NUM_BATCHES):
    """The same, one batch at a time."""
    make = stacked(num_batches)
    return lambda number: make(number)


@pytest.fixture(autouse=True)
def _small_stacks(monkeypatch):
    monkeypatch.setattr(arrays, "_MOST_BATCHES", 2)


def unknown_length(number):
    return shuffled()(number).filter(lambda x: True)


class Whole:
    """Feeds batches as they are."""

    def __init__(self, dataset):
        self._dataset = dataset

    def stacks(self, batches_per_step=1):
        return stacks_of(self._dataset, batches_per_step)

    def split(self, batches, *, is_stacked=False):
        return batches

    def open(self, make):
        return make().prefetch(tf.data.AUTOTUNE)


def make_stream(dataset, **options):
    return Stream(dataset, Whole(dataset), **options)


def read(stream, num_batches):
    return [read_one(stream).numpy().tolist() for _ in range(num_batches)]


def read_one(stream):
    """What the compiled loop does."""
    if not stream.is_stacked:
        return next(stream.iterator)
    if stream.place == len(stream.stack):
        stream.go_to(next(stream.iterator), 0, num_stacks=1)
    stream.place += 1
    return stream.stack[stream.place - 1]


SOURCES = {
    "dataset": batches,
    "shuffled dataset": lambda: batches().shuffle(9, seed=3),
    "function of the pass": shuffled,
    "stacks": stacked,
}


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("steps_per_epoch", [None, 3, 7])
def test_it_goes_round_and_resumes_anywhere(name, steps_per_epoch):
    options = {"steps_per_epoch": steps_per_epoch}
    stream = make_stream(SOURCES[name](), **options)
    stream.open()
    straight = read(stream, 16)
    for epoch, batch in [(0, 0), (0, 2), (1, 0), (1, 2), (2, 0)]:
        resumed = make_stream(SOURCES[name](), **options)
        resumed.open(epoch, batch)
        done = epoch * (steps_per_epoch or NUM_BATCHES) + batch
        assert read(resumed, 16 - done) == straight[done:]


def test_a_function_of_the_pass_is_not_read_from_its_start():
    started = []

    def make(number):
        tf.py_function(lambda n: started.append(int(n)), [number], [])
        return batches().map(
            lambda x: tf.py_function(
                lambda x, n: started.append(int(n)) or x, [x, number], tf.int64
            )
        )

    stream = make_stream(make)
    started.clear()
    stream.open(epoch=90, batch=1)
    next(stream.iterator)
    assert set(started) <= {90, 91}


def test_each_pass_of_a_function_has_every_example_once():
    stream = make_stream(shuffled())
    stream.open()
    passes = [read(stream, NUM_BATCHES) for _ in range(3)]
    for one in passes:
        assert sorted(np.ravel(one)) == list(range(2 * NUM_BATCHES))
    assert passes[0] != passes[1] != passes[2]


@pytest.mark.parametrize("begin", [0, 3, 5, 6, 13])
def test_stacks_hold_the_same_batches(begin):
    """The last, smaller one of a pass too."""
    make = data.from_arrays(np.arange(11), 2, shuffle_seed=7)
    one_at_a_time = make_stream(lambda number: make(number))
    in_stacks = make_stream(make)
    assert in_stacks.is_stacked
    for stream in (one_at_a_time, in_stacks):
        stream.open(*divmod(begin, 6))
    batches = read(in_stacks, 15)
    assert batches == read(one_at_a_time, 15)
    assert sum(map(len, batches[:6])) == 11


def test_the_counter_tells_batches_of_stacks():
    stream = make_stream(stacked(100))
    stream.open()
    read(stream, 7)
    count = stream.counter()
    read(stream, 12)
    assert count().taken == 12


def train(stream, num_epochs):
    """Takes one batch at a time; returns the batches of each epoch."""
    epochs = []
    while stream.epoch < num_epochs:
        epochs.append([])
        while stream.next_call(1) != (0, 0):
            try:
                epochs[-1] += read(stream, 1)
            except StopIteration:
                break
            stream.advance(1)
        stream.end_epoch()
    return epochs


@pytest.mark.parametrize(
    "make",
    [
        lambda: unknown_length,
        lambda: batches().filter(lambda x: True),
        lambda: batches().filter(lambda x: True).shuffle(9, seed=3),
    ],
    ids=["function", "in order", "shuffled"],
)
def test_a_length_that_tensorflow_cannot_tell_is_learned(make):
    """A dataset that shuffles is made anew, as in a new process."""
    stream = make_stream(make())
    assert stream.steps_per_epoch is None
    stream.open()
    straight = train(stream, 3)
    assert stream.steps_per_epoch == NUM_BATCHES
    assert [len(epoch) for epoch in straight] == [NUM_BATCHES] * 3
    resumed = make_stream(make())
    resumed.learn_length(NUM_BATCHES)
    resumed.open(1, 2)
    assert train(resumed, 3) == [straight[1][2:], straight[2]]


@pytest.mark.parametrize("make", [shuffled, stacked])
def test_bad_batches_are_passed_over(make):
    stream = make_stream(make())
    stream.open()
    straight = train(stream, 3)
    stream = make_stream(make())
    stream.bad = [(0, 1, 3), (1, 0, 1), (2, 4, 5)]
    stream.open()
    assert train(stream, 3) == [
        straight[0][:1] + straight[0][3:],
        straight[1][1:],
        straight[2][:4],
    ]


def test_a_call_ends_before_a_bad_batch():
    stream = make_stream(batches())
    stream.bad = [(0, 3, 4)]
    stream.open()
    assert stream.next_call(9) == (3, 1)
    read(stream, 3)
    stream.advance(3)
    assert stream.next_call(9) == (1, 1)
    assert read(stream, 1) == [[8, 9]]


def test_accumulation_ends_an_epoch_with_a_shorter_step():
    stream = make_stream(batches(7), batches_per_step=3)
    assert stream.steps_per_epoch == 3
    assert stream.next_call(9) == (2, 3)
    stream.advance(6)
    assert stream.next_call(9) == (1, 1)
    stream.advance(1)
    assert stream.next_call(9) == (0, 0)


def test_steps_per_epoch_overrides_the_length():
    stream = make_stream(batches(2).repeat(), steps_per_epoch=7)
    assert stream.next_call(5) == (5, 1)
    stream.advance(5)
    assert stream.next_call(5) == (2, 1)
    stream.advance(2)
    assert stream.next_call(5) == (0, 0)


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        (batches().repeat(), {}, "repeats for ever"),
        (batches().take(0), {}, "empty"),
        (
            batches().filter(lambda x: True),
            {"batches_per_step": 2},
            "cannot tell",
        ),
    ],
)
def test_a_stream_that_cannot_be_counted_is_an_error(dataset, options, message):
    with pytest.raises(ValueError, match=message):
        make_stream(dataset, **options)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
