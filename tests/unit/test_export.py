"""`mirai export`: what is written, that other programs take it, and one clear line for everything else."""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from mirai_dist.commands import arguments
from mirai_dist.commands import export as command
from mirai_dist.commands.entry import outcome
from mirai_dist.commands.source import find_checkpoint
from mirai_dist.config import FileError
from mirai_dist.models.wan import History, WanModel
from mirai_dist.models.wan.keys import WanShape, shapes_of
from mirai_dist.state.commit import CheckpointError
from mirai_dist.weights import folders
from mirai_dist.weights.checksums import checksum, shown
from mirai_dist.weights.export import StoredNetwork
from tests.run_files import GENERATOR, RECIPE, TEACHER, Training, new_run, train
from tests.tiny_wan import generator as draws
from tests.tiny_wan import held

MIB = 1 << 20
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _quiet_checkpoint_log(monkeypatch) -> None:
    """torch logs several debug lines a tensor, under which the report of a failed test could not be found."""
    monkeypatch.setattr(logging.getLogger("c10d-NullHandler-dcp_logger"), "disabled", True)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose stages all have a checkpoint; of the study, two arms of one seed."""
    run_dir = new_run(tmp_path_factory.mktemp("runs") / "run")
    for training in (Training("teacher"), Training("ar_teacher"), Training("few_step", average=False)):
        train(run_dir, training)
    train(run_dir, Training(arm="baseline"))
    train(run_dir, Training(arm="foresight"))
    return run_dir


def export(*words: object) -> int:
    """`mirai export` with these words, in this process: its exit code."""
    parser = argparse.ArgumentParser()
    arguments.export(parser)
    return outcome("export", command.run, parser.parse_args([str(word) for word in words]))


def refusal(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """The one line with which `mirai export` refuses."""
    assert export(*words) == 20
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and captured.err.startswith("mirai export: ")
    assert all("verifying checkpoint" in line for line in captured.out.splitlines())
    return captured.err


def folder_tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for file in folder.glob("*.safetensors") for name, value in load_file(file).items()}


def official(folder: Path) -> WanModel:
    """The network of an exported official folder, loaded strictly."""
    config = json.loads((folder / "config.json").read_text())
    network = WanModel(WanShape(config["dim"], config["ffn_dim"], config["num_heads"], config["num_layers"],
                                config["text_dim"], config["in_dim"], config["freq_dim"]))
    network.load_state_dict(folder_tensors(folder), strict=True)
    return network.eval()


# What other programs see.


def test_the_official_folder_is_as_wan_publishes_it(run_dir: Path, tmp_path: Path) -> None:
    assert export(run_dir, "--to", "wan", "--stage", "teacher", "--out", tmp_path / "wan") == 0
    assert {path.name for path in (tmp_path / "wan").iterdir()} == {
        "config.json", "diffusion_pytorch_model.safetensors", "mirai.json"
    }
    config = json.loads((tmp_path / "wan" / "config.json").read_text())
    expected = {
        "_class_name": "WanModel", "model_type": "t2v", "dim": 24, "ffn_dim": 33, "num_heads": 2, "num_layers": 3,
        "in_dim": 16, "out_dim": 16, "freq_dim": 16, "text_len": 512, "eps": 1e-6,
    }
    assert expected.items() <= config.items()
    shapes = {name: tuple(value.shape) for name, value in folder_tensors(tmp_path / "wan").items()}
    assert shapes == shapes_of(TEACHER)


def test_the_index_names_the_shard_of_every_tensor(run_dir: Path, tmp_path: Path, monkeypatch) -> None:
    assert export(run_dir, "--to", "wan", "--out", tmp_path / "one") == 0
    monkeypatch.setattr(folders, "SHARD_BYTES", 20_000)
    assert export(run_dir, "--to", "wan", "--out", tmp_path / "many") == 0
    index = json.loads((tmp_path / "many" / "diffusion_pytorch_model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 2
    whole = folder_tensors(tmp_path / "one")
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / "many" / file)[name], whole[name])


@pytest.mark.parametrize("stage", ["teacher", "distil"])
@torch.no_grad()
def test_diffusers_loads_it_strictly_and_computes_the_same(
    run_dir: Path, tmp_path: Path, monkeypatch, stage: str
) -> None:
    transformer_wan = pytest.importorskip("diffusers.models.transformers.transformer_wan")
    if find_spec("accelerate") is None:
        # diffusers keeps these modules in fp32 only with accelerate's help; here everything is fp32 anyway
        monkeypatch.setattr(transformer_wan.WanTransformer3DModel, "_keep_in_fp32_modules", None)
    for layout in ("diffusers", "wan"):
        assert export(run_dir, "--to", layout, "--stage", stage, "--out", tmp_path / layout) == 0
    theirs, loading = transformer_wan.WanTransformer3DModel.from_pretrained(
        tmp_path / "diffusers", output_loading_info=True, local_files_only=True
    )
    assert not any(loading.values()), loading
    assert {value.dtype for value in theirs.parameters()} == {torch.float32}
    video = torch.randn(2, 3, 16, 4, 6, generator=draws(1))
    text, at = torch.randn(2, 6, 7, generator=draws(2)), torch.tensor([250.0, 937.5])
    ours = official(tmp_path / "wan")(video, at, text).velocity
    other = theirs.eval()(hidden_states=video.transpose(1, 2), timestep=at, encoder_hidden_states=text,
                          return_dict=False)[0].transpose(1, 2)
    assert ours.std() > 0.1
    torch.testing.assert_close(ours, other, rtol=0, atol=1e-4)


class InferenceWrapper(nn.Module):
    """As the public scripts hold the generator: the DiT as `model`, nothing else with parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.model = WanModel(GENERATOR)


@pytest.mark.parametrize(("which", "entry"), [("raw", "generator"), ("ema", "generator_ema")])
def test_the_public_inference_script_loads_it_strictly(run_dir: Path, tmp_path: Path, which: str, entry: str) -> None:
    out = tmp_path / "generator.pt"
    assert export(run_dir, "--to", "self-forcing", "--which", which, "--out", out) == 0
    content = torch.load(out, map_location="cpu", weights_only=True)
    assert content.keys() == {entry, "mirai"}
    wrapper = InferenceWrapper()
    wrapper.load_state_dict(content[entry], strict=True)
    assert content[entry].keys() == wrapper.state_dict().keys()
    storages = sum(value.untyped_storage().nbytes() for value in content[entry].values())
    assert storages == 4 * sum(value.numel() for value in wrapper.parameters())
    assert [path.name for path in tmp_path.iterdir()] == ["generator.pt"]


# The manifest.


def test_the_manifest_says_what_this_is_and_where_it_comes_from(run_dir: Path, tmp_path: Path, capsys) -> None:
    assert export(run_dir, "--to", "wan", "--out", tmp_path / "wan") == 0
    said = capsys.readouterr().out
    assert export(run_dir, "--to", "self-forcing", "--which", "raw", "--out", tmp_path / "raw.pt") == 0
    found = find_checkpoint(run_dir, None, None, None)
    passport = json.loads((found.path / "manifest.json").read_text())["passport"]
    expected = {
        "format": "mirai-weights", "version": 1, "kind": "dmd", "which": "ema", "run": "tiny-run",
        "recipe": passport["recipe"], "stage": "distil", "arm": "foresight", "seed": 5, "cycle": 4, "step": 7,
        "parent": {"name": "few_step", "path": "cycle-000009-position-0", "which": "ema", "kind": "cd"},
    }
    manifest = json.loads((tmp_path / "wan" / "mirai.json").read_text())
    assert expected.items() <= manifest.items()
    content = torch.load(tmp_path / "raw.pt", weights_only=True)
    assert (expected | {"which": "raw"}).items() <= content["mirai"].items()
    for tensors, checksums in ((folder_tensors(tmp_path / "wan"), manifest["checksums"]),
                               (content["generator"], content["mirai"]["checksums"])):
        assert {name: shown(checksum(value)) for name, value in tensors.items()} == checksums
    assert f"{sum(value.numel() for value in content['generator'].values()):,} parameters" in said
    assert "verifying checkpoint" in said.splitlines()[0]
    assert "cycle 4" in said and "cycle-000004-position-0" in said and "mirai sample" in said


def test_a_bidirectional_stage_gives_its_teacher_of_kind_diffusion(run_dir: Path, tmp_path: Path, capsys) -> None:
    assert export(run_dir, "--to", "wan", "--stage", "teacher", "--out", tmp_path / "wan") == 0
    manifest = json.loads((tmp_path / "wan" / "mirai.json").read_text())
    assert {"kind": "diffusion", "arm": "", "seed": 3, "parent": None}.items() <= manifest.items()
    assert "teacher=NAME" in capsys.readouterr().out
    line = refusal(capsys, run_dir, "--to", "self-forcing", "--stage", "teacher", "--out", tmp_path / "a.pt")
    assert "stage teacher trains a bidirectional teacher; use --to wan" in line


# Nothing of foresight leaves the cluster.


def segment_flops(network: WanModel) -> int:
    """FLOPs of one denoising step of one segment of one frame after two cached ones."""
    shape, tokens = network.shape, 4
    pair = torch.randn(1, 2 * tokens, shape.heads, shape.dim // shape.heads)
    text_pair = torch.randn(1, 6, shape.heads, shape.dim // shape.heads)
    history = History(held(((pair, pair),) * shape.blocks), ((text_pair, text_pair),) * shape.blocks, first_frame=2)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.randn(1, 1, 16, 4, 4), torch.tensor([[500.0]]), torch.randn(1, 6, 7), history=history)
    return counter.get_total_flops()


def test_foresight_changes_neither_keys_nor_flops(run_dir: Path, tmp_path: Path) -> None:
    stored = find_checkpoint(run_dir, None, "foresight", None).path / "manifest.json"
    assert "predictor" in json.loads(stored.read_text())["passport"]["roles"]
    networks = {}
    for arm in ("foresight", "baseline"):
        for layout, out in (("wan", tmp_path / arm), ("self-forcing", tmp_path / f"{arm}.pt")):
            assert export(run_dir, "--to", layout, "--arm", arm, "--out", out) == 0
        networks[arm] = official(tmp_path / arm)
    files = {arm: torch.load(tmp_path / f"{arm}.pt")["generator_ema"] for arm in networks}
    assert files["foresight"].keys() == files["baseline"].keys()
    assert networks["foresight"].state_dict().keys() == networks["baseline"].state_dict().keys()
    flops = {arm: segment_flops(network) for arm, network in networks.items()}
    assert flops["foresight"] == flops["baseline"] == segment_flops(WanModel(GENERATOR)) > 0


# Memory.


def anonymous_growth(step: Callable[[], object]) -> int:
    """Bytes by which this process' anonymous memory grew during a step at its highest point, sampled each 0.5 ms."""

    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("RssAnon:")[2].split()[0])

    before = now()
    samples, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.0005):
            samples.append(now())

    watcher = threading.Thread(target=watch)
    watcher.start()
    step()
    stop.set()
    watcher.join()
    return max(samples) - before


def measure_exports(small: str, large: str, out: str) -> None:
    """In a process of its own, whose heap nothing else has grown: one JSON line, layout -> growth in bytes."""
    folders.SHARD_BYTES = 8 * MIB
    grown = {}
    for layout, suffix in (("self-forcing", ".pt"), ("wan", "")):
        for run_dir, name in ((small, "warm"), (large, "large")):  # the first pays for imports and pools
            words = (run_dir, "--to", layout, "--which", "raw", "--out", f"{out}/{name}{suffix}")
            grown[layout] = anonymous_growth(lambda words=words: export(*words))
    sys.stdout.write("\n" + json.dumps(grown))


def test_memory_does_not_grow_with_the_network(run_dir: Path, tmp_path: Path) -> None:
    """35 MiB of weights, of which no tensor has more than 1.5 MiB; shard files of 8 MiB."""
    sizes = WanShape(dim=256, ffn_dim=1024, heads=2, blocks=8, text_dim=7, channels=16, freq_dim=16)
    text = RECIPE.replace("generator: {dim: 20, ffn_dim: 27, heads: 2, blocks: 2",
                          "generator: {dim: 256, ffn_dim: 1024, heads: 2, blocks: 8")
    large = new_run(tmp_path / "run", text)
    train(large, Training(average=False), shape=sizes)
    code = "import sys; from tests.unit.test_export import measure_exports; measure_exports(*sys.argv[1:])"
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code, run_dir, large, tmp_path], env={**os.environ, "PYTHONPATH": ":".join(paths)},
        capture_output=True, text=True, timeout=120,
    )
    assert done.returncode == 0, done.stderr
    grown = json.loads(done.stdout.splitlines()[-1])
    assert (tmp_path / "large.pt").stat().st_size > 34 * MIB
    assert grown["self-forcing"] < 16 * MIB and grown["wan"] < 28 * MIB, grown


# Refusals.


@pytest.mark.parametrize(("words", "expected"), [
    (["--stage", "destil"], "the run has no stage destil; it has teacher, ar_teacher, few_step, distil"),
    (["--arm", "other"], "the run has no arm other; it has baseline, foresight"),
    (["--seed", "7"], "the run was not trained with seed 7; its seeds are 5, 6"),
    (["--seed", "6"], "holds no checkpoint; there are some in stages/"),
    (["--stage", "teacher", "--arm", "baseline"], "stage teacher has no arms and seeds; leave --arm and --seed out"),
    (["--stage", "few_step"], "holds no moving average of the generator (stages.few_step.ema.decay is 0"),
])
def test_a_wish_that_does_not_fit_the_run(
    run_dir: Path, tmp_path: Path, capsys, words: list[str], expected: str
) -> None:
    assert expected in refusal(capsys, run_dir, "--to", "wan", "--out", tmp_path / "out", *words)
    assert not list(tmp_path.iterdir())


def test_raw_weights_of_a_stage_without_average(run_dir: Path, tmp_path: Path, capsys) -> None:
    words = ("--to", "wan", "--stage", "few_step", "--which", "raw")
    assert export(run_dir, *words, "--out", tmp_path / "out") == 0
    assert f"mirai sample {tmp_path / 'out'} --which raw --recipe" in capsys.readouterr().out


@pytest.mark.parametrize(("layout", "name"), [("wan", "out"), ("diffusers", "out"), ("self-forcing", "out.pt")])
def test_what_is_there_already_is_left_alone(run_dir: Path, tmp_path: Path, capsys, layout: str, name: str) -> None:
    (tmp_path / name).write_text("precious")
    assert name in refusal(capsys, run_dir, "--to", layout, "--out", tmp_path / name)
    assert (tmp_path / name).read_text() == "precious"
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "kept").write_text("precious")
    assert name in refusal(capsys, run_dir, "--to", layout, "--out", tmp_path / name)
    assert (tmp_path / name / "kept").read_text() == "precious"


def test_a_self_forcing_file_is_a_pt_file(run_dir: Path, tmp_path: Path, capsys) -> None:
    line = refusal(capsys, run_dir, "--to", "self-forcing", "--out", tmp_path / "out")
    assert "a self-forcing export is one file; end its name in .pt" in line


def altered(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


@pytest.mark.parametrize(("damage", "expected"), [
    (lambda path: (path / "state.json").write_text(""), "none is complete"),
    (lambda path: (path / "manifest.json").unlink(), "none is complete"),
    (lambda path: altered(path / "tensors" / "__0_0.distcp"), "tensors/__0_0.distcp was altered after it was written"),
    (lambda path: altered(path / "tensors" / ".metadata"), "tensors/.metadata was altered after it was written"),
])
def test_a_damaged_checkpoint(tmp_path: Path, capsys, damage: Callable[[Path], Any], expected: str) -> None:
    run_dir = new_run(tmp_path / "run")
    train(run_dir)
    damage(find_checkpoint(run_dir, None, None, None).path)
    assert expected in refusal(capsys, run_dir, "--to", "wan", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_of_another_network(tmp_path: Path, capsys) -> None:
    run_dir = new_run(tmp_path / "run")
    train(run_dir)
    (run_dir / "recipe.yaml").write_text(RECIPE.replace("generator: {dim: 20", "generator: {dim: 40"))
    line = refusal(capsys, run_dir, "--to", "wan", "--out", tmp_path / "out")
    assert "has shape [20], the run's recipe.yaml asks for [40]" in line


def test_a_stage_that_was_of_another_kind(tmp_path: Path, capsys) -> None:
    run_dir = new_run(tmp_path / "run")
    train(run_dir, Training("few_step"))
    (run_dir / "recipe.yaml").write_text(RECIPE.replace("kind: consistency", "kind: teacher_forcing"))
    line = refusal(capsys, run_dir, "--to", "wan", "--stage", "few_step", "--out", tmp_path / "out")
    assert "is of a stage of kind consistency with generator; recipe.yaml says" in line


@pytest.mark.parametrize(("layout", "name"), [("wan", "out"), ("self-forcing", "out.pt")])
def test_a_disk_that_fills_up_leaves_nothing(
    run_dir: Path, tmp_path: Path, capsys, monkeypatch, layout: str, name: str
) -> None:
    real, calls = StoredNetwork.read, []

    def read(stored: StoredNetwork, parameter: str) -> Tensor:
        calls.append(parameter)
        if len(calls) > 5:
            raise OSError(28, "No space left on device")
        return real(stored, parameter)

    monkeypatch.setattr(StoredNetwork, "read", read)
    line = refusal(capsys, run_dir, "--to", layout, "--out", tmp_path / name)
    assert f"{name}: cannot be written: [Errno 28] No space left on device" in line
    assert not list(tmp_path.iterdir())


def test_torch_save_on_a_full_disk(run_dir: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    """torch reports its own broken archive; what the disk said must come through."""
    real = torch.save

    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() + len(data) > 20_000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(torch, "save", lambda content, file: real(content, Full()))
    line = refusal(capsys, run_dir, "--to", "self-forcing", "--out", tmp_path / "out.pt")
    assert "out.pt: cannot be written: [Errno 28] No space left on device" in line
    assert not list(tmp_path.iterdir())


# Which checkpoint is meant.


def test_every_place_of_a_run_can_be_named(run_dir: Path) -> None:
    for place, stage, arm in [
        ("", "distil", "foresight"),
        ("stages", "distil", "foresight"),
        ("stages/teacher", "teacher", ""),
        ("stages/teacher/checkpoints", "teacher", ""),
        ("stages/distil", "distil", "foresight"),
        ("stages/distil/baseline", "distil", "baseline"),
        ("stages/distil/baseline/seed-5", "distil", "baseline"),
        ("stages/distil/baseline/seed-5/checkpoints/cycle-000004-position-0", "distil", "baseline"),
    ]:
        found = find_checkpoint(run_dir / place, None, None, None)
        assert (found.stage, found.arm, found.run_dir) == (stage, arm, run_dir)
        below = f"stages/{stage}/{arm}/seed-5" if arm else f"stages/{stage}"
        assert found.path == run_dir / below / "checkpoints" / "cycle-000004-position-0"
        assert found.recipe.foresight.weight == (0.0 if arm == "baseline" else 0.2)
    assert find_checkpoint(run_dir, "distil", "baseline", 5).path.parts[-4:-2] == ("baseline", "seed-5")
    assert find_checkpoint(run_dir / "stages/teacher", "teacher", None, None).seed == 3


def test_the_newest_checkpoint_is_taken_and_an_older_one_by_its_name(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    for cycle in (4, 12):
        train(run_dir, Training(cycle=cycle))
    newest = find_checkpoint(run_dir, None, None, None).path
    assert newest.name == "cycle-000012-position-0"
    older = newest.with_name("cycle-000004-position-0")
    assert find_checkpoint(older, None, None, None).path == older


@pytest.mark.parametrize(("place", "options", "expected"), [
    ("missing", (None, None, None), "is no directory; name a run, stage or checkpoint directory"),
    ("recipe.yaml", (None, None, None), "is no directory"),
    ("..", (None, None, None), "there is no recipe.yaml in it"),
    ("logs", (None, None, None), "there is no recipe.yaml in it, nor above a folder stages"),
    ("stages/teacher", ("distil", None, None), "lies in stage teacher, and --stage says distil"),
    ("stages/distil/baseline", (None, "foresight", None), "lies in arm baseline, and --arm says foresight"),
    ("stages/distil/baseline/seed-5", (None, None, 6), "lies in seed 5, and --seed says 6"),
    ("stages/distil/baseline/seed-5/samples", (None, None, None), "is neither a run, stage or checkpoint directory"),
])
def test_a_place_that_is_none(
    run_dir: Path, place: str, options: tuple[str | None, str | None, int | None], expected: str
) -> None:
    (run_dir / "logs").mkdir(exist_ok=True)
    (run_dir / "stages/distil/baseline/seed-5/samples").mkdir(exist_ok=True)
    with pytest.raises(FileError) as raised:
        find_checkpoint(run_dir / place, *options)
    assert expected in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_without_checkpoints_says_so(tmp_path: Path) -> None:
    run_dir = new_run(tmp_path / "run")
    with pytest.raises(FileError, match="holds no checkpoint; the run has none yet: train it first"):
        find_checkpoint(run_dir, None, None, None)
    train(run_dir, Training("teacher"))
    with pytest.raises(FileError, match="holds no checkpoint; there are some in stages/teacher"):
        find_checkpoint(run_dir, None, None, None)
    for file in (run_dir / "stages/teacher/checkpoints").glob("*/state.json"):
        file.unlink()
    with pytest.raises(CheckpointError, match="none is complete"):
        find_checkpoint(run_dir, "teacher", None, None)
