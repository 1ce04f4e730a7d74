"""The shipped recipes: each resolves and splits, and those of Wan hold the constants of the published runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from mirai_dist.config import load
from mirai_dist.config.digest import diff, flatten
from mirai_dist.config.schema import Recipe
from mirai_launch.__main__ import main
from tests import shipped

ROOT = Path(__file__).parents[2]
SHIPPED = [path.relative_to(ROOT).as_posix() for path in shipped.SHIPPED]
WAN = [path for path in SHIPPED if path.startswith("recipes/wan/")]

# What all published runs share. A step of theirs is one critic update, and every fifth follows a generator update.
SHARED: dict[str, Any] = {
    # 832 x 480, 81 frames at 16 fps through a VAE of stride 8, 8, 4 with the first frame alone
    "video.latent_frames": 1 + (81 - 1) // 4, "video.channels": 16, "video.fps": 16,
    "video.latent_width": 832 // 8, "video.latent_height": 480 // 8,
    "text.dim": 4096, "text.length": 512, "text.encoder": "store", "vae.kind": "wan",
    # Wan2.1 14B, 1.3B, 1.3B
    "teacher.dim": 5120, "teacher.ffn_dim": 13824, "teacher.heads": 40, "teacher.blocks": 40,
    "generator.dim": 1536, "generator.ffn_dim": 8960, "generator.heads": 12, "generator.blocks": 30,
    "critic.dim": 1536, "critic.ffn_dim": 8960, "critic.heads": 12, "critic.blocks": 30,
    "teacher.freq_dim": 256, "generator.freq_dim": 256, "critic.freq_dim": 256,
    "flow.shift": 5.0, "rollout.steps": [1000, 750, 500, 250], "rollout.context_timestep": 0.0,
    "rollout.window_frames": 0, "rollout.kv_grad": "detached",
    "dmd.guidance": 3.0, "dmd.min_timestep": 20.0, "dmd.max_timestep": 980.0, "dmd.critic_updates": 5,
    "dmd.critic_optimizer.lr": 4e-7, "stages.distil.optimizer.lr": 2e-6, "foresight.optimizer.lr": 2e-6,
    **{f"{of}.{key}": value
       for of in ("dmd.critic_optimizer", "stages.distil.optimizer", "foresight.optimizer")
       for key, value in {"beta1": 0.0, "beta2": 0.999, "weight_decay": 0.01, "clip_norm": 10.0,
                          "schedule": "constant", "warmup": 0}.items()},
    "foresight.offsets": [0, 1], "foresight.depth": 0.5, "foresight.predictor_blocks": 3,
    "foresight.encoder_attention": "bidirectional", "foresight.targets": "rollout",
    "stages.distil.kind": "dmd", "stages.distil.batch.global_size": 64, "stages.distil.batch.micro_size": 1,
    "stages.distil.parent": "start", "stages.distil.teacher": "teacher", "stages.distil.critic": "base",
    "weights.start.kind": "ode", "weights.teacher.kind": "diffusion", "weights.base.kind": "diffusion",
    "weights.teacher.path": "models/Wan2.1-T2V-14B", "weights.base.path": "models/Wan2.1-T2V-1.3B",
    "parallel.compute_dtype": "bfloat16", "parallel.recompute": "block",
}  # fmt: skip
# mode: frames a segment, steps, last steps with foresight, step at which the average is created, steps between saves,
# where the generator starts
MODES = {
    "causal-forcing-chunkwise": (3, 100, 100, None, 100, "chunkwise/causal_ode.pt"),
    "causal-forcing-framewise": (1, 500, 100, 200, 250, "framewise/causal_ode.pt"),
    "self-forcing": (3, 600, 100, 200, 50, "ode_init.pt"),
}
# layout: replicas of a shard group, micro-batches accumulated, of which each draws its exit step
LAYOUTS = {"1x8": (1, 8), "8x8": (8, 1)}
NAMES = {
    "causal-forcing-chunkwise-mirai-1x8", "causal-forcing-chunkwise-mirai-8x8", "causal-forcing-framewise-mirai-8x8",
    "self-forcing-mirai-8x8", "causal-forcing-chunkwise-dmd-1x8", "causal-forcing-chunkwise-dmd-8x8",
    "causal-forcing-framewise-dmd-8x8", "self-forcing-dmd-8x8",
}  # fmt: skip


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def ranks(path: str) -> int:
    """Nodes times GPUs, of the name; two where it says nothing."""
    layout = re.search(r"-(\d+)x(\d+)\.yaml$", path)
    return int(layout[1]) * int(layout[2]) if layout else 2


def recipe(path: str) -> Recipe:
    return load(path).recipe


def test_what_is_shipped() -> None:
    assert {Path(path).stem for path in WAN} == NAMES
    assert "recipes/tiny/video_mirai.yaml" in SHIPPED


@pytest.mark.parametrize("path", SHIPPED)
def test_it_resolves_and_splits_over_its_ranks(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", path, "--ranks", str(ranks(path))]) == 0
    assert main(["check", path]) == 0
    assert not capsys.readouterr().err
    if path in WAN:
        assert recipe(path).name == Path(path).stem  # the run directory says which recipe it is of


@pytest.mark.parametrize("path", WAN)
def test_the_constants_are_those_of_the_published_runs(path: str) -> None:
    found = flatten(recipe(path))
    assert {key: found[key] for key in SHARED} == SHARED
    mode, method, layout = Path(path).stem.rsplit("-", 2)
    segment, steps, foresight_steps, average_step, save_steps, start = MODES[mode]
    replicas, accumulated = LAYOUTS[layout]
    assert found["video.frames_per_segment"] == segment
    assert found["stages.distil.cycles"] * found["dmd.critic_updates"] == steps
    assert save_steps % (found["checkpoint.every_cycles"] * 5) == 0  # ours are at least where the release has its own
    assert found["weights.start.path"].endswith(start)
    assert found["parallel.replicas"] == replicas
    assert found["rollout.exit_groups"] == accumulated
    assert found["stages.distil.batch.global_size"] == ranks(path) * accumulated
    if average_step is None:  # never created in so few steps
        assert found["stages.distil.ema.decay"] == 0
    else:
        assert found["stages.distil.ema.decay"] == 0.99
        assert found["stages.distil.ema.start_update"] * 5 == average_step
    assert (found["stages.distil.cycles"] - found["foresight.start_cycle"]) * 5 == foresight_steps
    assert found["foresight.weight"] == {"mirai": 0.2, "dmd": 0.0}[method]
    assert recipe(path).study.arms == {{"mirai": "foresight", "dmd": "baseline"}[method]: []}


@pytest.mark.parametrize("path", [path for path in WAN if "-dmd-" in path])
def test_a_baseline_differs_by_foresight_alone(path: str) -> None:
    lines = diff(recipe(path), recipe(path.replace("-dmd-", "-mirai-")))
    assert {line.partition(":")[0] for line in lines} == {
        "name", "foresight.weight", "study.arms.baseline", "study.arms.foresight"}


@pytest.mark.parametrize("path", [path for path in WAN if path.endswith("-1x8.yaml")])
def test_layouts_differ_in_nothing_that_is_learned_but_the_exit_draws(path: str) -> None:
    lines = diff(recipe(path), recipe(path.replace("1x8", "8x8")))
    assert {line.partition(":")[0] for line in lines} == {"name", "parallel.replicas", "rollout.exit_groups"}


@pytest.mark.parametrize("path", SHIPPED)
def test_an_average_that_is_asked_for_comes_to_exist(path: str) -> None:
    for stage in recipe(path).stages.values():
        assert stage.ema.decay == 0 or stage.ema.start_update < stage.cycles


@pytest.mark.parametrize("path", WAN)
def test_a_missing_file_is_one_line_before_anything_starts(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Relative paths start where the command runs; the line names the key, where it is written, and the way out."""
    monkeypatch.chdir(tmp_path)
    files = {key: value for key, value in flatten(load(ROOT / path).recipe).items() if key.endswith(".path")}
    files["data.prompts"] = "data/vidprom_filtered_extended.txt"
    assert files.keys() == {"data.prompts", "text.path", "vae.path",
                            "weights.start.path", "weights.teacher.path", "weights.base.path"}
    for key, file in files.items():
        present = tmp_path / "present"
        present.touch()
        others = [f"{other}={present}" for other in files if other != key]
        assert main(["train", str(ROOT / path), "--nproc", "8", *others]) == 20
        [line] = capsys.readouterr().err.splitlines()
        assert re.match(rf"mirai: \S*recipes/\S+\.yaml:\d+: {re.escape(key)}: {re.escape(file)} does not exist", line)
        assert str(tmp_path / file) in line and line.endswith(f"set it with {key}=PATH")
    assert sorted(tmp_path.iterdir()) == [tmp_path / "present"]


def test_the_readme_lists_them_all() -> None:
    text = (ROOT / "recipes/README.md").read_text()
    assert set(re.findall(r"\| `wan/([\w-]+)\.yaml` \|", text)) == NAMES


def test_all_missing_files_are_named_at_once(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """A lab that brings files should not learn of them one start at a time."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(ROOT / "recipes/wan/self-forcing-mirai-8x8.yaml"), "--nproc", "8"]) == 20
    [line] = capsys.readouterr().err.splitlines()
    for path in ("models/Wan2.1-T2V-14B", "data/vidprom-embeddings", "models/self-forcing/checkpoints/ode_init.pt"):
        assert path in line
