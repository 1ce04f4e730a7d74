"""Parity with diffusers' WanTransformer3DModel, an independent implementation, and the map between the layouts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mirai_dist.models.wan import WanModel, WanShape
from mirai_dist.models.wan.keys import from_diffusers, to_diffusers
from tests.tiny_wan import SHAPE, fill, latents, prompts, wan

pytest.importorskip("diffusers")
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

SMALL = WanShape(dim=1536, ffn_dim=8960, heads=12, blocks=30)


def theirs(shape: WanShape) -> nn.Module:
    """diffusers' network of the same sizes, weights random."""
    return WanTransformer3DModel(
        num_attention_heads=shape.heads,
        attention_head_dim=shape.dim // shape.heads,
        in_channels=shape.channels,
        out_channels=shape.channels,
        text_dim=shape.text_dim,
        freq_dim=shape.freq_dim,
        ffn_dim=shape.ffn_dim,
        num_layers=shape.blocks,
    ).eval()


def velocity_of(network: nn.Module, video: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """diffusers' forward in our layout."""
    output = network(
        hidden_states=video.transpose(1, 2), timestep=timesteps, encoder_hidden_states=text, return_dict=False
    )
    return output[0].transpose(1, 2)


@pytest.fixture(scope="module")
def pair() -> tuple[WanModel, nn.Module]:
    """The same random weights in both implementations, fp32."""
    ours, other = wan(dtype=torch.float32), theirs(SHAPE)
    other.load_state_dict({to_diffusers(name): value for name, value in ours.state_dict().items()}, strict=True)
    return ours, other


@pytest.mark.parametrize("timesteps", [(0.0, 20.0), (250.0, 625.0), (833.333, 937.5), (980.0, 1000.0)])
@torch.no_grad()
def test_velocity_parity(pair: tuple[WanModel, nn.Module], timesteps: tuple[float, float]) -> None:
    ours, other = pair
    video, text = latents(1, 2, 3, torch.float32), prompts(2, 2, torch.float32)
    at = torch.tensor(timesteps)
    velocity = ours(video, at, text).velocity
    assert velocity.std() > 0.1
    torch.testing.assert_close(velocity, velocity_of(other, video, at, text), rtol=0, atol=1e-4)


@torch.no_grad()
def test_parity_at_the_real_head_width() -> None:
    shape = WanShape(dim=256, ffn_dim=32, heads=2, blocks=2, text_dim=SHAPE.text_dim, channels=SHAPE.channels)
    ours, other = wan(dtype=torch.float32, shape=shape), theirs(shape)
    other.load_state_dict({to_diffusers(name): value for name, value in ours.state_dict().items()}, strict=True)
    video, text, at = latents(1, 1, 4, torch.float32), prompts(2, 1, torch.float32), torch.tensor([714.3])
    torch.testing.assert_close(ours(video, at, text).velocity, velocity_of(other, video, at, text), rtol=0, atol=1e-4)


@torch.no_grad()
def test_weights_of_diffusers_load_here_and_come_back_unchanged() -> None:
    other, ours, again = theirs(SHAPE), WanModel(SHAPE), theirs(SHAPE)
    fill(other, 5)
    ours.load_state_dict({from_diffusers(name): value for name, value in other.state_dict().items()}, strict=True)
    again.load_state_dict({to_diffusers(name): value for name, value in ours.state_dict().items()}, strict=True)
    original, returned = other.state_dict(), again.state_dict()
    assert original.keys() == returned.keys()
    assert all(torch.equal(original[name], returned[name]) for name in original)
    video, text, at = latents(1, 1, 2, torch.float32), prompts(2, 1, torch.float32), torch.tensor([500.0])
    torch.testing.assert_close(ours(video, at, text).velocity, velocity_of(other, video, at, text), rtol=0, atol=1e-4)


def test_the_key_map_covers_the_real_network_both_ways() -> None:
    with torch.device("meta"):
        ours, other = WanModel(SMALL).state_dict(), theirs(SMALL).state_dict()
    assert {to_diffusers(name): value.shape for name, value in ours.items()} == {
        name: value.shape for name, value in other.items()
    }
    assert all(from_diffusers(to_diffusers(name)) == name for name in ours)
    assert all(to_diffusers(from_diffusers(name)) == name for name in other)


@pytest.mark.parametrize(
    "name",
    [
        "patch_embedding",
        "blocks.0.norm2.weight",  # diffusers' name of norm3: Wan's own norm2 has no parameter
        "blocks.0.self_attn.norm_q.bias",
        "blocks.x.modulation",
        "blocks.0.modulation.weight",
        "model.head.modulation",
        "img_emb.proj.0.weight",
    ],
)
def test_unknown_official_names_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="is no parameter of Wan2.1"):
        to_diffusers(name)


@pytest.mark.parametrize("name", ["blocks.0.norm3.weight", "blocks.0.attn1.to_out.1.weight", "rope.freqs_cos"])
def test_unknown_names_of_diffusers_are_refused(name: str) -> None:
    with pytest.raises(KeyError, match="is no parameter of Wan2.1"):
        from_diffusers(name)
