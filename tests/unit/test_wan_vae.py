"""WanVae: both published layouts, the published numbers, streaming decode, and what damaged files say."""

from __future__ import annotations

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Parameter

diffusers = pytest.importorskip("diffusers")

from diffusers.loaders import single_file_utils  # noqa: E402

from mirai_dist.config.error import FileError  # noqa: E402
from mirai_dist.models import wan_vae  # noqa: E402
from mirai_dist.models.wan_vae import DIFFUSERS_FILE, LATENT_MEAN, LATENT_STD, OFFICIAL_FILE, WanVae  # noqa: E402
from tests import vae_files  # noqa: E402

LIBRARY = vae_files.network(seed=3)


def latents(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.randn(batch, frames, 16, 2, 3, generator=torch.Generator().manual_seed(seed))


def video(frames: int, batch: int = 1, seed: int = 0) -> Tensor:
    return torch.rand(batch, frames, 3, 16, 24, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """official/Wan2.1_VAE.pth (beside the transformer's config.json, as published) and pipeline/vae/, equal weights."""
    root = tmp_path_factory.mktemp("vae")
    vae_files.write_diffusers(root / "pipeline" / "vae", LIBRARY)
    vae_files.write_official(root / "official" / OFFICIAL_FILE, LIBRARY)
    (root / "official" / "config.json").write_text('{"_class_name": "WanModel"}')
    return root


@pytest.fixture(scope="module")
def vae(folder: Path) -> WanVae:
    return WanVae.load(folder / "pipeline", "cpu")


def split(whole: Tensor, sizes: list[int]) -> list[Tensor]:
    return list(whole.split(sizes, dim=1))


# What is published


def test_the_published_numbers_are_those_of_diffusers() -> None:
    with torch.device("meta"):
        full = diffusers.AutoencoderKLWan()
        again = diffusers.AutoencoderKLWan(base_dim=96, **wan_vae.PUBLISHED)
    assert list(LATENT_MEAN) == full.config["latents_mean"] and list(LATENT_STD) == full.config["latents_std"]
    assert len(LATENT_MEAN) == len(LATENT_STD) == 16
    assert sum(parameter.numel() for parameter in again.parameters()) == 126_892_531
    assert {k: v.shape for k, v in full.state_dict().items()} == {k: v.shape for k, v in again.state_dict().items()}


def test_official_names() -> None:
    with torch.device("meta"):
        full = diffusers.AutoencoderKLWan()
    ours = {wan_vae.official_name(name, 2): name for name in full.state_dict()}
    assert len(ours) == 194
    # Facts of the published file, by hand.
    assert ours["decoder.upsamples.4.shortcut.weight"] == "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"
    assert ours["decoder.upsamples.7.time_conv.bias"] == "decoder.up_blocks.1.upsamplers.0.time_conv.bias"
    assert ours["encoder.downsamples.3.residual.6.weight"] == "encoder.down_blocks.3.conv2.weight"
    assert ours["encoder.head.2.bias"] == "encoder.conv_out.bias"
    # The library's converter, and the walk over the official layers.
    whole: dict[str, Any] = {name: name for name in ours}
    converted = single_file_utils.convert_wan_vae_to_diffusers(whole)
    assert {official: name for name, official in converted.items()} == ours
    assert vae_files.official_state(LIBRARY).keys() == ours.keys()


def test_official_names_of_another_depth() -> None:
    small = vae_files.network(**vae_files.SMALLEST)
    assert vae_files.official_state(small).keys() == {wan_vae.official_name(name, 1) for name in small.state_dict()}


@pytest.mark.parametrize("path", ["pipeline", "pipeline/vae", "official", f"official/{OFFICIAL_FILE}"])
def test_every_layout_gives_the_same_network(folder: Path, path: str) -> None:
    vae = WanVae.load(folder / path, "cpu")
    expected = LIBRARY.state_dict()
    found = vae.network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert vae.mean.flatten().tolist() == pytest.approx(LATENT_MEAN) and not vae.training
    assert vae.std.flatten().tolist() == pytest.approx(LATENT_STD)


def test_the_smallest_network_and_statistics_of_its_own(tmp_path: Path) -> None:
    other = [0.25 * (index + 1) for index in range(16)]
    network = vae_files.network(**vae_files.SMALLEST, latents_std=other)
    vae = WanVae.load(vae_files.write_diffusers(tmp_path, network), "cpu")
    assert vae.std.flatten().tolist() == other
    assert vae.decode(latents(2)).shape == (1, 5, 3, 16, 24)


def test_the_network_outlives_its_file(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "pipeline" / "vae", tmp_path / "vae")
    vae = WanVae.load(tmp_path, "cpu")
    with open(tmp_path / "vae" / DIFFUSERS_FILE, "r+b") as file:  # in place: the same pages
        file.write(b"\0" * (tmp_path / "vae" / DIFFUSERS_FILE).stat().st_size)
    assert torch.equal(vae.network.state_dict()["decoder.conv_in.weight"], LIBRARY.decoder.conv_in.weight)


# What it computes


def test_decode_is_the_librarys_on_unnormalised_latents(vae: WanVae) -> None:
    given = latents(4, batch=2)
    raw = given * torch.tensor(LATENT_STD)[:, None, None] + torch.tensor(LATENT_MEAN)[:, None, None]
    expected = LIBRARY.decode(raw.movedim(1, 2), return_dict=False)[0].movedim(1, 2)
    found = vae.decode(given)
    assert found.shape == (2, 13, 3, 16, 24) and found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5
    assert float(found.std()) > 0.2 and found.abs().max() == 1  # something is there, and the clamp is met


def test_encode_is_the_normalised_mean_of_the_posterior(vae: WanVae) -> None:
    given = video(9, batch=2)
    mean = LIBRARY.encode(given.movedim(1, 2), return_dict=False)[0].mean.permute(0, 2, 3, 4, 1)
    expected = ((mean - torch.tensor(LATENT_MEAN)) / torch.tensor(LATENT_STD)).permute(0, 1, 4, 2, 3)
    found = vae.encode(given)
    assert found.shape == (2, 3, 16, 2, 3) and found.dtype == torch.float32
    assert float((found - expected).abs().max()) < 1e-5
    assert torch.equal(found, vae.encode(given))


def test_an_image_is_the_first_frame_of_its_video(vae: WanVae) -> None:
    given = video(5)
    image = vae.encode(given[:, :1])
    assert image.shape == (1, 1, 16, 2, 3)
    assert torch.allclose(image, vae.encode(given)[:, :1], atol=1e-6)
    assert vae.decode(image).shape == (1, 1, 3, 16, 24)


def test_shapes_that_cannot_be(vae: WanVae) -> None:
    frames, sizes = ((1, 4, 3, 16, 16),), ((1, 5, 3, 12, 16), (1, 5, 3, 16, 20))
    for shape in (*frames, *sizes, (1, 5, 1, 16, 16), (5, 3, 16, 16), (0, 5, 3, 8, 8)):
        with pytest.raises(ValueError, match="cannot encode"):
            vae.encode(torch.zeros(shape))
    for shape in ((1, 2, 8, 2, 2), (1, 0, 16, 2, 2), (2, 16, 2, 2)):
        with pytest.raises(ValueError, match="cannot decode"):
            vae.decode(torch.zeros(shape))
    stream = vae.stream()
    stream(latents(1))
    for other in (latents(1, batch=2), torch.zeros(1, 1, 16, 4, 3)):
        with pytest.raises(ValueError, match="began with"):
            stream(other)


# Streaming


@pytest.mark.parametrize(
    ("sizes", "frames"),
    [
        ([3, 3, 3], [9, 12, 12]),
        ([1, 1, 1, 1], [1, 4, 4, 4]),
        ([1, 3, 2, 3], [1, 12, 8, 12]),
        ([2, 1, 4, 1], [5, 4, 16, 4]),
        ([7], [25]),
    ],
)
def test_the_stream_joined_is_the_whole(vae: WanVae, sizes: list[int], frames: list[int]) -> None:
    whole = latents(sum(sizes), batch=2)
    stream = vae.stream()
    pieces = [stream(piece) for piece in split(whole, sizes)]
    assert [piece.shape[1] for piece in pieces] == frames
    assert torch.equal(torch.cat(pieces, dim=1), vae.decode(whole))


def test_streams_are_independent_of_each_other_and_of_everything_else(vae: WanVae) -> None:
    one, other = latents(6, seed=1), latents(6, seed=2)
    first, second = vae.stream(), vae.stream()
    ours, theirs = [], []
    for index in range(3):
        ours.append(first(one[:, 2 * index : 2 * index + 2]))
        vae.encode(video(9))
        vae.network.decode(other.movedim(1, 2))  # the library's own cache
        theirs.append(second(other[:, 2 * index : 2 * index + 2]))
        assert torch.equal(vae.decode(other), vae.decode(other))
    assert torch.equal(torch.cat(ours, dim=1), vae.decode(one))
    assert torch.equal(torch.cat(theirs, dim=1), vae.decode(other))


def test_the_cache_matters_and_does_not_grow(vae: WanVae) -> None:
    whole = latents(30)
    stream = vae.stream()
    held = []
    for index, piece in enumerate(split(whole, [3] * 10)):
        stream(piece)
        if index in (2, 9):
            held.append(bytes_of_all_tensors())
    assert held[0] == held[1]
    alone = vae.decode(whole[:, 3:6])[:, 1:]
    assert not torch.allclose(alone, vae.decode(whole)[:, 13:21], atol=1e-3)


def bytes_of_all_tensors() -> int:
    """Of every storage that is alive in this process; fake tensors, which other tests make, have none."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if type(item) in (Tensor, Parameter) and item.device.type == "cpu":
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
    return sum(storages.values())


def test_a_call_that_fails_leaves_the_stream_as_it_was(vae: WanVae) -> None:
    whole = latents(5)
    stream = vae.stream()
    pieces = [stream(whole[:, :2])]
    good_frames = iter((True, False))

    def fail(*_: object) -> None:
        if not next(good_frames):
            raise torch.OutOfMemoryError("out of memory")

    hook = vae.network.decoder.up_blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError):
        stream(whole[:, 2:])
    hook.remove()
    pieces.append(stream(whole[:, 2:]))
    assert torch.equal(torch.cat(pieces, dim=1), vae.decode(whole))


def test_dtype_is_that_of_load_and_nothing_has_a_gradient(folder: Path, vae: WanVae) -> None:
    half = WanVae.load(folder / "official", "cpu", torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert half.mean.dtype == torch.float32
    given = latents(2).requires_grad_()
    pixels = half.decode(given)
    assert pixels.dtype == torch.float32 and not pixels.requires_grad
    assert 0 < float((pixels - vae.decode(given)).abs().mean()) < 0.05
    assert half.encode(video(5)).dtype == torch.float32
    assert not vae.encode(video(5).requires_grad_()).requires_grad
    assert not any(parameter.requires_grad for parameter in vae.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(vae.decode(given), vae.decode(given.detach()))
        inside = vae.decode(given), vae.encode(video(5))
    assert torch.equal(inside[0], vae.decode(given)) and torch.equal(inside[1], vae.encode(video(5)))


# What cannot be read


def test_without_diffusers_one_line_says_what_to_install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(FileError, match=r"install mirai-dist\[wan\]"):
        WanVae.load(folder / "pipeline", "cpu")


def setting(key: str, value: object) -> Callable[[Path], None]:
    """Change one key of config.json; the value KeyError removes it."""

    def change(root: Path) -> None:
        record = json.loads((root / "config.json").read_text())
        if value is KeyError:
            del record[key]
        else:
            record[key] = value
        (root / "config.json").write_text(json.dumps(record))

    return change


def text(content: bytes) -> Callable[[Path], object]:
    return lambda root: (root / "config.json").write_bytes(content)


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Callable[[Path], None]:
    def rewrite(root: Path) -> None:
        file = root / DIFFUSERS_FILE
        content = {key: value.clone() for key, value in load_file(file).items()}
        change(content)
        file.unlink()
        save_file(content, file)

    return rewrite


def pickled(change: Callable[[Any], Any]) -> Callable[[Path], None]:
    """Rewrite the .pth with what `change` makes of its content."""

    def rewrite(root: Path) -> None:
        file = root / OFFICIAL_FILE
        torch.save(change(torch.load(file)), file)

    return rewrite


def raw(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda root: (root / name).write_bytes(change((root / name).read_bytes()))


def renamed(content: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {new if key == old else key: value for key, value in content.items()}


def poisoned(content: dict[str, Tensor]) -> None:
    content["decoder.conv_in.weight"][0, 0, 0, 0, 0] = float("nan")


class Foreign:
    """An object that weights_only refuses."""


FOLDER: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda root: (root / "config.json").unlink(), "has no config.json"),
    "no tensors": (lambda root: (root / DIFFUSERS_FILE).unlink(), f"has no {DIFFUSERS_FILE}"),
    "empty folder": (lambda root: [item.unlink() for item in root.iterdir()], "found nothing"),
    "tensors are a folder": (
        lambda root: ((root / DIFFUSERS_FILE).unlink(), (root / DIFFUSERS_FILE).mkdir()),
        f"has no {DIFFUSERS_FILE}",
    ),
    "empty config": (text(b" "), "not readable JSON"),
    "cut config": (raw("config.json", lambda content: content[:-20]), "not readable JSON"),
    "config of bytes": (text(b"\xff\xfe\x00{"), "not readable JSON"),
    "deep config": (text(b"[" * 100_000), "not readable JSON"),
    "list as config": (text(b"[1]"), "holds a list"),
    "no class": (setting("_class_name", KeyError), "no _class_name"),
    "transformer's config": (setting("_class_name", "WanTransformer3DModel"), "need AutoencoderKLWan"),
    "long class": (setting("_class_name", "x" * 5000), "need AutoencoderKLWan"),
    "z_dim 48": (setting("z_dim", 48), "z_dim is 48; need 16"),
    "z_dim text": (setting("z_dim", "16"), 'z_dim is "16"'),
    "no z_dim": (setting("z_dim", KeyError), "lacks the key z_dim"),
    "base_dim 0": (setting("base_dim", 0), "base_dim is 0"),
    "base_dim huge": (setting("base_dim", 10**12), "need a whole number from 1 to 4096"),
    "base_dim true": (setting("base_dim", True), "base_dim is true"),
    "base_dim other": (setting("base_dim", 16), "has shape"),
    "decoder_base_dim text": (setting("decoder_base_dim", "8"), "decoder_base_dim is"),
    "decoder_base_dim other": (setting("decoder_base_dim", 16), "has shape"),
    "dim_mult short": (setting("dim_mult", [1, 1, 1]), "dim_mult is [1, 1, 1]; need four"),
    "dim_mult zero": (setting("dim_mult", [1, 1, 0, 1]), "dim_mult is"),
    "dim_mult other": (setting("dim_mult", [1, 2, 1, 1]), "lacks the key"),
    "blocks huge": (setting("num_res_blocks", 10**9), "num_res_blocks is"),
    "blocks other": (setting("num_res_blocks", 2), "lacks the key"),
    "no time stride": (setting("temperal_downsample", [False, False, True]), "stride of 4 in time"),
    "time stride elsewhere": (setting("temperal_downsample", [True, True, False]), "lacks the key"),
    "attention": (setting("attn_scales", [1.0]), "lacks the key"),
    "attention text": (setting("attn_scales", "none"), "attn_scales is"),
    "mean short": (setting("latents_mean", [0.0] * 15), "latents_mean is"),
    "mean null": (setting("latents_mean", None), "latents_mean is null"),
    "std long": (setting("latents_std", [1.0] * 48), "latents_std is"),
    "std zero": (setting("latents_std", [1.0] * 15 + [0.0]), "need z_dim = 16 positive numbers"),
    "std nan": (setting("latents_std", [1.0] * 15 + [float("nan")]), "latents_std is"),
    "Wan2.2": (setting("is_residual", True), "this is not Wan2.1's VAE"),
    "patches": (setting("patch_size", 2), "this is not Wan2.1's VAE"),
    "unknown key": (setting("dim_mullt", [1]), 'key "dim_mullt" is no setting'),
    "cut tensors": (raw(DIFFUSERS_FILE, lambda content: content[:-1000]), "not a whole safetensors file"),
    "cut header": (raw(DIFFUSERS_FILE, lambda content: content[:50]), "not a whole safetensors file"),
    "empty tensors": (raw(DIFFUSERS_FILE, lambda content: b""), "not a whole safetensors file"),
    "page of a web server": (raw(DIFFUSERS_FILE, lambda content: b"<!doctype html>" * 99), "not a whole safetensors"),
    "missing key": (tensors(lambda t: t.pop("post_quant_conv.bias")), "lacks the key 'post_quant_conv.bias':"),
    "extra key": (tensors(lambda t: t.update(loss=torch.zeros(1))), "a key too many, 'loss':"),
    "wrong shape": (tensors(lambda t: t.update({"quant_conv.bias": torch.zeros(31)})), "has shape [31]; need [32]"),
    "integers": (tensors(lambda t: t.update({"quant_conv.bias": torch.zeros(32).long()})), "is torch.int64"),
    "nan": (tensors(poisoned), "decoder.conv_in.weight holds non-finite"),
}
PTH: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (raw(OFFICIAL_FILE, lambda content: content[:-3000]), "cannot be read by torch.load"),
    "empty": (raw(OFFICIAL_FILE, lambda content: b""), "cannot be read by torch.load"),
    "text": (raw(OFFICIAL_FILE, lambda content: b"version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    "code inside": (pickled(lambda content: {**content, "x": Foreign()}), "cannot be read by torch.load"),
    "a list": (pickled(lambda content: list(content.values())), "holds a list"),
    "nothing in it": (pickled(lambda content: {}), "holds a dict"),
    "nested": (pickled(lambda content: {"state_dict": content}), "entry 'state_dict' is a dict"),
    "number keys": (pickled(lambda content: {0: torch.zeros(1)}), "entry '0' is a Tensor"),
    "diffusers' names": (pickled(lambda content: LIBRARY.state_dict()), "no encoder.conv1.weight"),
    "renamed": (
        pickled(lambda content: renamed(content, "decoder.middle.1.proj.bias", "decoder.middle.1.out.bias")),
        "lacks the key 'decoder.middle.1.proj.bias':",
    ),
    "prefixed": (pickled(lambda content: {f"model.{key}": value for key, value in content.items()}), "found model."),
    "block number": (
        pickled(lambda content: renamed(content, "decoder.upsamples.3.resample.1.bias", "decoder.upsamples.x.bias")),
        "lacks the key 'decoder.upsamples.3.resample.1.bias':",
    ),
    "48 channels": (
        pickled(lambda content: {**content, "conv2.weight": torch.zeros(48, 48, 1, 1, 1)}),
        "decodes 48 latent channels; need 16",
    ),
    "flat first layer": (pickled(lambda content: {**content, "encoder.conv1.weight": torch.zeros(8)}), "is not Wan"),
    "wide first layer": (
        pickled(lambda content: {**content, "encoder.conv1.weight": torch.zeros(16, 3, 3, 3, 3)}),
        "has shape",
    ),
    "sparse": (
        pickled(lambda content: {**content, "conv1.bias": torch.zeros(32).to_sparse()}),
        "need floating-point numbers",
    ),
    "infinite": (
        pickled(lambda content: {**content, "conv1.bias": torch.full((32,), float("inf"))}),
        "conv1.bias holds non-finite",
    ),
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("originals")
    vae_files.write_diffusers(root / "folder", vae_files.network(**vae_files.SMALLEST))
    vae_files.write_official(root / "pth" / OFFICIAL_FILE, LIBRARY)
    return root


def one_line(path: Path, words: str) -> None:
    with pytest.raises(FileError) as caught:
        WanVae.load(path, "cpu")
    message = str(caught.value)
    assert words in message, message
    assert "\n" not in message and len(message) < 500 and str(path)[:100] in message


@pytest.mark.parametrize("name", FOLDER)
def test_a_damaged_folder_is_refused_in_one_line(originals: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(originals / "folder", tmp_path / "vae")
    WanVae.load(tmp_path / "vae", "cpu")
    damage, words = FOLDER[name]
    damage(tmp_path / "vae")
    one_line(tmp_path / "vae", words)


@pytest.mark.parametrize("name", PTH)
def test_a_damaged_pth_is_refused_in_one_line(originals: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(originals / "pth", tmp_path / "wan")
    damage, words = PTH[name]
    damage(tmp_path / "wan")
    one_line(tmp_path / "wan", words)


def test_what_is_no_vae_at_all(tmp_path: Path) -> None:
    one_line(tmp_path / "nowhere", "no such file or folder")
    (tmp_path / "video.mp4").write_bytes(b"x")
    one_line(tmp_path / "video.mp4", "is not a VAE")
    one_line(tmp_path / ("x" * 300), "cannot be read: File name too long")
    one_line(Path("a\0b"), "no such file or folder")
    (tmp_path / "pipe" / "vae").mkdir(parents=True)
    one_line(tmp_path / "pipe", "has no config.json")
