"""UMT5 from its three layouts: the right numbers, the same ones, bit for bit, and one line for a wrong folder."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mirai_dist.config.error import FileError
from mirai_dist.models import umt5
from mirai_dist.models.umt5 import NEGATIVE_PROMPT, Umt5Encoder, clean, official_name
from tests import text_files

LENGTH = 40
# Of sample_neg_prompt as two public copies of Wan2.1's shared_config.py have it.
NEGATIVE_LENGTH, NEGATIVE_SHA = 137, "ce96e0324e4b54ce"
WRITERS = {
    "pipeline": text_files.write_pipeline,
    "plain": text_files.write_plain,
    "pickled": lambda folder: text_files.write_plain(folder, pickled=True),
    "official": text_files.write_official,
}
PROMPTS = ["a red circle moving left", "", "Two cats and three dogs run along the beach.", "狐狸 " * 60]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("encoders")
    return {name: write(root / name) for name, write in WRITERS.items()}


@pytest.fixture(scope="module")
def encoder(folders: dict[str, Path]) -> Umt5Encoder:
    return Umt5Encoder.load(folders["pipeline"], LENGTH, "cpu")


def bucket(distance: int, buckets: int, reach: int = 128) -> int:
    """Bucket of key position minus query position (T5, Raffel et al. 2020, as released): half of them per direction."""
    half = buckets // 2
    exact = half // 2
    size = abs(distance)
    if size >= exact:
        size = min(half - 1, exact + int(math.log(size / exact) / math.log(reach / exact) * (half - exact)))
    return size + half * (distance > 0)


def reference(state: dict[str, Tensor], ids: list[int], sizes: text_files.Sizes = text_files.SIZES) -> Tensor:
    """The encoder of spec/algorithms.md section 5.3, from the official names, one prompt, [tokens, dim] float32."""

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight

    x = state["token_embedding.weight"][ids]
    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]
    places = distance.apply_(lambda d: bucket(int(d), sizes.buckets))
    for i in range(sizes.layers):
        block = {key.removeprefix(f"blocks.{i}."): value for key, value in state.items()}
        y = norm(x, block["norm1.weight"])
        q, k, v = ((y @ block[f"attn.{p}.weight"].T).unflatten(-1, (sizes.heads, -1)).transpose(0, 1) for p in "qkv")
        bias = block["pos_embedding.embedding.weight"][places].permute(2, 0, 1)
        mixed = ((q @ k.transpose(1, 2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + mixed @ block["attn.o.weight"].T
        y = norm(x, block["norm2.weight"])
        gate = F.gelu(y @ block["ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (gate * (y @ block["ffn.fc1.weight"].T)) @ block["ffn.fc2.weight"].T
    return norm(x, state["norm.weight"])


@pytest.mark.parametrize("layout", WRITERS)
def test_it_is_the_published_network(folders: dict[str, Path], layout: str):
    encoder = Umt5Encoder.load(folders[layout], LENGTH, "cpu", torch.float32)
    state = text_files.official_state()
    if layout in ("pipeline", "official"):  # stored in bf16
        state = {name: value.bfloat16().float() for name, value in state.items()}
    for prompt in PROMPTS:
        tokens = encoder.tokens(prompt)
        torch.testing.assert_close(encoder.embed(tokens), reference(state, list(tokens.ids)), rtol=1e-5, atol=2e-5)


def test_layouts_give_the_same_bits_and_the_same_fingerprint(folders: dict[str, Path], encoder: Umt5Encoder):
    expected = encoder.encode(PROMPTS)
    for folder in folders.values():
        other = Umt5Encoder.load(folder, LENGTH, "cpu")
        assert torch.equal(other.encode(PROMPTS), expected)
        assert (other.fingerprint, other.dim) == (encoder.fingerprint, 16)


def test_other_weights_dtype_or_tokenizer_have_another_fingerprint(tmp_path: Path, encoder: Umt5Encoder):
    other_seed = text_files.write_official(tmp_path / "seed", seed=1)
    prints = {encoder.fingerprint, Umt5Encoder.load(other_seed, LENGTH, "cpu").fingerprint}
    tuned = text_files.write_plain(tmp_path / "tuned")
    prints.add(Umt5Encoder.load(tuned, LENGTH, "cpu", torch.float32).fingerprint)
    file = tuned / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["vocab"][-1][0] = "zebra"
    file.write_text(json.dumps(content))
    prints.add(Umt5Encoder.load(tuned, LENGTH, "cpu").fingerprint)
    assert len(prints) == 4


def test_shape_dtype_and_zeros_past_the_end(encoder: Umt5Encoder):
    out = encoder.encode(PROMPTS)
    assert out.shape == (4, LENGTH, encoder.dim) and out.dtype == torch.bfloat16
    counts = [len(encoder.tokens(prompt).ids) for prompt in PROMPTS]
    assert counts[1] == 1 and counts[3] == LENGTH
    for row, count in zip(out, counts, strict=True):
        assert row[:count].abs().sum(-1).gt(0).all() and row[count:].eq(0).all()
    assert encoder.encode([]).shape == (0, LENGTH, encoder.dim)
    assert not out.requires_grad and not out.is_inference()


def test_a_row_depends_on_its_prompt_alone(tmp_path: Path):
    """Wide enough that a padded batch would round otherwise."""
    sizes = text_files.Sizes(dim=512, heads=8, head_dim=64, hidden=1024, layers=3, buckets=32)
    encoder = Umt5Encoder.load(text_files.write_official(tmp_path / "wide", sizes), 64, "cpu")
    prompts = [*PROMPTS[:3], text_files.CORPUS[2] * 2]
    together = encoder.encode(prompts)
    assert torch.equal(together, encoder.encode(prompts[::-1]).flip(0))
    assert torch.equal(together, torch.cat([encoder.encode([prompt]) for prompt in prompts]))
    longer = Umt5Encoder.load(tmp_path / "wide", 128, "cpu").encode(prompts)
    assert torch.equal(together, longer[:, :64])


def test_tokens_end_with_the_end_token_and_say_what_was_cut(encoder: Umt5Encoder):
    tokens = encoder.tokens("a red circle")
    assert tokens.ids[-1] == 1 and tokens.ids.count(1) == 1 and not tokens.cut
    long = encoder.tokens("red " * 60)
    assert len(long.ids) == LENGTH and long.ids[-1] == 1 and long.whole == 61 and long.cut
    assert not encoder.tokens("red " * (LENGTH - 1)).cut
    assert encoder.tokens("red " * LENGTH).cut


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("  a \t red\u3000\ncircle ", "a red circle"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("caf\u00c3\u00a9", "café"),  # UTF-8 once read as Latin-1
        ("\u201cquoted\u201d", '"quoted"'),
        ("&lt;b&gt;", "<b>"),
        ("< &amp;amp; >", "< & >"),  # an angle bracket keeps ftfy from resolving escapes itself
    ],
)
def test_text_is_cleaned_as_wan_does(encoder: Umt5Encoder, raw: str, expected: str):
    import ftfy

    assert clean(raw, ftfy.fix_text) == expected
    assert encoder.tokens(raw) == encoder.tokens(expected)


def test_the_negative_prompt_is_wans(encoder: Umt5Encoder):
    digest = hashlib.sha256(NEGATIVE_PROMPT.encode()).hexdigest()
    assert (len(NEGATIVE_PROMPT), digest[:16]) == (NEGATIVE_LENGTH, NEGATIVE_SHA)
    assert torch.equal(encoder.negative(), encoder.encode([NEGATIVE_PROMPT]))
    assert encoder.negative().shape == (1, LENGTH, encoder.dim)


def test_every_name_of_the_full_size_encoder_has_its_place():
    """UMT5-XXL on the meta device against the published names and sizes (spec/algorithms.md section 5.3)."""
    from transformers import UMT5Config, UMT5EncoderModel

    d, ffn = 4096, 10240
    published = {"token_embedding.weight": (256384, d), "norm.weight": (d,)}
    for i in range(24):
        published |= {f"blocks.{i}.norm1.weight": (d,), f"blocks.{i}.norm2.weight": (d,)}
        published |= {f"blocks.{i}.attn.{p}.weight": (d, d) for p in "qkvo"}
        published |= {f"blocks.{i}.ffn.gate.0.weight": (ffn, d), f"blocks.{i}.ffn.fc1.weight": (ffn, d)}
        published |= {f"blocks.{i}.ffn.fc2.weight": (d, ffn), f"blocks.{i}.pos_embedding.embedding.weight": (32, 64)}
    entries = {
        str(official_name(key)): umt5.Entry(Path("f"), key, size, torch.bfloat16, lambda: torch.empty(0))
        for key, size in published.items()
    }
    shape = umt5._inferred_shape(entries, [Path("f")])
    with torch.device("meta"):
        sizes = {name: getattr(shape, name) for name in umt5.Shape.__dataclass_fields__}
        network = UMT5EncoderModel(UMT5Config(**sizes, feed_forward_proj="gated-gelu"))
    theirs = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    theirs.pop("encoder.embed_tokens.weight")
    assert {name: entry.shape for name, entry in entries.items()} == theirs
    assert sum(math.prod(size) for size in published.values()) == 5_680_910_336


def test_no_copy_in_another_dtype_stays(encoder: Umt5Encoder):
    parameters = dict(encoder._network.named_parameters(remove_duplicate=False))
    assert {value.dtype for value in parameters.values()} == {torch.bfloat16}
    assert parameters["shared.weight"] is parameters["encoder.embed_tokens.weight"]
    assert not any(value.is_meta or value.requires_grad for value in parameters.values())


@pytest.mark.parametrize("package", ["transformers", "ftfy"])
def test_a_missing_package_is_one_line(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, package: str):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(FileError, match=rf"needs the package {package} .*pip install 'mirai-dist\[wan\]'") as refused:
        Umt5Encoder.load(folders["plain"], LENGTH, "cpu")
    assert "\n" not in str(refused.value)


def edit(path: str, **changes: object) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / path
        content = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in content.items() if value != "(gone)"}))

    return change


def cut(path: str, keep: float) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        data = (folder / path).read_bytes()
        (folder / path).write_bytes(data[: int(len(data) * keep)])

    return change


def put(path: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / path).write_bytes(content)

    return change


def gone(path: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return change


PTH = "models_t5_umt5-xxl-enc-bf16.pth"
PIECE = "text_encoder/model-00002-of-00002.safetensors"
INDEX = "text_encoder/model.safetensors.index.json"


def state(change: Callable[[dict[str, Tensor]], object], path: str = PTH) -> Callable[[Path], None]:
    def rewrite(folder: Path) -> None:
        content = torch.load(folder / path, weights_only=True)
        change(content)
        torch.save(content, folder / path)

    return rewrite


REFUSED: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "no config": ("pipeline", gone("text_encoder/config.json"), "config.json: is missing"),
    "torn config": ("pipeline", cut("text_encoder/config.json", 0.5), "config.json: is not readable JSON"),
    "config is a list": ("pipeline", put("text_encoder/config.json", b"[]"), "is not a JSON object"),
    "config not UTF-8": ("pipeline", put("text_encoder/config.json", b"\xff\xfe"), "is not readable JSON"),
    "deep config": ("pipeline", put("text_encoder/config.json", b"[" * 100_000), "is not readable JSON"),
    "t5": ("pipeline", edit("text_encoder/config.json", model_type="t5"), "is not UMT5's .model_type 't5'"),
    "relu": ("plain", edit("config.json", feed_forward_proj="relu"), "feed_forward_proj is 'relu'"),
    "no width": ("plain", edit("config.json", d_model="(gone)"), "d_model is None, must be a positive"),
    "width in words": ("plain", edit("config.json", d_model="wide"), "d_model is 'wide'"),
    "no heads": ("plain", edit("config.json", num_heads=0), "num_heads is 0"),
    "endless layers": ("plain", edit("config.json", num_layers=1 << 40), "num_layers is"),
    "odd epsilon": ("plain", edit("config.json", layer_norm_epsilon="x"), "layer_norm_epsilon is 'x'"),
    "more layers": ("plain", edit("config.json", num_layers=3), r"encoder\.block\.2\.\S+ is missing, and \d+ more"),
    "fewer layers": ("plain", edit("config.json", num_layers=1), r"key encoder\.block\.1\.\S+ has no place"),
    "other width": ("plain", edit("config.json", d_ff=41), r"wi_0\.weight has the shape \[40, 16\], must be \[41,"),
    "other heads": ("plain", edit("config.json", num_heads=3, d_kv=8), r"relative_attention_bias\.weight has the"),
    "no weights": ("plain", gone("model.safetensors"), "holds no weights"),
    "cut weights": ("plain", cut("model.safetensors", 0.9), "is damaged or not safetensors"),
    "cut head": ("plain", put("model.safetensors", b"\x10\0\0"), "is damaged or not safetensors"),
    "empty weights": ("plain", put("model.safetensors", b""), "is damaged or not safetensors"),
    "a piece missing": ("pipeline", gone(PIECE), "model-00002-of-00002.safetensors: is missing"),
    "a piece cut": ("pipeline", cut(PIECE, 0.5), "is damaged or not safetensors"),
    "index without map": ("pipeline", put(INDEX, b"{}"), "has no weight_map"),
    "index of numbers": ("pipeline", put(INDEX, b'{"weight_map": {"a": 1}}'), "has no weight_map"),
    "half an index": (
        "pipeline",
        put(INDEX, b'{"weight_map": {"shared.weight": "model-00001-of-00002.safetensors"}}'),
        r"00001-of-00002.safetensors: encoder\.\S+ is missing, and \d+ more",
    ),
    "pickle cut": ("pickled", cut("pytorch_model.bin", 0.8), "is damaged or not a file of weights"),
    "pickle empty": ("pickled", put("pytorch_model.bin", b""), "is damaged or not a file of weights"),
    "pickle of text": ("pickled", put("pytorch_model.bin", b"version https://git-lfs"), "is damaged or not a file"),
    "pickle of a list": ("pickled", lambda f: torch.save([1], f / "pytorch_model.bin"), "hold a dictionary of tensors"),
    "pickle of code": ("pickled", lambda f: torch.save({"a": Path("x")}, f / "pytorch_model.bin"), "is damaged or not"),
    "official cut": ("official", cut(PTH, 0.5), "is damaged or not a file of weights"),
    "official, key missing": ("official", state(lambda s: s.pop("blocks.1.ffn.fc2.weight")), r"wo\.weight is missing"),
    "official, no table": ("official", state(lambda s: s.pop("token_embedding.weight")), "token_embedding.weight is"),
    "official, block missing": (
        "official",
        state(lambda s: [s.pop(key) for key in list(s) if key.startswith("blocks.0.")]),
        "blocks.0.attn.q.weight is missing",
    ),
    "official, key too many": ("official", state(lambda s: s.update(extra=torch.ones(1))), "key extra is not one of"),
    "official, no matrix": (
        "official",
        state(lambda s: s.update({"token_embedding.weight": torch.ones(3)})),
        r"token_embedding.weight has the shape \[3\]",
    ),
    "official, wrong size": (
        "official",
        state(lambda s: s.update({"norm.weight": torch.ones(3)})),
        r"norm\.weight has the shape \[3\], must be \[16\]",
    ),
    "quantised": (
        "official",
        state(lambda s: s.update({"norm.weight": torch.ones(16, dtype=torch.int8)})),
        "norm.weight is quantised",
    ),
    "no tokenizer": ("official", gone("google"), "google/umt5-xxl: holds no tokenizer"),
    "torn tokenizer": ("official", cut("google/umt5-xxl/tokenizer.json", 0.5), "the tokenizer cannot be read"),
    "tokenizer of nothing": ("pipeline", put("tokenizer/tokenizer.json", b"{}"), "the tokenizer cannot be read"),
    "tokenizer without end": ("pipeline", edit("tokenizer/tokenizer_config.json", eos_token=None), "no end token"),
    "no folder": ("pipeline", lambda f: shutil.rmtree(f), "no such folder"),
    "a file": ("pipeline", lambda f: (shutil.rmtree(f), f.write_text("x")), "is a file; name the folder"),
    "an empty folder": ("pipeline", lambda f: (shutil.rmtree(f), f.mkdir()), "holds no UMT5"),
    "a video model": ("official", gone(PTH), r"config.json: is not UMT5's \(model_type 't2v'\)"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_wrong_folder_is_one_line(folders: dict[str, Path], tmp_path: Path, name: str):
    layout, change, expected = REFUSED[name]
    folder = tmp_path / "encoder"
    shutil.copytree(folders[layout], folder)
    change(folder)
    with pytest.raises(FileError, match=expected) as refused:
        Umt5Encoder.load(folder, LENGTH, "cpu")
    message = str(refused.value)
    assert "\n" not in message and re.match(rf"{re.escape(str(folder))}\S*: ", message), message


def shrink_vocabulary(folder: Path, vocabulary: int) -> None:
    from safetensors.torch import save_file

    weights = text_files.hf_state(text_files.Sizes(vocabulary=vocabulary))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    edit("config.json", vocab_size=vocabulary)(folder)


def test_a_token_beyond_the_weights_is_refused(tmp_path: Path):
    folder = text_files.write_plain(tmp_path / "e")
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    known = len(content["model"]["vocab"])
    token = {"id": known, "content": "<extra>", "special": True, "normalized": False}
    content["added_tokens"].append({**token, "single_word": False, "lstrip": False, "rstrip": False})
    file.write_text(json.dumps(content))
    shrink_vocabulary(folder, known)
    encoder = Umt5Encoder.load(folder, LENGTH, "cpu")
    assert encoder.encode(["a red circle"]).abs().sum() > 0
    with pytest.raises(FileError, match=f"'a <extra> circle': holds a token beyond the {known}"):
        encoder.encode(["a <extra> circle"])


def test_a_tokenizer_larger_than_the_weights_is_refused(tmp_path: Path):
    folder = text_files.write_plain(tmp_path / "e")
    shrink_vocabulary(folder, 100)
    with pytest.raises(FileError, match=r"knows \d+ tokens but the weights 100: they do not belong together"):
        Umt5Encoder.load(folder, LENGTH, "cpu")


def test_a_length_without_room_is_a_value_error(folders: dict[str, Path]):
    with pytest.raises(ValueError, match="length is 0"):
        Umt5Encoder.load(folders["plain"], 0, "cpu")
