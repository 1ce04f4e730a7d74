"""`mirai import`: any supported form becomes one official folder with the same bits, its kind and checksums."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mirai_dist.commands import arguments, import_weights
from mirai_dist.config import FileError
from mirai_dist.weights import folders
from mirai_dist.weights.checksums import checksum, shown
from mirai_dist.weights.files import open_weights
from tests import wan_files
from tests.wan_files import SIZES, STYLES

TENSORS = wan_files.tiny_tensors(4)


def imported(*argv: Any) -> int:
    """The command in this process, with arguments parsed as it parses them."""
    parser = argparse.ArgumentParser()
    arguments.VERBS["import"].configure(parser)
    return import_weights.run(parser.parse_args([str(each) for each in argv]))


def written(folder: Path) -> dict[str, Tensor]:
    """Tensors of an imported folder, read by the library of the format."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_bits(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("make", [wan_files.official, wan_files.diffusers])
def test_folders_keep_every_bit_and_their_dtype(tmp_path: Path, make: Any, dtype: torch.dtype) -> None:
    tensors = wan_files.tiny_tensors(5, dtype)
    assert imported(make(tmp_path / "source", tensors), "--out", tmp_path / "out") == 0
    assert same_bits(written(tmp_path / "out"), tensors)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == wan_files.official_config() | {"text_dim": SIZES.text_dim}  # as published, but for the tiny text
    manifest = json.loads((tmp_path / "out" / "mirai.json").read_text())
    assert manifest["checksums"] == {name: shown(checksum(tensor)) for name, tensor in tensors.items()}
    file = open_weights(tmp_path / "out")
    assert (file.layout, file.kind, file.assumed, file.which) == ("wan", "diffusion", False, "raw")
    assert file.shape_of_network() == SIZES


@pytest.mark.parametrize("style", STYLES)
def test_pt_files_of_all_styles(tmp_path: Path, style: str) -> None:
    which = "ema" if list(STYLES[style]) == ["generator_ema"] else "raw"
    source = wan_files.pt(tmp_path / "model.pt", TENSORS, style)
    kind = [] if open_weights(source, which).kind else ["--kind", "cd"]
    assert imported(source, "--out", tmp_path / "out", "--which", which, *kind) == 0
    assert same_bits(written(tmp_path / "out"), TENSORS)
    file = open_weights(tmp_path / "out")
    assert (file.kind, file.which) == ("cd" if kind else "dmd", which)
    assert file.manifest["source"] == {"name": "model.pt", "layout": "pt"}


def test_old_pt_files_are_converted(tmp_path: Path) -> None:
    torch.save({"generator": TENSORS}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert imported(tmp_path / "old.pt", "--out", tmp_path / "out", "--kind", "ode") == 0
    assert same_bits(written(tmp_path / "out"), TENSORS)


def test_one_shard_is_held_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folders, "SHARD_BYTES", 50_000)
    held: list[int] = []
    save = folders.save_file

    def saved(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        held.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors.values()))
        save(tensors, path, metadata)

    monkeypatch.setattr(folders, "save_file", saved)
    imported(wan_files.pt(tmp_path / "w.pt", TENSORS, "bare"), "--out", tmp_path / "out", "--kind", "ar")
    assert len(held) > 4 and max(held) <= 50_000
    assert same_bits(written(tmp_path / "out"), TENSORS)


def test_the_command_line_corrects_an_assumed_kind_but_no_recorded_one(tmp_path: Path) -> None:
    source = wan_files.official(tmp_path / "causal", TENSORS)
    imported(source, "--out", tmp_path / "out", "--kind", "cd")
    assert open_weights(tmp_path / "out").kind == "cd"
    with pytest.raises(FileError, match="kind cd .*declared as diffusion"):
        imported(tmp_path / "out", "--out", tmp_path / "again", "--kind", "diffusion")
    with pytest.raises(FileError, match="does not record what its weights are"):
        imported(wan_files.pt(tmp_path / "w.pt", TENSORS, "bare"), "--out", tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_what_an_export_of_ours_says_of_its_origin_is_kept(tmp_path: Path) -> None:
    origin = {"kind": "dmd", "which": "ema", "recipe": "abc", "parent": "def", "cycle": 7, "step": 7, "other": 1}
    folders.write_folder(tmp_path / "a", list(TENSORS), TENSORS.__getitem__, folders.wan_config(SIZES), origin)
    imported(tmp_path / "a", "--out", tmp_path / "b")
    manifest = dict(open_weights(tmp_path / "b").manifest)
    assert [manifest.get(key) for key in origin] == ["dmd", "ema", "abc", "def", 7, 7, None]


def test_damage_is_found_on_the_way(tmp_path: Path) -> None:
    def flipped(path: Path, place: int) -> Path:
        data = bytearray(path.read_bytes())
        data[place] ^= 4
        path.write_bytes(data)
        return path

    pt = wan_files.pt(tmp_path / "w.pt", TENSORS, "causal-forcing")
    with pytest.raises(FileError, match="truncated or corrupt .*CRC"):
        imported(flipped(pt, pt.stat().st_size // 2), "--out", tmp_path / "x", "--kind", "ar")
    imported(wan_files.official(tmp_path / "a", TENSORS), "--out", tmp_path / "b")
    flipped(next((tmp_path / "b").glob("*.safetensors")), 200_000)
    with pytest.raises(FileError, match="is not what its checksum says: the file was damaged or altered"):
        imported(tmp_path / "b", "--out", tmp_path / "x")
    endless = wan_files.official(tmp_path / "c", TENSORS | {"head.modulation": torch.full((1, 2, 40), torch.inf)})
    with pytest.raises(FileError, match="head.modulation holds NaN or infinite"):
        imported(endless, "--out", tmp_path / "x")
    assert not list(tmp_path.glob("x*"))  # nothing half-written is left


def test_a_taken_place_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("")
    with pytest.raises(FileError, match="is not empty; name a new folder"):
        imported(tmp_path / "no such source", "--out", tmp_path / "out")


def test_the_command_says_what_it_did_in_lines(tmp_path: Path) -> None:
    source = wan_files.official(tmp_path / "source", TENSORS)
    command = [sys.executable, "-m", "mirai_dist.commands.import_weights", str(source), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "layout wan, 96 tensors" in done.stdout.splitlines()[0]
    assert done.stdout.splitlines()[-1].endswith(
        "out: 96 tensors, 68,240 parameters, 272,960 bytes, kind diffusion (bidirectional diffusion model), raw weights"
    )
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert again.returncode == 20 and again.stderr.count("\n") == 1
    assert again.stderr.startswith("mirai import: ") and "is not empty" in again.stderr


def test_big_sources_show_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(import_weights, "SECONDS_BETWEEN_LINES", 0.0)
    imported(wan_files.official(tmp_path / "source", TENSORS), "--out", tmp_path / "out")
    lines = [line for line in capsys.readouterr().out.splitlines() if " of 0.00 GB" in line]
    assert len(lines) == len(TENSORS)


def test_written_files_may_be_read_by_whom_the_umask_lets(tmp_path: Path) -> None:
    """The safetensors library makes files for their owner alone: a colleague could not read the weights."""
    before = os.umask(0o027)
    try:
        imported(wan_files.official(tmp_path / "source", TENSORS), "--out", tmp_path / "out")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()}
    assert set(modes.values()) == {0o640}, modes
