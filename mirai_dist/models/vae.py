"""A fixed linear "VAE" with the geometry of Wan's: stride (4, 8, 8), 16 channels, the first frame alone.

Nothing is trained or stored: the basis is analytic, so every process and machine has the same latent space.
Grouping four frames is what makes motion learnable: the temporal channels carry the velocity's sign inside one
latent frame, which a model with relative positions could not tell from single pictures.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

STRIDE = 8  # pixels per latent, both axes
GROUP = 4  # pixel frames per latent frame after the first

# Channel table, each row (time order, row order, column order, colour axis), standard deviation, mean.
# Choice: all 768 cosine products of a 4x8x8 block were ranked by their energy (background removed) over 1,500 clips
# of the world at speed 1.5, radius 4.5, 12 latent frames. Kept are the 13 strongest with time order 0 and the 3
# strongest with time order 1; the latter rank about 25th to 35th but are what shows the direction of motion.
# Deviations and means (0 where they are noise) are those measured there. tests/unit/test_linear_vae.py repeats it.
CHANNELS: tuple[tuple[tuple[int, int, int, int], float, float], ...] = (
    ((0, 0, 0, 0), 4.134, -20.481),
    ((0, 0, 1, 0), 2.504, 0.0),
    ((0, 1, 0, 0), 2.455, 0.0),
    ((0, 1, 1, 0), 1.381, 0.0),
    ((0, 0, 2, 0), 1.188, 0.0),
    ((0, 2, 0, 0), 1.146, 0.0),
    ((0, 1, 2, 0), 0.735, 0.0),
    ((0, 0, 0, 1), 1.833, 0.210),
    ((0, 0, 0, 2), 1.426, -0.106),
    ((0, 0, 1, 1), 1.037, 0.0),
    ((0, 1, 0, 1), 1.014, 0.0),
    ((0, 0, 1, 2), 0.798, 0.0),
    ((0, 1, 0, 2), 0.782, 0.0),
    ((1, 0, 0, 0), 0.361, 0.0),
    ((1, 0, 1, 0), 0.308, 0.0),
    ((1, 1, 0, 0), 0.298, 0.0),
)


StreamDecoder = Callable[[Tensor], Tensor]


class Vae(Protocol):
    """A frozen video autoencoder. Latents are normalised: what the networks see."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 1 + 4 (F - 1), 3, H, W] in [-1, 1] -> latents [B, F, C, H/8, W/8]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, C, h, w] -> pixels [B, 1 + 4 (F - 1), 3, 8 h, 8 w] in [-1, 1]."""
        ...

    def stream(self) -> StreamDecoder:
        """A decoder for one video that arrives in pieces [B, f, C, h, w]: the first piece gives 1 + 4 (f - 1) frames,
        later ones 4 f; the pieces' pixels joined are `decode` of the whole."""
        ...


class LinearVae(nn.Module):
    """Orthonormal cosine coefficients of 4x8x8 blocks, shifted and partially whitened; float32.

    Reconstruction of the world's clips (speed 1.5, radius 4.5) is 27.1 dB PSNR, peak to peak 2. Channel c is
    divided by sqrt(std_c * mean std): stronger channels stay stronger, and the variance over all channels is 1.
    """

    basis: Tensor
    scale: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        std = torch.tensor([row[1] for row in CHANNELS], dtype=torch.float64)
        basis = torch.stack([_basis(*row[0]) for row in CHANNELS])
        self.register_buffer("basis", basis.float(), persistent=False)  # [16, 4, 3, 8, 8]
        self.register_buffer("scale", (std * std.mean()).sqrt().float(), persistent=False)
        self.register_buffer("mean", torch.tensor([row[2] for row in CHANNELS]), persistent=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, T, 3, H, W] in [-1, 1], T = 1 + 4 (F - 1) -> latents [B, F, 16, H/8, W/8].

        ValueError unless T is one more than a multiple of 4 and H, W are multiples of 8.
        """
        batch, frames, colours, height, width = pixels.shape
        if frames % GROUP != 1 or colours != 3 or height % STRIDE or width % STRIDE:
            raise ValueError(
                f"cannot encode pixels of shape {tuple(pixels.shape)}: "
                "need [B, 1 + 4 k, 3, H, W] with H and W multiples of 8"
            )
        whole = torch.cat([pixels[:, :1].expand(-1, GROUP, -1, -1, -1), pixels[:, 1:]], dim=1).float()
        blocks = whole.reshape(
            batch, -1, GROUP, 3, height // STRIDE, STRIDE, width // STRIDE, STRIDE
        )  # B, F, time, colour, y, row, x, column
        coefficients = torch.einsum("bftlymxn,ctlmn->bfcyx", blocks, self.basis)
        return (coefficients - _column(self.mean)) / _column(self.scale)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, 16, h, w] -> pixels [B, 1 + 4 (F - 1), 3, 8 h, 8 w], clamped to [-1, 1].

        The first latent frame gives the mean of its group: the least-squares inverse of repeating one frame.
        ValueError unless the latents have 16 channels.
        """
        batch, frames, channels, rows, columns = latents.shape
        if channels != len(CHANNELS):
            raise ValueError(f"cannot decode latents of shape {tuple(latents.shape)}: need [B, F, 16, h, w]")
        coefficients = latents.float() * _column(self.scale) + _column(self.mean)
        blocks = torch.einsum("bfcyx,ctlmn->bftlymxn", coefficients, self.basis)
        whole = blocks.reshape(batch, frames, GROUP, 3, rows * STRIDE, columns * STRIDE)
        first = whole[:, 0].mean(dim=1, keepdim=True)
        return torch.cat([first, whole[:, 1:].flatten(1, 2)], dim=1).clamp(-1, 1)


    def stream(self) -> StreamDecoder:
        """See `Vae.stream`. Latent frames are independent here: only the first of a video differs."""
        started = False

        def decode(latents: Tensor) -> Tensor:
            nonlocal started
            if not started:
                started = True
                return self.decode(latents)
            return self.decode(torch.cat((latents[:, :1], latents), dim=1))[:, 1:]

        return decode


def _column(values: Tensor) -> Tensor:
    """[16] -> [16, 1, 1], to broadcast over latent rows and columns."""
    return values[:, None, None]


def _basis(time: int, row: int, column: int, colour: int) -> Tensor:
    """[4, 3, 8, 8] float64 product of cosines: orthonormal over (time, row, column, colour) orders."""
    factors = (_cosine(GROUP, time), _cosine(3, colour), _cosine(STRIDE, row), _cosine(STRIDE, column))
    return torch.einsum("t,l,m,n->tlmn", *factors)


def _cosine(length: int, order: int) -> Tensor:
    """[length] float64 DCT-II vector of unit norm."""
    points = [math.cos(math.pi * (i + 0.5) * order / length) for i in range(length)]
    norm = math.sqrt(sum(p * p for p in points))
    return torch.tensor(points, dtype=torch.float64) / norm
