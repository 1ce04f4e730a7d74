"""The files a twin names, with random content in the layouts of the published ones."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import astuple
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from mirai_dist.commands.twin import is_pickled
from mirai_dist.config import FileError
from mirai_dist.config.schema import Network, Recipe
from mirai_dist.data import embeddings
from mirai_dist.data.latents import CLEAN, Entry, Plan, StoreWriter
from mirai_dist.data.prompts import PromptFile
from mirai_dist.models.wan import model as wan_model
from mirai_dist.models.wan.keys import WanShape, shapes_of
from mirai_dist.state.draws import Draws
from mirai_dist.weights.folders import CONFIG, INDEX, STEM, WHOLE, wan_config, write_folder

PROMPTS = 16
SPREAD = 0.02  # of what a fresh network has at zero and a trained one has not
SHARD_BYTES = 9_950_000_000  # of the published folders: the 1.3B is one file, the 14B six


def write_weights(entry: str, published: Recipe, twin: Recipe) -> None:
    """Random weights of the twin of `published.weights[entry]`, at the twin's path."""
    sizes = sizes_of(entry, twin)
    path, source = Path(twin.weights[entry].path), published.weights[entry]
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = dict(drawn(entry, sizes, twin.seed))
    kind = twin.weights[entry].kind
    if not is_pickled(source.path) and (source.which == "ema" or kind != "diffusion"):
        manifest = {"kind": kind, "which": source.which}  # what only an imported folder can say
        write_folder(path, list(tensors), tensors.__getitem__, wan_config(sizes), manifest)
        return
    if not is_pickled(source.path):
        numbers = sum(torch.Size(shape).numel() for shape in shapes_of(sizes_of(entry, published)).values())
        write_official(path, tensors, sizes, shards=-(-4 * numbers // SHARD_BYTES))
        return
    states = {"generator": {f"model.{name}": tensor for name, tensor in tensors.items()}}
    if source.which == "ema":
        # an average of its own, under the names that Self-Forcing's wrapper leaves in them
        average = dict(drawn(f"{entry}_ema", sizes, twin.seed))
        states["generator_ema"] = {f"model._fsdp_wrapped_module.{name}": each for name, each in average.items()}
    torch.save(states, path)


def sizes_of(entry: str, recipe: Recipe) -> WanShape:
    """Shape of the network that starts from an entry of `weights`."""
    network = next(_starting(entry, recipe))
    dim, ffn_dim, heads, blocks, freq_dim = astuple(network)
    return WanShape(dim, ffn_dim, heads, blocks, recipe.text.dim, recipe.video.channels, freq_dim)


def _starting(entry: str, recipe: Recipe) -> Iterator[Network]:
    for stage in recipe.stages.values():
        if stage.parent == entry:
            yield recipe.teacher if stage.kind == "bidirectional" else recipe.generator
        if stage.teacher == entry:
            yield recipe.teacher
        if stage.critic == entry:
            yield recipe.critic


def drawn(entry: str, sizes: WanShape, seed: int) -> Iterator[tuple[str, Tensor]]:
    """(official name, float32 tensor) of every parameter, keyed by seed, entry and name; nothing at zero."""
    draws = Draws(seed, torch.device("cpu"))
    for name, shape in shapes_of(sizes).items():
        tensor, generator = torch.empty(shape), draws.for_parameter(f"{entry}.{name}")
        wan_model.initialise(name, tensor, generator)
        if not tensor.any():
            tensor.normal_(std=SPREAD, generator=generator)
        yield name, tensor


def write_official(folder: Path, tensors: dict[str, Tensor], sizes: WanShape, shards: int) -> None:
    """A folder as Wan2.1 publishes it: config.json and safetensors, with an index where they are several."""
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(wan_config(sizes), indent=2) + "\n")
    if shards == 1:
        save_file(tensors, folder / WHOLE, metadata={"format": "pt"})
        return
    names = sorted(tensors)
    place = {}
    for number in range(shards):
        file = f"{STEM}-{number + 1:05d}-of-{shards:05d}.safetensors"
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        save_file({name: tensors[name] for name in part}, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": place}, indent=2) + "\n")


def write_prompts(path: Path) -> None:
    """A prompt file of a few lines."""
    path.write_text("".join(f"{line}\n" for line in prompt_lines()), encoding="utf-8")


def prompt_lines() -> list[str]:
    animals = ("a heron", "two otters", "an old dog", "a snow leopard")
    places = ("at dawn", "in rain", "by the sea", "at night")
    lines = [f"{animal} walks {place}, seen from the side" for animal in animals for place in places]
    assert len(lines) == PROMPTS
    return lines


def write_latents(store: Path, twin: Recipe) -> None:
    """A store of clean latents of independent random numbers, in two shards."""
    video, draws = twin.video, Draws(twin.seed, torch.device("cpu"))
    shape = (video.latent_frames, video.channels, video.latent_height, video.latent_width)
    source = hashlib.sha256(b"random numbers of mirai shrink").hexdigest()
    plan = Plan(CLEAN, PROMPTS, shape, "bfloat16", shard_size=PROMPTS // 2, source=source)
    writer = StoreWriter(store, plan)
    for shard in writer.missing():
        numbers = plan.numbers(shard)
        clips = draws.normal("latents", 0, 0, numbers, shape).bfloat16()
        writer.write(shard, [Entry(prompt_lines()[n], clip) for n, clip in zip(numbers, clips, strict=True)])
    writer.seal()


def write_embeddings(store: Path, prompts: PromptFile, twin: Recipe) -> None:
    """Random embeddings of a prompt file, of all lengths up to the longest, in two shards."""
    dim, longest, draws = twin.text.dim, twin.text.length, Draws(twin.seed, torch.device("cpu"))
    whole = embeddings.Identity(
        prompts=prompts.digest,
        count=prompts.size,
        encoder="random numbers of mirai shrink",
        dim=dim,
        length=longest,
        shard_size=-(-prompts.size // 2),
        negative=hashlib.sha256(b"random numbers").hexdigest(),
    )
    embeddings.establish(store, whole)

    def shard(name: str, entries: list[int]) -> None:
        rows = [draws.normal("embedding", 0, 0, [entry], (1 + entry % longest, dim))[0] for entry in entries]
        contents = embeddings.Contents(name, [len(each) for each in rows])
        embeddings.write_shard(store, whole, contents, [each.bfloat16() for each in rows])

    shard(embeddings.NEGATIVE, [prompts.size])
    for number in range(whole.shards):
        shard(embeddings.shard_name(number), list(whole.numbers(number)))


def write_vae(path: Path, seed: int) -> None:
    """Wan's autoencoder at a twelfth of its width, in the layout of its path: the official .pth, or a diffusers folder.

    FileError where diffusers, which holds the network, is not installed.
    """
    try:
        from diffusers import AutoencoderKLWan
    except ImportError as error:
        raise FileError("vae", f"the Wan VAE needs diffusers ({error}): install mirai-dist[wan]") from error
    from mirai_dist.models.wan_vae import official_name

    vae, draws = AutoencoderKLWan(base_dim=8).requires_grad_(False), Draws(seed, torch.device("cpu"))
    for name, parameter in vae.named_parameters():
        generator, scale = draws.for_parameter(f"vae.{name}"), parameter[0].numel() ** -0.5
        if name.endswith("gamma"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=scale if parameter.ndim > 1 else SPREAD, generator=generator)
    if not is_pickled(str(path)):
        vae.save_pretrained(path)
        return
    blocks = vae.config["num_res_blocks"]
    torch.save({official_name(name, blocks): tensor.clone() for name, tensor in vae.state_dict().items()}, path)
