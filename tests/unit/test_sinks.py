from __future__ import annotations

import io
import json
import os
import pty
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mirai_dist.evaluate.video_files import gif_bytes
from mirai_dist.observe import console as console_module
from mirai_dist.observe.console import Console
from mirai_dist.observe.sinks import JsonLines, Sinks, TensorBoard


def record(cycle: int, position: int, **values: float) -> dict[str, object]:
    return {"stage": "dmd", "cycle": cycle, "position": position, "phase": "critic", "time": 1.0, **values}


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_lines_are_on_disk_at_once_and_strict(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "deep" / "metrics.jsonl")
    sink.record(record(1, 0, loss=0.5, bad=float("nan"), worse=float("-inf")))
    [stored] = lines(sink.path)
    assert stored["loss"] == 0.5 and stored["bad"] == "nan" and float(str(stored["worse"])) == float("-inf")


def test_truncation_drops_the_resume_point_and_what_follows(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl")
    for cycle in range(3):
        for position in range(3):
            sink.record(record(cycle, position, loss=1.0))
    sink.truncate_to(1, 1)
    sink.record(record(1, 1, loss=2.0))
    kept = [(item["cycle"], item["position"], item["loss"]) for item in lines(sink.path)]
    assert kept == [(0, 0, 1.0), (0, 1, 1.0), (0, 2, 1.0), (1, 0, 1.0), (1, 1, 2.0)]


def test_a_torn_last_line_is_dropped_on_opening(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    JsonLines(path).record(record(0, 0))
    with path.open("a") as file:
        file.write('{"stage": "dmd", "cyc')
    JsonLines(path).record(record(0, 1))
    assert [item["position"] for item in lines(path)] == [0, 1]


def test_a_foreign_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"cycle": 1, "position": 0}\nnot json\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl:2"):
        JsonLines(path).truncate_to(5, 0)


def reload(directory: Path) -> EventAccumulator:
    events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    events.Reload()
    return events


def test_tensorboard_averages_a_cycle_and_forgets_after_a_resume(tmp_path: Path) -> None:
    first = TensorBoard(tmp_path)
    for cycle in range(4):
        for position in range(2):
            first.record(record(cycle, position, **{"loss/critic": 10.0 * cycle + position}))
    first.close()
    second = TensorBoard(tmp_path)
    second.truncate_to(2, 0)
    second.record(record(2, 0, **{"loss/critic": 77.0}))
    second.close()
    points = [(event.step, event.value) for event in reload(tmp_path).Scalars("loss/critic")]
    assert points == [(0, 0.5), (1, 10.5), (2, 77.0)]


def test_tensorboard_stores_texts_and_videos(tmp_path: Path) -> None:
    frames = torch.randint(0, 255, (5, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    sink = TensorBoard(tmp_path)
    sink.text("effective", "mesh: 2", 3)
    sink.video("samples", gif_bytes(frames, fps=10), 3)
    with pytest.raises(ValueError, match="GIF"):
        sink.video("samples", b"\x89PNG", 3)
    sink.close()
    events = reload(tmp_path)
    [text] = events.Tensors("effective/text_summary")
    assert text.tensor_proto.string_val[0] == b"mesh: 2"
    [image] = events.Images("samples")
    assert (image.step, image.width, image.height) == (3, 128, 128)
    assert Image.open(io.BytesIO(image.encoded_image_string)).n_frames == 5  # type: ignore[attr-defined]


def test_only_rank_zero_writes(tmp_path: Path) -> None:
    for rank in (0, 1):
        sinks = Sinks.of_stage(rank, tmp_path / str(rank))
        sinks.record(record(0, 0, loss=1.0))
        sinks.text("a", "b", 0)
        sinks.truncate_to(1, 0)
        sinks.close()
    assert lines(tmp_path / "0" / "metrics.jsonl") and list((tmp_path / "0" / "tensorboard").iterdir())
    assert not (tmp_path / "1").exists()


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_stage(console: Console, clock: Clock, cycles: int, seconds: float) -> None:
    with console.stage("teacher", cycles, 0) as bar:
        for cycle in range(cycles):
            bar.phase("forward")
            clock.now += seconds
            bar.update(cycle + 1, values={"loss/flow": 1 / (cycle + 1)})


def test_plain_output_is_thinned_and_prefixed(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    run_stage(Console(0, "node7", tmp_path / "rank-0.log", stream, clock), clock, 100, 0.2)
    said = stream.getvalue().splitlines()
    assert all(line.startswith("node7:0 ") for line in said)
    assert "teacher 1/100  flow 1  0.20 s/cycle  eta 20s" in said[0]
    assert "teacher 100/100" in said[-2] and "100/100 cycles in 20s" in said[-1]
    assert len(said) == 1 + 3 + 1 + 1  # first, one every five seconds, last, the closing line
    logged = (tmp_path / "rank-0.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in logged] == said


def test_other_ranks_speak_to_their_log_only(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(3, "node7", tmp_path / "logs" / "rank-3.log")
    console.say("hello")
    console.warn("careful")
    console.table("sizes", [["a", 1], ["long name", 22]])
    console.close()
    console.close()
    assert capsys.readouterr() == ("", "")
    text = (tmp_path / "logs" / "rank-3.log").read_text()
    assert "node7:3 hello" in text and "warning: careful" in text and "  a          1\n" in text


def test_a_resumed_stage_counts_from_where_it_was(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    with Console(0, "n", tmp_path / "log", stream, clock).stage("dmd", 50, start=40) as bar:
        clock.now += 2
        bar.update(41)
    assert "dmd 41/50  2.00 s/cycle  eta 18s" in stream.getvalue()


def test_a_failing_stage_is_not_reported_as_ended(tmp_path: Path) -> None:
    stream = io.StringIO()
    console = Console(0, "n", tmp_path / "log", stream, Clock())
    with pytest.raises(RuntimeError), console.stage("dmd", 5):
        raise RuntimeError
    assert "cycles in" not in stream.getvalue()


def test_a_terminal_shows_a_bar_and_gets_its_cursor_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "140")
    parent, child = pty.openpty()
    seen = bytearray()

    def drain() -> None:
        try:
            while data := os.read(parent, 4096):
                seen.extend(data)
        except OSError:  # Linux reports the closed child end of a pty this way
            return

    reader = threading.Thread(target=drain)
    reader.start()
    with os.fdopen(child, "w") as stream:
        console = Console(0, "n", tmp_path / "log", stream)
        with console.stage("dmd [foresight]", 4) as bar:
            bar.update(1, values={"loss/dmd": 0.5})
            bar.phase("rollout")
            console.say("between [bars]")
            bar.update(4, phase="critic")
        console.close()
    reader.join(timeout=10)
    os.close(parent)
    text = seen.decode()
    assert "━" in text and "4/4" in text and "dmd 0.5" in text and "critic" in text
    assert "dmd [foresight]" in text and "between [bars]" in text
    assert text.rfind("\x1b[?25h") > text.rfind("\x1b[?25l") > -1  # cursor shown after it was hidden
    assert "dmd [foresight] 4/4" in (tmp_path / "log").read_text()


def test_durations_and_numbers_read_well() -> None:
    shown = [console_module._duration(value) for value in (0.4, 59, 61, 3600 * 2 + 425, float("nan"))]
    assert shown == ["0s", "59s", "1m 01s", "2h 07m", "-"]
