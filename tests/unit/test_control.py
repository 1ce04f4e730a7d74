"""Requests are files of their own: nobody overwrites anybody, and nothing outlives the start it was asked of."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from mirai_dist.operate import control
from mirai_dist.operate.control import Request


def test_a_request_comes_back_as_it_was_asked(tmp_path: Path) -> None:
    asked = control.ask(tmp_path, Request("stop", by="ann@login", stage="distil", after=12))
    assert control.pending(tmp_path) == [asked]
    assert (asked.verb, asked.by, asked.stage, asked.after) == ("stop", "ann@login", "distil", 12)
    control.remove(tmp_path, asked)
    control.remove(tmp_path, asked)  # somebody was faster
    assert control.pending(tmp_path) == []


def test_operators_who_ask_at_once_are_all_heard_in_order(tmp_path: Path) -> None:
    first = control.ask(tmp_path, Request("save", by="first"))
    crowd = [threading.Thread(target=control.ask, args=(tmp_path, Request("save", by=f"{i}"))) for i in range(8)]
    for each in crowd:
        each.start()
    for each in crowd:
        each.join()
    last = control.ask(tmp_path, Request("stop", by="last"))
    found = control.pending(tmp_path)
    assert (found[0], found[-1]) == (first, last)
    assert sorted(each.by for each in found[1:-1]) == [str(i) for i in range(8)]


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"verb": "reboot"}', '{"verb": "stop", "when": 3}', '{"verb": "profile", "rank": "five"}'],
)
def test_what_cannot_be_read_is_told_from_what_can(tmp_path: Path, text: str) -> None:
    (tmp_path / control.FOLDER).mkdir()
    (tmp_path / control.FOLDER / "1.json").write_text(text)
    (tmp_path / control.FOLDER / ".2.json").write_text(json.dumps({"verb": "stop"}))  # being written
    assert control.pending(tmp_path) == [Request("", name="1.json")]


def test_a_start_takes_away_what_was_asked_of_the_one_before(tmp_path: Path) -> None:
    assert control.open_for(tmp_path) == []
    asked = [control.ask(tmp_path, Request(verb)) for verb in ("save", "stop")]
    assert control.open_for(tmp_path) == asked
    assert control.pending(tmp_path) == []


def test_hold_says_who_and_is_taken_away(tmp_path: Path) -> None:
    assert control.held(tmp_path) == ""
    control.hold(tmp_path, "ann@login")
    assert control.held(tmp_path).startswith("stopped by ann@login at ")
    control.release(tmp_path)
    control.release(tmp_path)
    assert control.held(tmp_path) == ""
