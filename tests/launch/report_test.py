"""The page of launch.report: its data, its tables, and how it renders."""

import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from dist_amp.callbacks import JsonLines
from launch import report, run_record
from launch.config import TrainConfig
from launch.run_dir import RunDir

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
MEASURED = {"mfu": 0.25, "memory_bytes": 1e9, "peak_memory_bytes": 2e9}
RESOLVED = {"num_replicas": 2, "devices": ["/device:CPU:0"], "epochs": 5}


class Page(HTMLParser):
    """Tables as rows of texts, the data, and all names of files."""

    def __init__(self, text):
        super().__init__()
        self.text, self.tables, self.links = text, [], []
        self.open, self.is_in_table, self.data = "", False, None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.open = tag
        if tag == "script" and ("id", "data") in attributes:
            self.open = "data"
        self.links += [v for n, v in attributes if n in ("src", "href")]
        if tag == "table":
            self.is_in_table = True
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        self.open = ""
        self.is_in_table = self.is_in_table and tag != "table"

    def handle_data(self, text):
        if self.open == "data":
            self.data = json.loads(text, parse_constant=pytest.fail)
        elif self.is_in_table:
            self.tables[-1][-1][-1] += text

    def table(self, index):
        """A dict of a row's name to its cells, each by its column."""
        head, *rows = self.tables[index]
        return {
            row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in rows
        }


def make_run(path, num_epochs, *, has_test=True, nan_at=None, **settings):
    """As launch.train leaves it, through what writes it there."""
    run_dir = RunDir(str(path))
    run_dir.path.mkdir(parents=True)
    config = TrainConfig(**{"run_dir": str(path), **settings})
    run_dir.write_config(config, **RESOLVED)
    lines = JsonLines(run_dir.metrics, lambda: 7, lambda: MEASURED)
    for epoch in range(num_epochs):
        loss = math.nan if epoch == nan_at else 1 / (epoch + 1)
        logs = {
            "loss": loss,
            "accuracy": 0.5 + epoch / 4000,
            "loss_scale": 2.0 ** (20 - (epoch > 1)),
            "skipped_updates": float(epoch > 1),
            "learning_rate": 0.01,
            "examples_per_sec": 3200.0,
            "steps_per_sec": 100.0,
            "step_ms_p50": 9.0,
            "step_ms_p95": 12.0,
        }
        if has_test:
            logs |= {"val_loss": 2 * loss, "val_accuracy": 0.4}
        lines.on_epoch_begin(epoch)
        lines.on_epoch_end(epoch, logs)
    return str(path)


def make_page(tmp_path, *paths):
    out = tmp_path / "report.html"
    assert report.main(["report", *paths, f"--out={out}"]) == 0
    return Page(out.read_text())


@pytest.fixture
def two_runs(tmp_path):
    first = make_run(tmp_path / "a" / "same", 4, nan_at=2, learning_rate=0.02)
    second = make_run(tmp_path / "b<i>" / "same", 2, has_test=False)
    (tmp_path / "a" / "same" / "model.keras").touch()
    with (tmp_path / "b<i>" / "same" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "epo')  # it is being written
    return first, second


def test_the_page_holds_every_number_of_the_runs(tmp_path, two_runs):
    page = make_page(tmp_path, *two_runs)
    one, other = page.data["runs"]
    assert [one["name"], other["name"]] == ["a/same", "b<i>/same"]
    assert one["train"]["values"]["loss"] == [1, 0.5, "nan", 0.25]
    assert one["test"]["values"]["loss"] == [2, 1, "nan", 0.5]
    assert one["train"]["values"]["loss_scale"][1] == 1048576
    assert one["train"]["values"]["skipped_updates"] == [0, 0, 1, 1]
    assert other["train"]["epoch"] == [1, 2]
    assert other["test"]["values"] == {}
    titles = [chart["title"] for chart in page.data["charts"]]
    assert titles == [
        "Loss",
        "Accuracy",
        "Learning rate",
        "Loss scale",
        "Examples per second",
        "Step time, ms",
        "Model FLOPs utilization",
        "Memory",
    ]
    assert page.data["charts"][-1]["labels"] == ["in use", "peak"]


def test_its_tables_tell_results_and_only_what_differs(tmp_path, two_runs):
    page = make_page(tmp_path, *two_runs)
    results, (_, *settings), (_, *machines) = page.table(0), *page.tables[1:]
    one, other = results["a/same"], results["b<i>/same"]
    assert one["epochs"] == "4 of 5"
    assert other["epochs"] == "2 of 5 not finished"
    assert one["best test loss"] == "0.5 epoch 4"
    assert (one["loss"], other["loss"]) == ("0.25", "0.5")
    assert (one["test loss"], other["test loss"]) == ("0.5", "\u2013")
    assert (one["skipped updates"], one["MFU"]) == ("1", "25%")
    assert settings == [["learning_rate", "0.02", "\u2013"]]
    assert ["python", sys.version.split()[0]] in machines


def test_one_run_shows_the_settings_that_were_chosen(tmp_path):
    path = make_run(tmp_path / "run", 1, optimizer="sgd", momentum=0.5)
    page = make_page(tmp_path, path)
    assert page.tables[1] == [["optimizer", "sgd"], ["momentum", "0.5"]]
    assert ["replicas", "2"] in page.tables[2]


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    page = make_page(tmp_path, make_run(tmp_path / "run", 0))
    assert page.data["charts"] == []
    assert page.table(0) == {"run": {"epochs": "0 of 5 not finished"}}


def test_the_page_needs_nothing_beside_itself(tmp_path, two_runs):
    page = make_page(tmp_path, *two_runs)
    assert page.links == []
    assert not re.search(r"https?:|//[a-z]+\.|@import|url\(", page.text)
    assert "prefers-color-scheme: dark" in page.text
    assert 'name="viewport"' in page.text


def test_a_folder_of_runs_is_all_of_them(tmp_path):
    for name in ("b", "a"):
        make_run(tmp_path / "runs" / name, 1)
    (tmp_path / "runs" / "other").mkdir()
    page = make_page(tmp_path, str(tmp_path / "runs"))
    assert [run["name"] for run in page.data["runs"]] == ["a", "b"]


@pytest.mark.parametrize("text", ["", "[]", '{"settings": null}', "{"])
def test_damaged_settings_are_told(tmp_path, capsys, text):
    path = make_run(tmp_path / "run", 1)
    RunDir(path).config.write_text(text)
    assert report.main(["report", path]) == 2
    assert "config.json is damaged" in capsys.readouterr().err


def test_what_is_no_number_is_not_shown(tmp_path):
    path = make_run(tmp_path / "run", 1)
    config = json.loads(RunDir(path).config.read_text())
    config["resolved"]["epochs"] = "<script>one</script>"
    RunDir(path).config.write_text(json.dumps(config))
    line = {"step": 9, "epoch": 2, "split": "train", "loss": 0.5, "time": 1.0}
    with RunDir(path).metrics.open("a") as file:
        for field, value in (
            ("epoch", "<script>two</script>"),
            ("time", "late"),
            ("time", float("nan")),
            ("step", None),
            ("split", "other"),
        ):
            file.write(json.dumps(line | {field: value}) + "\n")
        file.write(json.dumps(line).replace("0.5", "9" * 400) + "\n")
    page = make_page(tmp_path, path)
    assert "<script>one" not in page.text
    assert "<script>two" not in page.text
    (run,) = page.data["runs"]
    assert run["train"]["epoch"] == [1, 2]
    assert run["train"]["values"]["loss"] == [1, None]


def test_less_is_better_of_what_keras_says_so():
    up = ("accuracy", "auc", "f1_score", "mean_io_u", "cosine_similarity")
    down = ("val_loss", "mean_squared_error", "hinge", "poisson")
    down += ("sparse_categorical_crossentropy", "kl_divergence")
    assert not any(map(run_record.is_less_better, up))
    assert all(map(run_record.is_less_better, down))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name the folder of a run"),
        (["nowhere"], "nowhere holds no run: .* pass the --run_dir"),
        (["run", "run"], "a run is named twice: run run"),
        (["run", "--out=none/page.html"], "none/page.html"),
        (["run", "--ouf=x"], "Unknown command line flag 'ouf'"),
    ],
)
def test_mistakes_are_told(tmp_path, monkeypatch, capsys, arguments, message):
    make_run(tmp_path / "run", 1)
    monkeypatch.chdir(tmp_path)
    assert report.main(["report", *arguments]) == 2
    assert re.search(message, capsys.readouterr().err)


def browse(page, folder, *flags):
    """What Chromium says of the page, and its log."""
    return subprocess.run(
        [
            CHROMIUM,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=2000",
            f"--user-data-dir={folder}",
            *flags,
            pathlib.Path(page).as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )


# As a reader would: looks at values in the first chart, hides all runs and goes
# through all axes, and shows them again.
TOUCHED = """<script>
const shown = () => views[0].tip.textContent;
const box = views[0].svg.getBoundingClientRect();
const touch = part => views[0].svg.dispatchEvent(new PointerEvent(
  "pointermove", { clientX: box.left + part * box.width }));
touch(1);
document.documentElement.dataset.tip = shown();
const buttons = [...document.querySelectorAll("button")];
for (const button of [...buttons, ...buttons]) {
  button.click();
  for (const part of [.2, .5, .9]) {
    touch(part);
    const tip = views[0].tip.getBoundingClientRect();
    if (tip.left < 0 || tip.right > innerWidth) throw "the tip is outside";
  }
}
</script></html>"""


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on PATH")
@pytest.mark.parametrize("num_epochs", [1, 1000])
def test_chromium_draws_it_without_an_error(tmp_path, two_runs, num_epochs):
    third = make_run(tmp_path / "third", num_epochs, nan_at=num_epochs - 2)
    page = make_page(tmp_path, *two_runs, third)
    (tmp_path / "touched.html").write_text(
        page.text.replace("</html>", TOUCHED)
    )
    picture = tmp_path / "page.png"
    done = browse(
        tmp_path / "touched.html",
        tmp_path / "browser",
        "--dump-dom",
        "--window-size=390,900",
    )
    assert "CONSOLE" not in done.stderr  # where errors of scripts are told
    tip = re.search('data-tip="(.*?)"', done.stdout)[1]
    last = max(4, num_epochs)
    assert tip.startswith(f"epoch {last}")
    assert ("a/same train0.25a/same test0.5" in tip) == (last == 4)
    drawn = len(page.data["charts"])
    assert f'data-drawn="{drawn}"' in done.stdout
    assert 'class="skip"' in done.stdout
    assert 'class="curve lost"' in done.stdout
    assert "NaN" not in "".join(re.findall(r' d="(.*?)"', done.stdout))
    browse(
        tmp_path / "report.html",
        tmp_path / "browser",
        f"--screenshot={picture}",
    )
    assert picture.stat().st_size > 10_000


if __name__ == "__main__":
    sys.exit(pytest.main([__file__]))
