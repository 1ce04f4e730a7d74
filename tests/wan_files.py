"""Small weight files of exactly the published layouts, and damaged ones, for tests.

    official(folder, tensors)             sharded safetensors, index, config.json, as Wan2.1-T2V-14B is published
    diffusers(folder, tensors)            WanTransformer3DModel, alone or below a pipeline folder
    pt(path, tensors, style)              one of STYLES: what the causal releases save

`tensors` are by official name; `tiny_tensors` makes some. SIZES has heads that cannot be guessed from the shapes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from mirai_dist.models.wan.keys import WanShape, shapes_of, to_diffusers

SIZES = WanShape(dim=40, ffn_dim=48, heads=2, blocks=3, text_dim=10, channels=4, freq_dim=16)
STEM = "diffusion_pytorch_model"
WRAPPED = "model._fsdp_wrapped_module."

# style -> keys at the top, and the prefix of the weights' own names below each
STYLES: dict[str, dict[str, str]] = {
    "self-forcing": {"generator": "model.", "critic": "model.", "generator_ema": WRAPPED},
    "self-forcing early": {"generator": "model.", "critic": "model."},
    "causal-forcing": {"generator": "model."},
    "causal-forcing late": {"generator_ema": WRAPPED},
    "causvid": {"generator": "model.", "critic": "model."},
    "video-mirai": {"generator": "model.", "generator_ema": WRAPPED, "mirai_projector": "", "foresight_dim_proj": ""},
    "under model": {"model": ""},
    "under model, prefixed": {"model": "model."},
    "bare": {"": ""},
    "bare, prefixed": {"": "model."},
    "bare, compiled": {"": "model._orig_mod."},
    "compiled": {"generator": "_orig_mod.model."},
    "wrapped blocks": {"generator": "model._fsdp_wrapped_module._checkpoint_wrapped_module."},
}


def tiny_tensors(seed: int = 0, dtype: torch.dtype = torch.float32, sizes: WanShape = SIZES) -> dict[str, Tensor]:
    """Random weights by official name, nothing at zero or one."""
    draws = torch.Generator().manual_seed(seed)
    return {name: (0.3 * torch.randn(shape, generator=draws)).to(dtype) for name, shape in shapes_of(sizes).items()}


def official_config(sizes: WanShape = SIZES) -> dict[str, Any]:
    """config.json as Wan2.1-T2V-1.3B has it, with other numbers."""
    return {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": sizes.dim, "eps": 1e-06,
        "ffn_dim": sizes.ffn_dim, "freq_dim": sizes.freq_dim, "in_dim": sizes.channels, "model_type": "t2v",
        "num_heads": sizes.heads, "num_layers": sizes.blocks, "out_dim": sizes.channels, "text_len": 512,
    }


def diffusers_config(sizes: WanShape = SIZES) -> dict[str, Any]:
    """config.json as Wan-AI/Wan2.1-T2V-1.3B-Diffusers has it, with other numbers."""
    return {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0.dev0", "added_kv_proj_dim": None,
        "attention_head_dim": sizes.dim // sizes.heads, "cross_attn_norm": True, "eps": 1e-06,
        "ffn_dim": sizes.ffn_dim, "freq_dim": sizes.freq_dim, "image_dim": None, "in_channels": sizes.channels,
        "num_attention_heads": sizes.heads, "num_layers": sizes.blocks, "out_channels": sizes.channels,
        "patch_size": [1, 2, 2], "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024,
        "text_dim": sizes.text_dim,
    }


def official(folder: Path, tensors: Mapping[str, Tensor], shards: int = 3, sizes: WanShape = SIZES) -> Path:
    """An official folder; one shard is a single file without an index, as the 1.3B is published."""
    _safetensors(folder, tensors, shards)
    _json(folder / "config.json", official_config(sizes))
    return folder


def diffusers(
    folder: Path, tensors: Mapping[str, Tensor], shards: int = 2, sizes: WanShape = SIZES, pipeline: bool = False
) -> Path:
    """A diffusers folder: the transformer itself, or a pipeline's with `transformer/` below."""
    inside = folder / "transformer" if pipeline else folder
    _safetensors(inside, {to_diffusers(name): tensor for name, tensor in tensors.items()}, shards)
    _json(inside / "config.json", diffusers_config(sizes))
    if pipeline:
        _json(folder / "model_index.json", {"_class_name": "WanPipeline"})
    return folder


def pt(path: Path, tensors: Mapping[str, Tensor], style: str, others: Mapping[str, Tensor] | None = None) -> Path:
    """A .pt file of one of STYLES; its moving average and critic, if any, are `others` (else a constant apart)."""
    content: dict[str, Any] = {}
    apart = others or {name: tensor + 1 for name, tensor in tensors.items()}
    for place, prefix in STYLES[style].items():
        alone = place == "generator_ema" and len(STYLES[style]) == 1
        chosen = tensors if alone or place in ("", "generator", "model") else apart
        if place in ("mirai_projector", "foresight_dim_proj"):
            content[place] = {"proj.weight": torch.ones(2, 2)}
        elif place:
            content[place] = {prefix + name: tensor for name, tensor in chosen.items()}
        else:
            content |= {prefix + name: tensor for name, tensor in chosen.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def _safetensors(folder: Path, tensors: Mapping[str, Tensor], shards: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    # The published shards hold their keys in sorted order, which splits blocks between shards.
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / f"{STEM}.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"{STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        held = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    _json(folder / f"{STEM}.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map})


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
