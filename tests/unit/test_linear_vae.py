"""The fixed linear VAE: Wan's geometry, an orthonormal analytic basis, and the world it was measured on."""

from __future__ import annotations

import math

import pytest
import torch

from mirai_dist.config import schema
from mirai_dist.data.world import BACKGROUND, World
from mirai_dist.models.vae import CHANNELS, LinearVae

VIDEO = schema.Video(latent_frames=12, frames_per_segment=3, latent_height=4, latent_width=4)
WORLD = World(schema.World(speed=1.5, radius=4.5), VIDEO, seed=1)
CLIPS = WORLD.clips(range(120))


def test_geometry() -> None:
    vae = LinearVae()
    latents = vae.encode(CLIPS[:2])
    assert latents.shape == (2, 12, 16, 4, 4)
    assert vae.decode(latents).shape == (2, 45, 3, 32, 32)
    assert vae.decode(vae.encode(CLIPS[:2, :1])).shape == (2, 1, 3, 32, 32)
    wide = torch.zeros(1, 5, 3, 16, 40)
    assert vae.encode(wide).shape == (1, 2, 16, 2, 5)
    for shape in ((1, 4, 3, 32, 32), (1, 5, 3, 30, 32), (1, 5, 1, 32, 32)):
        with pytest.raises(ValueError, match="cannot encode"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ValueError, match="16, h, w"):
        vae.decode(torch.zeros(1, 2, 8, 4, 4))


@pytest.mark.parametrize("sizes", [[3, 3, 3, 3], [1] * 12, [1, 3, 2, 6], [5, 1, 6], [12]])
def test_the_stream_joined_is_the_whole(sizes: list[int]) -> None:
    vae = LinearVae()
    latents = vae.encode(CLIPS[:2])
    latents = latents + torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    one, other = vae.stream(), vae.stream()  # each is one video
    pieces, mirrored = [], []
    for piece in latents.split(sizes, dim=1):
        pieces.append(one(piece))
        mirrored.append(other(piece.flip(4)))
    assert [piece.shape[1] for piece in pieces] == [4 * size - 3 * (i == 0) for i, size in enumerate(sizes)]
    assert torch.allclose(torch.cat(pieces, dim=1), vae.decode(latents), atol=1e-6)
    assert torch.allclose(torch.cat(mirrored, dim=1), vae.decode(latents.flip(4)), atol=1e-6)


def test_basis_is_orthonormal_analytic_and_not_stored() -> None:
    torch.manual_seed(0)
    first = LinearVae()
    torch.manual_seed(1)
    second = LinearVae()
    assert torch.equal(first.basis, second.basis)
    assert not first.state_dict() and not list(first.parameters())
    flat = first.basis.flatten(1)
    assert torch.allclose(flat @ flat.T, torch.eye(16), atol=1e-6)
    # One value by hand: time order 1, row order 1, at the first element.
    hand = (
        math.sqrt(2 / 4) * math.cos(math.pi / 8) * math.sqrt(1 / 3)
        * math.sqrt(2 / 8) * math.cos(math.pi / 16) * math.sqrt(1 / 8)
    )  # fmt: skip
    assert [row[0] for row in CHANNELS].index((1, 1, 0, 0)) == 15
    assert float(first.basis[15, 0, 0, 0, 0]) == pytest.approx(hand, rel=1e-6)


def test_reconstruction_of_the_world() -> None:
    vae = LinearVae()
    error = (vae.decode(vae.encode(CLIPS)) - CLIPS).square().mean()
    psnr = 10 * math.log10(4 / float(error))
    assert 26.5 < psnr < 27.6  # the docstring says 27.1


def test_encode_inverts_decode_inside_the_latent_space() -> None:
    vae = LinearVae()
    # Around mid-grey, so that the clamp of decode is not met.
    grey = -(vae.mean / vae.scale)[:, None, None]
    latents = grey + 0.02 * torch.randn(2, 3, 16, 4, 4, generator=torch.Generator().manual_seed(0))
    again = vae.encode(vae.decode(latents))
    assert torch.allclose(again[:, 1:], latents[:, 1:], atol=1e-4)
    static = [row[0][0] == 0 for row in CHANNELS]
    assert torch.allclose(again[:, 0, static], latents[:, 0, static], atol=1e-4)
    assert again[:, 0, 13:].abs().max() < 1e-4  # one frame has no motion


def test_latents_are_about_standard() -> None:
    latents = LinearVae().encode(CLIPS)
    per_channel = latents.transpose(0, 2).flatten(1)
    assert abs(float(latents.std()) - 1) < 0.05
    assert per_channel.mean(1).abs().max() < 0.15
    std = torch.tensor([row[1] for row in CHANNELS])
    expected = (std / std.mean()).sqrt()  # partial whitening: the order of strength stays
    assert torch.allclose(per_channel.std(1), expected, rtol=0.08)


def test_table_holds_the_strongest_channels_of_the_world() -> None:
    padded = torch.cat([CLIPS[:, :1].expand(-1, 4, -1, -1, -1), CLIPS[:, 1:]], dim=1).double() - BACKGROUND
    blocks = padded.reshape(len(CLIPS), -1, 4, 3, 4, 8, 4, 8)
    table = torch.einsum("bftlymxn,kt,cl,im,jn->bfyxkijc", blocks, _dct(4), _dct(3), _dct(8), _dct(8))
    energy = table.square().mean(dim=(0, 1, 2, 3))
    chosen = {row[0] for row in CHANNELS}
    for order, count in ((0, 13), (1, 3)):
        ranked = energy[order].flatten().argsort(descending=True).tolist()
        ranked = [(order, i // 24, i // 3 % 8, i % 3) for i in ranked]
        kept = {key for key in chosen if key[0] == order}
        # Neighbours at the cut are close in energy, so a smaller sample may swap the last ones.
        assert len(kept) == count and kept <= set(ranked[: count + 2]) and set(ranked[: count - 2]) <= kept
    for key, std, _ in CHANNELS:
        assert float(table[(..., *key)].std()) == pytest.approx(std, rel=0.15)


def test_motion_shows_its_sign_inside_one_latent_frame() -> None:
    latents = LinearVae().encode(CLIPS)[:, 1:]
    groups = CLIPS[:, 1:].unflatten(1, (-1, 4)).flip(2).flatten(1, 2)
    backwards = LinearVae().encode(torch.cat([CLIPS[:, :1], groups], dim=1))
    assert torch.allclose(backwards[:, 1:, :13], latents[:, :, :13], atol=1e-4)
    assert torch.allclose(backwards[:, 1:, 13:], -latents[:, :, 13:], atol=1e-4)
    assert latents[:, :, 13:].std() > 0.4


def _dct(length: int) -> torch.Tensor:
    """[order, position] orthonormal DCT-II, written independently of the code under test."""
    position = (torch.arange(length, dtype=torch.float64) + 0.5) * math.pi / length
    rows = torch.cos(torch.arange(length, dtype=torch.float64)[:, None] * position[None])
    return rows / rows.norm(dim=1, keepdim=True)
