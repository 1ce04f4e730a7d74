from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import distribute_tensor

from mirai_dist.observe.metrics import CAPACITY, Metrics


def test_mean_over_adds_without_a_process_group() -> None:
    metrics = Metrics()
    metrics.add("loss", torch.tensor(1.0, requires_grad=True))
    metrics.add("loss", torch.tensor([2.0], dtype=torch.bfloat16))
    metrics.add("loss", 6.0)
    metrics.add("lr", 0.5)
    assert metrics.reduce() == {"loss": 3.0, "lr": 0.5}
    assert metrics.reduce() == {}


def test_sums_are_kept_in_float64() -> None:
    metrics = Metrics()
    for _ in range(3):
        metrics.add("x", torch.tensor(1e8, dtype=torch.float32))
        metrics.add("x", torch.tensor(1.0, dtype=torch.float32))
    assert metrics.reduce()["x"] == (3e8 + 3) / 6


def test_non_finite_values_come_through_and_touch_no_other() -> None:
    metrics = Metrics()
    metrics.add("bad", torch.tensor(float("nan")))
    metrics.add("good", 1.0)
    reduced = metrics.reduce()
    assert math.isnan(reduced["bad"]) and reduced["good"] == 1.0


def test_a_vector_or_too_many_names_are_refused() -> None:
    metrics = Metrics()
    with pytest.raises(ValueError, match=r"loss.*\(3,\)"):
        metrics.add("loss", torch.zeros(3))
    for index in range(CAPACITY + 1):
        metrics.add(f"m{index}", 0.0)
    with pytest.raises(ValueError, match=str(CAPACITY)):
        metrics.reduce()


def _mean() -> str:
    """The reduction of two metrics, and how many collectives it took."""
    calls = 0
    reduce, rank = dist.all_reduce, dist.get_rank()

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return reduce(*args, **kwargs)

    metrics = Metrics()
    for name in ("b", "a") if rank else ("a", "b"):  # the order of adding must not matter
        metrics.add(name, torch.tensor(float(rank + (name == "b") * 10)))
    metrics.add("a", float(rank))
    row = {"y": 0.1 + rank, "x": 5.0 * rank}
    metrics.send([rank, 0.0, 3.0 * rank], dict(reversed(row.items())) if rank else row)
    dist.all_reduce = counted
    try:
        return f"{metrics.reduce()} {calls} {metrics.arrived.votes[:4]} {metrics.arrived.rows}"
    finally:
        dist.all_reduce = reduce


def _different_names(extra: int) -> str:
    """The message when rank 1 holds `extra` more names, and one other than rank 0's for extra = 0."""
    metrics = Metrics()
    metrics.add("both", 1.0)
    rank = dist.get_rank()
    if extra == 0:
        metrics.add("left" if rank else "right", 1.0)
    for index in range(extra * rank):
        metrics.add(f"extra{index:03d}", 1.0)
    try:
        return str(metrics.reduce())
    except ValueError as error:
        return str(error)


def _different_rows() -> str:
    """The message when the ranks send numbers of different names."""
    metrics = Metrics()
    metrics.send([1.0], {"backward" if dist.get_rank() else "forward": 1.0})
    try:
        return str(metrics.reduce())
    except ValueError as error:
        return str(error)


def _dtensor() -> str:
    mesh = init_device_mesh("cpu", (2,))
    try:
        Metrics().add("norm", distribute_tensor(torch.tensor([1.0]), mesh))
    except TypeError as error:
        return str(error)
    return "accepted"


def _rank(rank: int, store: str, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results = {"mean": _mean(), "names": _different_names(0), "count": _different_names(100), "dtensor": _dtensor()}
    results["rows"] = _different_rows()
    Path(f"{out}-{rank}").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What each of two ranks saw; one start of the processes serves all tests."""
    directory = tmp_path_factory.mktemp("ranks")
    mp.spawn(_rank, args=(str(directory / "store"), str(directory / "out")), nprocs=2)  # type: ignore[attr-defined]
    return [json.loads((directory / f"out-{rank}").read_text()) for rank in range(2)]


def test_mean_over_ranks_takes_one_all_reduce_for_all_that_is_sent(on_two_ranks: list[dict[str, str]]) -> None:
    """Means, votes (summed), and every rank's own numbers to the last bit."""
    expected = "{'a': 0.5, 'b': 10.5} 1 [1.0, 0.0, 3.0, 0.0] {'x': [0.0, 5.0], 'y': [0.1, 1.1]}"
    assert [seen["mean"] for seen in on_two_ranks] == [expected] * 2


def test_ranks_that_send_different_names_all_raise(on_two_ranks: list[dict[str, str]]) -> None:
    left, right = (seen["rows"] for seen in on_two_ranks)
    assert left == right and "sent backward is missing on ranks 0; sent forward is missing on ranks 1" in left


def test_what_was_sent_goes_once() -> None:
    metrics = Metrics()
    metrics.send([1.0], {"forward": 2.0})
    metrics.reduce()
    assert (metrics.arrived.votes[0], metrics.arrived.rows) == (1.0, {"forward": [2.0]})
    metrics.reduce()
    assert (metrics.arrived.votes[0], metrics.arrived.rows) == (0.0, {})
    with pytest.raises(ValueError, match="17 votes"):
        metrics.send([0.0] * 17)


def test_ranks_with_different_names_all_raise_and_name_the_difference(on_two_ranks: list[dict[str, str]]) -> None:
    left, right = (seen["names"] for seen in on_two_ranks)
    assert left == right
    assert "left is missing on ranks 0" in left and "right is missing on ranks 1" in left and "both" not in left


def test_ranks_with_different_counts_do_not_hang(on_two_ranks: list[dict[str, str]]) -> None:
    for seen in on_two_ranks:
        assert "extra000 is missing on ranks 0" in seen["count"]


def test_a_dtensor_is_refused(on_two_ranks: list[dict[str, str]]) -> None:
    for seen in on_two_ranks:
        assert "full_tensor" in seen["dtensor"]
