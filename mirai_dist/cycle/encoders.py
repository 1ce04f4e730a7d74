"""The frozen text encoder and autoencoder that a recipe names, and what its samples are conditioned on."""

from __future__ import annotations

from pathlib import Path

import torch

from mirai_dist.config import schema
from mirai_dist.config.error import FileError, RecipeError
from mirai_dist.data.conditions import Conditions, Encoded, Encoder
from mirai_dist.data.embeddings import EmbeddingStore
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


def conditions_of(recipe: schema.Recipe, captions: World | PromptFile, device: torch.device) -> Conditions:
    """Captions with their embeddings, encoded when they are asked for, or read from the store of that prompt file."""
    if recipe.text.encoder != "store":
        return Encoded(captions, text_of(recipe, device))
    assert isinstance(captions, PromptFile)  # a rule refuses a store for the world's captions
    return EmbeddingStore(Path(recipe.text.path), recipe.text.length, captions, dim=recipe.text.dim)


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
