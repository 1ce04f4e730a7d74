"""Who may import whom: section by section the house of README.md, enforced on the syntax tree.

Every import counts, wherever it stands: at the top, in a function, under TYPE_CHECKING, relative, or through
importlib.import_module with a constant name.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCE_ROOTS = (".", "launcher", "kernels")
OURS = ("mirai_dist", "mirai_launch", "mirai_kernels", "tests", "benchmarks")
LIGHT = ("omegaconf", "yaml", "rich")  # the base install


@dataclass(frozen=True)
class Rule:
    """What one part may import. `ours`: our modules (with all below them), besides the part itself; `theirs`: the
    only third-party packages, or None for any; `never`: modules refused although `theirs` would admit them."""

    ours: tuple[str, ...] = ()
    theirs: tuple[str, ...] | None = None
    never: tuple[str, ...] = ()


# The longest matching name decides. A module that no line matches is an offence: decide where it belongs.
RULES = {
    "mirai_launch": Rule(
        (
            "mirai_dist.config",
            "mirai_dist.plan",
            "mirai_dist.node",
            "mirai_dist.operate",
            "mirai_dist.commands.arguments",
            "mirai_dist.runtime.nodelist",
            "mirai_dist.state.commit",
        ),
        LIGHT,
    ),
    "mirai_kernels": Rule((), ("torch", "triton")),
    "mirai_dist.config": Rule((), LIGHT),
    "mirai_dist.plan": Rule(("mirai_dist.config", "mirai_dist.method.arithmetic"), LIGHT),
    "mirai_dist.node": Rule((), ()),
    "mirai_dist.operate": Rule(("mirai_dist.config", "mirai_dist.state.commit"), LIGHT),
    "mirai_dist.method": Rule((), ("torch",), never=("torch.distributed",)),
    "mirai_dist.method.arithmetic": Rule((), ()),
    "mirai_dist.models": Rule(("mirai_dist.attention", "mirai_dist.config.error"), never=("torch.distributed",)),
    "mirai_dist.models.wan.token_ops": Rule(("mirai_dist.models", "mirai_kernels"), never=("torch.distributed",)),
    "mirai_dist.attention": Rule(),
    "mirai_dist.attention.probe": Rule(("mirai_dist.attention", "mirai_kernels")),
    "mirai_dist.attention.split": Rule(("mirai_dist.attention", "mirai_kernels")),
    "mirai_dist.parallel": Rule(("mirai_dist.plan.shards",)),
    "mirai_dist.state": Rule(("mirai_dist.config",)),
    "mirai_dist.observe": Rule(("mirai_dist.config",)),
    "mirai_dist.runtime": Rule(
        ("mirai_dist.config", "mirai_dist.node", "mirai_dist.observe", "mirai_dist.operate")
    ),
    "mirai_dist.data": Rule(("mirai_dist.config", "mirai_dist.state.commit")),
    "mirai_dist.weights": Rule(
        ("mirai_dist.config", "mirai_dist.models.wan.keys", "mirai_dist.parallel.materialize", "mirai_dist.state")
    ),
    "mirai_dist.evaluate": Rule(
        ("mirai_dist.config", "mirai_dist.data", "mirai_dist.models", "mirai_dist.method", "mirai_dist.state.commit"),
        never=("torch.distributed",),
    ),
    "mirai_dist.sample": Rule(
        ("mirai_dist.config", "mirai_dist.data", "mirai_dist.models", "mirai_dist.method"),
    ),
    "mirai_dist.certify": Rule(
        ("mirai_dist.attention", "mirai_dist.config", "mirai_dist.models", "mirai_dist.plan", "mirai_kernels"),
        never=("torch.distributed",),
    ),
    "mirai_dist.cycle": Rule(("mirai_dist",), never=("mirai_dist.__main__",)),
    "mirai_dist.cycle.comparing": Rule(("mirai_dist.method", "mirai_kernels")),
    "mirai_dist.commands": Rule(("mirai_dist",), never=("mirai_dist.__main__",)),
    "mirai_dist.commands.arguments": Rule((), LIGHT),
    "mirai_dist.__main__": Rule(("mirai_dist",)),
}
NOTHING = Rule((), ())  # mirai_dist/__init__.py: a docstring and the version


@dataclass(frozen=True)
class Import:
    module: str
    line: int


def below(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def source_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(module name, file) of every Python file of our three packages."""
    for source_root in SOURCE_ROOTS:
        for package in OURS[:3]:
            folder = root / source_root / package
            for file in sorted(folder.rglob("*.py")):
                parts = file.relative_to(root / source_root).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports_of(file: Path, module: str, known: set[str]) -> Iterator[Import]:
    """Every module that `file` imports, by absolute name; `from a import b` is a.b where that is a module of ours."""
    package = module if file.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                # Of other people's packages only the syntax is known: `from torch import distributed` counts as deeper.
                is_module = deeper in known or base.split(".")[0] not in OURS
                yield Import(deeper if is_module else base, node.lineno)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield Import(node.args[0].value, node.lineno)


def rule_for(module: str) -> tuple[str, Rule] | None:
    names = [name for name in RULES if below(module, name)]
    if names:
        name = max(names, key=len)
        return name, RULES[name]
    return (module, NOTHING) if module == "mirai_dist" else None


def refusal(name: str, rule: Rule, target: str) -> str | None:
    """Why the part `name` may not import `target`; None if it may."""
    top = target.split(".")[0]
    if any(below(target, module) for module in rule.never):
        return f"{name} never imports {target}"
    if top in OURS:
        if target == "mirai_dist" or below(target, name) or any(below(target, module) for module in rule.ours):
            return None
        return f"{name} imports, of ours, only {', '.join(rule.ours) or 'nothing'}; not {target}"
    if rule.theirs is None or top in rule.theirs or top in sys.stdlib_module_names:
        return None
    return f"{name} imports, of others, only {', '.join(rule.theirs) or 'the standard library'}; not {target}"


def offences(root: Path) -> list[str]:
    """One line, `file:line: rule`, for every import that goes the wrong way."""
    files = list(source_files(root))
    known = {module for module, _ in files}
    found = []
    for module, file in files:
        where = file.relative_to(root)
        named_rule = rule_for(module)
        if named_rule is None:
            found.append(f"{where}:1: no rule for {module}: add one to RULES in tests/unit/test_import_directions.py")
            continue
        for imported in imports_of(file, module, known):
            why = refusal(*named_rule, imported.module)
            if why:
                found.append(f"{where}:{imported.line}: {why}")
    return found


def test_imports_go_the_allowed_way():
    found = offences(ROOT)
    assert not found, "imports in a forbidden direction:\n" + "\n".join(found)


OFFENDERS = [
    ("mirai_dist/config/a.py", "import torch", "of others, only omegaconf, yaml, rich; not torch"),
    ("launcher/mirai_launch/a.py", "def f():\n    import mirai_dist.cycle.c", "not mirai_dist.cycle.c"),
    ("launcher/mirai_launch/a.py", "import numpy", "not numpy"),
    ("mirai_dist/method/a.py", "from ..config import c", "not mirai_dist.config.c"),
    ("mirai_dist/method/a.py", "import torch\nfrom torch import distributed", "never imports torch.distributed"),
    ("mirai_dist/method/a.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import numpy", "not numpy"),
    ("mirai_dist/models/a.py", "import torch.distributed.tensor", "never imports torch.distributed.tensor"),
    ("mirai_dist/models/wan/a.py", "from ...config.c import X", "not mirai_dist.config.c"),
    ("mirai_dist/attention/a.py", "import mirai_kernels", "not mirai_kernels"),
    ("mirai_dist/parallel/a.py", "from mirai_dist.plan import c", "only mirai_dist.plan.shards; not mirai_dist.plan.c"),
    ("mirai_dist/state/a.py", "from mirai_dist.observe import c", "not mirai_dist.observe.c"),
    ("mirai_dist/evaluate/a.py", "from mirai_dist import parallel", "not mirai_dist.parallel"),
    ("mirai_dist/cycle/a.py", "import tests.helpers", "not tests.helpers"),
    ("mirai_dist/cycle/a.py", "import importlib\nimportlib.import_module('mirai_launch')", "not mirai_launch"),
    ("kernels/mirai_kernels/a.py", "import mirai_dist.config.c", "not mirai_dist.config.c"),
    ("mirai_dist/a_new_part.py", "", "no rule for mirai_dist.a_new_part"),
    ("mirai_dist/__init__.py", "import torch", "only the standard library; not torch"),
]


def write_tree(root: Path) -> None:
    """A small house in which every import is allowed."""
    for part in ("config", "plan", "method", "models", "parallel", "observe", "cycle", "attention"):
        folder = root / "mirai_dist" / part
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("")
        (folder / "c.py").write_text("from __future__ import annotations\nimport math\n")
    (root / "mirai_dist/plan/shards.py").write_text("from mirai_dist.config import c\n")
    (root / "mirai_dist/parallel/c.py").write_text("import torch.distributed\nfrom ..plan import shards\n")
    (root / "mirai_dist/attention/probe.py").write_text("from . import c\ndef f():\n    import mirai_kernels\n")
    (root / "mirai_dist/cycle/c.py").write_text("from ..method.c import f\nfrom mirai_dist import __version__\n")


@pytest.mark.parametrize(("path", "source", "expected"), OFFENDERS)
def test_an_offending_import_is_named(tmp_path: Path, path: str, source: str, expected: str):
    write_tree(tmp_path)
    assert offences(tmp_path) == []
    file = tmp_path / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(source)
    found = offences(tmp_path)
    assert len(found) == 1, found
    assert found[0].startswith(f"{path}:{max(1, len(source.splitlines()))}: ")
    assert expected in found[0]


def torch_free_modules() -> list[str]:
    parts = ("mirai_launch", "mirai_dist.config", "mirai_dist.plan", "mirai_dist.node", "mirai_dist.operate")
    parts += ("mirai_dist.runtime.rendezvous", "mirai_dist.method.arithmetic")
    return [module for module, _ in source_files(ROOT) if any(below(module, part) for part in parts)]


def test_the_login_node_side_never_loads_torch():
    modules = torch_free_modules()
    assert {"mirai_launch.__main__", "mirai_dist.config.load"} <= set(modules)
    code = (
        "import importlib, sys\n"
        f"for module in {modules!r}:\n"
        "    importlib.import_module(module)\n"
        "    assert 'torch' not in sys.modules, f'{module} loads torch'\n"
    )
    paths = [*(str(ROOT / folder) for folder in SOURCE_ROOTS), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
