"""The published video VAE (Wan2.1): diffusers' AutoencoderKLWan, its files in either layout, and streaming decode.

Stride (4, 8, 8), 16 channels, the first frame alone. The decoder is causal in time and keeps, for every causal
convolution, the last two frames that it saw; with a cache of its own a video can be decoded as its latents arrive.
"""

from __future__ import annotations

import inspect
import json
import math
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from mirai_dist.config.error import FileError
from mirai_dist.models.vae import GROUP, STRIDE

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

CHANNELS = 16
OFFICIAL_FILE = "Wan2.1_VAE.pth"
DIFFUSERS_FILE = "diffusion_pytorch_model.safetensors"

# Of a latent channel, as published with Wan2.1 (wan/modules/vae.py) and as AutoencoderKLWan's defaults.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# The constructor's arguments for the official file, which records none; the width is read off its tensors.
PUBLISHED: dict[str, Any] = {
    "z_dim": CHANNELS,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],  # diffusers' spelling
    "latents_mean": list(LATENT_MEAN),
    "latents_std": list(LATENT_STD),
}

# What a foreign or damaged file makes torch.load(weights_only=True) and json raise.
_UNREADABLE = (
    OSError, EOFError, RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
    OverflowError, MemoryError, RecursionError, pickle.UnpicklingError,
)  # fmt: skip


class WanVae(nn.Module):
    """A frozen AutoencoderKLWan behind the interface `mirai_dist.models.vae.Vae`.

    Latents are normalised: (mu - mean) / std of each channel. The network computes in the dtype given to `load`, also
    under autocast; latents and pixels are handed out in float32. Nothing here has a gradient.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: AutoencoderKLWan) -> None:
        super().__init__()
        self.network = network.requires_grad_(False)
        device = next(network.parameters()).device
        for name, values in (("mean", network.config["latents_mean"]), ("std", network.config["latents_std"])):
            column = torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]  # [16, 1, 1]
            self.register_buffer(name, column, persistent=False)
        self.eval()

    @classmethod
    def load(cls, path: Path, device: torch.device | str, dtype: torch.dtype = torch.float32) -> WanVae:
        """Read the VAE at `path`: a diffusers VAE folder (config.json, diffusion_pytorch_model.safetensors), a
        pipeline folder with such a folder `vae`, an official Wan folder with Wan2.1_VAE.pth, or that file.

        FileError, one line, for anything else: no such file, a damaged or foreign one, another VAE (Wan2.2's), a
        missing, extra or misshapen tensor, a non-finite value; and if diffusers is not installed.
        """
        kind = _library()
        config, file = _files(Path(path))
        if file is config:
            tensors = _read_torch(file)
            settings = {**PUBLISHED, "base_dim": _width(file, tensors)}
        else:
            settings = _settings(config, kind)
            tensors = _read_safetensors(file)
        network = _skeleton(kind, settings, config)
        needed = network.state_dict()
        names = {(official_name(n, settings["num_res_blocks"]) if file is config else n): n for n in needed}
        _check_keys(file, tensors, names)
        loaded = {}
        for key, name in names.items():
            _check_tensor(file, key, tensors[key], needed[name])
            # A copy: the pages of a memory-mapped file that is replaced later would go away under the network.
            loaded[name] = tensors[key].to(device, dtype, copy=True).contiguous()
        network.load_state_dict(loaded, assign=True)
        return cls(network)

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 1 + 4 k, 3, H, W] in [-1, 1] -> latents [B, 1 + k, 16, H/8, W/8] float32: the mean of the
        posterior, so the same pixels always give the same latents. k = 0 encodes an image.

        ValueError for another shape: H and W are multiples of 8.
        """
        good = pixels.ndim == 5 and pixels.shape[1] % GROUP == 1 and pixels.shape[2] == 3
        if not good or min(pixels.shape) == 0 or pixels.shape[3] % STRIDE or pixels.shape[4] % STRIDE:
            raise ValueError(
                f"cannot encode pixels of shape {tuple(pixels.shape)}: "
                "need [B, 1 + 4 k, 3, H, W] with H and W multiples of 8"
            )
        with torch.autocast(self.mean.device.type, enabled=False):
            posterior = self.network.encode(self._inward(pixels), return_dict=False)[0]
        return (posterior.mode().movedim(1, 2).float() - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, F, 16, h, w] -> pixels [B, 1 + 4 (F - 1), 3, 8 h, 8 w] float32, clamped to [-1, 1].

        ValueError for another shape.
        """
        return self.stream()(latents)

    def stream(self) -> WanStream:
        """A decoder for one video that arrives in pieces; see `WanStream`."""
        return WanStream(self)

    def _inward(self, values: Tensor) -> Tensor:
        """[B, T, C, H, W] -> [B, C, T, H, W] on the network's device, in its dtype."""
        weight = next(self.network.parameters())
        return values.movedim(1, 2).to(weight.device, weight.dtype)


class WanStream:
    """Latents of one video, piece by piece, to pixels. The feature cache is its own: any number of streams and whole
    decodes may be interleaved. It holds two frames a convolution, however long the video.

    Called with [B, f, 16, h, w], any f >= 1 each time, it returns float32 pixels in [-1, 1]: 1 + 4 (f - 1) frames
    for the first piece, 4 f for later ones. Joined, they are bit for bit `WanVae.decode` of the whole, because the
    decoder always sees one latent frame at a time. ValueError for another shape, or one that differs from the first
    piece's in anything but f.
    """

    def __init__(self, vae: WanVae) -> None:
        self._vae = vae
        self._shape: tuple[int, ...] = ()
        # An entry is None, then for a temporal upsampling the marker "Rep", then a tensor: the library's protocol.
        self._cache: list[Any] = [None] * _causal_convolutions(vae.network.decoder)

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> Tensor:
        self._check(latents)
        vae, decoder = self._vae, self._vae.network.decoder
        # A copy of the list: the library replaces entries, so a call that fails half way leaves the stream as it was.
        cache = list(self._cache)
        pieces = []
        with torch.autocast(vae.mean.device.type, enabled=False):
            raw = vae._inward(latents.to(vae.mean.device).float() * vae.std + vae.mean)
            for index in range(raw.shape[2]):
                frame = vae.network.post_quant_conv(raw[:, :, index : index + 1])
                pieces.append(decoder(frame, feat_cache=cache, feat_idx=[0]).float().clamp(-1, 1))
        self._cache, self._shape = cache, (latents.shape[0], *latents.shape[2:])
        return torch.cat(pieces, dim=2).movedim(2, 1)

    def _check(self, latents: Tensor) -> None:
        if latents.ndim != 5 or latents.shape[2] != CHANNELS or min(latents.shape) == 0:
            raise ValueError(f"cannot decode latents of shape {tuple(latents.shape)}: need [B, F, {CHANNELS}, h, w]")
        shape = (latents.shape[0], *latents.shape[2:])
        if self._shape and shape != self._shape:
            raise ValueError(f"a piece of [B, {CHANNELS}, h, w] {shape} in a stream that began with {self._shape}")


def official_name(name: str, res_blocks: int) -> str:
    """The name that the official .pth gives to a tensor of AutoencoderKLWan.

    There the blocks of the decoder's way up are one sequence: per level res_blocks + 1 residual blocks, and an
    upsampling after all but the last level; and the layers of a residual block are counted in their sequence.
    """
    if name.startswith(("quant_conv.", "post_quant_conv.")):
        return ("conv1." if name.startswith("quant_conv.") else "conv2.") + name.partition(".")[2]
    level_up = r"\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\."
    found = re.search(level_up, name)
    if found:
        place = int(found[1]) * (res_blocks + 2) + (int(found[3]) if found[2] == "resnets" else res_blocks + 1)
        name = re.sub(level_up, f".upsamples.{place}.", name)
    for ours, theirs in _OFFICIAL_PARTS:
        name = name.replace(ours, theirs)
    return name


_OFFICIAL_PARTS = (
    (".norm1.", ".residual.0."),
    (".conv1.", ".residual.2."),
    (".norm2.", ".residual.3."),
    (".conv2.", ".residual.6."),
    (".conv_shortcut.", ".shortcut."),
    (".conv_in.", ".conv1."),  # after the residual blocks' conv1
    (".norm_out.", ".head.0."),
    (".conv_out.", ".head.2."),
    (".mid_block.resnets.0.", ".middle.0."),
    (".mid_block.attentions.0.", ".middle.1."),
    (".mid_block.resnets.1.", ".middle.2."),
    (".down_blocks.", ".downsamples."),
)


def _library() -> type[AutoencoderKLWan]:
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise FileError("vae", f"the Wan VAE needs diffusers ({error}): install mirai-dist[wan]") from error
    return AutoencoderKLWan


def _causal_convolutions(decoder: nn.Module) -> int:
    """How many entries the decoder's feature cache has."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

    return sum(isinstance(module, WanCausalConv3d) for module in decoder.modules())


def _files(path: Path) -> tuple[Path, Path]:
    """(where the settings are, where the tensors are); twice the same file if it is the official .pth."""
    try:
        if path.is_dir():
            official = path / OFFICIAL_FILE
            return (official, official) if official.is_file() else _diffusers_files(path)
        if not path.exists():
            raise FileError(path, f"no such file or folder; give a VAE folder of diffusers, or {OFFICIAL_FILE}")
    except OSError as error:
        raise FileError(str(path)[:200], f"cannot be read: {error.strerror}") from error
    if path.suffix not in (".pth", ".pt"):
        raise FileError(path, f"is not a VAE: give {OFFICIAL_FILE}, or the folder that holds config.json")
    return path, path


def _diffusers_files(path: Path) -> tuple[Path, Path]:
    """(config.json, the tensors) of a VAE folder, or of the folder `vae` of a pipeline."""
    folder = path / "vae" if (path / "vae").is_dir() else path
    for name in ("config.json", DIFFUSERS_FILE):
        if not (folder / name).is_file():
            found = ", ".join(sorted(item.name for item in folder.iterdir())[:6]) or "nothing"
            raise FileError(folder, f"has no {name} (found {found}); give a VAE folder of diffusers or {OFFICIAL_FILE}")
    return folder / "config.json", folder / DIFFUSERS_FILE


def _read_torch(file: Path) -> Mapping[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        raise FileError(file, f"cannot be read by torch.load ({type(error).__name__}); copy it again") from error
    if not isinstance(content, dict) or not content:
        raise FileError(file, f"holds a {type(content).__name__}; {OFFICIAL_FILE} is a dictionary of tensors")
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise FileError(file, f"entry {str(key)[:80]!r} is a {type(value).__name__}, not a tensor")
    return content


def _read_safetensors(file: Path) -> Mapping[str, Tensor]:
    try:
        return load_file(file)
    except (*_UNREADABLE, SafetensorError) as error:
        raise FileError(file, f"is not a whole safetensors file ({str(error)[:120]}); copy it again") from error


def _width(file: Path, tensors: Mapping[str, Tensor]) -> int:
    """base_dim of an official file; FileError if it is no Wan2.1 VAE."""
    first, latent = tensors.get("encoder.conv1.weight"), tensors.get("conv2.weight")
    if first is None or latent is None or first.ndim != 5 or latent.ndim != 5:
        some = ", ".join(list(tensors)[:3])[:120]
        raise FileError(file, f"is not {OFFICIAL_FILE}: no encoder.conv1.weight or conv2.weight (found {some})")
    if latent.shape[0] != CHANNELS:
        raise FileError(file, f"decodes {latent.shape[0]} latent channels; need {CHANNELS} (Wan2.1's VAE)")
    if not 1 <= first.shape[0] <= _WIDEST:
        raise FileError(file, f"encoder.conv1.weight has {first.shape[0]} rows; need 1 to {_WIDEST}")
    return first.shape[0]


_WIDEST = 4096  # base_dim is 96; a wild number would exhaust the machine before it is compared with the tensors


def _whole(value: object, low: int, high: int) -> bool:
    return type(value) is int and low <= value <= high


def _row(value: object, length: int | None, test: Callable[[Any], bool]) -> bool:
    """Whether value is a list of `length` (None: any) entries that pass the test."""
    return isinstance(value, list) and length in (None, len(value)) and all(test(entry) for entry in value)


def _number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


# What config.json must say for each argument that is used; every key is required.
_NEEDED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "base_dim": (lambda value: _whole(value, 1, _WIDEST), f"a whole number from 1 to {_WIDEST}"),
    "z_dim": (lambda value: _whole(value, CHANNELS, CHANNELS), f"{CHANNELS} (Wan2.1's VAE)"),
    "dim_mult": (lambda value: _row(value, 4, lambda entry: _whole(entry, 1, 64)), "four whole numbers from 1 to 64"),
    "num_res_blocks": (lambda value: _whole(value, 1, 16), "a whole number from 1 to 16"),
    "temperal_downsample": (
        lambda value: _row(value, 3, lambda entry: type(entry) is bool) and sum(value) == 2,
        "three truth values, two of them true: a stride of 4 in time",
    ),
    "attn_scales": (lambda value: _row(value, None, _number), "a list of numbers"),
    "latents_mean": (lambda value: _row(value, CHANNELS, _number), f"z_dim = {CHANNELS} numbers"),
    "latents_std": (
        lambda value: _row(value, CHANNELS, lambda entry: _number(entry) and entry > 0),
        f"z_dim = {CHANNELS} positive numbers",
    ),
}
# Later additions of diffusers, all for Wan2.2's VAE: absent, or what Wan2.1's VAE has.
_FIXED: dict[str, tuple[Any, ...]] = {
    "is_residual": (False,),
    "in_channels": (3,),
    "out_channels": (3,),
    "patch_size": (None,),
    "scale_factor_temporal": (GROUP, None),
    "scale_factor_spatial": (STRIDE, None),
}


def _settings(file: Path, kind: type[AutoencoderKLWan]) -> dict[str, Any]:
    """The constructor's arguments in config.json, each checked; FileError names the key."""
    try:
        record = json.loads(file.read_text("utf-8"))
    except _UNREADABLE as error:
        raise FileError(file, f"is not readable JSON: {str(error)[:120]}") from error
    if not isinstance(record, dict):
        raise FileError(file, f"holds a {type(record).__name__}; need an object with the VAE's settings")
    name = record.get("_class_name")
    if name != "AutoencoderKLWan":
        what = f"_class_name is {_brief(name)}" if name else "has no _class_name"
        raise FileError(file, f"{what}; need AutoencoderKLWan: the folder `vae` of a pipeline")
    known = {*_NEEDED, *inspect.signature(kind.__init__).parameters}
    for key, value in record.items():
        if key not in known and not key.startswith("_"):
            raise FileError(file, f"key {_brief(key)} is no setting of AutoencoderKLWan in the installed diffusers")
        if key in _FIXED and value not in _FIXED[key]:
            raise FileError(file, f"{key} is {_brief(value)}; need {_FIXED[key][0]}: this is not Wan2.1's VAE")
    for key, (test, wanted) in _NEEDED.items():
        if key not in record:
            raise FileError(file, f"lacks the key {key}: {wanted}")
        if not test(record[key]):
            raise FileError(file, f"{key} is {_brief(record[key])}; need {wanted}")
    settings = {key: record[key] for key in _NEEDED}
    decoder = record.get("decoder_base_dim")
    if decoder is not None:
        if not _NEEDED["base_dim"][0](decoder):
            raise FileError(file, f"decoder_base_dim is {_brief(decoder)}; need {_NEEDED['base_dim'][1]}")
        settings["decoder_base_dim"] = decoder
    return settings


def _brief(value: object) -> str:
    """A value of the file, short enough for one line."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _skeleton(kind: type[AutoencoderKLWan], settings: dict[str, Any], file: Path) -> AutoencoderKLWan:
    """The network without storage."""
    try:
        with torch.device("meta"):
            return kind(**settings)
    except _UNREADABLE as error:
        raise FileError(file, f"describes no VAE that diffusers can build: {str(error)[:120]}") from error


def _check_keys(file: Path, tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> None:
    missing, extra = names.keys() - tensors.keys(), tensors.keys() - names.keys()
    for what, keys in (("lacks the key", missing), ("has a key too many,", extra)):
        if keys:
            first, *others = sorted(keys)
            more = f" and {len(others)} more" if others else ""
            raise FileError(file, f"{what} {first[:120]!r}{more}: it is no Wan2.1 VAE, or not a whole one")


def _check_tensor(file: Path, key: str, found: Tensor, needed: Tensor) -> None:
    if found.shape != needed.shape:
        raise FileError(file, f"{key} has shape {list(found.shape)}; need {list(needed.shape)}")
    if found.layout is not torch.strided or not found.dtype.is_floating_point:
        raise FileError(file, f"{key} is {found.dtype} ({found.layout}); need floating-point numbers")
    if not found.isfinite().all():
        raise FileError(file, f"{key} holds non-finite values; copy the file again")
