"""Keep what a finished run measured: RUN/report.json -> benchmarks/reports/<date>-<hardware>-<what>.{json,md,gif}.

python benchmarks/record_run.py RUN HARDWARE WHAT        # e.g. runs/tiny-video-mirai 2cpu tiny-video-mirai
"""

from __future__ import annotations

import argparse
from pathlib import Path

import av
import torch
from torch import Tensor

from mirai_dist.evaluate.report import Report, summary
from mirai_dist.evaluate.statistics import Paired
from mirai_dist.evaluate.video_files import write_gif

REPORTS = Path(__file__).parent / "reports"
PICTURED = 3  # prompts in the picture


def main() -> None:
    """Write the three files; an existing report of the same name is replaced."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("hardware")
    parser.add_argument("what")
    options = parser.parse_args()
    report = Report.from_json((options.run / "report.json").read_text())
    stem = REPORTS / f"{report.created[:10]}-{options.hardware}-{options.what}"
    stem.parent.mkdir(exist_ok=True)
    Path(f"{stem}.json").write_text(report.to_json())
    Path(f"{stem}.md").write_text("\n".join(markdown(report)) + "\n")
    write_gif(Path(f"{stem}.gif"), picture(report, options.run), fps=6, scale=1)


def markdown(report: Report) -> list[str]:
    """The report's numbers as Markdown lines."""
    made = report.provenance
    lines = [f"# {report.name}, {report.created[:10]}", "", f"- command: `{made.command}`", f"- commit: {made.commit}"]
    lines += [f"- machine: {made.machine}", f"- recipe digest: {made.recipe_digest}"]
    lines += [f"- versions: {', '.join(f'{k} {v}' for k, v in made.versions.items())}"]
    lines += [f"- seeds: {report.seeds}", "", *(f"{sentence}" for sentence in summary(report)), ""]
    lines += ["What each stage buys (score, paired over prompts):", ""]
    lines += _table(
        ["stage", "kind", "starts from", "frames a segment", "cycles", "seconds", "score", "gain [95 %]"],
        [
            [s.name, s.kind, s.parent or "-", str(s.frames_per_segment or "all"), str(s.cycles), f"{s.seconds:.0f}",
             f"{s.score:.3f}", _interval(s.gain)]
            for s in report.steps
        ],
    )
    lines += [""]
    columns = list(report.quality[0].cells)
    difference = f"{report.treatment} - {report.baseline} [95 %]"
    lines += _table(
        ["measure", *columns, difference],
        [
            [row.metric, *(_cell(row.cells[c].mean, row.cells[c].sd) for c in columns), _interval(row.difference)]
            for row in report.quality
        ],
    )
    if report.probe:
        ks = [f"k = {k}" for k in report.probe.ks]
        lines += ["", "Future readout, PSNR in dB by segments ahead:", ""]
        lines += _table(
            ["network", *ks], [[line.name, *(_cell(c.mean, c.sd) for c in line.cells)] for line in report.probe.lines]
        )
        lines += ["", "Difference in differences of the readout, (k - 0) against the same of:", ""]
        lines += _table(
            ["against", "k", "dB [95 %]"], [[c.against, str(c.k), _interval(c.difference)] for c in report.probe.claims]
        )
    lines += ["", "Seconds a cycle by phase:", ""]
    lines += _table(
        ["stage or arm", "seconds", "phases"],
        [
            [t.label, f"{sum(t.seconds.values()):.3f}", ", ".join(f"{k} {v:.3f}" for k, v in t.seconds.items())]
            for t in report.timing
        ],
    )
    lines += ["", f"Seconds a part: {', '.join(f'{k} {v:.0f}' for k, v in made.stage_seconds.items())}."]
    return lines


def picture(report: Report, run: Path) -> Tensor:
    """Frames [T, H, W, 3] uint8: prompts as rows, columns as in the report."""
    assert report.videos is not None
    rows = [
        torch.cat([_decode(run / row.paths[c]) for c in report.videos.columns], dim=2)
        for row in report.videos.rows[:PICTURED]
    ]
    return torch.cat(rows, dim=1)[::2, ::2, ::2]


def _decode(path: Path) -> Tensor:
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def _cell(mean: float, sd: float) -> str:
    if mean != mean:
        return "-"
    return f"{mean:.3f}" if sd != sd else f"{mean:.3f} ± {sd:.3f}"


def _interval(d: Paired | None) -> str:
    return f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}], {d.wins}/{d.n} better" if d else "-"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
