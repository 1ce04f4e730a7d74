"""Stages that train on clean latents of a data set: our store, the published LMDB layout, with UMT5 and a store of
its embeddings; the numbers do not depend on which."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mirai_dist.commands import data_convert, data_embed
from mirai_dist.commands.arguments import VERBS
from mirai_dist.config import FileError
from mirai_dist.data.latents import CLEAN, Entry, LatentStore, Plan, StoreWriter
from tests import text_files
from tests.procs import tiny
from tests.procs.conftest import run_threads

SHAPE = (3, 16, 2, 4)  # frames, channels, rows, columns of tiny.yaml
COUNT = 7


def latents(number: int) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(number)).half()


def options(*words: str) -> Any:
    import argparse

    parser = argparse.ArgumentParser()
    VERBS["data"].configure(parser)
    return parser.parse_args(list(words))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """STORE, LMDB and UMT5 of seven clips."""
    folder = tmp_path_factory.mktemp("data")
    source = hashlib.sha256(b"seven clips").hexdigest()
    plan = Plan(CLEAN, COUNT, SHAPE, "float16", 3, source)
    writer = StoreWriter(folder / "store", plan)
    for shard in writer.missing():
        writer.write(shard, (Entry(f"a clip of {n} dogs", latents(n)) for n in plan.numbers(shard)))
    assert writer.seal() is not None
    words = ("convert", str(folder / "store"), "--to", "lmdb", "--out", str(folder / "lmdb"))
    assert data_convert.run(options(*words)) == 0
    text_files.write_pipeline(folder / "umt5")
    return folder


def trained(folder: Path, *overrides: str, stage: str = "ar_teacher") -> list[tuple[list[dict[str, float]], Any]]:
    """Metrics and numbers of both ranks after three updates."""
    text = (f"text.dim={text_files.SIZES.dim}", "text.length=12")
    recipe = tiny.recipe("stages.few_step.cycles=9", *text, *overrides)

    def body(rank: int) -> tuple[list[dict[str, float]], Any]:
        built = tiny.stage_of(recipe, stage)
        return tiny.train(built, 3), tiny.everything(built)

    with tiny.lively():
        return run_threads(2, body, tiny.TIMEOUT)


def test_a_store_and_its_lmdb_train_alike(folder: Path) -> None:
    umt5 = ("text.encoder=umt5", f"text.path={folder / 'umt5'}")
    ours = trained(folder, f"data.latents={folder / 'store'}", *umt5)
    published = trained(folder, f"data.latents={folder / 'lmdb'}", *umt5)
    for (metrics, numbers), (other_metrics, other) in zip(ours, published, strict=True):
        assert metrics == other_metrics
        assert tiny.unequal(numbers, other) == []


def test_embeddings_beside_the_store_train_as_the_encoder_does(folder: Path) -> None:
    store = folder / "store"
    prompts = LatentStore(store).prompts.path
    recipe = (f"data.latents={store}", "text.encoder=store", "text.path=unused", "data.prompts=unused")
    with pytest.raises(FileError, match=r"has no embeddings: mirai data embed .*prompts\.txt --encoder FOLDER --out"):
        trained(folder, *recipe)
    words = ("embed", str(prompts), "--encoder", str(folder / "umt5"), "--out", str(store / "embeddings"))
    assert data_embed.run(options(*words, "--length", "12")) == 0
    from_store = trained(folder, *recipe)
    from_encoder = trained(folder, f"data.latents={store}", "text.encoder=umt5", f"text.path={folder / 'umt5'}")
    for (metrics, numbers), (other_metrics, other) in zip(from_store, from_encoder, strict=True):
        assert metrics == other_metrics
        assert tiny.unequal(numbers, other) == []


def test_latents_of_another_shape_are_refused(folder: Path) -> None:
    wide = ("video.latent_width=6", "text.encoder=umt5", f"text.path={folder / 'umt5'}")
    with pytest.raises(FileError, match=r"holds latents of \[3, 16, 2, 4\].* the recipe's video has \[3, 16, 2, 6\]"):
        trained(folder, f"data.latents={folder / 'store'}", *wide)
