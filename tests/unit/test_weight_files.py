"""Weight files in all their forms: what is read is what is in them, and what is wrong with one is said in one line."""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import re
import shutil
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mirai_dist.config import FileError
from mirai_dist.models.wan import WanModel
from mirai_dist.models.wan.keys import WanShape, shapes_of, to_diffusers
from mirai_dist.weights import folders
from mirai_dist.weights.checksums import checksum, total
from mirai_dist.weights.files import checked_kind, open_weights
from mirai_dist.weights.folders import wan_config, write_folder
from mirai_dist.weights.load import check_fit, load_into
from mirai_dist.weights.pt import verify_pt
from mirai_dist.weights.stored import SafetensorsFile
from tests import wan_files
from tests.wan_files import SIZES, STEM, STYLES

SMALL, LARGE = WanShape(1536, 8960, 12, 30), WanShape(5120, 13824, 40, 40)
INDEX, WHOLE = f"{STEM}.safetensors.index.json", f"{STEM}.safetensors"
FIRST = f"{STEM}-00001-of-00003.safetensors"
TENSORS = wan_files.tiny_tensors()


def network() -> WanModel:
    return WanModel(SIZES)


def loaded(path: Path, which: Any = "raw") -> dict[str, Tensor]:
    """What a network holds after loading, in its own fp32."""
    model = network()
    load_into(model, open_weights(path, which))
    return dict(model.state_dict())


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].float()) for name in one)


def ours(folder: Path, tensors: dict[str, Tensor], **manifest: Any) -> Path:
    """A folder as `mirai import` writes it."""
    write_folder(folder, list(tensors), tensors.__getitem__, wan_config(SIZES), {"kind": "diffusion", **manifest})
    return folder


# What is read is what is in the file.

FORMS: dict[str, Callable[[Path, dict[str, Tensor]], Path]] = {
    "official": wan_files.official,
    "official, one file": lambda path, tensors: wan_files.official(path, tensors, shards=1),
    "official, the file itself": lambda path, tensors: wan_files.official(path, tensors, shards=1) / WHOLE,
    "diffusers": wan_files.diffusers,
    "diffusers, one file": lambda path, tensors: wan_files.diffusers(path, tensors, shards=1),
    "diffusers pipeline": lambda path, tensors: wan_files.diffusers(path, tensors, pipeline=True),
    "ours": ours,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_folders_give_the_very_bits(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    tensors = wan_files.tiny_tensors(1, dtype)
    file = open_weights(FORMS[form](tmp_path / "w", tensors))
    assert file.layout == ("diffusers" if "diffusers" in form else "wan")
    assert file.shapes == shapes_of(SIZES) and set(file.dtypes.values()) == {dtype}
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())
    assert file.bytes_read == file.bytes == sum(tensor.nbytes for tensor in tensors.values())
    assert equal(loaded(file.path), tensors)


@pytest.mark.parametrize("style", STYLES)
def test_every_key_style_of_the_releases(tmp_path: Path, style: str) -> None:
    apart = wan_files.tiny_tensors(2)
    path = wan_files.pt(tmp_path / "model.pt", TENSORS, style, apart)
    entries = STYLES[style]
    if list(entries) != ["generator_ema"]:
        file = open_weights(path)
        assert (file.layout, file.which) == ("pt", "raw")
        assert equal(loaded(path), TENSORS)
    if "generator_ema" in entries:
        assert open_weights(path, "ema").which == "ema"
        assert equal(loaded(path, "ema"), TENSORS if len(entries) == 1 else apart)


def test_raw_weights_and_averages_are_never_exchanged_in_silence(tmp_path: Path) -> None:
    alone = wan_files.pt(tmp_path / "a.pt", TENSORS, "causal-forcing late")
    with pytest.raises(FileError, match="moving average alone .* ask for it: which: ema"):
        open_weights(alone)
    without = wan_files.pt(tmp_path / "b.pt", TENSORS, "causal-forcing")
    for path in (without, wan_files.official(tmp_path / "c", TENSORS)):
        with pytest.raises(FileError, match="no.* moving average.*; ask for its raw weights"):
            open_weights(path, "ema")
    assert open_weights(ours(tmp_path / "d", TENSORS, which="ema"), "ema").which == "ema"
    assert open_weights(tmp_path / "d").which == "ema"  # one set of weights, and it says what it is


@pytest.mark.parametrize("form", ["official", "diffusers", "pt"])
def test_slices_read_their_own_bytes_alone(tmp_path: Path, form: str) -> None:
    if form == "pt":
        path = wan_files.pt(tmp_path / "w.pt", TENSORS, "self-forcing")
    else:
        path = FORMS[form](tmp_path / "w", TENSORS)
    file = open_weights(path)
    draws = random.Random(3)
    for name, tensor in TENSORS.items():
        first = draws.randint(0, tensor.shape[0])
        last = draws.randint(first, tensor.shape[0])
        before = file.bytes_read
        part = file.read(name, (slice(first, last),))
        assert torch.equal(part, tensor[first:last])
        assert part.untyped_storage().nbytes() == part.nbytes == file.bytes_read - before
    matrix = "blocks.1.ffn.0.weight"
    assert torch.equal(file.read(matrix, (slice(3, 9), slice(2, 7))), TENSORS[matrix][3:9, 2:7])


def test_safetensors_are_read_as_their_own_library_reads_them(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b": torch.randn(7).bfloat16(), "c": torch.randn(2, 2, 2).double(),
               "empty": torch.zeros(0, 4), "d": torch.randn(3).half()}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt", "note": "any"})
    theirs = load_file(tmp_path / "x.safetensors")
    mine = SafetensorsFile(tmp_path / "x.safetensors").tensors
    assert mine.keys() == theirs.keys()
    for name, stored in mine.items():
        assert torch.equal(stored.elements(0, math.prod(stored.shape)).view(stored.shape), theirs[name])


def test_folders_that_diffusers_itself_writes(tmp_path: Path) -> None:
    transformers = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    other = transformers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=20, in_channels=4, out_channels=4, text_dim=10, freq_dim=16,
        ffn_dim=48, num_layers=3)
    other.save_pretrained(tmp_path / "w", max_shard_size="50KB")
    assert (tmp_path / "w" / INDEX).exists()
    file = open_weights(tmp_path / "w")
    assert (file.layout, file.kind, file.shape_of_network()) == ("diffusers", "diffusion", SIZES)
    state = other.state_dict()
    assert equal(loaded(tmp_path / "w"), {name: state[to_diffusers(name)] for name in shapes_of(SIZES)})


# Full size, on the meta device and in sparse files.


@pytest.mark.parametrize(("sizes", "parameters"), [(SMALL, 1_418_996_800), (LARGE, 14_288_491_584)])
def test_full_size_files_fit_the_network_strictly(tmp_path: Path, sizes: WanShape, parameters: int) -> None:
    with torch.device("meta"):
        model = WanModel(sizes)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    file = open_weights(sparse_official(tmp_path / "w", sizes, shards=6))
    assert file.shape_of_network() == sizes and file.bytes == 4 * parameters
    check_fit(model, file)
    other = LARGE if sizes == SMALL else SMALL
    with torch.device("meta"):
        wrong = WanModel(other)
    line = f"dim is {sizes.dim} in the file, {other.dim} in the recipe"
    with pytest.raises(FileError, match=f"heads is {sizes.heads} in the file, {other.heads} in the recipe, {line}"):
        check_fit(wrong, file)


def sparse_official(folder: Path, sizes: WanShape, shards: int) -> Path:
    """An official folder whose data are holes: real headers and sizes, no disk space."""
    folder.mkdir()
    names, weight_map = sorted(shapes_of(sizes)), {}
    shapes = shapes_of(sizes)
    for number in range(shards):
        file = f"{STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        header, end = {}, 0
        for name in names[number * len(names) // shards : (number + 1) * len(names) // shards]:
            start, end = end, end + 4 * math.prod(shapes[name])
            header[name] = {"dtype": "F32", "shape": shapes[name], "data_offsets": [start, end]}
        text = json.dumps(header).encode()
        (folder / file).write_bytes(struct.pack("<Q", len(text)) + text)
        os.truncate(folder / file, 8 + len(text) + end)
        weight_map |= dict.fromkeys(header, file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(wan_files.official_config(sizes)))
    return folder


# Kinds.


@pytest.mark.parametrize(("style", "kind"), [("self-forcing", "dmd"), ("causvid", "dmd"), ("video-mirai", "dmd"),
                                             ("causal-forcing", ""), ("bare", "")])
def test_the_kind_of_a_pt_file(tmp_path: Path, style: str, kind: str) -> None:
    file = open_weights(wan_files.pt(tmp_path / "w.pt", TENSORS, style))
    assert file.kind == kind
    if not kind:
        assert checked_kind(file, "cd") == "cd"
        with pytest.raises(FileError, match="does not record what its weights are; declare it as one of diffusion, ar"):
            checked_kind(file, "")
    else:
        assert checked_kind(file, "") == checked_kind(file, kind) == kind
        with pytest.raises(FileError, match="kind dmd .* declared as ar"):
            checked_kind(file, "ar")


def test_the_kind_of_a_folder(tmp_path: Path) -> None:
    official = open_weights(wan_files.official(tmp_path / "a", TENSORS))
    assert (official.kind, official.assumed) == ("diffusion", True)
    with pytest.raises(FileError, match="declared as cd; `mirai import --kind cd` records another kind"):
        checked_kind(official, "cd")
    recorded = open_weights(ours(tmp_path / "b", TENSORS, kind="cd", parent="x"))
    assert (recorded.kind, recorded.assumed, recorded.manifest["parent"]) == ("cd", False, "x")
    config = tmp_path / "a" / "config.json"
    config.write_text(config.read_text().replace("WanModel", "CausalWanModel"))
    assert open_weights(tmp_path / "a").kind == ""  # causal, but of which stage it does not say


# Checksums.


def test_a_checksum_adds_up_over_any_slices() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        values = torch.randn(300_000, generator=torch.Generator().manual_seed(1)).to(dtype)
        cuts = [0, 1, 7, 65_535, 65_536, 65_537, 131_072, 200_001, 300_000]
        parts = [checksum(values[a:b], a) for a, b in zip(cuts, cuts[1:], strict=False)]
        assert total(parts) == checksum(values)


def test_a_checksum_notices_flips_exchanges_and_shifts() -> None:
    values = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    seen = {checksum(values), checksum(values, 1), checksum(values.roll(1)), checksum(values.flip(0)),
            checksum(values.bfloat16()), checksum(-values)}
    bits = values.view(torch.int32)
    for place, bit in ((0, 0), (70_000, 31), (199_999, 22)):
        changed = bits.clone()
        changed[place] ^= 1 << bit if bit < 31 else -(1 << 31)
        seen.add(checksum(changed.view(torch.float32)))
    exchanged = values.clone()
    exchanged[[5, 5 + 65_536]] = values[[5 + 65_536, 5]]
    assert len(seen | {checksum(exchanged)}) == 10


def test_recorded_checksums_stay_readable() -> None:
    """Folders written today are checked by later versions: the function may never change."""
    assert f"{checksum(torch.arange(100_000, dtype=torch.float32)):016x}" == "f96ebb3ba19f7f00"


# Writing folders.


def test_folders_are_cut_into_shards_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 60_000)
    out = ours(tmp_path / "w", TENSORS)
    shards = sorted(out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].name == f"{STEM}-00001-of-{len(shards):05d}.safetensors"
    assert all(sum(tensor.nbytes for tensor in load_file(shard).values()) <= 60_000 for shard in shards)
    assert equal(loaded(out), TENSORS)
    assert [path.name for path in tmp_path.iterdir()] == ["w"]


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    def tensor_of(name: str) -> Tensor:
        if name == "head.head.bias":
            raise FileError("source", "gone")
        return TENSORS[name]

    with pytest.raises(FileError, match="gone"):
        write_folder(tmp_path / "w", list(TENSORS), tensor_of, {}, {})
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "w").mkdir()
    ours(tmp_path / "w", TENSORS)  # an empty folder is as good as none
    with pytest.raises(FileError, match="is not empty"):
        ours(tmp_path / "w", TENSORS)
    with pytest.raises(FileError, match="is a file"):
        ours(tmp_path / "w" / "config.json", TENSORS)
    with pytest.raises(FileError, match="cannot be written"):
        ours(tmp_path / "w" / "config.json" / "x", TENSORS)


# What is wrong is said in one line: where, what, what to do.


def png(path: Path) -> None:
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100))


def write_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")


class Malicious:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


def saved(content: Any, path: Path) -> None:
    torch.save(content, path)


def safetensors_of(path: Path, **names: Any) -> None:
    save_file({name.replace("__", "."): torch.zeros(shape) for name, shape in names.items()}, path)


WRONG: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "nothing there": ("x", lambda path: None, "does not exist"),
    "empty file": ("x.pt", lambda path: path.write_bytes(b""), "is an empty file"),
    "empty safetensors": ("x.safetensors", lambda path: path.write_bytes(b""), "is an empty file"),
    "text": ("x.pt", lambda path: path.write_text("hello " * 50), "is a text file"),
    "image": ("x.png", png, "is a PNG image"),
    "git-lfs pointer": ("x.safetensors", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"),
                        "git-lfs pointer"),
    "zip that is no .pt": ("x.pt", write_zip, "no readable .pt file"),
    "empty folder": ("x", lambda path: path.mkdir(), "holds no weights"),
    "folder with a .pt": ("x", lambda path: wan_files.pt(path / "model.pt", TENSORS, "causal-forcing"),
                          r"did you mean .*/x/model.pt\?"),
    "folder above": ("x", lambda path: wan_files.official(path / "Wan", TENSORS, shards=1), r"did you mean .*/x/Wan\?"),
    "run": ("x", lambda path: (path / "stages").mkdir(parents=True), "use `mirai export`"),
    "two networks": ("x", lambda path: [wan_files.official(path / f"transformer{n}", TENSORS) for n in ("", "_2")],
                     "two networks"),
    "T5": ("x.pt", lambda path: saved({"token_embedding.weight": torch.zeros(3, 2)}, path), r"a text encoder \(T5\)"),
    "T5 safetensors": ("x.safetensors", lambda path: safetensors_of(path, encoder__block__0__layer__0=(2, 2)),
                       r"a text encoder \(T5\)"),
    "T5 folder": ("x", lambda path: [path.mkdir(), (path / "config.json").write_text(
        '{"architectures": ["UMT5EncoderModel"]}')], r"describes \['UMT5EncoderModel'\]; weights of WanModel"),
    "VAE folder": ("x", lambda path: edited(lambda config: config.update(_class_name="AutoencoderKLWan"))(
        wan_files.diffusers(path, TENSORS, shards=1) / "config.json", random.Random()), "describes AutoencoderKLWan"),
    "VAE": ("x.pth", lambda path: saved({"encoder.conv1.weight": torch.zeros(3, 2)}, path), "a video autoencoder"),
    "LoRA": ("x.safetensors", lambda path: safetensors_of(path, blocks__0__self_attn__q__lora_A__weight=(2, 2)),
             "a LoRA, not whole weights; merge it"),
    "other network": ("x.safetensors", lambda path: safetensors_of(path, layers__0__weight=(2, 2)),
                      r"missing key patch_embedding.weight; these are no weights .*there is layers.0.weight"),
    "optimizer": ("x.pt", lambda path: saved({"model": {"state.0.exp_avg": torch.zeros(2)}}, path),
                  "an optimizer's state"),
    "a tensor": ("x.pt", lambda path: saved(torch.zeros(3), path), "holds a Tensor, not a dictionary"),
    "a list": ("x.pt", lambda path: saved([1, 2], path), "holds a list, not a dictionary"),
    "numbers": ("x.pt", lambda path: saved({"generator": {"a": 1}}, path), "generator.a is a int, not a tensor"),
    "no dictionary": ("x.pt", lambda path: saved({"generator": None}, path), "'generator' is a NoneType"),
    "empty dictionary": ("x.pt", lambda path: saved({"generator": {}}, path), "'generator' is empty"),
    "sparse": ("x.pt", lambda path: saved({"a": torch.eye(3).to_sparse()}, path), "sparse"),
    "twice": ("x.pt", lambda path: saved({"model.a": torch.zeros(1), "a": torch.zeros(1)}, path),
              "the same parameter a"),
    "objects": ("x.pt", lambda path: saved({"generator": Path("x")}, path), r"Python objects \(pathlib\.\w+\)"),
    "diffusers names": ("x.pt", lambda path: saved({"condition_embedder.time_proj.bias": torch.zeros(2)}, path),
                        "names of the diffusers layout"),
}


@pytest.mark.parametrize("what", WRONG)
def test_the_wrong_thing_is_recognised(tmp_path: Path, what: str) -> None:
    name, make, expected = WRONG[what]
    make(tmp_path / name)
    with pytest.raises(FileError, match=expected) as raised:
        open_weights(tmp_path / name)
    assert "\n" not in str(raised.value) and str(tmp_path / name) in str(raised.value)


def test_no_file_can_run_code(tmp_path: Path) -> None:
    torch.save({"generator": TENSORS, "x": Malicious(tmp_path / "run")}, tmp_path / "new.pt")
    torch.save({"x": Malicious(tmp_path / "run")}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Malicious(tmp_path / "run"), protocol=2))
    for name in ("new.pt", "old.pt", "bare.pt"):
        with pytest.raises(FileError):
            open_weights(tmp_path / name, whole=True)
    assert not (tmp_path / "run").exists()


def test_an_old_pt_file_asks_for_import(tmp_path: Path) -> None:
    torch.save({"generator": TENSORS}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(FileError, match="old format of torch.save.*`mirai import`"):
        open_weights(tmp_path / "x.pt")
    file = open_weights(tmp_path / "x.pt", whole=True)
    assert all(torch.equal(file.read(name), tensor) for name, tensor in TENSORS.items())


# (change to the tensors, what the line says)
CHANGED: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "missing key": (lambda t: t.pop("blocks.1.ffn.2.bias"), "missing key blocks.1.ffn.2.bias"),
    "missing block": (lambda t: [t.pop(name) for name in list(t) if name.startswith("blocks.1.")],
                      "missing key blocks.1.modulation"),
    "missing embedding": (lambda t: t.pop("text_embedding.0.weight"), "missing key text_embedding.0.weight"),
    "extra key": (lambda t: t.update({"blocks.0.norm1.weight": torch.zeros(40)}), "extra key blocks.0.norm1.weight"),
    "wrong shape": (lambda t: t.update({"blocks.2.self_attn.q.weight": torch.zeros(40, 41)}),
                    r"blocks.2.self_attn.q.weight has shape \[40, 41\], not \[40, 40\]"),
    "flat patches": (lambda t: t.update({"patch_embedding.weight": torch.zeros(40, 16)}), r"\[40, 16\], which no Wan"),
    "image-to-video": (lambda t: t.update({"patch_embedding.weight": torch.zeros(40, 9, 1, 2, 2)}),
                       "takes 9 latent channels and gives 4: an image-to-video"),
    "image keys": (lambda t: t.update({"blocks.0.cross_attn.k_img.weight": torch.zeros(40, 40)}),
                   "an image-to-video Wan"),
    "control blocks": (lambda t: t.update({"vace_blocks.0.modulation": torch.zeros(1, 6, 40)}), "a Wan VACE"),
    "integers": (lambda t: t.update({"head.head.bias": torch.zeros(16, dtype=torch.int32)}),
                 "head.head.bias is stored as I32; weights must be float32"),
    "fp8": (lambda t: t.update({"head.head.bias": torch.zeros(16).to(torch.float8_e4m3fn)}), "stored as F8_E4M3"),
    "NaN": (lambda t: t["blocks.0.ffn.0.weight"][7, 3].fill_(math.nan), "blocks.0.ffn.0.weight holds NaN or infinite"),
    "infinite": (lambda t: t["head.modulation"][0, 1, 2].fill_(-math.inf), "head.modulation holds NaN or infinite"),
}


@pytest.mark.parametrize("what", CHANGED)
def test_changed_tensors_are_named(tmp_path: Path, what: str) -> None:
    change, expected = CHANGED[what]
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    change(tensors)
    path = wan_files.official(tmp_path / "w", tensors)
    with pytest.raises(FileError, match=expected):
        loaded(path)
    pt = tmp_path / "w.pt"
    torch.save({"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}, pt)
    with pytest.raises(FileError, match=expected.replace("I32", "int32").replace("F8_E4M3", "float8_e4m3fn")
                       .replace("key blocks.0.norm1", "key generator.model.blocks.0.norm1")):
        loaded(pt)


def test_a_header_that_does_not_fit_its_file_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    def opened(name: str, change: Mutation) -> None:
        shard = wan_files.official(tmp_path / name, TENSORS) / FIRST
        change(shard, random.Random(0))
        open_weights(shard.parent)

    def overlap(header: dict[str, Any], names: list[str]) -> None:
        same = [name for name in names if header[name]["shape"] == [40]]
        header[same[0]]["data_offsets"] = header[same[1]]["data_offsets"]

    with pytest.raises(FileError, match=r"is truncated: \d+ bytes, its header says \d+"):
        opened("a", cut(1, -4))
    with pytest.raises(FileError, match="is too long"):
        opened("b", lambda path, draws: path.open("ab").write(b"x"))
    with pytest.raises(FileError, match="overlap others or leave a gap"):
        opened("c", header_edited(overlap))
    with pytest.raises(FileError, match=f"extra key other: {INDEX} does not say that it is in this shard"):
        opened("d", header_edited(lambda header, names: header.update(other=NOTHING)))


@pytest.mark.parametrize(("change", "line"), [
    ({"model_type": "i2v"}, "model_type is 'i2v'; only 't2v' is supported"),
    ({"eps": 1e-5}, "eps is 1e-05; only 1e-06 is supported"),
    ({"dim": 1536}, "dim is 1536, but the tensors say 40"),
    ({"num_heads": 3}, "3 heads do not divide a width of 40"),
    ({"num_heads": "2"}, "'2' is no number of heads"),
    ({"_class_name": "WanTransformer3DModel"}, "describes the diffusers layout, but the tensors have names of the wan"),
])
def test_a_configuration_of_another_network_is_refused(tmp_path: Path, change: dict[str, Any], line: str) -> None:
    path = wan_files.official(tmp_path / "w", TENSORS)
    edited(lambda config: config.update(change))(path / "config.json", random.Random())
    with pytest.raises(FileError, match=f"w/config.json: {line}"):
        open_weights(path)


def test_an_edited_manifest_is_refused(tmp_path: Path) -> None:
    path = ours(tmp_path / "w", TENSORS)
    edited(lambda manifest: manifest.update(kind="cd"))(path / "mirai.json", random.Random())
    with pytest.raises(FileError, match="mirai.json: its manifest was altered after it was written"):
        open_weights(path)


def test_values_that_overflow_the_networks_dtype_are_refused(tmp_path: Path) -> None:
    tensors = dict(TENSORS) | {"head.head.bias": torch.full((16,), 1e300, dtype=torch.float64)}
    with pytest.raises(FileError, match="head.head.bias holds NaN or infinite"):
        loaded(wan_files.official(tmp_path / "w", tensors))


@pytest.mark.parametrize(("change", "line"), [
    ({"dim": 60}, "dim is 40 in the file, 60 in the recipe"),
    ({"heads": 4}, "heads is 2 in the file, 4 in the recipe"),
    ({"blocks": 4, "ffn_dim": 8}, "ffn_dim is 48 in the file, 8 in the recipe, blocks is 3 in the file, 4 in the"),
    ({"text_dim": 12}, "text.dim is 10 in the file, 12 in the recipe"),
    ({"channels": 16}, "video.channels is 4 in the file, 16 in the recipe"),
])
def test_another_shape_names_the_recipes_key(tmp_path: Path, change: dict[str, int], line: str) -> None:
    file = open_weights(wan_files.official(tmp_path / "w", TENSORS))
    with pytest.raises(FileError, match=f"does not fit the recipe: {line}.*; change the recipe or the weights"):
        load_into(WanModel(SIZES._replace(**change)), file)


def test_heads_that_a_file_does_not_tell_are_the_recipes(tmp_path: Path) -> None:
    file = open_weights(wan_files.pt(tmp_path / "w.pt", TENSORS, "bare"))
    assert file.shape_of_network().heads == 0
    load_into(WanModel(SIZES._replace(heads=4)), file)


# Mutations: a FileError in one line, or exactly the weights that were written. Never another exception.

Mutation = Callable[[Path, random.Random], object]


def cut(share: float, extra: int = 0) -> Mutation:
    """Keep this share of the file and some bytes."""
    def mutate(path: Path, draws: random.Random) -> None:
        size = path.stat().st_size
        os.truncate(path, max(0, min(size, int(size * share) + extra)))
    return mutate


def flip(where: Callable[[Any, random.Random], int], count: int = 1) -> Mutation:
    def mutate(path: Path, draws: random.Random) -> None:
        data = bytearray(path.read_bytes())
        for _ in range(count):
            data[where(data, draws)] ^= 1 << draws.randrange(8)
        path.write_bytes(data)
    return mutate


def in_header(data: bytes, draws: random.Random) -> int:
    return draws.randrange(8 + struct.unpack("<Q", data[:8])[0])


def in_length(data: bytes, draws: random.Random) -> int:
    return draws.randrange(8)


def in_data(data: bytes, draws: random.Random) -> int:
    return draws.randrange(8 + struct.unpack("<Q", data[:8])[0], len(data))


def anywhere(data: bytes, draws: random.Random) -> int:
    return draws.randrange(len(data))


def bytes_of(content: bytes) -> Mutation:
    return lambda path, draws: path.write_bytes(content)


def edited(change: Callable[[Any], object]) -> Mutation:
    """Change the content of a JSON file in place."""
    def mutate(path: Path, draws: random.Random) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
    return mutate


def header_edited(change: Callable[[dict[str, Any], list[str]], object]) -> Mutation:
    """Change a safetensors header, keeping the data; `change` gets it and its tensor names."""
    def mutate(path: Path, draws: random.Random) -> None:
        data = path.read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        header = json.loads(data[8 : 8 + length])
        change(header, [name for name in header if name != "__metadata__"])
        text = json.dumps(header).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    return mutate


CONTENTS = {
    "text": b"hello world, no weights here\n" * 9, "html": b"<!DOCTYPE html><html>404</html>", "empty": b"",
    "png": b"\x89PNG\r\n\x1a\n" + bytes(64), "zip": b"PK\x03\x04" + bytes(60), "gguf": b"GGUF" + bytes(99),
    "zip end": b"PK\x05\x06" + bytes(18), "zeros": bytes(4096), "ones": b"\xff" * 4096, "json": b'{"a": 1}',
    "noise": random.Random(0).randbytes(4096), "huge length": struct.pack("<Q", 2**63) + b"{}",
    "pickle": pickle.dumps({}, 2), "bare header": struct.pack("<Q", 2) + b"{}",
    "deep": struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
}
JSON_CONTENTS = {
    "json list": b"[]", "null": b"null", "number": b"7", "not utf-8": b"\xff\xfe{}", "open": b'{"a": ',
    "deep": b"[" * 100_000, "many digits": b'{"dim": ' + b"9" * 5000 + b"}", "empty": b"", "no keys": b"{}",
    "png": CONTENTS["png"],
}
CUTS = [(0, 1), (0, 7), (0, 8), (0, 9), (0, 100), (0.01, 0), (0.3, 0), (0.5, 0), (0.9, 1), (1, -1), (1, -4)]
NOTHING = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
SHARD_MUTATIONS: dict[str, Mutation] = {
    **{f"cut to {share:.0%} {extra:+d}": cut(share, extra) for share, extra in CUTS},
    **{f"header flip {number}": flip(in_header) for number in range(16)},
    **{f"header flips {number}": flip(in_header, 5) for number in range(4)},
    **{f"length flip {number}": flip(in_length) for number in range(4)},
    **{f"is {name}": bytes_of(content) for name, content in CONTENTS.items()},
    "longer": lambda path, draws: path.open("ab").write(b"x"),
    "gone": lambda path, draws: path.unlink(),
    "a folder": lambda path, draws: [path.unlink(), path.mkdir()],
    "dropped": header_edited(lambda header, names: header.pop(names[3])),
    "renamed": header_edited(lambda header, names: header.update(other=header.pop(names[3]))),
    "added": header_edited(lambda header, names: header.update(other=header[names[0]])),
    "empty tensor": header_edited(lambda header, names: header.update(other=NOTHING)),
    "no dtype": header_edited(lambda header, names: header[names[1]].pop("dtype")),
    "other dtype": header_edited(lambda header, names: header[names[1]].update(dtype="I32")),
    "unknown dtype": header_edited(lambda header, names: header[names[1]].update(dtype="F32X")),
    "half the width": header_edited(lambda header, names: header[names[1]].update(dtype="BF16")),
    "negative shape": header_edited(lambda header, names: header[names[1]].update(shape=[-1, -40])),
    "shape of floats": header_edited(lambda header, names: header[names[1]].update(shape=[40.0])),
    "no shape": header_edited(lambda header, names: header[names[1]].update(shape=None)),
    "flat shape": header_edited(lambda h, names: [h[n].update(shape=[math.prod(h[n]["shape"]), 1]) for n in names]),
    "entries are numbers": header_edited(lambda header, names: header.update(dict.fromkeys(names, 1))),
    "offsets reversed": header_edited(lambda header, names: header[names[1]]["data_offsets"].reverse()),
    "offsets beyond": header_edited(lambda h, names: h[names[1]].update(data_offsets=[10**9, 10**9 + 160])),
    "blocks renumbered": header_edited(lambda header, names: [
        header.update({name.replace("blocks.0", "blocks.99999999999"): header.pop(name)})
        for name in names if name.startswith("blocks.0")]),
}
CONFIG_MUTATIONS: dict[str, Mutation] = {
    **{f"is {name}": bytes_of(content) for name, content in JSON_CONTENTS.items()},
    **{f"cut to {share:.0%}": cut(share) for share in (0.1, 0.5, 0.95)},
    **{f"flip {number}": flip(anywhere) for number in range(8)},
    "gone": lambda path, draws: path.unlink(),
    "T5": bytes_of(b'{"architectures": ["UMT5EncoderModel"], "model_type": "umt5"}'),
    "VAE": edited(lambda config: config.update(_class_name="AutoencoderKLWan")),
    "VACE": edited(lambda config: config.update(_class_name="VaceWanModel", model_type="vace")),
    "i2v": edited(lambda config: config.update(model_type="i2v")),
    "other width": edited(lambda config: config.update(dim=1536)),
    "other blocks": edited(lambda config: config.update(num_layers="3")),
    "other eps": edited(lambda config: config.update(eps=1e-5)),
    "heads do not divide": edited(lambda config: config.update(num_heads=3)),
    "other heads": edited(lambda config: config.update(num_heads=4)),
    "heads are text": edited(lambda config: config.update(num_heads="2")),
    "negative heads": edited(lambda config: config.update(num_heads=-2)),
    "class is a list": edited(lambda config: config.update(_class_name=["WanModel"])),
}
INDEX_MUTATIONS: dict[str, Mutation] = {
    **{f"is {name}": bytes_of(content) for name, content in JSON_CONTENTS.items()},
    **{f"flip {number}": flip(anywhere) for number in range(8)},
    "gone": lambda path, draws: path.unlink(),
    "no map": edited(lambda index: index.pop("weight_map")),
    "empty map": edited(lambda index: index.update(weight_map={})),
    "key dropped": edited(lambda index: index["weight_map"].pop("head.head.weight")),
    "key added": edited(lambda index: index["weight_map"].update(other=FIRST)),
    "missing shard": edited(lambda index: index["weight_map"].update({"head.head.bias": "gone.safetensors"})),
    "other shard": edited(lambda index: index["weight_map"].update({"text_embedding.0.bias": FIRST})),
    "outside": edited(lambda index: index["weight_map"].update({"head.head.bias": "../w/" + FIRST})),
    "absolute": edited(lambda index: index["weight_map"].update({"head.head.bias": "/etc/passwd"})),
    "config as shard": edited(lambda index: index["weight_map"].update({"head.head.bias": "config.json"})),
    "number": edited(lambda index: index["weight_map"].update({"head.head.bias": 3})),
    "zero byte": edited(lambda index: index["weight_map"].update({"head.head.bias": "a\0b"})),
    "long name": edited(lambda index: index["weight_map"].update({"head.head.bias": "a" * 3000})),
}
MANIFEST_MUTATIONS: dict[str, Mutation] = {
    **{f"is {name}": bytes_of(content) for name, content in JSON_CONTENTS.items()},
    **{f"flip {number}": flip(anywhere) for number in range(8)},
    "other kind": edited(lambda manifest: manifest.update(kind="cd")),
    "later version": edited(lambda manifest: manifest.update(version=2)),
    "no checksum": edited(lambda manifest: manifest["checksums"].pop("head.head.bias")),
}
PT_MUTATIONS: dict[str, Mutation] = {
    **{f"cut to {share:.0%} {extra:+d}": cut(share, extra)
       for share, extra in [(0, 1), (0, 4), (0.01, 0), (0.1, 0), (0.5, 0), (0.9, 0), (0.98, 0), (1, -1), (1, -22)]},
    **{f"flip {number}": flip(anywhere) for number in range(20)},
    **{f"flips {number}": flip(anywhere, 50) for number in range(8)},
    **{f"flip near the end {number}": flip(lambda data, draws: draws.randrange(len(data) - 4000, len(data)), 3)
       for number in range(12)},
    **{f"flip near the beginning {number}": flip(lambda data, draws: draws.randrange(4000), 3) for number in range(12)},
    **{f"is {name}": bytes_of(content) for name, content in CONTENTS.items()},
    "longer": lambda path, draws: path.open("ab").write(b"x" * 70_000),
    "twice": lambda path, draws: path.write_bytes(path.read_bytes() * 2),
}
# base -> (file in it, its mutations)
TARGETS: dict[str, list[tuple[str, dict[str, Mutation]]]] = {
    "official": [(FIRST, SHARD_MUTATIONS), ("config.json", CONFIG_MUTATIONS), (INDEX, INDEX_MUTATIONS)],
    "ours": [(WHOLE, {f"data flip {number}": flip(in_data) for number in range(12)}),
             ("mirai.json", MANIFEST_MUTATIONS)],
    "pt": [("", PT_MUTATIONS)],
    "old pt": [("", {f"flip {number}": flip(lambda data, draws: draws.randrange(9000)) for number in range(12)})],
}
CASES = [(base, file, what) for base, files in TARGETS.items() for file, mutations in files for what in mutations]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("bases")
    torch.save({"generator": TENSORS}, root / "old.pt", _use_new_zipfile_serialization=False)
    return {"official": wan_files.official(root / "official", TENSORS), "ours": ours(root / "ours", TENSORS),
            "pt": wan_files.pt(root / "w.pt", TENSORS, "causal-forcing"), "old pt": root / "old.pt"}


@pytest.mark.parametrize(("base", "file", "what"), CASES, ids=lambda part: part or "file")
def test_a_damaged_file_is_refused_or_harmless(
    tmp_path: Path, bases: dict[str, Path], base: str, file: str, what: str
) -> None:
    path = tmp_path / "w"
    (shutil.copytree if bases[base].is_dir() else shutil.copy)(bases[base], path)
    dict(TARGETS[base])[file][what](path / file if file else path, random.Random(f"{base} {file} {what}"))
    started = time.perf_counter()
    try:
        opened = open_weights(path, whole=base == "old pt")
        if opened.layout == "pt":
            verify_pt(path)
        model = network()
        load_into(model, opened)
    except FileError as error:
        assert re.fullmatch(r"[^\n]{20,600}", str(error)) and str(path) in str(error), error
    else:
        assert equal(dict(model.state_dict()), TENSORS) or base == "old pt", "other weights were loaded in silence"
    assert time.perf_counter() - started < 20  # milliseconds, but for a busy machine


def test_there_are_many_mutations() -> None:
    assert len(CASES) >= 200
