"""The loss-scaling rule against a plain Python version of it, exactly."""

import itertools
import sys

import pytest

from dist_amp.loss_scale import LossScaleRule


def expected(rule, scale, good_steps, finite):
    if not finite:
        return max(scale * rule.backoff_factor, rule.min_scale), 0
    if good_steps + 1 < rule.growth_interval:
        return scale, good_steps + 1
    return min(scale * rule.growth_factor, rule.max_scale), 0


@pytest.mark.parametrize("growth_interval", [1, 2, 3])
@pytest.mark.parametrize("growth_factor", [2.0, 1.5])
def test_every_history_of_six_updates(growth_interval, growth_factor):
    rule = LossScaleRule(
        growth_interval=growth_interval,
        growth_factor=growth_factor,
        min_scale=0.5,
        max_scale=8.0,
    )
    for history in itertools.product([True, False], repeat=6):
        state = want = (2.0, 0)
        for finite in history:
            state = rule.next_state(*state, finite)
            want = expected(rule, *want, finite)
            assert (float(state[0]), int(state[1])) == want


def test_stops_at_floor_and_ceiling():
    rule = LossScaleRule(growth_interval=1, min_scale=1.0, max_scale=2.0)
    assert float(rule.next_state(2.0, 0, True)[0]) == 2.0
    assert float(rule.next_state(1.0, 0, False)[0]) == 1.0


def test_equal_floor_and_ceiling_fix_the_scale():
    rule = LossScaleRule(growth_interval=1, min_scale=4.0, max_scale=4.0)
    assert float(rule.next_state(4.0, 0, True)[0]) == 4.0
    assert float(rule.next_state(4.0, 0, False)[0]) == 4.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("growth_interval", 0),
        ("growth_factor", 0.5),
        ("backoff_factor", 1.5),
        ("backoff_factor", 0.0),
        ("min_scale", 0.0),
        ("max_scale", 1e-9),
    ],
)
def test_a_wrong_number_is_named(name, value):
    with pytest.raises(ValueError, match=f"`{name}`.*Received {value}"):
        LossScaleRule(**{name: value})


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
