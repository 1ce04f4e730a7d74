"""Does a run fit, and if not: the smallest change that makes it.

Changes are tried from the one that costs least to the one that costs most, each alone, then one on top of the other.
What a change costs is in its text. A change that the recipe's rules refuse is not tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mirai_dist.config import Resolved
from mirai_dist.config.error import RecipeError
from mirai_dist.config.schema import Recipe
from mirai_dist.plan.estimate import Cluster, Plan, Variants, plan, variants_of
from mirai_dist.plan.gpus import GIB

MOST_NODES = 64  # times as many as asked for


@dataclass(frozen=True)
class Change:
    """One thing to change: as the user writes it, what it costs, and the recipes and cluster it leads to."""

    text: str
    cost: str
    variants: Variants
    cluster: Cluster


def judged(recipe: Recipe, cluster: Cluster, variants: Variants | None = None) -> Plan:
    """The plan, with the smallest change that makes it fit where it does not. RecipeError as in `plan`."""
    variants = variants or {(name, ""): recipe for name in recipe.stages}
    found = plan(recipe, cluster, variants)
    if found.fits is not False:
        return found
    return replace(found, change=smallest_change(recipe, cluster, variants))


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


def smallest_change(recipe: Recipe, cluster: Cluster, variants: Variants) -> str:
    """What to change, in words; "" where nothing tried is enough."""
    for change in _changes(variants, cluster):
        if _fits(recipe, change):
            return f"{change.text} ({change.cost})"
    texts: list[str] = []
    now, place = variants, cluster
    tried: set[str] = set()
    while (change := next((each for each in _changes(now, place) if _key(each) not in tried), None)) is not None:
        tried.add(_key(change))
        if plan_or_none(recipe, change) is None:
            continue
        texts = [text for text in texts if text.partition("=")[0] != change.text.partition("=")[0]] + [change.text]
        now, place = change.variants, change.cluster
        if _fits(recipe, change):
            return " ".join(texts)
    return ""


def plan_or_none(recipe: Recipe, change: Change) -> Plan | None:
    """The plan after a change; None where ranks and batches do not go together then."""
    first = next(iter(change.variants.values()))
    shared = replace(recipe, parallel=first.parallel, stages=first.stages)
    try:
        return plan(shared, change.cluster, change.variants)
    except RecipeError:
        return None


def _fits(recipe: Recipe, change: Change) -> bool:
    found = plan_or_none(recipe, change)
    return found is not None and found.fits is True


def _key(change: Change) -> str:
    # one key may be lowered again and again, each time to another value
    return change.text


def _changes(variants: Variants, cluster: Cluster) -> Iterator[Change]:
    """Single changes, the cheapest first."""
    first = next(iter(variants.values()))
    parallel = first.parallel

    def section(text: str, cost: str, **keys: Any) -> Change:
        own = {name: replace(each, parallel=replace(each.parallel, **keys)) for name, each in variants.items()}
        return Change(text, cost, own, cluster)

    if not parallel.reshard_after_forward:
        yield section(
            "parallel.reshard_after_forward=true", "a gather for each forward", reshard_after_forward=True
        )
    if parallel.unit == "network":
        yield section("parallel.unit=block", "a gather for each block", unit="block")
    if parallel.recompute == "none":
        yield section("parallel.recompute=block", "blocks run once more in backward", recompute="block")
    batches = [stage.batch for stage in first.stages.values()]
    accumulates = any(batch.global_size > cluster.ranks * batch.micro_size for batch in batches)
    if accumulates and not parallel.sync_every_micro_batch:
        yield section(
            "parallel.sync_every_micro_batch=true", "a reduction for each micro-batch", sync_every_micro_batch=True
        )
    yield from _smaller_batches(variants, cluster)
    for replicas in range(parallel.replicas - 1, 0, -1):
        if cluster.ranks % replicas == 0:
            yield section(f"parallel.replicas={replicas}", "gathers across nodes", replicas=replicas)
    factor = 2
    while factor <= MOST_NODES:
        more = replace(cluster, nodes=cluster.nodes * factor)
        yield Change(f"--nodes {more.nodes}", f"{more.ranks} ranks", variants, more)
        factor *= 2


def _smaller_batches(variants: Variants, cluster: Cluster) -> Iterator[Change]:
    first = next(iter(variants.values()))
    for name, stage in first.stages.items():
        size = stage.batch.micro_size
        for smaller in (each for each in range(size - 1, 0, -1) if size % each == 0):

            def with_batch(recipe: Recipe, name: str = name, smaller: int = smaller) -> Recipe:
                own = recipe.stages[name]
                stages = {**recipe.stages, name: replace(own, batch=replace(own.batch, micro_size=smaller))}
                return replace(recipe, stages=stages)

            changed = {arm: with_batch(recipe) for arm, recipe in variants.items()}
            yield Change(f"stages.{name}.batch.micro_size={smaller}", "more micro-batches", changed, cluster)
