"""Small random VAEs in the two published layouts: a folder of diffusers, and the official .pth.

The official names are built here by walking the layers in the order of Wan2.1's own network (wan/modules/vae.py), not
by the rule of mirai_dist/models/wan_vae.py; tests/unit/test_wan_vae.py compares both with the converter of diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

# Wan2.1's own topology at a twelfth of its width.
TINY: dict[str, Any] = {"base_dim": 8}
# Everything that can be left out left out, but for the geometry: stride 4 in time, 8 in space, 16 channels.
SMALLEST: dict[str, Any] = {"base_dim": 8, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}


def network(seed: int = 0, **settings: Any) -> AutoencoderKLWan:
    """AutoencoderKLWan with nothing at zero or one; pixels and latents come out at about unit scale."""
    draws = torch.Generator().manual_seed(seed)
    vae = AutoencoderKLWan(**{**TINY, **settings}).requires_grad_(False).eval()
    for name, parameter in vae.named_parameters():
        value = torch.randn(parameter.shape, generator=draws)
        if name.endswith("gamma"):
            value = 1 + 0.2 * value
        elif name.endswith("bias"):
            value = 0.1 * value
        else:
            value = value / math.sqrt(parameter[0].numel())
        parameter.copy_(value)
    return vae


def write_diffusers(folder: Path, vae: AutoencoderKLWan) -> Path:
    """A VAE folder as `save_pretrained` writes it."""
    vae.save_pretrained(folder)
    return folder


def write_official(file: Path, vae: AutoencoderKLWan) -> Path:
    """Wan2.1_VAE.pth: a plain dictionary of tensors with the official names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(official_state(vae), file)
    return file


def official_state(vae: AutoencoderKLWan) -> dict[str, Tensor]:
    """The tensors under the official names."""
    ours = vae.state_dict()
    pairs = dict(official_pairs(len(vae.config["dim_mult"]), vae.config["num_res_blocks"]))
    state = {}
    for official, prefix in pairs.items():
        for key, tensor in ours.items():
            if key.startswith(prefix + "."):
                state[official + key[len(prefix) :]] = tensor.clone()
    assert len(state) == len(ours)
    return state


def official_pairs(levels: int, res_blocks: int) -> Iterator[tuple[str, str]]:
    """(official, diffusers) name of every layer with parameters."""
    yield "conv1", "quant_conv"
    yield "conv2", "post_quant_conv"
    for side in ("encoder", "decoder"):
        yield f"{side}.conv1", f"{side}.conv_in"
        yield from _residual(f"{side}.middle.0", f"{side}.mid_block.resnets.0")
        for layer in ("norm", "to_qkv", "proj"):
            yield f"{side}.middle.1.{layer}", f"{side}.mid_block.attentions.0.{layer}"
        yield from _residual(f"{side}.middle.2", f"{side}.mid_block.resnets.1")
        yield f"{side}.head.0", f"{side}.norm_out"
        yield f"{side}.head.2", f"{side}.conv_out"
    down = up = 0
    for level in range(levels):
        for _ in range(res_blocks):
            yield from _residual(f"encoder.downsamples.{down}", f"encoder.down_blocks.{down}")
            down += 1
        for block in range(res_blocks + 1):
            yield from _residual(f"decoder.upsamples.{up}", f"decoder.up_blocks.{level}.resnets.{block}")
            up += 1
        if level < levels - 1:
            yield from _resample(f"encoder.downsamples.{down}", f"encoder.down_blocks.{down}")
            yield from _resample(f"decoder.upsamples.{up}", f"decoder.up_blocks.{level}.upsamplers.0")
            down, up = down + 1, up + 1


def _residual(official: str, ours: str) -> Iterator[tuple[str, str]]:
    # norm, SiLU, convolution, norm, SiLU, dropout, convolution
    for place, layer in ((0, "norm1"), (2, "conv1"), (3, "norm2"), (6, "conv2")):
        yield f"{official}.residual.{place}", f"{ours}.{layer}"
    yield f"{official}.shortcut", f"{ours}.conv_shortcut"


def _resample(official: str, ours: str) -> Iterator[tuple[str, str]]:
    for layer in ("resample", "time_conv"):
        yield f"{official}.{layer}", f"{ours}.{layer}"
