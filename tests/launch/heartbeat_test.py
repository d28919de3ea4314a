"""Signs of life through a real pipe."""

import os
import sys
import threading

import pytest

from launch import heartbeat
from launch.heartbeat import Beat, Heart


@pytest.fixture
def lines(monkeypatch):
    """What a watched process writes, line by line."""
    ours, theirs = os.pipe()
    monkeypatch.setenv(heartbeat.VARIABLE, str(theirs))
    with open(ours, "rb") as file:
        yield file


def test_beats_tell_where_the_process_is(lines):
    heart = Heart()
    with heart.beating():
        assert heartbeat.parsed(lines.readline()) == Beat("starting")
        place = Beat("waiting for input, at step 7", 3.5, must_end=True)
        heart.read = lambda: place
        assert heartbeat.parsed(lines.readline()) == place


def test_children_of_the_process_do_not_beat(lines):
    with Heart().beating():
        assert heartbeat.VARIABLE not in os.environ
        assert lines.readline()


def test_a_launcher_that_does_not_read_holds_up_nothing(lines):
    heart = Heart()
    heart.read = lambda: Beat("x" * 2**17)  # more than a pipe takes
    with heart.beating():
        assert heartbeat.parsed(b"x" * 10) is None


def test_nobody_watches(monkeypatch):
    monkeypatch.delenv(heartbeat.VARIABLE, raising=False)
    before = threading.active_count()
    with Heart().beating():
        assert threading.active_count() == before


@pytest.mark.parametrize("line", [b"", b"{", b"[]", b'{"step": 1}\n'])
def test_other_lines_are_no_beats(line):
    assert heartbeat.parsed(line) is None


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
