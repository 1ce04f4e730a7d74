"""SLURM's own lines (22.05), as they were printed by a real cluster, read back as jobs."""

from __future__ import annotations

from datetime import datetime

import pytest

from mirai_launch.slurm import parse

RUNNING = (
    "JobId=4 ArrayJobId=3 ArrayTaskId=1 ArrayTaskThrottle=1 JobName=x UserId=root(0) GroupId=root(0) MCS_label=N/A "
    "Priority=4294901757 Nice=0 Account=(null) QOS=(null) JobState=RUNNING Reason=None Dependency=(null) Requeue=1 "
    "Restarts=2 BatchFlag=1 Reboot=0 ExitCode=0:0 RunTime=00:00:01 TimeLimit=00:30:00 TimeMin=N/A "
    "SubmitTime=2026-11-26T18:06:03 EligibleTime=2026-11-26T18:06:03 AccrueTime=Unknown "
    "StartTime=2026-11-26T18:06:03 EndTime=2026-11-26T18:36:03 Deadline=N/A Partition=main ReqNodeList=(null) "
    "ExcNodeList=(null) NodeList=n[1-2] BatchHost=n1 NumNodes=2 NumCPUs=2 Command=/tmp/JobState=FAILED Power= "
)
WAITING = (
    "JobId=3 ArrayJobId=3 ArrayTaskId=2-3%1 ArrayTaskThrottle=1 JobName=x JobState=PENDING Reason=JobArrayTaskLimit "
    "Restarts=0 ExitCode=0:0 TimeLimit=UNLIMITED SubmitTime=2026-11-26T18:06:03 StartTime=Unknown EndTime=Unknown "
    "NodeList= NumNodes=2-2"
)


def job(line: str = RUNNING, **changed: str) -> parse.Job:
    for name, value in changed.items():
        before, _, rest = line.partition(f" {name}=")
        line = f"{before} {name}={value} {rest.partition(' ')[2]}"
    (found,) = parse.show_job(line)
    return found


def test_a_running_element_of_an_array() -> None:
    found = job()
    assert (found.id, found.array_task, found.state, found.reason) == ("3_1", 1, "RUNNING", "")
    assert (found.nodes, found.wanted_nodes, found.restarts) == (("n1", "n2"), 2, 2)
    assert (found.limit, found.start) == (1800.0, datetime(2026, 11, 26, 18, 6, 3).timestamp())
    assert found.holds_nodes and not found.waiting and not found.ended


def test_elements_that_wait_together() -> None:
    found = job(WAITING)
    assert (found.id, found.array_task, found.reason) == ("3_[2-3%1]", None, "JobArrayTaskLimit")
    assert (found.nodes, found.start, found.end, found.limit) == ((), None, None, None)
    assert found.waiting and not found.holds_nodes


@pytest.mark.parametrize("state", [*parse.WAITING, *parse.HOLDING, *parse.ENDED])
def test_every_state_is_of_one_kind(state: str) -> None:
    found = job(JobState=state)
    assert found.state == state
    assert [found.waiting, found.holds_nodes, found.ended].count(True) == 1


@pytest.mark.parametrize(
    ("text", "state"), [("CANCELLED+", "CANCELLED"), ("COMPLETED,COMPLETING", "COMPLETING"), ("FAILED", "FAILED")]
)
def test_states_with_decoration(text: str, state: str) -> None:
    assert job(JobState=text).state == state


def test_exit_codes_and_signals() -> None:
    assert (job(ExitCode="10:0").exit_code, job(ExitCode="0:9").signal) == (10, 9)


def test_squeue_lines() -> None:
    start = "2026-11-26T18:06:09"
    running = f"3_2|RUNNING|None|n[1-2]|2|1|{start}|{start}|N/A|5:00|0|x|"
    failed = "9|FAILED|NonZeroExitCode||2|0|N/A|N/A|N/A|1-00:00:00|2560|y|"
    first, second = parse.squeue(f"{running}\n{failed}\n")
    assert (first.id, first.array_task, first.nodes, first.restarts) == ("3_2", 2, ("n1", "n2"), 1)
    assert (first.limit, first.start, first.end) == (300.0, datetime.fromisoformat(start).timestamp(), None)
    assert (second.id, second.exit_code, second.limit, second.ended) == ("9", 10, 86400.0, True)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 5400.0), ("1:30", 90.0), ("01:00:30", 3630.0), ("2-03", 183600.0), ("2-03:30", 185400.0),
     ("1-00:00:01", 86401.0), ("UNLIMITED", None)],
)  # fmt: skip
def test_durations(text: str, wanted: float | None) -> None:
    assert parse.seconds(text) == wanted


def test_job_ids_with_a_cluster_and_a_talkative_site() -> None:
    assert parse.job_id("123\n") == "123"
    assert parse.job_id("welcome to foo\n123;foo\n") == "123"
    for text in ("", "Submitted batch job 12 or so\n"):
        with pytest.raises(parse.ParseError, match="printed no job id"):
            parse.job_id(text)


@pytest.mark.parametrize("line", ["JobId=3 JobState=", "something else", "JobId=3 JobState=RUNNING NodeList=n1"])
def test_other_lines_are_refused(line: str) -> None:
    with pytest.raises(parse.ParseError, match="scontrol: its line has no"):
        parse.show_job(line)
