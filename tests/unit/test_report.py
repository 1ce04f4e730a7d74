from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch

from mirai_dist.evaluate import charts
from mirai_dist.evaluate.charts import LineChart, Palette, Series
from mirai_dist.evaluate.report import (
    AlarmChange,
    Cell,
    GateResult,
    GateRow,
    Precondition,
    ProbeResult,
    Provenance,
    QualityRow,
    Report,
    RunAlarms,
    StageCurves,
    StageStep,
    Timing,
    VideoRow,
    VideoTable,
    findings,
    series_of,
    summary,
    write,
)
from mirai_dist.evaluate.statistics import paired
from mirai_dist.evaluate.video_files import write_mp4

ORDER = ["ground truth", "teacher", "few-step start", "baseline", "foresight", "causal encoder", "shuffled targets",
         "copy current", "random generator"]  # fmt: skip
SHIFTS = {"ground truth": 0.3, "teacher": 0.2, "few-step start": -0.1, "baseline": 0.0}


def quality(rng: np.random.Generator) -> list[QualityRow]:
    """Three rows over 3 seeds: foresight clearly better, clearly worse (lower is better), undecided."""
    pair = ("foresight", "baseline")
    base = {name: (0.6 + shift + rng.normal(0, 0.02, 3)).tolist() for name, shift in SHIFTS.items()}
    rows = []
    for metric, gain, higher in (("colour accuracy", 0.1, True), ("jerk", 0.2, False), ("sharpness", 0.0, True)):
        noise = np.array([0.001, -0.001, 0.0]) if gain else np.array([0.05, -0.06, 0.02])
        values = base | {"foresight": (np.array(base["baseline"]) + gain + noise).tolist()}
        rows.append(QualityRow.measured(metric, values, pair, "fraction", higher, "of 64 videos"))
    return rows


def steps() -> list[StageStep]:
    """A teacher, a start that is worse, and an arm that is better than the start."""
    worse, better = paired([-0.1, -0.12, -0.09]), paired([0.05, 0.06, 0.05])
    return [
        StageStep("teacher", "bidirectional", "", 0, 600, 54.0, 0.35, None),
        StageStep("few <step>", "ode", "teacher", 1, 100, 20.0, 0.25, worse),
        StageStep("foresight", "dmd", "few <step>", 3, 12, 14.0, 0.30, better),
    ]


def probe(rng: np.random.Generator, history: bool = True) -> ProbeResult:
    """Foresight gains at k = 1 beyond k = 0 against both controls; nothing at k = 2, 3."""
    base = {k: 24.0 - 3 * k + rng.normal(0, 0.02, 3) for k in range(4)}
    arms = dict.fromkeys(("baseline", "causal encoder", "shuffled targets"), base)
    noise = np.array([0.02, -0.01, 0.0])
    psnr = {name: {k: (v + rng.normal(0, 0.01, 3)).tolist() for k, v in by_k.items()} for name, by_k in arms.items()}
    psnr["foresight"] = {k: (v + 0.3 + (0.8 if k == 1 else 0.0) + noise * k).tolist() for k, v in base.items()}
    psnr["copy current"] = {k: [20.0 - 3 * k] * 3 for k in range(1, 4)}
    psnr["random generator"] = {k: [13.0] * 3 for k in range(4)}
    condition = Precondition(0.2 if history else 0.7, {"mean predictor": 0.64, "another clip's history": 0.8}, 0.7)
    return ProbeResult.measured(psnr, "foresight", ["baseline", "causal encoder", "shuffled targets"], condition)


def videos(directory: Path, rows: int = 2) -> VideoTable:
    columns = ORDER[:5]
    generator = torch.Generator().manual_seed(1)
    made = []
    for row in range(rows):
        paths = {}
        for column in columns:
            if (row, column) == (1, "ground truth"):
                continue
            paths[column] = f"samples/{row}-{column.replace(' ', '-')}.mp4"
            write_mp4(directory / paths[column], clip(generator), fps=16)
        made.append(VideoRow(f'a <b>red</b> square & a "disc" moves right ({row})', paths))
    return VideoTable(columns, made, "Same noise in every column.")


def clip(generator: torch.Generator) -> torch.Tensor:
    """[45, 32, 32, 3] uint8: a square of random colour that crosses a dark picture."""
    frames = torch.full((45, 32, 32, 3), 30, dtype=torch.uint8)
    colour = torch.randint(80, 255, (3,), generator=generator, dtype=torch.uint8)
    row = int(torch.randint(2, 20, (1,), generator=generator))
    for t in range(45):
        frames[t, row : row + 9, t // 2 : t // 2 + 9] = colour
    return frames


def curves(rng: np.random.Generator) -> list[StageCurves]:
    cycles = [float(c) for c in range(1, 151)]

    def noisy(height: float) -> list[float]:
        return [height * math.exp(-c / 40) + 0.05 + abs(rng.normal(0, 0.05 * height)) for c in cycles]

    flow = LineChart("flow loss", "cycle", "loss", [Series("teacher", cycles, noisy(1.0))], True, 0.9)
    arms = [Series(name, cycles, noisy(0.4)) for name in ("baseline", "foresight") for _ in range(2)]
    dmd = LineChart("DMD gradient", "cycle", "norm", arms, smoothing=0.9)
    cosine = LineChart("foresight cosine", "cycle", "cosine", [Series("foresight", cycles[:3], [0.1, math.nan, 0.3])])
    empty = LineChart("nothing", "cycle", "loss", [Series("baseline", [], [])])
    return [StageCurves("teacher", [flow]), StageCurves("dmd", [dmd, cosine, empty])]


ALARMS = [
    RunAlarms("baseline, seed 1", []),
    RunAlarms("foresight, seed 1", [AlarmChange(9, True, "alarm <b>motion</b> at cycle 9: it stands still"),
                                    AlarmChange(30, False, "alarm motion cleared at cycle 30")]),
    RunAlarms("foresight, seed 2", [], "no alarm can rise in 12 cycles"),
]  # fmt: skip


def example(directory: Path, history: bool = True) -> Report:
    rng = np.random.default_rng(7)
    timing = [
        Timing("teacher", {"data": 0.01, "forward": 0.2, "optimizer": 0.05, "unaccounted": 0.01}),
        Timing("dmd, baseline", {"rollout": 0.5, "real score": 0.2, "critic": 1.1, "unaccounted": 0.05}),
        Timing("dmd, foresight", {"rollout": 0.5, "critic": 1.1, "foresight": 0.3, "unaccounted": 0.06}),
    ]  # fmt: skip
    provenance = Provenance(
        "mirai train recipes/tiny/video_mirai.yaml --nproc 2",
        "0123abc",
        "2 CPU cores, 8 GiB",
        "sha256:9f1c",
        {"python": "3.11.7", "torch": "2.13.0"},
        {"teacher": 61.2, "dmd": 130.5},
    )
    return Report(
        "tiny/video_mirai", "2026-11-20 14:02", "foresight", "baseline", ORDER, [1, 2, 3], provenance,
        quality=quality(rng), probe=probe(rng, history), videos=videos(directory), curves=curves(rng), timing=timing,
        alarms=ALARMS, recipe_yaml="name: tiny\nnote: <script>alert(1)</script>\n", effective_yaml="mesh: [2]\n",
        notes=["Videos of a procedural world; see the README."], gates=gates(), steps=steps(),
    )  # fmt: skip


def gates() -> list[GateResult]:
    """One that passed beside clean clips, and one that failed its absolute bounds."""
    relative = GateRow("boundary_jump", 1.37, 0.0, 2.21, 1.105, 1, 16)
    absolute = GateRow("motion", 0.0113, 0.02, 1.1, math.nan, 12, 16)
    return [
        GateResult("distil", "few_step (ema, digest 6414e06b15cbb4d6)", True, 0.25, [relative]),
        GateResult("late", "<start> (raw, digest 0a0a)", False, 0.125, [absolute]),
    ]


class Page(HTMLParser):
    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path, Page]:
    directory = tmp_path_factory.mktemp("run")
    report = example(directory)
    path = write(directory, report)
    return report, path, Page(path.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_but_itself(rendered: tuple[Report, Path, Page]) -> None:
    _, path, page = rendered
    assert page.open == []
    for tag, attributes in page.tags:
        for name in ("src", "href", "poster", "data", "srcset", "action"):
            assert (attributes.get(name) or "data:").startswith("data:"), (tag, name)
    text = re.sub(r"data:[a-z/0-9]+;base64,[A-Za-z0-9+/=]+", "", path.read_text(encoding="utf-8"))
    assert not re.search(r"https?://|@import|url\(|//cdn", text)


def test_videos_play_by_themselves_and_a_missing_column_is_a_dash(rendered: tuple[Report, Path, Page]) -> None:
    shown = [attributes for tag, attributes in rendered[2].tags if tag == "video"]
    assert len(shown) == 9
    for attributes in shown:
        assert {"autoplay", "loop", "muted", "playsinline"} <= set(attributes)
        assert (attributes["src"] or "").startswith("data:video/mp4;base64,")
        assert (attributes["poster"] or "").startswith("data:image/png;base64,")


def test_text_of_the_run_is_escaped(rendered: tuple[Report, Path, Page]) -> None:
    _, path, page = rendered
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert "<b>red</b>" not in path.read_text() and any("<b>red</b>" in words for words in page.words)


def test_every_number_of_the_tables_is_on_the_page(rendered: tuple[Report, Path, Page]) -> None:
    report, _, page = rendered
    text = " ".join(page.words)
    for row in report.quality:
        assert row.difference is not None
        reach = max(abs(row.difference.low), abs(row.difference.high))
        assert charts.signed(row.difference.mean, reach) in text and charts.signed(row.difference.low, reach) in text
        assert all(charts.number(cell.mean) in text for cell in row.cells.values())
    for claim in report.probe.claims if report.probe else []:
        reach = max(abs(claim.difference.low), abs(claim.difference.high))
        assert charts.signed(claim.difference.low, reach) in text
    for needed in ("0123abc", "sha256:9f1c", "torch 2.13.0", "teacher 61.2", "mesh: [2]", "unaccounted", "no data"):
        assert needed in text


def test_gates_are_shown_with_measures_bounds_and_verdict(rendered: tuple[Report, Path, Page]) -> None:
    text = " ".join(rendered[2].words)
    shown = text[text.index("Gates between stages") : text.index("Training curves")]
    first, second = shown.split("late")
    for needed in ("distil", "few_step (ema, digest 6414e06b15cbb4d6)", "passed", "boundary jump", "1.37", "1.10",
                   "0 to 2.21", "1 of 16", "at most 25%"):  # fmt: skip
        assert needed in first, needed
    for needed in ("<start>", "failed", "0.0113", "–", "0.0200 to 1.10", "12 of 16", "at most 12%"):
        assert needed in second, needed
    assert "passed" not in second and "failed" not in first


def test_json_round_trip_with_numbers_that_json_lacks(rendered: tuple[Report, Path, Page]) -> None:
    report, path, _ = rendered
    text = (path.parent / "report.json").read_text()
    json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    again = Report.from_json(text)
    assert again.to_json() == text and repr(again) == repr(report)
    assert math.isnan(again.curves[1].charts[1].series[0].y[1])


def test_json_of_another_shape_is_refused(rendered: tuple[Report, Path, Page]) -> None:
    data = json.loads(rendered[0].to_json())
    for change, message in (
        ({"schema_version": 9}, "schema 9"),
        ({"extra": 1}, "report: unknown key 'extra'"),
    ):
        with pytest.raises(ValueError, match=message):
            Report.from_json(json.dumps(data | change))
    del data["quality"][1]["unit"]
    with pytest.raises(ValueError, match=r"report\.quality\[1\]: key 'unit' is missing"):
        Report.from_json(json.dumps(data))


def test_alarms_are_told_run_by_run(rendered: tuple[Report, Path, Page]) -> None:
    """None that rose is not the same as none that could."""
    report, path, page = rendered
    html = path.read_text()
    section = html[html.index('<section id="alarms">'):]
    section = section[: section.index("</section>")]
    rows = re.findall(r'<li><span class="pill (\w+)">([^<]+)</span><span>([^<]+)</span>(.*?)</li>', section)
    assert [row[:3] for row in rows] == [
        ("better", "none was raised", "baseline, seed 1"),
        ("worse", "1 raised", "foresight, seed 1"),
        ("undecided", "not watched", "foresight, seed 2"),
    ]
    assert "&lt;b&gt;motion&lt;/b&gt; at cycle 9" in rows[1][3] and "cleared at cycle 30" in rows[1][3]
    assert "no alarm can rise in 12 cycles" in rows[2][3]
    assert "Alarms were raised in 1 of 3 runs: foresight, seed 1." in summary(report)
    calm = replace(report, alarms=ALARMS[::2])
    assert not any("Alarms" in sentence for sentence in summary(calm))


def test_findings_follow_the_intervals(rendered: tuple[Report, Path, Page]) -> None:
    found = {finding.subject: finding for finding in findings(rendered[0])}
    assert [found[name].verdict for name in ("colour accuracy", "jerk", "sharpness")] == [
        "better",
        "worse",
        "undecided",
    ]
    assert "better in 3 of 3 seeds" in found["colour accuracy"].text and "better in 0 of 3" in found["jerk"].text
    assert found["Future readout, 1 segment ahead, against causal encoder"].verdict == "better"


def test_summary_says_what_was_won_and_what_was_not(rendered: tuple[Report, Path, Page]) -> None:
    quality_sentence, one, two_and_three, _, chance = summary(rendered[0])
    assert "of 3 rows, foresight is better in 1 (colour accuracy), worse in 1 (jerk)" in quality_sentence
    assert "not distinguishable from baseline at this size in 1 (sharpness)." in quality_sentence
    assert "1 segment ahead" in one and "gains more than baseline, causal encoder and shuffled targets." in one
    assert "2 and 3 segments ahead" in two_and_three
    assert (
        "no gain distinguishable from zero at this size against baseline, causal encoder or shuffled" in two_and_three
    )
    assert "12 intervals" in chance and "0.6" in chance.replace("0.60", "0.6")


def test_without_use_of_history_the_probe_claims_nothing(tmp_path: Path) -> None:
    report = replace(example(tmp_path, history=False), videos=None)
    assert {f.verdict for f in findings(report) if f.subject.startswith("Future")} == {"void"}
    assert "cannot speak" in summary(report)[1] and not any("gains more" in s for s in summary(report))
    assert "precondition not met" in write(tmp_path, report).read_text()


def test_one_seed_claims_nothing(tmp_path: Path) -> None:
    row = QualityRow.measured("sharpness", {"foresight": [2.0], "baseline": [1.0]}, ("foresight", "baseline"))
    report = replace(example(tmp_path), seeds=[1], quality=[row], probe=None, videos=None)
    assert [f.verdict for f in findings(report)] == ["undecided"]
    assert "one seed, no interval" in findings(report)[0].text and "One seed" in summary(report)[0]
    assert write(tmp_path, report).is_file()


def test_a_missing_video_is_named(tmp_path: Path) -> None:
    report = replace(example(tmp_path), videos=VideoTable(["teacher"], [VideoRow("p", {"teacher": "samples/no.mp4"})]))
    with pytest.raises(FileNotFoundError, match=r"samples/no\.mp4"):
        write(tmp_path, report)


def test_cells_and_numbers() -> None:
    assert Cell.of([1.0, 3.0]) == Cell(2.0, math.sqrt(2), 2) and math.isnan(Cell.of([1.0]).sd) and Cell.of([]).n == 0
    words = [charts.number(v) for v in (0.01234, 4.5678, 1234.5, -2.3e-7, 0.0, math.nan, math.inf, 99999.9)]
    assert words == ["0.0123", "4.57", "1234", "−2.30e−7", "0", "–", "∞", "100000"]
    assert (charts.signed(0.5), charts.signed(-0.5), charts.signed(0.0)) == ("+0.500", "−0.500", "0")
    assert [charts.signed(value, 0.113) for value in (0.00813, -0.0967, 0.0002)] == ["+0.008", "−0.097", "0.000"]


def test_a_curve_takes_the_strings_for_non_finite() -> None:
    records = [{"cycle": 1, "loss/dmd": 0.5}, {"cycle": 2, "loss/critic": 1.0}, {"cycle": 3, "loss/dmd": "nan"}]
    series = series_of(records, "loss/dmd", "baseline")
    assert series.x == [1.0, 3.0] and series.y[0] == 0.5 and math.isnan(series.y[1])


def test_ticks_are_round_and_inside() -> None:
    assert charts.ticks(0.0, 1.0) == pytest.approx([0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(-3.1, 12.4) == pytest.approx([0.0, 5.0, 10.0])
    assert charts.ticks(2.0, 2.0) == [2.0]
    assert charts.log_ticks(0.001, 1.0) == pytest.approx([0.001, 0.01, 0.1, 1.0])
    for low, high in ((0.3, 0.9), (0.04, 0.2), (1e-9, 1e5), (2.1, 2.4)):
        found = charts.log_ticks(low, high)
        assert 2 <= len(found) <= 6 and all(low * 0.99 <= value <= high * 1.01 for value in found)


def test_smoothing_is_unbiased_at_the_start_and_keeps_gaps() -> None:
    assert charts.smooth([5.0] * 20, 0.9) == pytest.approx([5.0] * 20)
    out = charts.smooth([1.0, math.nan, 3.0], 0.5)
    after, before = (0.25 + 1.5) / 0.75, (0.5 + 0.75) / 0.75  # average with the past, with the future
    assert out[0] == pytest.approx((1.0 + before) / 2) and math.isnan(out[1])
    assert out[2] == pytest.approx((after + 3.0) / 2)
    line = [float(x) for x in range(60)]
    assert charts.smooth(line, 0.8)[20:40] == pytest.approx(line[20:40], abs=0.2)  # one-sided: 4 behind


def test_lines_map_data_to_the_plot_and_break_at_gaps() -> None:
    chart = LineChart("t", "x", "y", [Series("a", [0, 1, 2, 3], [1.0, math.nan, 2.0, 3.0])])
    drawn = charts.line_chart(chart, Palette(["a"]))
    path = re.search(r'<path d="([^"]+)"', drawn)
    assert path is not None and path[1].count("M") == 2 and path[1].count("L") == 1
    points = [tuple(map(float, p.split())) for p in re.findall(r"[ML]([\d.]+ [\d.]+)", path[1])]
    assert points[0][0] < points[1][0] < points[2][0] and points[0][1] > points[1][1] > points[2][1]


def test_the_parts_of_a_bar_are_in_proportion() -> None:
    bars = {"one": {"b": 3.0, "a": 1.0}, "two": {"b": 2.0}}
    drawn = charts.stacked_bars("t", "s", bars, ["a", "b"], Palette(["a", "b"]))
    widths = [float(width) for width in re.findall(r'<rect[^>]* width="([\d.]+)"', drawn)]
    assert widths[1] / widths[0] == pytest.approx(3, rel=1e-3) and widths[2] / widths[0] == pytest.approx(2, rel=1e-3)


def test_a_name_keeps_its_colour_on_the_whole_page() -> None:
    palette = Palette(["a", "b"])
    assert palette.colour("b") == "var(--series-1)" == palette.colour("b")
    assert palette.colour("new") == "var(--series-2)" and palette.legend(["a"]) == ""


def test_what_each_stage_buys_is_said_with_its_interval(tmp_path: Path) -> None:
    page = write(tmp_path, example(tmp_path)).read_text()
    section = page[page.index('<section id="steps">') : page.index('<section id="quality">')]
    rows = re.findall(r"<tr>(.*?)</tr>", section, re.S)[1:]
    assert "<td>teacher</td>" in rows[1] and "<td>few &lt;step&gt;</td>" in rows[2]  # what they start from
    labels = re.findall(r'<text class="label"[^>]*>(.*?)</text>', section)
    assert labels == ["few &lt;step&gt;", "foresight"]  # the first stage has nothing to gain over
    assert ["not compared" in rows[0], "worse" in rows[1], "better" in rows[2]] == [True] * 3
    assert "whole clip" in rows[0] and "1 frame<" in rows[1] and "3 frames<" in rows[2]
