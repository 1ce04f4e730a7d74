"""`mirai shrink`: what a twin keeps, what shrinks, and the files it comes with."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from mirai_dist.commands import arguments, shrink, twin_files
from mirai_dist.commands.entry import outcome
from mirai_dist.commands.twin import ranks_of, twin
from mirai_dist.config import FileError, RecipeError, load
from mirai_dist.config.digest import digest, flatten
from mirai_dist.config.kinds import refusal
from mirai_dist.config.rules import check_layout
from mirai_dist.config.schema import Recipe
from mirai_dist.data.embeddings import EmbeddingStore
from mirai_dist.data.latents import EMBEDDINGS, LatentStore
from mirai_dist.data.prompts import PromptFile
from mirai_dist.evaluate.world_metrics import LEAST_FRAMES
from mirai_dist.method.foresight import PRESETS, captured_blocks
from mirai_dist.models.wan.keys import shapes_of
from mirai_dist.models.wan_vae import WanVae
from mirai_dist.weights.files import open_weights
from tests.shipped import SHIPPED

ROOT = Path(__file__).parents[2]
CHUNKWISE = ROOT / "recipes/wan/causal-forcing-chunkwise-mirai-1x8.yaml"
FRAMEWISE = ROOT / "recipes/wan/causal-forcing-framewise-mirai-8x8.yaml"
CHAIN = ROOT / "recipes/chains/chunkwise-ode-8x8.yaml"
TINY = ROOT / "recipes/tiny/video_mirai.yaml"
# WanShape and places. Everything else must stay.
MAY_DIFFER = (
    "name", "video.latent_frames", "video.latent_height", "video.latent_width", "world.speed", "world.radius",
    "world.radius_jitter", "text.dim", "text.length", "teacher.", "generator.", "critic.", "evaluate.",
    "data.prompts", "data.latents", "text.path", "vae.path", "rollout.window_frames", "rollout.sink_frames",
    "foresight.start_cycle", "parallel.replicas", "checkpoint.every_cycles", "study.seeds", "ode.points",
    "ode.shard_size",
)  # fmt: skip
MAY_DIFFER_BELOW = (
    ".cycles", ".batch.global_size", ".batch.micro_size", ".ema.start_update", ".warmup", ".path", ".trajectories",
    ".overrides", ".gate.clips", ".gate.failing",
)  # fmt: skip


def small(path: Path, *overrides: str, ranks: int | None = None) -> tuple[Recipe, Recipe]:
    """(recipe, twin) with the study's arms compared by themselves."""
    resolved = load(path, overrides)
    return resolved.recipe, twin(resolved, ranks_of(path, ranks), Path("/twin"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_twin_keeps_all_but_sizes(path: Path) -> None:
    recipe, tiny = small(path)
    before, after = flatten(recipe), flatten(tiny)
    assert before.keys() == after.keys()
    changed = {key for key in before if before[key] != after[key] and not key.startswith("study.arms.")}
    assert not {key for key in changed if not key.startswith(MAY_DIFFER) and not key.endswith(MAY_DIFFER_BELOW)}
    assert {"generator.dim", "teacher.dim", "video.latent_frames"} <= changed
    assert check_layout(tiny, 2) == check_layout(recipe, ranks_of(path, None))


def test_stages_keep_their_own_overrides_at_the_twins_sizes(tmp_path: Path) -> None:
    own = "stages.frame_distil.overrides=[video.frames_per_segment=1,rollout.window_frames=4,foresight.start_cycle=5]"
    recipe = load(TINY, [own])
    tiny = load(shrink.write(recipe, 2, tmp_path / "twin") / "recipe.yaml")
    found = tiny.recipe.stages["frame_distil"].overrides
    assert found == ["video.frames_per_segment=1", "rollout.window_frames=2", "foresight.start_cycle=1"]
    assert tiny.of_stage("frame_distil_ode").recipe.rollout.first_steps == [1000, 750, 500, 250]
    assert tiny.of_stage("frame_distil_ode").recipe.rollout.steps == [1000, 500]
    assert tiny.recipe.video.latent_frames == 6 and tiny.recipe.video.frames_per_segment == 2  # whole segments of both


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_proportions_of_the_networks_stay(path: Path) -> None:
    recipe, tiny = small(path)
    arithmetic, depth = PRESETS[recipe.foresight.preset], recipe.foresight.depth
    for name in ("teacher", "generator", "critic"):
        own, other = getattr(tiny, name), getattr(recipe, name)
        read = captured_blocks(own.blocks, depth, arithmetic)
        assert read / own.blocks == captured_blocks(other.blocks, depth, arithmetic) / other.blocks
        assert own.blocks * recipe.teacher.blocks == tiny.teacher.blocks * other.blocks
        assert (own == tiny.critic) == (other == recipe.critic) and (own == tiny.teacher) == (other == recipe.teacher)
        width = own.dim // own.heads
        time, row = width - 4 * (width // 6), 2 * (width // 6)
        assert own.dim % own.heads == 0 and time > row  # time gets more channels, as in 44/42/42
    assert (tiny.generator.dim < tiny.teacher.dim) == (recipe.generator.dim < recipe.teacher.dim)


def test_a_twin_is_small() -> None:
    for path in SHIPPED:
        _, tiny = small(path)
        assert max(tiny.teacher.blocks, tiny.video.latent_frames, tiny.text.length) <= 12
        assert tiny.video.latent_height * tiny.video.latent_width <= 24 and tiny.teacher.dim <= 60
        assert all(stage.cycles == 2 for stage in tiny.stages.values())
        assert tiny.checkpoint.every_cycles == 1


def test_a_twin_runs_where_the_recipe_s_attention_may_not() -> None:
    recipe, tiny = small(CHUNKWISE, "parallel.attention=cudnn", "parallel.segment_attention=flex")
    assert (recipe.parallel.attention, recipe.parallel.segment_attention) == ("cudnn", "flex")
    assert (tiny.parallel.attention, tiny.parallel.segment_attention) == ("auto", "auto")


def test_what_begins_late_begins_between_the_two_cycles() -> None:
    _, tiny = small(FRAMEWISE)
    assert tiny.foresight.start_cycle == 1 and tiny.stages["distil"].ema.start_update == 1
    _, tiny = small(CHUNKWISE)
    assert tiny.foresight.start_cycle == 0 and tiny.stages["distil"].ema.decay == 0
    _, tiny = small(FRAMEWISE, "stages.distil.optimizer.warmup=50", "stages.distil.ema.start_update=0")
    assert tiny.stages["distil"].optimizer.warmup == 1 and tiny.stages["distil"].ema.start_update == 0


def test_segments_suffice_for_offsets_and_for_measuring() -> None:
    for overrides, frames in (
        ((), 9), (("foresight.offsets=[2]",), 12), (("foresight.offsets=[0,6]",), 21),
        (("video.frames_per_segment=1", "foresight.offsets=[0]"), 3),
        (("video.frames_per_segment=1", "foresight.offsets=[1,3]"), 5),
        (("study.arms.far=['foresight.offsets=[3]']",), 15),
    ):  # fmt: skip
        _, tiny = small(CHUNKWISE, *overrides)
        assert tiny.video.latent_frames == frames, overrides
    _, tiny = small(CHUNKWISE, "video.latent_frames=6")
    assert tiny.video.latent_frames == 6  # never more than there were
    _, tiny = small(TINY, "video.frames_per_segment=1")
    assert tiny.video.latent_frames == LEAST_FRAMES


@pytest.mark.parametrize(
    ("window", "sink", "frames", "tiny_window", "tiny_sink"),
    [(6, 0, 9, 6, 0), (15, 0, 9, 6, 0), (15, 3, 12, 9, 3), (12, 6, 12, 9, 3), (21, 0, 9, 9, 0), (21, 3, 9, 9, 3)],
)
def test_a_window_still_slides(window: int, sink: int, frames: int, tiny_window: int, tiny_sink: int) -> None:
    _, tiny = small(CHUNKWISE, f"rollout.window_frames={window}", f"rollout.sink_frames={sink}")
    found = tiny.video.latent_frames, tiny.rollout.window_frames, tiny.rollout.sink_frames
    assert found == (frames, tiny_window, tiny_sink)


@pytest.mark.parametrize(
    ("blocks", "depth", "expected"),
    [((30, 40), 0.5, (6, 8)), ((30, 40), 0.3, (30, 40)), ((30, 40), 0.8, (15, 20)), ((4, 4), 0.5, (2, 2)),
     ((30, 41), 0.5, (30, 41)), ((28, 28), 1.0, (1, 1)), ((30, 40), 0.33, (3, 4))],
)  # fmt: skip
def test_depths(blocks: tuple[int, int], depth: float, expected: tuple[int, int]) -> None:
    overrides = [f"generator.blocks={blocks[0]}", f"critic.blocks={blocks[0]}", f"teacher.blocks={blocks[1]}"]
    _, tiny = small(CHUNKWISE, *overrides, f"foresight.depth={depth}")
    assert (tiny.generator.blocks, tiny.teacher.blocks) == expected


def test_arms_keep_their_overrides_at_the_twins_sizes() -> None:
    arms = [
        "study.arms.late=['foresight.start_cycle=70','stages.distil.batch.global_size=128','dmd.guidance=${dmd.guidance}']",
        "study.arms.window=['rollout.window_frames=9']",
    ]
    _, tiny = small(FRAMEWISE, "study.arms.foresight=[]", *arms)
    assert tiny.study.arms["foresight"] == []
    late = ["foresight.start_cycle=1", "stages.distil.batch.global_size=4", "dmd.guidance=3.0"]
    assert tiny.study.arms["late"] == late
    assert tiny.study.arms["window"] == ["rollout.window_frames=2"]


@pytest.mark.parametrize(
    ("name", "asked", "ranks"),
    [("a-1x8.yaml", None, 8), ("a-8x8.yaml", None, 64), ("a.yaml", None, 2), ("a-8x8.yaml", 16, 16)],
)
def test_ranks_of_a_recipe(name: str, asked: int | None, ranks: int) -> None:
    assert ranks_of(Path("recipes") / name, asked) == ranks


@pytest.mark.parametrize(("name", "asked"), [("a-1x8.yaml", 0), ("a-1x8.yaml", -1), ("a-0x8.yaml", None)])
def test_no_ranks(name: str, asked: int | None) -> None:
    with pytest.raises(FileError, match="ranks"):
        ranks_of(Path(name), asked)


# --- files -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The twin of a recipe that starts from an average."""
    out = tmp_path_factory.mktemp("shrink") / "twin"
    return shrink.write(load(CHUNKWISE, ["weights.start.which=ema"]), 8, out)


def test_the_recipe_is_complete_and_says_where_it_is_from(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # it works from anywhere
    head = (written / "recipe.yaml").read_text().splitlines()[0]
    assert "causal-forcing-chunkwise-mirai-1x8.yaml" in head
    assert digest(load(CHUNKWISE, ["weights.start.which=ema"]).recipe) in head
    values = flatten(load(written / "recipe.yaml").recipe)
    files = {key: value for key, value in values.items() if key.endswith(".path") or key == "data.prompts"}
    assert len(files) == 6
    for file in files.values():
        assert Path(file).is_relative_to(written) and Path(file).exists()


def test_weights_have_the_layouts_of_the_published_ones(written: Path) -> None:
    recipe = load(written / "recipe.yaml").recipe
    weights = written / "weights"
    teacher = json.loads((weights / "teacher/diffusion_pytorch_model.safetensors.index.json").read_text())
    sizes = twin_files.sizes_of("teacher", recipe)
    assert teacher["weight_map"].keys() == shapes_of(sizes).keys()
    shards = sorted(path.name for path in (weights / "teacher").glob("*.safetensors"))
    assert shards == [f"diffusion_pytorch_model-0000{i}-of-00006.safetensors" for i in range(1, 7)]
    assert set(teacher["weight_map"].values()) == set(shards)
    for name, file in teacher["weight_map"].items():
        with safe_open(weights / "teacher" / file, "pt") as opened:
            tensor = opened.get_tensor(name)
        assert tuple(tensor.shape) == shapes_of(sizes)[name] and tensor.dtype == torch.float32 and tensor.any()
    assert sorted(path.name for path in (weights / "base").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]
    assert json.loads((weights / "base/config.json").read_text())["_class_name"] == "WanModel"
    start = torch.load(weights / "start.pt", weights_only=True)
    names = shapes_of(twin_files.sizes_of("start", recipe)).keys()
    assert start.keys() == {"generator", "generator_ema"}
    assert start["generator"].keys() == {f"model.{name}" for name in names}
    assert start["generator_ema"].keys() == {f"model._fsdp_wrapped_module.{name}" for name in names}
    raw, average = start["generator"]["model.head.head.weight"], start["generator_ema"]
    assert not torch.equal(raw, average["model._fsdp_wrapped_module.head.head.weight"])


def test_our_reader_takes_the_weights(written: Path) -> None:
    recipe = load(written / "recipe.yaml").recipe
    for name, layout in (("teacher", "wan"), ("base", "wan"), ("start", "pt")):
        file = open_weights(Path(recipe.weights[name].path), "ema" if name == "start" else "raw")
        assert file.layout == layout
        assert file.shapes == shapes_of(twin_files.sizes_of(name, recipe))


def test_prompts_embeddings_and_vae_are_read(written: Path) -> None:
    recipe = load(written / "recipe.yaml").recipe
    prompts = PromptFile(recipe.data.prompts)
    store = EmbeddingStore(recipe.text.path, recipe.text.length, prompts, recipe.text.dim)
    store.verify()
    assert store.size == prompts.size == 16
    found = store.embed(range(16))
    assert found.shape == (16, recipe.text.length, recipe.text.dim)
    lengths = found.abs().sum(-1).count_nonzero(1).tolist()
    assert set(lengths) == set(range(1, recipe.text.length + 1)) and store.negative().any()
    assert Path(recipe.vae.path).name == "Wan2.1_VAE.pth"
    pixels = WanVae.load(Path(recipe.vae.path), "cpu").decode(torch.randn(1, 2, 16, 4, 6))
    assert pixels.shape == (1, 5, 3, 32, 48) and pixels.isfinite().all() and pixels.std() > 0.01


@pytest.mark.parametrize("kind", ["ode", ""])
def test_a_folder_that_mirai_import_has_made(tmp_path: Path, kind: str) -> None:
    """It records its kind and that it is an average, as no official folder can."""
    overrides = ["weights.start.path=imported", f"weights.start.kind={kind}", "weights.start.which=ema"]
    out = shrink.write(load(CHUNKWISE, overrides), 8, tmp_path / "twin")
    start = load(out / "recipe.yaml").recipe.weights["start"]
    assert start.which == "ema" and refusal("dmd", "parent", start.kind) == ""
    file = open_weights(Path(start.path), "ema")
    assert file.layout == "wan" and file.kind == start.kind == (kind or start.kind)


def test_latents_are_a_store_with_embeddings(tmp_path: Path) -> None:
    out = shrink.write(load(CHAIN), 64, tmp_path / "twin")
    recipe = load(out / "recipe.yaml").recipe
    store = LatentStore(recipe.data.latents)
    video = recipe.video
    assert store.shape == (video.latent_frames, video.channels, video.latent_height, video.latent_width)
    assert not list(store.verify()) and store.size == 16
    own = EmbeddingStore(store.path / EMBEDDINGS, recipe.text.length, store.prompts, recipe.text.dim)
    own.verify()
    assert own.size == 16


def test_a_vae_folder_stays_a_folder(tmp_path: Path) -> None:
    out = shrink.write(load(CHUNKWISE, ["vae.path=vae", "weights.base.path=base.pt"]), 8, tmp_path / "twin")
    assert (out / "vae/config.json").exists() and (out / "weights/base.pt").exists()
    WanVae.load(out / "vae", "cpu")


def test_a_twin_of_the_world_needs_no_files(tmp_path: Path) -> None:
    out = shrink.write(load(TINY), 2, tmp_path / "twin")
    assert [path.name for path in out.iterdir()] == ["recipe.yaml"]


def test_two_twins_are_equal(tmp_path: Path, written: Path) -> None:
    again = shrink.write(load(CHUNKWISE, ["weights.start.which=ema"]), 8, tmp_path / "twin")
    for path in sorted(written.rglob("*.safetensors")):
        assert (again / path.relative_to(written)).read_bytes() == path.read_bytes(), path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    arguments.shrink(parser)
    return outcome("shrink", shrink.run, parser.parse_intermixed_args(words))


def test_the_command_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "twin"
    assert run(str(TINY), "study.seeds=[4]", "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert f"mirai train {out}/recipe.yaml --nproc 2" in said
    assert load(out / "recipe.yaml").recipe.study.seeds == [4]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere.yaml"], "no recipe file nowhere.yaml"),
        ([str(CHUNKWISE), "--ranks", "48"], "cannot be split over 48 ranks"),
        ([str(CHUNKWISE), "--ranks", "0"], "0 ranks cannot train anything"),
        ([str(CHUNKWISE), "foresight.wieght=1"], "did you mean foresight.weight?"),
        ([str(CHUNKWISE), "text.encoder=umt5"], "shrink with text.encoder=store"),
        ([str(CHAIN), "stages.few_step.trajectories=0", "data.ode_pairs=x"], "data.ode_pairs has no tiny twin"),
    ],
)
def test_what_is_wrong_is_one_line_and_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert run(*words, "--out", str(tmp_path / "twin")) == 20
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("mirai shrink: ") and said in line
    assert not list(tmp_path.iterdir())


def test_an_occupied_folder_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").touch()
    assert run(str(TINY), "--out", str(tmp_path)) == 20
    assert run(str(TINY), "--out", str(tmp_path / "mine")) == 20
    assert run(str(TINY), "--out", str(tmp_path / "mine" / "below")) == 20
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3 and all("mirai shrink: " in line and str(tmp_path) in line for line in lines)
    assert list(tmp_path.iterdir()) == [tmp_path / "mine"]


def test_a_failure_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(twin_files, "write_prompts", full)
    with pytest.raises(FileError, match="cannot be written: .*No space left"):
        shrink.write(load(CHUNKWISE), 8, tmp_path / "twin")
    assert not list(tmp_path.iterdir())


def test_a_recipe_that_cannot_split_has_no_twin() -> None:
    with pytest.raises(RecipeError, match="48 ranks"):
        small(CHUNKWISE, ranks=48)
