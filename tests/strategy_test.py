"""Which strategy is built, and what is refused."""

import sys

import pytest
import tensorflow as tf

import dist_amp
from dist_amp import cluster, strategy


def test_auto_is_one_device_without_gpus_or_cluster(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    made = dist_amp.make_strategy()
    assert isinstance(made, tf.distribute.OneDeviceStrategy)


def test_auto_mirrors_two_devices():
    made = dist_amp.make_strategy(devices=["cpu:0", "/device:CPU:1"])
    assert isinstance(made, tf.distribute.MirroredStrategy)
    assert made.num_replicas_in_sync == 2


def test_mirrored_takes_every_logical_cpu_where_there_is_no_gpu():
    made = dist_amp.make_strategy("mirrored")
    assert made.num_replicas_in_sync == 4


@pytest.mark.parametrize(
    ("devices", "options", "kind"),
    [
        (["GPU:0"], {}, "one_device"),
        (["GPU:0", "GPU:1"], {}, "mirrored"),
        (["CPU:0"], {"tpu": "local"}, "tpu"),
        (
            ["GPU:0", "GPU:1"],
            {"cluster": cluster.ClusterSpec(("a:1", "b:1"), 0, "TF_CONFIG")},
            "multi_worker",
        ),
    ],
)
def test_what_auto_chooses(devices, options, kind):
    chosen, reason = strategy.choose("auto", devices=devices, **options)
    assert chosen == kind
    assert reason


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "horovod"}, "`kind` must be one of"),
        ({"all_reduce": "mpi"}, "`all_reduce` must be one of"),
        ({"devices": ["GPU:0"]}, "devices of this host.*--devices"),
        ({"devices": ["CPU:0", "CPU:0"]}, "must differ"),
        ({"devices": []}, "devices of this host"),
        (
            {"kind": "one_device", "devices": ["CPU:0", "CPU:1"]},
            "kind='mirrored'",
        ),
        ({"kind": "mirrored", "tpu": "x"}, "`tpu` needs"),
        ({"kind": "tpu", "devices": ["CPU:0"]}, "cannot be chosen on a TPU"),
        ({"all_reduce": "nccl", "devices": ["CPU:0", "CPU:1"]}, "needs GPUs"),
        ({"all_reduce": "ring", "devices": ["CPU:0", "CPU:1"]}, "one host"),
        ({"kind": "one_device", "all_reduce": "ring"}, "would be ignored"),
        ({"kind": "multi_worker"}, "needs the list of workers.*--workers"),
        (
            {
                "kind": "mirrored",
                "cluster": cluster.ClusterSpec(("a:1", "b:1"), 0, "a test"),
            },
            "`cluster` needs",
        ),
    ],
)
def test_a_wrong_argument_is_an_error_that_says_how_to_mend_it(
    arguments, message, monkeypatch
):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    with pytest.raises(ValueError, match=message):
        dist_amp.make_strategy(**arguments)


@pytest.mark.parametrize("all_reduce", ["one_device", "hierarchical_copy"])
def test_every_all_reduce_for_cpus_sums(all_reduce):
    made = dist_amp.make_strategy(
        "mirrored", devices=["CPU:0", "CPU:1"], all_reduce=all_reduce
    )

    @tf.function
    def total():
        def replica():
            context = tf.distribute.get_replica_context()
            return context.all_reduce("sum", tf.constant(2.0))

        return made.experimental_local_results(made.run(replica))

    assert [float(value) for value in total()] == [4.0, 4.0]


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
