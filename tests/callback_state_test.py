"""What callbacks have learned comes back; settings stay as they are."""

import collections
import json
import sys

import keras
import numpy as np
import pytest

from dist_amp.callback_state import CallbackStates


class Learns(keras.callbacks.Callback):
    def __init__(self, **attributes):
        super().__init__()
        vars(self).update(attributes)


def move(saved, restored, change):
    """From one process to another, through JSON."""
    states = CallbackStates([saved])
    change(saved)
    plain, arrays = states.read()
    target = CallbackStates([restored])
    assert target.write(json.loads(json.dumps(plain)), arrays) == []


VALUES = {
    "number": 0.25,
    "nothing": None,
    "numpy number": np.float32(0.5),
    "list": [1, [2.0, "x"], True],
    "tuples": [(1, 2.5), (3, 4.5)],
    "set": {"a", "b"},
    "deque": collections.deque([1, 2, 3], maxlen=3),
    "dict": {"a": [1], 2: {"b": (3,)}, None: 4.0},
    "deep list": [[1, 2], {"x": collections.deque([0.5])}],
}


@pytest.mark.parametrize("name", VALUES)
def test_plain_values_come_back_as_they_were(name):
    restored = Learns(value="at begin")
    move(
        Learns(value="at begin"),
        restored,
        lambda c: setattr(c, "value", VALUES[name]),
    )
    assert restored.value == VALUES[name]
    wanted = float if name == "numpy number" else type(VALUES[name])
    assert type(restored.value) is wanted
    assert getattr(restored.value, "maxlen", 3) == 3


def test_arrays_come_back_alone_and_within():
    restored = Learns(one=None, several=None)

    def change(callback):
        callback.one = np.eye(2, dtype="float16")
        callback.several = {"best": [np.arange(3), np.ones((2, 1))]}

    move(Learns(one=None, several=None), restored, change)
    assert restored.one.dtype == np.float16
    np.testing.assert_array_equal(restored.one, np.eye(2))
    np.testing.assert_array_equal(restored.several["best"][0], [0, 1, 2])
    np.testing.assert_array_equal(restored.several["best"][1], [[1], [1]])


def test_variables_keep_their_identity():
    variable = keras.Variable(0.0)
    restored = Learns(variable=variable)
    move(
        Learns(variable=keras.Variable(0.0)),
        restored,
        lambda c: c.variable.assign(2.5),
    )
    assert restored.variable is variable
    assert float(variable) == 2.5


def test_a_setting_is_the_new_runs():
    restored = Learns(patience=9, classes=np.arange(4), wait=0)
    move(
        Learns(patience=5, classes=np.arange(3), wait=0),
        restored,
        lambda c: setattr(c, "wait", 2),
    )
    assert (restored.patience, restored.wait) == (9, 2)
    assert len(restored.classes) == 4


def test_going_back_undoes_what_was_learned_since():
    callback = Learns(seen=[], best=None)
    states = CallbackStates([callback])
    callback.seen.append(1)
    saved = states.read()
    callback.seen.append(2)
    callback.best = 0.5
    states.write(*saved)
    assert (callback.seen, callback.best) == ([1], None)
    callback.seen.append(3)
    states.write(*saved)
    assert callback.seen == [1]


def test_what_cannot_be_saved_is_named_once(caplog):
    callback = Learns(models=[])
    states = CallbackStates([callback])
    callback.models.append(keras.Sequential())
    for _ in range(2):
        states.read()
    assert caplog.text.count("Learns.models is not saved") == 1


def test_a_callback_may_speak_for_itself():
    class Speaks(keras.callbacks.Callback):
        said = None

        def get_state(self):
            return {"x": [1, 2]}

        def set_state(self, state):
            self.said = state

    restored = Speaks()
    move(Speaks(), restored, lambda callback: None)
    assert restored.said == {"x": [1, 2]}


def test_callbacks_are_found_by_kind_and_order():
    class Other(Learns):
        pass

    saved = [Learns(n=0), Other(n=0), Learns(n=0)]
    states = CallbackStates(saved)
    for number, callback in enumerate(saved, start=1):
        callback.n = number
    restored = [Other(n=0), Learns(n=0)]
    left_out = CallbackStates(restored).write(*states.read())
    assert [callback.n for callback in restored] == [2, 1]
    assert left_out == ["Learns"]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
