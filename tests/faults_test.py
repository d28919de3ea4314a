"""Checkpoints when things go wrong: kills, full disks, damage, odd clocks."""

import contextlib
import glob
import itertools
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from dist_amp import storage
from dist_amp.checkpoint import Checkpointer, SavePolicy
from tests import support

SECONDS = 120
NUM_KILLS = int(os.environ.get("DIST_AMP_KILLS", "4"))
STEPS_PER_EPOCH = 4
NUM_EXAMPLES = STEPS_PER_EPOCH * support.GLOBAL_BATCH


def command(script, *arguments):
    return [sys.executable, "-c", script, *map(str, arguments)]


def environment():
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


@contextlib.contextmanager
def child(script, *arguments):
    """A process to talk to, which does not outlive the block."""
    with subprocess.Popen(
        command(script, *arguments),
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        watchdog = threading.Timer(SECONDS, process.kill)
        watchdog.start()
        try:
            yield process
        finally:
            watchdog.cancel()
            process.kill()


@pytest.fixture
def big_path(tmp_path):
    """Emptied at the end: pytest keeps what is in `tmp_path`."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def flip(path, position=0.5):
    """Turns over the lowest bit of a byte."""
    content = bytearray(path.read_bytes())
    content[round(position * (len(content) - 1))] ^= 1
    path.write_bytes(content)


def whole_steps(directory):
    """Steps of the checkpoints of which every byte is right."""
    paths = storage.find(str(directory))
    manifests = [storage.check(path) for path in paths]
    return [manifest.step for manifest in manifests if manifest]


# ---------------------------------------------------------------------- kills

# 8 variables of 25 MB, filled with whole numbers that float32 holds exactly.
SAVER = """
import sys
import keras
import numpy as np
from dist_amp.checkpoint import Checkpointer, SavePolicy

directory, num_saves = sys.argv[1], int(sys.argv[2])
base = np.arange(6_250_000) % 1021

def content(step):
    return [(base + 1000 * step + i).astype("float32") for i in range(8)]

def say(*words):
    print(*words, flush=True)

variables = [keras.Variable(np.zeros(base.shape, "float32")) for _ in range(8)]
policy = SavePolicy(max_to_keep=2)
with Checkpointer(directory, {"model": variables}, policy=policy) as saver:
    restored = saver.restore()
    step = restored.step if restored else 0
    if restored:
        for variable, expected in zip(variables, content(step), strict=True):
            np.testing.assert_array_equal(variable.numpy(), expected)
        assert restored.state == {"step": step}, restored.state
        np.testing.assert_array_equal(restored.arrays["step"], step)
    say("restored", step)
    for step in range(step + 1, step + 1 + num_saves):
        for variable, value in zip(variables, content(step), strict=True):
            variable.assign(value)
        say("begins", step)
        saver.save(step, {"step": step}, arrays={"step": np.array(step)})
        say("returned", step)
"""


class Killed:
    """Starts the script above and kills it, and keeps the account."""

    def __init__(self, directory):
        self.directory = str(directory)
        self.whole = self.last = 0  # a restored step lies between these
        self.cut_short = 0
        self.save_secs = 0.0

    def start(self, num_saves=10**6):
        return child(SAVER, self.directory, num_saves)

    def check_restored(self, process):
        """The script says so after it compared every number."""
        line = process.stdout.readline()
        assert line, process.stderr.read()
        restored = int(line.split()[1])
        assert self.whole <= restored <= self.last
        self.whole = restored

    def hear(self, line):
        """When `save` returns, the one before it was written to its end."""
        word, step = line.split()
        if word == "begins":
            self.last = int(step)
        else:
            self.whole = max(self.whole, int(step) - 1)

    def measure(self, process):
        """How long a save takes here, from the first two of them."""
        begin = time.monotonic()
        while self.whole < 1:
            self.hear(process.stdout.readline())
        self.save_secs = time.monotonic() - begin

    def kill_after(self, process, seconds):
        self.hear(process.stdout.readline())
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(seconds)
        process.kill()
        for line in process.stdout:
            self.hear(line)
        found = {
            os.path.basename(path): sorted(os.listdir(path))
            for path in storage.find(self.directory)
        }
        parts = {k: v for k, v in found.items() if storage.MANIFEST not in v}
        self.cut_short += bool(parts)
        print(
            f"killed after {seconds:.3f} s: step {self.whole} must be whole, "
            f"{self.last} was begun, {parts or 'nothing'} is cut short"
        )


def test_a_run_that_is_killed_while_it_saves_goes_on_from_whole_content(
    big_path,
):
    rng, killed = random.Random(0), Killed(big_path)
    for number in range(NUM_KILLS):
        with killed.start() as process:
            killed.check_restored(process)
            if number == 0:
                killed.measure(process)
            killed.kill_after(process, rng.uniform(0, 3 * killed.save_secs))
    with killed.start(num_saves=0) as process:
        killed.check_restored(process)
        assert process.wait(SECONDS) == 0
    print(
        f"a save takes {killed.save_secs:.2f} s; {killed.cut_short} of "
        f"{NUM_KILLS} kills cut one short; the last step is {killed.whole}"
    )
    assert killed.cut_short > 0  # else nothing was tried
    assert not storage.find_damaged(killed.directory)


class Stopped(BaseException):
    """Ends a thread on the spot, without any clean-up: nobody catches it."""


FILE_OPERATIONS = (
    (tf.io.gfile, "GFile"),
    (tf.io.gfile, "makedirs"),
    (tf.io.gfile, "remove"),
    (tf.io.gfile, "rename"),
    (tf.io.gfile, "rmtree"),
    (tf.raw_ops, "SaveV2"),
    (os, "fsync"),
)


def stop_before(monkeypatch, place):
    """Raises in the place-th file operation from now on; returns a counter."""
    done, rmtree = [], tf.io.gfile.rmtree

    def wrap(operation):
        def wrapped(*arguments, **options):
            done.append(operation)
            if len(done) > place:
                if operation is rmtree:  # in its midst, the manifest last
                    for file in glob.glob(f"{arguments[0]}/[!m]*"):
                        os.remove(file)
                raise Stopped
            return operation(*arguments, **options)

        return wrapped

    for module, name in FILE_OPERATIONS:
        monkeypatch.setattr(module, name, wrap(getattr(module, name)))
    return done


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize("step", [20, 30])
def test_a_save_that_stops_between_any_two_operations_costs_nothing(
    tmp_path, monkeypatch, step
):
    """Each place in turn, unlike the kills; step 20 is there already."""
    values = []
    for place in itertools.count():
        directory = tmp_path / str(place)
        saver, weight = save_steps(directory, 20, max_to_keep=1)
        weight.assign([30, -30])
        with saver, monkeypatch.context() as context:
            done = stop_before(context, place)
            saver.save(step, {"step": 30})
            saver.wait()
        assert {20, step}.issuperset(whole_steps(directory))  # none is damaged
        with saver:
            values.append(saver.restore().state["step"])
            np.testing.assert_array_equal(weight, [values[-1], -values[-1]])
            assert storage.find_damaged(str(directory)) == []
            saver.save(40)
        assert whole_steps(directory) == [40]
        if len(done) <= place:  # it came to its end
            break
    assert values == sorted(values)  # 20 and, from the manifest on, 30
    assert {*values} == {20, 30}
    assert values.count(30) > 2  # deleting the old one is tried, too


def test_a_run_that_was_killed_in_its_first_save_begins_anew(tmp_path):
    saver, _ = save_steps(tmp_path, 5)
    (tmp_path / "ckpt-5" / "manifest.json").unlink()
    with saver:
        assert saver.restore() is None
        saver.save(1)
        saver.wait()
    assert storage.find(str(tmp_path)) == [f"{tmp_path}/ckpt-1"]
    assert whole_steps(tmp_path) == [1]


def test_a_save_leaves_training_waiting_for_a_fraction_of_it(big_path):
    variables = [keras.Variable(np.ones(6_250_000, "float32"))] * 8
    with Checkpointer(big_path, {"model": variables}) as saver:
        begin = time.monotonic()
        saver.save(1)
        saver.wait()
        total = time.monotonic() - begin
        assert saver.error is None
    print(f"training waited {saver.waited_secs:.3f} s of {total:.3f} s")
    assert storage.check(f"{big_path}/ckpt-1").num_bytes > 200e6
    assert saver.waited_secs < total / 3


# ---------------------------------------------------------------------- disks


@pytest.fixture(scope="module")
def run_on_small_disk(tmp_path_factory):
    """Runs a script on a disk of 3 MB, which no other process sees.

    Returns what the script's last line holds, and its standard error.
    """
    options = "-m" if os.geteuid() == 0 else "-rm"
    mount = 'mount -t tmpfs -o size=3m tmpfs "$0" && exec "$@"'

    def run(*words):
        folder = tmp_path_factory.mktemp("disk")
        return subprocess.run(
            ["unshare", options, "sh", "-c", mount, folder, *words, folder],
            env=environment(),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )

    try:
        tried = run("true")
    except FileNotFoundError:
        pytest.skip("there is no `unshare` here")
    if tried.returncode != 0:
        pytest.skip(f"mounting is not permitted here: {tried.stderr.strip()}")

    def run_script(script):
        done = run(sys.executable, "-c", DISK + script)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1]), done.stderr

    return run_script


DISK = """
import json, os, shutil, subprocess, sys
import keras
import numpy as np
import tensorflow as tf
from dist_amp import storage
from dist_amp.checkpoint import Checkpointer, SavePolicy
from tests import support

disk = sys.argv[1]
directory, ballast = f"{disk}/checkpoints", f"{disk}/ballast"
trainer = support.make_trainer()
dataset = support.make_dataset(4 * support.GLOBAL_BATCH)

def fit(epochs, directory, *callbacks):
    trainer.fit(dataset, epochs=epochs, verbose=0, callbacks=callbacks,
                checkpoint_dir=directory)

def fill(room=0):
    with open(ballast, "wb") as file:
        size = shutil.disk_usage(disk).free - room
        os.posix_fallocate(file.fileno(), 0, size)

def whole():
    found = map(storage.check, storage.find(directory))
    return [manifest.step for manifest in found if manifest]
"""

FULL = """
class Disk(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == 3:
            told["while it was full"] = whole()
            told["found"] = [*map(storage.step_of, storage.find(directory))]
            os.remove(ballast)

told = {}
fit(1, directory)
fill()
fit(4, directory, Disk())
told["in the end"] = whole()
told["step"] = trainer.global_step
told["error"] = str(trainer.save_error)
print(json.dumps(told))
"""


def test_training_outlives_a_full_disk_and_saves_when_there_is_room(
    run_on_small_disk,
):
    told, log = run_on_small_disk(FULL)
    assert told["step"] == 4 * STEPS_PER_EPOCH
    assert "COULD NOT SAVE step 8" in log
    assert told["while it was full"] == [4]
    assert 8 not in told["found"]  # what was written of it is gone
    assert told["in the end"][-1] == 16
    assert told["error"] == "None"


# The disk has room for one page after the other, so that it becomes full in
# each file of a checkpoint, the manifest included.
ROOM = """
tensors = {"weight": tf.random.uniform([10_000])}
state = {"names": ["name"] * 1000}
told = {"failed": 0, "whole": 0}
for room in range(0, 100, 4):
    fill(room * 1024)
    path = storage.new_path(directory, room)
    try:
        storage.write(path, tensors, state, step=room)
    except storage.IO_ERRORS:
        assert storage.check(path) is None
        told["failed"] += 1
    else:
        assert storage.check(path).step == room
        assert storage.read_state(path) == state
        read = storage.read_tensors(path)["weight"]
        np.testing.assert_array_equal(read, tensors["weight"])
        told["whole"] += 1
    storage.remove(path)
    os.remove(ballast)
print(json.dumps(told))
"""


def test_wherever_the_disk_becomes_full_a_save_fails_or_is_whole(
    run_on_small_disk,
):
    told, _ = run_on_small_disk(ROOM)
    assert told["failed"] > 12  # 40 kB of tensors and 13 kB of values
    assert told["whole"] > 5


READ_ONLY = """
class Count(keras.callbacks.Callback):
    def on_train_batch_begin(self, batch, logs=None):
        told["steps"] += 1

told = {"steps": 0}
fit(1, directory)
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
for name in (directory, f"{disk}/new"):
    try:
        fit(2, name, Count())
    except Exception as error:
        kinds = [kind.__name__ for kind in type(error).__mro__]
        told[os.path.basename(name)] = [kinds, str(error)]
path, = storage.find(directory)
told["aside"] = storage.set_aside(path) == path
told["whole"] = whole()
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def read_only(run_on_small_disk):
    return run_on_small_disk(READ_ONLY)[0]


def test_a_folder_that_cannot_be_written_is_told_before_training(read_only):
    kinds, message = read_only["checkpoints"]
    assert "OSError" in kinds
    assert "Read-only" in message
    assert read_only["steps"] == 0


def test_a_folder_that_cannot_be_made_is_an_os_error(read_only):
    kinds, message = read_only["new"]
    assert "Read-only" in message
    assert "OSError" in kinds


def test_a_file_in_the_place_of_the_folder_is_an_os_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        Checkpointer(tmp_path / "file", {}).__enter__()


def test_what_cannot_be_set_aside_stays_as_it_is(read_only):
    assert read_only["aside"]
    assert read_only["whole"] == [STEPS_PER_EPOCH]


# A file that something is mounted on cannot be deleted, not even by root: as
# on NFS, where what another host reads cannot.
UNDELETABLE = """
weight = keras.Variable(np.ones(1000, "float32"))
policy = SavePolicy(max_to_keep=1)
with Checkpointer(directory, {"model": [weight]}, policy=policy) as saver:
    saver.save(1)
    saver.wait()
    file = f"{directory}/ckpt-1/tensors.index"
    subprocess.run(["mount", "--bind", file, file], check=True)
    saver.save(2)
    saver.wait()
    told = {"steps": whole(), "old": os.listdir(f"{directory}/ckpt-1")}
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def undeletable(run_on_small_disk):
    return run_on_small_disk(UNDELETABLE)


def test_what_is_deleted_in_part_is_no_checkpoint(undeletable):
    told, _ = undeletable
    assert "tensors.index" in told["old"]
    assert storage.MANIFEST not in told["old"]


def test_an_old_checkpoint_that_cannot_be_deleted_costs_no_new_one(
    undeletable,
):
    told, log = undeletable
    assert told["steps"] == [2]
    assert "COULD NOT SAVE" not in log


# --------------------------------------------------------------------- damage


def save_steps(directory, *steps, max_to_keep=3):
    """Saves `[step, -step]`; returns the saver and its variable."""
    weight = keras.Variable([0.0, 0.0])
    saver = Checkpointer(
        directory,
        {"model": [weight]},
        policy=SavePolicy(max_to_keep=max_to_keep),
    )
    with saver:
        for step in steps:
            weight.assign([step, -step])
            saver.save(step, {"step": step})
    weight.assign([0.0, 0.0])
    return saver, weight


@pytest.mark.parametrize(
    "name", ["manifest.json", "state.json", "tensors.data*", "tensors.index"]
)
def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(
    tmp_path, caplog, name
):
    saver, weight = save_steps(tmp_path, 1, 2, 3)
    (file,) = tmp_path.glob(f"ckpt-3/{name}")
    flip(file)
    with saver:
        restored = saver.restore()
        assert restored.path == f"{tmp_path}/ckpt-2"
        assert restored.state == {"step": 2}
        np.testing.assert_array_equal(weight, [2, -2])
        (record,) = caplog.records
        assert record.levelno == logging.WARNING
        assert f"{tmp_path}/ckpt-3 is damaged: {file.name}" in record.message
        assert (tmp_path / "ckpt-3.damaged" / file.name).exists()
        assert whole_steps(tmp_path) == [1, 2]
        saver.save(3, {"step": "new"})
        assert saver.restore().state == {"step": "new"}


def test_a_checkpoint_is_checked_with_each_restore(tmp_path):
    saver, weight = save_steps(tmp_path, 1, 2)
    with saver:
        assert saver.restore().step == 2
        flip(next(tmp_path.glob("ckpt-2/tensors.data*")), 0.0)
        assert saver.restore().step == 1
        np.testing.assert_array_equal(weight, [1, -1])


def test_nothing_is_started_anew_over_damaged_checkpoints(tmp_path):
    saver, _ = save_steps(tmp_path, 1, 2)
    for file in tmp_path.glob("ckpt-*/tensors.data*"):
        flip(file)
    with saver:
        for _ in range(2):  # the second time they have other names
            with pytest.raises(storage.DamagedError, match=r"ckpt-1\.damaged"):
                saver.restore()
    with pytest.raises(storage.DamagedError):
        fit(tmp_path)
    assert len(storage.find_damaged(str(tmp_path))) == 2
    assert storage.find(str(tmp_path)) == []


def test_a_restore_that_is_not_strict_tells_all_that_it_left_out(tmp_path):
    def make_model(*units):
        layers = [keras.layers.Dense(number) for number in units]
        return keras.Sequential([keras.Input((3,)), *layers])

    saved, bigger = make_model(2, 2), make_model(2, 2, 5)
    with Checkpointer(tmp_path, {"model": saved.variables}) as saver:
        saver.save(1)
    with Checkpointer(tmp_path, {"model": bigger.variables}) as saver:
        left_out = saver.restore(strict=False).left_out
    assert len(left_out) == 2
    for one, other in zip(saved.variables, bigger.variables, strict=False):
        np.testing.assert_array_equal(one, other)


# ----------------------------------------------------------------- whole fits


def fit(directory, *callbacks, epochs=2, **options):
    return support.fit_trainer(
        support.make_dataset(NUM_EXAMPLES),
        fit={
            "epochs": epochs,
            "checkpoint_dir": directory,
            "callbacks": callbacks,
            **options,
        },
    ).trainer


@pytest.mark.parametrize("days_per_look", [-1, 1])
def test_a_clock_that_jumps_changes_no_save(
    tmp_path, monkeypatch, days_per_look
):
    looks, now = itertools.count(), time.time()
    monkeypatch.setattr(
        time, "time", lambda: now + 86400 * days_per_look * next(looks)
    )
    policy = SavePolicy(every_steps=2, every_minutes=1000, max_to_keep=9)
    fit(tmp_path, save_policy=policy, steps_per_loop=1)
    assert whole_steps(tmp_path) == [2, 4, 6, 8]
    manifests = map(storage.check, storage.find(str(tmp_path)))
    created = [days_per_look * manifest.created for manifest in manifests]
    assert created == sorted(set(created))  # the clock did jump
    assert fit(tmp_path, epochs=3).resumed_step == 8


TRAINER = """
import sys
import keras
from tests import support

class Wait(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        print("trains", flush=True)
        sys.stdin.readline()

support.fit_trainer(
    support.make_dataset(4 * support.GLOBAL_BATCH),
    fit={"epochs": 2, "checkpoint_dir": sys.argv[1], "callbacks": [Wait()]},
)
"""


def test_a_second_run_is_refused_while_the_first_lives(tmp_path):
    with child(TRAINER, tmp_path) as process:
        assert process.stdout.readline() == "trains\n"
        with pytest.raises(
            storage.LockedError, match=f"process {process.pid} "
        ):
            fit(tmp_path, epochs=3)
        assert storage.find(str(tmp_path)) == []
        _, log = process.communicate("\n\n", timeout=SECONDS)
        assert process.returncode == 0, log
    assert whole_steps(tmp_path) == [4, 8]
    assert fit(tmp_path, epochs=3).resumed_step == 8


# ------------------------------------------------------- training on meanwhile


@pytest.fixture
def writer(monkeypatch):
    """An event: nothing is written before it is set."""
    may_write, write = threading.Event(), storage.write

    def write_later(*arguments, **options):
        assert may_write.wait(SECONDS)
        return write(*arguments, **options)

    monkeypatch.setattr(storage, "write", write_later)
    yield may_write
    may_write.set()


def make_wide_model():
    """4 MB of weights, and twice that in the optimizer."""
    return keras.Sequential(
        [
            keras.Input((support.NUM_FEATURES,)),
            keras.layers.Dense(1000, activation="relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(1000, activation="relu"),
            keras.layers.Dense(support.NUM_CLASSES, dtype="float32"),
        ]
    )


class Watcher(keras.callbacks.Callback):
    """Copies each step's variables, and has step 2 written after step 4."""

    def __init__(self, trainer, may_write):
        super().__init__()
        self.copies = {}
        self.losses = []
        self._trainer = trainer
        self._may_write = may_write

    def on_train_batch_end(self, batch, logs=None):
        self.losses.append(logs["loss"])
        self.copies[batch + 1] = {
            "model/": support.read(self._trainer.model.variables),
            "optimizer/": support.read(self._trainer.optimizer.variables),
            "per_replica/": [
                np.array(support.local_copies(variable))
                for variable in self._trainer.model.variables
                if variable.name == "seed_generator_state"
            ],
        }
        if batch + 1 == STEPS_PER_EPOCH:
            self._may_write.set()


@pytest.mark.parametrize(
    ("num_replicas", "precision", "jit_compile"),
    [
        (1, "float32", False),
        (1, "float32", True),
        (2, "mixed_float16", False),
    ],
)
def test_training_goes_on_and_what_is_saved_is_of_the_time_of_the_save(
    tmp_path, writer, num_replicas, precision, jit_compile
):
    trainer = support.make_trainer(
        make_wide_model,
        lambda: keras.optimizers.Adam(0.01),
        num_replicas=num_replicas,
        precision=precision,
        jit_compile=jit_compile,
    )
    watcher = Watcher(trainer, writer)
    trainer.fit(
        support.make_dataset(NUM_EXAMPLES),
        steps_per_loop=1,
        callbacks=[watcher],
        verbose=0,
        checkpoint_dir=tmp_path,
        save_policy=SavePolicy(every_steps=2, every_epochs=None),
    )
    assert whole_steps(tmp_path) == [2, 4]
    path = storage.find(str(tmp_path))[0]
    saved = sorted(storage.read_tensors(path).items())
    for group, copies in watcher.copies[2].items():
        arrays = [array for key, array in saved if key.startswith(group)]
        for array, expected in zip(arrays, copies, strict=True):
            np.testing.assert_array_equal(array, expected)
    state = storage.read_state(path)
    assert state["position"]["step"] == 2
    kept = dict(state["callbacks"])["Watcher"]
    assert kept["losses"] == {"list": watcher.losses[:2]}
    for group in ("model/", "optimizer/", "per_replica/"):  # else no proof
        pairs = zip(
            *(watcher.copies[step][group] for step in (2, 4)), strict=True
        )
        assert any(np.any(before != after) for before, after in pairs)


def change_in_place(variable, step):
    """The ways in which TensorFlow writes into a variable."""
    variable.assign_add(tf.ones_like(variable))
    variable.scatter_nd_update([[0]], [float(step)])
    variable.scatter_sub(tf.IndexedSlices([0.5], [1]))
    variable.assign(np.full(variable.shape, step, "float32"))


@pytest.mark.parametrize("is_compiled", [False, True])
def test_no_way_to_change_a_variable_reaches_a_save_under_way(
    tmp_path, writer, is_compiled
):
    variable = tf.Variable(np.arange(1e6, dtype="float32"))
    array = np.arange(10)
    change = change_in_place
    if is_compiled:
        change = tf.function(change_in_place)
    with Checkpointer(tmp_path, {"model": [variable]}) as saver:
        change(variable, 1)  # compiles, and leaves the variable sparse
        variable.assign(np.arange(1e6, dtype="float32"))
        saver.save(1, arrays={"array": array})
        change(variable, 2)
        array += 1
        writer.set()
        saver.wait()
        assert saver.error is None
        assert variable.numpy()[2] == 2
        restored = saver.restore()
    np.testing.assert_array_equal(variable, np.arange(1e6, dtype="float32"))
    np.testing.assert_array_equal(restored.arrays["array"], np.arange(10))


def test_plain_values_are_saved_as_they_were_too(tmp_path, writer):
    variable, losses = tf.Variable([1.0]), [0.5]
    with Checkpointer(tmp_path, {"model": [variable]}) as saver:
        saver.save(1, {"losses": losses})
        losses.append(0.25)
        writer.set()
        assert saver.restore().state == {"losses": [0.5]}


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
