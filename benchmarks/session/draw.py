"""Pictures and tables of a session, from its JSON: python benchmarks/session/draw.py OUT/session.json

Writes session.md and session.svg beside it. Needs nothing but Python.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

WIDTH, LEFT, BAR, GAP = 980, 470, 12, 4
COLOURS = ("#2b6cb0", "#c05621", "#2f855a", "#6b46c1", "#b83280", "#4a5568")
Row = dict[str, Any]
# keys of rows beside milliseconds, and their words
MORE = {"added_ms": "ms", "percent": "per cent", "predicted_percent": "per cent planned", "share": "share"}
MORE |= {"calls": "calls", "launches": "launches", "idle_ms": "ms idle", "collectives_ms": "ms in collectives"}
MORE |= {"peak_gib": "peak GiB", "predicted_gib": "GiB planned", "reserved_gib": "GiB reserved"}
MORE |= {"difference": "relative difference", "trace_mib": "trace MiB"}


def main() -> None:
    path = Path(sys.argv[1])
    session = json.loads(path.read_text())
    rows = [row for found in session["sections"].values() for row in found["rows"]]
    timed = [row for row in rows if "ms" in row]
    lines = [*table(session, ceilings(timed)), *cycle_table(rows)]
    path.with_suffix(".md").write_text("\n".join(lines) + "\n")
    path.with_suffix(".svg").write_text(picture(timed))


def ceilings(rows: Sequence[Row]) -> dict[str, float]:
    """The best rate that the session itself measured for a kind of work: operations or bytes a second."""
    best: dict[str, float] = {}
    for row in rows:
        if row["section"] == "ceilings":
            for kind, amount in row["work"].items():
                best[kind] = max(best.get(kind, 0.0), amount / row["ms"] * 1e3)
    return best


def rate(row: Row, best: dict[str, float]) -> str:
    """Operations a second, or bytes for work on memory alone, and as a part of the measured ceiling."""
    kinds, work = set(row["work"]), row["work"]
    if not kinds:
        return ""
    memory = kinds == {"memory"}
    amount = work["memory"] if memory else sum(each for kind, each in work.items() if kind != "memory")
    reached = amount / row["ms"] * 1e3
    ceiling = best.get("gemm fp8" if kinds == {"gemm fp8"} else "memory" if memory else "gemm")
    part = f" ({reached / ceiling:.0%})" if ceiling else ""
    return (f"{reached / 1e9:.0f} GB/s" if memory else f"{reached / 1e12:.1f} TF/s") + part


def table(session: dict[str, Any], best: dict[str, float]) -> Iterator[str]:
    """A table a section."""
    kind = "A rehearsal: its numbers mean nothing." if session["rehearsal"] else ""
    yield f"# Benchmark session, {session['began']}\n\n{session['gpu']}; commit {session['commit']}; {kind}"
    yield "\n" + ", ".join(f"{name} {value}" for name, value in session["versions"].items())
    for name, found in session["sections"].items():
        yield f"\n## {name}: {found['ended']}, {found['seconds']} s\n"
        yield "| case | by | shape | ms | again | predicted | measured / predicted | rate (of the ceiling) | more |"
        yield "|---|---|---|---|---|---|---|---|---|"
        for row in found["rows"]:
            cells = [row["case"], row["variant"], row["shape"]]
            if "ms" in row:
                predicted = row.get("predicted_ms")
                again = f"{row['ms_again']:.3f}" if "ms_again" in row else ""
                cells += [f"{row['ms']:.3f}", again, f"{predicted:.3f}" if predicted else "none"]
                cells += [f"{row['ms'] / predicted:.2f}" if predicted else "", rate(row, best), more(row)]
            elif "passed" in row:
                cells += [f"passed: {row['passed']}; {row['said']}", *[""] * 5]
            else:
                cells += [row.get("skipped", ""), *[""] * 4, more(row)]
            yield f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def more(row: Row) -> str:
    """What a row says beside milliseconds."""
    known = {key: row[key] for key in MORE if row.get(key) is not None}
    return ", ".join(f"{MORE[key]} {value:.4g}" for key, value in known.items())


def phases_of(rows: Sequence[Row], section: str, foresight: bool) -> list[Row]:
    """Rows of a cycle's phases, and of all of them, in the order that they came in."""
    return [row for row in rows if row["section"] == section and row.get("foresight") is foresight and "ms" in row]


def cycle_table(rows: Sequence[Row]) -> Iterator[str]:
    """The measured cycle by phase, with foresight and without, and how its total was predicted; nothing without one."""
    base, full = ({row["phase"]: row for row in phases_of(rows, "cycle", on)} for on in (False, True))
    if not base or not full:
        return
    yield "\n## The cycle by phase\n"
    yield "| phase | ms without foresight | planned | ms with | planned | peak GiB | planned |"
    yield "|---|---|---|---|---|---|---|"
    for phase, row in full.items():
        found = [each for pair in (base.get(phase, {}), row) for each in (pair.get("ms"), pair.get("predicted_ms"))]
        cells = [phase, *map(_rounded, found), *(_rounded(row.get(key), 2) for key in ("peak_gib", "predicted_gib"))]
        yield f"| {' | '.join(cells)} |"
    (added,) = [row for row in rows if "percent" in row]
    planned = f"planned {added['predicted_percent']:.1f} %" if "predicted_percent" in added else "not planned"
    yield f"\nForesight adds {added['percent']:.1f} % ({planned}). The same put together of blocks, in ms:\n"
    for row in (*phases_of(rows, "assembled", False), *phases_of(rows, "assembled", True)):
        if row["phase"] == "all":
            yield f"- {row['case']}, {row['variant']}: {row['ms']:.1f} (predicted: {_rounded(row['predicted_ms'])})"


def _rounded(value: float | None, digits: int = 1) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def stacks(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Cycles as milliseconds by phase: measured and planned, and as put together of blocks."""
    found: dict[str, dict[str, float]] = {}
    for on, name in ((False, "without foresight"), (True, "with foresight")):
        own = [row for row in phases_of(rows, "cycle", on) if row["phase"] != "all"]
        found[f"measured, {name}"] = {row["phase"]: row["ms"] for row in own}
        found[f"planned, {name}"] = {row["phase"]: row["predicted_ms"] for row in own if row["predicted_ms"]}
    for row in phases_of(rows, "assembled", True):
        if row["phase"] != "all":
            found.setdefault(f"of blocks, {row['variant']}", {})[row["phase"]] = row["ms"]
    return {name: phases for name, phases in found.items() if phases}


def stacked(found: dict[str, dict[str, float]], top: float) -> tuple[list[str], float]:
    """A bar a cycle, its phases one behind the other; and where the drawing ends."""
    if not found:
        return [], top
    phases = list(dict.fromkeys(phase for each in found.values() for phase in each))
    colours = {phase: f"hsl({360 * i / len(phases):.0f},55%,{45 + 15 * (i % 2)}%)" for i, phase in enumerate(phases)}
    scale = (WIDTH - LEFT - 90) / max(sum(each.values()) for each in found.values())
    parts, y = [text(10, top + 10, "a cycle by phase, milliseconds", "600")], top + 18
    for name, each in found.items():
        parts.append(text(LEFT - 6, y + 10, name, anchor="end"))
        x = float(LEFT)
        for phase, ms in each.items():
            size = f'x="{x:.1f}" y="{y:.1f}" width="{ms * scale:.1f}" height="{BAR}"'
            parts.append(f'<rect {size} fill="{colours[phase]}"><title>{escape(phase)}: {ms:.1f} ms</title></rect>')
            x += ms * scale
        parts.append(text(x + 8, y + 10, f"{sum(each.values()):.3g} ms"))
        y += BAR + GAP
    for index, (phase, colour) in enumerate(colours.items()):
        x, row = 10 + 240 * (index % 4), y + 6 + 16 * (index // 4)
        parts.append(f'<rect x="{x}" y="{row:.1f}" width="10" height="10" fill="{colour}"/>')
        parts.append(text(x + 16, row + 9, phase))
    return parts, y + 30 + 16 * ((len(phases) - 1) // 4)


def picture(rows: Sequence[Row]) -> str:
    """The cycle's phases; bars of milliseconds by case, with a tick at the prediction; predicted against measured."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if "phase" in row:
            continue
        groups.setdefault((row["section"], row["case"], row["shape"]), []).append(row)
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    parts, y = stacked(stacks(rows), 20)
    for (section, case, shape), members in groups.items():
        parts.append(text(10, y + 10, f"{section}: {case}, {shape}", "600"))
        y += 18
        longest = max(max(row["ms"], row.get("predicted_ms") or 0.0) for row in members)
        for row in members:
            parts += bar(row, y, longest, COLOURS[variants.index(row["variant"]) % len(COLOURS)])
            y += BAR + GAP
        y += 10
    parts += scatter([row for row in rows if row.get("predicted_ms")], y + 20)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + 440}" font-family="sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{y + 440}" fill="white"/>', *parts, "</svg>\n"])


def bar(row: Row, y: float, longest: float, colour: str) -> list[str]:
    scale = (WIDTH - LEFT - 90) / longest
    end = LEFT + row["ms"] * scale
    parts = [
        text(LEFT - 6, y + 10, row["variant"], anchor="end"),
        f'<rect x="{LEFT}" y="{y}" width="{row["ms"] * scale:.1f}" height="{BAR}" fill="{colour}"/>',
        text(end + 8, y + 10, f"{row['ms']:.3g} ms"),
    ]
    if row.get("predicted_ms"):
        x = LEFT + row["predicted_ms"] * scale
        parts.append(f'<path d="M{x:.1f} {y - 2}v{BAR + 4}" stroke="black" stroke-width="2"/>')
    return parts


def scatter(rows: Sequence[Row], top: float) -> list[str]:
    """Predicted (across) and measured (up) milliseconds, both logarithmic; the line is where they agree."""
    if not rows:
        return [text(10, top + 10, "nothing was predicted for this device")]
    numbers = [value for row in rows for value in (row["ms"], row["predicted_ms"])]
    low, high = math.log10(min(numbers)) - 0.1, math.log10(max(numbers)) + 0.1
    place = lambda value: 340 * (math.log10(value) - low) / (high - low)
    parts = [
        text(60, top, "measured against predicted milliseconds, logarithmic", "600"),
        f'<path d="M60 {top + 370}L400 {top + 30}" stroke="#999"/>',
        f'<path d="M60 {top + 30}V{top + 370}H400" fill="none" stroke="black"/>',
    ]
    for row in rows:
        x, y = 60 + place(row["predicted_ms"]), top + 370 - place(row["ms"])
        name = escape(f"{row['section']}: {row['case']} by {row['variant']}, {row['shape']}")
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="#2b6cb0"><title>{name}</title></circle>')
    return parts


def text(x: float, y: float, content: str, weight: str = "400", anchor: str = "start") -> str:
    style = f'font-size="11" font-weight="{weight}" text-anchor="{anchor}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(content)}</text>'


if __name__ == "__main__":
    main()
