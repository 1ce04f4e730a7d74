"""The whole path of a lab, with the real commands on small files of exactly the published layouts:

    import weights -> embed prompts -> train two cycles on two ranks -> export -> sample -> videos that a player opens
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
import torch
from torch.distributed.tensor import DTensor

from mirai_dist.config import load
from mirai_dist.models.umt5 import Umt5Encoder
from mirai_dist.models.wan.keys import WanShape, shapes_of
from mirai_dist.weights.files import open_weights
from tests import text_files, vae_files, wan_files
from tests.procs import tiny
from tests.procs.conftest import run_threads

REPOSITORY = Path(__file__).parents[2]
SIZES = WanShape(dim=40, ffn_dim=48, heads=2, blocks=2, text_dim=text_files.SIZES.dim, channels=16, freq_dim=16)
SEGMENT, FRAMES = 3, 9
PROMPTS = ("Two cats and three dogs run along the beach", "a red circle moving left", "the ocean; a lighthouse!")
RECIPE = """
name: end-to-end
video: {{latent_frames: {frames}, frames_per_segment: {segment}, latent_height: 4, latent_width: 4}}
data: {{prompts: prompts.txt}}
text: {{encoder: store, path: embeddings, dim: {text}, length: 12}}
vae: {{kind: wan, path: vae}}
teacher: {network}
generator: ${{teacher}}
critic: ${{teacher}}
weights:
  teacher: {{path: imported/teacher}}
  base: {{path: diffusers}}
  start: {{path: imported/start}}
stages:
  distil:
    kind: dmd
    parent: start
    teacher: teacher
    critic: base
    cycles: 2
    batch: {{global_size: 4, micro_size: 1}}
    optimizer: {{lr: 1e-4}}
    ema: {{decay: 0.9}}
checkpoint: {{every_cycles: 1}}
"""


def mirai(folder: Path, *arguments: str) -> str:
    """Standard output of one command run in `folder`, as a user would run it."""
    paths = [REPOSITORY / "tests" / "guard", REPOSITORY, REPOSITORY / "launcher", REPOSITORY / "kernels"]
    ours = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "TORCHELASTIC_")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
    environment |= {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-m", "mirai_launch", *arguments], cwd=folder, env=environment, text=True,
                          capture_output=True, timeout=280)
    assert done.returncode == 0, f"mirai {' '.join(arguments)}:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a lab has before it begins."""
    folder = tmp_path_factory.mktemp("lab")
    wan_files.official(folder / "official", wan_files.tiny_tensors(1, torch.bfloat16, SIZES), shards=3, sizes=SIZES)
    wan_files.diffusers(folder / "diffusers", wan_files.tiny_tensors(2, sizes=SIZES), shards=1, sizes=SIZES)
    wan_files.pt(folder / "causal_ode.pt", wan_files.tiny_tensors(3, sizes=SIZES), "causal-forcing")
    text_files.write_pipeline(folder / "umt5")
    vae_files.write_diffusers(folder / "vae", vae_files.network(**vae_files.SMALLEST))
    (folder / "prompts.txt").write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    network = {key: getattr(SIZES, key) for key in ("dim", "ffn_dim", "heads", "blocks", "freq_dim")}
    text = RECIPE.format(frames=FRAMES, segment=SEGMENT, text=SIZES.text_dim, network=json.dumps(network))
    (folder / "recipe.yaml").write_text(text)
    return folder


@pytest.fixture(scope="module")
def trained(lab: Path) -> Path:
    """The same folder after import, embed and train."""
    mirai(lab, "import", "official", "--out", "imported/teacher")
    mirai(lab, "import", "causal_ode.pt", "--out", "imported/start", "--kind", "ode")
    mirai(lab, "data", "embed", "prompts.txt", "--encoder", "umt5", "--out", "embeddings", "--length", "12")
    said = mirai(lab, "train", "recipe.yaml", "--nproc", "2", "--run-dir", "run")
    assert "report: run/report.html" in said
    assert "attention:" in said and "dense: sdpa" in said and "flash-2, xformers: needs a CUDA device" in said
    return lab


def probe(path: Path) -> dict[str, Any]:
    """Codec, frame rate, size and decoded frames of a video; ffprobe must agree where it is installed."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        found = {
            "codec_name": stream.codec_context.name,
            "r_frame_rate": f"{stream.base_rate}/1",
            "width": stream.codec_context.width,
            "height": stream.codec_context.height,
            "nb_read_frames": str(sum(1 for _ in container.decode(video=0))),
        }
    if shutil.which("ffprobe"):
        command = ["ffprobe", "-v", "error", "-count_frames", "-select_streams", "v:0", "-of", "json",
                   "-show_entries", f"stream={','.join(found)}", str(path)]
        told = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        assert told["streams"][0] == found
    return found


def test_the_run_remembers_what_it_started_from(trained: Path) -> None:
    (manifest,) = (trained / "run").glob("stages/distil/foresight/seed-1/checkpoints/cycle-000002-*/manifest.json")
    starts = json.loads(manifest.read_text())["passport"]["starts"]
    assert {role: start["name"] for role, start in starts.items()} == {
        "parent": "start", "teacher": "teacher", "critic": "base"}
    assert [starts[role]["kind"] for role in ("parent", "teacher", "critic")] == ["ode", "diffusion", "diffusion"]
    assert len({start["digest"] for start in starts.values()}) == 3
    assert "imported/start (raw)" in (trained / "run" / "effective.yaml").read_text()


def test_exported_weights_come_back(trained: Path) -> None:
    for which in ("raw", "ema"):
        mirai(trained, "export", "run", "--to", "self-forcing", "--which", which, "--out", f"out-{which}.pt")
        assert set(open_weights(trained / f"out-{which}.pt", which).shapes) == set(shapes_of(SIZES))  # type: ignore
    start, end = (open_weights(path) for path in (trained / "imported/start", trained / "out-raw.pt"))
    moved = [name for name in start.shapes if not torch.equal(start.read(name), end.read(name))]
    assert len(moved) == len(start.shapes)  # every parameter had a gradient
    assert all((start.read(n) - end.read(n)).abs().max() < 1e-2 for n in moved)  # two steps away from the file, no more


def test_videos_of_the_run_and_of_its_export_are_the_same(trained: Path) -> None:
    mirai(trained, "export", "run", "--to", "wan", "--which", "ema", "--out", "generator")
    common = ("--prompts", "prompts.txt", "--seed", "3")
    mirai(trained, "sample", "run", "--out", "videos", "--nproc", "2", "--grid", *common)  # embeddings of the store
    mirai(trained, "sample", "generator", "--recipe", "run/recipe.yaml", "--out", "again", *common,
          "text.encoder=umt5", "text.path=umt5")
    for prompt in PROMPTS:
        video = trained / "videos" / f"{prompt}-0.mp4"
        frames = str(1 + 4 * (FRAMES - 1))
        assert probe(video) == {"codec_name": "h264", "r_frame_rate": "16/1", "width": 128, "height": 128,
                                "nb_read_frames": frames} | {k: probe(video)[k] for k in ("width", "height")}
        with av.open(str(video)) as one, av.open(str(trained / "again" / video.name)) as other:
            for left, right in zip(one.decode(video=0), other.decode(video=0), strict=True):
                assert (left.to_ndarray() == right.to_ndarray()).all()
    assert json.loads((trained / "videos" / "timing.json").read_text())


def test_the_store_trains_as_the_resident_encoder_does(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cycles from the store and from UMT5 held, sharded, by the job: every metric and number, bit for bit."""
    monkeypatch.chdir(trained)

    def numbers(*overrides: str) -> list[tuple[str, list[dict[str, float]], dict[str, Any]]]:
        recipe = load(trained / "recipe.yaml", overrides).recipe

        def body(rank: int) -> tuple[str, list[dict[str, float]], dict[str, Any]]:
            with tiny.lively():
                stage = tiny.stage_of(recipe, "distil")
            conditions = stage.run.conditions
            held = getattr(conditions, "encoder", conditions)
            if isinstance(held, Umt5Encoder):
                assert all(isinstance(parameter, DTensor) for parameter in held.network.parameters())
            return type(held).__name__, tiny.train(stage, 7), tiny.everything(stage)

        return run_threads(2, body, tiny.TIMEOUT)

    from_store, from_encoder = numbers(), numbers("text.encoder=umt5", "text.path=umt5")
    assert (from_store[0][0], from_encoder[0][0]) == ("EmbeddingStore", "Umt5Encoder")
    for (_, metrics, end), (_, other_metrics, other_end) in zip(from_store, from_encoder, strict=True):
        assert metrics == other_metrics
        assert tiny.unequal(end, other_end) == []
