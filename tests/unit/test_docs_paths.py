"""Every path that a Markdown file of this repository names exists.

What counts as naming a path:
  * a link or image target, `[text](target)` or `src="target"`, that is no URL and no bare #anchor. It must exist
    relative to the file it stands in.
  * a word inside backticks or a fenced block, made of letters, digits and `_ - . / *`, that ends in a source suffix
    (SUFFIXES) or in a slash, or whose first folder exists at the root or beside the file. `:12`, `::test`, `KEY=`
    and a leading `./` are taken off. It must exist at the root, beside the file, or be the tail of an existing path
    (`cycle/cycle.py` for `mirai_dist/cycle/cycle.py`); a `*` must match something.
What does not: words with <placeholders>, absolute paths, and what only a run or an installation makes (GENERATED);
a fenced block that begins with such a folder draws a run directory and is skipped whole.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SKIPPED_FOLDERS = {".git", ".venv", "runs", "build", "dist", "node_modules", "shared", "__pycache__"}
SUFFIXES = (".py", ".md", ".yaml", ".cfg", ".toml", ".sh", ".in", ".typed", ".css", ".js")
GENERATED = ("runs/", "RUN/", "DIR/", ".venv/")
RUN_FILES = ("recipe.yaml", "effective.yaml")  # written at the top of a run directory

FENCE = re.compile(r"^ *(```+|~~~+)[^\n]*\n(.*?)^ *\1 *$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"""\]\(<?([^)\s>]+)>?(?:\s+"[^"]*")?\)|\b(?:src|href)=["']([^"']+)["']""")
PATH = re.compile(r"[\w.\-/*]+")


class Tree:
    """The files and folders of a repository, by path relative to its root."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.files: list[str] = []
        self.folders: set[str] = set()
        for folder, names, files in os.walk(root):
            names[:] = [name for name in names if name not in SKIPPED_FOLDERS and not name.endswith(".egg-info")]
            here = Path(folder).relative_to(root)
            self.files += [(here / name).as_posix() for name in files]
            self.folders |= {(here / name).as_posix() for name in names}

    def has(self, path: str) -> bool:
        """Whether the path, or an existing path ending in it, is there; a trailing slash asks for a folder."""
        wanted = path.rstrip("/")
        entries = self.folders if path.endswith("/") else {*self.files, *self.folders}
        return any(fnmatch(entry, pattern) for entry in entries for pattern in (wanted, f"*/{wanted}"))


def words(text: str) -> Iterator[tuple[int, str]]:
    """(line, word) of everything inside backticks and fenced blocks."""
    for fence in FENCE.finditer(text):
        body = fence[2]
        if not body.lstrip().startswith(GENERATED):
            yield from _split(body, text.count("\n", 0, fence.start(2)) + 1)
    for number, line in enumerate(_without_fences(text).splitlines(), 1):
        for code in CODE.finditer(line):
            yield from _split(code[1], number)


def _split(body: str, first_line: int) -> Iterator[tuple[int, str]]:
    for offset, line in enumerate(body.splitlines()):
        for word in line.split():
            yield first_line + offset, word


def _without_fences(text: str) -> str:
    return FENCE.sub(lambda fence: "\n" * fence[0].count("\n"), text)


def as_path(word: str, tree: Tree, folder: str) -> str | None:
    """The path that a word names, or None if it names none."""
    word = word.strip("()[]{}\"',;").removesuffix(".").removesuffix(":")
    word = re.sub(r"(::.*|:\d+(-\d+)?)$", "", word).rpartition("=")[2].removeprefix("./")
    if not PATH.fullmatch(word) or word.startswith(("/", "..", "-", *GENERATED)) or word in RUN_FILES:
        return None
    if not re.search(r"\w", word):
        return None
    first = word.split("/")[0]
    known_start = "/" in word and any(start in tree.folders for start in (first, f"{folder}/{first}"))
    return word if word.endswith((*SUFFIXES, "/")) or known_start else None


def links(text: str) -> Iterator[tuple[int, str]]:
    """(line, target) of every link and image that stays in the repository."""
    for number, line in enumerate(_without_fences(text).splitlines(), 1):
        for link in LINK.finditer(CODE.sub("", line)):
            target = (link[1] or link[2]).partition("#")[0]
            if target and not re.match(r"[a-z][a-z+.-]*:", target):
                yield number, target


def missing(root: Path) -> list[str]:
    """One line, `file:line: path`, for every named path that does not exist."""
    tree, found = Tree(root), []
    for name in sorted(file for file in tree.files if file.endswith(".md")):
        file = root / name
        folder = Path(name).parent.as_posix()
        text = file.read_text()
        for line, target in links(text):
            if not (file.parent / target).exists():
                found.append(f"{name}:{line}: {target}")
        for line, word in words(text):
            path = as_path(word, tree, folder)
            if path and not (tree.has(path) or (folder != "." and tree.has(f"{folder}/{path}"))):
                found.append(f"{name}:{line}: {path}")
    return found


def test_every_path_in_the_docs_exists():
    assert (ROOT / "README.md").exists(), "README.md is missing"
    found = missing(ROOT)
    assert not found, "named, but not there:\n" + "\n".join(found)


GOOD = """
See `pkg/code.py`, `pkg/code.py:12`, `code.py::test_x`, `pkg/`, `./pkg/code.py`, `pkg/*.py` and [it](pkg/code.py#top).
Not paths: `loss/dmd`, `and/or`, `runs/x/y.yaml`, `pkg/<name>.py`, `/etc/x.cfg`, `a = b / c`, [web](https://x.org/a.md).

    make run RECIPE=nowhere.yaml

```
make run RECIPE=pkg/code.py --run-dir runs/x   # .venv/bin/x.py
```

```
RUN/
  checkpoints/ nothing.yaml
```
"""
BAD = [
    ("`pkg/gone.py`", "pkg/gone.py"),
    ("`gone.py`", "gone.py"),
    ("`nowhere/`", "nowhere/"),
    ("`pkg/gone`", "pkg/gone"),
    ("`pkg/*.sh`", "pkg/*.sh"),
    ("[it](gone.py)", "gone.py"),
    ("![it](pkg/gone.png)", "pkg/gone.png"),
    ('<img src="gone.png" width="3">', "gone.png"),
    ("```\nx\nmake run RECIPE=pkg/gone.yaml\n```", "pkg/gone.yaml"),
]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg/code.py").write_text("")
    (tmp_path / "README.md").write_text(GOOD)
    return tmp_path


def test_a_good_file_passes(repository: Path):
    assert missing(repository) == []


@pytest.mark.parametrize(("text", "expected"), BAD)
def test_a_missing_path_is_named(repository: Path, text: str, expected: str):
    (repository / "BAD.md").write_text("first line\n\n" + text + "\n")
    line = 3 + text[: text.index(expected)].count("\n")
    assert missing(repository) == [f"BAD.md:{line}: {expected}"]
