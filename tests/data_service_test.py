"""A data service gives what training without one reads, or an error."""

import functools
import gc
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import keras
import numpy as np
import pytest
import tensorflow as tf

import dist_amp
from dist_amp import data
from dist_amp.data_service import (
    DataService,
    DataServiceError,
    DataServiceLostError,
)
from launch import build, evaluate, job, service_process, train
from launch import data_service as program
from launch.config import ConfigError, TrainConfig
from launch.data_service import DataServiceConfig
from launch.guardian import Guardian
from launch.local import LocalJob, make_plan
from launch.run_dir import RunDir
from launch.worker_process import free_ports
from tests import support
from tests.multi_worker.processes import children_of

SECONDS = 20.0
NUM_EXAMPLES = 3 * support.GLOBAL_BATCH + 3  # the last batch is smaller


def start(num_workers):
    return program.start(DataServiceConfig(port=0, num_workers=num_workers))


# For all tests that break none.
servers_of = functools.cache(start)
# Servers with clients that wait for more of them take long to end.
incomplete = []


@pytest.fixture(autouse=True)
def _no_client_outlives_its_service():
    yield
    gc.collect()


def address_of(servers):
    return f"grpc://127.0.0.1:{servers[0].target.rpartition(':')[2]}"


def service_at(servers, startup_timeout=SECONDS, timeout=SECONDS):
    return DataService(
        address_of(servers), startup_timeout=startup_timeout, timeout=timeout
    )


def shuffled_passes(number):
    """Features, labels and numbers of the examples, other each pass."""
    x, y = support.make_arrays(NUM_EXAMPLES)
    index = np.arange(NUM_EXAMPLES)
    examples = tf.data.Dataset.from_tensor_slices((x, y, index))
    return data.shuffled(examples, data.seed_of_pass(3, number), 9).batch(
        support.GLOBAL_BATCH
    )


def changed(x, y, index):
    """What is random depends on the example alone."""
    seed, last = tf.constant([3, 5], tf.int64), tf.constant(99, tf.int64)
    drawn = tf.random.experimental.index_shuffle(index, seed, last)
    return x + tf.cast(drawn, tf.float32)[:, tf.newaxis] / 99, y


def passes(split, global_batch_size=support.GLOBAL_BATCH):
    """For `--dataset`."""
    assert global_batch_size == support.GLOBAL_BATCH
    if split == "train":
        return dist_amp.LoadedBatches(shuffled_passes, changed)
    x, y = support.make_arrays(NUM_EXAMPLES)
    return support.batched((x, y, np.arange(NUM_EXAMPLES))).map(changed)


def taken(trainer, dataset, number=11):
    """What a loop is fed, from within the second pass on."""
    stream = trainer._make_stream(dataset, None, None)
    stream.open(1, 2)
    return [next(stream.iterator) for _ in range(number)]


# --------------------------------------------------------------- same batches


@pytest.mark.parametrize("num_workers", [1, 3])
def test_every_batch_comes_once_and_in_its_turn(num_workers):
    trainer = support.make_trainer(num_replicas=2)
    dataset = passes("train")
    trainer.build(dataset)
    expected = taken(trainer, dataset)
    trainer.data_service = service_at(servers_of(num_workers))
    found = taken(trainer, dataset)
    for one, other in zip(found, expected, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def fit(service, epochs=2, seed=0, **options):
    trainer = support.make_trainer(
        seed=seed, metrics=["accuracy"], data_service=service
    )
    history = trainer.fit(
        passes("train"),
        epochs=epochs,
        steps_per_loop=1,
        validation_data=passes("test").map(lambda x, y: (x, y, None)),
        verbose=0,
        **options,
    )
    return trainer, history.history


def test_losses_and_weights_are_those_of_a_run_without_one(tmp_path):
    """Which is interrupted within an epoch, and goes on."""
    straight, expected = fit(None)
    service = service_at(servers_of(1))

    def stop(batch, logs):
        if trainer.global_step == 6:
            trainer.request_stop("the test asks for it")

    trainer = support.make_trainer(metrics=["accuracy"], data_service=service)
    trainer.fit(
        passes("train"),
        epochs=2,
        steps_per_loop=1,
        callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=stop)],
        checkpoint_dir=tmp_path,
        verbose=0,
    )
    assert trainer.data_position == (1, 2)
    resumed, found = fit(service, seed=7, checkpoint_dir=tmp_path)
    assert found["loss"] == expected["loss"]
    for name in ("val_loss", "val_accuracy"):
        assert found[name][-1] == expected[name][-1]
    for one, other in zip(
        support.read(resumed.model.variables),
        support.read(straight.model.variables),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)
    np.testing.assert_array_equal(
        resumed.predict(passes("test")), straight.predict(passes("test"))
    )


def test_programs_take_batches_of_it(tmp_path, capfd):
    """The training that `launch.local` starts has a service of its own."""
    settings = {"epochs": 1, "global_batch_size": 8, "precision": "float32"}
    settings["dataset"] = f"{__name__}:passes"
    flags = [f"--{name}={value}" for name, value in settings.items()]
    flags.append(f"--run_dir={tmp_path / 'with'}")
    own = ["--num_workers=1", "--data_service_workers=2", "--max_restarts=0"]
    done = subprocess.run(
        [sys.executable, "-m", "launch.local", *own, "--", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    config = TrainConfig(run_dir=str(tmp_path / "without"), **settings)
    assert train.train(config, RunDir(config.directory)) == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    assert used_service(tmp_path / "with").startswith("grpc://127.0.0.1:")
    told = []
    for place in (None, address_of(servers_of(1))):
        capfd.readouterr()
        config = evaluate.EvaluateConfig(
            run_dir=str(tmp_path / "with"), data_service=place
        )
        assert evaluate.evaluate(config) == 0
        told.append(capfd.readouterr().out)
    assert told[0] == told[1]
    assert "accuracy" in told[0]


def test_a_service_that_dies_is_named_and_all_workers_go_on(tmp_path):
    flags = [f"--dataset={__name__}:passes", "--global_batch_size=8"]
    flags += ["--precision=float32", "--epochs=100000", f"--run_dir={tmp_path}"]
    own = ["--min_workers=1", "--data_service_workers=1", "--leave_timeout=1"]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "launch.local", *own, "--", *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watch = threading.Timer(120, launcher.kill)
    watch.start()
    try:
        lines = until(launcher, "Epoch")
        os.kill(service_of(launcher), signal.SIGKILL)
        lines += until(launcher, "starts again") + until(launcher, "Epoch")
        launcher.send_signal(signal.SIGINT)
        lines += launcher.stdout.readlines()
    finally:
        watch.cancel()
        launcher.kill()
    said = "".join(lines)
    assert launcher.wait() == 130, said
    assert re.search("the data service .* ended .* killed by SIGKILL", said)
    log = tmp_path / "logs" / "data-service.log"
    assert f"all that the data service said: {log}" in said
    assert "on 2 workers (1 of 3)" in said
    assert not re.search(r"worker \d+ (failed first|held up)", said)


def until(launcher, begin):
    """The lines up to one that begins so."""
    lines = []
    for line in launcher.stdout:
        lines.append(line)
        if line.startswith(begin):
            return lines
    raise AssertionError("".join(lines))


def service_of(launcher):
    (found,) = [
        pid
        for pid in children_of(launcher.pid)
        if b"launch.data_service"
        in pathlib.Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return found


def test_a_service_that_ends_at_its_start_is_told_at_once(tmp_path):
    log = tmp_path / "log"
    log.write_text("of another start\n")
    text = r"ended at its start \(exit status 2 .*--num_workers must be pos"
    with (
        pytest.raises(ConfigError, match=text),
        service_process.running(0, log, Guardian()),
    ):
        pass


def losses(run_dir):
    lines = RunDir(run_dir).metrics.read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def used_service(run_dir):
    content = json.loads(RunDir(run_dir).config.read_text())
    return content["settings"]["data_service"]


# --------------------------------------------------------------------- errors


def evaluated(dataset, service=None):
    """Of a model of batches of one shape, whatever the data are."""
    trainer = support.make_trainer(data_service=service)
    trainer.build(support.make_dataset())
    return trainer.evaluate(dataset)


def test_a_service_that_is_not_there_is_told_in_time():
    (port,) = free_ports(1)
    service = DataService(f"grpc://127.0.0.1:{port}", startup_timeout=0.2)
    with pytest.raises(DataServiceError, match=r"no data service answers at g"):
        evaluated(passes("test"), service)
    with pytest.raises(DataServiceError, match="must be grpc://host:port"):
        DataService("localhost:5050")


as_text = tf.io.serialize_tensor


def with_batches_of(change):
    return passes("test").map(
        lambda x, y: (tf.ensure_shape(change(x), x.shape), y)
    )


@pytest.mark.parametrize(
    ("make_dataset", "text"),
    [
        (
            lambda: with_batches_of(
                lambda x: tf.numpy_function(np.negative, [x], tf.float32)
            ),
            r"Python code \(PyFunc\) cannot travel",
        ),
        (
            lambda: with_batches_of(lambda x: x * tf.random.uniform([])),
            r"random numbers without a seed .*\(RandomUniform\)",
        ),
        (
            lambda: with_batches_of(
                lambda x: (
                    x
                    + tf.cast(tf.timestamp(), tf.float32) * 0
                    + tf.cast(tf.timestamp() % 1, tf.float32)
                )
            ),
            "do not see the same batches, from batch 1 on",
        ),
        (
            lambda: with_batches_of(lambda x: tf.reshape(x, [-1, 7, 6])[:, 0]),
            "cannot load the data: Failed to get element",
        ),
        (
            lambda: passes("test").map(
                lambda x, y: (x, tf.io.parse_tensor(as_text(y), y.dtype))
            ),
            "takes tensors of a known rank",
        ),
    ],
    ids=["python", "random", "differ", "broken", "no rank"],
)
def test_data_that_would_be_other_data_is_an_error(make_dataset, text):
    with pytest.raises((DataServiceError, DataServiceLostError), match=text):
        evaluated(make_dataset(), service_at(servers_of(3)))


def test_ragged_and_sparse_leaves_are_refused():
    service = DataService("grpc://127.0.0.1:1")
    x, _ = support.make_arrays(9)
    plain = tf.data.Dataset.from_tensor_slices(x).batch(4)
    ragged = plain.map(lambda x: tf.RaggedTensor.from_tensor(x))
    sparse = plain.map(lambda x: (x, tf.sparse.from_dense(x)))
    for batches, cut in [
        (ragged, lambda batches: batches.map(lambda x: x.to_tensor())),
        (plain, lambda batches: batches.map(tf.RaggedTensor.from_tensor)),
        (sparse, lambda batches: batches.map(lambda x, s: x)),
    ]:
        with pytest.raises(DataServiceError, match="ragged and sparse tens"):
            service.open(batches, cut)


def test_what_is_loaded_of_arrays_in_memory_comes_from_a_service():
    x, y = support.make_arrays(NUM_EXAMPLES)
    numbers = np.arange(NUM_EXAMPLES)
    dataset = dist_amp.LoadedBatches(
        data.from_arrays(numbers, support.GLOBAL_BATCH, shuffle_seed=3),
        lambda index: (tf.gather(x, index), tf.gather(y, index)),
    )
    trainer = support.make_trainer(num_replicas=2)
    trainer.build(dataset)
    expected = taken(trainer, dataset)
    trainer.data_service = service_at(servers_of(1))
    found = taken(trainer, dataset)
    for one, other in zip(found, expected, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, one, other)


def test_data_in_memory_need_no_service():
    trainer = support.make_trainer(data_service=DataService("grpc://a:1"))
    with pytest.raises(DataServiceError, match="nothing to load: all example"):
        trainer.fit(data.from_arrays(support.make_arrays(9), 4))


def test_a_dispatcher_must_know_its_workers():
    dispatcher = program._dispatcher(0, [])
    here = f"127.0.0.1:{dispatcher.target.rpartition(':')[2]}"
    worker = program._worker(here, f"127.0.0.1:{free_ports(1)[0]}")
    with pytest.raises(DataServiceError, match="was not told the addresses"):
        evaluated(passes("test"), service_at([dispatcher]))
    del worker


def test_training_waits_for_all_workers_of_the_service():
    addresses = [f"127.0.0.1:{port}" for port in free_ports(2)]
    dispatcher = program._dispatcher(0, addresses)
    here = f"127.0.0.1:{dispatcher.target.rpartition(':')[2]}"
    servers = [dispatcher]
    incomplete.append(servers)
    with pytest.raises(DataServiceError, match=r"gave no batch within 0.1 s"):
        evaluated(passes("test"), service_at(servers, startup_timeout=0.1))
    servers.append(program._worker(here, addresses[1]))
    with pytest.raises(DataServiceError, match=r"not all 2 workers .* have"):
        evaluated(passes("test"), service_at(servers, startup_timeout=2.0))

    class Late(DataService):
        def _take_first(self, reader, deadline):
            found = super()._take_first(reader, deadline)
            if found is None and len(servers) == 2:
                servers.append(program._worker(here, addresses[0]))
            return found

    found = evaluated(passes("test"), Late(address_of(servers)))
    assert len(servers) == 3
    assert found == evaluated(passes("test"))


def test_a_service_that_was_there_is_not_waited_for_as_at_the_start():
    service = service_at(servers := start(1), startup_timeout=300, timeout=1.0)
    dataset = passes("test")
    assert evaluated(dataset, service) == evaluated(dataset)
    servers.clear()
    gc.collect()
    with pytest.raises(DataServiceLostError, match=r"not answer any more"):
        evaluated(dataset, service)


def test_a_worker_that_is_lost_ends_training():
    """Servers end when nothing refers to them."""
    servers = start(3)
    trainer = support.make_trainer(
        num_replicas=2, data_service=service_at(servers, timeout=2.0)
    )

    def lose(batch, logs):
        if batch == 1:
            del servers[-1:]

    text = r"lost: batch \d+ .* did not come in its turn|no batch for 2 s"
    with pytest.raises(DataServiceLostError, match=text):
        trainer.fit(
            passes("train"),
            epochs=10_000,
            steps_per_loop=1,
            callbacks=[keras.callbacks.LambdaCallback(on_train_batch_end=lose)],
            verbose=0,
        )


# ------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"role": "other"}, "--role must be one of all, dispatcher, worker"),
        ({"role": "worker", "address": "a:1"}, "--role=worker needs --disp"),
        ({"role": "dispatcher"}, "--role=dispatcher needs --workers"),
        ({"workers": ("a:1",)}, "--workers is for --role=dispatcher"),
        ({"num_workers": 0}, "--num_workers must be positive"),
        (
            {"role": "dispatcher", "workers": ("a",)},
            "must be host:port .* Received a",
        ),
        (
            {"role": "dispatcher", "workers": ("5051",)},
            "must be host:port .* Received 5051",
        ),
        (
            {"role": "dispatcher", "workers": (":5051",)},
            "must be host:port .* Received :5051",
        ),
        (
            {"role": "dispatcher", "workers": ("a:1", "b:99999")},
            "must be host:port .* Received b:99999",
        ),
        (
            {"role": "dispatcher", "workers": ("a:1", "b:1", "a:1")},
            "--workers names a:1 more than once",
        ),
        ({"port": 99999}, "--port must be from 0 .* Received 99999"),
        ({"port": -1}, "--port must be from 0 .* Received -1"),
        (
            {"role": "worker", "address": "a:1", "dispatcher": "b:1"}
            | {"port": 3},
            "--port contradicts --role=worker",
        ),
    ],
)
def test_settings_of_the_service_are_checked(settings, text):
    with pytest.raises(ConfigError, match=text):
        DataServiceConfig(**settings)


def test_settings_of_training_are_checked():
    with pytest.raises(ConfigError, match="must be grpc://host:port"):
        TrainConfig(data_service="somewhere:1")
    with pytest.raises(ConfigError, match="--data_service contradicts a TPU"):
        TrainConfig(data_service="grpc://a:1", tpu="local")
    files = {"dataset": "/data/{split}-*.array_record", "parse": "json:loads"}
    with pytest.raises(ConfigError, match=r"reads at random .* ArrayRecord"):
        TrainConfig(data_service="grpc://a:1", **files)
    with pytest.raises(ConfigError, match=r"reads at random .* ArrayRecord"):
        make_plan(
            LocalJob(data_service_workers=2),
            job.read_training([f"--{k}={v}" for k, v in files.items()]),
        )
    config = TrainConfig(data_service="grpc://a:1", collective_timeout=20)
    assert build._data_service(config)._timeout == 10.0  # the watchdog's is 20
    training = job.read_training(["--data_service=grpc://a:1"])
    with pytest.raises(ConfigError, match="_workers contradicts --data_ser"):
        make_plan(LocalJob(data_service_workers=2), training)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
