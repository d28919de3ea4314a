"""Checkpoints as files: what was written comes back, or is not believed."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

from dist_amp import storage

SECONDS = 60
FILES = (
    "manifest.json",
    "state.json",
    "tensors.data-00000-of-00001",
    "tensors.index",
)
DTYPES = (
    "bfloat16",
    "bool",
    "complex64",
    "complex128",
    "float16",
    "float32",
    "float64",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
)


@pytest.fixture(params=["local", "ram"])
def directory(request, tmp_path):
    """On this disk, or in TensorFlow's file system in memory.

    The latter stands for gs://: only `tf.io.gfile` can read and write it.
    What it does otherwise than all others is avoided here: it appends to a
    file that is there, takes `ckpt-12` for a file of the folder `ckpt-1`, and
    renames a folder without what is in it.
    """
    return f"ram:/{tmp_path}" if request.param == "ram" else str(tmp_path)


def save(directory, step=7, tensors=None, state=None, **options):
    path = storage.new_path(directory, step)
    tensors = tensors or {"weight": tf.range(100.0)}
    storage.write(path, tensors, state or {}, step=step, **options)
    return path


def edit(path, change):
    """Replaces a file's bytes by what the function makes of them."""
    with tf.io.gfile.GFile(path, "rb") as file:
        content = file.read()
    tf.io.gfile.remove(path)
    with tf.io.gfile.GFile(path, "wb") as file:
        file.write(change(content))


def flip(content, position, bit):
    changed = bytearray(content)
    changed[position] ^= 1 << bit
    return bytes(changed)


# ---------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_shape_comes_back_bit_for_bit(directory, dtype):
    random = np.random.default_rng(0)
    tensors = {
        f"{group}/{shape}": tf.cast(random.integers(-9, 9, shape), dtype)
        for group in ("model", "optimizer")
        for shape in ((), (0,), (3, 0, 2), (1,), (3, 5, 2))
    }
    path = save(directory, 7, tensors)
    assert storage.check(path).step == 7
    read = storage.read_tensors(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype.as_numpy_dtype
        assert read[name].shape == tensor.shape
        assert read[name].tobytes() == tensor.numpy().tobytes()
    part = storage.read_tensors(path, prefix="optimizer/")
    assert part.keys() == {name for name in tensors if name[0] == "o"}
    assert storage.read_tensors(path, prefix="none") == {}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_numbers_that_are_not_finite_come_back_and_are_told(directory, dtype):
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e-7])
    tensor = tf.cast(values, dtype)
    path = save(directory, 7, {"fine": tf.ones([2]), "other": tensor})
    assert not storage.check(path).is_finite
    read = storage.read_tensors(path)["other"]
    assert read.tobytes() == tensor.numpy().tobytes()
    assert storage.check(save(directory, 8)).is_finite


def test_plain_values_come_back_as_they_were(directory):
    state = {"epoch": 3, "names": ["a", "ä"], "no": None, "x": 0.1, "d": {}}
    path = save(directory, 7, state=state, number=4, metrics={"val_loss": 0.1})
    assert storage.read_state(path) == state
    manifest = storage.check(path)
    assert (manifest.step, manifest.number) == (7, 4)
    assert manifest.metrics == {"val_loss": 0.1}
    assert manifest.num_bytes == sum(
        tf.io.gfile.stat(f"{path}/{name}").length for name in FILES[1:]
    )


# --------------------------------------------------------------------- damage


def test_a_checkpoint_consists_of_the_files_that_are_damaged_here(directory):
    assert tuple(sorted(tf.io.gfile.listdir(save(directory)))) == FILES


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("part", [0.0, 0.5, 1.0])
def test_a_flipped_bit_is_found_in_each_file(directory, name, part):
    """The lowest bit, which turns white space into what JSON does not allow."""
    path = save(directory)

    def change(content):
        return flip(content, round(part * (len(content) - 1)), 0)

    edit(f"{path}/{name}", change)
    with pytest.raises(storage.DamagedError, match=name):
        storage.check(path)
    edit(f"{path}/{name}", change)  # back again
    assert storage.check(path).step == 7


def test_no_flipped_bit_of_a_manifest_changes_what_it_says(tmp_path):
    """All of them are tried.

    A few leave every value as it was, say in the last digit of `created`,
    which is finer than a float: these need not be found.
    """
    path = save(str(tmp_path), metrics={"loss": 1e-9})
    original = storage.read_manifest(path)
    file = tmp_path / "ckpt-7" / "manifest.json"
    content, unnoticed = file.read_bytes(), 0
    for position in range(len(content)):
        for bit in range(8):
            file.write_bytes(flip(content, position, bit))
            try:
                assert storage.read_manifest(path) == original
                unnoticed += 1
            except storage.DamagedError:
                pass
    assert unnoticed < 10


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[: len(content) // 2], id="half"),
        # The manifest ends with a line break, which may go; not the brace.
        pytest.param(lambda content: content[:-2], id="short"),
        pytest.param(lambda content: content + b"0", id="long"),
        pytest.param(lambda content: bytes(len(content)), id="zeros"),
    ],
)
def test_a_file_of_another_length_or_of_zeros_is_found(directory, name, change):
    path = save(directory)
    edit(f"{path}/{name}", change)
    with pytest.raises(storage.DamagedError, match=name):
        storage.check(path)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_found(directory, name):
    path = save(directory)
    tf.io.gfile.remove(f"{path}/{name}")
    with pytest.raises(storage.DamagedError, match=f"{name} is missing"):
        storage.check(path)


def test_a_manifest_of_another_checkpoint_is_found(directory):
    path, other = save(directory, 7), save(directory, 8, {"a": tf.zeros([9])})
    tf.io.gfile.remove(f"{path}/manifest.json")
    tf.io.gfile.copy(f"{other}/manifest.json", f"{path}/manifest.json")
    with pytest.raises(storage.DamagedError, match=r"state\.json"):
        storage.check(path)


def test_without_a_manifest_it_is_no_checkpoint(directory):
    path = save(directory)
    tf.io.gfile.remove(f"{path}/manifest.json")
    assert storage.read_manifest(path) is None
    assert storage.check(path) is None
    assert storage.check(f"{directory}/ckpt-8") is None


def test_a_write_that_fails_leaves_no_checkpoint(directory):
    with pytest.raises(TypeError, match="JSON"):
        save(directory, state={"a": object()})
    assert storage.check(f"{directory}/ckpt-7") is None


# -------------------------------------------------------------------- folders


def test_a_whole_checkpoint_is_never_written_over(directory):
    made = [save(directory, 7, {"a": tf.fill([1], n)}) for n in range(12)]
    names = ["ckpt-7", *(f"ckpt-7.{number}" for number in range(1, 12))]
    assert made == storage.find(directory)
    assert made == [f"{directory}/{name}" for name in names]
    for number, path in enumerate(made):
        assert storage.check(path).step == 7
        assert storage.read_tensors(path)["a"] == [number]


def test_the_place_of_a_save_that_was_cut_short_is_used_again(directory):
    first, second = save(directory), save(directory)
    tf.io.gfile.remove(f"{second}/manifest.json")
    with tf.io.gfile.GFile(f"{second}/tensors.data-of-before", "w") as file:
        file.write("left over")
    assert save(directory, tensors={"new": tf.ones([1])}) == second
    assert tuple(sorted(tf.io.gfile.listdir(second))) == FILES
    assert storage.read_tensors(second)["new"] == [1]
    assert storage.read_tensors(first)["weight"].size == 100


def test_a_damaged_one_is_not_written_over_either(directory):
    path = save(directory)
    edit(f"{path}/manifest.json", lambda content: b"")
    assert save(directory) == f"{path}.1"


def test_find_orders_by_number_and_leaves_out_what_is_no_checkpoint(tmp_path):
    directory = str(tmp_path)
    assert storage.find(f"{directory}/missing") == []
    for step in (100, 9, 10, 0, 10, 1000):
        save(directory, step)
    for name in ("ckpt-5.damaged", "ckpt-x", "my-ckpt-5", "ckpt-5-of-6"):
        tf.io.gfile.makedirs(f"{directory}/{name}")
    found = storage.find(directory)
    assert [path.rpartition("/")[2] for path in found] == [
        "ckpt-0",
        "ckpt-9",
        "ckpt-10",
        "ckpt-10.1",
        "ckpt-100",
        "ckpt-1000",
    ]
    assert [*map(storage.step_of, found)] == [0, 9, 10, 10, 100, 1000]


def test_a_folder_may_be_named_like_a_checkpoint(directory):
    path = save(f"{directory}/ckpt-3", 12)
    assert storage.step_of(path) == 12
    assert storage.find(f"{directory}/ckpt-3") == [path]


@pytest.mark.parametrize("step", [2, 11, 12])
def test_remove_deletes_one_checkpoint_and_no_other(tmp_path, step):
    directory = str(tmp_path)
    first, second = save(directory, 1), save(directory, step)
    storage.remove(first)
    assert storage.find(directory) == [second]
    assert not tf.io.gfile.exists(first)
    assert storage.check(second).step == step
    storage.remove(first)  # nothing is there, which is what was wanted
    assert storage.find(directory) == [second]


def test_remove_works_in_any_file_system(directory):
    first, second = save(directory, 1), save(directory, 2)
    storage.remove(first)
    assert storage.find(directory) == [second]
    assert storage.check(second).step == 2


def test_what_is_set_aside_is_no_checkpoint_and_keeps_its_files(tmp_path):
    directory = str(tmp_path)
    other = save(directory, 6)
    aside = [storage.set_aside(save(directory, 7)) for _ in range(3)]
    assert aside == [
        f"{directory}/ckpt-7.damaged",
        f"{directory}/ckpt-7.damaged.1",
        f"{directory}/ckpt-7.damaged.2",
    ]
    assert storage.find(directory) == [other]
    assert storage.find_damaged(directory) == aside
    for path in aside:
        assert tuple(sorted(os.listdir(path))) == FILES
    assert storage.new_path(directory, 7) == f"{directory}/ckpt-7"


# ---------------------------------------------------------------------- locks

HOLDER = """
import sys
from dist_amp import storage
with storage.lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(SECONDS, process.kill)
    watchdog.start()
    with process:
        try:
            assert process.stdout.readline() == "locked\n"
            yield process
        finally:
            watchdog.cancel()
            process.kill()


def test_another_process_is_refused_until_the_holder_is_killed(
    tmp_path, holder
):
    for _ in range(2):  # being refused does not spoil the lock
        with (
            pytest.raises(storage.LockedError, match=f"process {holder.pid} "),
            storage.lock(str(tmp_path)),
        ):
            pass
    holder.kill()
    holder.wait(SECONDS)
    with storage.lock(str(tmp_path)):
        assert f"process {os.getpid()} " in (tmp_path / "lock").read_text()
        assert f"process {holder.pid} " not in (tmp_path / "lock").read_text()


def test_one_process_holds_a_lock_once_at_a_time(tmp_path):
    new = tmp_path / "a" / "b"
    with storage.lock(str(new)):
        with (
            pytest.raises(storage.LockedError, match=f"process {os.getpid()} "),
            storage.lock(str(new)),
        ):
            pass
        with storage.lock(str(tmp_path)):
            pass  # another folder
    with storage.lock(str(new)):
        pass


def test_a_lock_is_lifted_when_what_it_guards_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), storage.lock(str(tmp_path)):
        raise KeyboardInterrupt
    with storage.lock(str(tmp_path)):
        pass


def test_a_folder_in_memory_has_no_lock_and_is_made(tmp_path):
    directory = f"ram:/{tmp_path}/new"
    with storage.lock(directory), storage.lock(directory):
        assert tf.io.gfile.isdir(directory)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
