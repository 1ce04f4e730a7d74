"""From recipe files and overrides to one frozen `Recipe`, with the origin of every value.

Settings are merged flat (later ones win, mappings merge, lists and values replace) before anything is
interpolated, so `generator: ${teacher}` follows whatever the teacher becomes, and `generator.blocks=2` then
changes the generator alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mirai_dist.config import keys, rules, source
from mirai_dist.config.error import RecipeError
from mirai_dist.config.schema import Recipe
from mirai_dist.config.source import Mark, Reference, Setting

DEFAULT = "default"

Settings = dict[keys.Path, Setting]


@dataclass(frozen=True)
class Resolved:
    """A checked recipe. `origins`: dotted leaf key -> "default", "recipes/base/x.yaml:12" or "command line"."""

    recipe: Recipe
    origins: Mapping[str, str]
    path: Path
    settings: Settings = field(repr=False)

    def with_overrides(self, overrides: Iterable[str], label: str) -> Resolved:
        """The same recipe with more overrides; `label` is the origin of what they set. RecipeError if they are bad."""
        written = [setting for text in overrides for setting in source.override(text, label)]
        return _resolve(self.path, _merge(self.settings.values(), written))

    def of_stage(self, name: str) -> Resolved:
        """The recipe as the stage `name` sees it: with the stage's own overrides."""
        key = f"stages.{name}.overrides"
        own = self.recipe.stages[name].overrides
        return self.with_overrides(own, f"{self.origins[key]}: {key}") if own else self

    def variants(self) -> Iterator[Resolved]:
        """The recipe itself, then as every stage with overrides of its own sees it."""
        yield self
        yield from (self.of_stage(name) for name, stage in self.recipe.stages.items() if stage.overrides)

    def of_arm(self, name: str) -> Resolved:
        """The recipe as the study's stage sees it in the arm `name`."""
        key = f"study.arms.{name}"
        stage = self.of_stage(self.recipe.study_stage) if self.recipe.study_stage else self
        return stage.with_overrides(self.recipe.study.arms[name], f"{self.origins[key]}: {key}")


def load(path: str | Path, overrides: Iterable[str] = ()) -> Resolved:
    """Read, compose and check a recipe, and what every stage and study arm makes of it.

    Raises RecipeError (one line: where, which key, what to do) for anything that is wrong with it.
    """
    path = Path(path)
    written = [setting for text in overrides for setting in source.override(text, source.COMMAND_LINE)]
    resolved = _resolve(path, _merge(source.read(path), written))
    for name in resolved.recipe.stages:
        resolved.of_stage(name)
    for name in resolved.recipe.study.arms:
        resolved.of_arm(name)
    return resolved


def _merge(*layers: Iterable[Setting]) -> Settings:
    merged: Settings = {}
    for setting in (each for layer in layers for each in layer):
        if setting.value is Mark.SECTION:
            # Opening a mapping changes nothing that is already there; keys inside it will.
            merged.setdefault(setting.path, setting)
            continue
        if isinstance(setting.value, Reference):
            depth = len(setting.path)
            for path in [path for path in merged if path[:depth] == setting.path and len(path) > depth]:
                del merged[path]
        for depth in range(1, len(setting.path)):
            above = setting.path[:depth]
            merged.setdefault(above, Setting(above, Mark.SECTION, setting.origin))
        merged[setting.path] = setting
    return merged


def _resolve(path: Path, settings: Settings) -> Resolved:
    shown = source.shown_path(path)
    recipe, origins = _assemble(settings, shown, keys.ROOT)
    rules.check(recipe, origins, shown)
    return Resolved(recipe, origins, path, settings)


def load_document(path: Path, document: keys.Document) -> tuple[Any, dict[str, str]]:
    """A file of another kind than a recipe, as its schema's dataclass, with the origin of every value.

    Raises RecipeError for anything that is wrong with the file itself; the values' meaning is the caller's to check.
    """
    return _assemble(_merge(source.read(path, root=document.root)), source.shown_path(path), document.root)


def _assemble(settings: Settings, shown: str, root: keys.Key) -> tuple[Any, dict[str, str]]:
    leaves = _Collector(settings, shown, root).collect()
    values = _interpolate(leaves, root)
    return _build(root, values), {".".join(leaf): setting.origin for leaf, setting in leaves.items()}


class _Collector:
    """Walks the schema and finds the setting of every leaf: written, referred to, or default."""

    def __init__(self, settings: Settings, shown: str, root: keys.Key) -> None:
        self.settings = settings
        self.shown = shown
        self.root = root
        self.leaves: Settings = {}
        for setting in settings.values():
            if isinstance(setting.value, Reference):
                self._check_reference(setting)

    def collect(self) -> Settings:
        self._section(self.root, MISSING)
        return self.leaves

    def _section(self, key: keys.Key, default: Any) -> None:
        for name in keys.children(key.type):
            below = keys.child(key, name, self.shown)
            self._any(below, _inherited(below, default))

    def _any(self, key: keys.Key, default: Any) -> None:
        written = self._find(key.path)
        if written is not None and isinstance(written.value, Reference):
            default = self._default_at(written.value.target)
        if written is None and default is MISSING:
            above = self._find(key.path[:-1])
            where = above.origin if above else self.shown
            raise RecipeError(where, f"missing key {key.dotted} ({key.help}); write it, it has no default")
        if key.is_section:
            self._section(key, default)
        elif key.is_leaf:
            self.leaves[key.path] = written or Setting(key.path, default, DEFAULT)
        else:
            self._named(key, written, default)

    def _named(self, key: keys.Key, written: Setting | None, default: Any) -> None:
        # Entries that a recipe writes replace the default ones: nobody wants a default arm beside their own.
        if written is None:
            for name, value in default.items():
                self.leaves[(*key.path, name)] = Setting((*key.path, name), value, DEFAULT)
            return
        for name in self._names(key.path):
            self._any(keys.child(key, name, written.origin), MISSING)

    def _default_at(self, path: keys.Path) -> Any:
        """Default of the section at a path: the target of a reference brings its own defaults along."""
        default: Any = MISSING
        for depth in range(1, len(path) + 1):
            default = _inherited(keys.lookup(path[:depth], self.shown, self.root), default)
            written = self._find(path[:depth])
            if written is not None and isinstance(written.value, Reference):
                default = self._default_at(written.value.target)
        return default

    def _find(self, path: keys.Path, trail: tuple[keys.Path, ...] = ()) -> Setting | None:
        """What is written at a path, directly or through a reference above it (whose origin it then has)."""
        if path in self.settings:
            return self.settings[path]
        if path in trail:
            raise RecipeError(self.shown, f"{'.'.join(path)} refers to itself; write one of the sections out")
        for depth in range(len(path) - 1, 0, -1):
            above = self.settings.get(path[:depth])
            if above is not None and isinstance(above.value, Reference):
                found = self._find((*above.value.target, *path[depth:]), (*trail, path))
                return found and Setting(path, found.value, above.origin)
        return None

    def _names(self, path: keys.Path) -> dict[str, None]:
        above = self.settings.get(path)
        through = self._names(above.value.target) if above and isinstance(above.value, Reference) else {}
        depth = len(path)
        own = {each[depth]: None for each in self.settings if len(each) > depth and each[:depth] == path}
        return through | own

    def _check_reference(self, setting: Setting) -> None:
        """A reference leads to a section of the same kind that is there, and not back to itself."""
        dotted, step, seen = ".".join(setting.path), setting, [setting.path]
        while isinstance(step.value, Reference):
            target = step.value.target
            name = ".".join(target)
            key = keys.lookup(target, f"{setting.origin}: {dotted} refers to ${{{name}}}", self.root)
            if key.type != keys.lookup(setting.path, setting.origin, self.root).type:
                what = f"{dotted} cannot be ${{{name}}}: the two sections hold different keys"
                raise RecipeError(setting.origin, what)
            if any(target[: len(each)] == each or each[: len(target)] == target for each in seen):
                what = f"{dotted} refers to itself through ${{{name}}}; write one of them out"
                raise RecipeError(setting.origin, what)
            found = self._find(target)
            if found is None and self._default_at(target) is MISSING:
                raise RecipeError(setting.origin, f"{dotted} refers to ${{{name}}}, which the recipe does not set")
            if found is None:
                return
            seen.append(target)
            step = found


def _inherited(key: keys.Key, default: Any) -> Any:
    """Default of a key below a section whose own default is `default` (MISSING: the section has none)."""
    if key.field is None:
        return MISSING
    if default is not MISSING:
        return getattr(default, key.path[-1])
    return key.field.default if key.field.default_factory is MISSING else key.field.default_factory()


def _interpolate(leaves: Settings, root: keys.Key) -> dict[keys.Path, Any]:
    """Values of all leaves with `${a.b}` inside values resolved (OmegaConf) and checked against the schema."""
    tree: dict[str, Any] = {}
    for path, setting in leaves.items():
        section = tree
        for name in path[:-1]:
            section = section.setdefault(name, {})
        section[path[-1]] = setting.value
    values = {}
    for path, setting in leaves.items():
        value = setting.value
        if "${" in str(value):
            value = _resolved(tree, ".".join(path), setting)
            value = keys.check(keys.lookup(path, setting.origin, root), value, setting.origin)
        values[path] = value
    return values


def _resolved(tree: dict[str, Any], dotted: str, setting: Setting) -> Any:
    try:
        OmegaConf.create([setting.value])  # a malformed `${` is this key's fault, before it is the whole tree's
        value = OmegaConf.select(OmegaConf.create(tree), dotted)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except (OmegaConfBaseException, RecursionError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        text = f"{dotted} is {keys.show(setting.value)}, which cannot be resolved: {reason}"
        raise RecipeError(setting.origin, text) from None


def _build(key: keys.Key, values: Mapping[keys.Path, Any]) -> Any:
    if key.is_leaf:
        value = values[key.path]
        return list(value) if isinstance(value, list) else value
    if key.is_named:
        depth = len(key.path)
        names = {path[depth]: None for path in values if path[:depth] == key.path}
        return {name: _build(keys.child(key, name, "recipe"), values) for name in names}
    return key.type(**{name: _build(keys.child(key, name, "recipe"), values) for name in keys.children(key.type)})
