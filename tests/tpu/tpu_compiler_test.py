"""The real compiler of TPUs on the trainer's own step; no TPU is needed."""

import sys

import keras
import numpy as np
import pytest

from dist_amp import ahead_of_time, plan
from tests import support

pytestmark = pytest.mark.skipif(
    not ahead_of_time.has_compiler(),
    reason=f"the TPU's compiler is not installed: {ahead_of_time.EXTRA}",
)


@pytest.fixture(scope="module")
def trainer():
    def make_model():
        layers = keras.layers
        return keras.Sequential(
            [
                keras.Input((32, 32, 3)),
                layers.Conv2D(64, 3, activation="relu"),
                layers.BatchNormalization(synchronized=True),
                layers.GlobalAveragePooling2D(),
                layers.Dropout(0.1),
                layers.Dense(support.NUM_CLASSES, dtype="float32"),
            ]
        )

    strategy = ahead_of_time.make_strategy(2)
    return support.make_trainer(
        make_model, strategy=strategy, precision="auto", metrics=["accuracy"]
    )


@pytest.fixture(scope="module")
def dataset():
    x = np.zeros((24, 32, 32, 3), "float32")
    return support.batched((x, np.zeros(24, "int32")))


@pytest.fixture(scope="module")
def planned(trainer, dataset):
    return plan.make_for_tpu(
        trainer, dataset, topology="v5e:2x2", per_replica_batch_size=64
    )


def test_the_step_compiles_for_all_cores(planned):
    assert planned.fits
    assert planned.compiled.device == "TPU v5 lite"
    assert 0 < planned.hbm_used_bytes < planned.hbm_bytes
    assert planned.compile_secs > 0
    assert planned.compiled.flops > 0


def test_every_core_takes_part_in_every_all_reduce(planned):
    kinds = list(planned.compiled.collectives)
    assert kinds == ["all-reduce among {{0,1,2,3}}"]


def test_its_hbm_is_that_of_the_chip():
    assert 15 * 2**30 < ahead_of_time.hbm_bytes("v5e:2x2") < 16 * 2**30
    assert 31 * 2**30 < ahead_of_time.hbm_bytes("v6e:2x4") < 32 * 2**30


@pytest.mark.parametrize(
    ("topology", "cores"),
    [("v5e:1x1x1", 1), ("v5e:2x2", 4), ("v5e:16x16", 256)],
)
def test_cores_of_a_topology(topology, cores):
    assert ahead_of_time.num_cores(topology) == cores


@pytest.mark.parametrize("topology", ["v5e", "v5e:3x9", "H100"])
def test_an_unknown_topology_is_told(topology):
    with pytest.raises(ValueError, match="--topology"):
        ahead_of_time.num_cores(topology)


def test_what_does_not_fit_is_told_with_numbers(trainer, dataset):
    found = plan.make_for_tpu(
        trainer, dataset, topology="v5e:2x2", per_replica_batch_size=2**18
    )
    assert not found.fits
    assert found.hbm_used_bytes > found.hbm_bytes
    assert found.compiled is None


def test_the_largest_batch_is_found():
    trainer = support.make_trainer(
        strategy=ahead_of_time.make_strategy(2), precision="auto"
    )

    def attempt(size, **options):
        return plan.make_for_tpu(
            trainer,
            support.make_dataset(),
            topology="v5e:2x2",
            per_replica_batch_size=size,
            **options,
        )

    largest = attempt(64, searches=True).largest_per_replica_batch_size
    assert attempt(largest).fits
    assert not attempt(largest * 9 // 8).fits


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
