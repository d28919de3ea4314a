"""A report on numerics as a picture and as a page: exponents by layer."""

import dataclasses
import html
import math
import pathlib
import re
from collections.abc import Iterator, Sequence
from typing import Any

from dist_amp.advice import LayerNumerics
from dist_amp.numerics import Report
from dist_amp.ranges import SMALLEST, SMALLEST_NORMAL, Range

_LARGEST = 15  # exponent of float16's 65504
_NARROWEST = (-32, 20)  # what the axis shows at least, and
_WIDEST = (-56, 40)  # at most; what is beyond is drawn at its end
_MAX_NAME = 40
_SHADES = {"lost": "#f6d5d0", "few": "#fbeee0", "held": "#f3f6f9"}
_TITLES = (
    "output",
    "its gradient, unscaled",
    "gradient of the weights, unscaled",
)


@dataclasses.dataclass(frozen=True)
class Row:
    """A layer in the picture.

    Attributes:
        numbers: The layer's.
        strips: Its output, the gradient by it, those by its weights.
        reasons: Why it is to be in float32; none if it is not.
    """

    numbers: LayerNumerics
    strips: Sequence[Range | None]
    reasons: Sequence[str]


def rows_of(report: Report) -> list[Row]:
    """The layers that compute and were called, in the model's order."""
    reasons = {pin.layer: pin.reasons for pin in report.advice.pins}
    return [
        Row(
            numbers,
            (
                numbers.output,
                numbers.output_gradient,
                _of_weights(report, numbers.path),
            ),
            reasons.get(numbers.path, ()),
        )
        for numbers in report.layers
        if numbers.num_calls and not numbers.only_passes_on
    ]


def percent(error: float | None) -> str:
    """A relative error for people."""
    if error is None:
        return "-"
    if math.isinf(error):
        return "overflow"
    return f"{100 * error:.2g}%" if error < 10 else ">1000%"


def write_png(report: Report, path: str | pathlib.Path) -> None:
    """Draws the heat map; needs matplotlib.

    Raises:
        ImportError: There is no matplotlib.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "The picture needs matplotlib (`pip install matplotlib`); the "
            "page (`write_html`) shows the same without it."
        ) from error
    rows = rows_of(report)
    figure = Figure(figsize=(13, 1.55 + 0.27 * len(rows)), dpi=150)
    FigureCanvasAgg(figure)
    inches = figure.get_figheight()
    axes = figure.subplots(1, 3, sharey=True)
    low, high = _axis(rows)
    for index, axis in enumerate(axes):
        _draw(axis, [row.strips[index] for row in rows], low, high)
        axis.set_title(_TITLES[index], fontsize=10, loc="left", pad=18)
    _label(axes, rows)
    figure.suptitle(
        re.sub(r"2\^(-?\d+)", r"$2^{\1}$", _headline(report)),
        x=0.012,
        y=1 - 0.1 / inches,
        ha="left",
        va="top",
        fontsize=12,
        fontweight="bold",
    )
    figure.subplots_adjust(
        left=min(0.34, 0.03 + 0.0075 * _width(rows)),
        right=0.93,
        bottom=0.35 / inches,
        top=1 - 1.0 / inches,
        wspace=0.04,
    )
    figure.savefig(path)


def write_html(report: Report, path: str | pathlib.Path) -> None:
    """Writes the page; it needs nothing beside itself."""
    pathlib.Path(path).write_text(to_html(report), encoding="utf-8")


def to_html(report: Report) -> str:
    """The page: a strip of exponents for each layer, and the advice."""
    rows = rows_of(report)
    low, high = _axis(rows)
    return _PAGE.format(
        headline=_text(_headline(report)),
        advice="\n".join(_advice(report)),
        axis=_svg_axis(low, high),
        rows="\n".join(_card(row, low, high) for row in rows),
    )


# -------------------------------------------------------------------- private


def _of_weights(report: Report, path: str) -> Range | None:
    found = None
    for variable in report.variables:
        if variable.layer == path and variable.gradient:
            gradient = variable.gradient
            found = found.merged(gradient) if found else gradient
    return found


def _axis(rows: Sequence[Row]) -> tuple[int, int]:
    """The first and the last exponent to show."""
    exponents = [
        e for row in rows for r in row.strips if r for e in r.exponents
    ]
    low, high = _NARROWEST
    return (
        max(_WIDEST[0], min([low, *exponents])),
        min(_WIDEST[1], max([high, *exponents])),
    )


def _shares(found: Range | None, low: int, high: int) -> dict[int, float]:
    """The share of nonzero numbers at each exponent of the axis."""
    shares: dict[int, float] = {}
    if found is None:
        return shares
    total = sum(found.exponents.values())
    for exponent, count in found.exponents.items():
        place = min(max(exponent, low), high)
        shares[place] = shares.get(place, 0.0) + count / total
    return shares


def _headline(report: Report) -> str:
    pins = len(report.advice.pins)
    words = {0: "float16 holds every layer", 1: "1 layer needs float32"}
    head = words.get(pins, f"{pins} layers need float32")
    if report.advice.window is None:
        return head
    return f"{head}; loss scale {report.advice.window}"


def _width(rows: Sequence[Row]) -> int:
    return max(len(_short(row.numbers.path)) for row in rows)


def _short(path: str) -> str:
    return path if len(path) <= _MAX_NAME else f"\u2026{path[1 - _MAX_NAME :]}"


def _draw(
    axis: Any, strips: Sequence[Range | None], low: int, high: int
) -> None:
    """One heat map, with what float16 cannot hold shaded."""
    axis.set_xlim(low, high + 1)
    axis.set_ylim(len(strips) - 0.5, -0.5)
    for begin, end, shade in (
        (low, SMALLEST, _SHADES["lost"]),
        (SMALLEST, SMALLEST_NORMAL, _SHADES["few"]),
        (_LARGEST + 1, high + 1, _SHADES["lost"]),
    ):
        axis.axvspan(begin, end, color=shade, zorder=0, linewidth=0)
    for row, found in enumerate(strips):
        axis.axhline(row, color="#dfe4ea", linewidth=0.6, zorder=1)
        for exponent, share in _shares(found, low, high).items():
            axis.barh(
                row,
                1,
                left=exponent,
                height=0.82,
                align="center",
                color=_colour(share),
                zorder=2,
            )
    for border in (SMALLEST, SMALLEST_NORMAL, _LARGEST + 1):
        axis.axvline(border, color="#b4463a", linewidth=0.8, zorder=3)
    texts = (
        ((low + SMALLEST) / 2, "0"),
        ((SMALLEST + SMALLEST_NORMAL) / 2, "few bits"),
        ((SMALLEST_NORMAL + _LARGEST + 1) / 2, "float16"),
        ((_LARGEST + high + 2) / 2, "inf"),
    )
    for place, text in texts:
        axis.text(
            place,
            1.01,
            text,
            transform=axis.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=6.5,
            color="#8a3a30" if text != "float16" else "#333333",
        )


def _label(axes: Any, rows: Sequence[Row]) -> None:
    """Names on the left, errors on the right, powers of two below."""
    names = [_short(row.numbers.path) for row in rows]
    axes[0].set_yticks(range(len(rows)), names, fontsize=8)
    for label, row in zip(axes[0].get_yticklabels(), rows, strict=True):
        if row.reasons:
            label.set_color("#b4463a")
            label.set_fontweight("bold")
    for axis in axes:
        axis.tick_params(length=0)
        for side in axis.spines.values():
            side.set_visible(False)
        low, high = (round(limit) for limit in axis.get_xlim())
        ticks = [e for e in range(-60, 60, 10) if low <= e <= high]
        axis.set_xticks(ticks, [f"$2^{{{e}}}$" for e in ticks], fontsize=7)
    right = axes[-1].get_yaxis_transform()
    for place, row in enumerate(rows):
        axes[-1].text(
            1.02,
            place,
            percent(row.numbers.float16_error),
            transform=right,
            va="center",
            fontsize=7.5,
            color="#b4463a" if row.reasons else "#333333",
        )
    axes[-1].text(
        1.02,
        1.01,
        "error in\nfloat16",
        transform=axes[-1].transAxes,
        va="bottom",
        fontsize=6.5,
    )


def _colour(share: float) -> str:
    """From a light to a dark blue; small shares are seen, too."""
    light, dark = (205, 222, 238), (16, 55, 105)
    weight = math.sqrt(share)
    mixed = (
        round(a + (b - a) * min(1.0, 1.35 * weight))
        for a, b in zip(light, dark, strict=True)
    )
    return "#" + "".join(f"{part:02x}" for part in mixed)


def _advice(report: Report) -> Iterator[str]:
    for pin in report.advice.pins:
        reasons = "; ".join(pin.reasons)
        yield (
            f"<li><b>{_text(pin.layer)}</b> to float32: {_text(reasons)}</li>"
        )
    if report.advice.loss_scale is not None:
        yield _text(f"loss scale: {report.advice.window}").join(
            ("<li>", "</li>")
        )
    for note in report.advice.notes:
        yield f"<li>{_text(note)}</li>"


def _text(words: str) -> str:
    """For HTML, with the exponents of two raised."""
    return re.sub(
        r"2\^(-?)(\d+)",
        lambda m: f"2<sup>{'&minus;' * bool(m[1])}{m[2]}</sup>",
        html.escape(words),
    )


def _card(row: Row, low: int, high: int) -> str:
    numbers = row.numbers
    lines = [
        _strip(title, found, low, high)
        for title, found in zip(_TITLES, row.strips, strict=True)
        if found and found.num_values
    ]
    reasons = "".join(
        f'<p class="why">{_text(reason)}</p>' for reason in row.reasons
    )
    return (
        f'<section class="{"pin" if row.reasons else "fits"}">'
        f"<h2>{_text(numbers.path)}"
        f"<small>{_text(numbers.kind)} &middot; {_errors(numbers)}</small></h2>"
        f"{reasons}{''.join(lines)}</section>"
    )


def _errors(numbers: LayerNumerics) -> str:
    words = [
        f"{percent(error)} {'' if math.isinf(error) else 'off '}in {dtype}"
        for dtype, error in (
            ("float16", numbers.float16_error),
            ("bfloat16", numbers.bfloat16_error),
        )
        if error is not None
    ]
    return ", ".join(words) or "errors unknown"


def _strip(title: str, found: Range, low: int, high: int) -> str:
    span = high + 1 - low
    cells = "".join(
        f'<rect x="{exponent - low}" y="0" width="1.02" height="1" '
        f'fill="{_colour(share)}"><title>2^{exponent}: {share:.2%}</title>'
        "</rect>"
        for exponent, share in sorted(_shares(found, low, high).items())
    )
    words = [f"{found.smallest:.2g} to {found.largest:.2g}"]
    if found.share_over:
        words.append(f"{found.share_over:.1%} beyond 65504")
    if found.share_below_smallest:
        words.append(f"{found.share_below_smallest:.1%} below 2^-24")
    if found.share_below_normal:
        words.append(f"{found.share_below_normal:.1%} below 2^-14")
    if not found.is_finite:
        words.append("inf or NaN")
    if "gradient" in title and found.window:
        words.append(f"loss scale {found.window}")
    return (
        f'<p class="what">{title}<span>{_text(", ".join(words))}</span></p>'
        f'<svg viewBox="0 0 {span} 1" preserveAspectRatio="none" role="img" '
        f'aria-label="{title}: {words[0]}">{_zones(low, high)}{cells}'
        f"{_borders(low)}</svg>"
    )


def _zones(low: int, high: int) -> str:
    zones = (
        (low, SMALLEST, "lost"),
        (SMALLEST, SMALLEST_NORMAL, "few"),
        (SMALLEST_NORMAL, _LARGEST + 1, "held"),
        (_LARGEST + 1, high + 1, "lost"),
    )
    return "".join(
        f'<rect class="{kind}" x="{begin - low}" y="0" '
        f'width="{end - begin}" height="1" fill="{_SHADES[kind]}"/>'
        for begin, end, kind in zones
    )


def _borders(low: int) -> str:
    return "".join(
        f'<line x1="{border - low}" x2="{border - low}" y1="0" y2="1" '
        'stroke="#b4463a"/>'
        for border in (SMALLEST, SMALLEST_NORMAL, _LARGEST + 1)
    )


def _svg_axis(low: int, high: int) -> str:
    """The zones with their names, and the powers of two at their borders."""
    span = high + 1 - low
    zones = (
        (low, SMALLEST, "0", ""),
        (SMALLEST, SMALLEST_NORMAL, "few bits", f"2^{SMALLEST}"),
        (SMALLEST_NORMAL, _LARGEST + 1, "float16", f"2^{SMALLEST_NORMAL}"),
        (_LARGEST + 1, high + 1, "inf", "65504"),
    )
    return "".join(
        f'<span style="left:{100 * (begin - low) / span:.3f}%;'
        f'width:{100 * (end - begin) / span:.3f}%"><i>{_text(border)}</i>{name}'
        "</span>"
        for begin, end, name, border in zones
    )


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Numerics</title>
<style>
:root {{ --ink: #1c2430; --soft: #5c6673; --paper: #fff; --line: #e3e7ec;
  --red: #b4463a; --lost: #f6d5d0; --few: #fbeee0; --held: #f3f6f9 }}
@media (prefers-color-scheme: dark) {{ :root {{ --ink: #e8ecf1;
  --soft: #9aa5b1; --paper: #14181d; --line: #2a3139; --red: #ef8a7d }} }}
* {{ box-sizing: border-box }}
body {{ font: 15px/1.45 system-ui, sans-serif; color: var(--ink);
  background: var(--paper); max-width: 60rem; margin: 0 auto; padding: 1rem }}
h1 {{ font-size: 1.3rem; margin: 0 0 .5rem }}
ul {{ margin: 0 0 1.2rem; padding-left: 1.2rem }}
header {{ position: sticky; top: 0; background: var(--paper); z-index: 1;
  padding: .4rem 0; border-bottom: 1px solid var(--line) }}
.axis {{ position: relative; height: 2.5rem; font-size: .72rem;
  color: var(--soft) }}
.axis span {{ position: absolute; top: 0; height: 100%; text-align: center;
  padding-top: 1.2rem; overflow: visible; white-space: nowrap }}
.axis i {{ position: absolute; left: 0; top: 0; transform: translateX(-50%);
  font-style: normal; color: var(--red) }}
section {{ padding: .7rem 0; border-bottom: 1px solid var(--line) }}
h2 {{ font-size: .95rem; margin: 0 0 .2rem; overflow-wrap: anywhere }}
h2 small {{ font-weight: normal; color: var(--soft); margin-left: .6rem }}
.pin h2, .why {{ color: var(--red) }}
.why {{ margin: 0 0 .2rem; font-size: .85rem }}
.what {{ margin: .35rem 0 .1rem; font-size: .75rem; color: var(--soft);
  display: flex; flex-wrap: wrap; justify-content: space-between; gap: 0 1rem }}
sup {{ font-size: .7em; line-height: 0 }}
svg {{ display: block; width: 100%; height: 1.05rem; border-radius: 3px }}
svg .lost {{ fill: var(--lost) }}
svg .few {{ fill: var(--few) }}
svg .held {{ fill: var(--held) }}
svg line {{ stroke-width: 1px; vector-effect: non-scaling-stroke }}
</style>
<h1>{headline}</h1>
<ul>
{advice}
</ul>
<header><div class="axis">{axis}</div></header>
{rows}
</html>
"""
