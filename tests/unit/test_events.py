"""Events are appended whole, whoever writes them, and a start has one end."""

from __future__ import annotations

import threading
from pathlib import Path

from mirai_dist.operate import events


def names(run_dir: Path) -> list[str]:
    return [record["event"] for record in events.read(run_dir)]


def test_records_of_many_writers_do_not_mix(tmp_path: Path) -> None:
    def write(rank: int) -> None:
        for _ in range(50):
            events.append(tmp_path, "alarm", rank=rank, text="x" * 500)

    writers = [threading.Thread(target=write, args=(rank,)) for rank in range(4)]
    for each in writers:
        each.start()
    for each in writers:
        each.join()
    found = events.read(tmp_path)
    assert len(found) == 200 == len((tmp_path / events.FILE).read_text().splitlines())
    assert all(record["time"] > 0 for record in found)


def test_a_start_ends_once(tmp_path: Path) -> None:
    for rank in (3, 0, 1):
        events.append_end(tmp_path, "failed", rank=rank)  # before any start: they did not find each other
    assert [record["rank"] for record in events.read(tmp_path)] == [3]
    events.append(tmp_path, "start")
    events.append(tmp_path, "saved")
    events.append_end(tmp_path, "failed", rank=2)
    events.append_end(tmp_path, "failed", rank=0)
    events.append_end(tmp_path, "stopped")
    events.append(tmp_path, "start")
    events.append_end(tmp_path, "done")
    assert names(tmp_path) == ["failed", "start", "saved", "failed", "start", "done"]


def test_a_line_cut_short_is_left_out(tmp_path: Path) -> None:
    assert events.read(tmp_path) == []
    events.append(tmp_path, "start")
    with (tmp_path / events.FILE).open("a") as file:
        file.write('{"time": 1.0, "event": "sav')
    assert names(tmp_path) == ["start"]


def test_ranks_without_a_directory_write_nothing(tmp_path: Path) -> None:
    events.Events().write("start")
    events.Events(tmp_path).write("start", ranks=2)
    assert events.read(tmp_path)[0]["ranks"] == 2
