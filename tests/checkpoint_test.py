"""Checkpointer and SavePolicy: what is kept, matched, restored, refused."""

import logging
import os
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import storage
from dist_amp.checkpoint import Checkpointer, SavePolicy
from tests import support


def manifest(step, number=None, is_finite=True, **metrics):
    return storage.Manifest(
        step=step,
        number=number or step,
        is_finite=is_finite,
        metrics=metrics,
        created=0.0,
        files={},
    )


def kept(policy, manifests):
    return [m.step for m in policy.kept(manifests)]


# --------------------------------------------------------------------- policy


def test_the_newest_are_kept():
    manifests = [manifest(step) for step in range(1, 7)]
    assert kept(SavePolicy(max_to_keep=2), manifests) == [5, 6]


def test_each_so_many_th_save_is_kept_for_ever():
    manifests = [manifest(10 * n, number=n) for n in range(1, 8)]
    policy = SavePolicy(max_to_keep=1, keep_every=3)
    assert kept(policy, manifests) == [30, 60, 70]


@pytest.mark.parametrize(
    ("name", "mode", "best"),
    [
        ("val_loss", "auto", 2),
        ("val_loss", "max", 1),
        ("val_f1", "auto", 1),
        ("val_f1", "min", 2),
    ],
)
def test_the_best_is_kept(name, mode, best):
    values = [3.0, 1.0, 2.0, 2.0, 2.0]
    manifests = [
        manifest(step, **{name: value})
        for step, value in enumerate(values, start=1)
    ]
    policy = SavePolicy(max_to_keep=1, keep_best=name, mode=mode)
    assert kept(policy, manifests) == [best, 5]


@pytest.mark.parametrize("mode", ["min", "max"])
def test_a_checkpoint_or_a_result_with_nan_is_never_the_best(mode):
    manifests = [
        manifest(1, val_loss=float("nan")),
        manifest(2, val_loss=1.0),
        manifest(3, is_finite=False, val_loss=0.0),
        manifest(4, is_finite=False, val_loss=9.0),
        manifest(5),
    ]
    policy = SavePolicy(max_to_keep=1, keep_best="val_loss", mode=mode)
    assert kept(policy, manifests) == [2, 5]


def test_the_newest_that_is_finite_is_always_kept():
    """It is what a rollback goes back to."""
    manifests = [manifest(n, is_finite=n < 3) for n in range(1, 6)]
    assert kept(SavePolicy(max_to_keep=2), manifests) == [2, 4, 5]


def test_of_two_checkpoints_of_a_step_the_later_one_is_kept():
    manifests = [manifest(4, number=1), manifest(4, number=2)]
    policy = SavePolicy()
    assert [m.number for m in policy.kept(manifests)] == [2]


@pytest.mark.parametrize(
    "options",
    [
        {"max_to_keep": 0},
        {"every_minutes": -1.0},
        {"mode": "most"},
        {"keep_best": "loss", "every_epochs": None},
    ],
)
def test_a_policy_out_of_range_is_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        SavePolicy(**options)


# ----------------------------------------------------------- save and restore


def save_steps(directory, steps, **policy):
    variable = keras.Variable([0.0, 0.0], name="weight")
    with Checkpointer(
        directory, {"model": [variable]}, policy=SavePolicy(**policy)
    ) as checkpointer:
        for step in steps:
            variable.assign([float(step), 0.5])
            checkpointer.save(step, {"epoch": step}, metrics={"val_loss": step})
    return variable


def test_values_counters_and_arrays_come_back(tmp_path):
    weight = keras.Variable([1.0, 2.0])
    count = tf.Variable(7, dtype=tf.int64)
    groups = {"model": [weight], "mine": [count]}
    with Checkpointer(tmp_path, groups) as checkpointer:
        assert checkpointer.restore() is None
        checkpointer.save(
            3, {"name": "x", "nan": float("nan")}, arrays={"a/b": np.eye(2)}
        )
        weight.assign([0.0, 0.0])
        count.assign(0)
        restored = checkpointer.restore()
    assert restored.step == 3
    assert restored.state["name"] == "x"
    assert np.isnan(restored.state["nan"])
    np.testing.assert_array_equal(restored.arrays["a/b"], np.eye(2))
    assert weight.numpy().tolist() == [1.0, 2.0]
    assert count.numpy() == 7


def test_only_what_the_policy_says_is_left(tmp_path):
    save_steps(
        tmp_path, range(1, 8), max_to_keep=1, keep_every=4, keep_best="val_loss"
    )
    steps = [storage.step_of(path) for path in storage.find(str(tmp_path))]
    assert steps == [1, 4, 7]


def test_counting_saves_goes_on_in_the_next_process(tmp_path):
    save_steps(tmp_path, [1, 2], keep_every=3, max_to_keep=1)
    save_steps(tmp_path, [3, 4, 5], keep_every=3, max_to_keep=1)
    steps = [storage.step_of(path) for path in storage.find(str(tmp_path))]
    assert steps == [3, 5]


def test_a_save_that_was_cut_short_is_passed_over_and_cleaned_up(tmp_path):
    save_steps(tmp_path, [1, 2])
    (tmp_path / "ckpt-2" / storage.MANIFEST).unlink()
    variable = keras.Variable([0.0, 0.0], name="weight")
    with Checkpointer(tmp_path, {"model": [variable]}) as checkpointer:
        assert checkpointer.restore().step == 1
        checkpointer.save(3)
    assert not (tmp_path / "ckpt-2").exists()


def test_what_is_not_finite_can_be_passed_over(tmp_path):
    variable = keras.Variable([1.0], name="weight")
    with Checkpointer(tmp_path, {"model": [variable]}) as checkpointer:
        checkpointer.save(1)
        variable.assign([np.nan])
        checkpointer.save(2)
        assert checkpointer.restore().step == 2
        assert checkpointer.restore(only_finite=True).step == 1
        checkpointer.discard_after(1)
        assert checkpointer.restore().step == 1


def test_a_mask_of_infinities_is_no_sign_of_a_broken_run(tmp_path):
    mask = keras.Variable([0.0, -np.inf], trainable=False, name="mask")
    weight = keras.Variable([1.0], name="weight")
    with Checkpointer(tmp_path, {"model": [mask, weight]}) as checkpointer:
        checkpointer.save(1)
        weight.assign([np.inf])
        checkpointer.save(2)
        assert checkpointer.restore(only_finite=True).step == 1


def test_ctrl_c_while_a_save_is_waited_for_does_not_lose_it(tmp_path):
    """In a process of its own: the interrupt comes while the disk works."""
    script = (
        "import os, signal, sys, threading\n"
        "import keras, numpy as np\n"
        "from dist_amp.checkpoint import Checkpointer\n"
        "weights = [keras.Variable(np.ones(20_000_000, 'float32'))]\n"
        "try:\n"
        "    with Checkpointer(sys.argv[1], {'model': weights}) as saver:\n"
        "        saver.save(1)\n"
        "        interrupt = lambda: os.kill(os.getpid(), signal.SIGINT)\n"
        "        threading.Timer(0.02, interrupt).start()\n"
        "        saver.wait()\n"
        "        print('not interrupted')\n"
        "except KeyboardInterrupt:\n"
        "    alive = [t for t in threading.enumerate() if 'writer' in t.name]\n"
        "    print('interrupted', len(alive))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout == "interrupted 0\n", done.stderr
    assert storage.check(f"{tmp_path}/ckpt-1").step == 1


def test_names_of_its_own_groups_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'metrics'"):
        Checkpointer(tmp_path, {"metrics": []})


def test_numbers_of_numpy_are_saved_as_pythons(tmp_path):
    with Checkpointer(tmp_path, {}) as checkpointer:
        checkpointer.save(1, {"best": np.float32(0.5), "is_done": np.bool_(1)})
        assert checkpointer.restore().state == {"best": 0.5, "is_done": True}


def make_unreadable(path):
    """What a network's failure looks like: it is there and cannot be read."""
    (path / storage.MANIFEST).rename(path / "kept")
    (path / storage.MANIFEST).mkdir()


def test_what_cannot_be_read_is_left_alone(tmp_path, caplog):
    save_steps(tmp_path, [1, 2])
    make_unreadable(tmp_path / "ckpt-2")
    variable = keras.Variable([0.0, 0.0], name="weight")
    policy = SavePolicy(max_to_keep=1)
    with Checkpointer(
        tmp_path, {"model": [variable]}, policy=policy
    ) as checkpointer:
        assert checkpointer.restore().step == 1
        assert "ckpt-2 cannot be read" in caplog.text
        checkpointer.save(3)
    names = {path.name for path in tmp_path.iterdir()} - {"lock"}
    assert names == {"ckpt-2", "ckpt-3"}


def test_nothing_but_the_unreadable_is_an_error(tmp_path):
    save_steps(tmp_path, [1])
    make_unreadable(tmp_path / "ckpt-1")
    with (
        Checkpointer(tmp_path, {}) as checkpointer,
        pytest.raises(storage.IO_ERRORS),
    ):
        checkpointer.restore()


def test_another_versions_format_is_an_error_and_stays(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(storage, "_FORMAT", 2)
        save_steps(tmp_path, [1])
    with pytest.raises(storage.FormatError, match="another version"):
        save_steps(tmp_path, [2])
    assert (tmp_path / "ckpt-1" / storage.MANIFEST).exists()


def test_remote_file_systems_are_written_as_local_ones():
    """TensorFlow's own in-memory file system stands for gs://."""
    save_steps("ram://run/checkpoints", [1, 2, 3, 4], max_to_keep=2)
    assert storage.find("ram://run/checkpoints") == [
        "ram://run/checkpoints/ckpt-3",
        "ram://run/checkpoints/ckpt-4",
    ]
    variable = keras.Variable([0.0, 0.0], name="weight")
    with Checkpointer(
        "ram://run/checkpoints", {"model": [variable]}
    ) as checkpointer:
        assert checkpointer.restore().state == {"epoch": 4}
    assert variable.numpy().tolist() == [4.0, 0.5]


# ------------------------------------------------------------- another model


def make_group(*shapes, names=None):
    names = names or [f"layer_{index}" for index in range(len(shapes))]
    pairs = zip(shapes, names, strict=True)
    return {
        "model": [
            keras.Variable(np.ones(s, "float32"), name=n) for s, n in pairs
        ]
    }


def test_another_model_is_an_error_that_lists_what_differs(tmp_path):
    with Checkpointer(tmp_path, make_group([2], [3])) as checkpointer:
        checkpointer.save(1)
    other = make_group([2], [4], [5])
    with (
        Checkpointer(tmp_path, other) as checkpointer,
        pytest.raises(ValueError, match="another model or optimizer") as error,
    ):
        checkpointer.restore()
    lines = str(error.value).splitlines()
    assert "  only there: model: layer_1 [3] float32" in lines
    assert "  only here: model: layer_1 [4] float32" in lines
    assert "  only here: model: layer_2 [5] float32" in lines


def test_a_layer_of_another_name_is_another_model(tmp_path):
    with Checkpointer(tmp_path, make_group([2], names=["a"])) as checkpointer:
        checkpointer.save(1)
    other = make_group([2], names=["b"])
    with (
        Checkpointer(tmp_path, other) as checkpointer,
        pytest.raises(ValueError, match="only there: model: a"),
    ):
        checkpointer.restore()


def test_numbers_that_keras_adds_to_names_do_not_matter(tmp_path):
    """As in a notebook that makes the same model twice."""
    models = [support.make_mlp() for _ in range(2)]
    assert models[0].variables[0].path != models[1].variables[0].path
    groups = [{"model": model.variables} for model in models]
    with Checkpointer(tmp_path, groups[0]) as checkpointer:
        checkpointer.save(1)
    with Checkpointer(tmp_path, groups[1]) as checkpointer:
        checkpointer.restore()
    for one, other in zip(*(m.get_weights() for m in models), strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_fits_can_be_restored_and_the_rest_is_named(tmp_path, caplog):
    saved = make_group([2], [3], names=["body", "head"])
    saved["model"][0].assign([8.0, 9.0])
    with Checkpointer(tmp_path, saved) as checkpointer:
        checkpointer.save(1)
    other = make_group([7], [2], names=["head", "body"])
    with (
        caplog.at_level(logging.WARNING),
        Checkpointer(tmp_path, other) as checkpointer,
    ):
        restored = checkpointer.restore(strict=False)
    assert other["model"][1].numpy().tolist() == [8.0, 9.0]
    assert other["model"][0].numpy().tolist() == [1.0] * 7
    assert any("head [7]" in line for line in restored.left_out)
    assert "not restored" in caplog.text
    assert "head [3]" in caplog.text


# ------------------------------------------------------------------ replicas


@pytest.mark.parametrize(("saved", "restored"), [(4, 4), (4, 2), (1, 2)])
def test_metrics_under_way_move_to_any_number_of_replicas(
    tmp_path, saved, restored
):
    def make(num_replicas):
        with support.make_strategy(num_replicas).scope() as _:
            metric = keras.metrics.Mean()
        return metric, Checkpointer(
            tmp_path,
            {},
            summed=metric.variables,
            strategy=support.make_strategy(num_replicas),
        )

    metric, checkpointer = make(saved)
    for index, copies in enumerate(
        zip(*map(copies_of, metric.variables), strict=True)
    ):
        for copy, value in zip(copies, (0.1 + index, 1.0 + index), strict=True):
            copy.assign(value)
    with checkpointer:
        checkpointer.save(1)
    other, checkpointer = make(restored)
    with checkpointer:
        has_same = checkpointer.restore().has_same_replicas
    assert has_same == (saved == restored)
    assert float(other.result()) == pytest.approx(float(metric.result()))
    if has_same:
        for one, two in zip(other.variables, metric.variables, strict=True):
            assert support.local_copies(one) == support.local_copies(two)


@pytest.mark.parametrize(("saved", "restored"), [(2, 2), (2, 4)])
def test_random_states_come_back_to_their_replica_or_from_the_first(
    tmp_path, saved, restored
):
    def make(num_replicas):
        strategy = support.make_strategy(num_replicas)
        with strategy.scope():
            seed = keras.random.SeedGenerator(3)
        return seed.state, Checkpointer(
            tmp_path, {}, per_replica=[seed.state], strategy=strategy
        )

    state, checkpointer = make(saved)
    for index, copy in enumerate(copies_of(state)):
        copy.assign([index, 10 + index])
    with checkpointer:
        checkpointer.save(1)
    state, checkpointer = make(restored)
    with checkpointer:
        checkpointer.restore()
    values = [copy.numpy().tolist() for copy in copies_of(state)]
    expected = [[0, 10], [1, 11]] if saved == restored else [[0, 10]] * restored
    assert values == expected


def copies_of(variable):
    return getattr(variable.value, "values", (variable.value,))


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
