"""The report of a run: what it holds (dataclasses that survive JSON), what it concludes, and one HTML page.

The page needs nothing but itself: videos, charts, style and script are inside. The renderer formats and
never measures; each sentence of the summary follows from numbers in the Report.
"""

from __future__ import annotations

import base64
import json
import math
import os
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mirai_dist.evaluate import charts
from mirai_dist.evaluate.charts import IntervalRow, LineChart, Palette, Series, number, signed
from mirai_dist.evaluate.statistics import Paired, difference_in_differences, paired
from mirai_dist.evaluate.video_files import poster

SCHEMA_VERSION = 2
T = TypeVar("T")


@dataclass(frozen=True)
class Cell:
    """Mean and standard deviation over n seeds (sd is nan for one)."""

    mean: float
    sd: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Cell:
        """The cell of one value a seed; nothing measured gives (nan, nan, 0)."""
        if len(values) == 0:
            return cls(math.nan, math.nan, 0)
        sd = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(float(np.mean(values)), sd, len(values))


@dataclass(frozen=True)
class QualityRow:
    """One measure of the videos of every arm, and the paired difference treatment - baseline over seeds."""

    metric: str
    cells: dict[str, Cell]
    difference: Paired | None
    unit: str = ""
    higher_is_better: bool = True
    note: str = ""

    @classmethod
    def measured(
        cls,
        metric: str,
        values: Mapping[str, Sequence[float]],
        pair: tuple[str, str],
        unit: str = "",
        higher_is_better: bool = True,
        note: str = "",
    ) -> QualityRow:
        """values: arm -> one number a seed, the same seeds in the same order; pair: (treatment, baseline)."""
        treatment, baseline = (values[name] for name in pair)
        differences = [a - b for a, b in zip(treatment, baseline, strict=True)]
        cells = {name: Cell.of(numbers) for name, numbers in values.items()}
        return cls(metric, cells, paired(differences, higher_is_better), unit, higher_is_better, note)


@dataclass(frozen=True)
class StageStep:
    """What one stage, or one arm of the study, buys: its mean score, and `gain` over its parent's samples, paired by
    prompt (None: it starts from nothing that was sampled). seconds: of training; of an arm, the mean over seeds."""

    name: str
    kind: str
    parent: str
    frames_per_segment: int  # 0: all frames at once
    cycles: int
    seconds: float
    score: float
    gain: Paired | None


@dataclass(frozen=True)
class ProbeLine:
    """Readout PSNR of one arm or control: a cell for each of ProbeResult.ks (nan where it has no meaning)."""

    name: str
    cells: list[Cell]
    control: bool = False


@dataclass(frozen=True)
class Claim:
    """Difference in differences at k segments ahead: (treatment_k - treatment_0) - (against_k - against_0)."""

    against: str
    k: int
    difference: Paired


@dataclass(frozen=True)
class Precondition:
    """Whether the base model uses its history at all; if not, the probe cannot speak about foresight.

    error: its x0 error from pure noise given the history; references: errors without that history (the mean
    predictor, another clip's history); required_ratio: error / best reference must not exceed this.
    """

    error: float
    references: dict[str, float]
    required_ratio: float

    @property
    def passed(self) -> bool:
        return self.error <= self.required_ratio * min(self.references.values())


@dataclass(frozen=True)
class ProbeResult:
    """The future-readout probe: a small decoder from frozen states to frames k segments ahead."""

    ks: list[int]
    lines: list[ProbeLine]
    claims: list[Claim]
    precondition: Precondition | None = None
    unit: str = "dB"

    @classmethod
    def measured(
        cls,
        psnr: Mapping[str, Mapping[int, Sequence[float]]],
        treatment: str,
        against: Sequence[str],
        precondition: Precondition | None,
    ) -> ProbeResult:
        """psnr: name -> k -> one value a seed. Names that are neither treatment nor in `against` are controls,
        which may lack some k (a copied current frame is perfect at k = 0)."""
        ks = sorted(psnr[treatment])
        lines = []
        for name, by_k in psnr.items():
            cells = [Cell.of(by_k.get(k, [])) for k in ks]
            lines.append(ProbeLine(name, cells, control=name != treatment and name not in against))
        claims = [
            Claim(name, k, difference)
            for name in against
            for k, difference in difference_in_differences(psnr[treatment], psnr[name]).items()
        ]
        return cls(ks, lines, sorted(claims, key=lambda claim: claim.k), precondition)


@dataclass(frozen=True)
class VideoRow:
    """Videos of one prompt: column -> mp4 file, relative to the run directory. A column may be missing."""

    prompt: str
    paths: dict[str, str]


@dataclass(frozen=True)
class VideoTable:
    """Sample videos side by side, in the order of `columns`."""

    columns: list[str]
    rows: list[VideoRow]
    note: str = ""


@dataclass(frozen=True)
class GateRow:
    """One measure of a gate: its median over `clips` clips, the bounds, and how many clips were outside.

    reference: the median of clean clips, of which the bounds are multiples; nan where they are absolute.
    """

    measure: str
    median: float
    low: float
    high: float
    reference: float
    outside: int
    clips: int


@dataclass(frozen=True)
class GateResult:
    """What the gate before a stage said of the stage's start; `failing`: share of clips that may be outside."""

    stage: str
    start: str
    passed: bool
    failing: float
    measures: list[GateRow]


@dataclass(frozen=True)
class StageCurves:
    """Training curves of one stage."""

    stage: str
    charts: list[LineChart]


@dataclass(frozen=True)
class AlarmChange:
    """An alarm that rose or cleared at the end of a cycle, in its own words."""

    cycle: int
    raised: bool
    sentence: str


@dataclass(frozen=True)
class RunAlarms:
    """What the alarms of one training run said, in order. silence: why they could not say anything, if so."""

    run: str
    changes: list[AlarmChange]
    silence: str = ""

    @property
    def raised(self) -> int:
        return sum(change.raised for change in self.changes)


@dataclass(frozen=True)
class Timing:
    """Mean seconds of one cycle of a stage, by phase ("unaccounted" included)."""

    label: str
    seconds: dict[str, float]


@dataclass(frozen=True)
class Provenance:
    """What produced the numbers."""

    command: str
    commit: str
    machine: str
    recipe_digest: str
    versions: dict[str, str]
    stage_seconds: dict[str, float]


@dataclass(frozen=True)
class Report:
    """Everything the page shows.

    order: every name that has a colour, in the order ground truth, stages, arms, then controls (colours are given out
    in that order). treatment, baseline: the compared arms.
    """

    name: str
    created: str
    treatment: str
    baseline: str
    order: list[str]
    seeds: list[int]
    provenance: Provenance
    steps: list[StageStep] = field(default_factory=list)
    quality: list[QualityRow] = field(default_factory=list)
    probe: ProbeResult | None = None
    videos: VideoTable | None = None
    gates: list[GateResult] = field(default_factory=list)
    curves: list[StageCurves] = field(default_factory=list)
    alarms: list[RunAlarms] = field(default_factory=list)
    timing: list[Timing] = field(default_factory=list)
    recipe_yaml: str = ""
    effective_yaml: str = ""
    notes: list[str] = field(default_factory=list)
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> str:
        """Strict JSON; non-finite floats become the strings "nan", "inf", "-inf"."""
        return strict_json(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The inverse of to_json. ValueError for another schema version, an unknown or a missing key."""
        data = json.loads(text)
        if data.get("schema_version") != SCHEMA_VERSION:
            raise ValueError(f"report schema {data.get('schema_version')}; this version reads {SCHEMA_VERSION}")
        return _decode(cls, data, "report")


def write(run_dir: Path, report: Report) -> Path:
    """Write RUN/report.json and RUN/report.html; the path of the latter. FileNotFoundError for a missing video."""
    run_dir = Path(run_dir)
    html = render(report, run_dir)
    for name, text in (("report.json", report.to_json()), ("report.html", html)):
        beside = run_dir / (name + ".new")
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, run_dir / name)
    return run_dir / "report.html"


def series_of(records: Iterable[Mapping[str, Any]], metric: str, name: str) -> Series:
    """The curve of `metric` over cycles in records of a metrics.jsonl, under `name`; those without it are passed
    over."""
    xs, ys = [], []
    for record in records:
        if metric in record:
            xs.append(float(record["cycle"]))
            ys.append(float(record[metric]))
    return Series(name, xs, ys)


# --- JSON ----------------------------------------------------------------------------------------------------


def strict_json(value: Any) -> str:
    """JSON that any reader takes; non-finite floats become the strings "nan", "inf", "-inf", which float() reads."""
    return json.dumps(_plain(value), indent=1, allow_nan=False)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _decode(kind: type[T], data: Any, where: str) -> T:
    """`data` as the dataclass `kind`; `where` names the place in messages."""
    hints = typing.get_type_hints(kind)
    unknown = set(data) - set(hints)
    if unknown:
        raise ValueError(f"{where}: unknown key {sorted(unknown)[0]!r}; known are {', '.join(sorted(hints))}")
    missing = {item.name for item in fields(kind)} - set(data)  # type: ignore[arg-type]
    if missing:
        raise ValueError(f"{where}: key {sorted(missing)[0]!r} is missing")
    return kind(**{key: _decode_value(hints[key], value, f"{where}.{key}") for key, value in data.items()})


def _decode_value(hint: Any, value: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return None if value is None else _decode_value(arguments[0], value, where)
    if origin is list:
        return [_decode_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value)]
    if origin is dict:
        return {key: _decode_value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if is_dataclass(hint):
        return _decode(typing.cast(type, hint), value, where)
    return float(value) if hint is float else value


# --- Conclusions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """One row's outcome. verdict: better, worse, undecided or void."""

    subject: str
    verdict: str
    text: str


def verdict(difference: Paired, higher_is_better: bool = True) -> str:
    """ "better" or "worse" when the 95 % interval leaves zero out, else "undecided"."""
    if not difference.excludes_zero:
        return "undecided"
    return "better" if (difference.mean > 0) == higher_is_better else "worse"


def claim_verdict(probe: ProbeResult, claim: Claim) -> str:
    """The verdict on a claim, "void" when the base model does not use its history."""
    if probe.precondition is not None and not probe.precondition.passed:
        return "void"
    return verdict(claim.difference)


def findings(report: Report) -> list[Finding]:
    """The outcome of each compared quality row and each probe claim."""
    found = []
    for row in report.quality:
        if row.difference is not None:
            outcome = verdict(row.difference, row.higher_is_better)
            found.append(Finding(row.metric, outcome, _in_words(row.difference, row.unit)))
    if report.probe is not None:
        for claim in report.probe.claims:
            outcome = claim_verdict(report.probe, claim)
            subject = f"Future readout, {_ahead(claim.k)}, against {claim.against}"
            found.append(Finding(subject, outcome, _in_words(claim.difference, report.probe.unit)))
    return found


def summary(report: Report) -> list[str]:
    """Plain sentences, each following from the report's numbers."""
    sentences = [*_quality_sentences(report), *_probe_sentences(report), *_alarm_sentences(report)]
    intervals = [row.difference for row in report.quality if row.difference is not None]
    intervals += [claim.difference for claim in report.probe.claims] if report.probe else []
    count = sum(difference.n > 1 for difference in intervals)
    if count > 1:
        sentences.append(
            f"{count} intervals of 95 % are read at once: if nothing at all were different, about "
            f"{number(0.05 * count, 2)} of them would still leave zero out."
        )
    return sentences


def _quality_sentences(report: Report) -> list[str]:
    outcomes: dict[str, list[str]] = {"better": [], "worse": [], "undecided": []}
    for row in report.quality:
        if row.difference is not None:
            outcomes[verdict(row.difference, row.higher_is_better)].append(row.metric)
    total = sum(len(names) for names in outcomes.values())
    if total == 0:
        return ["No measure was taken on both arms, so nothing can be said about quality."]
    if len(report.seeds) == 1:
        return [f"One seed was trained: {total} differences are listed, none has an interval, and none is claimed."]
    parts = []
    words = {
        "better": "better in",
        "worse": "worse in",
        "undecided": f"not distinguishable from {report.baseline} at this size in",
    }
    for outcome, names in outcomes.items():
        listed = f" ({', '.join(names)})" if names else ""
        parts.append(f"{words[outcome]} {len(names)}{listed}")
    return [
        f"Measured quality, {report.treatment} against {report.baseline} over {len(report.seeds)} seeds: "
        f"of {total} {_plural(total, 'row')}, {report.treatment} is {parts[0]}, {parts[1]}, and {parts[2]}."
    ]


def _probe_sentences(report: Report) -> list[str]:
    probe = report.probe
    if probe is None:
        return ["The future-readout probe was not run."]
    condition = probe.precondition
    if condition is not None and not condition.passed:
        return [
            f"The base model does not clearly use its history (error {number(condition.error)} against "
            f"{number(min(condition.references.values()))} without it), so the future-readout probe cannot speak "
            f"about foresight, whatever it shows."
        ]
    outcomes: dict[str, list[int]] = {}
    for k in sorted({claim.k for claim in probe.claims}):
        claims = [claim for claim in probe.claims if claim.k == k]
        won = [claim.against for claim in claims if verdict(claim.difference) == "better"]
        lost = [claim.against for claim in claims if verdict(claim.difference) == "worse"]
        if len(won) == len(claims):
            text = f"gains more than {_listed(won)}"
        elif won:
            rest = [claim.against for claim in claims if claim.against not in won]
            text = f"gains more than {_listed(won)}, but this is not shown against {_listed(rest, 'or')}"
        else:
            names = _listed([claim.against for claim in claims], "or")
            text = f"shows no gain distinguishable from zero at this size against {names}"
        if lost:
            text += f"; it is worse than {_listed(lost)}"
        outcomes.setdefault(text, []).append(k)
    return [
        f"Future readout {_ahead(*ks)}, beyond what is gained on the present: {report.treatment} {text}."
        for text, ks in outcomes.items()
    ]


def _alarm_sentences(report: Report) -> list[str]:
    runs = [each.run for each in report.alarms if each.raised]
    return [f"Alarms were raised in {len(runs)} of {len(report.alarms)} runs: {_listed(runs)}."] if runs else []


def _in_words(difference: Paired, unit: str) -> str:
    if difference.n == 1:
        return f"{signed(difference.mean)}{_unit(unit)}, one seed, no interval"
    wins = f"better in {difference.wins} of {difference.n} seeds"
    return f"{signed(difference.mean, _reach(difference))}{_unit(unit)} {_interval(difference)}, {wins}"


def _ahead(*ks: int) -> str:
    return f"{_listed([str(k) for k in ks])} {_plural(ks[-1], 'segment')} ahead"


def _plural(count: int, word: str) -> str:
    return word if count == 1 else word + "s"


def _listed(names: Sequence[str], joint: str = "and") -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} {joint} {names[-1]}"


def _unit(unit: str) -> str:
    return f" {unit}" if unit else ""


def _interval(difference: Paired) -> str:
    if math.isnan(difference.low):
        return "–"
    reach = _reach(difference)
    return f"[{signed(difference.low, reach)}, {signed(difference.high, reach)}]"


def _reach(difference: Paired) -> float:
    """The largest number of an interval: it sets the decimals of all of them."""
    return max(abs(difference.low), abs(difference.high))


# --- The page ------------------------------------------------------------------------------------------------

_WORDS = {"better": "better", "worse": "worse", "undecided": "not distinguishable", "void": "void"}


def render(report: Report, run_dir: Path) -> str:
    """The whole page. Videos are read from run_dir."""
    palette = Palette(report.order)
    sections = [
        _summary_section(report),
        _video_section(report, run_dir),
        _steps_section(report),
        _quality_section(report),
        _probe_section(report, palette),
        _gate_section(report),
        _alarm_section(report),
        _curve_section(report, palette),
        _timing_section(report),
        _provenance_section(report),
    ]
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(report.name)} · report</title>\n<style>{_STYLE}{charts.STYLE}</style>\n</head>\n"
        "<body>\n<main>\n"
        + "\n".join(section for section in sections if section)
        + f"\n</main>\n<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def _section(identifier: str, title: str, lead: str, body: str) -> str:
    """lead: a sentence for a reader who meets this for the first time (plain text)."""
    return f'<section id="{identifier}"><h2>{escape(title)}</h2><p class="lead">{escape(lead)}</p>{body}</section>'


def _summary_section(report: Report) -> str:
    seconds = sum(report.provenance.stage_seconds.values())
    facts = [report.created, report.provenance.machine, f"{len(report.seeds)} {_plural(len(report.seeds), 'seed')}"]
    facts += [f"{_duration(seconds)} of training"] if seconds else []
    head = (
        f'<header><p class="kicker">mirai_dist report</p><h1>{escape(report.name)}</h1>'
        f'<p class="quiet">{escape(" · ".join(facts))}</p></header>'
    )
    sentences = "".join(f"<p>{escape(sentence)}</p>" for sentence in summary(report))
    rows = "".join(
        f'<li><span class="pill {finding.verdict}">{_WORDS[finding.verdict]}</span>'
        f'<span>{escape(finding.subject)}</span><span class="quiet">{escape(finding.text)}</span></li>'
        for finding in findings(report)
    )
    notes = "".join(f"<li>{escape(note)}</li>" for note in report.notes)
    notes = f'<ul class="notes">{notes}</ul>' if notes else ""
    body = f'<h2>In short</h2>{sentences}<ul class="findings">{rows}</ul>{notes}'
    return f'{head}<section id="summary" class="card">{body}</section>'


def _video_section(report: Report, run_dir: Path) -> str:
    table = report.videos
    if table is None or not table.rows:
        return ""
    body = ['<p><button type="button" id="restart">Restart all together</button></p>']
    for row in table.rows:
        cells = "".join(_video(column, row.paths.get(column), run_dir) for column in table.columns)
        body.append(f'<h3 class="prompt">{escape(row.prompt)}</h3><div class="videos">{cells}</div>')
    lead = "Each row is one prompt; the columns are the stages and arms. Few-step columns are generated causally. "
    return _section("videos", "Videos", lead + table.note, "".join(body))


def _video(column: str, path: str | None, run_dir: Path) -> str:
    caption = f"<figcaption>{escape(column)}</figcaption>"
    if path is None:
        return f'<figure class="video"><div class="none">–</div>{caption}</figure>'
    file = run_dir / path
    if not file.is_file():
        raise FileNotFoundError(f"report: video {file} of column {column!r} does not exist")
    return (
        f'<figure class="video"><video autoplay loop muted playsinline poster="{_data("image/png", poster(file))}" '
        f'src="{_data("video/mp4", file.read_bytes())}"></video>{caption}</figure>'
    )


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _steps_section(report: Report) -> str:
    if not report.steps:
        return ""
    columns = ("stage", "starts from", "segment", "cycles", "time", "score", "gain", "95 % interval", "better in", "")
    rows = "".join(_step_row(step) for step in report.steps)
    gains = [
        _interval_row(step.name, step.gain, verdict(step.gain))  # the table below has the parent: both would not fit
        for step in report.steps
        if step.gain
    ]
    chart = charts.interval_chart("Gain over what the stage started from", "score (95 % interval over prompts)", gains)
    lead = (
        "The mean score of what each stage has trained, and its gain over what it started from: the same prompts, "
        "paired, with Student's t interval. It covers the prompts alone; another training would come out differently. "
        "An arm is the mean over its seeds. To make a network causal, or fast, may cost quality: this is what it costs."
    )
    head = "".join(f"<th>{text}</th>" for text in columns)
    return _section("steps", "What each stage buys", lead, f'<div class="scroll">{chart}</div>{_table(head, rows)}')


def _step_row(step: StageStep) -> str:
    segment = f"{step.frames_per_segment} frames" if step.frames_per_segment > 1 else "1 frame"
    facts = (step.parent or "–", segment if step.frames_per_segment else "whole clip", str(step.cycles))
    cells = f'<th scope="row">{escape(step.name)}<small>{escape(step.kind)}</small></th>'
    cells += "".join(f"<td>{escape(fact)}</td>" for fact in facts)
    cells += f"<td>{_duration(step.seconds)}</td><td>{number(step.score)}</td>"
    if step.gain is None:
        return f'<tr>{cells}<td class="split quiet" colspan="4">not compared</td></tr>'
    return f"<tr>{cells}{_difference_cells(step.gain, verdict(step.gain))}</tr>"


def _quality_section(report: Report) -> str:
    if not report.quality:
        return ""
    columns = [name for name in report.order if any(name in row.cells for row in report.quality)]
    head = "".join(f"<th>{escape(name)}</th>" for name in ["measure", *columns])
    compared = f"{escape(report.treatment)} −<br>{escape(report.baseline)}"
    head += f'<th class="split">{compared}</th><th>95 % interval</th><th>better in</th><th></th>'
    rows = "".join(_quality_row(row, columns) for row in report.quality)
    lead = (
        "Computed from the pixels by the rules of the world that made the captions. Mean ± standard deviation over "
        "seeds; the difference is paired by seed, with Student's t interval. An interval that holds zero decides "
        "nothing."
    )
    return _section("quality", "Measured quality", lead, _table(head, rows))


def _table(head: str, rows: str) -> str:
    table = f'<table class="numbers"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _quality_row(row: QualityRow, columns: Sequence[str]) -> str:
    direction = "higher is better" if row.higher_is_better else "lower is better"
    about = " · ".join(part for part in (row.unit, direction, row.note) if part)
    cells = f'<th scope="row">{escape(row.metric)}<small>{escape(about)}</small></th>'
    cells += "".join(f"<td>{_cell(row.cells.get(name))}</td>" for name in columns)
    if row.difference is None:
        return f'<tr>{cells}<td class="split quiet" colspan="4">not compared</td></tr>'
    outcome = verdict(row.difference, row.higher_is_better)
    strip = charts.interval_strip(_interval_row(f"{row.metric}: difference and interval", row.difference, outcome))
    return f"<tr>{cells}{_difference_cells(row.difference, outcome, strip)}</tr>"


def _difference_cells(difference: Paired, outcome: str, extra: str = "") -> str:
    """extra: a drawing put above the verdict."""
    return (
        f'<td class="split">{signed(difference.mean, _reach(difference))}</td><td>{_interval(difference)}</td>'
        f"<td>{difference.wins}/{difference.n}</td>"
        f'<td>{extra}<span class="pill {outcome}">{_WORDS[outcome]}</span></td>'
    )


def _interval_row(label: str, difference: Paired, outcome: str) -> IntervalRow:
    better = {"better": True, "worse": False}.get(outcome)
    note = f"better in {difference.wins}/{difference.n}"
    return IntervalRow(label, difference.mean, difference.low, difference.high, better, note)


def _cell(cell: Cell | None) -> str:
    if cell is None or math.isnan(cell.mean):
        return '<span class="quiet">–</span>'
    spread = "" if math.isnan(cell.sd) else f"<small>± {number(cell.sd, 2)}</small>"
    return number(cell.mean) + spread


def _probe_section(report: Report, palette: Palette) -> str:
    probe = report.probe
    if probe is None:
        return ""
    probe = replace(probe, lines=_ordered(probe.lines, report.order))
    series = [
        Series(line.name, [float(k) for k in probe.ks], *_means(line.cells), dashed=line.control)
        for line in probe.lines
    ]
    chart = LineChart("Readout quality", "segments ahead (k)", f"PSNR, {probe.unit}", series, markers=True)
    claims = [
        _interval_row(f"k = {claim.k}, against {claim.against}", claim.difference, claim_verdict(probe, claim))
        for claim in probe.claims
    ]
    forest = charts.interval_chart(
        f"Gain beyond k = 0 of {report.treatment}", f"difference in differences, {probe.unit} (95 % interval)", claims
    )
    lead = (
        "A small decoder is trained, with an equal budget for each arm, to read frames k segments ahead out of frozen "
        "mid-depth states. A better state in general helps at k = 0 too; only what is gained beyond that concerns the "
        "future, so the claim is the difference in differences. Dashed lines are controls."
    )
    body = (
        _precondition(probe.precondition)
        + f'<div class="probe"><div>{charts.line_chart(chart, palette)}</div>{_probe_table(probe)}</div>'
        + f'<h3>The claim</h3><div class="scroll">{forest}</div>{_claim_table(probe)}'
    )
    return _section("probe", "Is the future readable from the present?", lead, body)


def _ordered(lines: Sequence[ProbeLine], order: Sequence[str]) -> list[ProbeLine]:
    place = {name: index for index, name in enumerate(order)}
    return sorted(lines, key=lambda line: place.get(line.name, len(place)))


def _means(cells: Sequence[Cell]) -> tuple[list[float], list[float]]:
    return [cell.mean for cell in cells], [0.0 if math.isnan(cell.sd) else cell.sd for cell in cells]


def _precondition(condition: Precondition | None) -> str:
    if condition is None:
        return '<p class="quiet">Whether the base model uses its history was not measured.</p>'
    outcome, words = ("better", "met") if condition.passed else ("worse", "not met")
    references = ", ".join(f"{name} {number(value)}" for name, value in condition.references.items())
    text = (
        f"the base model uses its history: x0 error from pure noise {number(condition.error)}, without the history "
        f"{references} (at most {number(condition.required_ratio, 2)} of the best of these is required)"
    )
    return f'<p><span class="pill {outcome}">precondition {words}</span> {escape(text)}</p>'


def _probe_table(probe: ProbeResult) -> str:
    head = "<th></th>" + "".join(f"<th>k = {k}</th>" for k in probe.ks)
    rows = "".join(
        f'<tr><th scope="row">{escape(line.name)}{"<small>control</small>" if line.control else ""}</th>'
        + "".join(f"<td>{_cell(cell)}</td>" for cell in line.cells)
        + "</tr>"
        for line in probe.lines
    )
    return _table(head, rows)


def _claim_table(probe: ProbeResult) -> str:
    head = "".join(
        f"<th>{text}</th>"
        for text in ("", f"gain beyond k = 0, {escape(probe.unit)}", "95 % interval", "better in", "")
    )
    rows = "".join(
        f'<tr><th scope="row">k = {claim.k}, against {escape(claim.against)}</th>'
        f"{_difference_cells(claim.difference, claim_verdict(probe, claim))}</tr>"
        for claim in probe.claims
    )
    return _table(head, rows)


def _alarm_section(report: Report) -> str:
    if not report.alarms:
        return ""
    rows = ""
    for each in report.alarms:
        if each.silence:
            pill, words, said = "undecided", "not watched", [each.silence]
        else:
            pill, words = ("worse", f"{each.raised} raised") if each.raised else ("better", "none was raised")
            said = [change.sentence for change in each.changes]
        text = "".join(f"<p>{escape(sentence)}</p>" for sentence in said)
        rows += f'<li><span class="pill {pill}">{words}</span><span>{escape(each.run)}</span><div>{text}</div></li>'
    lead = (
        "After a warm-up, the mean of the last cycles of each measure is compared with the limits of the recipe. An "
        "alarm rises once, and clears when that mean has stayed inside for as many cycles."
    )
    return _section("alarms", "Alarms", lead, f'<ul class="findings">{rows}</ul>')


def _gate_section(report: Report) -> str:
    if not report.gates:
        return ""
    columns = ("", "median", "clean clips", "bounds", "clips outside", "")
    head = "".join(f"<th>{name}</th>" for name in columns)
    rows = "".join(_gate_rows(gate) for gate in report.gates)
    lead = (
        "Before a stage begins, its start is rolled out on fixed prompts. Where there are clean clips, the bounds are "
        "multiples of what those measure. A stage whose start fails does not begin."
    )
    return _section("gates", "Gates between stages", lead, _table(head, rows))


def _gate_rows(gate: GateResult) -> str:
    outcome, word = ("better", "passed") if gate.passed else ("worse", "failed")
    pill = f'<span class="pill {outcome}">{word}</span>'
    rows = f'<tr><th scope="row" colspan="5">{escape(gate.stage)}<small>starts from {escape(gate.start)}</small></th>'
    rows += f"<td>{pill}</td></tr>"
    for row in gate.measures:
        bounds, outside = f"{number(row.low)} to {number(row.high)}", f"{row.outside} of {row.clips}"
        cells = (number(row.median), number(row.reference), bounds, outside)
        rows += f'<tr><th scope="row">{escape(row.measure.replace("_", " "))}</th>'
        rows += "".join(f"<td>{cell}</td>" for cell in cells) + f"<td>at most {gate.failing:.0%}</td></tr>"
    return rows


def _curve_section(report: Report, palette: Palette) -> str:
    if not report.curves:
        return ""
    body = ""
    for group in report.curves:
        drawn = "".join(charts.line_chart(chart, palette) for chart in group.charts)
        body += f'<h3>{escape(group.stage)}</h3><div class="multiples">{drawn}</div>'
    lead = "The faint line is what was recorded, the strong one its moving average. One line a seed."
    return _section("curves", "Training curves", lead, body)


def _timing_section(report: Report) -> str:
    if not report.timing:
        return ""
    bars = {timing.label: timing.seconds for timing in report.timing}
    phases = list(dict.fromkeys(name for seconds in bars.values() for name in seconds))
    ordered = [name for name in phases if name != "unaccounted"]
    names = [*ordered, *(["unaccounted"] if "unaccounted" in phases else [])]
    palette = Palette(["unaccounted", *ordered])
    chart = charts.stacked_bars("Where a cycle's time goes", "seconds a cycle", bars, names, palette)
    head = "<th>phase, seconds</th>" + "".join(f"<th>{escape(label)}</th>" for label in bars)
    rows = ""
    for phase in names:
        cells = "".join(f"<td>{number(s[phase]) if phase in s else '–'}</td>" for s in bars.values())
        rows += f'<tr><th scope="row">{escape(phase)}</th>{cells}</tr>'
    details = f"<details><summary>Numbers</summary>{_table(head, rows)}</details>"
    lead = "Mean wall seconds of one cycle on rank 0. The phases and what no phase covers sum to the wall time."
    return _section("timing", "Time", lead, f'<div class="scroll">{chart}</div>{details}')


def _provenance_section(report: Report) -> str:
    origin = report.provenance
    facts = {
        "command": origin.command,
        "commit": origin.commit,
        "recipe digest": origin.recipe_digest,
        "machine": origin.machine,
        "seeds": ", ".join(map(str, report.seeds)),
        "versions": " · ".join(f"{name} {version}" for name, version in origin.versions.items()),
        "seconds a stage": " · ".join(f"{name} {number(seconds)}" for name, seconds in origin.stage_seconds.items()),
    }
    rows = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts.items())
    body = f"<dl>{rows}</dl>"
    for title, text in (("Recipe, resolved", report.recipe_yaml), ("What was really used", report.effective_yaml)):
        if text:
            body += f"<details><summary>{title}</summary><pre>{escape(text)}</pre></details>"
    return _section("provenance", "Where this comes from", "Enough to run it again.", body)


def _duration(seconds: float) -> str:
    whole = round(seconds)
    return f"{whole} s" if whole < 60 else f"{whole // 60} min {whole % 60:02d} s"


_STYLE = """
:root { color-scheme:light dark; --paper:#fbfbfa; --card:#ffffff; --ink:#1b2026; --muted:#667080; --line:#e6e8ec;
  --line-strong:#aab1bc; --good:#14804a; --good-soft:#dff3e7; --bad:#b4342a; --bad-soft:#fbe4e1; --soft:#eef0f3; }
@media (prefers-color-scheme: dark) { :root { --paper:#13161a; --card:#1a1e24; --ink:#e7eaee; --muted:#9aa4b2;
  --line:#2a3038; --line-strong:#56606d; --good:#5fd39a; --good-soft:#16382a; --bad:#ff8d80; --bad-soft:#44201d;
  --soft:#262c34; } }
* { box-sizing:border-box; }
body { margin:0; background:var(--paper); color:var(--ink); font:16px/1.55 system-ui,-apple-system,"Segoe UI",
  Roboto,"Helvetica Neue",sans-serif; }
main { max-width:1080px; margin:0 auto; padding:2.5rem 1.25rem 5rem; }
h1 { font-size:2rem; line-height:1.2; margin:.1rem 0 .3rem; letter-spacing:-.01em; }
h2 { font-size:1.3rem; margin:0 0 .3rem; letter-spacing:-.005em; }
h3 { font-size:1rem; margin:1.6rem 0 .5rem; }
section { margin-top:3.2rem; } header { margin-bottom:1.4rem; } header + section { margin-top:0; }
.kicker { margin:0; font-size:.8rem; color:var(--muted); letter-spacing:.06em; text-transform:uppercase; }
.quiet { color:var(--muted); } .lead { color:var(--muted); max-width:46rem; margin:.1rem 0 1.1rem; }
.card { background:var(--card); border:1px solid var(--line); border-radius:12px; padding:1.3rem 1.5rem; }
.card p { max-width:50rem; margin:.5rem 0; }
.findings { list-style:none; margin:1.2rem 0 0; padding:0; border-top:1px solid var(--line); }
.findings li { display:grid; grid-template-columns:8.6rem minmax(0,1fr) auto; gap:.2rem .9rem; align-items:baseline;
  padding:.36rem 0; border-bottom:1px solid var(--line); font-size:.88rem; line-height:1.45; }
.findings li:last-child { border-bottom:0; } .findings .pill { justify-self:start; }
.findings .quiet { font-variant-numeric:tabular-nums; }
#alarms .findings li { grid-template-columns:8.6rem 12rem minmax(0,1fr); } #alarms p { margin:0 0 .3rem; }
.notes { margin:1rem 0 0; padding-left:1.1rem; color:var(--muted); font-size:.9rem; }
.pill { display:inline-block; white-space:nowrap; border-radius:99px; padding:.08rem .6rem; font-size:.78rem;
  line-height:1.5; background:var(--soft); color:var(--muted); }
.pill.better { background:var(--good-soft); color:var(--good); }
.pill.worse { background:var(--bad-soft); color:var(--bad); }
.prompt { font-weight:500; }
.videos { display:grid; grid-template-columns:repeat(auto-fill,minmax(130px,1fr)); gap:.7rem; }
figure.video { margin:0; } figure.video video, figure.video .none { display:block; width:100%; height:auto;
  border-radius:8px; background:var(--soft); image-rendering:pixelated; }
figure.video .none { aspect-ratio:1; display:grid; place-items:center; color:var(--muted); }
figure.video figcaption { font-size:.8rem; color:var(--muted); text-align:center; padding-top:.25rem; }
button { font:inherit; font-size:.85rem; color:inherit; background:var(--card); border:1px solid var(--line-strong);
  border-radius:8px; padding:.25rem .8rem; cursor:pointer; }
table.numbers { border-collapse:collapse; font-size:.86rem; font-variant-numeric:tabular-nums; width:100%; }
table.numbers th, table.numbers td { text-align:right; padding:.42rem .5rem; border-bottom:1px solid var(--line);
  white-space:nowrap; vertical-align:middle; }
table.numbers thead th { color:var(--muted); font-weight:500; border-bottom:1px solid var(--line-strong); }
table.numbers th:first-child { text-align:left; padding-left:0; }
table.numbers tbody th { font-weight:500; white-space:normal; min-width:9rem; }
table.numbers small { display:block; color:var(--muted); font-weight:400; line-height:1.35; }
#quality .split, #steps .split { border-left:1px solid var(--line-strong); padding-left:.9rem; }
svg.strip { display:block; margin:0 0 .15rem auto; } figure.chart + .scroll { margin-top:.6rem; }
.multiples { display:grid; grid-template-columns:repeat(auto-fill,minmax(300px,1fr)); gap:1.6rem 1.8rem; }
.probe { display:grid; grid-template-columns:repeat(auto-fit,minmax(340px,1fr)); gap:1.5rem 2rem; align-items:center; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:.35rem 1.2rem; margin:0; font-size:.9rem; }
dt { color:var(--muted); } dd { margin:0; overflow-wrap:anywhere; }
details { margin-top:1rem; } summary { cursor:pointer; color:var(--muted); font-size:.9rem; }
pre { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:1rem; overflow-x:auto;
  font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; }
@media (max-width:640px) { .findings li, #alarms .findings li {
  grid-template-columns:1fr; gap:.2rem; } dl { grid-template-columns:1fr; } }
@media print { body { background:#fff; } section { break-inside:avoid-page; } }
"""

_SCRIPT = """
(() => {
  const videos = [...document.querySelectorAll("video")];
  const restart = () => videos.forEach(v => { v.currentTime = 0; v.play(); });
  document.getElementById("restart")?.addEventListener("click", restart);
  if (matchMedia("(prefers-reduced-motion: reduce)").matches)
    videos.forEach(v => { v.autoplay = false; v.controls = true; v.pause(); });
})();
"""
