"""The future-readout probe: which pixels belong to which token, and decoders that find what is there to find."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from mirai_dist.config import schema
from mirai_dist.evaluate import probe
from mirai_dist.evaluate.probe import Readings, copy_current_psnr, pairs, psnr, readout_psnr, token_pictures

# two segments of two latent frames, one row of two tokens: 13 pictures of 16 x 32 pixels
VIDEO = schema.Video(latent_frames=4, frames_per_segment=2, latent_height=2, latent_width=4)
PICTURES, TOKENS = 13, 2


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_token_stands_for_its_place_in_the_last_picture_of_its_latent_frame() -> None:
    pixels = torch.arange(2 * PICTURES * 3 * 32 * 48, dtype=torch.float32).view(2, PICTURES, 3, 32, 48)
    tiles = token_pictures(pixels)
    assert tiles.shape == (2, 4, 2 * 3, 3 * 16 * 16)
    for frame, picture in enumerate((0, 4, 8, 12)):
        for row in range(2):
            for column in range(3):
                place = pixels[:, picture, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
                assert torch.equal(tiles[:, frame, 3 * row + column], place.flatten(1))


@pytest.mark.parametrize(("ahead", "segments"), [(0, 2), (1, 1)])
def test_pairs_match_a_state_with_the_segment_ahead(ahead: int, segments: int) -> None:
    pixels = normal(1, 3, PICTURES, 3, 16, 32)
    states = torch.arange(3 * 2 * 2 * TOKENS, dtype=torch.float32).view(3, 2, 2 * TOKENS, 1)
    found, pictures = pairs(Readings(states, pixels), VIDEO, ahead)
    assert found.shape[:2] == pictures.shape[:2] == (3, segments)
    tiles = token_pictures(pixels)
    for segment in range(segments):
        assert torch.equal(found[:, segment], states[:, segment])
        for frame in range(2):  # token s of a segment: frame s // tokens, place s % tokens
            expected = tiles[:, 2 * (segment + ahead) + frame]
            assert torch.equal(pictures[:, segment, frame * TOKENS : (frame + 1) * TOKENS], expected)


def test_psnr_by_hand_a_clip_at_a_time() -> None:
    truth = torch.zeros(2, 5)
    predicted = torch.tensor([[0.1] * 5, [0.01] * 5])
    assert psnr(predicted, truth) == pytest.approx((10 * math.log10(400) + 10 * math.log10(40000)) / 2, abs=1e-3)
    assert psnr(torch.full((2, 5), 3.0), torch.ones(2, 5)) == pytest.approx(10 * math.log10(4e10))  # clamped: exact


def test_copying_the_present_reads_held_out_clips_alone() -> None:
    still = normal(1, 8, 1, 3, 16, 32).clamp(-1, 1).expand(-1, PICTURES, -1, -1, -1).clone()
    assert copy_current_psnr(still, VIDEO, 0) > 100 and copy_current_psnr(still, VIDEO, 1) > 100
    moving = still.clone()
    moving[:2, 8:] = 0.5 * still[:2, 8:]  # the first quarter is held out; its second segment differs now
    expected = psnr(token_pictures(still[:2])[:, 2:], token_pictures(moving[:2])[:, 2:])
    assert copy_current_psnr(moving, VIDEO, 1) == pytest.approx(expected)
    moving = still.clone()
    moving[2:, 8:] = 0  # what decoders are trained on does not count
    assert copy_current_psnr(moving, VIDEO, 1) > 100


def readings(clips: int, informative: bool) -> Readings:
    """Pictures of one grey level a latent frame; states that hold their own level and the level one segment ahead."""
    levels = torch.rand(clips, 4, 1, generator=torch.Generator().manual_seed(1)) * 2 - 1
    pixels = torch.zeros(clips, PICTURES, 3, 16, 32)
    pixels[:, ::4] = levels.view(clips, 4, 1, 1, 1)
    own = levels.view(clips, 2, 2, 1, 1).expand(-1, -1, -1, TOKENS, -1).flatten(2, 3)
    ahead = own.roll(-1, dims=1)
    noise = normal(2, *own.shape[:-1], 2)
    return Readings(torch.cat((own, ahead), -1) if informative else noise, pixels)


def test_a_decoder_finds_the_future_where_it_is() -> None:
    blind, seeing = (readout_psnr(readings(32, informative), VIDEO, 1, 25, seed=1) for informative in (False, True))
    assert seeing > blind + 3


def test_the_seed_alone_decides_the_decoder() -> None:
    data = readings(8, True)
    torch.manual_seed(0)
    first = readout_psnr(data, VIDEO, 1, 3, seed=3)
    torch.manual_seed(1)
    assert readout_psnr(data, VIDEO, 1, 3, seed=3) == first
    assert readout_psnr(data, VIDEO, 1, 3, seed=4) != first


def test_held_out_clips_train_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the decoder nor the scale of its inputs sees the first quarter of the clips."""
    data, given = readings(8, True), []

    def fit(inputs: Tensor, outputs: Tensor, updates: int, seed: int) -> nn.Module:
        given.append((inputs, outputs))
        return nn.Linear(2, 3 * 16 * 16)

    monkeypatch.setattr(probe, "_fit", fit)
    readout_psnr(data, VIDEO, 0, 5, seed=3)
    inputs, outputs = given[0]
    trained = data.states[2:].flatten(0, 2)
    torch.testing.assert_close(inputs, (trained - trained.mean(0)) / trained.std(0))
    assert torch.equal(outputs, token_pictures(data.pixels[2:]).flatten(0, 2))
