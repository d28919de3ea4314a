"""The programs in examples/ run, and do what their first lines say."""

import pathlib
import sys

import pytest

from dist_amp import strategy
from examples import contrastive, custom_loop, gan, tutorial
from tests import support

EXAMPLES = pathlib.Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(autouse=True)
def _cpus(monkeypatch):
    """Split for all tests already, which can be done but once."""
    monkeypatch.setattr(
        strategy,
        "use_logical_cpus",
        lambda number: [f"CPU:{index}" for index in range(number)],
    )


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=str)
def test_each_is_short_and_says_what_it_shows(path):
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    assert lines[0].startswith('"""')
    assert f"python examples/{path.name}" in path.read_text()


def test_the_tutorial_goes_on_from_its_checkpoint(tmp_path):
    folder = str(tmp_path)
    first = tutorial.main(2, "mixed_float16", 1, folder)
    assert (first.resumed_step, first.global_step) == (0, 44)
    again = tutorial.main(2, "mixed_float16", 2, folder)
    assert (again.resumed_step, again.global_step) == (44, 88)


def assert_same_on_two_replicas(main):
    one, two = (main(n, "float32", 1) for n in (0, 2))
    for variables in one.state(), two.state():
        assert all(variables.values())
    for name, variables in one.state().items():
        support.assert_close(
            support.read(two.state()[name]), support.read(variables)
        )
    return one


def test_two_models_are_the_same_on_two_replicas(capsys):
    trainer = assert_same_on_two_replicas(gan.main)
    assert "second" in trainer.state()
    assert "radius" in capsys.readouterr().out


def test_a_loss_over_the_global_batch_is_the_same_on_two_replicas():
    assert_same_on_two_replicas(contrastive.main)


def test_the_walker_learns_where_to_go():
    assert custom_loop.main(2, "mixed_float16", 40) > 0.9


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
