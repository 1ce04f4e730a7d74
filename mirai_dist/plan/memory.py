"""Bytes a rank holds, by role and phase: what lasts, and what each phase of an update adds to it.

What lasts, for a network of P parameters over S shards (each parameter's first axis rounded up to S):

    weights      P / S in the plan's storage dtype: fp32 masters where trained, the compute dtype where frozen
    moments      2 P / S in the same dtype              average      P / S fp32
    KV cache     blocks x 2 x batch x frames x tokens x d, in the compute dtype; all frames of a training rollout,
                 because recomputation reads what each segment saw
    replay       (state, target) of every sample of the rank, counted on the device; a run short of memory keeps them in
                 the host's

What a phase adds, with c bytes a value in the compute dtype and w in at least fp32, N tokens, d and f the widths:

    kept         recomputed blocks keep their input, N d c, and if attention's output is kept, N (d c + 4 h) more, for h
                 heads; other blocks what backward reads,
                 N (d (19 c + 3 w) + 2 f c) and the keys that a segment saw, 2 K d c; in every block a copy of the past
                 that a segment saw, where sinks have moved
    working      a forward without gradient: N (3 d + 2 f) c at the feed-forward, or N d (6 c + 2 w) where queries and
                 keys are rotated; a segment's with gradient also 2 K d c for keys with a past, and its own keys of all
                 blocks;
                 backward of a recomputed block: what it recomputes, and N (3 d + f) c
    gathered     resharded units: the root and two blocks; else every network that ran, whole
    gradients    P / S fp32 once reduced; before that P fp32 where micro-batches are accumulated without reducing them;
                 and P in the compute dtype while the segments of a rollout add up
    reduction    one unit in fp32

Tensors are counted, not what an allocator adds to them: `SLACK` is that, for a device. What operators use inside,
process and CUDA context (`CONTEXT`) come on top.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from mirai_dist.config.schema import Recipe, Stage
from mirai_dist.method.arithmetic import PRESETS, supervised_segments
from mirai_dist.plan import passes, traffic
from mirai_dist.plan.passes import Pass, Update
from mirai_dist.plan.shapes import BYTES, PATCH, frame_tokens, network_of, of_role
from mirai_dist.plan.traffic import Sharded

WIDE = 4  # bytes of the dtype that norms, losses, masters and reductions are at least in
LATENTS = 5  # copies of a batch of latents, in fp32, that losses and schedules hold at a time
ROLLED = 3  # the same where latents come from a rollout


@dataclass(frozen=True)
class Moment:
    """What a rank holds in one phase of one update: bytes by (what, role)."""

    update: str
    phase: str
    held: Mapping[tuple[str, str], int]

    @property
    def total(self) -> int:
        return sum(self.held.values())

    def by_what(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (what, _), count in self.held.items():
            found[what] = found.get(what, 0) + count
        return found

    def by_role(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for (_, role), count in self.held.items():
            found[role] = found.get(role, 0) + count
        return found


def moments(recipe: Recipe, stage: Stage, mesh: tuple[int, int]) -> tuple[Moment, ...]:
    """Every phase of every update of a stage at its largest: steady state, foresight on, the last micro-batch."""
    return tuple(_Ledger(recipe, stage, mesh).moments())


class _Ledger:
    """Adds up a stage. `held` are dictionaries of bytes by (what, role)."""

    def __init__(self, recipe: Recipe, stage: Stage, mesh: tuple[int, int]) -> None:
        self.recipe, self.stage, self.mesh = recipe, stage, mesh
        self.roles = passes.roles(recipe, stage)
        self.networks = traffic.follower(recipe, stage, mesh).networks
        self.updates = passes.updates(recipe, stage, mesh[0] * mesh[1])
        self.lasting = dict(self._lasting())

    def moments(self) -> Iterator[Moment]:
        for update in self.updates:
            yield from self._of_update(update)
        if self.stage.kind == "ode" and self.stage.trajectories and not self.recipe.data.ode_pairs:
            yield Moment("trajectories", "trajectories", dict(self._trajectories()))

    def _held(self, update: Update, phase: str, *more: Mapping[tuple[str, str], int]) -> Moment:
        held = dict(self.lasting)
        for extra in (self._latents(update), *more):
            for key, count in extra.items():
                held[key] = held.get(key, 0) + count
        return Moment(update.name, phase, {key: count for key, count in held.items() if count})

    # --- what lasts ------------------------------------------------------------------------------------------------

    def _lasting(self) -> Iterator[tuple[tuple[str, str], int]]:
        for role, network in self.networks.items():
            own = network.parameters.sharded(network.shards)
            storage = BYTES[network.plan.storage_dtype]
            yield ("weights", role), own * storage
            if role in self.roles.trained:
                yield ("moments", role), 2 * own * storage
            if role in self.roles.averaged:
                yield ("average", role), own * WIDE
        if self.stage.kind != "dmd":
            return
        batch = self.stage.batch.micro_size
        yield ("KV cache", "generator"), kv_cache(self.recipe, batch, passes.rollout_cache_frames(self.recipe))

    def _latents(self, update: Update) -> dict[tuple[str, str], int]:
        video = self.recipe.video
        dmd = self.stage.kind == "dmd"
        frames, copies = (passes.rollout_frames(self.recipe), ROLLED) if dmd else (video.latent_frames, LATENTS)
        if update.name == "replay":
            return {}
        one = frames * video.channels * video.latent_height * video.latent_width * WIDE
        text = self.recipe.text.length * self.recipe.text.dim * WIDE
        batch = self.stage.batch.micro_size
        return {("latents and text", "data"): batch * (copies * one + text)}

    # --- phases of an update -----------------------------------------------------------------------------------------

    def _of_update(self, update: Update) -> Iterator[Moment]:
        accumulated = self._accumulated(update)
        kept: dict[tuple[str, str], int] = {}
        used: list[str] = []
        for phase in dict.fromkeys(each.phase for each in update.passes):
            own = [each for each in update.passes if each.phase == phase]
            used += [each.role for each in own]
            features, replay = self._features(update, phase), self._replay(update, phase)
            found = []
            for each in own:
                working = {("working", each.role): self._working(each)}
                if each.gradient:
                    _add(kept, ("activations", each.role), round(each.count * self._kept(each)))
                    if not self.networks[each.role].plan.recompute:
                        working = {}  # what it works with is what it keeps
                gathered = self._gathered(used, [each.role])
                found.append(self._held(update, phase, accumulated, kept, working, gathered, replay, features))
            yield max(found, key=lambda moment: moment.total)
        yield max(self._backward(update, used, kept, accumulated), key=lambda moment: moment.total)

    def _backward(
        self, update: Update, used: list[str], kept: dict[tuple[str, str], int], accumulated: dict[tuple[str, str], int]
    ) -> Iterator[Moment]:
        """Moments of backward, network by network from the last on: when the first of its passes goes backward, and
        when its last one does, whose gradients are then whole."""
        phase = "replay" if update.name == "replay" else "predictor"
        for role in reversed(list(kept)):
            passes_of = [each for each in update.passes if each.gradient and each.role == role[1]]
            largest = max(passes_of, key=self._working_back)
            working = {("working", role[1]): self._working_back(largest)}
            gathered, replay = self._gathered(used, [role[1]]), self._replay(update, phase)
            features = self._features(update, phase) if role[1] == "predictor" else {}
            first = {**kept, role: kept[role] - self._kept_by_head(largest)}
            yield self._held(update, "backward", accumulated, first, working, gathered, replay, features)
            segments = sum(each.count for each in passes_of)
            last = {**kept, role: round(kept[role] / segments / max(1, largest.blocks))}
            others = {key: count for key, count in accumulated.items() if key[1] != role[1]}
            gradients = self._gradients(update, role[1], segments)
            yield self._held(update, "backward", others, last, working, gathered, replay, gradients)
            del kept[role]

    def _gradients(self, update: Update, role: str, segments: float) -> dict[tuple[str, str], int]:
        """At the end of a network's backward: reduced to shards, one unit on its way; or whole and fp32, where earlier
        micro-batches wait to be reduced with the last. Where segments add up, once more in the compute dtype: of the
        micro-batches that wait, not the first, whose fp32 copy takes its place, nor the last, which is reduced."""
        network, count = self.networks[role], update.micro_batches
        waits = count > 1 and not network.plan.sync_every_micro_batch
        adds_up = segments > 1 and (count > 2 or not waits)
        unreduced = network.parameters.count * BYTES[network.plan.compute_dtype] if adds_up else 0
        held = network.parameters.count * WIDE if waits else self._reduced(role)
        reduction = max(network.reduced) if network.shards > 1 and not waits else 0
        return {("gradients", role): unreduced + held, ("reduction", role): reduction}

    def _kept_by_head(self, each: Pass) -> int:
        """What backward has freed when it comes to the last block."""
        if each.role == "predictor":
            return 0
        return outer_kept(self.recipe, replace(each, text=False)) if each.text else 0

    def _replay(self, update: Update, phase: str) -> dict[tuple[str, str], int]:
        """Pairs of the rank's samples: cleared when a generator update begins, and filled micro-batch by micro-batch;
        a replay update makes a second copy of one micro-batch."""
        if self.stage.kind != "dmd" or "predictor" not in self.roles.trained:
            return {}
        one, count = self.stage.batch.micro_size * replay_pair(self.recipe), update.micro_batches
        if update.name == "replay":
            return {("replay cache", "predictor"): (count + 1) * one}
        filled = update.name != "generator" or phase == "predictor"
        return {("replay cache", "predictor"): (count if filled else count - 1) * one}

    def _reduced(self, role: str) -> int:
        network = self.networks[role]
        return network.parameters.sharded(network.shards) * BYTES[network.plan.storage_dtype]

    def _accumulated(self, update: Update) -> dict[tuple[str, str], int]:
        """Gradients of earlier micro-batches: whole and fp32, or reduced to shards already."""
        if update.micro_batches == 1:
            return {}
        found = {}
        for role in update.trained:
            network = self.networks[role]
            synced = network.plan.sync_every_micro_batch
            found["gradients", role] = self._reduced(role) if synced else network.parameters.count * WIDE
        return found

    def _gathered(self, used: list[str], now: list[str] | tuple[str, ...]) -> dict[tuple[str, str], int]:
        found = {}
        for role in dict.fromkeys((*used, *now, *self.networks)):
            network = self.networks[role]
            if not network.resharded:
                found["gathered", role] = sum(network.gathered)
            elif role in now:
                found["gathered", role] = _passing(network)
        largest = max((role for role in now if ("gathered", role) in found), key=lambda role: found["gathered", role])
        return {
            key: count
            for key, count in found.items()
            if key[1] == largest or not self.networks[key[1]].resharded
        }

    def _features(self, update: Update, phase: str) -> dict[tuple[str, str], int]:
        """Fused targets, states as the predictor reads them, and its comparison with the targets."""
        found = [each for each in update.passes if each.role == "predictor"]
        if phase not in ("encoder", "predictor", "replay") or not found:
            return {}
        recipe, compute, rows = self.recipe, BYTES[self.recipe.parallel.compute_dtype], found[0].batch * found[0].tokens
        wide = WIDE if PRESETS[recipe.foresight.preset].wide_fusion and not fused_head(recipe) else compute
        targets = found[0].tokens * sum(found[0].answers) * recipe.teacher.dim
        if phase == "encoder":
            return {("features", "predictor"): targets * wide}
        if fused_head(recipe):
            compared = _of_fused_head(recipe, found[0])
        else:
            compared = targets * (compute + (wide if wide > compute else 0) + COMPARED * wide)
        if phase == "replay":
            return {("features", "predictor"): compared}
        states = rows * recipe.generator.dim * compute
        return {("features", "predictor"): targets * wide + states + compared}

    # --- one pass ----------------------------------------------------------------------------------------------------

    def _kept(self, each: Pass) -> int:
        """Bytes a differentiated pass keeps for backward."""
        if each.role == "predictor":
            return predictor_kept(self.recipe, each)
        plan = self.networks[each.role].plan
        block = each.batch * each.tokens * network_of(each.role, self.recipe).dim * BYTES[plan.compute_dtype]
        inside = block if plan.recompute else block_kept(self.recipe, each)
        if plan.keep_attention:
            attended = block + each.batch * each.tokens * network_of(each.role, self.recipe).heads * WIDE
            inside += attended * (2 if self.recipe.text.length >= each.tokens else 1)
        leaked = 2 * block * sum(keys for _, keys in each.attention) // each.tokens if self._leaks(each) else 0
        copied = 2 * block * each.past // each.tokens if each.copies else 0
        return each.blocks * (inside + leaked + copied) + outer_kept(self.recipe, each)

    def _leaks(self, each: Pass) -> bool:
        return each.phase == "rollout" and self.recipe.rollout.kv_grad == "leaky"

    def _working(self, each: Pass) -> int:
        """Bytes of one forward's own tensors at their most, beside what it keeps for backward."""
        compute = BYTES[self.recipe.parallel.compute_dtype]
        if each.role == "predictor":
            return each.batch * each.tokens * self.recipe.generator.dim * compute * 2
        if each.role == "text":
            return each.tokens * self.recipe.text.dim * 16 * compute
        network = network_of(each.role, self.recipe)
        rows = each.batch * each.tokens
        rotating = (6 + 2 * WIDE // compute) * network.dim
        values = rows * max(3 * network.dim + 2 * network.ffn_dim, rotating)
        if each.phase == "rollout" and each.gradient:  # others read and write the cache where it lies
            keys = each.batch * sum(keys for _, keys in each.attention)
            values += 2 * keys * network.dim + 2 * each.blocks * rows * network.dim
        if each.copies > 1:
            values += 2 * each.blocks * each.batch * (each.past + each.tokens) * network.dim
        return values * compute

    def _working_back(self, each: Pass) -> int:
        """Bytes of backward's own tensors at their most: gradients, and a block that is computed again."""
        compute = BYTES[self.recipe.parallel.compute_dtype]
        rows = each.batch * each.tokens
        if each.role == "predictor":
            predictions = each.tokens * sum(each.answers) * self.recipe.teacher.dim
            return 0 if fused_head(self.recipe) else predictions * WIDE * 2
        network = network_of(each.role, self.recipe)
        again = block_kept(self.recipe, each) if self.networks[each.role].plan.recompute else 0
        return again + rows * (3 * network.dim + network.ffn_dim) * compute

    def _trajectories(self) -> Iterator[tuple[tuple[str, str], int]]:
        """While an ode stage's trajectories are made, each rank holds the AR teacher whole, and nothing else."""
        recipe = self.recipe
        compute = BYTES[recipe.parallel.compute_dtype]
        yield ("weights", "ar_teacher"), of_role("ar_teacher", recipe).count * compute
        held = recipe.video.latent_frames - recipe.video.frames_per_segment
        yield ("KV cache", "ar_teacher"), kv_cache(recipe, 2 * self.stage.batch.micro_size, held)
        largest = max(passes.trajectory(recipe), key=self._working)
        yield ("working", "ar_teacher"), self._working(largest) * self.stage.batch.micro_size


COMPARED = 3  # fp32 copies of the targets' size that a cosine keeps
HEAD_CHUNK = 4096  # tokens whose predictions the fused head holds


def fused_head(recipe: Recipe) -> bool:
    """Whether it is known that predictions are compared by the fused head; `auto` decides where it runs."""
    return recipe.parallel.kernels == "fused" and PRESETS[recipe.foresight.preset].wide_fusion


def _of_fused_head(recipe: Recipe, each: Pass) -> int:
    """Bytes of a chunk of predictions, and of the gradients that the fused head makes in forward: of what it reads, and
    in fp32 of its weight."""
    compute, dim, target_dim = BYTES[recipe.parallel.compute_dtype], recipe.generator.dim, recipe.teacher.dim
    weight = len(each.answers) * target_dim * dim * WIDE
    return HEAD_CHUNK * target_dim * compute + each.batch * each.tokens * dim * compute + weight


def _add(held: dict[tuple[str, str], int], key: tuple[str, str], count: int) -> None:
    held[key] = held.get(key, 0) + count


def _passing(network: Sharded) -> int:
    """Bytes of units that are gathered while a resharded network runs: the root, a block and the one before or after;
    a network that is one unit is there twice while it is copied out of what was gathered."""
    nested, root = network.gathered[:-1], network.gathered[-1]
    return root + 2 * max(nested) if nested else 2 * root


def kv_cache(recipe: Recipe, batch: int, frames: int) -> int:
    """Bytes of a cache of so many past frames and room for a segment, for the generator's shape."""
    network, compute = recipe.generator, BYTES[recipe.parallel.compute_dtype]
    held = frames + recipe.video.frames_per_segment
    return 2 * network.blocks * batch * held * frame_tokens(recipe) * network.dim * compute


def replay_pair(recipe: Recipe) -> int:
    """Bytes of the (state, target) pairs of one sample: states in the compute dtype, targets in fp32 where the preset
    fuses them in it, but for parallel.kernels=fused, whose unit vectors are in the compute dtype."""
    video, compute = recipe.video, BYTES[recipe.parallel.compute_dtype]
    wide = WIDE if PRESETS[recipe.foresight.preset].wide_fusion and not fused_head(recipe) else compute
    supervised = len(supervised_segments(video.latent_frames // video.frames_per_segment, recipe.foresight.offsets))
    tokens = supervised * video.frames_per_segment * frame_tokens(recipe)
    return tokens * (recipe.generator.dim * compute + recipe.teacher.dim * wide)


def block_kept(recipe: Recipe, each: Pass) -> int:
    """Bytes that backward of one Wan block reads, its parameters apart.

    19 tensors of N d in the compute dtype: the input, both sides of modulation (4), of queries and keys after norm and
    after weight and rotation (4), values, attention's output and what it is projected to, three of cross-attention's
    queries and its output, the affine norm's input and output, the feed-forward's input norm and result. 3 in fp32:
    what RMSNorm read. The hidden layer twice, the rotary table twice, and the text's keys and values.
    """
    network = network_of(each.role, recipe)
    compute = BYTES[recipe.parallel.compute_dtype]
    dim, rows = network.dim, each.batch * each.tokens
    kept = rows * (dim * (19 * compute + 3 * WIDE) + 2 * network.ffn_dim * compute)
    kept += 8 * (dim // network.heads) * each.tokens
    kept += each.batch * recipe.text.length * dim * (3 * compute + WIDE)
    keys = sum(keys for _, keys in each.attention)
    if each.past:
        kept += 2 * each.batch * (keys - each.tokens) * dim * compute
    elif len(each.attention) > 1:
        kept += rows * dim * compute  # segments' outputs, and the same in one piece
        if each.halves > 1:
            kept += each.batch * keys * dim * compute  # keys and values of the noisy segments, copied together
    return kept


def outer_kept(recipe: Recipe, each: Pass) -> int:
    """Bytes that backward reads outside the blocks: the head's input, normed and modulated, patches, the text."""
    network, compute = network_of(each.role, recipe), BYTES[recipe.parallel.compute_dtype]
    tokens = each.batch * each.tokens
    head = (tokens + 2 * tokens // each.halves) * network.dim
    text = each.batch * recipe.text.length * (recipe.text.dim + 3 * network.dim)
    return (head + tokens * PATCH * recipe.video.channels + text) * compute


def predictor_kept(recipe: Recipe, each: Pass) -> int:
    """Bytes that backward of the predictor reads: nothing of it is recomputed."""
    compute, rows = BYTES[recipe.parallel.compute_dtype], each.batch * each.tokens
    gated = 4 if PRESETS[recipe.foresight.preset].gated_predictor else 0
    block = (10 + 8 + gated) * compute + 2 * WIDE
    return rows * recipe.generator.dim * (each.blocks * block + compute)
