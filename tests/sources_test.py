"""Data as they lie on disk: every example once, in one order for all."""

import sys

import numpy as np
import pytest
import tensorflow as tf
import tensorflow_datasets as tfds

from dist_amp import data, records, sources, stream
from dist_amp.feed import Feed
from dist_amp.loading import LoadedBatches
from dist_amp.stream import Stream
from launch import inputs
from launch.config import ConfigError, TrainConfig
from tests import support

NUM_TRAIN, NUM_TEST = 23, 7
SIDE = 4
FORMATS = ("tfrecord", "array_record")


def image_of(number):
    return np.full([SIDE, SIDE, 3], number, np.uint8)


class Shapes(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Prepared by code that TFDS does not know of."""

    VERSION = tfds.core.Version("1.2.0")
    BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="grey"),)
    name = "shapes"

    def _info(self):
        features = tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 3)),
                "label": tfds.features.ClassLabel(num_classes=NUM_TRAIN),
                "comment": tfds.features.Text(),
            }
        )
        keys = ("image", "label")
        return tfds.core.DatasetInfo(
            builder=self, features=features, supervised_keys=keys
        )

    def _split_generators(self, dl_manager):
        return {
            "train": self._generate_examples(NUM_TRAIN),
            "test": self._generate_examples(NUM_TEST),
        }

    def _generate_examples(self, number):
        for i in range(number):
            yield i, {"image": image_of(i), "label": i, "comment": "none"}


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A data_dir for each format."""
    folders = {}
    tfds.disable_progress_bar()
    for file_format in FORMATS:
        folders[file_format] = str(tmp_path_factory.mktemp(file_format))
        builder = Shapes(
            data_dir=folders[file_format],
            file_format=file_format,
            config="grey",
        )
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(num_shards=3)
        )
    return folders


@pytest.fixture
def on_disk(monkeypatch):
    """As if it did not fit in memory."""
    monkeypatch.setattr(data, "MAX_BYTES_IN_MEMORY", 0)


def record_of(number):
    """A whole number of four bytes, most of them 0, and so at its end."""
    return np.int32(number).tobytes()


def parse(record):
    number = tf.io.decode_raw(record, tf.int32)[0]
    return tf.cast(number, tf.float32)[None], number


def write_tfrecords(path, numbers):
    with tf.io.TFRecordWriter(str(path)) as writer:
        for number in numbers:
            writer.write(record_of(number))


def write_array_records(path, numbers):
    from array_record.python import array_record_module

    writer = array_record_module.ArrayRecordWriter(str(path), "group_size:1")
    for number in numbers:
        writer.write(record_of(number))
    writer.close()


WRITERS = {"tfrecord": write_tfrecords, "array_record": write_array_records}


@pytest.fixture(params=FORMATS)
def files(request, tmp_path):
    """Fewer files than workers, the number of one per split in their names."""
    write = WRITERS[request.param]
    write(tmp_path / f"train-0.{request.param}", range(9))
    write(tmp_path / f"train-1.{request.param}", range(9, NUM_TRAIN))
    write(tmp_path / f"test-0.{request.param}", range(NUM_TEST))
    return str(tmp_path / f"{{split}}-*.{request.param}")


def test_a_first_pass_is_that_of_training_whatever_the_global_seed(files):
    dataset = sources.read_records(
        files.format(split="train"), parse, global_batch_size=4, shuffle_seed=3
    )

    def order(batches):
        return [int(y) for _, ys in batches for y in ys]

    in_a_graph = tf.data.Dataset.range(1).flat_map(dataset)
    expected = order(in_a_graph)
    assert expected != sorted(expected)
    for seed in (5, 6):
        tf.random.set_seed(seed)
        first = stream.one_pass(dataset)
        assert order(first) == expected
        assert order(first) == expected  # again, as in a second evaluation


def test_a_file_of_both_splits_is_told(tmp_path):
    write_tfrecords(tmp_path / "latest_train.tfrecord", range(3))
    config = TrainConfig(
        dataset=f"{tmp_path}/*{{split}}*.tfrecord",
        parse="tests.sources_test:parse",
    )
    with pytest.raises(ConfigError, match=r"latest_train.* for train and"):
        inputs.load_data(config)


def pass_of(dataset, number):
    return dataset(tf.constant(number, tf.int64))


def labels_of(dataset, num_replicas, number=0):
    """By batch: what all replicas are fed, each a worker of its own."""
    workers = [
        data.split(
            dataset.batches(tf.constant(number, tf.int64)),
            num_replicas=num_replicas,
            first_replica=replica,
            num_local_replicas=1,
            load=dataset.load,
        )
        for replica in range(num_replicas)
    ]
    return [
        [int(y) for (part,) in parts for y in part.y]
        for parts in zip(*workers, strict=True)
    ]


def assert_exact(dataset):
    """Every example once a pass, in an order that no split changes."""
    alone = labels_of(dataset, 1)
    together = [label for batch in alone for label in batch]
    assert sorted(together) == list(range(NUM_TRAIN)) != together
    for num_replicas in (2, 4):  # the last batch has 3 examples
        assert labels_of(dataset, num_replicas) == alone
    assert labels_of(dataset, 2, number=1) != alone
    whole = [y.numpy().tolist() for _, y in pass_of(dataset, 0)]
    assert whole == alone


@pytest.mark.parametrize("file_format", FORMATS)
def test_prepared_elsewhere_it_is_read_without_its_code(
    prepared, on_disk, file_format
):
    """By its name and by its folder."""
    folder = prepared[file_format]
    by_name = sources.prepare_tfds("shapes/grey", folder)
    by_folder = sources.prepare_tfds(f"{folder}/shapes/grey/1.2.0")
    for builder in (by_name, by_folder):
        assert sources.num_classes_of(builder) == NUM_TRAIN
        train = sources.read_tfds(
            builder, "train", global_batch_size=10, shuffle_seed=3
        )
    assert isinstance(train, LoadedBatches)
    assert stream.length_of(train) == 3
    assert_exact(train)
    for x, y in pass_of(train, 0):
        assert x.shape == (len(y), SIDE, SIDE, 3)
        np.testing.assert_array_equal(
            x.numpy()[:, 0, 0, 0], y.numpy().astype("float32") / 255
        )


@pytest.mark.parametrize("file_format", FORMATS)
def test_a_worker_decodes_its_own_rows_only(
    prepared, on_disk, monkeypatch, file_format
):
    """Of ArrayRecord files it reads no others, either."""
    seen = []
    monkeypatch.setattr(
        tfds.features.Image, "decode_example", seen_by(seen, tf.io.decode_png)
    )
    read = []
    real = records.ArrayRecords.read
    monkeypatch.setattr(
        records.ArrayRecords,
        "read",
        lambda self, places: read.extend(places) or real(self, places),
    )
    builder = sources.prepare_tfds("shapes/grey", prepared[file_format])
    train = sources.read_tfds(
        builder, "train", global_batch_size=10, shuffle_seed=3
    )
    seen.clear()
    read.clear()
    ((one,), *_) = data.split(
        train.batches(tf.constant(0, tf.int64)).take(1),
        num_replicas=5,
        num_local_replicas=1,
        load=train.load,
    )
    assert len(one.y) == 2
    assert sorted(seen) == sorted(one.y.numpy())
    assert len(read) == (2 if file_format == "array_record" else 0)


def seen_by(seen, decode):
    """Decodes, and notes the value of what was decoded."""

    def note(image):
        seen.append(int(image[0, 0, 0]))
        return image

    def decode_example(self, value):
        image = tf.numpy_function(note, [decode(value)], tf.uint8)
        return tf.ensure_shape(image, [SIDE, SIDE, 3])

    return decode_example


@pytest.mark.parametrize("file_format", FORMATS)
def test_what_fits_is_in_memory(prepared, file_format):
    builder = sources.prepare_tfds("shapes/grey", prepared[file_format])
    test = sources.read_tfds(builder, "test", global_batch_size=NUM_TEST)
    ((x, y),) = test
    assert x.dtype == tf.float32
    assert sorted(y.numpy()) == list(range(NUM_TEST))


def test_fewer_files_than_workers(files):
    train = sources.read_records(
        files.replace("{split}", "train"),
        parse,
        global_batch_size=10,
        shuffle_seed=3,
    )
    assert stream.length_of(train) == 3
    assert_exact(train)


def test_going_on_in_the_middle_of_a_pass(files):
    train = sources.read_records(
        files.replace("{split}", "train"),
        parse,
        global_batch_size=4,
        shuffle_seed=3,
    )
    passes = tf.data.Dataset.range(2).flat_map(train)
    straight = [y.numpy().tolist() for _, y in passes]
    skipped = tf.data.Dataset.range(1, 2).flat_map(train.batches).skip(3)
    later = data.split(skipped, load=train.load)
    assert [one.y.numpy().tolist() for (one,) in later] == straight[6 + 3 :]


def test_files_that_cannot_be_read_are_named(tmp_path):
    def read(name):
        sources.read_records(str(tmp_path / name), parse, global_batch_size=4)

    (tmp_path / "cut.tfrecord").write_bytes(record_of(7) * 5)
    (tmp_path / "cut.array_record").write_bytes(b"no")
    write_tfrecords(tmp_path / "empty.tfrecord", [])
    with pytest.raises(ValueError, match=r"no file .*none-\*"):
        read("none-*")
    with pytest.raises(ValueError, match=r"cut\.tfrecord is no TFRecord"):
        read("cut.tfrecord")
    with pytest.raises(ValueError, match=r"cut\.array_record cannot be read"):
        read("cut.array_record")
    with pytest.raises(ValueError, match="either TFRecord or ArrayRecord"):
        read("cut.*")
    with pytest.raises(ValueError, match="hold no record"):
        read("empty.tfrecord")


def test_remote_records_are_not_counted(tmp_path):
    """What has a scheme is; all but the length is the same."""
    for kind, write in WRITERS.items():
        write(tmp_path / f"all.{kind}", range(NUM_TRAIN))
    remote = sources.read_records(
        f"file://{tmp_path}/all.tfrecord",
        parse,
        global_batch_size=10,
        shuffle_seed=3,
    )
    assert stream.length_of(remote) is None
    assert_exact(remote)
    feed = Feed(support.make_strategy(2), range(2), remote, reduction="sum")
    batches = Stream(feed.batches, feed)
    batches.open()
    seen = []
    for _ in range(2):  # passes
        for _ in range(3):
            ((one, other),) = batches.peek(1)
            seen += [*one.y.numpy().tolist(), *other.y.numpy().tolist()]
            batches.advance(1)
        batches.end_epoch()  # the first one tells the length
    assert batches.batches_per_epoch == 3
    assert seen[:NUM_TRAIN] != seen[NUM_TRAIN:]
    assert sorted(seen[:NUM_TRAIN]) == sorted(seen[NUM_TRAIN:])
    with pytest.raises(ValueError, match="knows local files only"):
        sources.read_records(
            f"file://{tmp_path}/all.array_record", parse, global_batch_size=4
        )


# ------------------------------------------------------------------ the flags


def config_of(**settings):
    return TrainConfig(global_batch_size=4, **settings)


def labels(dataset):
    batches = stream.one_pass(dataset)
    return sorted(y for _, batch in batches for y in batch.numpy().tolist())


def test_flags_for_files_of_records(files):
    config = config_of(dataset=files, parse=f"{__name__}:parse")
    found = inputs.load_data(config)
    assert labels(found.train) == list(range(NUM_TRAIN))
    assert labels(found.test) == list(range(NUM_TEST))
    test = inputs.load_split(config, "test").test
    assert [y.numpy().tolist() for _, y in stream.one_pass(test)] == [
        [0, 1, 2, 3],
        [4, 5, 6],
    ]
    folder, _, name = files.rpartition("/")
    train_only = config_of(
        dataset=name.replace("{split}", "train"),
        data_dir=folder,
        parse=f"{__name__}:parse",
    )
    assert inputs.load_data(train_only).test is None
    with pytest.raises(ConfigError, match="pass --split=train"):
        inputs.load_split(train_only, "test")


def test_a_missing_test_split_is_none(tmp_path, caplog):
    write_tfrecords(tmp_path / "train.tfrecord", range(5))
    config = config_of(
        dataset=f"{tmp_path}/{{split}}.tfrecord", parse=f"{__name__}:parse"
    )
    assert inputs.load_data(config).test is None
    assert "no test split" in caplog.text


@pytest.mark.parametrize("file_format", FORMATS)
def test_flags_for_splits(prepared, file_format):
    config = config_of(
        dataset=f"{prepared[file_format]}/shapes/grey/1.2.0",
        train_split="train[:8]",
        test_split="train[8:]",
    )
    found = inputs.load_data(config)
    train, test = labels(found.train), labels(found.test)
    assert (len(train), len(test)) == (8, NUM_TRAIN - 8)
    assert sorted(train + test) == list(range(NUM_TRAIN))
    assert labels(inputs.load_split(config, "test").test) == test
    assert labels(inputs.load_split(config, "train").train) == train
    assert len(labels(inputs.load_split(config, "test[:3]").test)) == 3


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"train_split": "trian"}, r"--train_split=trian: .* has train, test"),
        ({"test_split": "train[:0]"}, "--test_split.* is empty"),
        ({"dataset": "/nowhere"}, "holds no dataset_info.json"),
        ({"dataset": "nowhere"}, "no dataset of TFDS, nor prepared in"),
    ],
)
def test_what_tfds_has_not_is_an_error(prepared, settings, error):
    given = {"dataset": "shapes/grey", "data_dir": prepared["tfrecord"]}
    if settings.get("dataset", "").startswith("/"):
        del given["data_dir"]
    config = config_of(**given | settings)
    with pytest.raises(ConfigError, match=error):
        inputs.load_data(config)


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"dataset": "a-*.tfrecord"}, "--parse must be given"),
        ({"dataset": "mnist", "parse": "json:loads"}, "--parse contradicts"),
        ({"dataset": "json:loads", "parse": "json:loads"}, "--parse contra"),
        ({"dataset": "a-*", "parse": "loads"}, "must be module:function"),
        ({"dataset": "a-*", "parse": "nowhere:f"}, "no module 'nowhere'"),
        ({"dataset": "json:loads", "train_split": "a"}, "--train_split contra"),
        (
            {"dataset": "a-*", "parse": "json:loads", "test_split": "a"},
            "--test_split contradicts",
        ),
        ({"dataset": "/a/1.0.0", "data_dir": "/b"}, "--data_dir contradicts"),
    ],
)
def test_settings_that_would_be_ignored_are_errors(settings, error):
    with pytest.raises(ConfigError, match=error):
        TrainConfig(**settings)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
