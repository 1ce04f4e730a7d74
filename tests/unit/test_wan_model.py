"""Wan's DiT: parameters as published, what sees what, and one forward for masked and cached causal use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from mirai_dist.config import load
from mirai_dist.cycle.roles import wan_shape
from mirai_dist.models.wan import Capture, Clean, Held, History, WanModel, WanOutput, WanShape
from mirai_dist.models.wan.model import initialise, timestep_sinusoid
from mirai_dist.parallel.recompute import recompute
from tests.live_bytes import LiveBytes
from tests.tiny_wan import (
    COLUMNS,
    ROWS,
    SHAPE,
    TOKENS,
    fill,
    gradients,
    held,
    largest_difference,
    latents,
    prompts,
    wan,
)

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = """
extends: {base}
name: counting
world: {{speed: 1, radius: 4}}
stages: {{teacher: {{kind: bidirectional, cycles: 1, batch: {{global_size: 1}}, optimizer: {{lr: 1e-3}}}}}}
checkpoint: {{every_cycles: 1}}
"""


@pytest.fixture(scope="module")
def real_shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, WanShape]:
    """Shapes of the three networks of recipes/base/wan.yaml."""
    path = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    path.write_text(EXTENSION.format(base=ROOT / "recipes/base/wan.yaml"))
    recipe = load(path).recipe
    networks = {"teacher": recipe.teacher, "generator": recipe.generator, "critic": recipe.critic}
    return {name: wan_shape(network, recipe) for name, network in networks.items()}


def on_meta(shape: WanShape) -> WanModel:
    with torch.device("meta"):
        return WanModel(shape)


# --- parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("role", "parameters"), [("generator", 1_418_996_800), ("critic", 1_418_996_800), ("teacher", 14_288_491_584)]
)
def test_published_parameter_counts(real_shapes: dict[str, WanShape], role: str, parameters: int) -> None:
    network = on_meta(real_shapes[role])
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters


def official_layout(d: int, ff: int, blocks: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the published safetensors file (spec 1.7)."""

    def linear(name: str, rows: int, columns: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield f"{name}.weight", (rows, columns)
        yield f"{name}.bias", (rows,)

    yield "patch_embedding.weight", (d, 16, 1, 2, 2)
    yield "patch_embedding.bias", (d,)
    yield from linear("text_embedding.0", d, 4096)
    yield from linear("text_embedding.2", d, d)
    yield from linear("time_embedding.0", d, 256)
    yield from linear("time_embedding.2", d, d)
    yield from linear("time_projection.1", 6 * d, d)
    for i in range(blocks):
        yield f"blocks.{i}.modulation", (1, 6, d)
        for attention in ("self_attn", "cross_attn"):
            for projection in "qkvo":
                yield from linear(f"blocks.{i}.{attention}.{projection}", d, d)
            yield f"blocks.{i}.{attention}.norm_q.weight", (d,)
            yield f"blocks.{i}.{attention}.norm_k.weight", (d,)
        yield f"blocks.{i}.norm3.weight", (d,)
        yield f"blocks.{i}.norm3.bias", (d,)
        yield from linear(f"blocks.{i}.ffn.0", ff, d)
        yield from linear(f"blocks.{i}.ffn.2", d, ff)
    yield "head.modulation", (1, 2, d)
    yield from linear("head.head", 64, d)


@pytest.mark.parametrize(("role", "sizes"), [("generator", (1536, 8960, 30)), ("teacher", (5120, 13824, 40))])
def test_the_state_dict_is_the_official_one(
    real_shapes: dict[str, WanShape], role: str, sizes: tuple[int, int, int]
) -> None:
    expected = dict(official_layout(*sizes))
    assert {name: tuple(value.shape) for name, value in on_meta(real_shapes[role]).state_dict().items()} == expected


def test_initial_values() -> None:
    network = WanModel(SHAPE)
    fill(network, 1)
    draws = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            initialise(name, parameter, draws)
    values = dict(network.named_parameters())
    assert not values["head.head.weight"].any()
    assert all(not value.any() for name, value in values.items() if name.endswith("bias"))
    assert all((value == 1).all() for name, value in values.items() if "norm" in name and name.endswith("weight"))
    xavier = (6 / (SHAPE.dim + SHAPE.ffn_dim)) ** 0.5
    assert 0.95 * xavier < values["blocks.1.ffn.0.weight"].abs().max() <= xavier
    assert 0.95 * SHAPE.text_dim**-0.5 < values["text_embedding.0.weight"].abs().max() <= SHAPE.text_dim**-0.5
    assert values["blocks.2.modulation"].std().item() == pytest.approx(SHAPE.dim**-0.5, rel=0.2)


# --- one forward ---------------------------------------------------------------------------------------------


def test_sinusoid_has_cosines_first_and_exact_frequencies() -> None:
    table = timestep_sinusoid(torch.tensor([0.0, 937.5], dtype=torch.float64), 256)
    assert table.shape == (2, 256) and table.dtype == torch.float64
    assert (table[0, :128] == 1).all() and (table[0, 128:] == 0).all()
    angles = 937.5 * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(table[1], torch.cat((angles.cos(), angles.sin())), rtol=0, atol=1e-12)


def test_patches_are_those_of_the_convolution() -> None:
    network, video = wan(), latents(1, 2, 3)
    tokens, grid = network._embed_patches(video)
    expected = network.patch_embedding(video.transpose(1, 2)).flatten(2).transpose(1, 2)
    assert grid == (3, ROWS, COLUMNS)
    torch.testing.assert_close(tokens, expected, rtol=0, atol=1e-13)


def test_unpatchify_puts_channels_fastest() -> None:
    network = wan()
    # value of a patch entry = its own place in the video, written down by the layout (f, h, w, q, r, c)
    video = torch.arange(3 * 4 * 2 * ROWS * 2 * COLUMNS, dtype=torch.float64).view(1, 3, 4, ROWS, 2, COLUMNS, 2)
    patches = video.permute(0, 1, 3, 5, 4, 6, 2).reshape(1, 3 * TOKENS, 16)
    again = network._unpatchify(patches, (3, ROWS, COLUMNS))
    assert torch.equal(again, video.reshape(1, 3, 4, 2 * ROWS, 2 * COLUMNS))


def test_equal_timesteps_a_frame_are_one_timestep_a_sample() -> None:
    network, video, text = wan(), latents(1, 2, 3), prompts(2, 2)
    timesteps = torch.tensor([300.0, 937.5])
    one = network(video, timesteps, text).velocity
    each = network(video, timesteps[:, None].expand(-1, 3), text).velocity
    torch.testing.assert_close(one, each, rtol=0, atol=1e-13)
    assert one is not None and one.shape == video.shape
    other = network(video, timesteps.flip(0), text).velocity
    assert (one - other).abs().max() > 1e-3


def test_samples_of_a_batch_do_not_meet() -> None:
    network, video, text = wan(), latents(1, 2, 2), prompts(2, 2)
    timesteps = torch.tensor([[10.0, 20.0], [900.0, 700.0]])
    together = network(video, timesteps, text).velocity
    alone = [network(video[i : i + 1], timesteps[i : i + 1], text[i : i + 1]).velocity for i in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-13)


def test_zero_padding_of_the_text_is_attended() -> None:
    network, video, text = wan(), latents(1, 1, 1), prompts(2, 1)
    timesteps = torch.tensor([500.0])
    full = network(video, timesteps, text).velocity
    shorter = network(video, timesteps, text[:, :-1]).velocity
    assert (full - shorter).abs().max() > 1e-4


def test_compute_dtype_is_that_of_the_parameters() -> None:
    network = wan(dtype=torch.bfloat16)
    video, text = latents(1, 1, 2, torch.float32), prompts(2, 1, torch.float32)
    output = network(video, torch.tensor([625.0]), text, history=History())
    assert output.velocity.dtype == torch.bfloat16
    assert {tensor.dtype for pair in output.keys_values for tensor in pair} == {torch.bfloat16}
    exact = wan()(video, torch.tensor([625.0]), text).velocity
    assert (output.velocity - exact).abs().mean() < 0.03 * exact.abs().mean()


# --- what sees what ------------------------------------------------------------------------------------------


def velocity(network: WanModel, video: Tensor, timesteps: Tensor, **options: Tensor | int | Clean) -> Tensor:
    return network(video, timesteps, prompts(2, video.shape[0]), **options).velocity


@pytest.mark.parametrize("segment_frames", [1, 2])
def test_a_causal_pass_never_sees_later_segments(segment_frames: int) -> None:
    network, video = wan(), latents(1, 1, 4)
    timesteps = torch.full((1, 4), 400.0)
    changed, later = video.clone(), timesteps.clone()
    changed[:, 2:] += 1
    later[:, 2:] += 300
    before = velocity(network, video, timesteps, segment_frames=segment_frames)
    after = velocity(network, changed, later, segment_frames=segment_frames)
    assert torch.equal(before[:, :2], after[:, :2])
    assert (before[:, 2:] - after[:, 2:]).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-4
    # the past is seen, and a segment sees all of itself
    changed = video.clone()
    changed[:, segment_frames - 1] += 1
    after = velocity(network, changed, timesteps, segment_frames=segment_frames)
    assert (before - after).abs().amax(dim=(0, 2, 3, 4)).min() > 1e-4


def test_a_bidirectional_pass_sees_the_future() -> None:
    network, video = wan(), latents(1, 1, 3)
    changed = video.clone()
    changed[:, 2] += 1
    timesteps = torch.tensor([400.0])
    difference = (velocity(network, video, timesteps) - velocity(network, changed, timesteps)).abs()
    assert difference.amax(dim=(0, 2, 3, 4)).min() > 1e-4


@pytest.mark.parametrize("segment_frames", [1, 2])
def test_teacher_forcing_sees_clean_past_and_own_noise(segment_frames: int) -> None:
    network, clean, noisy = wan(), latents(1, 1, 4), latents(3, 1, 4)
    timesteps = torch.full((1, 4), 400.0)

    def difference(clean_frame: int | None = None, noisy_frame: int | None = None) -> list[bool]:
        other_clean, other_noisy = clean.clone(), noisy.clone()
        if clean_frame is not None:
            other_clean[:, clean_frame] += 1
        if noisy_frame is not None:
            other_noisy[:, noisy_frame] += 1
        options = {"segment_frames": segment_frames}
        before = velocity(network, noisy, timesteps, clean=Clean(clean), **options)
        after = velocity(network, other_noisy, timesteps, clean=Clean(other_clean), **options)
        return [not torch.equal(before[:, f], after[:, f]) for f in range(4)]

    segment = [f // segment_frames for f in range(4)]
    for changed in range(4):
        assert difference(clean_frame=changed) == [segment[f] > segment[changed] for f in range(4)]
        assert difference(noisy_frame=changed) == [segment[f] == segment[changed] for f in range(4)]


class Inputs(NamedTuple):
    """What a cached loop runs: noisy segments at their timesteps [B, F], after a past at its own (None: no past but
    the noisy segments themselves, as in diffusion forcing)."""

    noisy: Tensor
    timesteps: Tensor
    past: tuple[Tensor, Tensor] | None


def cached_loop(network: WanModel, inputs: Inputs, segment_frames: int) -> tuple[Tensor, Tensor]:
    """Velocity and state (after two blocks) of every noisy segment, given keys and values, one segment at a time."""
    noisy, timesteps, given = inputs
    text, past = prompts(2, noisy.shape[0]), None
    velocities, hidden = [], []
    for first in range(0, noisy.shape[1], segment_frames):
        segment = slice(first, first + segment_frames)
        history = History(held(past), None, first)
        output = network(noisy[:, segment], timesteps[:, segment], text, history=history, capture=Capture(2))
        velocities.append(output.velocity)
        hidden.append(output.hidden)
        if given is None:
            own = output.keys_values
        else:
            own = network(given[0][:, segment], given[1][:, segment], text, history=history).keys_values
        if past is None:
            past = own
        else:
            past = tuple(
                (torch.cat((k, own_k), 1), torch.cat((v, own_v), 1))
                for (k, v), (own_k, own_v) in zip(past, own, strict=True)
            )
    return torch.cat(velocities, 1), torch.cat(hidden, 1)


def drawn_timesteps(seed: int, segment_frames: int, highest: float = 1000.0) -> Tensor:
    """[2, 6], independent between segments."""
    draws = torch.rand(2, 6 // segment_frames, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return (draws * highest).repeat_interleave(segment_frames, dim=1)


def assert_same_pass(output: WanOutput, loop: tuple[Tensor, Tensor]) -> None:
    torch.testing.assert_close(output.velocity, loop[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(output.hidden, loop[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("segment_frames", [1, 2])
@torch.no_grad()
def test_the_teacher_forced_forward_equals_the_cached_loop(segment_frames: int) -> None:
    network, clean, noisy = wan(), latents(1, 2, 6), latents(3, 2, 6)
    timesteps = drawn_timesteps(0, segment_frames)
    options = {"segment_frames": segment_frames, "capture": Capture(2)}
    masked = network(noisy, timesteps, prompts(2, 2), clean=Clean(clean), **options)
    given = (clean, torch.zeros_like(timesteps))
    assert_same_pass(masked, cached_loop(network, Inputs(noisy, timesteps, given), segment_frames))


@pytest.mark.parametrize("segment_frames", [1, 2])
@torch.no_grad()
def test_a_noised_past_equals_the_cached_loop_over_that_past(segment_frames: int) -> None:
    """Context noise: the clean half is modulated by the timesteps it was noised to, a segment its own."""
    network, past, noisy = wan(), latents(1, 2, 6), latents(3, 2, 6)
    timesteps, levels = drawn_timesteps(0, segment_frames), drawn_timesteps(5, segment_frames, highest=200.0)
    text, options = prompts(2, 2), {"segment_frames": segment_frames, "capture": Capture(2)}
    masked = network(noisy, timesteps, text, clean=Clean(past, levels), **options)
    assert_same_pass(masked, cached_loop(network, Inputs(noisy, timesteps, (past, levels)), segment_frames))
    plain = network(noisy, timesteps, text, clean=Clean(past), **options).velocity
    differs = (masked.velocity - plain).abs().amax(dim=(0, 2, 3, 4)) > 1e-4
    assert differs.tolist() == [False] * segment_frames + [True] * (6 - segment_frames)  # the first one has no past


@torch.no_grad()
def test_a_past_at_timestep_zero_changes_no_bit() -> None:
    network, clean, noisy, text = wan(), latents(1, 2, 6), latents(3, 2, 6), prompts(2, 2)
    at = drawn_timesteps(0, 2)
    plain, zero, each, one = (
        network(noisy, at, text, clean=Clean(clean, levels), segment_frames=2).velocity
        for levels in (None, torch.zeros(2, 6), torch.full((2, 6), 20.0), torch.full((2,), 20.0)))
    assert torch.equal(zero, plain)
    torch.testing.assert_close(one, each, rtol=0, atol=1e-12)  # a timestep a sample is that of all its frames
    assert (one - plain).abs().max() > 1e-4


@pytest.mark.parametrize("segment_frames", [1, 2, 3])
@torch.no_grad()
def test_the_diffusion_forced_forward_equals_the_cached_loop(segment_frames: int) -> None:
    """Each segment at its own timestep, after the keys and values of the noisy segments before it."""
    network, noisy, timesteps = wan(), latents(3, 2, 6), drawn_timesteps(0, segment_frames)
    masked = network(noisy, timesteps, prompts(2, 2), segment_frames=segment_frames, capture=Capture(2))
    assert_same_pass(masked, cached_loop(network, Inputs(noisy, timesteps, None), segment_frames))


@pytest.mark.parametrize("forcing", ["teacher", "noised teacher", "diffusion"])
def test_training_in_one_pass_has_the_gradients_of_the_loop(forcing: str) -> None:
    """Of every parameter, through the keys and values of the past too; with blocks recomputed as training does."""
    one, loop = wan(), wan()
    recompute(one, [f"blocks.{i}" for i in range(SHAPE.blocks)])
    past, noisy, timesteps = latents(1, 2, 6), latents(3, 2, 6), drawn_timesteps(0, 2)
    levels = drawn_timesteps(5, 2, highest=200.0) if forcing == "noised teacher" else torch.zeros(2, 6)
    if forcing == "diffusion":
        output = one(noisy, timesteps, prompts(2, 2), segment_frames=2)
        inputs = Inputs(noisy, timesteps, None)
    else:
        output = one(noisy, timesteps, prompts(2, 2), clean=Clean(past, levels), segment_frames=2)
        inputs = Inputs(noisy, timesteps, (past, levels))
    goal = latents(7, 2, 6)
    (output.velocity - goal).square().mean().backward()
    (cached_loop(loop, inputs, 2)[0] - goal).square().mean().backward()
    assert largest_difference(gradients(one), gradients(loop)) < 1e-12
    assert min(gradient.abs().max() for gradient in gradients(one).values()) > 1e-6


@torch.no_grad()
def test_cached_text_keys_and_values_change_nothing() -> None:
    network, video, text = wan(), latents(1, 1, 2), prompts(2, 1)
    timesteps = torch.tensor([500.0])
    first = network(video, timesteps, text, history=History())
    again = network(video, timesteps, text, history=History(None, first.text_keys_values))
    assert torch.equal(first.velocity, again.velocity)
    other = network(video, timesteps, prompts(9, 1), history=History(None, first.text_keys_values))
    assert torch.equal(first.velocity, other.velocity)  # the text itself is not read again


# --- reading the residual stream -----------------------------------------------------------------------------


@torch.no_grad()
def test_capture_reads_after_so_many_blocks_and_may_stop_there() -> None:
    network, video, text = wan(), latents(1, 1, 2), prompts(2, 1)
    timesteps = torch.zeros(1)
    seen: list[Tensor] = []
    hook = network.blocks[1].register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    whole = network(video, timesteps, text, capture=Capture(2))
    hook.remove()
    assert torch.equal(whole.hidden, seen[0]) and whole.velocity is not None
    assert network(video, timesteps, text).hidden is None
    ran: list[str] = []
    for name in ("blocks.1", "blocks.2", "head"):
        network.get_submodule(name).register_forward_hook(lambda *_, name=name: ran.append(name))
    stopped = network(video, timesteps, text, capture=Capture(2, stop=True))
    assert stopped.velocity is None and torch.equal(stopped.hidden, whole.hidden)
    assert ran == ["blocks.1"]


# --- recomputation -------------------------------------------------------------------------------------------


def test_recomputed_blocks_give_the_same_gradients() -> None:
    plain, saving = wan(), wan()
    recompute(saving, ["blocks.0", "blocks.2"])
    assert [name for name, _ in saving.named_parameters()] == [name for name, _ in plain.named_parameters()]
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    saving.get_submodule("blocks.0.ffn").register_forward_hook(count)
    video, text, timesteps = latents(1, 1, 2), prompts(2, 1), torch.tensor([700.0])
    for network in (plain, saving):
        network(video, timesteps, text).velocity.square().mean().backward()
    assert runs == 2  # once forward, once for backward
    assert largest_difference(gradients(plain), gradients(saving)) == 0
    with torch.no_grad():
        assert torch.equal(plain(video, timesteps, text).velocity, saving(video, timesteps, text).velocity)
    assert runs == 3


def test_attention_is_kept_but_over_few_keys() -> None:
    """The same gradients from one call of attention a block over the video where whole recomputation makes two."""
    calls: list[int] = []

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            if func._schema.name == "aten::_scaled_dot_product_flash_attention_for_cpu":
                calls.append(args[1].shape[2])
            return func(*args, **(kwargs or {}))

    video, text, timesteps = latents(1, 1, 2), prompts(2, 1), torch.tensor([700.0])
    found = {}
    for keep in (False, True):
        network = wan()
        recompute(network, [f"blocks.{i}" for i in range(SHAPE.blocks)], keep_attention=keep)
        calls.clear()
        with Counted():
            network(video, timesteps, text).velocity.square().mean().backward()
        found[keep] = gradients(network)
        own, texts = calls.count(2 * TOKENS), calls.count(text.shape[1])
        assert (own, texts) == ((1 if keep else 2) * SHAPE.blocks, 2 * SHAPE.blocks)
    assert largest_difference(found[False], found[True]) == 0


@pytest.mark.parametrize("kind", ["whole", "segment"])
@torch.no_grad()
def test_what_a_forward_without_gradient_holds(kind: str) -> None:
    """At the feed-forward: a block's input, the residual stream and its norm, and the hidden layer before and after
    GELU. So nothing of the block's attention is alive there, and no keys and values that a cache has."""
    shape = SHAPE._replace(ffn_dim=6 * SHAPE.dim)
    network, text, tokens = wan(dtype=torch.float32, shape=shape), prompts(2, 1, torch.float32), 60 * TOKENS
    video, at = latents(1, 1, 60, torch.float32), torch.tensor([500.0])
    store = torch.zeros(2, shape.blocks, 1, 2 * tokens, shape.heads, shape.dim // shape.heads)
    views = [Held(keys, values, (0, tokens), (tokens, 2 * tokens)) for keys, values in zip(*store, strict=True)]
    history = History(tuple(views), None, 60) if kind == "segment" else None
    network(video, at, text, history=history)
    with LiveBytes() as live:
        network(video, at, text, history=history)
    held = sum(parameter.nbytes for parameter in network.parameters()) + (store.nbytes if history else 0)
    expected = 4 * tokens * (3 * shape.dim + 2 * shape.ffn_dim)
    assert expected <= live.peak - held <= 1.1 * expected
