"""What a set of tensor names and shapes is: a Wan text-to-video transformer, strictly, or something else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from mirai_dist.config import FileError
from mirai_dist.models.wan.keys import PUBLISHED_HEADS, WanShape, from_diffusers, shapes_of
from mirai_dist.weights.stored import Stored

# parts of a name that only another kind of weights has, most telling first
_FOREIGN = (
    (("lora_A", "lora_B", "lora_up", "lora_down", "lora_te", "lora_unet", ".alpha"),
     "a LoRA, not whole weights; merge it into its base model first"),
    (("vace_blocks", "vace_patch_embedding"), "a Wan VACE model; only text-to-video is supported"),
    (("img_emb.", "k_img.", "v_img.", "norm_k_img", "add_k_proj", "add_v_proj", "image_embedder"),
     "an image-to-video Wan; only text-to-video is supported"),
    (("scale_weight", "scale_input", "weight_scale", "qweight", "absmax"),
     "a quantised model; use the float32 or bfloat16 weights"),
    (("encoder.block.", "decoder.block.", "shared.weight", "token_embedding.weight", "SelfAttention."),
     "a text encoder (T5), not the transformer"),
    (("quant_conv", "encoder.down", "decoder.up", "encoder.conv", "decoder.conv", "decoder.middle", "decoder.mid"),
     "a video autoencoder (VAE), not the transformer"),
    (("visual.", "textual.", "vision_model", "text_model"), "a CLIP model, not the transformer"),
    (("exp_avg", "param_groups"), "an optimizer's state, not weights"),
)


def foreign_contents(names: Iterable[str]) -> str:
    """What weights with such names are, when they are certainly no Wan text-to-video transformer; else empty."""
    names = list(names)
    for marks, meaning in _FOREIGN:
        if any(mark in name for name in names for mark in marks):
            return meaning
    return ""


def official_names(where: Path, tensors: Mapping[str, Stored]) -> tuple[dict[str, Stored], str]:
    """Tensors by official name, and the layout that their names had ("wan" or "diffusers").

    Raises FileError when they belong to something else than a Wan text-to-video transformer.
    """
    other = foreign_contents(tensors)
    if other:
        raise FileError(where, f"is {other}")
    if not any(name.startswith("condition_embedder.") for name in tensors):
        return dict(tensors), "wan"
    renamed = {}
    for name, stored in tensors.items():
        try:
            renamed[from_diffusers(name)] = stored
        except KeyError:
            raise FileError(stored.file, f"extra key {name}: a WanTransformer3DModel has none of that name") from None
    return renamed, "diffusers"


def strict_sizes(where: Path, tensors: Mapping[str, Stored], heads: int = 0) -> WanShape:
    """WanShape of the network that exactly these tensors (by official name) are.

    Raises FileError naming the first missing or extra key, wrong shape or dtype.
    """
    sizes = _sizes(where, tensors, heads)
    expected = shapes_of(sizes)
    for name in expected:
        if name not in tensors:
            raise FileError(where, f"missing key {name}; the file is incomplete")
    for name, stored in tensors.items():
        if name not in expected:
            raise FileError(stored.file, f"extra key {stored.key}: Wan's text-to-video transformer has none of that "
                                         f"name ({sizes.blocks} blocks)")
        if stored.shape != expected[name]:
            raise FileError(stored.file, f"{stored.key} has shape {list(stored.shape)}, not {list(expected[name])}")
        if stored.dtype is None:
            raise FileError(stored.file, f"{stored.key} is stored as {stored.dtype_name}; weights must be float32, "
                                         "bfloat16 or float16")
    return sizes


def _sizes(where: Path, tensors: Mapping[str, Stored], heads: int) -> WanShape:
    def dimensions(name: str, count: int) -> tuple[int, ...]:
        if name not in tensors:
            first = next(iter(tensors), "nothing")
            found = any(other.startswith("blocks.") for other in tensors)
            raise FileError(where, f"missing key {name}; " + (
                "the file is incomplete" if found else f"these are no weights of Wan's transformer (there is {first})"))
        shape = tensors[name].shape
        if len(shape) != count or 0 in shape:
            raise FileError(tensors[name].file, f"{tensors[name].key} has shape {list(shape)}, which no Wan has")
        return shape

    dim, channels = dimensions("patch_embedding.weight", 5)[:2]
    given = dimensions("head.head.weight", 2)[0]
    if given != 4 * channels:
        raise FileError(where, f"takes {channels} latent channels and gives {given / 4:g}: an image-to-video or "
                               "control variant; only text-to-video is supported")
    ffn_dim = dimensions("blocks.0.ffn.0.weight", 2)[0]
    text_dim = dimensions("text_embedding.0.weight", 2)[1]
    freq_dim = dimensions("time_embedding.0.weight", 2)[1]
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    heads = heads or PUBLISHED_HEADS.get((dim, ffn_dim, blocks), 0)
    return WanShape(dim, ffn_dim, heads, blocks, text_dim, channels, freq_dim)
