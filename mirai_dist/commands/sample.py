"""`mirai sample`: videos of a prompt file, streamed to disk as they are generated.

    OUT/{prompt}-{i}.mp4     one a prompt and sample (VBench's names); complete files only, written beside and renamed
    OUT/manifest.json        what the videos are: weights, recipe, length, window, prompts, and the seed of each
    OUT/timing.json          seconds and frames a second of each, and the medians
    OUT/logs/                progress and timings of every rank; rank 0's progress is on the screen too

Several ranks share the list by stride and never talk: each holds the whole network, and a slow one delays nobody.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import socket
import time
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mirai_dist.commands.entry import main
from mirai_dist.commands.generator import Chosen, Wish, chosen, sampler_of
from mirai_dist.config import FileError, RecipeError, schema
from mirai_dist.config.digest import digest
from mirai_dist.cycle.encoders import conditions_of
from mirai_dist.data.conditions import Conditions
from mirai_dist.data.prompts import PromptFile
from mirai_dist.data.world import pixel_frames
from mirai_dist.evaluate import video_files
from mirai_dist.observe.console import Console
from mirai_dist.runtime.bootstrap import Place, choose_device, find_place
from mirai_dist.sample import Request, Sampler, Timing, summary
from mirai_dist.state.draws import keyed_bits

MANIFEST, TIMING = "manifest.json", "timing.json"
GRID = 16  # videos of the quick look
PIXELS = 8  # pixels a latent, both axes


@dataclass(frozen=True)
class Task:
    """One video: its file name, its prompt's entry number and sample index, and the seed of all its noise."""

    name: str
    line: int
    sample: int
    seed: int


@dataclass(frozen=True)
class Job:
    """What all videos of one command share on this rank."""

    options: argparse.Namespace
    place: Place
    sampler: Sampler
    choice: Chosen
    identity: str  # digest of the weights
    conditions: Conditions
    tasks: list[Task]
    console: Console

    @property
    def out(self) -> Path:
        return self.options.out

    @property
    def video(self) -> schema.Video:
        return self.choice.recipe.video

    def own(self) -> list[Task]:
        """This rank's share: every size-th task from its rank on, whatever is finished already."""
        return self.tasks[self.place.rank :: self.place.world_size]


def run(options: argparse.Namespace) -> int:
    """Sample all that is missing in the folder. Everything that can be wrong is looked at before anything is loaded."""
    place = find_place(os.environ)
    device = choose_device(place, torch.cuda.device_count() if torch.cuda.is_available() else 0)
    if options.samples < 1:
        raise RecipeError("--samples", f"{options.samples} videos a prompt; use 1 or more")
    prompts = PromptFile(options.prompts)
    names = _names_of(options, prompts)
    choice = chosen(_wish(options))
    check_images(options.images, prompts, choice.recipe.video)
    conditions = _conditions(choice.recipe, prompts, device)
    if choice.recipe.text.encoder == "vocabulary":
        check_vocabulary(conditions, prompts)
    out: Path = options.out
    try:
        (out / "logs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(out, f"cannot be made ({error.strerror}); name another folder with --out") from error
    with closing(Console(place.rank, socket.gethostname(), out / "logs" / f"rank-{place.rank}.log")) as console:
        tasks = tasks_of(names, options.samples, options.seed)
        notes = {"weights": str(choice.path.resolve())}
        agree(out / MANIFEST, _described(options, choice, prompts, names), tasks, notes)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        sampler, identity = sampler_of(choice, device)
        agree(out / MANIFEST, {"weights_digest": identity}, tasks)
        job = Job(options, place, sampler, choice, identity, conditions, tasks, console)
        _introduce(job)
        _finish(job, sample_all(job))
    return 0


def sample_all(job: Job) -> dict[str, Timing]:
    """Make this rank's missing videos; the timing of each."""
    timings: dict[str, Timing] = {}
    for task in job.own():
        if (job.out / task.name).exists():
            continue
        timing = sample_one(job, task)
        timings[task.name] = timing
        _write_json(job.out / _part(job.place.rank), _own_records(job, timings))
        done = sum((job.out / each.name).exists() for each in job.tasks)
        seconds = timing.text + timing.generation + timing.decoding
        job.console.say(
            f"{done}/{len(job.tasks)} {task.name}: {timing.pixel_frames} frames in {seconds:.2f} s, "
            f"{timing.fps:.2f} frames/s, latency {timing.latency:.3f} s, first frame {timing.first_frame:.3f} s"
        )
    return timings


def sample_one(job: Job, task: Task) -> Timing:
    """Generate one video into its file, segment by segment. FileError when the network gives what is not finite."""
    timing, sampler = Timing(), job.sampler
    (prompt,) = job.conditions.captions([task.line])
    given = None if job.options.images is None else first_frame(job, task)
    started = time.perf_counter()
    text = job.conditions.embed([task.line]).to(sampler.device)
    if sampler.device.type == "cuda":
        torch.cuda.synchronize(sampler.device)
    timing.text = time.perf_counter() - started
    frames: list[Tensor] = []
    path = job.out / task.name
    with video_files.Mp4Writer(path, job.video.fps, metadata={"title": prompt, "comment": _note(job, task)}) as writer:
        for pixels in sampler.pieces(Request(text, task.seed, sampler.latent_frames, given), timing):
            if not pixels.isfinite().all():
                what = f"generates values that are not finite ({task.name}, frame {writer.frames})"
                raise FileError(job.choice.path, f"{what}; these weights are damaged or do not fit the recipe")
            frames.append(video_files.to_uint8(pixels).cpu())
            writer.append(frames[-1])
            if not job.options.gif:
                frames.clear()
    if frames:
        video_files.write_gif(path.with_suffix(".gif"), torch.cat(frames), job.video.fps)
    return timing


def first_frame(job: Job, task: Task) -> Tensor:
    """Latents [1, 1, C, h, w] of the image that a video goes on from."""
    video, vae = job.video, job.sampler.vae
    height, width = PIXELS * video.latent_height, PIXELS * video.latent_width
    pixels = video_files.read_image(job.options.images / f"{task.line}.png", height, width)
    return vae.encode(pixels[None, None].to(job.sampler.device))


def tasks_of(names: PromptFile, samples: int, seed: int) -> list[Task]:
    """All videos in order; of lines with the same name the first one stands for all, as VBench counts them.

    The seed of a video depends on `seed`, its line and its sample index alone.
    """
    tasks: dict[str, Task] = {}
    for line in range(names.size):
        (name,) = names.captions([line])
        for sample in range(samples):
            own = keyed_bits(seed, "sample", line, sample) & (2**63 - 1)
            file = video_files.vbench_name(name, sample)
            tasks.setdefault(file, Task(file, line, sample, own))
    return list(tasks.values())


def agree(path: Path, fields: dict[str, Any], tasks: list[Task], notes: dict[str, Any] | None = None) -> None:
    """Put `fields` into the folder's manifest, or find them there as they are; `notes` may change.

    Ranks that start together agree without talking: the manifest appears whole or not at all, and what is written
    twice is the same. Raises FileError naming the first field that differs: the folder's videos are other videos.
    """
    stored = _read_json(path)
    for name, value in fields.items():
        if name in stored and stored[name] != value:
            what = f"{name} is {stored[name]!r} in the videos of this folder, and {value!r} now"
            raise FileError(path, f"{what}; name another folder with --out, or ask for the same again")
    videos = {task.name: {"line": task.line, "sample": task.sample, "seed": task.seed} for task in tasks}
    merged = {**stored, **fields, **(notes or {}), "videos": {**stored.get("videos", {}), **videos}}
    if merged != stored:
        _write_json(path, merged)


def check_images(folder: Path | None, prompts: PromptFile, video: schema.Video) -> None:
    """RecipeError for a recipe that cannot continue an image, FileError for the first one that is missing."""
    if folder is None:
        return
    if video.frames_per_segment != 1:
        what = f"image-to-video needs a frame-wise generator; video.frames_per_segment is {video.frames_per_segment}"
        raise RecipeError("--images", f"{what}; leave --images out, or sample a frame-wise recipe")
    if not folder.is_dir():
        raise FileError(folder, "is no folder; --images names one that holds 0.png for the first prompt, 1.png, ...")
    for line in range(prompts.size):
        if not (folder / f"{line}.png").is_file():
            raise FileError(folder, f"{line}.png is missing, the first frame of prompt {line} (line {line + 1})")


def _conditions(recipe: schema.Recipe, prompts: PromptFile, device: torch.device) -> Conditions:
    """Embeddings of the prompts to sample. A store serves them if it was made of this very file."""
    try:
        return conditions_of(recipe, prompts, device)
    except FileError as error:
        if recipe.text.encoder != "store":
            raise
        what = f"{error.what}, or encode these prompts here: text.encoder=umt5 text.path=FOLDER_OF_UMT5"
        raise FileError(error.where, what) from None


def check_vocabulary(conditions: Conditions, prompts: PromptFile) -> None:
    """FileError naming the first prompt that is not of the procedural world."""
    for line in range(prompts.size):
        try:
            conditions.embed([line])
        except ValueError as error:
            raise FileError(prompts.path, f"line {line + 1}: {error}") from None


def _wish(options: argparse.Namespace) -> Wish:
    names = [field.name for field in dataclasses.fields(Wish) if field.name != "overrides"]
    return Wish(overrides=tuple(options.overrides), **{name: getattr(options, name) for name in names})


def _names_of(options: argparse.Namespace, prompts: PromptFile) -> PromptFile:
    if options.names is None:
        return prompts
    names = PromptFile(options.names)
    if names.size != prompts.size:
        what = f"names {names.size} prompts, and {prompts.path} holds {prompts.size}"
        raise FileError(names.path, f"{what}; line n names the video of line n")
    return names


def _described(options: argparse.Namespace, choice: Chosen, prompts: PromptFile, names: PromptFile) -> dict[str, Any]:
    device = "cuda" if torch.cuda.is_available() else "cpu"  # their generators give different numbers
    images = None if options.images is None else str(options.images.resolve())
    inputs = {"seed": options.seed, "prompts": prompts.digest, "names": names.digest, "images": images}
    return {**inputs, **choice.described(), "device": device}


def _note(job: Job, task: Task) -> str:
    """What a video's file says about itself; no path, so that the same video is the same file everywhere."""
    choice = job.choice
    about = {"seed": task.seed, "weights": job.identity, "which": choice.which, "recipe": digest(choice.recipe)}
    return json.dumps(about)


def _introduce(job: Job) -> None:
    choice, cache = job.choice, job.sampler.cache
    window = choice.recipe.rollout.window_frames
    seen = f"window {window}, sink {choice.recipe.rollout.sink_frames}" if window else "no window"
    job.console.say(f"{choice.path} ({choice.which}, {choice.kind}): {len(job.tasks)} videos to {job.out}")
    job.console.say(
        f"{choice.latent_frames} latent frames = {pixel_frames(choice.latent_frames)} pixel frames at "
        f"{job.video.fps} fps, {seen}; cache of {cache.shape.frames} latent frames, {cache.bytes / 2**20:.1f} MiB"
    )
    repeated = (job.conditions.size or 0) * job.options.samples - len(job.tasks)
    if repeated > 0:
        job.console.say(f"{repeated} videos would repeat the name of an earlier line and are made once")
    if choice.kind == "ar":
        job.console.warn("kind ar is a many-step model; few steps show where distillation starts, not what it reaches")


def _own_records(job: Job, timings: dict[str, Timing]) -> dict[str, Any]:
    """What this rank has measured, now and in earlier commands that did not come to their end."""
    first = next(iter(timings))
    own = {name: {**vars(timing), "warm_up": name == first} for name, timing in timings.items()}
    return {**_read_json(job.out / _part(job.place.rank)), **own}


def _part(rank: int) -> str:
    return f"logs/timing-rank-{rank}.json"


def _read_json(path: Path) -> dict[str, Any]:
    """The object a file of ours holds, empty if there is no file. FileError if it holds something else."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FileError(path, f"cannot be read ({error}); remove it, or name another folder with --out") from error
    if not isinstance(stored, dict) or not isinstance(stored.get("videos", {}), dict):
        raise FileError(path, "was not written by mirai sample; name another folder with --out")
    return stored


def _records(out: Path) -> dict[str, dict[str, Any]]:
    """Records of all ranks so far, and of earlier commands on this folder."""
    records = dict(_read_json(out / TIMING).get("videos", {}))
    for part in sorted((out / "logs").glob("timing-rank-*.json")):
        records |= _read_json(part)
    return records


def _finish(job: Job, timings: dict[str, Timing]) -> None:
    """The summary; timing.json and the grid of all that is there, so that the last rank to end writes the whole."""
    records = _records(job.out)
    if records:
        fields = [field.name for field in dataclasses.fields(Timing)]
        videos = {name: Timing(**{each: record[each] for each in fields}) for name, record in records.items()}
        warm = [name for name, record in records.items() if record["warm_up"]]
        medians = summary(videos, warm)
        counted = len(videos) - len(warm) or len(videos)
        _write_json(job.out / TIMING, {"medians": medians, "counted": counted, "videos": records})
        _summarise(job, medians, counted)
    if not timings:
        job.console.say("every video of this rank is there already")
    if job.options.grid:
        write_grid(job)


def _summarise(job: Job, medians: dict[str, float], counted: int) -> None:
    rows = [
        ("latency", f"{medians['latency_seconds']:.3f} s", "denoising steps of the first segment alone"),
        ("throughput", f"{medians['frames_per_second']:.2f} frames/s", "text and all segments, without the VAE"),
        ("first frame", f"{medians['first_frame_seconds']:.3f} s", "text, first segment and its decoding"),
        ("with VAE", f"{medians['frames_per_second_with_vae']:.2f} frames/s", "text, all segments and decoding"),
    ]
    job.console.table(f"medians of {counted} videos (the first one of each process warms up)", rows)


def write_grid(job: Job) -> None:
    """grid.mp4 (and grid.gif with --gif) of the first videos, once all of them are there."""
    paths = [job.out / task.name for task in job.tasks[:GRID]]
    if not all(path.exists() for path in paths):
        job.console.say("grid.mp4 is left to the rank that ends last")
        return
    videos = torch.stack([video_files.read_mp4(path)[0] for path in paths]).float().movedim(-1, -3) / 127.5 - 1
    frames = video_files.grid(videos, columns=max(1, round(len(paths) ** 0.5)))
    video_files.write_mp4(job.out / "grid.mp4", frames, job.video.fps)
    if job.options.gif:
        video_files.write_gif(job.out / "grid.gif", frames, job.video.fps)


def _write_json(path: Path, value: Any) -> None:
    beside = path.with_name(f"{path.name}.{os.getpid()}.new")
    beside.write_text(json.dumps(value, indent=1, ensure_ascii=False), encoding="utf-8")
    beside.replace(path)


if __name__ == "__main__":
    main("sample", run)
