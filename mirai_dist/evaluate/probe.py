"""The future-readout probe: what a frozen mid-depth state says about frames 0, 1, 2 ... segments ahead.

A small decoder reads one token's state at a time and predicts the 16 x 16 pixels at that token's own place, in
the last picture of the latent frame k segments later of the *same* clip (Video-Mirai section 4.4). Decoders have
equal budgets, seeds and batches for every network; no predictor is involved. All networks read the same clips of
the world, so that what they are asked for does not depend on what they would have generated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mirai_dist.config import schema
from mirai_dist.models.vae import GROUP, STRIDE
from mirai_dist.models.wan.model import PATCH

HELD_OUT = 0.25  # fraction of the clips that no decoder is trained on
WIDTH, RATE, BATCH = 128, 2e-3, 256


@dataclass(frozen=True)
class Readings:
    """What one network reads: states [N, segments, S, dim] of noisy segments given clean history, and the clips'
    pixels [N, T, 3, H, W]."""

    states: Tensor
    pixels: Tensor


def token_pictures(pixels: Tensor) -> Tensor:
    """The pixels each token stands for, in the last picture of its latent frame: [N, F, rows * columns, 3*16*16]."""
    last = pixels[:, ::GROUP]  # pictures 0, 4, 8, ...: the first latent frame has one, the others end there
    height, width = STRIDE * PATCH[1], STRIDE * PATCH[2]
    tiles = last.unflatten(-1, (-1, width)).unflatten(-3, (-1, height))  # [N, F, 3, rows, height, columns, width]
    return tiles.permute(0, 1, 3, 5, 2, 4, 6).flatten(4).flatten(2, 3)


def pairs(readings: Readings, video: schema.Video, ahead: int) -> tuple[Tensor, Tensor]:
    """(states [N, I, S, dim], pictures [N, I, S, pixels]) of all segments that have one `ahead` segments later."""
    segments = video.latent_frames // video.frames_per_segment
    pictures = token_pictures(readings.pixels).unflatten(1, (segments, -1)).flatten(2, 3)
    return readings.states[:, : segments - ahead], pictures[:, ahead:]


def readout_psnr(readings: Readings, video: schema.Video, ahead: int, updates: int, seed: int) -> float:
    """Held-out PSNR in dB (peak to peak 2) of a decoder trained for `updates` on the other clips."""
    states, pictures = pairs(readings, video, ahead)
    held_out = round(HELD_OUT * states.shape[0])
    train_x, train_y = states[held_out:].flatten(0, 2).float(), pictures[held_out:].flatten(0, 2)
    mean, std = train_x.mean(0), train_x.std(0).clamp_min(1e-6)
    decoder = _fit((train_x - mean) / std, train_y, updates, seed)
    with torch.no_grad():
        predicted = decoder((states[:held_out].float() - mean) / std)
    return psnr(predicted, pictures[:held_out])


def copy_current_psnr(pixels: Tensor, video: schema.Video, ahead: int) -> float:
    """PSNR of answering with the present picture: what a state without any idea of motion could do at best."""
    segments = video.latent_frames // video.frames_per_segment
    pictures = token_pictures(pixels).unflatten(1, (segments, -1)).flatten(2, 3)
    held_out = round(HELD_OUT * pictures.shape[0])
    return psnr(pictures[:held_out, : segments - ahead], pictures[:held_out, ahead:])


def psnr(predicted: Tensor, truth: Tensor) -> float:
    """Mean over clips of 10 log10(4 / MSE), values in [-1, 1]; tensors [N, ...]."""
    error = (predicted.clamp(-1, 1) - truth).square().flatten(1).mean(1)
    return (10 * torch.log10(4.0 / error.clamp_min(1e-10))).mean().item()


def _fit(inputs: Tensor, outputs: Tensor, updates: int, seed: int) -> nn.Module:
    """A three-layer MLP trained by AdamW with a cosine rate; weights and batches depend on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    layers = (
        nn.Linear(inputs.shape[1], WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, outputs.shape[1]),
    )
    decoder = nn.Sequential(*layers)
    with torch.no_grad():
        for parameter in decoder.parameters():
            bound = parameter.shape[-1] ** -0.5
            parameter.uniform_(-bound, bound, generator=generator)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=RATE, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, updates)
    for _ in range(updates):
        rows = torch.randint(inputs.shape[0], (BATCH,), generator=generator)
        loss = (decoder(inputs[rows]) - outputs[rows]).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
    return decoder
