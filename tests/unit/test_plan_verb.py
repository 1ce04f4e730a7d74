"""`mirai plan`: what it prints, what it never guesses, what it imports; verdicts, and the check at a run's start."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mirai_dist.config import RecipeError, load
from mirai_dist.plan import gpus, host, passes, time, traffic
from mirai_dist.plan.estimate import Cluster, plan, variants_of
from mirai_dist.plan.gpus import GIB, GPUS
from mirai_dist.plan.verdict import headline, judged, refuse_over
from mirai_launch.__main__ import main
from mirai_launch.verbs.plan import nodes_up_to, shapes_of

ROOT = Path(__file__).parents[2]
WAN = ROOT / "recipes" / "wan" / "causal-forcing-chunkwise-mirai-1x8.yaml"
HYBRID = ROOT / "recipes" / "wan" / "causal-forcing-chunkwise-mirai-8x8.yaml"
TINY = ROOT / "recipes" / "tiny" / "video_mirai.yaml"
H100 = GPUS["h100-80gb"]


def printed(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> str:
    assert main(["plan", *map(str, arguments)]) == code
    return capsys.readouterr().out


def test_a_plan_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, HYBRID, "--nodes", 8)
    assert "64 ranks, 8 replicas x 8 shards" in text
    assert "generator 1,418,996,800" in text and "teacher 14,288,491,584" in text
    for phase in ("generator rollout", "generator scores", "generator encoder", "critic backward", "replay"):
        assert f"\n  {phase}  " in text
    assert "(model, not measured)" in text and "assumed: " in text
    assert text.rstrip().splitlines()[-1].startswith("fits: peak ")


def test_json_holds_what_people_read(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, HYBRID, "--nodes", 8, "--json"))
    (stage,) = found["stages"]
    largest = max(stage["memory"], key=lambda moment: moment["bytes"])
    assert found["fits"] is True and found["gpu"] == "h100-80gb"
    assert sum(each["bytes"] for each in largest["held"]) == largest["bytes"] < found["peak_bytes"]
    assert found["headroom_bytes"] == found["limit_bytes"] - found["peak_bytes"]
    seconds = sum(each["compute"] + each["exposed"] for each in stage["seconds"].values())
    assert seconds == pytest.approx(found["seconds_a_cycle"])
    assert found["gpu_hours"] == pytest.approx(found["seconds"] * 64 / 3600)


def test_an_unknown_gpu_is_never_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, TINY, "--gpus-per-node", 2, "--gpu", "h100")
    assert "h100 is not in the table of GPUs (nearest: " in text and "h100-80gb" in text
    assert "GPU-hours" not in text and "s a cycle" not in text
    assert text.rstrip().splitlines()[-1].endswith("no limit is known, set one with --gpu-memory")
    unknown = ["--gpus-per-node", 2, "--gpu", "h100", "--gpu-memory", "1 MiB", "--json"]
    found = json.loads(printed(capsys, TINY, *unknown, code=1))
    assert found["fits"] is False and found["limit_bytes"] == 1 << 20
    assert found["gpu"] is found["seconds_a_cycle"] is found["gpu_hours"] is found["stages"][0]["seconds"] is None


def test_float32_has_no_seconds_on_a_bfloat16_peak() -> None:
    found = plan(load(TINY).recipe, Cluster(1, 2, H100))
    assert found.seconds_a_cycle is None and found.fits


@pytest.mark.parametrize(("text", "count"), [("80GiB", 80 * GIB), ("1.5 gb", 1_500_000_000), ("512", 512)])
def test_sizes(text: str, count: int) -> None:
    assert gpus.bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "80 apples", "-1GiB", "0", "GiB", "3i"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(RecipeError, match="is no amount of memory"):
        gpus.bytes_of(text)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80gb"),
        ("NVIDIA H200", "h200-141gb"),
        ("NVIDIA A100-SXM4-40GB", "a100-40gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA H100 PCIe", None),
        ("Tesla V100-SXM2-16GB", None),
    ],
)
def test_what_drivers_call_them(model: str, name: str | None) -> None:
    found = gpus.of_model(model)
    assert (found.name if found else None) == name


# --- verdicts --------------------------------------------------------------------------------------------------------


def test_the_smallest_change_makes_it_fit(capsys: pytest.CaptureFixture[str]) -> None:
    text = printed(capsys, WAN, "--gpu", "a100-40gb", code=1).rstrip().splitlines()[-1]
    assert text.startswith("does not fit: stage distil foresight needs ") and "predictor 17.5" in text
    change = text.rpartition("; ")[2].partition(" (")[0]
    assert change == "parallel.sync_every_micro_batch=true"
    assert printed(capsys, WAN, "--gpu", "a100-40gb", change).rstrip().splitlines()[-1].startswith("fits: ")


def test_the_fused_head_holds_no_predictions() -> None:
    """One generator update, one sample: the predictor's part of its backward is mostly predictions and their cosine."""

    def predictor(kernels: str) -> int:
        recipe = load(WAN, [f"parallel.kernels={kernels}"]).recipe
        (found,) = plan(recipe, Cluster(1, 8, H100)).stages
        return max(sum(n for (_, role), n in each.held.items() if role == "predictor") for each in found.moments)

    predictions = 7 * 4680 * 5120
    assert predictor("reference") - predictor("fused") > (2 + 3 * 4 + 2 * 4) * predictions
    assert predictor("reference") == predictor("auto")  # which of them serves is known where it runs


def test_several_changes_where_one_is_not_enough(capsys: pytest.CaptureFixture[str]) -> None:
    wasteful = ["parallel.recompute=none", "parallel.reshard_after_forward=false"]
    text = printed(capsys, WAN, "--gpu", "a100-40gb", *wasteful, code=1).rstrip().splitlines()[-1]
    changes = text.rpartition("; ")[2].split()
    assert "parallel.recompute=block" in changes and "parallel.reshard_after_forward=true" in changes
    better = printed(capsys, WAN, "--gpu", "a100-40gb", *wasteful, *changes)
    assert better.rstrip().splitlines()[-1].startswith("fits: ")


def test_more_ranks_are_a_change_too() -> None:
    recipe = load(HYBRID, ["parallel.replicas=1", "stages.distil.batch.global_size=512"]).recipe
    need = plan(recipe, Cluster(4, 8, H100)).peak
    found = judged(recipe, Cluster(1, 8, H100, memory=need + GIB))
    assert found.fits is False and "--nodes" in found.change


def test_nothing_makes_it_fit() -> None:
    found = judged(load(TINY).recipe, Cluster(1, 2, memory=1 << 20))
    assert found.fits is False and found.change == ""


def test_a_run_over_the_limit_is_refused() -> None:
    resolved, small = load(TINY), Cluster(1, 2, memory=1 << 20)
    with pytest.raises(RecipeError, match=r"^plan: stage .* needs .* GiB a rank in .*; parallel.over_memory=warn"):
        refuse_over(resolved, small)
    told = refuse_over(load(TINY, ["parallel.over_memory=warn"]), small)
    assert told.fits is False and headline(told).endswith("(predicted)")
    assert refuse_over(resolved, Cluster(1, 2, memory=8 * GIB)).fits


def test_train_refuses_before_any_rank_starts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "machine_memory", lambda: 1 << 20)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert main(["train", str(TINY), "--run-dir", str(tmp_path / "run")]) == 20
    assert "mirai: plan: stage" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_machine_and_its_gpu(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("max\n")
    whole = host.machine_memory((limit, tmp_path / "absent"))
    assert whole == host.machine_memory(()) > GIB
    limit.write_text("1048576\n")
    assert host.machine_memory((limit,)) == 1 << 20
    assert host.driver_gpu(tmp_path) is None
    (tmp_path / "0000:17:00.0").mkdir()
    (tmp_path / "0000:17:00.0" / "information").write_text("Model: \t\t NVIDIA H200\nIRQ: 14\n")
    assert host.driver_gpu(tmp_path) is GPUS["h200-141gb"]


# --- sweep -----------------------------------------------------------------------------------------------------------


def test_the_sweep_compares_nodes_and_meshes(capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(printed(capsys, HYBRID, "--nodes", 16, "--sweep", "--json"))
    shapes = [(row["nodes"], row["replicas"]) for row in rows]
    assert shapes == [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 1), (8, 2), (8, 4), (8, 8), (16, 1)]
    assert "cannot be split over 128 ranks" in rows[-1]["refused"]
    text = printed(capsys, HYBRID, "--nodes", 16, "--sweep")
    assert "8 x 8" in text and "cannot be split over 128 ranks" in text


def test_shapes_of_a_sweep() -> None:
    assert nodes_up_to(6) == [1, 2, 4, 6] and nodes_up_to(1) == [1]
    assert shapes_of(Cluster(6, 8)) == [1, 3, 6]


# --- traffic and time ------------------------------------------------------------------------------------------------


def test_bytes_of_rings() -> None:
    inside, across = (1, 8), (1, 64)
    assert traffic.wire(traffic.GATHER, 800, inside, 8) == traffic.Wire(intra=700)
    assert traffic.wire(traffic.REDUCE_SCATTER, 640, across, 8) == traffic.Wire(intra=630, inter=630)
    # eight shards a node, each reduced over eight nodes: eight rings leave each node
    assert traffic.wire(traffic.ALL_REDUCE, 80, (8, 8), 8) == traffic.Wire(inter=8 * 2 * 7 / 8 * 80)
    assert traffic.wire(traffic.ALL_REDUCE, 80, (2, 4), 8) == traffic.Wire(intra=80)


def test_hybrid_sharding_keeps_gathers_inside_the_node() -> None:
    recipe, cluster = load(HYBRID).recipe, Cluster(8, 8, H100)
    whole = replace(recipe, parallel=replace(recipe.parallel, replicas=1))

    def to_network(found: object) -> float:
        (stage,) = found.stages  # type: ignore[attr-defined]
        mesh = (stage.replicas, 64 // stage.replicas)
        sent = [traffic.wire(kind, each.payload, mesh, 8).inter for (_, kind), each in stage.moved.items()]
        return sum(sent)

    assert to_network(plan(recipe, cluster)) < to_network(plan(whole, cluster)) / 5


def test_seconds_follow_the_peak_and_the_links() -> None:
    recipe = load(HYBRID).recipe
    base = plan(recipe, Cluster(8, 8, H100)).seconds_a_cycle
    faster = plan(recipe, Cluster(8, 8, replace(H100, flops=2 * H100.flops))).seconds_a_cycle
    starved = plan(recipe, Cluster(8, 8, replace(H100, link=H100.link / 1000))).seconds_a_cycle
    assert base and faster and starved
    assert base / 2 < faster < base < starved


def test_foresight_begins_late_and_costs_from_then_on() -> None:
    framewise = load(ROOT / "recipes" / "wan" / "causal-forcing-framewise-mirai-8x8.yaml").recipe
    (stage,) = plan(framewise, Cluster(8, 8, H100)).stages
    assert (stage.cycles, stage.foresight_cycles) == (100, 20)
    assert stage.seconds_a_cycle and stage.seconds_of_all
    assert 80 * stage.seconds_a_cycle < stage.seconds_of_all < 100 * stage.seconds_a_cycle


def test_expected_passes_of_a_rollout() -> None:
    """Seven segments of 1 to 4 steps: 7 x 2.5 denoising passes and 6 context passes; of them 7 differentiated."""
    rolled = passes.rollout(load(WAN).recipe, 1, gradient=True)
    assert sum(each.count for each in rolled) == pytest.approx(7 * 2.5 + 6)
    assert sum(each.count for each in rolled if each.gradient) == pytest.approx(7)
    assert time.HOP[True] > time.HOP[False]


# --- login nodes -----------------------------------------------------------------------------------------------------


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from mirai_launch.__main__ import main\n"
        f"assert main(['plan', {str(WAN)!r}, '--sweep']) == 0\n"
        "heavy = {'torch', 'numpy', 'triton'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    paths = [str(ROOT), str(ROOT / "launcher"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# --- stages and arms -------------------------------------------------------------------------------------------------


def test_stages_and_arms_are_planned_as_they_see_the_recipe() -> None:
    own = load(TINY, ["stages.ar_teacher.overrides=[parallel.recompute=block]", "parallel.over_memory=warn"])
    plain, changed = (
        {stage.title: stage for stage in plan(each.recipe, Cluster(1, 2), variants_of(each)).stages}
        for each in (load(TINY), own)
    )
    assert plain.keys() == changed.keys() >= {"teacher", "ar_teacher", "few_step", "distil baseline"}
    assert "predictor" not in plain["distil baseline"].parameters
    assert "predictor" in plain["distil foresight"].parameters
    assert changed["ar_teacher"].peak.total < plain["ar_teacher"].peak.total
    assert changed["teacher"].peak == plain["teacher"].peak
    assert plain["distil foresight"].runs == 3 and plain["teacher"].runs == 1
