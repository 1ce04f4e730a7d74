"""`mirai sample`: files, names, shares, resumption, what is recorded, and one line for everything that can be wrong."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from mirai_dist.commands import arguments, entry, generator, sample
from mirai_dist.commands.generator import Wish, opened
from mirai_dist.evaluate import video_files
from tests import run_files, wan_files

PROMPTS = ("a red circle moving left", "a green square moving up", "a blue triangle moving down")
CHUNKS = run_files.RECIPE.replace("latent_frames: 3, frames_per_segment: 1", "latent_frames: 4, frames_per_segment: 2")
RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class Mirai:
    """Calls `mirai sample` in this process; `err` and `out` are what the last call wrote."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    out: str = ""
    err: str = ""

    def __call__(self, *words: object, rank: tuple[int, int] | None = None) -> int:
        for name in [*RANKS, "SLURM_PROCID", "TORCHELASTIC_RUN_ID"]:
            self.monkeypatch.delenv(name, raising=False)
        if rank is not None:
            values = (rank[0], rank[1], rank[0], rank[1], "127.0.0.1", 1)
            for name, value in zip(RANKS, values, strict=True):
                self.monkeypatch.setenv(name, str(value))
        parser = argparse.ArgumentParser(prog="mirai sample", allow_abbrev=False)
        arguments.VERBS["sample"].configure(parser)
        code = entry.outcome("sample", sample.run, parser.parse_intermixed_args([str(word) for word in words]))
        self.out, self.err = self.capsys.readouterr()
        return code

    def refused(self, *words: object) -> str:
        """The one line of a command that must fail, without any traceback."""
        assert self(*words) == 20, self.err
        assert self.err.count("\n") == 1 and self.err.startswith("mirai sample: "), self.err
        return self.err.removeprefix("mirai sample: ").rstrip()


@pytest.fixture
def mirai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Mirai:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return Mirai(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs: `single` generates frame by frame, `chunks` two frames at a time."""
    folder = tmp_path_factory.mktemp("runs")
    for name, recipe in (("single", run_files.RECIPE), ("chunks", CHUNKS)):
        run = run_files.new_run(folder / name, recipe)
        run_files.train(run)
    single = folder / "single"
    run_files.train(single, run_files.Training(stage="teacher"))
    run_files.train(single, run_files.Training(stage="few_step"))
    run_files.train(single, run_files.Training(arm="baseline", seed=6, cycle=2, average=False))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.mp4"))}


def pictures(folder: Path) -> dict[str, bytes]:
    """What the files show, without what they say about themselves."""
    return {path.name: video_files.read_mp4(path)[0].numpy().tobytes() for path in sorted(folder.glob("*.mp4"))}


def manifest(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "manifest.json").read_text())


# --- what is made --------------------------------------------------------------------------------------------


def test_videos_of_a_run_and_what_is_said_about_them(mirai: Mirai, runs: Path) -> None:
    assert mirai(runs / "chunks", "--prompts", "prompts.txt", "--out", "out", "--seed", 4, "--samples", 2) == 0
    out = mirai.folder / "out"
    assert sorted(contents(out)) == sorted(f"{prompt}-{i}.mp4" for prompt in PROMPTS for i in range(2))
    for prompt in PROMPTS:
        frames, fps = video_files.read_mp4(out / f"{prompt}-0.mp4")
        assert frames.shape[0] == 13 and fps == 16
    about = manifest(out)
    assert (about["which"], about["kind"], about["cycle"], about["window"], about["sink"]) == ("ema", "dmd", 4, 0, 0)
    assert about["weights"].endswith("stages/distil/foresight/seed-5/checkpoints/cycle-000004-position-0")
    assert (about["seed"], about["latent_frames"], about["fps"], about["steps"]) == (4, 4, 16, "[1000, 500]")
    seeds = [video["seed"] for video in about["videos"].values()]
    assert len(set(seeds)) == 6
    note = video_files.read_metadata(out / f"{PROMPTS[1]}-1.mp4")
    assert note["title"] == PROMPTS[1]
    assert json.loads(note["comment"])["seed"] == about["videos"][f"{PROMPTS[1]}-1.mp4"]["seed"]
    lines = mirai.out.splitlines()
    assert "6 videos to out" in lines[0] and "4 latent frames = 13 pixel frames at 16 fps, no window" in lines[1]
    assert sum("13 frames in" in line and "frames/s, latency" in line for line in lines) == 6
    assert "medians of 5 videos" in mirai.out
    measured = json.loads((out / "timing.json").read_text())
    assert measured["counted"] == 5
    warm = [name for name, record in measured["videos"].items() if record["warm_up"]]
    assert warm == [f"{PROMPTS[0]}-0.mp4"]
    record = measured["videos"][f"{PROMPTS[2]}-1.mp4"]
    assert record["pixel_frames"] == 13
    assert 0 < record["latency"] < record["generation"] and record["latency"] < record["first_frame"]
    assert record["first_frame"] < record["text"] + record["generation"] + record["decoding"]
    assert set(measured["medians"]) >= {"latency_seconds", "frames_per_second", "frames_per_second_with_vae"}


def test_the_file_holds_the_frames_of_the_iterator(mirai: Mirai, runs: Path) -> None:
    assert mirai(runs / "chunks", "--prompts", "prompts.txt", "--out", "out", "--seconds", 1) == 0
    made = opened(Wish(runs / "chunks", seconds=1))
    seed = manifest(mirai.folder / "out")["videos"][f"{PROMPTS[1]}-0.mp4"]["seed"]
    frames = torch.stack(list(made.sampler.frames(made.text.encode([PROMPTS[1]]), seed)))
    expected = mirai.folder / "expected.mp4"
    video_files.write_mp4(expected, video_files.to_uint8(frames), 16)
    written, _ = video_files.read_mp4(mirai.folder / "out" / f"{PROMPTS[1]}-0.mp4")
    assert written.shape[0] == 21  # one second and the shortest rest of a segment
    assert torch.equal(written, video_files.read_mp4(expected)[0])


def test_long_videos_slide_a_window_with_sinks(mirai: Mirai, runs: Path) -> None:
    assert mirai(runs / "single", "--prompts", "prompts.txt", "--out", "out", "--seconds", 2) == 0
    about = manifest(mirai.folder / "out")
    assert (about["latent_frames"], about["window"], about["sink"]) == (9, 3, 1)
    assert "window 3, sink 1; cache of 2 latent frames" in mirai.out
    words = ("--prompts", "prompts.txt", "--seconds", 2)
    assert mirai(runs / "single", *words, "--out", "wide", "--window", 5, "--sink", 2) == 0
    assert "window 5, sink 2; cache of 4 latent frames" in mirai.out
    assert mirai(runs / "single", *words, "--out", "all", "--window", 0) == 0
    assert "no window; cache of 8 latent frames" in mirai.out
    out, wide, everything = (pictures(mirai.folder / folder) for folder in ("out", "wide", "all"))
    assert all(len({out[name], wide[name], everything[name]}) == 3 for name in out)


def test_two_ranks_make_what_one_makes(mirai: Mirai, runs: Path) -> None:
    words = (runs / "chunks", "--prompts", "prompts.txt", "--samples", 2, "--grid", "--out")
    assert mirai(*words, "one") == 0
    assert mirai(*words, "two", rank=(1, 2)) == 0  # the later one first: nobody waits for anybody
    assert list(contents(mirai.folder / "two")) == sorted(f"{prompt}-1.mp4" for prompt in PROMPTS)
    assert mirai(*words, "two", rank=(0, 2)) == 0
    assert contents(mirai.folder / "one") == contents(mirai.folder / "two")  # the grid among them
    assert "grid.mp4" in contents(mirai.folder / "two")
    one, two = manifest(mirai.folder / "one"), manifest(mirai.folder / "two")
    assert one == two
    measured = json.loads((mirai.folder / "two" / "timing.json").read_text())
    assert len(measured["videos"]) == 6 and measured["counted"] == 4


def test_what_is_there_is_not_made_again(mirai: Mirai, runs: Path) -> None:
    words = (runs / "chunks", "--prompts", "prompts.txt", "--out", "out")
    assert mirai(*words) == 0
    out = mirai.folder / "out"
    whole = contents(out)
    kept, lost = (out / f"{prompt}-0.mp4" for prompt in PROMPTS[:2])
    kept.write_bytes(b"somebody's")
    lost.unlink()
    lost.with_name(lost.name + ".new").write_bytes(b"half a video")  # as an interrupted command leaves it
    assert mirai(*words, "--samples", 2) == 0
    assert kept.read_bytes() == b"somebody's" and lost.read_bytes() == whole[lost.name]
    assert len(contents(out)) == 6 and not list(out.glob("*.new"))
    assert len(json.loads((out / "timing.json").read_text())["videos"]) == 6
    before = {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert mirai(*words, "--samples", 2) == 0
    assert "every video of this rank is there already" in mirai.out
    assert {path: path.stat().st_mtime_ns for path in out.glob("*.mp4")} == before


def test_a_video_does_not_depend_on_the_others(mirai: Mirai, runs: Path) -> None:
    words = (runs / "single", "--samples", 2, "--out")
    assert mirai(*words, "all", "--prompts", "prompts.txt") == 0
    (mirai.folder / "one.txt").write_text(PROMPTS[0])
    assert mirai(*words, "alone", "--prompts", "one.txt") == 0
    alone = contents(mirai.folder / "alone")
    assert len(alone) == 2 and alone.items() <= contents(mirai.folder / "all").items()
    assert mirai(*words, "other", "--prompts", "one.txt", "--seed", 1) == 0
    first, second = pictures(mirai.folder / "alone").values()
    assert first != second
    assert {first, second}.isdisjoint(pictures(mirai.folder / "other").values())


def test_names_of_extended_captions_are_the_short_prompts(mirai: Mirai, runs: Path) -> None:
    (mirai.folder / "short.txt").write_text("circle\nsquare/1\ncircle\n")
    words = (runs / "chunks", "--prompts", "prompts.txt", "--names", "short.txt", "--out", "out")
    assert mirai(*words) == 0
    names = [video_files.vbench_name(name, 0) for name in ("circle", "square/1")]
    assert sorted(contents(mirai.folder / "out")) == sorted(names)
    assert "1 videos would repeat the name of an earlier line" in mirai.out
    assert mirai(runs / "chunks", "--prompts", "prompts.txt", "--out", "plain") == 0
    plain = contents(mirai.folder / "plain")
    for line, name in enumerate(names):  # generated from the caption of the same line
        assert video_files.read_metadata(mirai.folder / "out" / name)["title"] == PROMPTS[line]
        ours, _ = video_files.read_mp4(mirai.folder / "out" / name)
        assert torch.equal(ours, video_files.read_mp4(mirai.folder / "plain" / f"{PROMPTS[line]}-0.mp4")[0])
    assert len(plain) == 3


def test_images_are_first_frames(mirai: Mirai, runs: Path) -> None:
    images = mirai.folder / "images"
    images.mkdir()
    for line, colour in enumerate(("red", "lime", "blue")):
        Image.new("RGB", (50, 40), colour).save(images / f"{line}.png")
    words = (runs / "single", "--prompts", "prompts.txt", "--images", images, "--out")
    assert mirai(*words, "out") == 0
    for line, prompt in enumerate(PROMPTS):
        frames, _ = video_files.read_mp4(mirai.folder / "out" / f"{prompt}-0.mp4")
        assert frames.shape[0] == 9
        assert frames[0].float().mean((0, 1)).argmax() == line  # the colour that the picture has
    assert manifest(mirai.folder / "out")["images"] == str(images)
    line = mirai.refused(runs / "chunks", "--prompts", "prompts.txt", "--images", images, "--out", "no")
    assert line.startswith("--images: image-to-video needs a frame-wise generator; video.frames_per_segment is 2")
    (images / "1.png").unlink()
    assert "1.png is missing, the first frame of prompt 1 (line 2)" in mirai.refused(*words, "no")
    (images / "1.png").write_bytes(b"no picture")
    assert "1.png: cannot be read as a picture" in mirai.refused(*words, "broken")
    assert mirai.refused(*words[:-2], mirai.folder / "prompts.txt", "--out", "no").endswith("1.png, ...")


def test_a_quick_look(mirai: Mirai, runs: Path) -> None:
    assert mirai(runs / "chunks", "--prompts", "prompts.txt", "--out", "out", "--gif", "--grid") == 0
    out = mirai.folder / "out"
    assert sorted(path.name for path in out.glob("*.gif")) == sorted(["grid.gif", *(f"{p}-0.gif" for p in PROMPTS)])
    with Image.open(out / f"{PROMPTS[0]}-0.gif") as gif:
        assert getattr(gif, "n_frames", 1) == 13
    assert video_files.read_mp4(out / "grid.mp4")[0].shape[0] == 13


# --- what is sampled -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "place", "which"),
    [
        ([], "distil/foresight/seed-5", "ema"),
        (["--which", "raw"], "distil/foresight/seed-5", "raw"),
        (["--arm", "baseline", "--training-seed", "6", "--which", "raw"], "distil/baseline/seed-6", "raw"),
        (["--stage", "few_step"], "few_step", "ema"),
    ],
)
def test_which_training_and_which_weights(mirai: Mirai, runs: Path, words: list[str], place: str, which: str) -> None:
    assert mirai(runs / "single", "--prompts", "prompts.txt", "--out", "out", *words) == 0
    about = manifest(mirai.folder / "out")
    assert f"stages/{place}/checkpoints/" in about["weights"] and about["which"] == which


def test_a_checkpoint_is_sampled_where_it_is_and_where_it_was_taken(mirai: Mirai, runs: Path) -> None:
    assert mirai(runs / "chunks", "--prompts", "prompts.txt", "--out", "run") == 0
    (checkpoint,) = (runs / "chunks").glob("stages/distil/foresight/seed-5/checkpoints/*")
    assert mirai(checkpoint, "--prompts", "prompts.txt", "--out", "named") == 0
    copied = shutil.copytree(checkpoint, mirai.folder / "moved")
    words = (copied, "--prompts", "prompts.txt", "--recipe", runs / "chunks" / "recipe.yaml", "--out", "moved.out")
    assert mirai(*words) == 0
    made = contents(mirai.folder / "run")
    assert made == contents(mirai.folder / "named") == contents(mirai.folder / "moved.out")


def published(folder: Path, values: dict[str, torch.Tensor]) -> Path:
    """A .pt file of a generator that does not say how it was trained."""
    return wan_files.pt(folder / "weights.pt", values, "bare")


def test_published_weights_sample_as_the_checkpoint_they_are_of(mirai: Mirai, tmp_path: Path) -> None:
    run = run_files.new_run(tmp_path / "run", CHUNKS)
    values = run_files.train(run)
    assert mirai(run, "--prompts", "prompts.txt", "--out", "run", "--which", "raw") == 0
    file = published(tmp_path, values["raw"])
    words = (file, "--prompts", "prompts.txt", "--recipe", run / "recipe.yaml", "--which", "raw")
    assert mirai(*words, "--out", "file", "--kind", "dmd") == 0
    assert pictures(tmp_path / "run") == pictures(tmp_path / "file")
    about = manifest(tmp_path / "file")
    assert about["kind"] == "dmd" and about["weights_digest"] and about["cycle"] is None
    assert "declare it" in mirai.refused(*words, "--out", "no")
    # the same folder goes on with the same weights only
    other = {name: value + 0.01 for name, value in values["raw"].items()}
    file.unlink()
    published(tmp_path, other)
    assert "weights_digest is " in mirai.refused(*words, "--out", "file", "--kind", "dmd")


# --- what can be wrong ---------------------------------------------------------------------------------------

OF_WEIGHTS = f"""
{run_files.RECIPE.partition("stages:")[0]}
data: {{prompts: prompts.txt}}
weights: {{start: {{path: bare.pt, kind: KIND}}, big: {{path: big.pt, kind: diffusion}}}}
stages:
  distil: {{kind: dmd, parent: start, teacher: big, cycles: 9, batch: {{global_size: 4}}, optimizer: {{lr: 1.0e-3}}}}
""".replace("text: {dim: 7", "text: {encoder: store, path: embeddings, dim: 7")

Wrong = tuple[list[str], str]
BASE = ("--prompts", "prompts.txt", "--out", "out")


WRONG: list[Wrong] = [
    (["nowhere"], "nowhere: does not exist; name a run directory"),
    (["RUNS"], "no recipe.yaml"),
    (["RUNS/single", "--prompts", "none.txt"], "none.txt: no such prompt file"),
    (["RUNS/single", "--prompts", "RUNS"], "is a folder"),
    (["RUNS/single", "--prompts", "empty.txt"], "empty.txt: is empty"),
    (["RUNS/single", "--prompts", "gap.txt"], "gap.txt: line 2 is empty"),
    (["RUNS/single", "--prompts", "latin.txt"], "not UTF-8"),
    (["RUNS/single", "--prompts", "binary.txt"], "NUL byte"),
    (["RUNS/single", "--prompts", "strange.txt"], "strange.txt: line 2: unknown word 'purple' in prompt"),
    (["RUNS/single", "--prompts", "long.txt"], "long.txt: line 1: prompt"),
    (["RUNS/single", "--names", "one.txt"], "one.txt: names 1 prompts, and prompts.txt holds 3"),
    (["RUNS/single", "--names", "none.txt"], "none.txt: no such prompt file"),
    (["RUNS/single", "--out", "prompts.txt"], "prompts.txt: cannot be made"),
    (["RUNS/single", "--samples", "0"], "--samples: 0 videos a prompt"),
    (["RUNS/single", "--seconds", "0"], "--seconds: 0 is no length"),
    (["RUNS/single", "--seconds", "-3"], "--seconds: -3 is no length"),
    (["RUNS/single", "--seconds", "nan"], "--seconds: nan is no length"),
    (["RUNS/single", "--seconds", "1000"], "--seconds: 1000 s are 4001 latent frames"),
    (["RUNS/single", "--stage", "teacher"], "is of kind diffusion (bidirectional diffusion model)"),
    (["RUNS/single", "--stage", "last"], "no stage last"),
    (["RUNS/single", "--stage", "ar_teacher"], "holds no checkpoint"),
    (["RUNS/single", "--arm", "none"], "no arm none; it has baseline, foresight"),
    (["RUNS/single", "--training-seed", "7"], "was not trained with seed 7"),
    (["RUNS/single", "--stage", "few_step", "--arm", "baseline"], "has no arms"),
    (["RUNS/single", "--arm", "baseline"], "holds no checkpoint"),
    (["RUNS/single", "--arm", "baseline", "--training-seed", "6"], "no average of the generator"),
    (["RUNS/single", "--recipe", "RUNS/single/recipe.yaml"], "has a recipe of its own; leave --recipe out"),
    (["RUNS/single", "--kind", "dmd"], "records what it is (dmd); leave --kind out"),
    (["RUNS/chunks", "--window", "5"], "rollout.window_frames 5 is not a whole number of segments of 2 frames"),
    (["RUNS/chunks", "--window", "-2"], "rollout.window_frames"),
    (["RUNS/chunks", "--window", "2"], "cannot hold the present segment (2) and any earlier frame"),
    (["RUNS/chunks", "--window", "4", "--sink", "3"], "rollout.sink_frames 3 is not a whole number"),
    (["RUNS/chunks", "--window", "4", "--sink", "4"], "cannot hold the present segment (2) and any earlier frame"),
    (["RUNS/chunks", "--sink", "2"], "rollout.sink_frames has no effect without rollout.window_frames"),
    (["RUNS/single", "generator.dims=3"], "generator.dims"),
    (["RUNS/single", "generator.dim=40"], "has shape"),
    (["RUNS/single", "generator.dim=30"], "cannot be split into rotary pairs"),
    (["RUNS/single", "generator.blocks=3"], "is missing from the checkpoint"),
    (["RUNS/single", "text.encoder=umt5", "text.path=nothing"], "nothing"),
    (["RUNS/single", "text.encoder=umt5"], "text.path is missing"),
    (["bare.pt", "--recipe", "store.yaml", "--which", "raw"], "or encode these prompts here: text.encoder=umt5"),
    (["RUNS/single", "--images", "nowhere"], "nowhere: is no folder; --images"),
    (["one.txt", "--recipe", "RUNS/single/recipe.yaml", "--which", "raw"], "one.txt: is "),
    (["one.txt"], "one.txt: holds weights and no recipe; say shape, text, VAE and steps with --recipe"),
    (["good.pt", "--recipe", "none.yaml"], "none.yaml"),
    (["good.pt", "--recipe", "one.txt"], "one.txt"),
    (["good.pt", "--recipe", "RUNS/single/recipe.yaml", "--stage", "distil"], "--stage: good.pt holds weights"),
    (["good.pt", "--recipe", "RUNS/single/recipe.yaml", "--arm", "foresight"], "--arm: good.pt holds weights"),
    (["good.pt", "--recipe", "RUNS/single/recipe.yaml", "--which", "raw"], "good.pt: does not fit the recipe: dim"),
    (["bare.pt", "--recipe", "RUNS/single/recipe.yaml", "--which", "raw"], "does not record what its weights are"),
    (["bare.pt", "--recipe", "diffusion.yaml", "--which", "raw"], "is of kind diffusion"),
    (["plain.pt", "--recipe", "RUNS/single/recipe.yaml", "--kind", "cd"], "raw weights with --which raw"),
    (["plain.pt", "--recipe", "RUNS/single/recipe.yaml", "--kind", "cd", "--which", "raw"], "plain.pt"),
    (["short.pt", "--recipe", "RUNS/single/recipe.yaml", "--kind", "cd", "--which", "raw"], "short.pt"),
    (["official", "--recipe", "RUNS/single/recipe.yaml", "--which", "raw"], "is of kind diffusion"),
    (["single.safetensors", "--recipe", "RUNS/single/recipe.yaml", "--kind", "dmd"], "raw weights with --which raw"),
]


@pytest.mark.parametrize(("case", "line"), WRONG, ids=[" ".join(case) for case, _ in WRONG])
def test_wrong_input_is_one_line_and_makes_nothing(mirai: Mirai, runs: Path, case: list[str], line: str) -> None:
    folder = mirai.folder
    (folder / "one.txt").write_text(PROMPTS[0])
    (folder / "empty.txt").write_text("")
    (folder / "gap.txt").write_text(f"{PROMPTS[0]}\n\n{PROMPTS[1]}\n")
    (folder / "latin.txt").write_bytes(b"a red caf\xe9\n")
    (folder / "binary.txt").write_bytes(b"a\0b\n")
    (folder / "strange.txt").write_text(f"{PROMPTS[0]}\na purple circle moving left\n")
    (folder / "long.txt").write_text("a red circle moving left left left\n")
    tensors = wan_files.tiny_tensors()
    if case[0].endswith(".pt"):
        for name, style in (("good.pt", "self-forcing"), ("plain.pt", "causal-forcing"), ("bare.pt", "bare")):
            wan_files.pt(folder / name, tensors, style)
        (folder / "short.pt").write_bytes((folder / "plain.pt").read_bytes()[:-5000])
        (folder / "store.yaml").write_text(OF_WEIGHTS.replace("KIND", "cd"))
        (folder / "diffusion.yaml").write_text(OF_WEIGHTS.replace("KIND", "diffusion"))
    if "official" in case:
        wan_files.official(folder / "official", tensors)
    if "single.safetensors" in case:
        save_file(tensors, folder / "single.safetensors")
    source, *rest = (word.replace("RUNS", str(runs)) for word in case)
    said = mirai.refused(source, *BASE, *rest)  # of an option given twice the later one counts
    assert line in said
    assert not list(folder.glob("out/*.mp4"))


FIELDS: dict[str, Callable[[Path], list[object]]] = {
    "seed": lambda runs: ["--seed", 1],
    "prompts": lambda runs: ["--prompts", "other.txt"],
    "names": lambda runs: ["--names", "other.txt"],
    "images": lambda runs: ["--images", "images"],
    "which": lambda runs: ["--which", "raw"],
    "latent_frames": lambda runs: ["--seconds", 1],
    "window": lambda runs: ["--window", 3],
    "fps": lambda runs: ["video.fps=8"],
    "steps": lambda runs: ["rollout.steps=[1000,250]"],
    "shift": lambda runs: ["flow.shift=3"],
    "recipe": lambda runs: ["rollout.context_timestep=10"],
    "kind": lambda runs: ["--stage", "few_step"],
}


def test_a_folder_of_other_videos_is_refused_with_the_field_that_differs(mirai: Mirai, runs: Path) -> None:
    images = mirai.folder / "images"
    images.mkdir()
    for line in range(3):
        Image.new("RGB", (32, 32)).save(images / f"{line}.png")
    (mirai.folder / "other.txt").write_text("\n".join(reversed(PROMPTS)))
    assert mirai(runs / "single", *BASE) == 0
    before = contents(mirai.folder / "out"), manifest(mirai.folder / "out")
    for field, change in FIELDS.items():
        line = mirai.refused(runs / "single", *BASE, *change(runs))
        assert line.startswith("out/manifest.json: ") and f"{field} is " in line and "now; name another folder" in line
    assert before == (contents(mirai.folder / "out"), manifest(mirai.folder / "out"))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"videos": 3}', "null"])
def test_a_damaged_manifest_is_one_line(mirai: Mirai, runs: Path, text: str) -> None:
    (mirai.folder / "out").mkdir()
    (mirai.folder / "out" / "manifest.json").write_text(text)
    assert mirai.refused(runs / "single", *BASE).startswith("out/manifest.json: ")


def test_a_damaged_checkpoint_and_weights_that_are_not_finite_are_one_line(mirai: Mirai, tmp_path: Path) -> None:
    run = run_files.new_run(tmp_path / "run", CHUNKS)
    values = run_files.train(run)["raw"]
    broken = {name: value.clone() for name, value in values.items()}
    broken["head.head.bias"][0] = float("inf")
    words = ("--recipe", run / "recipe.yaml", "--which", "raw", "--kind", "dmd", *BASE)
    assert "holds NaN or infinite values" in mirai.refused(published(tmp_path, broken), *words)
    (file,) = run.glob("stages/distil/foresight/seed-5/checkpoints/*/tensors/*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    assert "checkpoint" in mirai.refused(run, *BASE)


def test_a_network_that_explodes_is_one_line(mirai: Mirai, tmp_path: Path) -> None:
    run = run_files.new_run(tmp_path / "run", CHUNKS)
    values = run_files.train(run)["raw"]
    huge = {name: value * 1e30 if name == "head.head.weight" else value for name, value in values.items()}
    huge["patch_embedding.weight"] = huge["patch_embedding.weight"] * 1e30
    words = ("--recipe", run / "recipe.yaml", "--which", "raw", "--kind", "dmd", *BASE)
    line = mirai.refused(published(tmp_path, huge), *words)
    assert "generates values that are not finite" in line and "these weights are damaged" in line
    assert not list((tmp_path / "out").glob("*.mp4*"))


def test_nothing_is_loaded_before_the_rest_is_looked_at(
    mirai: Mirai, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: object) -> None:
        raise AssertionError("loaded")

    monkeypatch.setattr(generator, "load_network", load)
    assert mirai.refused(runs / "single", *BASE, "--prompts", "none.txt").startswith("none.txt")
    assert mirai.refused(runs / "single", *BASE, "--images", "none").startswith("none")
    with pytest.raises(AssertionError, match="loaded"):
        opened(Wish(runs / "single"))
