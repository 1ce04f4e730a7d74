"""Recipe files and overrides as flat settings, each with the place it was written at.

YAML is composed, not loaded: the node tree still knows every key's line, and a key written twice is still
there twice. Scalars follow YAML 1.2 as people write it: `1e-4` is a number, `yes`, `on` and `1:30` are text.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import yaml

from mirai_dist.config import keys
from mirai_dist.config.error import RecipeError

COMMAND_LINE = "command line"

_TAG = "tag:yaml.org,2002:"
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", list("-+.0123456789")),
)
_CONVERT: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": int,
    "float": float,
    "str": str,
}


class RecipeLoader(yaml.SafeLoader):
    """Composes nodes with the scalar rules above."""

    yaml_implicit_resolvers: dict[str, Any] = {}


class RecipeDumper(yaml.SafeDumper):
    """Quotes exactly what RecipeLoader would not read back as text."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _name, _pattern, _first in _RESOLVERS:
    for _class in (RecipeLoader, RecipeDumper):
        _class.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


class Mark(Enum):
    """What a setting holds when it holds no value."""

    SECTION = "section"


@dataclass(frozen=True)
class Reference:
    """A whole section taken from another one: `generator: ${teacher}`."""

    target: keys.Path


@dataclass(frozen=True)
class Setting:
    """One written key. `value`: a leaf's value, a Reference, or Mark.SECTION where a mapping was opened."""

    path: keys.Path
    value: Any
    origin: str


Where = Callable[[yaml.Node], str]


def read(
    path: Path, chain: tuple[Path, ...] = (), asked_at: str = COMMAND_LINE, root: keys.Key = keys.ROOT
) -> Iterator[Setting]:
    """Settings of a file, those of the files it extends first. RecipeError for anything wrong with it."""
    shown, noun = shown_path(path), root.document.noun
    if path.resolve() in chain:
        names = " -> ".join(shown_path(each) for each in (*chain, path.resolve()))
        what = f"extends: {noun} files extend each other in a circle ({names}); remove one of them"
        raise RecipeError(asked_at, what)
    tree = _compose_file(path, shown, asked_at, root.document)
    where: Where = lambda node: f"{shown}:{node.start_mark.line + 1}"
    own = []
    for name, value in tree.value:
        if name.value == "extends":
            for base in _bases(value, where):
                target = path.parent / base
                yield from read(target, (*chain, path.resolve()), where(name), root)
        else:
            own.append((name, value))
    _refuse_duplicates(tree, (), where)
    yield from _entries(own, root, where)


def override(text: str, origin: str) -> list[Setting]:
    """Settings of one `a.b=value`; the value is YAML, and nothing after the `=` is empty text."""
    dotted, equals, value = text.partition("=")
    if not equals or not dotted.strip():
        raise RecipeError(origin, f"override {text!r} is not of the form section.key=value")
    path = tuple(dotted.strip().split("."))
    if path == ("extends",):
        raise RecipeError(origin, "extends belongs in a recipe file; an override sets one key")
    key = keys.lookup(path, origin)
    if not value.strip():
        node: yaml.Node | None = yaml.ScalarNode(_TAG + "str", "")
    else:
        node = _compose(value, f"{origin}: override {text!r}", line=False)
    assert node is not None
    return list(_flatten(node, key, lambda _: origin))


def shown_path(path: Path) -> str:
    """The path as messages show it: relative where it lies under the working directory."""
    absolute = path.resolve()
    here = Path.cwd()
    return str(absolute.relative_to(here)) if absolute.is_relative_to(here) else os.path.normpath(path)


def dump(data: Any, flow: bool = False) -> str:
    """YAML that `read` takes back value for value; `flow`: on one line."""
    style = {"default_flow_style": flow, "width": 2**16, "allow_unicode": True}
    text = yaml.dump(data, Dumper=RecipeDumper, sort_keys=False, **style)
    return text.removesuffix("\n...\n").removesuffix("\n") if flow else text


def _compose_file(path: Path, shown: str, asked_at: str, document: keys.Document) -> yaml.MappingNode:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(asked_at, f"no {document.noun} file {shown}; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(asked_at, f"cannot read the {document.noun} file {shown}: {error}") from None
    root = _compose(text, shown)
    if root is None:
        needed = ", ".join(document.required)
        raise RecipeError(shown, f"the {document.noun} file is empty; it needs at least {needed}")
    if not isinstance(root, yaml.MappingNode):
        raise RecipeError(f"{shown}:{root.start_mark.line + 1}", f"a {document.noun} is a mapping of keys to values")
    return root


def _compose(text: str, where: str, line: bool = True) -> yaml.Node | None:
    try:
        return yaml.compose(text, Loader=RecipeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}:{mark.line + 1}" if mark and line else where
        context = f"{error.context}, " if error.context else ""
        raise RecipeError(at, f"not valid YAML: {context}{error.problem}") from None
    except yaml.YAMLError as error:
        raise RecipeError(where, f"not valid YAML: {error}") from None


def _bases(node: yaml.Node, where: Where) -> list[str]:
    items = node.value if isinstance(node, yaml.SequenceNode) else [node]
    read_items = [_scalar(item, where(item)) if isinstance(item, yaml.ScalarNode) else None for item in items]
    texts = [text for text in read_items if isinstance(text, str) and text]
    if not items or len(texts) < len(items):
        raise RecipeError(where(node), "extends expects a path, or a list of paths, relative to this file")
    return texts


def _flatten(node: yaml.Node, key: keys.Key, where: Where) -> Iterator[Setting]:
    if isinstance(node, yaml.MappingNode) and not key.is_leaf:
        yield Setting(key.path, Mark.SECTION, where(node))
        _refuse_duplicates(node, key.path, where)
        yield from _entries(node.value, key, where)
        return
    value = _value(node, where)
    if key.is_leaf:
        interpolated = "${" in str(value)
        yield Setting(key.path, value if interpolated else keys.check(key, value, where(node)), where(node))
    elif isinstance(value, str) and (found := re.fullmatch(r"\$\{\s*([^${}:\s]+)\s*\}", value)):
        yield Setting(key.path, Reference(tuple(found.group(1).split("."))), where(node))
    else:
        raise RecipeError(where(node), f"{key.dotted} expects {key.describe()}, got {keys.show(value)}")


def _entries(pairs: Iterable[tuple[yaml.Node, yaml.Node]], key: keys.Key, where: Where) -> Iterator[Setting]:
    for name, value in pairs:
        # The line of the key, not of its value: that is where a reader looks.
        at = where(name)
        yield from _flatten(value, keys.child(key, name.value, at), _at_key(at, value, where))


def _at_key(at: str, value: yaml.Node, where: Where) -> Where:
    return lambda node: at if node is value else where(node)


def _refuse_duplicates(node: yaml.MappingNode, path: keys.Path, where: Where) -> None:
    seen: dict[str, str] = {}
    for name, _ in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise RecipeError(where(name), f"a key under {'.'.join(path) or 'the recipe'} is not plain text")
        dotted = ".".join((*path, name.value))
        if name.value in seen:
            raise RecipeError(where(name), f"{dotted} is written twice, first at {seen[name.value]}; remove one")
        seen[name.value] = where(name)


def _value(node: yaml.Node, where: Where) -> Any:
    """Plain value of a scalar or of a list of scalars; a mapping or nested list comes back as an empty dict,
    which no leaf accepts."""
    if isinstance(node, yaml.ScalarNode):
        return _scalar(node, where(node))
    if isinstance(node, yaml.SequenceNode):
        return [_scalar(item, where(item)) if isinstance(item, yaml.ScalarNode) else {} for item in node.value]
    return {}


def _scalar(node: yaml.ScalarNode, where: str) -> Any:
    tag = str(node.tag).removeprefix(_TAG)
    if tag not in _CONVERT:
        raise RecipeError(where, f"the YAML tag {node.tag} has no meaning in a recipe; remove it")
    try:
        return _CONVERT[tag](node.value)
    except ValueError:
        raise RecipeError(where, f"{node.value!r} cannot be read as {tag}") from None
