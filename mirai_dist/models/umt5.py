"""UMT5, Wan's text encoder, from the folders it is published in.

    PIPELINE/text_encoder/ and PIPELINE/tokenizer/                            diffusers
    FOLDER/config.json, weights, tokenizer files                              transformers
    FOLDER/models_t5_umt5-xxl-enc-bf16.pth and FOLDER/google/umt5-xxl/        official Wan

The network is transformers' UMT5EncoderModel, filled here: strictly, straight in the wanted dtype on the wanted
device, and never from the network. Prompts are cleaned, cut and closed as Wan does it, and encoded one at a time at
their own length: the embedding of a prompt is a function of that prompt alone, bit for bit, whatever stands beside
it. (In a batch, kernels are chosen by the batch's shape, and other kernels round otherwise.)
"""

from __future__ import annotations

import hashlib
import html
import importlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirai_dist.config.error import FileError

# sample_neg_prompt of the public Wan configuration (Wan-Video/Wan2.1, wan/configs/shared_config.py).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)
_OFFICIAL_WEIGHTS = "models_t5_*.pth"
_OFFICIAL_TOKENIZER = Path("google/umt5-xxl")
_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # each alone, or cut in pieces with NAME.index.json
_TOKENIZER_FILES = ("tokenizer.json", "spiece.model")
_COPY_TOKENIZER = "copy google/umt5-xxl's files there"
_MAX_DISTANCE = 128  # of the relative positions; the official file does not record it
_EPSILON = 1e-6
_READABLE = (torch.float32, torch.float16, torch.bfloat16)
_SHARED = "shared.weight"
_SHARED_AGAIN = "encoder.embed_tokens.weight"
_OFFICIAL_BLOCK = {
    "norm1": "layer.0.layer_norm",
    "norm2": "layer.1.layer_norm",
    **{f"attn.{part}": f"layer.0.SelfAttention.{part}" for part in "qkvo"},
    "pos_embedding.embedding": "layer.0.SelfAttention.relative_attention_bias",
    "ffn.gate.0": "layer.1.DenseReluDense.wi_0",
    "ffn.fc1": "layer.1.DenseReluDense.wi_1",
    "ffn.fc2": "layer.1.DenseReluDense.wo",
}
_SAMPLES = 64  # values of each tensor that enter the fingerprint
_PROBE = "Two cats, 3 dogs & 一只狐狸: ¡déjà vu!"


@dataclass(frozen=True)
class Tokens:
    """A prompt as token ids, the end token included; `whole` counts them before the cut to the encoder's length."""

    ids: tuple[int, ...]
    whole: int

    @property
    def cut(self) -> bool:
        return self.whole > len(self.ids)


@dataclass(frozen=True)
class Shape:
    """Sizes of the network, by the names of transformers' UMT5Config."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = _MAX_DISTANCE
    layer_norm_epsilon: float = _EPSILON


@dataclass(frozen=True)
class Entry:
    """One tensor of a weight file, not read yet."""

    file: Path
    key: str  # as the file names it
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]


class Umt5Encoder:
    """The frozen encoder. `dim`: width of an embedding; `length`: tokens an embedding holds at most;
    `fingerprint`: identifies weights, dtype and tokenizer, the same for the same weights in another layout."""

    def __init__(self, network: torch.nn.Module, tokenizer: Any, length: int) -> None:
        self._network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer
        self._fix_text = importlib.import_module("ftfy").fix_text
        table = dict(network.named_parameters())[_SHARED]
        self._vocabulary, self.dim = table.shape
        self.dtype = table.dtype
        self.device = table.device
        self.length = length
        self.fingerprint = _fingerprint(network, tokenizer)
        self._negative: Tensor | None = None

    @classmethod
    def load(
        cls, path: Path, length: int, device: torch.device | str, dtype: torch.dtype = torch.bfloat16
    ) -> Umt5Encoder:
        """Read the encoder in `path`, in one of the three layouts.

        Raises FileError, naming file and key, for a folder that holds something else or not all of it, and when a
        package of the extra `wan` is not installed. ValueError for length < 1.
        """
        if length < 1:
            raise ValueError(f"a prompt has at least its end token: length is {length}, must be at least 1")
        path = Path(path)
        for package in ("transformers", "ftfy"):
            _import(package, path)
        weights, config, tokenizer = _find(path)
        entries = _official_entries(weights) if config is None else _hf_entries(weights)
        shape = _inferred_shape(entries, weights) if config is None else _stated_shape(config)
        network = _filled(shape, entries, weights, torch.device(device), dtype)
        return cls(network, _tokenizer(tokenizer, shape.vocab_size), length)

    @property
    def network(self) -> torch.nn.Module:
        """transformers' encoder, for whoever shards it. Its blocks are `encoder.block.<i>`, `blocks` of them."""
        return self._network

    @property
    def blocks(self) -> int:
        return len(self._network.get_submodule("encoder.block"))  # type: ignore[arg-type]

    def tokens(self, prompt: str) -> Tokens:
        """Token ids of a prompt: cleaned, cut to `length` with the end token as the last."""
        text = clean(prompt, self._fix_text)
        ids = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if max(ids, default=0) >= self._vocabulary:
            # An added token such as <extra_id_0>, written out in a prompt.
            known = self._vocabulary
            raise FileError(f"prompt {prompt[:60]!r}", f"holds a token beyond the {known} of the weights; reword it")
        return Tokens((*ids[: self.length - 1], self._tokenizer.eos_token_id), len(ids) + 1)

    @torch.no_grad()
    def embed(self, tokens: Tokens) -> Tensor:
        """[tokens, dim] of one prompt."""
        ids = torch.tensor([tokens.ids], device=self.device)
        return self._network(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[0]

    def encode(self, prompts: Sequence[str]) -> Tensor:
        """[B, length, dim], zeros past the end token. A row depends on its own prompt alone."""
        out = torch.zeros(len(prompts), self.length, self.dim, dtype=self.dtype, device=self.device)
        for row, prompt in zip(out, prompts, strict=True):
            embedding = self.embed(self.tokens(prompt))
            row[: len(embedding)] = embedding
        return out

    def negative(self) -> Tensor:
        """[1, length, dim] of Wan's negative prompt."""
        if self._negative is None:
            self._negative = self.encode([NEGATIVE_PROMPT])
        return self._negative


def clean(prompt: str, fix_text: Callable[[str], str]) -> str:
    """Text as Wan's tokenizer sees it: mojibake repaired, HTML escapes resolved twice, white space single."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(fix_text(prompt)))).strip()


def official_name(key: str) -> str | None:
    """transformers' name of a tensor of the official file; None when it is not one of it."""
    top = {"token_embedding.weight": _SHARED, "norm.weight": "encoder.final_layer_norm.weight"}
    if key in top:
        return top[key]
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", key)
    if match is None or match[2] not in _OFFICIAL_BLOCK:
        return None
    return f"encoder.block.{match[1]}.{_OFFICIAL_BLOCK[match[2]]}.weight"


def _import(package: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        what = f"reading UMT5 needs the package {package} ({error}): pip install 'mirai-dist[wan]'"
        raise FileError(path, what) from error


def _find(path: Path) -> tuple[list[Path], Path | None, Path]:
    """Weight files, config (None: official), tokenizer folder of an encoder folder."""
    if not path.is_dir():
        raise FileError(path, "is a file; name the folder it is in" if path.exists() else "no such folder")
    if (path / "text_encoder").is_dir():
        folder = path / "text_encoder"
        return _weight_files(folder), folder / "config.json", _tokenizer_in(path / "tokenizer")
    official = sorted(path.glob(_OFFICIAL_WEIGHTS))
    if official:
        return official[:1], None, _tokenizer_in(path / _OFFICIAL_TOKENIZER)
    if not (path / "config.json").is_file():
        what = "holds no UMT5: no text_encoder/, no models_t5_*.pth and no config.json; name the folder of the encoder"
        raise FileError(path, what)
    _stated_shape(path / "config.json")  # a folder of another model says so, rather than that its tokenizer is missing
    return _weight_files(path), path / "config.json", _tokenizer_in(path)


def _tokenizer_in(folder: Path) -> Path:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise FileError(folder, f"holds no tokenizer ({' or '.join(_TOKENIZER_FILES)}); {_COPY_TOKENIZER}")
    return folder


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHTS:
        if (folder / name).is_file():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.is_file():
            pieces = _json(index).get("weight_map")
            if not isinstance(pieces, dict) or not pieces or not all(isinstance(p, str) for p in pieces.values()):
                raise FileError(index, "has no weight_map of file names; download the folder again")
            return [folder / Path(piece).name for piece in sorted(set(pieces.values()))]
    raise FileError(folder, f"holds no weights ({' or '.join(_WEIGHTS)}, whole or with an index); download it again")


def _json(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileError(file, "is missing; download the folder again") from None
    except (OSError, ValueError, RecursionError) as error:
        raise FileError(file, f"is not readable JSON ({error}); download it again") from error
    if not isinstance(found, dict):
        raise FileError(file, "is not a JSON object; download it again")
    return found


def _stated_shape(config: Path) -> Shape:
    """Sizes in config.json. FileError for another kind of model and for a missing or odd size."""
    found = _json(config)
    kind = found.get("model_type")
    if kind != "umt5":
        raise FileError(config, f"is not UMT5's (model_type {kind!r}); name the folder of the text encoder")
    act = found.get("feed_forward_proj", "gated-gelu")
    if act != "gated-gelu":
        raise FileError(config, f"feed_forward_proj is {act!r}; only gated-gelu, that of UMT5-XXL, is known")
    values: dict[str, Any] = {}
    for name, default in (*((n, None) for n in _SIZES), ("relative_attention_max_distance", _MAX_DISTANCE)):
        value = found.get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
            raise FileError(config, f"{name} is {value!r}, must be a positive whole number; download it again")
        values[name] = value
    epsilon = found.get("layer_norm_epsilon", _EPSILON)
    if not isinstance(epsilon, (int, float)) or not 0 < epsilon < 1:
        raise FileError(config, f"layer_norm_epsilon is {epsilon!r}, must be between 0 and 1; download it again")
    return Shape(**values, layer_norm_epsilon=epsilon)


_SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads", "relative_attention_num_buckets")


def _inferred_shape(entries: Mapping[str, Entry], weights: Sequence[Path]) -> Shape:
    """Sizes of the official file, which has no config, from its tensors."""

    def sizes(key: str) -> tuple[int, int]:
        name = official_name(key)
        entry = entries.get(name or "")
        if entry is None or len(entry.shape) != 2 or 0 in entry.shape:
            what = "is missing" if entry is None else f"has the shape {list(entry.shape)}, must be a matrix"
            raise FileError(weights[0], f"{key} {what}; is this the encoder of UMT5? download it again")
        return entry.shape[0], entry.shape[1]

    vocabulary, dim = sizes("token_embedding.weight")
    attention, _ = sizes("blocks.0.attn.q.weight")
    buckets, heads = sizes("blocks.0.pos_embedding.embedding.weight")
    hidden, _ = sizes("blocks.0.ffn.fc1.weight")
    blocks = {int(match[1]) for match in (re.match(r"encoder\.block\.(\d+)\.", name) for name in entries) if match}
    if blocks != set(range(len(blocks))) or attention % heads:
        what = f"{len(blocks)} blocks, the last is number {max(blocks)}; {heads} heads on {attention} channels"
        raise FileError(weights[0], f"is not a whole UMT5 ({what}); download it again")
    return Shape(vocabulary, dim, attention // heads, hidden, len(blocks), heads, buckets)


def _hf_entries(files: Sequence[Path]) -> dict[str, Entry]:
    """Tensors of the encoder by transformers' names; a whole UMT5's decoder is passed over."""
    entries: dict[str, Entry] = {}
    for file in files:
        for key, entry in (_safetensors(file) if file.suffix == ".safetensors" else _torch_file(file)).items():
            if not key.startswith(("decoder.", "lm_head.")):
                entries[key] = entry
    again = entries.pop(_SHARED_AGAIN, None)
    if again is not None:
        entries.setdefault(_SHARED, again)
    return entries


def _official_entries(files: Sequence[Path]) -> dict[str, Entry]:
    entries: dict[str, Entry] = {}
    for key, entry in _torch_file(files[0]).items():
        name = official_name(key)
        if name is None:
            raise FileError(files[0], f"key {key} is not one of UMT5's encoder; give Wan's {_OFFICIAL_WEIGHTS}")
        entries[name] = entry
    return entries


def _safetensors(file: Path) -> dict[str, Entry]:
    from safetensors import SafetensorError, safe_open

    try:
        handle = safe_open(file, framework="pt")
        keys = list(handle.keys())
        entries = {}
        for key in keys:
            part = handle.get_slice(key)
            dtype = _SAFETENSORS_DTYPES.get(part.get_dtype(), torch.uint8)
            entries[key] = Entry(file, key, tuple(part.get_shape()), dtype, partial(handle.get_tensor, key))
    except FileNotFoundError:
        raise FileError(file, "is missing; download the folder again") from None
    except (OSError, SafetensorError) as error:
        raise FileError(file, f"is damaged or not safetensors ({error}); download it again") from error
    return entries


_SAFETENSORS_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _torch_file(file: Path) -> dict[str, Entry]:
    """Tensors of a file of torch.save, mapped: nothing is read before it is asked for."""
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise FileError(file, "is missing; download the folder again") from None
    except Exception as error:  # the unpickler of a damaged file raises whatever its bytes spell
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(file, f"is damaged or not a file of weights ({first}); download it again") from error
    if not isinstance(found, dict) or not found or not all(isinstance(value, Tensor) for value in found.values()):
        raise FileError(file, "does not hold a dictionary of tensors; give the published file of weights")
    return {
        str(key): Entry(file, str(key), tuple(value.shape), value.dtype, partial(_itself, value))
        for key, value in found.items()
    }


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _filled(
    shape: Shape, entries: Mapping[str, Entry], files: Sequence[Path], device: torch.device, dtype: torch.dtype
) -> torch.nn.Module:
    """The network with the tensors of the files. FileError for a key too many, too few, or of another size."""
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        sizes = {name: getattr(shape, name) for name in Shape.__dataclass_fields__}
        network = UMT5EncoderModel(UMT5Config(**sizes, dropout_rate=0.0, feed_forward_proj="gated-gelu"))
    expected = {name: tuple(value.shape) for name, value in network.state_dict().items() if name != _SHARED_AGAIN}
    missing, extra = sorted(expected.keys() - entries.keys()), sorted(entries.keys() - expected.keys())
    if missing:
        where = files[0] if len(files) == 1 else files[0].parent
        raise FileError(where, f"{missing[0]} is missing{_and_more(missing)}; download it again")
    if extra:
        entry = entries[extra[0]]
        what = f"key {entry.key} has no place in this UMT5{_and_more(extra)}"
        raise FileError(entry.file, f"{what}; is it another model's?")
    for name, size in expected.items():
        entry = entries[name]
        if entry.shape != size:
            what = f"{entry.key} has the shape {list(entry.shape)}, must be {list(size)}; is it another model's?"
            raise FileError(entry.file, what)
        if entry.dtype not in _READABLE:
            kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _READABLE)
            raise FileError(entry.file, f"{entry.key} is quantised or not a number; give weights in {kinds}")
    tensors = {name: entries[name].read().to(device, dtype) for name in expected}
    network.load_state_dict({**tensors, _SHARED_AGAIN: tensors[_SHARED]}, assign=True)
    network.encoder.set_input_embeddings(network.get_input_embeddings())  # one table, also as a parameter
    return network


def _and_more(names: Sequence[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""


def _tokenizer(folder: Path, vocabulary: int) -> Any:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        own = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
        highest = max(tokenizer.get_vocab()[token] for token in own)
        tokenizer(_PROBE)
    except Exception as error:  # tokenizers raises bare Exception for what it cannot parse
        first = str(error).strip().partition("\n")[0] or type(error).__name__
        raise FileError(folder, f"the tokenizer cannot be read ({first}); {_COPY_TOKENIZER}") from error
    if tokenizer.eos_token_id is None:
        raise FileError(folder, f"the tokenizer has no end token (eos_token); {_COPY_TOKENIZER}")
    if highest >= vocabulary:
        what = f"the tokenizer knows {highest + 1} tokens but the weights {vocabulary}: they do not belong together"
        raise FileError(folder, f"{what}; {_COPY_TOKENIZER}")
    return tokenizer


def _fingerprint(network: torch.nn.Module, tokenizer: Any) -> str:
    """sha256 of every tensor's name, size and a few of its values, and of the vocabulary and how it cuts a probe.

    It is the same for all layouts, and a fine-tuned copy has another one, at the cost of a few thousand values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.named_parameters()):
        at = torch.linspace(0, tensor.numel() - 1, _SAMPLES, dtype=torch.float64).long().to(tensor.device)
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().reshape(-1)[at].float().cpu().numpy().tobytes())
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(json.dumps([vocabulary, ids, tokenizer.eos_token_id]).encode())
    return digest.hexdigest()
