"""What the user sees: the progress line and metrics.jsonl."""

import io
import json
import math
import sys

import numpy as np
import pytest
import tensorflow as tf

from dist_amp.callbacks import (
    JsonLines,
    Progress,
    as_json,
    describe_epoch,
)
from dist_amp.meter import MEASURED

TRAIN_LOGS = {
    "accuracy": 0.5,
    "loss": 1.25,
    "loss_scale": 32768.0,
    "skipped_updates": 2.0,
    "learning_rate": 0.01,
    "steps_per_sec": 100.0,
    "examples_per_sec": 3200.0,
}
LOGS = {**TRAIN_LOGS, "val_accuracy": 0.25, "val_loss": 2.0}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self):
        return self.seconds


def make_progress(stream, clock=None):
    progress = Progress(
        stream, seconds_between_lines=30.0, clock=clock or Clock()
    )
    progress.set_params({"steps": 40})
    progress.on_epoch_begin(0)
    return progress


def test_epoch_line_is_the_tutorials():
    assert describe_epoch(0, LOGS) == (
        "Epoch 1, Loss: 1.2500, Accuracy: 50.00, "
        "Test Loss: 2.0000, Test Accuracy: 25.00"
    )


def test_a_terminal_gets_one_line_that_is_rewritten():
    stream, clock = Terminal(), Clock()
    progress = make_progress(stream, clock)
    for batch in range(40):
        clock.seconds += 0.06
        progress.on_train_batch_end(batch, TRAIN_LOGS)
    progress.on_epoch_end(0, LOGS)
    line, result, rest = stream.getvalue().split("\n")
    assert rest == ""
    assert result.startswith("Epoch 1, Loss")
    shown = line.split("\r")
    assert 15 < len(shown) < 25  # not more than one in 0.1 s
    assert "epoch 1 20/40 [===...] 100 steps/s" in line
    assert "loss 1.250 accuracy 0.500 loss_scale 32768" in shown[-1]


def test_the_line_is_cut_where_the_terminal_ends(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("LINES", "24")
    stream, clock = Terminal(), Clock()
    progress = make_progress(stream, clock)
    metrics = {f"accuracy_of_class_{index}": 0.125 for index in range(9)}
    for batch in range(9):
        clock.seconds += 1.0
        # The last line is shorter: nothing of the others may be left.
        logs = TRAIN_LOGS | (metrics if batch < 8 else {})
        progress.on_train_batch_end(batch, logs)
    assert "\n" not in stream.getvalue()
    _, *lines = stream.getvalue().split("\r")
    assert [len(line) for line in lines] == [79] * 9
    assert lines[0].startswith("epoch 1 1/40 [......] 100 steps/s loss 1.250")
    assert lines[8].rstrip().endswith("loss_scale 32768")


def test_what_a_clock_measured_is_in_the_logs_alone():
    measured = dict.fromkeys(MEASURED, 0.5) | {"steps_per_sec": 100.0}
    for stream in (Terminal(), io.StringIO()):
        clock = Clock()
        progress = make_progress(stream, clock)
        clock.seconds += 60.0
        progress.on_train_batch_end(9, TRAIN_LOGS | measured)
        progress.on_epoch_end(0, TRAIN_LOGS | measured)
        shown = stream.getvalue()
        assert "loss 1.250 accuracy 0.500 loss_scale 32768" in shown
        assert not [name for name in MEASURED if name in shown]
        assert shown.endswith("Epoch 1, Loss: 1.2500, Accuracy: 50.00\n")


def test_a_file_gets_a_line_now_and_then_and_no_control_characters():
    stream, clock = io.StringIO(), Clock()
    progress = make_progress(stream, clock)
    for batch in range(40):
        clock.seconds += 1.0
        progress.on_train_batch_end(batch, TRAIN_LOGS)
    progress.on_epoch_end(0, LOGS)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert "30/40" in lines[0]
    assert "\r" not in stream.getvalue()


def test_a_line_an_epoch_is_all_that_verbose_2_shows():
    stream = Terminal()
    progress = Progress(stream, seconds_between_lines=math.inf)
    progress.set_params({"steps": 40})
    progress.on_epoch_begin(0)
    progress.on_train_batch_end(1, TRAIN_LOGS)
    progress.on_epoch_end(0, LOGS)
    assert stream.getvalue() == describe_epoch(0, LOGS) + "\n"


def write(path, epochs, step=7):
    callback = JsonLines(path, lambda: step)
    for epoch in epochs:
        callback.on_epoch_begin(epoch)
        callback.on_epoch_end(epoch, LOGS)
    return [json.loads(line) for line in path.open()]


def test_json_lines_hold_what_was_promised(tmp_path):
    train, test = write(tmp_path / "new" / "metrics.jsonl", [0])
    assert {name: value for name, value in train.items() if name != "time"} == {
        **TRAIN_LOGS,
        "step": 7,
        "epoch": 1,
        "split": "train",
    }
    assert isinstance(train["skipped_updates"], int)
    assert {name: v for name, v in test.items() if name != "time"} == {
        "step": 7,
        "epoch": 1,
        "split": "test",
        "loss": 2.0,
        "accuracy": 0.25,
    }
    assert train["time"] > 1.7e9


def test_epochs_that_are_trained_again_replace_their_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 1, 2])
    lines = write(path, [1, 2, 3])
    assert [line["epoch"] for line in lines] == [1, 1, 2, 2, 3, 3, 4, 4]


def test_what_json_cannot_hold_becomes_a_word(tmp_path):
    callback = JsonLines(tmp_path / "metrics.jsonl", lambda: 1)
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, {"loss": float("nan")})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["loss"] == "nan"


def test_any_number_and_array_is_json():
    values = {
        "list": [1.0, float("nan")],
        "numpy": np.float32(0.5),
        "array": np.array([[1, 2]]),
        "tensor": tf.constant([float("inf")]),
        "text": "a",
    }
    assert json.loads(as_json(values), parse_constant=pytest.fail) == {
        "list": [1.0, "nan"],
        "numpy": 0.5,
        "array": [[1, 2]],
        "tensor": ["inf"],
        "text": "a",
    }


def test_lines_that_a_full_disk_refuses_come_when_there_is_room(
    tmp_path, caplog
):
    """/dev/full is a disk without room."""
    path = tmp_path / "metrics.jsonl"
    callback = JsonLines(path, lambda: 1)
    for epoch in range(4):
        callback.on_epoch_begin(epoch)
        if epoch == 1:
            path.rename(tmp_path / "kept")
            path.symlink_to("/dev/full")
        if epoch == 3:
            (tmp_path / "kept").rename(path)
        callback.on_epoch_end(epoch, {"loss": float(epoch)})
    lines = [json.loads(line) for line in path.open()]
    assert [line["epoch"] for line in lines] == [1, 2, 3, 4]
    assert "No space left on device" in caplog.text


def test_counts_are_whole_and_an_unmeasured_speed_is_left_out(tmp_path):
    logs = {"loss": 1.0, "rollbacks": 2.0, "steps_per_sec": math.nan}
    assert describe_epoch(0, logs) == "Epoch 1, Loss: 1.0000, Rollbacks: 2"
    callback = JsonLines(tmp_path / "metrics.jsonl", lambda: 1)
    callback.on_epoch_begin(0)
    callback.on_epoch_end(0, logs)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert '"rollbacks": 2,' in text
    assert "steps_per_sec" not in text
    stream, clock = Terminal(), Clock()
    make_progress(stream, clock).on_epoch_end(0, logs)
    assert "40/40 [======] loss 1" in stream.getvalue()


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
