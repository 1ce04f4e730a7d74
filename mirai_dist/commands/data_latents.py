"""`mirai data latents`: a folder of videos through the VAE, once, shard by shard, alone or as a job array."""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mirai_dist.commands.data_progress import Pace, part_console, refuse_below_one, size_text
from mirai_dist.config.error import FileError
from mirai_dist.data.arrays import Part, bytes_of
from mirai_dist.data.latents import CLEAN, DTYPES, Entry, LeftOut, Plan, StoreWriter, one_line
from mirai_dist.data.prompts import PromptFile
from mirai_dist.data.video_clips import ClipForm, read_clip
from mirai_dist.models.vae import GROUP, STRIDE
from mirai_dist.models.wan_vae import CHANNELS, WanVae
from mirai_dist.observe.console import Console

SUFFIXES = (".mp4", ".mov", ".mkv", ".webm", ".avi")
_AHEAD = 4  # videos that are decoded ahead, each by a thread; a published one takes 0.4 GB as pixels
_PATCH = 2 * STRIDE  # the networks take latents two by two


@dataclass(frozen=True)
class Video:
    """A candidate: its file, its name in the folder, and its caption, empty if it has none."""

    path: Path
    name: str
    caption: str


def run(options: argparse.Namespace) -> int:
    """The sub-verb. FileError for arguments, a folder, captions, a VAE or a store that cannot be used; a single video
    that cannot be is left out and listed."""
    part = Part.parse(options.part)
    refuse_below_one({"--shard-size": options.shard_size, "--fps": options.fps})
    form = _form(options.frames, options.size, options.fps)
    videos = _videos(options.videos, options.captions)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vae = WanVae.load(options.vae, device)
    plan = _plan(videos, form, vae, options)
    with closing(part_console(options.out, part)) as console:
        _encode(StoreWriter(options.out, plan, part), videos, form, vae, console)
    return 0


def _encode(writer: StoreWriter, videos: Sequence[Video], form: ClipForm, vae: WanVae, console: Console) -> None:
    plan = writer.plan
    todo = writer.missing()
    for damage in writer.damaged:
        console.warn(f"{damage.where} is made again: it {damage.what.partition(';')[0]}")
    work = [number for shard in todo for number in plan.numbers(shard)]
    _say_estimate(writer.path, plan, len(work), vae, console)
    pace = Pace(console, len(work), "encode", "videos")
    for shard in todo:
        candidates = [videos[number] for number in plan.numbers(shard)]
        written = writer.write(shard, _entries(candidates, form, vae, plan, pace))
        for item in written.left_out:
            console.warn(f"left out: {item.what}: {item.why}")
    _say_end(writer, len(todo), console)


def _entries(
    videos: Sequence[Video], form: ClipForm, vae: WanVae, plan: Plan, pace: Pace
) -> Iterator[Entry | LeftOut]:
    """Entries in order; the next videos are decoded while one is encoded."""
    with ThreadPoolExecutor(_AHEAD) as pool:
        coming = deque(pool.submit(_pixels, video, form) for video in videos[:_AHEAD])
        for index, video in enumerate(videos):
            found = coming.popleft().result()
            if index + _AHEAD < len(videos):
                coming.append(pool.submit(_pixels, videos[index + _AHEAD], form))
            if isinstance(found, LeftOut):
                yield found
            else:
                latents = vae.encode(found[None])[0]
                yield Entry(video.caption, latents.to(DTYPES[plan.dtype]))
            pace.advance()


def _pixels(video: Video, form: ClipForm) -> Tensor | LeftOut:
    """[T, 3, H, W] of a video, or why there are none."""
    if not video.caption:
        return LeftOut(video.name, "has no caption")
    try:
        return read_clip(video.path, form)
    except FileError as error:
        return LeftOut(video.name, error.what)


def _form(frames: int, size: str, fps: int) -> ClipForm:
    if frames < 1 or frames % GROUP != 1:
        raise FileError("--frames", f"is {frames}; give 1 + {GROUP} n, such as 81")
    height, by, width = size.partition("x")
    whole = by and height.isdecimal() and width.isdecimal() and int(height) * int(width) > 0
    if not whole or int(height) % _PATCH or int(width) % _PATCH:
        raise FileError("--size", f"is {size!r}; give HEIGHTxWIDTH in multiples of {_PATCH}, such as 480x832")
    return ClipForm(frames, fps, int(height), int(width))


def _videos(folder: Path, captions: Path | None) -> list[Video]:
    """Videos below the folder by name. FileError when there are none, or another number of captions."""
    if not folder.is_dir():
        raise FileError(folder, "is not a folder of videos")
    paths = [path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")]
    names = sorted((path.relative_to(folder).as_posix(), path) for path in paths if path.is_file())
    if not names:
        raise FileError(folder, f"holds no videos ({', '.join(SUFFIXES)})")
    if captions is None:
        return [Video(path, name, _sidecar(path)) for name, path in names]
    lines = PromptFile(captions)
    if lines.size != len(names):
        what = f"holds {lines.size} captions, {folder} {len(names)} videos; line n is of the n-th video by name"
        raise FileError(captions, what)
    texts = lines.captions(range(lines.size))
    return [Video(path, name, text) for (name, path), text in zip(names, texts, strict=True)]


def _sidecar(video: Path) -> str:
    """The text beside a video, on one line; empty if there is none. FileError if it is not text."""
    path = video.with_suffix(".txt")
    try:
        return one_line(path.read_text(encoding="utf-8").strip()) if path.is_file() else ""
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be read as UTF-8 text ({error}); repair or remove it") from error


def _plan(videos: Sequence[Video], form: ClipForm, vae: WanVae, options: argparse.Namespace) -> Plan:
    candidates = [[video.name, video.path.stat().st_size, video.caption] for video in videos]
    shape = (1 + (form.frames - 1) // GROUP, CHANNELS, form.height // STRIDE, form.width // STRIDE)
    statistics = {"mean": vae.mean.flatten().tolist(), "std": vae.std.flatten().tolist()}
    provenance = {"vae": _fingerprint(vae), "frames": form.frames, "fps": form.fps, "size": options.size}
    return Plan(
        CLEAN,
        len(videos),
        shape,
        options.dtype,
        options.shard_size,
        hashlib.sha256(json.dumps(candidates).encode()).hexdigest(),
        statistics=statistics,
        provenance=provenance,
    )


def _fingerprint(vae: WanVae) -> str:
    """sha256 of the VAE's tensors, whichever file they came from."""
    digest = hashlib.sha256()
    for name, values in sorted(vae.network.state_dict().items()):
        digest.update(name.encode())
        digest.update(bytes_of(values.cpu()))
    return digest.hexdigest()


def _say_estimate(store: Path, plan: Plan, work: int, vae: WanVae, console: Console) -> None:
    expected = 2 * torch.Size(plan.shape).numel() * work
    free = shutil.disk_usage(store).free
    device = vae.mean.device.type
    console.say(f"encode {work} videos on {device}: at most {size_text(expected)}, {size_text(free)} free")
    if expected > free:
        console.warn(f"{store} is on a disk with {size_text(free)} free, up to {size_text(expected)} are needed")


def _say_end(writer: StoreWriter, made: int, console: Console) -> None:
    console.say(f"wrote {made} shards; {len(writer.part.shards(writer.plan.shards)) - made} were there already")
    store = writer.seal()
    if store is None:
        console.say("shards are left to the other parts; the last of them completes the store")
        return
    left_out = store.left_out()
    if left_out:
        console.warn(f"left out {len(left_out)} of {writer.plan.candidates} videos: " + _names(left_out))
    console.say(f"{writer.path} is complete: {store.size} clips of {list(store.shape)} {store.plan.dtype}")


def _names(left_out: Sequence[LeftOut]) -> str:
    return "; ".join(f"{item.what} {item.why.partition(';')[0]}" for item in left_out)
