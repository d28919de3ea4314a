"""Where a worker is, and who is said to hold up whom."""

import contextlib
import sys

import pytest

from dist_amp.beacon import Beacon, Counts, Place, explain

NAMES = ["worker 0", "worker 1", "worker 2"]


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_phases_nest_and_come_back():
    beacon = Beacon(Clock())
    assert beacon.read().phase == "start"
    with beacon.phase("callbacks"):
        with beacon.phase("checkpoint"):
            assert beacon.read().phase == "checkpoint"
        assert beacon.read().phase == "callbacks"
    assert beacon.read().phase == "end"


def test_it_knows_how_long_nothing_has_changed():
    clock = Clock()
    beacon = Beacon(clock)
    beacon.read()
    clock.now = 5.0
    assert beacon.read().seconds == 5.0
    beacon.at_step(1)
    assert beacon.read().seconds == 0.0


@pytest.mark.parametrize(
    ("taken", "is_starved", "phase", "step"),
    [
        (10, True, "input", 101),  # none of this call has come
        (10, False, "step", 101),
        (11, False, "step", 101),
        (13, True, "input", 104),
        (13, False, "step", 103),
    ],
)
def test_the_step_within_a_compiled_call(taken, is_starved, phase, step):
    beacon = Beacon(Clock())
    beacon.at_step(100)
    with beacon.phase("step", lambda: Counts(taken, is_starved), taken=10):
        assert beacon.read() == Place(phase, step)


def test_steps_of_several_batches():
    beacon = Beacon(Clock())
    counts = Counts(taken=5, is_starved=True)
    with beacon.phase("step", lambda: counts, batches_per_step=2):
        assert beacon.read() == Place("input", 3)


@pytest.mark.parametrize("is_starved", [False, True])
def test_the_first_call_compiles_until_it_takes_a_second_batch(is_starved):
    """XLA compiles when the first one is there; that may last."""
    beacon = Beacon(Clock())
    for taken in (0, 1):
        counts = Counts(taken, is_starved)
        with beacon.phase("compile", lambda counts=counts: counts):
            place = beacon.read()
        assert (place.phase, place.step, place.patience) == ("compile", 1, 6)
        assert place.must_end
    with beacon.phase("compile", lambda: Counts(2, is_starved)):
        place = beacon.read()
    assert place.phase == ("input" if is_starved else "step")
    assert place.patience == 1


def test_what_has_not_changed_counts_from_when_somebody_watches():
    clock = Clock()
    beacon = Beacon(clock)
    beacon.read()
    clock.now += 100
    beacon.start()
    clock.now += 1
    assert beacon.read().seconds == 1


def test_before_and_after_training_no_step_is_named():
    beacon = Beacon(Clock())
    assert beacon.read().doing == "making the model and its data"
    with beacon.phase("callbacks"):
        assert beacon.read().doing.endswith(", at step 1")
    assert beacon.read().doing == "past training"


def test_an_error_leaves_the_place_where_it_was():
    beacon = Beacon(Clock())
    beacon.at_step(6)

    def fail():
        with beacon.phase("callbacks"):
            with contextlib.suppress(KeyError), beacon.phase("step"):
                raise KeyError
            assert beacon.read().phase == "callbacks"
            with beacon.phase("checkpoint"):
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert beacon.read() == Place("checkpoint", 7)
    with beacon.phase("callbacks"):
        assert beacon.read().phase == "callbacks"


def test_looks_at_an_empty_input_are_counted():
    beacon = Beacon(Clock())
    beacon.read()
    for is_starved in (True, False, True):
        counts = Counts(3, is_starved)
        with beacon.phase("step", lambda counts=counts: counts):
            beacon.read()
    assert (beacon.looks, beacon.starved_looks) == (3, 2)


def test_who_waits_for_input_is_named_and_who_waits_for_it():
    places = [
        Place("step", 119, 40.0),
        Place("agreement", 119, 40.0),
        Place("input", 119, 41.0),
    ]
    assert explain(places, NAMES) == (
        "worker 2 has been waiting for input, at step 119, for 41 s; worker 0 "
        "and worker 1 wait for it in the all-reduce of step 119"
    )


def test_who_does_not_answer_is_named():
    places = [Place("step", 7, 9.0), None, Place("step", 7, 9.0)]
    said = explain(places, NAMES)
    assert said.startswith("worker 1 does not answer; worker 0 and worker 2")


def test_nobody_is_behind():
    said = explain([Place("step", 7, 9.0)] * 3, NAMES)
    assert said.startswith("no worker is behind the others")
    assert said.count("in the step, at step 7, for 9 s") == 3


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
