"""Asking to stop, on one worker; several are in multi_worker/."""

import sys

import pytest

from dist_amp import agreement
from dist_amp.agreement import StopRequest
from tests import support


def test_the_first_reason_is_heard_when_workers_agree():
    stop = StopRequest(support.make_strategy(2))
    assert stop.agree(7, is_due=True) == (7, True)
    assert stop.reason is None
    stop.ask("SIGTERM")
    stop.ask("SIGINT")
    assert stop.reason is None
    stop.agree()
    assert stop.reason == "SIGTERM"
    stop.clear()
    stop.agree()
    assert stop.reason is None


@pytest.mark.parametrize(
    "reason", ["", "SIGTERM", "größer", "x" * 60, "\N{SNOWMAN}" * 20]
)
def test_a_reason_travels_as_numbers(reason):
    """What is too long for the wire is cut, between characters or not."""
    numbers = agreement._packed(reason.encode()[:48])
    assert max(numbers) < 2**48
    text = agreement._unpacked(numbers)
    assert text == reason.encode()[:48].decode(errors="replace")


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
