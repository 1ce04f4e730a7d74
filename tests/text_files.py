"""A tiny random UMT5 with a tokenizer of a few words, saved in the layouts the real one is published in."""

from __future__ import annotations

import json
import string
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

CORPUS = (
    "a red circle moving left",
    "a blue square moving right while the camera slowly turns",
    "Two cats and three dogs run along the beach under the morning sun, cinematic light.",
    "一只狐狸在雪地里奔跑，镜头缓慢推进。",
    "色调艳丽，过曝，静态，细节模糊不清，字幕，最差质量，低质量，倒着走",
    "déjà vu & other stories: the ocean, the wind; a lighthouse!",
)
PAD, EOS, BOS, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the tiny encoder; rows of `vocabulary` past the tokenizer's stay unused, as in UMT5-XXL."""

    dim: int = 16
    heads: int = 2
    head_dim: int = 12
    hidden: int = 40
    layers: int = 2
    vocabulary: int = 320
    buckets: int = 8


SIZES = Sizes()


def official_state(sizes: Sizes = SIZES, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under the names of Wan's models_t5_umt5-xxl-enc-bf16.pth, float32."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float) -> Tensor:
        return scale * torch.randn(*shape, generator=generator)

    attention = sizes.heads * sizes.head_dim
    state = {"token_embedding.weight": normal(sizes.vocabulary, sizes.dim, scale=1.0)}
    for i in range(sizes.layers):
        state |= {
            f"blocks.{i}.norm1.weight": 1 + normal(sizes.dim, scale=0.1),
            f"blocks.{i}.attn.q.weight": normal(attention, sizes.dim, scale=0.3),
            f"blocks.{i}.attn.k.weight": normal(attention, sizes.dim, scale=0.3),
            f"blocks.{i}.attn.v.weight": normal(attention, sizes.dim, scale=0.3),
            f"blocks.{i}.attn.o.weight": normal(sizes.dim, attention, scale=0.3),
            f"blocks.{i}.norm2.weight": 1 + normal(sizes.dim, scale=0.1),
            f"blocks.{i}.ffn.gate.0.weight": normal(sizes.hidden, sizes.dim, scale=0.3),
            f"blocks.{i}.ffn.fc1.weight": normal(sizes.hidden, sizes.dim, scale=0.3),
            f"blocks.{i}.ffn.fc2.weight": normal(sizes.dim, sizes.hidden, scale=0.3),
            f"blocks.{i}.pos_embedding.embedding.weight": normal(sizes.buckets, sizes.heads, scale=0.5),
        }
    return {**state, "norm.weight": 1 + normal(sizes.dim, scale=0.1)}


def hf_state(sizes: Sizes = SIZES, seed: int = 0) -> dict[str, Tensor]:
    """The same weights under transformers' names, written out here a second time, as a person reads them."""
    official = official_state(sizes, seed)
    state = {"shared.weight": official["token_embedding.weight"]}
    for i in range(sizes.layers):
        ours, theirs = f"blocks.{i}", f"encoder.block.{i}"
        attention, feed_forward = f"{theirs}.layer.0", f"{theirs}.layer.1"
        state[f"{attention}.layer_norm.weight"] = official[f"{ours}.norm1.weight"]
        for part in ("q", "k", "v", "o"):
            state[f"{attention}.SelfAttention.{part}.weight"] = official[f"{ours}.attn.{part}.weight"]
        bias = official[f"{ours}.pos_embedding.embedding.weight"]
        state[f"{attention}.SelfAttention.relative_attention_bias.weight"] = bias
        state[f"{feed_forward}.layer_norm.weight"] = official[f"{ours}.norm2.weight"]
        state[f"{feed_forward}.DenseReluDense.wi_0.weight"] = official[f"{ours}.ffn.gate.0.weight"]
        state[f"{feed_forward}.DenseReluDense.wi_1.weight"] = official[f"{ours}.ffn.fc1.weight"]
        state[f"{feed_forward}.DenseReluDense.wo.weight"] = official[f"{ours}.ffn.fc2.weight"]
    return {**state, "encoder.final_layer_norm.weight": official["norm.weight"]}


def config(sizes: Sizes = SIZES) -> dict[str, object]:
    """config.json as transformers writes it for UMT5EncoderModel."""
    return {
        "architectures": ["UMT5EncoderModel"],
        "model_type": "umt5",
        "d_model": sizes.dim,
        "d_kv": sizes.head_dim,
        "d_ff": sizes.hidden,
        "num_layers": sizes.layers,
        "num_heads": sizes.heads,
        "vocab_size": sizes.vocabulary,
        "relative_attention_num_buckets": sizes.buckets,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-06,
        "feed_forward_proj": "gated-gelu",
        "dense_act_fn": "gelu_new",
        "is_gated_act": True,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }


def write_tokenizer(folder: Path, sizes: Sizes = SIZES) -> None:
    """The tokenizer files of google/umt5-xxl: a unigram model, words and characters of CORPUS, </s> at the end.

    Written rather than trained: the trainer does not give the same vocabulary twice.
    """
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = [PAD, EOS, BOS, UNKNOWN]
    characters = sorted(set("".join(CORPUS)) | set(string.ascii_letters + string.digits + "\u2581"))
    words = sorted({"\u2581" + word for line in CORPUS for word in line.split() if word.isascii()})
    pieces = [(word, -6.0 - 0.01 * i) for i, word in enumerate(words)]
    pieces += [(character, -9.0 - 0.01 * i) for i, character in enumerate(characters) if character != " "]
    vocabulary = [(token, 0.0) for token in special] + pieces
    assert len(vocabulary) < sizes.vocabulary, len(vocabulary)
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=special.index(UNKNOWN)))
    tokenizer.normalizer = normalizers.NFKC()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # type: ignore[assignment]
    tokenizer.decoder = decoders.Metaspace()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single=f"$A {EOS}", special_tokens=[(EOS, special.index(EOS))]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, bos_token=BOS, unk_token=UNKNOWN
    )
    folder.mkdir(parents=True, exist_ok=True)
    fast.save_pretrained(str(folder))


def write_pipeline(folder: Path, sizes: Sizes = SIZES, seed: int = 0) -> Path:
    """A diffusers pipeline's text_encoder/ (two bf16 pieces and an index) and tokenizer/."""
    from safetensors.torch import save_file

    encoder = folder / "text_encoder"
    encoder.mkdir(parents=True)
    (encoder / "config.json").write_text(json.dumps(config(sizes)))
    state = {name: value.bfloat16() for name, value in hf_state(sizes, seed).items()}
    names = list(state)
    pieces = {name: f"model-0000{1 + (i >= len(names) // 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for piece in sorted(set(pieces.values())):
        save_file({name: state[name] for name in names if pieces[name] == piece}, encoder / piece, {"format": "pt"})
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": pieces}))
    write_tokenizer(folder / "tokenizer", sizes)
    return folder


def write_plain(folder: Path, sizes: Sizes = SIZES, seed: int = 0, pickled: bool = False) -> Path:
    """A transformers folder: float32 safetensors, or a whole UMT5's pytorch_model.bin with (stand-ins of) a decoder."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config(sizes)))
    state = hf_state(sizes, seed)
    if pickled:
        decoder = {"decoder.final_layer_norm.weight": torch.ones(sizes.dim), "lm_head.weight": state["shared.weight"]}
        torch.save({**state, "encoder.embed_tokens.weight": state["shared.weight"], **decoder},
                   folder / "pytorch_model.bin")
    else:
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    write_tokenizer(folder, sizes)
    return folder


def write_official(folder: Path, sizes: Sizes = SIZES, seed: int = 0) -> Path:
    """An official Wan folder's encoder and tokenizer, beside the config.json of its video model."""
    folder.mkdir(parents=True)
    state = {name: value.bfloat16() for name, value in official_state(sizes, seed).items()}
    torch.save(state, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    (folder / "config.json").write_text(json.dumps({"_class_name": "WanModel", "model_type": "t2v", "dim": 1536}))
    write_tokenizer(folder / "google/umt5-xxl", sizes)
    return folder
