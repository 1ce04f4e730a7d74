"""The frozen text encoder and autoencoder that a recipe names, and what its samples are conditioned on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirai_dist.config import schema
from mirai_dist.config.error import FileError, RecipeError
from mirai_dist.data.clips import open_clips
from mirai_dist.data.conditions import Conditions, Encoded, Encoder
from mirai_dist.data.embeddings import EmbeddingStore
from mirai_dist.data.latents import EMBEDDINGS, LatentStore
from mirai_dist.data.lmdb_files import LmdbClips
from mirai_dist.data.prompts import PromptFile
from mirai_dist.data.world import World
from mirai_dist.models.text import VocabularyEncoder
from mirai_dist.models.umt5 import Umt5Encoder
from mirai_dist.models.vae import LinearVae, Vae
from mirai_dist.models.wan_vae import WanVae
from mirai_dist.parallel.engine_fsdp import FsdpEngine
from mirai_dist.plan.shards import text_plan


def text_of(recipe: schema.Recipe, device: torch.device) -> Encoder:
    """The text encoder of a recipe, on the device. RecipeError where the recipe holds embeddings instead of one."""
    text = recipe.text
    if text.encoder == "vocabulary":
        return VocabularyEncoder(World(recipe.world, recipe.video, recipe.seed).vocabulary(), text.dim, text.length)
    if text.encoder == "store":
        what = "store holds the embeddings of one prompt file; texts of your own need text.encoder=umt5"
        raise RecipeError("text.encoder", f"{what} text.path=FOLDER_OF_UMT5")
    encoder = Umt5Encoder.load(Path(text.path), text.length, device)
    if encoder.dim != text.dim:
        raise FileError(text.path, f"this encoder is {encoder.dim} wide, text.dim is {text.dim}; change one of them")
    return encoder


CaptionSource = World | PromptFile | LatentStore | LmdbClips


def conditions_of(recipe: schema.Recipe, captions: CaptionSource, device: torch.device) -> Conditions:
    """Captions with their embeddings, encoded when they are asked for, or read from a store of embeddings.

    That of data.prompts is text.path; that of a store of latents is its folder `embeddings`.
    """
    if recipe.text.encoder != "store":
        return Encoded(captions, text_of(recipe, device))
    if isinstance(captions, PromptFile):
        return EmbeddingStore(Path(recipe.text.path), recipe.text.length, captions, dim=recipe.text.dim)
    if isinstance(captions, LmdbClips):
        what = "an LMDB has no embedding store: `mirai data convert --to mirai` it, then `mirai data embed` its prompts"
        raise FileError(captions.path, what)
    assert isinstance(captions, LatentStore)  # a rule refuses a store for the world's captions
    own = captions.path / EMBEDDINGS
    if not own.exists():
        what = f"has no embeddings: mirai data embed {captions.prompts.path} --encoder FOLDER --out {own}"
        raise FileError(captions.path, what)
    return EmbeddingStore(own, recipe.text.length, captions.prompts, dim=recipe.text.dim)


@dataclass(frozen=True)
class WorldClips:
    """Clips of the procedural world, encoded when they are asked for."""

    world: World
    vae: Vae
    device: torch.device

    @property
    def size(self) -> int | None:
        return self.world.size

    @property
    def captions_source(self) -> World:
        return self.world

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """[B, F, C, H, W] float32, on the device."""
        return self.vae.encode(self.world.clips(numbers).to(self.device))


@dataclass(frozen=True)
class StoredClips:
    """Clean latents of a data set."""

    store: LatentStore | LmdbClips

    @property
    def size(self) -> int:
        return self.store.size

    @property
    def captions_source(self) -> LatentStore | LmdbClips:
        return self.store

    def latents(self, numbers: Sequence[int]) -> Tensor:
        """[B, F, C, H, W] float32."""
        return self.store.latents(numbers).float()


def clips_of(recipe: schema.Recipe, device: torch.device) -> WorldClips | StoredClips:
    """What stages train on that need clips. FileError when a data set's latents are not of the recipe's shape."""
    if not recipe.data.latents:
        return WorldClips(World(recipe.world, recipe.video, recipe.seed), vae_of(recipe, device), device)
    store = open_clips(Path(recipe.data.latents))
    check_shape(store, recipe)
    return StoredClips(store)


def check_shape(store: LatentStore | LmdbClips, recipe: schema.Recipe) -> None:
    """FileError when the data set's latents are not those of the recipe's video."""
    video = recipe.video
    wanted = (video.latent_frames, video.channels, video.latent_height, video.latent_width)
    if tuple(store.shape[-4:]) != wanted:
        what = f"holds latents of {list(store.shape[-4:])} (frames, channels, rows, columns), the recipe's video has"
        raise FileError(store.path, f"{what} {list(wanted)}; change the section video, or take other data")


def sharded(conditions: Conditions, recipe: schema.Recipe, engine: FsdpEngine) -> Conditions:
    """The same, with a resident UMT5 sharded as the networks are.

    Every rank must then encode as many prompts as every other, at the same time.
    """
    encoder = conditions.encoder if isinstance(conditions, Encoded) else None
    if isinstance(encoder, Umt5Encoder):
        engine.shard(encoder.network, text_plan(recipe.parallel, encoder.blocks))
    return conditions


def vae_of(recipe: schema.Recipe, device: torch.device) -> Vae:
    """The video autoencoder of a recipe, on the device."""
    if recipe.vae.kind == "linear":
        return LinearVae().to(device)
    # fp32 where only a CPU is: its bf16 convolutions are slower and no smaller in the end
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return WanVae.load(Path(recipe.vae.path), device, dtype)
