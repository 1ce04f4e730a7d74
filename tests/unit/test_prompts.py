"""Prompt files: what is one, what is reported, and one line for everything that is not."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mirai_dist.config.error import FileError
from mirai_dist.data.prompts import LONG_LINE, PromptFile


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[bytes], PromptFile]:
    def make(content: bytes) -> PromptFile:
        path = tmp_path / "prompts.txt"
        path.write_bytes(content)
        return PromptFile(path)

    return make


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"one\ntwo", ["one", "two"]),
        (b"one\ntwo\n", ["one", "two"]),
        (b"one\r\ntwo\r\n", ["one", "two"]),
        (b"\xef\xbb\xbfone\ntwo", ["one", "two"]),
        (b"one\ntwo\n\n \t\n", ["one", "two"]),
        (b"one  \t\n  two\n", ["one", "  two"]),
        (b"o", ["o"]),
        ("一只狐狸\n\u3000狐狸\n“cat”\nété\u00a0\n".encode(), ["一只狐狸", "\u3000狐狸", "“cat”", "été"]),
        ("a\u2028b\nc\x0bd\x85e".encode(), ["a\u2028b", "c\x0bd\x85e"]),
    ],
)
def test_lines(prompts: Callable, content: bytes, expected: list[str]):
    file = prompts(content)
    assert file.size == len(expected)
    assert file.captions(range(file.size)) == expected
    assert file.captions([file.size - 1, 0]) == [expected[-1], expected[0]]
    assert file.digest == hashlib.sha256(content).hexdigest()


def test_a_number_outside_is_an_index_error(prompts: Callable):
    file = prompts(b"one\ntwo\n")
    for number in (2, -1):
        with pytest.raises(IndexError, match=f"0 to 1, not {number}"):
            file.captions([number])


def test_lines_that_cross_the_pieces_in_which_a_file_is_scanned(prompts: Callable, monkeypatch: pytest.MonkeyPatch):
    expected = [f"{i} " + "狐é"[i % 2] * (i % 7) for i in range(200)]
    content = "\r\n".join(expected).encode()
    for chunk in (1, 2, 3, 7, 64):
        monkeypatch.setattr("mirai_dist.data.prompts._CHUNK", chunk)
        assert prompts(content).captions(range(200)) == [line.rstrip() for line in expected]
        with pytest.raises(FileError, match="line 3 is not UTF-8"):
            prompts(b"one\ntwo\nth\xffree\nfour")


def test_report(prompts: Callable):
    long = b"w" * (LONG_LINE + 1)
    file = prompts(b"\n".join([b"a", b"b", b"a", long, b"w" * LONG_LINE, b"b ", b"a", b"", b""]))
    report = file.report()
    assert (report.prompts, report.trailing_blanks) == (7, 1)
    assert (report.long.count, report.long.first) == (1, (4,))
    assert (report.repeated.count, report.repeated.first) == (3, (3, 6, 7))
    assert file.originals.tolist() == [0, 1, 0, 3, 4, 1, 0]
    assert file.captions([3]) == [long.decode()]


def test_only_the_first_few_line_numbers_are_written_out(prompts: Callable):
    assert str(prompts(b"a\n" * 9).report().repeated) == "lines 2, 3, 4, 5, 6 and 3 more"
    with pytest.raises(FileError, match=r"lines 2, 4, 6, 8, 10 and 15 more are empty; remove them$"):
        prompts(b"a\n\n" * 20 + b"b")


REFUSED = {
    "empty": (b"", "is empty"),
    "only blank": (b"\n \r\n\t", "only blank lines"),
    "only a mark": (b"\xef\xbb\xbf", "only blank lines"),
    "blank first": (b"\none", "line 1 is empty; remove it"),
    "blank inside": (b"one\n\ntwo", "line 2 is empty; remove it"),
    "blanks inside": (b"one\n\n \t\ntwo", "lines 2, 3 are empty; remove them"),
    "wide blank": ("one\n\u3000\u2003\u00a0\u1680\ntwo".encode(), "line 2 is empty"),
    "next-line blank": ("one\n\x85\ntwo".encode(), "line 2 is empty"),
    "blank after a mark": (b"\xef\xbb\xbf\none", "line 1 is empty"),
    "latin-1": ("une\nforêt\n".encode("latin-1"), "line 2 is not UTF-8; save the file as UTF-8"),
    "gb18030": ("one\n狐狸\n雪地".encode("gb18030"), "lines 2, 3 are not UTF-8"),
    "shift-jis": ("狐\nfox".encode("shift-jis"), "line 1 is not UTF-8"),
    "cut character": ("one\n狐".encode()[:-1], "line 2 is not UTF-8"),
    "surrogate": (b"one\n\xed\xa0\x80", "line 2 is not UTF-8"),
    "overlong": (b"o\xc0\xafne", "line 1 is not UTF-8"),
    "utf-16": ("one\ntwo".encode("utf-16"), "is UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
    "utf-16-be": (b"\xfe\xff" + "one".encode("utf-16-be"), "is UTF-16"),
    "utf-16 without mark": ("one\ntwo".encode("utf-16-le"), "line 1 holds a NUL byte"),
    "utf-32": ("one".encode("utf-32"), "is UTF-32"),
    "nul": (b"one\ntw\0o", "line 2 holds a NUL byte"),
    "zip": (b"PK\x03\x04\x14\x00\x00\x00", "is not text"),
    "safetensors": (b"\x40\x00\x00\x00\x00\x00\x00\x00{}", "is not text"),
    "old mac": (b"one\rtwo\rthree", "line 1 has a carriage return inside"),
    "mixed ends": (b"one\ntw\ro\nthree\r", "lines 2, 3 have a carriage return inside"),
    "several faults": (b"on\xffe\n\ntw\ro", "line 1 is not UTF-8.*line 3 has a carriage.*line 2 is empty; remove it"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_prompt_file_is_one_line_naming_it(prompts: Callable, name: str):
    content, expected = REFUSED[name]
    with pytest.raises(FileError, match=rf"^/.*/prompts\.txt: .*{expected}") as refused:
        prompts(content)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("missing", "no such prompt file"), ("folder", "is a folder"), ("pipe", "not a regular file"),
     ("below a file", "cannot be read: Not a directory"), ("nul", "is not a file name")],
)  # fmt: skip
def test_what_is_no_file_is_one_line(tmp_path: Path, kind: str, expected: str):
    path = tmp_path / "p"
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "below a file":
        path.write_text("x")
        path = path / "q"
    elif kind == "nul":
        path = tmp_path / "a\0b"
    with pytest.raises(FileError, match=expected) as refused:
        PromptFile(path)
    assert "\n" not in str(refused.value)


def test_250000_lines_open_instantly(tmp_path: Path):
    path = tmp_path / "many.txt"
    line = "“The camera” glides over a harbour at dawn while gulls circle the masts and fishermen coil ropes. " * 6
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{i} {line}\n" for i in range(250_000))
    begin = time.perf_counter()
    prompts = PromptFile(path)
    first, last = prompts.captions([0, 249_999])
    took = time.perf_counter() - begin
    assert prompts.size == 250_000 and first.startswith("0 “The") and last.startswith("249999 “The")
    # 0.29 s on two busy cores for 160 MB; five times that is still no reading of lines one by one.
    assert took < 1.5, f"opening took {took:.2f} s"
