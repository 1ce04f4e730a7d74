"""SLURM host lists and task counts."""

from __future__ import annotations

import pytest

from mirai_dist.runtime.nodelist import NodeListError, expand, tasks_per_node


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("n1", ["n1"]),
        ("n1,n2", ["n1", "n2"]),
        ("n[1-2]", ["n1", "n2"]),
        ("n[08-11]", ["n08", "n09", "n10", "n11"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("n[1,3,5-6]", ["n1", "n3", "n5", "n6"]),
        ("n[01-02,7]", ["n01", "n02", "n7"]),
        ("gpu[1-2],cpu[03-04],login", ["gpu1", "gpu2", "cpu03", "cpu04", "login"]),
        ("rack[1-2]node[01-02]", ["rack1node01", "rack1node02", "rack2node01", "rack2node02"]),
        ("n[1-2]-ib", ["n1-ib", "n2-ib"]),
        ("a[1-2]b[3]c", ["a1b3c", "a2b3c"]),
        ("n[1-2].site.example", ["n1.site.example", "n2.site.example"]),
        ("ip-10-0-0-[7,9]", ["ip-10-0-0-7", "ip-10-0-0-9"]),
        ("p5-st-gpu-[1-2],p5-dy-gpu-1", ["p5-st-gpu-1", "p5-st-gpu-2", "p5-dy-gpu-1"]),
        ("n[2,1]", ["n2", "n1"]),
        ("n[0-0]", ["n0"]),
        (" n1 , n2 ", ["n1", "n2"]),
    ],
)
def test_expand(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


def test_a_thousand_nodes_in_order() -> None:
    hosts = expand("node[0001-1000]")
    assert (len(hosts), hosts[0], hosts[-1]) == (1000, "node0001", "node1000")
    assert hosts == sorted(hosts)


@pytest.mark.parametrize(
    "text", ["", " ", "n[", "n]", "n[1-2", "n[1-2]]", "n[[1]]", "n[]", "n[a]", "n[2-1]", "a,,b", "n[1,]"]
)
def test_what_is_no_host_list_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(NodeListError) as caught:
        expand(text)
    assert repr(text) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "counts"), [("2", [2]), ("2(x3)", [2, 2, 2]), ("2(x3),1", [2, 2, 2, 1]), ("1,4(x2),8", [1, 4, 4, 8])]
)
def test_tasks_per_node(text: str, counts: list[int]) -> None:
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "x", "2(x)", "2(3)", "2,", "-1"])
def test_bad_task_counts(text: str) -> None:
    with pytest.raises(NodeListError, match="SLURM task counts"):
        tasks_per_node(text)
