"""The rules of CONTRIBUTING.md that a linter has no word for, checked on the syntax tree."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("mirai_dist", "launcher/mirai_launch", "kernels/mirai_kernels")
MAY_PRINT = ("mirai_dist/observe/console.py", "launcher/mirai_launch/console.py")
MAX_LINES = 60
MAX_PARAMETERS = 8
CATCH_ALL = ("Exception", "BaseException")


def name_of(node: ast.AST | None) -> str:
    """The last word of a name or attribute: `torch.nan_to_num` is nan_to_num."""
    if isinstance(node, ast.Call):
        return name_of(node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def catches_all(kinds: list[ast.expr]) -> bool:
    names = [name_of(part) for kind in kinds for part in (kind.elts if isinstance(kind, ast.Tuple) else [kind])]
    return not names or any(name in CATCH_ALL for name in names)


def swallows(node: ast.AST) -> bool:
    """`except: pass`, `except Exception: ...`, `suppress(Exception)`: a failure nobody hears of."""
    if isinstance(node, ast.ExceptHandler):
        silent = all(
            isinstance(line, (ast.Pass, ast.Continue))
            or (isinstance(line, ast.Expr) and isinstance(line.value, ast.Constant))
            for line in node.body
        )
        return silent and catches_all([node.type] if node.type else [])
    return isinstance(node, ast.Call) and name_of(node) == "suppress" and catches_all(node.args)


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    arguments = function.args
    every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return [argument.arg for argument in every if argument.arg not in ("self", "cls")]


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """A Triton kernel takes a pointer, a stride and a size for each tensor; grouping them is not possible there."""
    return any(name_of(decorator) == "jit" for decorator in function.decorator_list)


def function_offences(function: ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    lines = (function.end_lineno or function.lineno) - function.lineno + 1
    if lines > MAX_LINES:
        yield f"{function.name} has {lines} lines; at most {MAX_LINES}"
    count = len(parameters(function))
    if count > MAX_PARAMETERS and not is_kernel(function):
        yield f"{function.name} has {count} parameters; at most {MAX_PARAMETERS}: group them in a frozen dataclass"


def node_offences(node: ast.AST, where: str) -> Iterator[str]:
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        yield from function_offences(node)
    if isinstance(node, (ast.Attribute, ast.Name)) and name_of(node).rstrip("_") == "nan_to_num":
        yield "nan_to_num hides a non-finite value; let it stop the run"
    if swallows(node):
        yield "an exception is swallowed; name the one you expect, or let it through"
    prints = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    if prints and where not in MAY_PRINT:
        yield f"print belongs to {' and '.join(MAY_PRINT)} alone"


def offences(root: Path) -> list[str]:
    """One line, `file:line: what`, for every broken rule."""
    found = []
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            where = file.relative_to(root).as_posix()
            if file.stem in ("utils", "util") or file.parent.name in ("utils", "util"):
                found.append(f"{where}:1: say in the name what is inside, not that it is useful")
            for node in ast.walk(ast.parse(file.read_text(), where)):
                found += [f"{where}:{getattr(node, 'lineno', 1)}: {what}" for what in node_offences(node, where)]
    return found


def test_house_rules_hold():
    found = offences(ROOT)
    assert not found, "house rules broken:\n" + "\n".join(found)


ALLOWED = """
import contextlib

def f(self, a, b, c, d, e, g, h, i):
    try:
        work(a)
    except FileNotFoundError:
        pass
    except Exception as error:
        raise RuntimeError from error
    with contextlib.suppress(FileNotFoundError):
        work(b)
"""
BROKEN = [
    ("mirai_dist/a.py", "x = torch.nan_to_num(x)", "nan_to_num"),
    ("mirai_dist/a.py", "x.nan_to_num_()", "nan_to_num"),
    ("mirai_dist/a.py", "try:\n    f()\nexcept:\n    pass", "swallowed"),
    ("mirai_dist/a.py", "try:\n    f()\nexcept (OSError, Exception):\n    ...", "swallowed"),
    ("mirai_dist/a.py", "for x in y:\n    try:\n        f()\n    except Exception:\n        continue", "swallowed"),
    ("mirai_dist/a.py", "with suppress(Exception):\n    f()", "swallowed"),
    ("mirai_dist/utils.py", "", "say in the name"),
    ("launcher/mirai_launch/a.py", "print(1)", "print belongs to"),
    ("mirai_dist/a.py", "def f():\n" + "    x = 1\n" * 60, "f has 61 lines"),
    ("mirai_dist/a.py", "def f(a, b, c, d, e, g, h, *, i, j): ...", "f has 9 parameters"),
]


def write(root: Path, path: str, source: str) -> None:
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(source)


@pytest.mark.parametrize(("path", "source", "expected"), BROKEN)
def test_a_broken_rule_is_named(tmp_path: Path, path: str, source: str, expected: str):
    write(tmp_path, path, source)
    found = offences(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:")
    assert expected in found[0]


def test_what_is_allowed_passes(tmp_path: Path):
    write(tmp_path, "mirai_dist/a.py", ALLOWED)
    write(tmp_path, "mirai_dist/observe/console.py", "print(1)")
    many = ", ".join(f"p{index}" for index in range(20))
    write(tmp_path, "kernels/mirai_kernels/a.py", f"@triton.jit\ndef kernel({many}): ...\n")
    assert offences(tmp_path) == []
