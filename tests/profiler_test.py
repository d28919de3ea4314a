"""A profile falls on the borders of updates and changes nothing."""

import sys

import pytest

from dist_amp.profiler import Profiler
from tests import support


def fit(profiler=None, **fit):
    options = {"epochs": 2, "verbose": 0, "profiler": profiler}
    return support.fit_trainer(
        support.make_dataset(10 * support.GLOBAL_BATCH),
        num_replicas=2,
        fit=options | fit,
    )


@pytest.mark.parametrize("steps_per_loop", [4, "auto"])
def test_a_trace_is_written_and_training_is_the_same(
    tmp_path, steps_per_loop, caplog
):
    caplog.set_level("INFO", "dist_amp")
    plain = fit(steps_per_loop=steps_per_loop)
    traced = fit(Profiler(3, 13, tmp_path), steps_per_loop=steps_per_loop)
    (file,) = (tmp_path / "plugins" / "profile").rglob("*.xplane.pb")
    assert file.stat().st_size > 1000
    for one, other in zip(plain.weights, traced.weights, strict=True):
        assert one.tobytes() == other.tobytes()
    assert plain.history["loss"] == traced.history["loss"]
    assert f"profile: {tmp_path}" in caplog.text


def calls(profiler, length, total):
    """Updates of each call, as `Fit` makes them."""
    step, lengths = 0, []
    while step < total:
        lengths.append(min(profiler.cut(length, step), total - step))
        step += lengths[-1]
    return lengths


def test_calls_are_cut_at_both_borders(tmp_path):
    profiler = Profiler(10, 15, tmp_path)
    assert calls(profiler, 4, 24) == [4, 4, 2, 4, 1, 4, 4, 1]


def test_a_training_that_ends_within_writes_what_there_is(tmp_path):
    fit(Profiler(15, 100, tmp_path))
    assert list(tmp_path.rglob("*.xplane.pb"))


def test_another_profiler_that_runs_is_no_end(tmp_path, caplog):
    import tensorflow as tf

    tf.profiler.experimental.start(str(tmp_path / "other"))
    try:
        trained = fit(Profiler(3, 6, tmp_path))
    finally:
        tf.profiler.experimental.stop()
    assert len(trained.history["loss"]) == 2
    assert "there will be no profile" in caplog.text


def test_no_updates_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="Received 5 and 5"):
        Profiler(5, 5, tmp_path)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
