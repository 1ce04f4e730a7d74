"""Does a run fit, and if not: the smallest change that makes it.

Changes are tried from the one that costs least to the one that costs most, each alone, then one on top of the other,
of which those are left out again that the rest makes needless. A number of ranks that cannot share the batches is
passed over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

from mirai_dist.config import Resolved
from mirai_dist.config.error import RecipeError
from mirai_dist.config.rules import check_layout
from mirai_dist.config.schema import Recipe
from mirai_dist.plan.estimate import Cluster, Plan, Variants, needed, plan, variants_of
from mirai_dist.plan.gpus import GIB

MOST_NODES = 64  # times as many as asked for


@dataclass(frozen=True)
class Place:
    """A recipe as its stages and arms see it, and where it runs."""

    variants: Variants
    cluster: Cluster

    @property
    def possible(self) -> bool:
        """Whether the ranks can share the batches of all stages."""
        try:
            for recipe in self.variants.values():
                check_layout(recipe, self.cluster.ranks)
        except RecipeError:
            return False
        return True

    @property
    def fits(self) -> bool:
        assert self.cluster.limit is not None
        limit, cluster = self.cluster.limit, self.cluster
        return self.possible and all(needed(own, name, cluster) <= limit for (name, _), own in self.variants.items())


@dataclass(frozen=True)
class Change:
    """One thing to change, as the user writes it, and what it costs. key: of two changes with one, the later counts."""

    key: str
    text: str
    cost: str
    made: Callable[[Place], Place]


def judged(recipe: Recipe, cluster: Cluster, variants: Variants | None = None) -> Plan:
    """The plan, with the smallest change that makes it fit where it does not. RecipeError as in `plan`."""
    variants = variants or {(name, ""): recipe for name in recipe.stages}
    found = plan(recipe, cluster, variants)
    if found.fits is not False:
        return found
    return replace(found, change=smallest_change(cluster, variants))


def refusal(found: Plan) -> str:
    """One line about a plan that does not fit: peak by role, the limit, what to change."""
    assert found.cluster.limit is not None
    worst, where = found.worst, found.worst.peak
    largest = sorted(where.by_role().items(), key=lambda item: -item[1])
    roles = ", ".join(f"{role} {count / GIB:.3g}" for role, count in largest if count > 0.005 * where.total)
    what = f"stage {worst.title} needs {found.peak / GIB:.4g} GiB a rank in {where.update} {where.phase} ({roles}), "
    what += f"{found.cluster.limit / GIB:.4g} are there"
    change = found.change or "nothing tried makes it fit: other networks, or a shorter video"
    return f"{what}; {change}"


def headline(found: Plan) -> str:
    """One line of a plan, for the start of a run."""
    peak = f"plan: {found.peak / GIB:.3g} GiB a rank"
    if found.headroom is not None and found.cluster.limit is not None:
        peak += f" of {found.cluster.limit / GIB:.3g}, most in {found.worst.title} {found.worst.peak.phase}"
    if found.seconds_a_cycle is not None and found.gpu_hours is not None:
        peak += f"; {found.seconds_a_cycle:.3g} s a cycle, {found.gpu_hours:,.3g} GPU-hours"
    return f"{peak} (predicted)"


def refuse_over(resolved: Resolved, cluster: Cluster) -> Plan:
    """The plan of a run about to start. RecipeError where it is over the cluster's limit, unless the recipe says
    `parallel.over_memory: warn`."""
    found = judged(resolved.recipe, cluster, variants_of(resolved))
    if found.fits is False and resolved.recipe.parallel.over_memory == "refuse":
        what = f"{refusal(found)}; parallel.over_memory=warn starts it all the same"
        raise RecipeError("plan", what)
    return found


def smallest_change(cluster: Cluster, variants: Variants) -> str:
    """What to change, in words; "" where nothing tried is enough."""
    # what needs most comes first: where it does not fit, the others need no look
    largest = sorted(variants.items(), key=lambda item: -needed(item[1], item[0][0], cluster))
    start = Place(dict(largest), cluster)
    for change in _changes(start):
        if change.made(start).fits:
            return f"{change.text} ({change.cost})"
    chosen = _several(start)
    for change in chosen:  # what a later one made needless
        fewer = [each for each in chosen if each is not change]
        if _all(fewer, start).fits:
            chosen = fewer
    return " ".join(change.text for change in chosen)


def _several(start: Place) -> list[Change]:
    """Changes one on top of the other until it fits; none where it never does."""
    together: dict[str, Change] = {}
    tried: set[str] = set()
    now = start
    while change := next((each for each in _changes(now) if each.text not in tried), None):
        tried.add(change.text)
        changed = change.made(now)
        if not changed.possible:
            continue
        now, together[change.key] = changed, change
        if now.fits:
            return list(together.values())
    return []


def _all(changes: list[Change], start: Place) -> Place:
    return reduce(lambda place, change: change.made(place), changes, start)


def _changes(place: Place) -> Iterator[Change]:
    """Single changes, the cheapest first."""
    first, cluster = next(iter(place.variants.values())), place.cluster
    parallel = first.parallel
    if not parallel.reshard_after_forward:
        yield _parallel("reshard_after_forward", True, "a gather for each forward")
    if parallel.unit == "network":
        yield _parallel("unit", "block", "a gather for each block")
    if parallel.recompute == "none":
        yield _parallel("recompute", "selective", "blocks run once more in backward, but for attention")
    if parallel.recompute != "block":
        yield _parallel("recompute", "block", "blocks run once more in backward")
    batches = [stage.batch for stage in first.stages.values()]
    accumulates = any(batch.global_size > cluster.ranks * batch.micro_size for batch in batches)
    if accumulates and not parallel.sync_every_micro_batch:
        yield _parallel("sync_every_micro_batch", True, "a reduction for each micro-batch")
    for name, stage in first.stages.items():
        size = stage.batch.micro_size
        for smaller in (each for each in range(size - 1, 0, -1) if size % each == 0):
            yield _micro_batch(name, smaller)
    for replicas in range(parallel.replicas - 1, 0, -1):
        if cluster.ranks % replicas == 0:
            yield _parallel("replicas", replicas, "gathers between nodes")
    for nodes in (cluster.nodes << power for power in range(1, MOST_NODES.bit_length())):
        yield _nodes(nodes, nodes * cluster.gpus_per_node)


def _on_every(place: Place, changed: Callable[[Recipe], Recipe]) -> Place:
    return replace(place, variants={key: changed(recipe) for key, recipe in place.variants.items()})


def _parallel(name: str, value: Any, cost: str) -> Change:
    """Another value of a key of the section parallel."""

    def changed(recipe: Recipe) -> Recipe:
        return replace(recipe, parallel=replace(recipe.parallel, **{name: value}))

    written = str(value).lower() if isinstance(value, bool) else value
    return Change(name, f"parallel.{name}={written}", cost, lambda place: _on_every(place, changed))


def _micro_batch(name: str, size: int) -> Change:
    """Fewer samples at once in a stage."""

    def changed(recipe: Recipe) -> Recipe:
        stage = recipe.stages[name]
        smaller = replace(stage, batch=replace(stage.batch, micro_size=size))
        return replace(recipe, stages={**recipe.stages, name: smaller})

    text = f"stages.{name}.batch.micro_size={size}"
    return Change(name, text, "more micro-batches", lambda place: _on_every(place, changed))


def _nodes(nodes: int, ranks: int) -> Change:
    """More nodes."""

    def changed(place: Place) -> Place:
        return replace(place, cluster=replace(place.cluster, nodes=nodes))

    return Change("nodes", f"--nodes {nodes}", f"{ranks} ranks", changed)
