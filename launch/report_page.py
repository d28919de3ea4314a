"""The page of a report on runs: HTML, CSS, SVG and script in one file.

The numbers stand in the page as JSON; its script draws them. Tables are there
without the script, too.
"""

import html
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.config import TrainConfig
from launch.run_record import SPLITS, RunRecord, is_less_better

# Title, unit and what stands in one chart, of fields that every run has; where
# there are two, what each is called.
_CHARTS: tuple[tuple[str, str, dict[str, str]], ...] = (
    ("Loss", "", {"loss": ""}),
    ("Learning rate", "", {"learning_rate": ""}),
    ("Loss scale", "", {"loss_scale": ""}),
    ("Examples per second", "/s", {"examples_per_sec": ""}),
    ("Tokens per second", "/s", {"tokens_per_sec": ""}),
    ("Step time, ms", "ms", {"step_ms_p50": "p50", "step_ms_p95": "p95"}),
    ("Time waited for input", "%", {"input_wait": ""}),
    ("Time in all-reduces", "%", {"all_reduce_share": ""}),
    ("Model FLOPs utilization", "%", {"mfu": ""}),
    ("Memory", "B", {"memory_bytes": "in use", "peak_memory_bytes": "peak"}),
)
# Shown elsewhere, or the same as another one in another unit.
_NO_CHART = ("skipped_updates", "steps_per_sec")
_NO_SETTING = ("run_dir", "resume", "dry_run")
_DEVICE_ROWS = {
    "strategy": "strategy",
    "num_replicas": "replicas",
    "devices": "devices",
    "precision": "precision",
    "num_parameters": "parameters",
    "dist_amp": "dist_amp",
}


def to_html(runs: Sequence[RunRecord]) -> str:
    """The page.

    Args:
        runs: At least one.
    """
    parts = {
        "TITLE": _title(runs),
        "SUBTITLE": _subtitle(runs),
        "RESULTS": _results(runs),
        "SETTINGS": _settings(runs),
        "MACHINES": _machines(runs),
        "DATA": _json(
            {
                "charts": list(_charts(runs)),
                "runs": [_data_of(run) for run in runs],
            }
        ),
    }
    return re.sub(r"@([A-Z]+)@", lambda found: parts[found[1]], _PAGE)


# --------------------------------------------------------------------- charts


def _charts(runs: Sequence[RunRecord]) -> Iterator[dict[str, Any]]:
    """Those that have numbers; metrics come after the loss."""
    fields = list(dict.fromkeys(f for run in runs for f in run.fields))
    known = {f for _, _, group in _CHARTS for f in group}
    for title, unit, group in _CHARTS:
        shown = [field for field in group if field in fields]
        if shown:
            labels = [group[field] for field in shown]
            yield _chart(title, unit, shown, labels)
        if title != "Loss":
            continue
        for field in fields:
            if field not in known and field not in _NO_CHART:
                yield _chart(_words(field), "", [field], [""])


def _chart(
    title: str, unit: str, fields: list[str], labels: list[str]
) -> dict[str, Any]:
    return {"title": title, "unit": unit, "fields": fields, "labels": labels}


def _data_of(run: RunRecord) -> dict[str, Any]:
    data: dict[str, Any] = {"name": run.name}
    for split in SPLITS:
        series = run.series(split)
        data[split] = {
            "epoch": series.epoch,
            "step": series.step,
            "time": [round(t, 1) for t in series.time],
            "values": {
                field: [_short(value) for value in values]
                for field, values in series.values.items()
                if field != "steps_per_sec"
            },
        }
    return data


def _short(value: float | None) -> float | str | None:
    """Six digits or a whole number; what JSON cannot hold as a word."""
    if value is None:
        return None
    if not math.isfinite(value):
        return str(value)
    return int(value) if value.is_integer() else float(f"{value:.6g}")


def _json(content: Any) -> str:
    """No text of a run can end the element that it stands in."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c")


# --------------------------------------------------------------------- tables


def _title(runs: Sequence[RunRecord]) -> str:
    if len(runs) == 1:
        return html.escape(runs[0].name)
    return f"{len(runs)} runs"


def _subtitle(runs: Sequence[RunRecord]) -> str:
    names = {
        f"{run.settings['model']} on {run.settings['dataset']}"
        for run in runs
        if {"model", "dataset"} <= run.settings.keys()
    }
    when = time.strftime("%Y-%m-%d %H:%M %Z")
    told = [html.escape(name) for name in sorted(names)[:3]]
    return " &middot; ".join([*told, f"made {when}"])


def _results(runs: Sequence[RunRecord]) -> str:
    """A row for each run: where it is, its final and its best numbers."""
    columns = [column for column in _columns(runs) if any(column[1])]
    head = "".join(f"<th>{html.escape(name)}" for name, _ in columns)
    rows = [
        "<tr><th>"
        + _named(index, run)
        + "".join(f"<td>{cells[index] or _NOTHING}" for _, cells in columns)
        for index, run in enumerate(runs)
    ]
    return f"<table><thead><tr><th>run{head}<tbody>{''.join(rows)}</table>"


_NOTHING = '<span class="none">&ndash;</span>'


def _named(index: int, run: RunRecord) -> str:
    swatch = f'<i class="swatch" style="--c:var(--c{index % 8})"></i>'
    return f"{swatch}{html.escape(run.name)}"


def _columns(
    runs: Sequence[RunRecord],
) -> Iterator[tuple[str, Sequence[str]]]:
    """A name, and a cell for each run; an empty one where there is none."""
    yield "epochs", [_progress(run) for run in runs]
    for chart in _charts(runs):
        for field in chart["fields"]:
            for split in SPLITS:
                if field not in _MEASURED_ONCE:
                    yield from _final_and_best(runs, field, split)
    skipped = [run.train.last("skipped_updates") for run in runs]
    if any(skipped):
        yield "skipped updates", [_digits(value) for value in skipped]
    for field, (name, show) in _MEASURED_ONCE.items():
        if show:
            values = [run.train.median(field) for run in runs]
            yield name, ["" if v is None else show(v) for v in values]


def _final_and_best(
    runs: Sequence[RunRecord], field: str, split: str
) -> Iterator[tuple[str, Sequence[str]]]:
    name = f"{'test ' if split == 'test' else ''}{_words(field).lower()}"
    last = [run.series(split).last(field) for run in runs]
    yield name, [_digits(value) for value in last]
    if split == "train" and any(run.test.epoch for run in runs):
        return
    found = [run.series(split).best(field) for run in runs]
    known = [one[0] for one in found if one]
    top = (
        min(known, default=None)
        if is_less_better(field)
        else max(known, default=None)
    )
    yield (
        f"best {name}",
        [
            _best(one, is_top=len(known) > 1 and one[0] == top) if one else ""
            for one in found
        ],
    )


def _best(found: tuple[float, int], *, is_top: bool) -> str:
    value, epoch = found
    text = f"{_digits(value)} <small>epoch {epoch}</small>"
    return f"<b>{text}</b>" if is_top else text


def _progress(run: RunRecord) -> str:
    planned = run.planned_epochs
    done = f"{run.num_epochs}" + (f" of {planned}" if planned else "")
    state = "" if run.is_finished else " <small>not finished</small>"
    return done + state


def _digits(value: float | None) -> str:
    if value is None:
        return ""
    if not math.isfinite(value):
        return f'<span class="bad">{value}</span>'
    if value == int(value) and abs(value) < 1e6:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _grouped(value: float) -> str:
    return f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _mebibytes(value: float) -> str:
    return f"{value / 2**20:,.0f} MiB"


# Medians of a run, and how they are told; None where a chart is enough.
_MEASURED_ONCE: dict[str, tuple[str, Callable[[float], str] | None]] = {
    "examples_per_sec": ("examples/s", _grouped),
    "tokens_per_sec": ("tokens/s", _grouped),
    "step_ms_p50": ("step, ms", _digits),
    "step_ms_p95": ("", None),
    "input_wait": ("input wait", _percent),
    "all_reduce_share": ("all-reduces", _percent),
    "mfu": ("MFU", _percent),
    "memory_bytes": ("", None),
    "peak_memory_bytes": ("peak memory", _mebibytes),
    "learning_rate": ("", None),
    "loss_scale": ("", None),
    "wire_error": ("", None),
    "rollbacks": ("", None),
}


def _words(field: str) -> str:
    text = field.replace("_", " ")
    return text[:1].upper() + text[1:]


def _settings(runs: Sequence[RunRecord]) -> str:
    """Settings that differ; of a single run those that are not the default."""
    names = dict.fromkeys(name for run in runs for name in run.settings)
    rows = {
        name: [run.settings.get(name) for run in runs]
        for name in names
        if name not in _NO_SETTING
    }
    if len(runs) > 1:
        differing = {n: v for n, v in rows.items() if not _is_same(v)}
        return _compared(runs, differing, "All settings are the same.")
    fields = TrainConfig.__dataclass_fields__
    chosen = {
        name: values
        for name, values in rows.items()
        if name not in fields or values[0] != _plain(fields[name].default)
    }
    return _compared(runs, chosen, "All settings have their defaults.")


def _plain(value: Any) -> Any:
    """As JSON has it."""
    return list(value) if isinstance(value, tuple) else value


def _machines(runs: Sequence[RunRecord]) -> str:
    """Versions and devices; one column if they are the same everywhere."""
    rows: dict[str, list[Any]] = {
        title: [run.resolved.get(name) for run in runs]
        for name, title in _DEVICE_ROWS.items()
    }
    for name in dict.fromkeys(n for run in runs for n in run.versions):
        rows[name] = [run.versions.get(name) for run in runs]
    rows = {name: v for name, v in rows.items() if any(v)}
    if all(map(_is_same, rows.values())):
        only = {name: values[:1] for name, values in rows.items()}
        return _compared(runs[:0], only, "No run has told.")
    return _compared(runs, rows, "")


def _is_same(values: Sequence[Any]) -> bool:
    return all(value == values[0] for value in values)


def _compared(
    runs: Sequence[RunRecord], rows: Mapping[str, Sequence[Any]], none: str
) -> str:
    if not rows:
        return f'<p class="none">{none}</p>'
    names = "".join(f"<th>{_named(i, run)}" for i, run in enumerate(runs))
    head = f"<thead><tr><th>{names}" if len(runs) > 1 else ""
    body = "".join(
        f"<tr><th>{html.escape(name)}" + _cells(values)
        for name, values in rows.items()
    )
    return f'<table class="words">{head}<tbody>{body}</table>'


def _cells(values: Sequence[Any]) -> str:
    """One over all columns, if all are the same."""
    if len(values) > 1 and _is_same(values):
        return f'<td colspan="{len(values)}">{_cell(values[0])}'
    return "".join(f"<td>{_cell(value)}" for value in values)


def _cell(value: Any) -> str:
    if value is None or value == []:
        return _NOTHING
    if isinstance(value, list):
        shown = [str(one).rpartition("/device:")[2] for one in value]
        return html.escape(", ".join(shown))
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:.10g}"
    return html.escape(str(value))


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>@TITLE@</title>
<style>
:root { --ink: #18202b; --soft: #5d6876; --faint: #97a1ad; --paper: #f5f7f9;
  --card: #fff; --line: #e2e7ec; --red: #c0392b; --shade: #0001;
  --c0: #2463c9; --c1: #d9661f; --c2: #138a6b; --c3: #a43a94; --c4: #b8860b;
  --c5: #1b91b5; --c6: #c93a4e; --c7: #6b7280 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf1; --soft: #9aa6b3;
  --faint: #6c7885; --paper: #0e1217; --card: #161b22; --line: #29313a;
  --red: #ff8b7b; --shade: #0006; --c0: #6ea4ff; --c1: #ff9a57; --c2: #45cba5;
  --c3: #dd85d0; --c4: #e5bd4f; --c5: #5cc7e6; --c6: #ff8494;
  --c7: #a9b3bf } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 84rem; margin: 0 auto;
  padding: 1.4rem clamp(.8rem, 2.5vw, 2rem) 3rem }
h1 { font-size: 1.55rem; line-height: 1.2; margin: 0; letter-spacing: -.01em;
  overflow-wrap: anywhere }
h2 { font-size: 1rem; margin: 2rem 0 .6rem }
.sub { margin: .25rem 0 0; color: var(--soft); font-size: .87rem }
nav { position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap;
  gap: .4rem 1rem; align-items: center; justify-content: space-between;
  margin: 1rem 0 .8rem; padding: .5rem 0; background: var(--paper);
  border-bottom: 1px solid var(--line) }
nav > div { display: flex; flex-wrap: wrap; gap: .35rem; align-items: center }
button { font: inherit; font-size: .82rem; color: var(--ink); cursor: pointer;
  background: var(--card); border: 1px solid var(--line); padding: .28rem .7rem;
  border-radius: 2rem; display: inline-flex; align-items: center;
  max-width: 100%; overflow-wrap: anywhere; text-align: left }
button:focus-visible { outline: 2px solid var(--c0); outline-offset: 1px }
.runs button[aria-pressed=false] { color: var(--faint); opacity: .7 }
.runs button[aria-pressed=false] .swatch { background: var(--faint) }
.axes { font-size: .82rem; color: var(--soft) }
.axes button[aria-pressed=true] { background: var(--ink);
  border-color: var(--ink); color: var(--card) }
.swatch { display: inline-block; flex: none; width: .7rem; height: .7rem;
  border-radius: 50%; background: var(--c); margin-right: .45rem }
.charts { display: grid; gap: .8rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)) }
figure { position: relative; margin: 0; min-width: 0; background: var(--card);
  border: 1px solid var(--line); border-radius: .7rem;
  padding: .75rem .8rem .5rem }
figcaption { font-size: .88rem; font-weight: 600; display: flex;
  justify-content: space-between; align-items: baseline; gap: .6rem }
figcaption small { font-weight: normal; color: var(--soft);
  white-space: nowrap }
figure svg { display: block; width: 100%; height: 200px; margin-top: .35rem;
  touch-action: pan-y; overflow: visible; cursor: crosshair }
svg text { font-size: 11px; fill: var(--soft) }
.grid { stroke: var(--line) }
.curve { fill: none; stroke-width: 1.8; stroke-linejoin: round;
  stroke-linecap: round }
.dashed { stroke-dasharray: 1.5 4.2; stroke-width: 2.1 }
.fine { stroke-width: 1 }
.cross { stroke: var(--faint); stroke-dasharray: 2 3; pointer-events: none }
.tip { position: absolute; z-index: 3; pointer-events: none; font-size: .78rem;
  background: var(--card); border: 1px solid var(--line); border-radius: .5rem;
  box-shadow: 0 4px 14px var(--shade); padding: .4rem .6rem; width: max-content;
  max-width: min(22rem, 94vw);
  font-variant-numeric: tabular-nums }
.tip[hidden] { display: none }
.tip p { margin: 0; display: flex; align-items: center; gap: .1rem;
  white-space: nowrap }
.tip .name { overflow: hidden; text-overflow: ellipsis; flex: 1 1 auto;
  margin-right: .8rem }
.tip .at { color: var(--soft) }
.card { background: var(--card); border: 1px solid var(--line);
  border-radius: .7rem; overflow-x: auto }
table { border-collapse: collapse; font-size: .84rem; min-width: 100%;
  font-variant-numeric: tabular-nums }
th, td { padding: .45rem .8rem; text-align: right; white-space: nowrap;
  border-bottom: 1px solid var(--line); font-weight: normal }
tbody tr:last-child > * { border-bottom: 0 }
thead th { color: var(--soft); font-size: .78rem }
th:first-child { text-align: left; position: sticky; left: 0;
  background: var(--card); max-width: 13rem; overflow: hidden;
  text-overflow: ellipsis }
tbody th { font-weight: 600 }
.words th, .words td { text-align: left }
.words tbody th { color: var(--soft); font-weight: normal }
.words td { white-space: normal; overflow-wrap: break-word; min-width: 7rem }
td small { color: var(--soft) }
.none { color: var(--faint) }
p.none { margin: 0; padding: .7rem .9rem }
.bad { color: var(--red); font-weight: 600 }
.key { display: inline-flex; align-items: center; gap: .3rem }
.pair { display: grid; gap: 0 .8rem;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)) }
@media (max-width: 30rem) { nav { position: static } }
</style>
<h1>@TITLE@</h1>
<p class="sub">@SUBTITLE@</p>
<nav><div class="runs" id="runs"></div><div class="axes" id="axes"></div></nav>
<div class="charts" id="charts"></div>
<noscript><p>The curves need a browser that runs scripts.</p></noscript>
<h2>Results</h2>
<div class="card">@RESULTS@</div>
<div class="pair">
<div><h2>Settings</h2><div class="card">@SETTINGS@</div></div>
<div><h2>Versions and devices</h2><div class="card">@MACHINES@</div></div>
</div>
<script type="application/json" id="data">@DATA@</script>
<script>
"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const state = { axis: "epoch", log: false, hidden: new Set(), at: null };
const template = document.createElement("template");
template.innerHTML = "<svg></svg>";
const SVG = template.content.firstChild.namespaceURI;
const HEIGHT = 200, LEFT = 46, RIGHT = 10, TOP = 8, BOTTOM = 22;
const colour = i => `var(--c${i % 8})`;
const make = (name, attributes = {}, text) => {
  const node = document.createElementNS(SVG, name);
  for (const key in attributes) node.setAttribute(key, attributes[key]);
  if (text !== undefined) node.textContent = text;
  return node;
};
const element = (name, className, text) => {
  const node = document.createElement(name);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
};

function round(value, digits) {
  return String(Number(value.toPrecision(digits)));
}
function show(value, unit, digits = 4) {
  if (typeof value !== "number") return String(value);
  if (unit === "%") return round(100 * value, Math.min(3, digits)) + "%";
  const size = Math.abs(value);
  if (unit === "B") {
    const names = ["B", "KiB", "MiB", "GiB", "TiB"];
    let k = 0, left = value;
    while (left >= 1024 && k < 4) { left /= 1024; k += 1; }
    return round(left, 3) + " " + names[k];
  }
  const tail = unit === "ms" ? " ms" : unit;
  if (size >= 1e9) return round(value / 1e9, digits) + "G" + tail;
  if (size >= 1e6) return round(value / 1e6, digits) + "M" + tail;
  if (size >= 1e4) return round(value / 1e3, digits) + "k" + tail;
  if (size && size < 1e-3) return 
    Number(value.toPrecision(3)).toExponential();
  return round(value, digits) + tail;
}
function clock(seconds) {
  if (seconds < 120) return Math.round(seconds) + " s";
  if (seconds < 7200) return round(seconds / 60, 3) + " min";
  return round(seconds / 3600, 3) + " h";
}
const showX = x => state.axis === "time" ? clock(x) : show(x, "", 6);

function ticks(low, high, count) {
  const raw = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].find(n => n * power >= raw) * power;
  const found = [];
  for (let n = Math.ceil(low / step - 1e-9); n * step <= high + step * 1e-9;
       n += 1) found.push(n * step);
  return found;
}
function timeTicks(low, high, count) {
  const span = high - low;
  const unit = span < 120 ? 1 : span < 7200 ? 60 : 3600;
  return ticks(low / unit, high / unit, count).map(t => t * unit);
}
function logTicks(low, high) {
  const found = [];
  const first = Math.ceil(Math.log10(low) - 1e-9);
  const last = Math.floor(Math.log10(high) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first) / 5));
  for (let p = first; p <= last; p += step) found.push(10 ** p);
  return found.length > 1 ? found : ticks(low, high, 4).filter(t => t > 0);
}
function powersOfTwo(low, high) {
  const first = Math.ceil(Math.log2(low) - 1e-9);
  const last = Math.floor(Math.log2(high) + 1e-9);
  const step = Math.max(1, Math.ceil((last - first) / 4));
  const found = [];
  for (let p = first; p <= last; p += step) found.push(2 ** p);
  return found;
}

/* What a chart shows: a curve for each visible run, split and field. */
function curves(chart) {
  const found = [];
  data.runs.forEach((run, index) => {
    if (state.hidden.has(index)) return;
    for (const split of ["train", "test"]) {
      const part = run[split];
      chart.fields.forEach((field, place) => {
        const y = part.values[field];
        if (!y) return;
        const begin = run.train.time.length ? run.train.time[0] : part.time[0];
        const x = state.axis === "time"
          ? part.time.map(t => Math.max(0, t - begin)) : part[state.axis];
        const skipped = field === "loss_scale"
          ? part.values.skipped_updates : null;
        const isDashed = split === "test" || place > 0;
        found.push({ index, run, split, field, x, y, isDashed, skipped,
                     epoch: part.epoch });
      });
    }
  });
  return found;
}
function isScale(chart) { return chart.fields[0] === "loss_scale"; }
function isLog(chart) { return isScale(chart) ||
  (state.log && !["%", "B"].includes(chart.unit)); }

function ranges(chart, all) {
  const xs = all.flatMap(c => c.x), log = isLog(chart);
  const ys = all.flatMap(c => c.y)
    .filter(v => typeof v === "number" && (!log || v > 0));
  let x0 = Infinity, x1 = -Infinity, y0 = Infinity, y1 = -Infinity;
  for (const x of xs) { x0 = Math.min(x0, x); x1 = Math.max(x1, x); }
  for (const y of ys) { y0 = Math.min(y0, y); y1 = Math.max(y1, y); }
  if (x0 === x1) { x0 -= state.axis === "time" ? 0 : .5; x1 += .5; }
  if (!ys.length) { y0 = log ? 1 : 0; y1 = log ? 10 : 1; }
  if (log) {
    const room = y0 === y1 ? 2 : (y1 / y0) ** .05;
    return { x0, x1, y0: y0 / room, y1: y1 * room, log };
  }
  const isShare = ["%", "B", "/s", "ms"].includes(chart.unit);
  if (isShare) y0 = 0;
  if (chart.unit === "%") y1 = Math.max(y1, .1);
  const room = y0 === y1 ? Math.abs(y0) * .1 || 1 : (y1 - y0) * .06;
  return { x0, x1, y0: isShare ? 0 : y0 - room, y1: y1 + room, log };
}

function draw(view) {
  const { chart, svg } = view;
  const width = Math.max(220, svg.clientWidth || 340);
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT}`);
  svg.replaceChildren();
  const all = view.curves = curves(chart);
  const r = ranges(chart, all);
  const bend = r.log ? Math.log : v => v;
  const right = width - RIGHT, bottom = HEIGHT - BOTTOM;
  const px = view.px = x => LEFT + (x - r.x0) / (r.x1 - r.x0) * (right - LEFT);
  const py = y => bottom -
    (bend(y) - bend(r.y0)) / (bend(r.y1) - bend(r.y0)) * (bottom - TOP);
  const marks = isScale(chart) ? powersOfTwo(r.y0, r.y1)
    : r.log ? logTicks(r.y0, r.y1)
    : chart.unit === "B" ? ticks(r.y0 / 2 ** 20, r.y1 / 2 ** 20, 4)
      .map(t => t * 2 ** 20)
    : ticks(r.y0, r.y1, 5);
  for (const y of marks) {
    if (y < r.y0 || y > r.y1) continue;
    svg.append(make("line", { class: "grid", x1: LEFT, x2: right, y1: py(y),
                              y2: py(y) }));
    const label = make("text", { x: LEFT - 6, y: py(y) + 3.5,
                                 "text-anchor": "end" });
    if (isScale(chart)) {
      label.append("2", make("tspan", { dy: -4, "font-size": 8 },
                             Math.round(Math.log2(y))));
    } else label.textContent = show(y, chart.unit === "B" ? "B" :
      chart.unit === "%" ? "%" : "", 3);
    svg.append(label);
  }
  const some = state.axis === "time" ? timeTicks : ticks;
  const count = Math.max(2, Math.floor((right - LEFT) / 75));
  const whole = state.axis !== "time";
  for (const x of some(r.x0, r.x1, count)) {
    if (whole && !Number.isInteger(x)) continue;
    const anchor = px(x) > right - 14 ? "end" : "middle";
    svg.append(make("text", { x: px(x), y: HEIGHT - 6,
                              "text-anchor": anchor }, showX(x)));
  }
  for (const c of all) svg.append(...pathOf(c, px, py, r, bottom));
  view.line = make("line", { class: "cross", y1: TOP, y2: bottom,
                             visibility: "hidden" });
  svg.append(view.line);
  const skips = all.reduce((n, c) => n + (c.skipped || [])
    .filter(v => typeof v === "number").reduce((a, b) => Math.max(a, b), 0), 0);
  view.note.textContent = skips ? `\\u25b2 ${skips} skipped` : noteOf(chart);
}
function noteOf(chart) {
  const all = data.runs.some(run => chart.fields.some(f =>
    f in run.test.values));
  const [one, other] = chart.labels;
  if (chart.fields.length > 1) return `solid ${one}, dotted ${other}`;
  return all ? "solid train, dotted test" : "";
}

function pathOf(c, px, py, r, bottom) {
  const nodes = [], stroke = colour(c.index);
  let d = "", isOpen = false, before = 0, run = 0, lastX = 0, lastY = 0;
  const dot = (x, y, size) => nodes.push(make("circle", { cx: x, cy: y,
    r: size, style: `fill:${stroke}` }));
  const close = () => { if (run === 1) dot(lastX, lastY, 3); run = 0; };
  c.x.forEach((x, i) => {
    const y = c.y[i];
    if (c.skipped && typeof c.skipped[i] === "number") {
      if (c.skipped[i] > before) {
        const at = px(x);
        nodes.push(make("path", { style: `fill:${stroke}`, class: "skip",
          d: `M${at - 3.5} ${bottom}h7l-3.5 -7z` }));
      }
      before = c.skipped[i];
    }
    if (typeof y !== "number" || (r.log && y <= 0)) {
      if (typeof y === "string") {
        const at = px(x).toFixed(1);
        nodes.push(make("path", { class: "curve lost", style:
          `stroke:${stroke}`, d: `M${at - 3} ${TOP - 3}l6 6m0 -6l-6 6` }));
      }
      close(); isOpen = false;
      return;
    }
    lastX = px(x).toFixed(1); lastY = py(y).toFixed(1);
    d += `${isOpen ? "L" : "M"}${lastX} ${lastY}`;
    isOpen = true; run += 1;
  });
  const isEnd = run > 1;
  close();
  if (isEnd) dot(lastX, lastY, 2.4);
  nodes.unshift(make("path", { d: d || "M0 0", style: `stroke:${stroke}`,
    class: "curve" + (c.isDashed ? " dashed" : "") +
      (c.x.length > 300 ? " fine" : "") }));
  return nodes;
}

/* The place under the pointer, in all charts at once; values in one. */
function nearest(xs, x) {
  let low = 0, high = xs.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (xs[middle] <= x) low = middle; else high = middle;
  }
  return Math.abs(xs[high] - x) < Math.abs(xs[low] - x) ? high : low;
}
function point(view, event) {
  const box = view.svg.getBoundingClientRect();
  const place = event.clientX - box.left;
  let best = null;
  for (const c of view.curves) {
    const i = nearest(c.x, invert(view, place));
    if (best === null || Math.abs(view.px(c.x[i]) - place) <
        Math.abs(view.px(best) - place)) best = c.x[i];
  }
  if (best === null) return;
  for (const other of views) {
    const at = other.px(best);
    other.line.setAttribute("x1", at);
    other.line.setAttribute("x2", at);
    const isIn = other.curves.length && at >= LEFT - 1 &&
      at <= box.width - RIGHT + 1;
    other.line.setAttribute("visibility", isIn ? "visible" : "hidden");
    if (other !== view) other.tip.hidden = true;
  }
  tell(view, best, box.width);
}
function invert(view, place) {
  const a = view.px(0), b = view.px(1);
  return (place - a) / (b - a);
}
function tell(view, x, width) {
  const { tip, chart } = view;
  tip.replaceChildren(element("p", "at", `${state.axis} ${showX(x)}`));
  for (const c of view.curves) {
    const i = nearest(c.x, x);
    if (state.axis === "epoch" && c.x[i] !== x) continue;
    if (c.y[i] === null) continue;
    const row = element("p");
    const swatch = element("i", "swatch");
    swatch.style.setProperty("--c", colour(c.index));
    const many = chart.fields.length > 1;
    const name = data.runs.length > 1 ? c.run.name + " " : "";
    const kind = many ? chart.labels[chart.fields.indexOf(c.field)]
      : chart.fields[0] in c.run.test.values ? c.split : "";
    const value = isScale(chart) && typeof c.y[i] === "number"
      ? c.y[i].toLocaleString("en") + (c.skipped && c.skipped[i]
        ? `, ${c.skipped[i]} skipped` : "")
      : show(c.y[i], chart.unit);
    row.append(swatch, element("span", "name", name + kind),
               element("b", "", value));
    tip.append(row);
  }
  tip.hidden = false;
  /* Beside the line, on its roomier side, and within the window. */
  const frame = tip.parentNode.getBoundingClientRect();
  const box = view.svg.getBoundingClientRect();
  const at = box.left + view.px(x);
  const room = document.documentElement.clientWidth - tip.offsetWidth - 6;
  const wanted = at > box.left + width / 2 ? at - 12 - tip.offsetWidth
    : at + 12;
  tip.style.left = Math.max(6, Math.min(wanted, room)) - frame.left + "px";
  tip.style.top = "2.4rem";
}
function leave() {
  for (const view of views) {
    view.tip.hidden = true;
    view.line.setAttribute("visibility", "hidden");
  }
}

const views = data.charts.map(chart => {
  const figure = element("figure");
  const caption = element("figcaption", "", chart.title);
  const note = element("small");
  const svg = make("svg", { role: "img", "aria-label": chart.title });
  const tip = element("div", "tip");
  tip.hidden = true;
  caption.append(note);
  figure.append(caption, svg, tip);
  document.getElementById("charts").append(figure);
  const view = { chart, svg, tip, note };
  for (const kind of ["pointermove", "pointerdown"])
    svg.addEventListener(kind, event => point(view, event));
  svg.addEventListener("pointerleave", event => {
    if (event.pointerType === "mouse") leave();
  });
  return view;
});
const drawAll = () => views.forEach(draw);

function toggle(parent, name, isOn, act) {
  const button = element("button", "", name);
  button.type = "button";
  button.setAttribute("aria-pressed", isOn);
  button.addEventListener("click", () => { act(button); leave(); drawAll(); });
  parent.append(button);
  return button;
}
const runs = document.getElementById("runs");
data.runs.forEach((run, index) => {
  const button = toggle(runs, run.name, true, self => {
    if (!state.hidden.delete(index)) state.hidden.add(index);
    self.setAttribute("aria-pressed", !state.hidden.has(index));
  });
  const swatch = element("i", "swatch");
  swatch.style.setProperty("--c", colour(index));
  button.prepend(swatch);
});
const axes = document.getElementById("axes");
const choices = ["epoch", "step", "time"].map(axis =>
  toggle(axes, axis, axis === state.axis, self => {
    state.axis = axis;
    for (const one of choices)
      one.setAttribute("aria-pressed", one === self);
  }));
toggle(axes, "log", false, self => {
  state.log = !state.log;
  self.setAttribute("aria-pressed", state.log);
});
drawAll();
new ResizeObserver(drawAll).observe(document.getElementById("charts"));
document.documentElement.dataset.drawn = views.length;
</script>
</html>
"""
