"""A Wan of a few thousand parameters with nothing at zero or one, so that no part of it hides, and inputs for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mirai_dist.models.predictor import Predictor
from mirai_dist.models.wan import Held, KVCache, WanModel, WanShape
from mirai_dist.models.wan.token_ops import fill as fill_slots

# heads of 20 channels rotate 8 with time, 6 with height, 6 with width: uneven, as 44, 42, 42 are
SHAPE = WanShape(dim=40, ffn_dim=48, heads=2, blocks=3, text_dim=10, channels=4, freq_dim=16)
ROWS, COLUMNS = 2, 3  # of tokens; the latent has twice as many
TOKENS = ROWS * COLUMNS  # a latent frame
TEXT_LENGTH = 5


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def fill(network: nn.Module, seed: int) -> None:
    """Random values everywhere: matrices keep the scale of their input, norms and biases are not trivial."""
    draws = generator(seed)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            value = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
            if parameter.ndim == 1:
                value = (0.0 if name.endswith("bias") else 1.0) + 0.2 * value
            elif name.endswith("modulation"):
                value = 0.4 * value
            else:
                value = value * parameter[0].numel() ** -0.5
            parameter.copy_(value)


def wan(seed: int = 0, dtype: torch.dtype = torch.float64, shape: WanShape = SHAPE) -> WanModel:
    """A network with random weights."""
    network = WanModel(shape).to(dtype)
    fill(network, seed)
    return network


def linear_predictor(matrix: Tensor) -> Predictor:
    """A predictor without blocks: it maps states by the matrix [dim, target_dim]."""
    dim, target_dim = matrix.shape
    predictor = Predictor(dim, target_dim, heads=1, blocks=0, gated=False).to(matrix.dtype)
    with torch.no_grad():
        predictor.projection.weight.copy_(matrix.T)
    return predictor


def predicted(predictor: Predictor, states: Tensor) -> Tensor:
    """What a predictor compares with targets, [..., S, target_dim]."""
    return predictor.projection(predictor.hidden(states))


def latents(seed: int, batch: int, frames: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Normal latents [batch, frames, C, H, W] of the tiny network."""
    size = (batch, frames, SHAPE.channels, 2 * ROWS, 2 * COLUMNS)
    return torch.randn(size, generator=generator(seed), dtype=torch.float64).to(dtype)


def prompts(seed: int, batch: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Text embeddings [batch, length, text_dim], the last positions zero padding."""
    text = torch.randn(batch, TEXT_LENGTH, SHAPE.text_dim, generator=generator(seed), dtype=torch.float64)
    text[:, -2:] = 0
    return text.to(dtype)


KeysValues = tuple[tuple[Tensor, Tensor], ...]


def held(keys_values: KeysValues | None) -> tuple[Held, ...] | None:
    """Keys and values, a pair a block, as what a segment sees of a cache."""
    return None if keys_values is None else tuple(Held(k, v, (0, k.shape[1])) for k, v in keys_values)


def fill_room(views: Sequence[Held], keys_values: KeysValues) -> None:
    """Write one segment's keys and values into the room that each block's view has."""
    for view, own in zip(views, keys_values, strict=True):
        fill_slots(view.slots(), own)


def write(cache: KVCache, keys_values: KeysValues) -> None:
    """As a context pass does: into the room, and that is kept."""
    views = cache.view(room=keys_values[0][0].shape[1] // cache.shape.tokens_per_frame)
    fill_room(views, keys_values)
    cache.keep(views)


def gradients(network: nn.Module) -> dict[str, Tensor]:
    """Gradients by name, zeros where none arrived."""
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in network.named_parameters()
    }


def largest_difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Largest absolute difference over all tensors of two equally named sets."""
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)
