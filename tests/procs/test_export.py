"""Exported and imported again, weights are the trained ones bit for bit, whatever world size saved them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from mirai_dist.commands import arguments
from mirai_dist.commands import export as command
from mirai_dist.models.wan import WanModel
from mirai_dist.weights.files import open_weights
from mirai_dist.weights.load import load_into
from tests.run_files import Training, new_run, train

OUT = {"wan": "wan", "diffusers": "diffusers", "self-forcing": "generator.pt"}


def export(*words: object) -> None:
    parser = argparse.ArgumentParser()
    arguments.export(parser)
    assert command.run(parser.parse_args([str(word) for word in words])) == 0


@pytest.fixture(scope="module", params=[0, 1, 2])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A run directory of so many ranks (0: a single process without a process group), and the values in it."""
    from tests.procs.conftest import run_threads

    run_dir = new_run(tmp_path_factory.mktemp("runs") / "run")
    ranks = request.param
    if not ranks:
        return run_dir, {stage: train(run_dir, Training(stage)) for stage in ("teacher", "distil")}
    saved = run_threads(ranks, lambda rank: [train(run_dir, Training(stage)) for stage in ("teacher", "distil")], 60.0)
    return run_dir, dict(zip(("teacher", "distil"), saved[0], strict=True))


@pytest.mark.parametrize("which", ["raw", "ema"])
@pytest.mark.parametrize(("stage", "layout"), [
    ("distil", "wan"), ("distil", "diffusers"), ("distil", "self-forcing"), ("teacher", "wan"),
])
def test_exported_then_imported_is_bit_identical(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, stage: str, layout: str, which: Literal["raw", "ema"]
) -> None:
    run_dir, values = trained
    assert not dist.is_initialized()
    out = tmp_path / OUT[layout]
    export(run_dir, "--stage", stage, "--to", layout, "--which", which, "--out", out)
    file = open_weights(out, which)
    expected = values[stage][which]
    assert file.kind == ("diffusion" if stage == "teacher" else "dmd") and file.which == which
    assert file.shapes.keys() == expected.keys() == file.checksums.keys()
    for name, value in expected.items():
        read = file.read(name)
        assert read.dtype == value.dtype and torch.equal(read, value), name
    other = values[stage]["raw" if which == "ema" else "ema"]
    assert not torch.equal(file.read("head.head.weight"), other["head.head.weight"])


@pytest.mark.parametrize("layout", ["wan", "self-forcing"])
def test_two_ranks_load_what_two_ranks_trained(threads, tmp_path: Path, layout: str) -> None:
    """The whole circle through the loader that a stage starts with, each rank reading its own slices."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    run_dir = new_run(tmp_path / "run")
    values = threads(2)(lambda rank: train(run_dir))[0]["ema"]
    out = tmp_path / OUT[layout]
    export(run_dir, "--to", layout, "--out", out)

    def load(rank: int) -> None:
        file = open_weights(out, "ema")
        with torch.device("meta"):
            network = WanModel(file.shape_of_network())
        mesh = init_device_mesh("cpu", (2,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        network.to_empty(device="cpu")
        load_into(network, file)
        for name, tensor in network.state_dict().items():
            assert isinstance(tensor, DTensor) and torch.equal(tensor.full_tensor(), values[name]), name

    threads(2)(load)
