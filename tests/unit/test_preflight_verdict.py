"""What the pre-flight makes of the ranks' reports: who is slow, who differs, whose clock is off, who is chosen."""

from __future__ import annotations

import itertools
import json
import random
from collections import Counter
from dataclasses import asdict, replace

import pytest

from mirai_dist.config.error import RecipeError
from mirai_dist.node.finding import Finding
from mirai_dist.runtime import measures, preflight, rounds
from mirai_dist.runtime.outliers import Measure, Sample, slow
from mirai_dist.runtime.verdict import ON_CPU, ON_GPU, Report, Verdict, judge, load_report, silent

GEMM = Measure("matrix products", "TFLOP/s", floor=0.15)


def samples(*values: float, ranks: int = 1) -> list[Sample]:
    return [Sample(f"n{i // ranks + 1}", i, value) for i, value in enumerate(values)]


def slow_hosts(*values: float, ranks: int = 1) -> set[str]:
    return {each.sample.host for each in slow(samples(*values, ranks=ranks), GEMM)}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((600, 598, 601, 599, 590), set()),  # 590 is 14 robust deviations away, and 2 % is nobody's fault
        ((600, 598, 601, 599, 500), {"n5"}),
        ((600, 500), {"n2"}),  # one of two: the other is the yardstick
        ((600, 560), set()),
        ((600, 598, 200), {"n3"}),
        ((600, 200, 210), set()),  # two of three: who knows which is right
        ((600, 598, 601, 300, 310), {"n4", "n5"}),
        ((600, 900, 620, 610), set()),  # faster than the others is no fault
        ((6.3, 8.5, 0.9), {"n3"}),  # two that differ are no excuse for a seventh of either
        ((700, 500, 620, 560, 640, 450), set()),  # a wide spread needs a wide shortfall
        ((600,), set()),
    ],
)
def test_who_is_slow(values: tuple[float, ...], expected: set[str]) -> None:
    assert slow_hosts(*values) == expected


def test_all_ranks_of_one_of_two_hosts_are_told_from_those_of_the_other() -> None:
    good, bad = (600, 601, 598, 602, 599, 600, 597, 603), (400, 402, 399, 401, 400, 398, 403, 400)
    assert slow_hosts(*good, *bad, ranks=8) == {"n2"}


def test_noise_of_a_few_per_cent_accuses_nobody_on_a_thousand_ranks() -> None:
    draw = random.Random(0)
    speeds = [600 * (1 + draw.gauss(0, 0.02)) for _ in range(1000)]
    assert slow_hosts(*speeds, ranks=8) == set()
    speeds[537] = 420
    assert slow_hosts(*speeds, ranks=8) == {"n68"}


@pytest.mark.parametrize("count", [2, 3, 4, 5, 8, 125])
def test_every_round_is_of_disjoint_pairs_that_did_not_meet_before(count: int) -> None:
    found = rounds.pairs(count, 4)
    assert len(found) == min(4, count - 1 + count % 2)
    assert all(len(set(itertools.chain(*turn))) == 2 * len(turn) for turn in found), "disjoint"
    assert all(len(turn) == count // 2 for turn in found), "nobody sits out but one of an odd number"
    met = Counter(itertools.chain(*found))
    assert max(met.values()) == 1 and all(low < high for low, high in met)


@pytest.mark.parametrize("shape", [(8,) * 125, (1, 1, 1), (3, 1, 2), (4,)])
def test_peers_agree_and_messages_grow_with_the_ranks_alone(shape: tuple[int, ...]) -> None:
    hosts = [f"n{node}" for node, count in enumerate(shape) for _ in range(count)]
    every = [rounds.peers(hosts, rank) for rank in range(len(hosts))]
    for across, same in ((True, 0), (False, 1)):
        plans = [plan[same] for plan in every]
        assert len({len(plan) for plan in plans}) == 1 and len(plans[0]) <= (rounds.ACROSS if across else rounds.INSIDE)
        for rank, plan in enumerate(plans):
            for turn, peer in enumerate(plan):
                assert peer is None or (plans[peer][turn] == rank and peer != rank)
                assert peer is None or (hosts[peer] != hosts[rank]) == across


def marks(shift: float, delays: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Ten all-reduces, one a second, seen by a clock that is `shift` ahead: begun and ended so long around them."""
    return [(i - before + shift, i + after + shift) for i, (before, after) in enumerate(delays)]


def test_the_offset_of_a_clock_lies_in_the_interval_that_is_claimed() -> None:
    draw = random.Random(1)
    delays = [[(draw.random() * 0.01, draw.random() * 0.01) for _ in range(10)] for _ in range(2)]
    for shift in (-3.0, 0.0, 0.25):
        offset, uncertainty = measures.clock_offset(marks(shift, delays[0]), marks(0.0, delays[1]))
        assert 0 < uncertainty < 0.01 and abs(offset - shift) <= uncertainty
    jumped = [*marks(0.0, delays[0])[:5], *marks(2.0, delays[0])[5:]]
    assert measures.clock_offset(jumped, marks(0.0, delays[1]))[1] < 0, "no constant offset explains it"


def report(node: int, **changes) -> Report:
    """A good rank of its own host."""
    good = Report(
        node - 1, f"n{node}", same={"torch": "2.13.0", "NCCL": "2.27"}, usual={"driver": "550"},
        uuid=f"GPU-{node}", values={"matrix products": 6e14, "link to other hosts": 4e10, "writing checkpoints": 1e9},
        clock=(0.0, 0.001), across=("ib",), inside=("nvlink",),
    )  # fmt: skip
    return replace(good, **changes)


def verdict(*changed: Report, count: int = 4, **options) -> Verdict:
    reports = {node: report(node) for node in range(1, count + 1)} | {each.rank + 1: each for each in changed}
    return judge(list(reports.values()), ON_GPU, **options)


def speeds(**changes: float) -> dict[str, float]:
    return dict(report(1).values) | changes


def test_good_nodes_pass() -> None:
    found = verdict(expected=("ib", "nvlink"), nodes=4)
    assert (found.level, found.document()["verdict"], found.line()) == ("ok", "pass", "4 hosts, nothing to remark")


SLOW = {"matrix products": 2e14}
LINKS = {"link to other hosts": 1e10}
WRITES = {"writing checkpoints": 1e8}
MEMLOCK = (Finding("locked memory (ulimit -l)", "fail", "64 KiB", "ulimit -l unlimited"),)


@pytest.mark.parametrize(
    ("change", "level", "line"),
    [
        ({"values": speeds(**SLOW)}, "suspect", "n3: matrix products: 200 TFLOP/s on rank 2, median of the others 600"),
        ({"values": speeds(**LINKS)}, "suspect", "n3: link to other hosts: 10 GB/s on rank 2, median of the others 40"),
        ({"values": speeds(**WRITES)}, "warn", "n3: writing checkpoints: 100 MB/s on rank 2, median of the others 1e+"),
        ({"same": {"torch": "2.12.0", "NCCL": "2.27"}}, "suspect", "n3: torch: 2.12.0, elsewhere 2.13.0"),
        ({"same": {"torch": "2.13.0"}}, "suspect", "n3: NCCL: none, elsewhere 2.27"),
        ({"usual": {"driver": "535"}}, "warn", "n3: driver: 535, elsewhere 550"),
        ({"uuid": "GPU-1"}, "fail", "n1: gpu uuid: ranks 0, 2 share GPU-1"),
        ({"findings": MEMLOCK}, "suspect", "n3: locked memory (ulimit -l): 64 KiB; ulimit -l unlimited"),
        ({"clock": (2.5, 0.2)}, "warn", "n3: clock: +2.500 s from the median clock, known to 0.200 s"),
        ({"clock": (2.5, 1.6)}, "ok", ""),  # it may be 0.9 s
        ({"clock": (0.0, -0.5)}, "warn", "n3: clock: was set while it was looked at"),
        ({"across": ("socket",)}, "suspect", "n3: transport: socket to other hosts, expected ib"),
        ({"inside": ("pcie",)}, "suspect", "n3: transport: pcie inside the host, expected nvlink"),
        ({"across": (), "inside": (), "unknown": "no log"}, "suspect", "n3: transport: ib is expected, and what"),
        ({"host": "n2"}, "warn", "all hosts: hosts: the launcher speaks of 4 nodes, and the ranks are on 3"),
    ],
)
def test_the_one_bad_node_of_four_is_named(change: dict, level: str, line: str) -> None:
    found = verdict(report(3, **change), expected=("ib", "nvlink"), nodes=4)
    assert found.level == level and (found.line().startswith(line) or level == "ok"), found.line()
    assert list(found.suspects) == (["n3"] if level == "suspect" else [])


def test_what_most_nodes_have_is_no_ones_fault() -> None:
    every = [report(node, findings=MEMLOCK, across=("socket",)) for node in (1, 2, 3)]
    found = verdict(*every, expected=("ib",))
    assert found.level == "fail" and found.suspects == {}
    assert found.line().startswith("n1, n2, n3: locked memory")
    half = verdict(*[report(node, same={"torch": "2.12.0"}) for node in (1, 2)])
    assert half.level == "fail" and "torch: 2.12.0 on n1, n2; 2.13.0 on n3, n4; make them equal" in half.line()


def test_a_silent_host_is_suspect() -> None:
    found = judge([report(1), report(2)], ON_GPU, [silent("n3", "joining the others", 45.0)])
    assert found.suspects == {
        "n3": "joining the others: a rank did not finish this within 45 s; the node may be hung or very slow"
    }


def test_cpu_ranks_share_their_machine_and_only_differences_by_a_factor_count() -> None:
    halved = [report(node, values=speeds(**{"matrix products": 6e14 / max(1, node - 1)})) for node in (1, 2, 3)]
    assert judge(halved, ON_CPU).level == "ok" and judge(halved, ON_GPU).level == "suspect"
    assert judge([*halved, report(4, values=speeds(**{"matrix products": 1e13}))], ON_CPU).suspects.keys() == {"n4"}


def test_a_report_survives_the_way_to_rank_0() -> None:
    sent = report(3, findings=MEMLOCK)
    back = load_report(json.loads(json.dumps(asdict(sent))))
    assert judge([report(1), report(2), back], ON_GPU, expected=("ib",)).line() == judge(
        [report(1), report(2), sent], ON_GPU, expected=("ib",)
    ).line()


def test_a_thousand_ranks_are_judged_and_fit_into_a_small_record() -> None:
    draw = random.Random(2)
    every = []
    for rank in range(1000):
        gemm = 6e14 * (1 + draw.gauss(0, 0.02)) * (0.5 if rank == 777 else 1)
        values = speeds(**{"matrix products": gemm})
        every.append(Report(rank, f"n{rank // 8}", values=values, uuid=str(rank), clock=(0.0, 0.01)))
    found = judge(every, ON_GPU)
    assert list(found.suspects) == ["n97"] and "on rank 777" in found.line()
    assert len(preflight.text(found.document())) < 1 << 20


def choices(wanted: int, *changed: Report) -> tuple[list[str], dict[str, str]]:
    return preflight.choose(verdict(*changed), wanted)


def test_the_best_are_chosen_in_the_schedulers_order() -> None:
    assert choices(3) == (["n1", "n2", "n3"], {"n4": "spare; worst measure 1.00 of the median"})
    slower = report(2, values=speeds(**{"matrix products": 5.7e14}))
    assert choices(3, slower) == (["n1", "n3", "n4"], {"n2": "spare; worst measure 0.95 of the median"})
    warned = report(1, usual={"driver": "535"})
    chosen, left = choices(3, slower, warned)
    assert chosen == ["n2", "n3", "n4"]
    assert left == {"n1": "spare; driver: 535, elsewhere 550; worst measure 1.00 of the median"}
    unfit = report(4, values=speeds(**SLOW))
    chosen, left = choices(2, slower, warned, unfit)
    assert chosen == ["n2", "n3"] and left["n4"].startswith("matrix products: 200 TFLOP/s")
    assert choices(4, unfit)[0] == ["n1", "n2", "n3"], "an unfit one is not taken for want of others"


def test_a_bad_verdict_raises_with_the_exit_code_and_the_hosts_to_avoid() -> None:
    with pytest.raises(preflight.SuspectNode, match="pre-flight: n4: matrix products") as raised:
        preflight.refuse(verdict(report(4, values=speeds(**SLOW))).document())
    assert (raised.value.exit_code, raised.value.suspects) == (30, ["n4"])
    with pytest.raises(preflight.NotFit) as refused:
        preflight.refuse(verdict(report(4, uuid="GPU-1")).document())
    assert refused.value.exit_code == 20
    preflight.refuse(verdict(report(4, usual={"driver": "535"})).document())


def test_hosts_and_transports_as_written() -> None:
    env = {"SLURM_STEP_NODELIST": "n[1-2],m7", "SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}
    assert preflight.hosts_of_ranks(env) == ["n1", "n1", "n2", "n2", "m7"] and preflight.hosts_of_ranks({}) == []
    assert preflight.transports("ib,nvlink") == ("ib", "nvlink") and preflight.transports("") == ()
    with pytest.raises(RecipeError, match="'infiniband' is none of ib, efa"):
        preflight.transports("infiniband")
    assert preflight.expected_nodes({"GROUP_WORLD_SIZE": "2", "SLURM_STEP_NUM_NODES": "3"}) == 2
    assert preflight.expected_nodes({}) is None
