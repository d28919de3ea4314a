"""Two workers are stopped or killed together and go on together."""

import signal
import subprocess
import sys

import keras
import numpy as np
import pytest

from dist_amp import storage
from tests.launch.prove_resume_test import prove
from tests.launch.train_test import SECONDS, command, environment
from tests.multi_worker.processes import end, start


def test_killed_workers_end_bit_for_bit_like_those_that_were_not(tmp_path):
    done = prove(
        tmp_path,
        "--model=mine:model",
        "--dataset=mine:data",
        "--precision=mixed_float16",
        "--num_workers=2",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("PROVED\n")


@pytest.mark.parametrize("asked", [1])
def test_one_worker_is_asked_to_stop_and_all_do_at_the_same_step(
    tmp_path, asked
):
    flags = [
        "--precision=float32",
        "--epochs=100000",
        "--save_every_epochs=0",
        f"--data_dir={tmp_path / 'data'}",  # prepared by both at once
    ]
    workers = start(command(*flags), cwd=tmp_path, PYTHONUNBUFFERED="1")
    try:
        for line in workers[0].stdout:
            if line.startswith("Epoch 1"):
                workers[asked].send_signal(signal.SIGTERM)
                break
    finally:
        results = end(workers)
    assert [status for status, _, _ in results] == [143, 143], results
    said = results[0][1].splitlines()[-1]
    assert said.startswith("stopped by SIGTERM at step ")
    assert results[1][1] == ""  # only the chief speaks
    step = int(said.split()[5].rstrip(";"))
    folder = tmp_path / "runs" / "mlp-digits"
    assert (
        storage.step_of(storage.find(str(folder / "checkpoints"))[-1]) == step
    )
    assert f"stopped at step {step}: SIGTERM" in results[1][2]

    epoch = storage.read_state(storage.find(str(folder / "checkpoints"))[-1])
    flags[1] = f"--epochs={epoch['epoch'] + 1}"
    results = end(start(command(*flags, "--resume=must"), cwd=tmp_path))
    assert [status for status, _, _ in results] == [0, 0], results
    resumed = keras.models.load_model(folder / "model.keras")

    one = subprocess.run(
        command(*flags, "--run_dir=one"),
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert one.returncode == 0, one.stderr
    alone = keras.models.load_model(tmp_path / "one" / "model.keras")
    for mine, theirs in zip(
        resumed.get_weights(), alone.get_weights(), strict=True
    ):
        np.testing.assert_allclose(mine, theirs, rtol=1e-3, atol=1e-4)


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
