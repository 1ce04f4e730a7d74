"""Charts as inline SVG: data in, markup out. Colours are CSS variables, so light and dark need one drawing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

COLOURS = 12  # --series-0 ... --series-11 of STYLE

STYLE = """
:root { --series-0:#7c8794; --series-1:#2e9e6b; --series-2:#b98a00; --series-3:#d9622b; --series-4:#2f6fe4;
  --series-5:#9257c9; --series-6:#c83e7c; --series-7:#1697a8; --series-8:#7a8f1f;
  --series-9:#8d6a55; --series-10:#5b5fd0; --series-11:#c9909f; }
@media (prefers-color-scheme: dark) { :root { --series-0:#98a3b1; --series-1:#4cc38a; --series-2:#d9ae33;
  --series-3:#f08a55; --series-4:#6ea0ff; --series-5:#b98ae6; --series-6:#ee79aa; --series-7:#4fc3d3;
  --series-8:#b3c85a; --series-9:#bf9a82; --series-10:#9094f0; --series-11:#e3b6c1; } }
figure.chart { margin:0; }
figure.chart svg { display:block; width:100%; height:auto; overflow:visible; }
figure.chart figcaption { font-weight:600; font-size:.92rem; margin-bottom:.15rem; }
figure.chart svg text { font:11px system-ui,sans-serif; fill:var(--muted); font-variant-numeric:tabular-nums; }
figure.chart svg .label { fill:var(--ink); font-size:12px; }
figure.chart svg .axis { stroke:var(--line-strong); stroke-width:1; }
figure.chart svg .rule { stroke:var(--line); stroke-width:1; }
figure.chart svg .zero { stroke:var(--muted); stroke-width:1; stroke-dasharray:3 3; }
.legend { display:flex; flex-wrap:wrap; gap:.1rem .9rem; font-size:.8rem; color:var(--muted); margin:.1rem 0 .35rem; }
.legend i { display:inline-block; width:.8em; height:.8em; border-radius:.2em; margin-right:.4em;
  vertical-align:-.06em; }
.scroll { overflow-x:auto; } .scroll > figure.chart > svg { min-width:620px; }
"""


@dataclass(frozen=True)
class Series:
    """One line. Series of the same name (one a seed) share a colour and a legend entry."""

    name: str
    x: list[float]
    y: list[float]
    spread: list[float] = field(default_factory=list)
    """Half height of a whisker at each point (a standard deviation); empty: none."""
    dashed: bool = False


@dataclass(frozen=True)
class LineChart:
    """Several series over one axis."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    log_y: bool = False
    smoothing: float = 0.0
    """Weight of the past in a moving average, in [0, 1); the raw line stays visible behind it."""
    markers: bool = False


@dataclass(frozen=True)
class IntervalRow:
    """One line of a forest plot: a point and its interval (nan: no interval). better None: undecided."""

    label: str
    middle: float
    low: float
    high: float
    better: bool | None
    note: str = ""

    @property
    def colour(self) -> str:
        return "var(--muted)" if self.better is None else ("var(--good)" if self.better else "var(--bad)")


class Palette:
    """A colour for each name, the same in every chart of a page."""

    def __init__(self, names: Sequence[str]) -> None:
        self._index = {name: index for index, name in enumerate(dict.fromkeys(names))}

    def colour(self, name: str) -> str:
        """CSS colour of `name`; a new name takes the next one."""
        return f"var(--series-{self._index.setdefault(name, len(self._index)) % COLOURS})"

    def legend(self, names: Sequence[str]) -> str:
        """Colour keys for `names`, each once; empty for a single name."""
        unique = list(dict.fromkeys(names))
        if len(unique) < 2:
            return ""
        keys = (f'<span><i style="background:{self.colour(name)}"></i>{escape(name)}</span>' for name in unique)
        return f'<div class="legend">{"".join(keys)}</div>'


def number(value: float, digits: int = 3) -> str:
    """Three significant digits for a reader: 0.0123, 4.56, 1230, 2.3e-7 as 2.3e−7; a true minus sign; nan as "–"."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
        text = f"{value:.{places}f}"
    else:
        text = f"{value:.{digits - 1}e}".replace("e-0", "e-").replace("e+0", "e")
    return text.replace("-", "−")


def signed(value: float, reach: float | None = None) -> str:
    """A difference with its sign, to the decimals that `reach` shows with three digits (default: the value itself).

    With the reach of an interval, the mean and both ends get the same decimals.
    """
    reach = abs(value) if reach is None or not math.isfinite(reach) else reach
    if not math.isfinite(value) or not 1e-4 <= reach < 1e5:
        return ("+" if value > 0 else "") + number(value)
    text = f"{value:+.{max(0, 2 - math.floor(math.log10(reach)))}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values (1, 2, 5 times a power of ten) in [low, high]."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """Powers of ten in [low, high], with 2 and 5 times them while there are few; round values if no power fits."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 3), (1, 2, 5)):
        found = [factor * 10.0**power for power in decades for factor in factors]
        inside = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(inside) >= 3:
            stride = -(-len(inside) // 6)
            return inside[::stride]
    return ticks(low, high, 4)


def smooth(values: Sequence[float], weight: float) -> list[float]:
    """Mean of a forward and a backward moving average, so that the curve does not lag behind its data.

    weight: what each average keeps of its past, in [0, 1). A non-finite value stays in its place and is
    passed over.
    """
    forward = _moving_average(values, weight)
    backward = _moving_average(values[::-1], weight)[::-1]
    return [(one + other) / 2 for one, other in zip(forward, backward, strict=True)]


def _moving_average(values: Sequence[float], weight: float) -> list[float]:
    """Exponential average with the bias of its start removed."""
    out, total, norm = [], 0.0, 0.0
    for value in values:
        if math.isfinite(value):
            total, norm = weight * total + (1 - weight) * value, weight * norm + (1 - weight)
            out.append(total / norm)
        else:
            out.append(value)
    return out


@dataclass(frozen=True)
class _Frame:
    """The plot area, and how data map to it."""

    x_low: float
    x_high: float
    y_low: float
    y_high: float
    log_y: bool
    left: float = 46
    right: float = 352
    top: float = 8
    bottom: float = 176

    def x(self, value: float) -> float:
        return self.left + (value - self.x_low) / (self.x_high - self.x_low) * (self.right - self.left)

    def y(self, value: float) -> float:
        low, high = self.y_low, self.y_high
        if self.log_y:
            low, high, value = math.log10(low), math.log10(high), math.log10(value)
        return self.bottom - (value - low) / (high - low) * (self.bottom - self.top)

    def shows(self, value: float) -> bool:
        return math.isfinite(value) and (value > 0 or not self.log_y)


def line_chart(chart: LineChart, palette: Palette) -> str:
    """A <figure> with title, legend and the SVG."""
    frame = _frame(chart)
    head = f"<figcaption>{escape(chart.title)}</figcaption>{palette.legend([s.name for s in chart.series])}"
    if frame is None:
        return f'<figure class="chart">{head}<p class="quiet">no data</p></figure>'
    body = _axes(frame, chart)
    for series in chart.series:
        body += _series(series, chart, frame, palette.colour(series.name))
    return _figure(head, (360, 212), f"{chart.title}: {chart.y_label} over {chart.x_label}", body)


def _figure(head: str, size: tuple[float, float], description: str, body: str) -> str:
    """head: caption and legend; size: width and height of the drawing; description: for screen readers."""
    box = f'viewBox="0 0 {size[0]:.0f} {size[1]:.0f}"'
    return f'<figure class="chart">{head}<svg {box} role="img" aria-label="{escape(description)}">{body}</svg></figure>'


def _frame(chart: LineChart) -> _Frame | None:
    """Limits that hold all data; None when there are none."""
    xs, ys = [], []
    for series in chart.series:
        whiskers = series.spread or [0.0] * len(series.y)
        for x, y, half in zip(series.x, series.y, whiskers, strict=True):
            if math.isfinite(y) and (y > 0 or not chart.log_y):
                xs.append(x)
                ys += [y] if chart.log_y or not math.isfinite(half) else [y - half, y + half]
    if not ys:
        return None
    low, high = min(ys), max(ys)
    if chart.log_y:
        low, high = (low / 1.15, high * 1.15)
    else:
        pad = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
        # A measure that starts near zero is drawn from zero, so that its height means something.
        low, high = (0.0 if 0 <= low < 0.25 * high else low - pad), high + pad
    x_low, x_high = min(xs), max(xs)
    if chart.markers or x_low == x_high:
        margin = (x_high - x_low) * 0.06 or 0.5
        x_low, x_high = x_low - margin, x_high + margin
    return _Frame(x_low, x_high, low, high, chart.log_y)


def _axes(frame: _Frame, chart: LineChart) -> str:
    parts = []
    for value in log_ticks(frame.y_low, frame.y_high) if chart.log_y else ticks(frame.y_low, frame.y_high):
        y = frame.y(value)
        parts.append(f'<line class="rule" x1="{frame.left}" x2="{frame.right}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{frame.left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(value)}</text>')
    values = ticks(frame.x_low, frame.x_high)
    if chart.markers and all(x == round(x) for series in chart.series for x in series.x):
        values = sorted({x for series in chart.series for x in series.x})
    for value in values:
        x = frame.x(value)
        parts.append(f'<text x="{x:.1f}" y="{frame.bottom + 15}" text-anchor="middle">{_tick(value)}</text>')
    parts.append(f'<line class="axis" x1="{frame.left}" x2="{frame.right}" y1="{frame.bottom}" y2="{frame.bottom}"/>')
    middle = (frame.left + frame.right) / 2
    parts.append(
        f'<text x="{middle}" y="{frame.bottom + 31}" text-anchor="middle">{escape(chart.x_label)}</text>'
        f'<text transform="translate(9 {(frame.top + frame.bottom) / 2}) rotate(-90)" text-anchor="middle">'
        f"{escape(chart.y_label)}</text>"
    )
    return "".join(parts)


def _tick(value: float) -> str:
    """A tick label: no digits that only repeat zeros."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{round(value, 10):.10g}".replace("-", "−")


def _series(series: Series, chart: LineChart, frame: _Frame, colour: str) -> str:
    dash = ' stroke-dasharray="5 4"' if series.dashed else ""
    stroke = f'fill="none" stroke="{colour}" stroke-linejoin="round" stroke-linecap="round"{dash}'
    parts = []
    drawn = series.y
    if chart.smoothing > 0 and len(series.y) > 8:
        parts.append(f'<path d="{_path(series.x, series.y, frame)}" {stroke} stroke-width="1" opacity=".28"/>')
        drawn = _smoothed(series.y, chart)
    parts.append(f'<path d="{_path(series.x, drawn, frame)}" {stroke} stroke-width="1.8"/>')
    if chart.markers:
        whiskers = series.spread or [0.0] * len(series.y)
        for x, y, half in zip(series.x, series.y, whiskers, strict=True):
            if frame.shows(y):
                parts.append(_marker(series.name, (x, y, half), frame, colour))
    return "".join(parts)


def _smoothed(values: Sequence[float], chart: LineChart) -> list[float]:
    if not chart.log_y:
        return smooth(values, chart.smoothing)
    logs = [math.log(value) if value > 0 else math.nan for value in values]
    return [math.exp(value) for value in smooth(logs, chart.smoothing)]


def _marker(name: str, point: tuple[float, float, float], frame: _Frame, colour: str) -> str:
    x, y, half = point
    at = frame.x(x)
    whisker, note = "", ""
    if half > 0 and not frame.log_y:
        whisker = (
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{frame.y(y - half):.1f}" y2="{frame.y(y + half):.1f}" '
            f'stroke="{colour}" stroke-width="1.4" opacity=".55"/>'
        )
        note = f" ± {number(half)}"
    title = f"<title>{escape(name)} at {_tick(x)}: {number(y)}{note}</title>"
    return f'{whisker}<circle cx="{at:.1f}" cy="{frame.y(y):.1f}" r="3.2" fill="{colour}">{title}</circle>'


def _path(xs: Sequence[float], ys: Sequence[float], frame: _Frame) -> str:
    """SVG path data, broken where a value cannot be shown."""
    parts, inside = [], False
    for x, y in zip(xs, ys, strict=True):
        if not frame.shows(y):
            inside = False
            continue
        place = f"{frame.x(x):.1f} {frame.y(y):.1f}"
        # A segment of length zero makes the round cap draw a point that stands alone.
        parts.append(f"L{place}" if inside else f"M{place}l0 0")
        inside = True
    return "".join(parts)


def interval_chart(title: str, x_label: str, rows: Sequence[IntervalRow]) -> str:
    """A forest plot: one line a row, a dashed line at zero; decided rows are coloured."""
    left, right, step = 236.0, 640.0, 26.0
    finite = [value for row in rows for value in (row.middle, row.low, row.high, 0.0) if math.isfinite(value)]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    pad = (high - low) * 0.08 or 1.0
    frame = _Frame(low - pad, high + pad, 0, 1, False, left=left, right=right)
    bottom = 10 + step * len(rows)
    parts = []
    for value in ticks(frame.x_low, frame.x_high, 6):
        x = frame.x(value)
        kind = "zero" if abs(value) < 1e-12 else "rule"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{bottom}"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{_tick(value)}</text>')
    for index, row in enumerate(rows):
        parts.append(_interval(row, frame, 10 + step * (index + 0.5)))
    parts.append(f'<text x="{(left + right) / 2}" y="{bottom + 31}" text-anchor="middle">{escape(x_label)}</text>')
    head = f"<figcaption>{escape(title)}</figcaption>"
    return _figure(head, (760, bottom + 38), title, "".join(parts))


def _interval(row: IntervalRow, frame: _Frame, y: float) -> str:
    colour = row.colour
    parts = [f'<text class="label" x="{frame.left - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(row.label)}</text>']
    if math.isfinite(row.low) and math.isfinite(row.high):
        parts.append(
            f'<line x1="{frame.x(row.low):.1f}" x2="{frame.x(row.high):.1f}" y1="{y:.1f}" y2="{y:.1f}" '
            f'stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        )
    parts.append(f'<circle cx="{frame.x(row.middle):.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>')
    parts.append(f'<text x="{frame.right + 12}" y="{y + 4:.1f}">{escape(row.note)}</text>')
    return "".join(parts)


def interval_strip(row: IntervalRow) -> str:
    """A small interval on its own scale, zero in the middle, for a table cell."""
    reach = max([abs(v) for v in (row.middle, row.low, row.high) if math.isfinite(v)], default=0.0) * 1.08 or 1.0
    frame = _Frame(-reach, reach, 0, 1, False, left=3, right=117)
    colour = row.colour
    line = ""
    if math.isfinite(row.low) and math.isfinite(row.high):
        line = (
            f'<line x1="{frame.x(row.low):.1f}" x2="{frame.x(row.high):.1f}" y1="9" y2="9" '
            f'stroke="{colour}" stroke-width="3" stroke-linecap="round"/>'
        )
    return (
        f'<svg class="strip" viewBox="0 0 120 18" width="120" height="18" role="img" aria-label="{escape(row.label)}">'
        f'<line x1="60" x2="60" y1="1" y2="17" stroke="var(--muted)" stroke-dasharray="2 2"/>{line}'
        f'<circle cx="{frame.x(row.middle):.1f}" cy="9" r="4" fill="{colour}"/></svg>'
    )


def stacked_bars(
    title: str, x_label: str, bars: Mapping[str, Mapping[str, float]], names: Sequence[str], palette: Palette
) -> str:
    """Horizontal bars, one a label, each the sum of its parts, drawn in the order of `names`."""
    longest = max((sum(parts.values()) for parts in bars.values()), default=0.0) or 1.0
    frame = _Frame(0.0, longest * 1.02, 0, 1, False, left=190, right=690)
    step, body = 30.0, []
    bottom = 4 + step * len(bars)
    for value in ticks(0.0, longest, 6):
        x = frame.x(value)
        body.append(f'<line class="rule" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{bottom}"/>')
        body.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{_tick(value)}</text>')
    for index, (label, parts) in enumerate(bars.items()):
        ordered = {name: parts[name] for name in names if name in parts}
        body.append(_bar(label, ordered, (frame, 4 + step * index), palette))
    middle = (frame.left + frame.right) / 2
    body.append(f'<text x="{middle}" y="{bottom + 31}" text-anchor="middle">{escape(x_label)}</text>')
    head = f"<figcaption>{escape(title)}</figcaption>{palette.legend(names)}"
    return _figure(head, (760, bottom + 38), title, "".join(body))


def _bar(label: str, parts: Mapping[str, float], place: tuple[_Frame, float], palette: Palette) -> str:
    frame, y = place
    body = [f'<text class="label" x="{frame.left - 10}" y="{y + 17:.1f}" text-anchor="end">{escape(label)}</text>']
    start = 0.0
    for name, seconds in parts.items():
        x, end = frame.x(start), frame.x(start + seconds)
        body.append(
            f'<rect x="{x:.1f}" y="{y + 2:.1f}" width="{end - x:.2f}" height="22" fill="{palette.colour(name)}">'
            f"<title>{escape(name)}: {number(seconds)}</title></rect>"
        )
        start += seconds
    body.append(f'<text x="{frame.x(start) + 6:.1f}" y="{y + 17:.1f}">{number(start)}</text>')
    return "".join(body)
