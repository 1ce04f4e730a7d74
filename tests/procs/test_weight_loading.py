"""Weights into sharded networks: every rank reads its rows alone, and no rank's copy may differ from the others'."""

from __future__ import annotations

import gc
import json
import resource
import shutil
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from mirai_dist.config import FileError
from mirai_dist.config.schema import Parallel
from mirai_dist.models.wan import WanModel
from mirai_dist.models.wan.keys import WanShape, shapes_of
from mirai_dist.parallel.apply import apply
from mirai_dist.parallel.mesh import build_mesh
from mirai_dist.plan.shards import wan_plan
from mirai_dist.state.ema import named_tensors
from mirai_dist.weights import load
from mirai_dist.weights.files import open_weights
from mirai_dist.weights.folders import wan_config, write_folder
from mirai_dist.weights.load import LoadReport, agreed, load_into
from tests import wan_files
from tests.wan_files import SIZES, STEM

TENSORS = wan_files.tiny_tensors(6)
SMALL = WanShape(1536, 8960, 12, 30)  # Wan2.1-T2V-1.3B
BYTES = sum(tensor.nbytes for tensor in TENSORS.values())
FORMS = {
    "official": wan_files.official,
    "diffusers": wan_files.diffusers,
    "pt": lambda path, tensors: wan_files.pt(path, tensors, "self-forcing"),
}


def sharded(sizes: WanShape, trained: bool, replicas: int = 1) -> nn.Module:
    """A Wan network, meta-built, sharded by its plan and allocated: fp32 masters if trained, frozen bf16 if not."""
    with torch.device("meta"):
        network = WanModel(sizes)
    plan = wan_plan(Parallel(replicas=replicas), sizes.blocks, trained=trained)
    network.to(getattr(torch, plan.storage_dtype))
    apply(network, plan, build_mesh(dist.get_world_size(), replicas, "cpu"))
    network.requires_grad_(trained)
    network.to_empty(device="cpu")
    return network


def whole(network: nn.Module) -> dict[str, Tensor]:
    """The full parameters, on every rank."""
    return {name: tensor.full_tensor().detach() if isinstance(tensor, DTensor) else tensor.detach()
            for name, tensor in named_tensors(network).items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor], dtype: torch.dtype) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name].to(dtype)) for name in one)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_read_the_file_once_between_them(tmp_path: Path, threads: Any, ranks: int, form: str) -> None:
    path = FORMS[form](tmp_path / "w", TENSORS)

    def body(rank: int) -> LoadReport:
        file = open_weights(path)
        network = sharded(SIZES, trained=True)
        report = load_into(network, file)
        assert report.bytes_read == file.bytes_read
        assert same(whole(network), TENSORS, torch.float32)
        return report

    reports = threads(ranks)(body)
    assert sum(report.bytes_read for report in reports) == BYTES
    # 40 rows divide by 2 and 4, the six vectors of a modulation [1, 6, 40] stay on one rank: 3 x 960 + 320 bytes
    assert all(abs(report.bytes_read - BYTES / ranks) <= 3200 for report in reports)
    assert len({report.checksum for report in reports}) == 1


def test_uneven_rows_and_frozen_bf16(tmp_path: Path, threads: Any) -> None:
    path = wan_files.official(tmp_path / "w", TENSORS)  # 3 ranks: 40 rows are 14, 14, 12; a modulation is on rank 0

    def body(rank: int) -> LoadReport:
        network = sharded(SIZES, trained=False)
        report = load_into(network, open_weights(path))
        assert same(whole(network), TENSORS, torch.bfloat16)
        return report

    reports = threads(3)(body)
    assert sum(report.bytes_read for report in reports) == BYTES
    one = WanModel(SIZES)
    assert load_into(one, open_weights(path)).checksum == reports[0].checksum  # of the file: no dtype, no world size


def test_replicas_read_the_file_once_each(tmp_path: Path, threads: Any) -> None:
    path = wan_files.official(tmp_path / "w", TENSORS)

    def body(rank: int) -> int:
        network = sharded(SIZES, trained=False, replicas=2)
        report = load_into(network, open_weights(path))
        assert same(whole(network), TENSORS, torch.bfloat16)
        return report.bytes_read

    assert sum(threads(4)(body)) == 2 * BYTES


def test_pieces_join_without_a_seam(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: Any) -> None:
    monkeypatch.setattr(load, "PIECE_BYTES", 500)  # three rows of the widest matrices at a time
    path = write_ours(tmp_path / "w")

    def body(rank: int) -> None:
        network = sharded(SIZES, trained=True)
        load_into(network, open_weights(path))
        assert same(whole(network), TENSORS, torch.float32)

    threads(2)(body)


def write_ours(path: Path) -> Path:
    """A folder with checksums."""
    write_folder(path, list(TENSORS), TENSORS.__getitem__, wan_config(SIZES), {"kind": "diffusion"})
    return path


# Copies of a file on local disks: one rank's is another.


def flip(path: Path, place: int) -> None:
    """Change the lowest bit of one byte; places are chosen in the data."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def data_place(folder: Path, name: str, element: int) -> tuple[Path, int]:
    """File and offset of a byte of an element of a tensor."""
    stored: Any = open_weights(folder).stored[name]
    return stored.file, stored.offset + 4 * element


def lines_of(threads: Any, ranks: int, copies: list[Path], replicas: int = 1) -> set[str]:
    """What each rank says that loads its own copy; all must fail."""
    def body(rank: int) -> str:
        network = sharded(SIZES, trained=False, replicas=replicas)
        with pytest.raises(FileError) as raised:
            load_into(network, agreed(copies[rank], lambda: open_weights(copies[rank])))
        return raised.value.what
    return set(threads(ranks)(body))


def copies_of(source: Path, count: int) -> list[Path]:
    return [Path(shutil.copytree(source, source.with_name(f"copy-{rank}"))) for rank in range(count)]


def test_another_checkpoint_on_one_rank_is_found_without_checksums(tmp_path: Path, threads: Any) -> None:
    copies = [wan_files.official(tmp_path / f"{rank}", TENSORS if rank != 2 else wan_files.tiny_tensors(7))
              for rank in range(3)]
    lines = lines_of(threads, 3, copies)
    assert len(lines) == 1 and "is another file on rank 2: content" in lines.pop()


def test_a_truncated_copy_names_its_rank_on_all_ranks(tmp_path: Path, threads: Any) -> None:
    copies = copies_of(wan_files.official(tmp_path / "w", TENSORS), 2)
    shard = copies[1] / f"{STEM}-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    lines = lines_of(threads, 2, copies)
    assert len(lines) == 1 and "is truncated" in (line := lines.pop()) and line.endswith("(rank 1)")


def test_a_copy_with_other_shards_is_another_file(tmp_path: Path, threads: Any) -> None:
    copies = [wan_files.official(tmp_path / f"{rank}", TENSORS, shards=3 + rank // 2) for rank in range(3)]
    lines = lines_of(threads, 3, copies)
    assert len(lines) == 1 and "is another file on rank 2: " in lines.pop()


def test_one_flipped_bit_is_found_by_checksums_and_the_rank_named(tmp_path: Path, threads: Any) -> None:
    copies = copies_of(write_ours(tmp_path / "w"), 2)
    flip(*data_place(copies[1], "blocks.1.ffn.0.weight", 1900))  # the last rows, which are rank 1's
    lines = lines_of(threads, 2, copies)
    assert len(lines) == 1 and "blocks.1.ffn.0.weight is not what its checksum says on rank 1:" in lines.pop()
    flip(*data_place(copies[1], "blocks.1.ffn.0.weight", 1900))
    flip(*data_place(copies[1], "blocks.1.ffn.0.weight", 3))  # rank 0's rows: this copy of them is never read
    loaded = threads(2)(lambda rank: load_into(sharded(SIZES, trained=False), open_weights(copies[rank])).checksum)
    assert len(set(loaded)) == 1


def test_one_flipped_bit_is_found_by_replicas_without_checksums(tmp_path: Path, threads: Any) -> None:
    copies = copies_of(wan_files.official(tmp_path / "w", TENSORS), 6)
    flip(*data_place(copies[3], "blocks.1.ffn.0.weight", 1900))  # ranks 1, 3 and 5 read these rows
    lines = lines_of(threads, 6, copies, replicas=3)
    assert lines == {"blocks.1.ffn.0.weight was read with other values on rank 3 than on rank 1; copy the file to all "
                     "nodes again"}


def test_a_value_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path, threads: Any) -> None:
    tensors = {name: tensor.clone() for name, tensor in TENSORS.items()}
    tensors["head.head.weight"][-1, -1] = torch.inf
    lines = lines_of(threads, 4, [wan_files.official(tmp_path / "w", tensors)] * 4)
    assert len(lines) == 1 and "head.head.weight holds NaN or infinite values" in (line := lines.pop())
    assert line.endswith("(rank 3)")


def test_memory_that_does_not_keep_what_is_written_is_noticed(tmp_path: Path) -> None:
    file = open_weights(wan_files.official(tmp_path / "w", TENSORS))
    real = load.checksum

    def forgetful(values: Tensor, start: int = 0) -> int:
        return real(values, start) + (values.dtype == torch.bfloat16 and values._base is not None)

    with mock.patch.object(load, "checksum", forgetful), pytest.raises(FileError, match="do not use this machine"):
        load_into(WanModel(SIZES).bfloat16(), file)


# Real processes, full size.


def _random_official(folder: Path) -> int:
    """Wan2.1-T2V-1.3B's folder with random bf16 weights, 2.8 GB, written a shard at a time."""
    folder.mkdir()
    shapes = shapes_of(SMALL)
    names, weight_map = sorted(shapes), {}
    draws = torch.Generator().manual_seed(1)
    for number in range(6):
        file = f"{STEM}-{number + 1:05d}-of-00006.safetensors"
        held = names[number * len(names) // 6 : (number + 1) * len(names) // 6]
        save_file({name: torch.randn(shapes[name], generator=draws, dtype=torch.bfloat16) for name in held},
                  folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(held, file)
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(wan_files.official_config(SMALL)))
    return sum(file.stat().st_size for file in folder.iterdir())


def _status(key: str) -> float:
    """A line of /proc/self/status in GB."""
    text = Path("/proc/self/status").read_text()
    return int(next(line for line in text.splitlines() if line.startswith(f"{key}:")).split()[1]) * 1024 / 1e9


def load_full_size(folder: Path) -> None:
    """On each rank: load the 1.3B as a frozen bf16 network, and write down what it took."""
    baseline = _status("RssAnon")
    started = time.perf_counter()
    network = sharded(SMALL, trained=False)
    peak = [baseline]
    fill = load._fill_rows

    def watched(*arguments: Any) -> Any:
        part = fill(*arguments)
        peak.append(_status("RssAnon"))
        return part

    file = open_weights(folder / "weights")
    with mock.patch.object(load, "_fill_rows", watched):
        report = load_into(network, file)
    shard = sum(tensor.to_local().nbytes for tensor in network.parameters() if isinstance(tensor, DTensor))
    numbers = {
        "shard_gb": shard / 1e9, "file_gb": file.bytes / 1e9, "read_gb": report.bytes_read / 1e9,
        "seconds_load": report.seconds, "seconds_all": time.perf_counter() - started, "baseline_anon_gb": baseline,
        "peak_anon_gb": max(peak), "anon_after_gb": _status("RssAnon"), "peak_rss_gb": _status("VmHWM"),
        "maxrss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, "checksum": report.checksum,
    }
    (folder / f"numbers-{dist.get_rank()}.json").write_text(json.dumps(numbers))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_full_size_network_loads_with_memory_near_its_shard(tmp_path: Path, torchrun: Any) -> None:
    if shutil.disk_usage(tmp_path).free < 6e9:
        pytest.skip("needs 6 GB of disk")
    size = _random_official(tmp_path / "weights")
    gc.collect()
    torchrun(2, load_full_size, timeout=600)
    numbers = [json.loads((tmp_path / f"numbers-{rank}.json").read_text()) for rank in range(2)]
    shutil.rmtree(tmp_path / "weights")
    print(json.dumps(numbers, indent=1))  # shown with -s
    assert size > 2 * 1_418_996_800
    assert sum(each["read_gb"] for each in numbers) == pytest.approx(2 * 1.4189968)
    for each in numbers:
        assert each["shard_gb"] == pytest.approx(1.419, abs=0.01) and each["read_gb"] == pytest.approx(1.419, abs=0.01)
        assert each["peak_anon_gb"] - each["baseline_anon_gb"] < each["shard_gb"] + 0.15
        assert each["peak_rss_gb"] - each["baseline_anon_gb"] < each["shard_gb"] + 0.6
    assert numbers[0]["checksum"] == numbers[1]["checksum"]
