"""Who failed first, of endings as they were met."""

import signal
import sys

import pytest

from launch import post_mortem
from launch.heartbeat import Beat
from launch.worker_process import Ending


def ended(index, status, seconds=1.0, *, killed="", lines=()):
    beat = Beat("in the step, at step 7")
    return Ending(index, status, seconds, beat, 0.5, killed, list(lines))


def first(*endings, hung=None):
    found = post_mortem.first_to_fail(endings, hung)
    return found and found.index


def test_nobody_failed_if_all_ended_well():
    assert first(ended(0, 0), ended(1, 0)) is None


@pytest.mark.parametrize("status", [1, 2, -signal.SIGKILL, -signal.SIGSEGV])
def test_a_worker_that_lost_another_is_not_the_first(status):
    assert first(ended(0, 129, 1.0), ended(1, status, 2.0)) == 1


def test_of_several_the_earliest_is_the_first():
    assert first(ended(0, 1, 2.0), ended(1, -9, 1.0), ended(2, 0, 0.5)) == 1


def test_one_that_did_not_leave_kept_the_others_waiting():
    stuck = ended(1, -signal.SIGKILL, 30.0, killed="it did not leave")
    assert first(ended(0, 129, 10.0), stuck) == 1


def test_one_that_was_killed_afterwards_is_not_the_first():
    stuck = ended(1, -signal.SIGKILL, 30.0, killed="it did not leave")
    assert first(ended(0, 1, 10.0), stuck) == 0


def test_one_that_was_found_hanging_is_the_first():
    assert first(ended(0, 1, 1.0), ended(1, -9, 2.0, killed="so"), hung=1) == 1


def test_of_a_standstill_the_one_that_held_up_the_others():
    said = (
        "no progress for 300 s (--collective_timeout): worker 2 (h:1) has been "
        "waiting for input, at step 8, for 300 s; worker 0 (h:2) waits"
    )
    endings = [ended(i, 142, 1.0 + i, lines=[said]) for i in range(3)]
    assert first(*endings) == 2
    text = post_mortem.describe(endings[2], endings)
    assert text.startswith("worker 2 held up the others, 3 s after the start")
    assert f"  | {said}" in text


def test_one_that_was_told_to_end_may_have_been_the_cause():
    told = ended(1, -signal.SIGTERM, 4.0)
    assert first(ended(0, 129, 0.5), told, ended(2, 129, 0.6)) == 1


def test_workers_that_only_lost_each_other():
    assert first(ended(0, 129, 2.0), ended(1, 129, 1.0)) == 1


def test_the_description_has_all_that_is_known():
    killed = ended(1, -signal.SIGKILL, 12.3)
    text = post_mortem.describe(
        killed, [ended(0, 129, 12.6), killed, ended(2, 0)], log="a.log"
    )
    assert text.splitlines() == [
        "worker 1 failed first, 12 s after the start: killed by SIGKILL (the "
        "kernel does that if memory runs out). 0.5 s before its end it was in "
        "the step, at step 7.",
        "  then worker 0: exit status 129 (another worker failed or was lost), "
        "13 s after the start",
        "  all that worker 1 said: a.log",
    ]


TRACEBACK = """before
Traceback (most recent call last):
  File "a.py", line 1, in f
    g()
    ~~^
ValueError: first

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "b.py", line 2, in h
RuntimeError: second
after
""".splitlines()


def test_an_excerpt_is_the_last_traceback_with_what_led_to_it():
    assert post_mortem.excerpt(TRACEBACK) == [
        "Traceback (most recent call last):",
        '  File "a.py", line 1, in f',
        "    g()",
        "ValueError: first",
        "The above exception was the direct cause of the following exception:",
        "Traceback (most recent call last):",
        '  File "b.py", line 2, in h',
        "RuntimeError: second",
    ]


def test_an_earlier_traceback_that_was_dealt_with_is_left_out():
    lines = [*TRACEBACK[:6], "went on", *TRACEBACK[9:]]
    assert post_mortem.excerpt(lines) == TRACEBACK[9:12]


def test_a_long_traceback_is_shortened_in_its_middle():
    frames = [f'  File "{number}.py"' for number in range(100)]
    lines = ["Traceback (most recent call last):", *frames, "E: end"]
    shown = post_mortem.excerpt(lines)
    assert len(shown) == 31
    assert shown[15] == "  (72 lines)"
    assert (shown[0], shown[-1]) == (lines[0], "E: end")


def test_without_a_traceback_the_error_or_the_last_lines():
    assert post_mortem.excerpt(["a", "error: it is so", "b"]) == [
        "error: it is so"
    ]
    assert post_mortem.excerpt(list("abcd")) == list("bcd")
    assert post_mortem.excerpt([]) == []


@pytest.mark.parametrize(("status", "shell"), [(0, 0), (2, 2), (-9, 137)])
def test_exit_statuses_are_those_of_a_shell(status, shell):
    assert post_mortem.exit_status(ended(0, status)) == shell


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
