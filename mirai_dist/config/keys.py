"""The schema as a tree of dotted keys: look a key up, suggest the nearest one, check a value against its type."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from functools import cache
from typing import Any, get_args, get_origin, get_type_hints

from mirai_dist.config import schema
from mirai_dist.config.error import RecipeError

Path = tuple[str, ...]

# Names of stages and arms become directories and parts of dotted keys.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_WORDS = {
    int: "an integer",
    float: "a number",
    str: "text",
    bool: "true or false",
    list[int]: "a list of integers",
    list[float]: "a list of numbers",
    list[str]: "a list of texts",
}


@dataclass(frozen=True)
class Document:
    """A kind of file: the schema that closes it, and what messages call it."""

    schema: type
    noun: str

    @property
    def root(self) -> Key:
        return Key((), self.schema, None, self)

    @property
    def required(self) -> list[str]:
        """Top keys without a default."""
        every = fields(self.schema)
        return [each.name for each in every if each.default is MISSING and each.default_factory is MISSING]


RECIPE = Document(schema.Recipe, "recipe")


@dataclass(frozen=True)
class Key:
    """One place in the schema: its path, its Python type, and its field (None for a named entry and the root)."""

    path: Path
    type: Any
    field: Field[Any] | None
    document: Document = RECIPE

    @property
    def dotted(self) -> str:
        return ".".join(self.path)

    @property
    def is_section(self) -> bool:
        return is_dataclass(self.type)

    @property
    def is_named(self) -> bool:
        """Whether the key holds entries under names the recipe chooses (stages, arms)."""
        return get_origin(self.type) is dict

    @property
    def is_leaf(self) -> bool:
        return not (self.is_section or self.is_named)

    @property
    def choices(self) -> tuple[str, ...]:
        return self.field.metadata["choices"] if self.field else ()

    @property
    def help(self) -> str:
        return self.field.metadata["help"] if self.field else ""

    def describe(self) -> str:
        """The type in words."""
        if self.is_section:
            return "a section of keys (" + ", ".join(children(self.type)) + ")"
        if self.is_named:
            return "a section of named entries"
        return _WORDS[self.type]


ROOT = RECIPE.root


@cache
def children(section: type) -> dict[str, Any]:
    """Field name -> type of a section, in the order of the schema."""
    hints = get_type_hints(section)
    return {each.name: hints[each.name] for each in fields(section)}


def child(parent: Key, name: str, where: str) -> Key:
    """The key `name` under `parent`; RecipeError with the nearest valid key where there is none."""
    path = (*parent.path, name)
    if parent.is_named:
        if not _NAME.fullmatch(name):
            raise RecipeError(where, f"{'.'.join(path)}: the name {name!r} may hold only letters, digits, _ and -")
        return Key(path, get_args(parent.type)[1], None, parent.document)
    if parent.is_leaf:
        raise RecipeError(where, f"unknown key {'.'.join(path)}: {parent.dotted} is {parent.describe()}, not a section")
    if name not in children(parent.type):
        raise RecipeError(where, f"unknown key {'.'.join(path)}; {suggest(parent, name)}")
    field = next(each for each in fields(parent.type) if each.name == name)
    return Key(path, children(parent.type)[name], field, parent.document)


def lookup(path: Path, where: str, root: Key = ROOT) -> Key:
    """The key at `path`; RecipeError names the nearest valid key where there is none."""
    key = root
    for name in path:
        key = child(key, name, where)
    return key


def every_leaf(key: Key = ROOT) -> Iterator[Key]:
    """All leaf keys; a name that the recipe chooses is written <name>."""
    if key.is_leaf:
        yield key
    elif key.is_named:
        yield from every_leaf(Key((*key.path, "<name>"), get_args(key.type)[1], key.field, key.document))
    else:
        for name in children(key.type):
            yield from every_leaf(child(key, name, "schema"))


def suggest(parent: Key, name: str) -> str:
    """The nearest valid key: a sibling first, else a key of that name elsewhere, else what is valid here."""
    valid = [*children(parent.type)] + ([] if parent.path else ["extends"])
    near = difflib.get_close_matches(name, valid, n=1, cutoff=0.6)
    if near:
        return f"did you mean {'.'.join((*parent.path, near[0]))}?"
    elsewhere = [leaf.dotted for leaf in every_leaf(parent.document.root) if leaf.path[-1] == name]
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    return f"valid here: {', '.join(valid)}"


def check(key: Key, value: Any, where: str) -> Any:
    """The value in the key's own type (an integer is a number); RecipeError for another type or choice."""
    if key.type is float and type(value) is int:
        return float(value)
    if key.type == list[float] and isinstance(value, list):
        value = [float(each) if type(each) is int else each for each in value]
    if get_origin(key.type) is list:
        fits = isinstance(value, list) and all(type(each) is get_args(key.type)[0] for each in value)
    else:
        fits = type(value) is key.type
    if not fits:
        raise RecipeError(where, f"{key.dotted} expects {key.describe()}, got {show(value)}{_hint(key, value)}")
    if key.choices and value not in key.choices:
        near = difflib.get_close_matches(value, key.choices, n=1, cutoff=0.4)
        meant = f"did you mean {near[0]}? " if near else ""
        raise RecipeError(where, f"{key.dotted} is {value!r}; {meant}choices: {', '.join(key.choices)}")
    return value


def show(value: Any) -> str:
    """A value as it would be written in a recipe, shortened."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a section of keys"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _hint(key: Key, value: Any) -> str:
    if value is None:
        return "; write a value or remove the key" if key.type is not str else "; write '' for empty text"
    if key.type is str and isinstance(value, (int, float)):
        return f"; choices: {', '.join(key.choices)}" if key.choices else "; put it in quotes"
    if key.type in (int, float, bool) and re.fullmatch(r"[-+]?[0-9.]+(e[-+]?[0-9]+)?|true|false", str(value)):
        return "; write it without quotes" if isinstance(value, str) else ""
    return ""
