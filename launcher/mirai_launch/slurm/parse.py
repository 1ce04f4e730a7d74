"""What SLURM's commands print, as typed jobs. Pure: text in, dataclasses out.

Written against `scontrol -o show job` and `squeue -O` of SLURM 22.05; newer versions add keys, which are not read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime

from mirai_dist.config.error import RecipeError
from mirai_dist.runtime import nodelist

# Fields asked of squeue, each ended by a bar: without a width, which would cut them off.
SQUEUE_FIELDS = (
    "JobArrayID",
    "State",
    "Reason",
    "NodeList",
    "NumNodes",
    "RestartCnt",
    "SubmitTime",
    "StartTime",
    "EndTime",
    "TimeLimit",
    "exit_code",
    "Name",
)
WAITING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD")
HOLDING = ("RUNNING", "CONFIGURING", "COMPLETING", "SIGNALING", "STAGE_OUT", "STOPPED", "SUSPENDED", "RESIZING")
ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
)
_PAIR = re.compile(r"(?:^| )([A-Z][A-Za-z/:]*)=(\S*)")
_LIMIT = re.compile(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)")
_EMPTY = ("", "(null)", "None", "N/A", "Unknown")


class ParseError(RecipeError):
    """A line that is not what the SLURM commands print; `str` is one line."""


@dataclass(frozen=True)
class Job:
    """One job, or one element of an array, as the scheduler sees it now.

    id: "12", or "12_3" for element 3 of array 12 (`array_task` is then 3; elements that still wait may share one
    record, "12_[4-9%2]", with array_task None). nodes: host names while it holds any, and after its end.
    start, end: seconds since 1970, None while unknown; `end` of a running job is the time its limit runs out.
    limit: seconds, None for no limit. exit_code, signal: of the batch script, or the limit or error that ended it.
    """

    id: str
    state: str
    reason: str
    nodes: tuple[str, ...]
    wanted_nodes: int
    restarts: int
    submitted: float | None
    start: float | None
    end: float | None
    limit: float | None
    exit_code: int
    signal: int
    name: str
    array_task: int | None = None

    @property
    def waiting(self) -> bool:
        """Whether it is in the queue, held ones included."""
        return self.state in WAITING

    @property
    def holds_nodes(self) -> bool:
        """Whether it has nodes, running or on the way in or out."""
        return self.state in HOLDING

    @property
    def ended(self) -> bool:
        """Whether nothing more will come of it unless somebody requeues it."""
        return self.state in ENDED


def show_job(text: str) -> list[Job]:
    """Jobs of `scontrol -o show job`, one a line. Raises ParseError."""
    return [_from_scontrol(line) for line in text.splitlines() if line.strip() and not line.startswith("No jobs")]


def excluded(text: str) -> tuple[str, ...]:
    """Hosts that the job in `scontrol -o show job` avoids."""
    found = re.search(r" ExcNodeList=(\S*)", text)
    return _hosts(found.group(1)) if found else ()


def squeue(text: str) -> list[Job]:
    """Jobs of `squeue -h -O` with SQUEUE_FIELDS, each ended by a bar. Raises ParseError."""
    return [_from_squeue(line) for line in text.splitlines() if line.strip()]


def job_id(text: str) -> str:
    """Job id of `sbatch --parsable`, which may add `;cluster` and be preceded by lines of a site's submit filter."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found = re.fullmatch(r"(\d+)(?:;\S+)?", lines[-1]) if lines else None
    if not found:
        raise ParseError("sbatch", f"printed no job id but {text.strip()!r}")
    return found.group(1)


def seconds(text: str) -> float | None:
    """A SLURM duration (`5:00`, `1-02:00:00`, `90` minutes are 90:00) in seconds; None for UNLIMITED.

    Raises ParseError.
    """
    if text in ("UNLIMITED", "INVALID", "NOT_SET", "Partition_Limit", *_EMPTY):
        return None
    found = _LIMIT.fullmatch(text)
    if not found:
        raise ParseError("SLURM", f"{text!r} is no duration")
    days, hours, minutes, last = (int(part) if part else 0 for part in found.groups())
    if ":" not in text:
        # A bare number counts minutes, and after days it counts hours.
        return days * 86400.0 + last * 3600.0 if "-" in text else last * 60.0
    if "-" in text and text.count(":") == 1:
        return days * 86400.0 + minutes * 3600.0 + last * 60.0
    return ((days * 24 + hours) * 60 + minutes) * 60.0 + last


def _from_scontrol(line: str) -> Job:
    # The first of each name: a job's own command line may hold anything, but comes last.
    pairs: dict[str, str] = {}
    for name, value in _PAIR.findall(line):
        pairs.setdefault(name, value)
    missing = [name for name in ("JobId", "JobState", "Restarts", "NodeList", "NumNodes") if name not in pairs]
    if missing:
        raise ParseError("scontrol", f"its line has no {', '.join(missing)}: {line[:120]!r}")
    task = _given(pairs.get("ArrayTaskId", ""))
    element = f"{pairs['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}" if task else pairs["JobId"]
    code, _, signal = pairs.get("ExitCode", "0:0").partition(":")
    return Job(
        id=element,
        state=_state(pairs["JobState"]),
        reason=_given(pairs.get("Reason", "")),
        nodes=_hosts(pairs["NodeList"]),
        wanted_nodes=int(pairs["NumNodes"].partition("-")[0]),
        restarts=int(pairs["Restarts"]),
        submitted=_moment(pairs.get("SubmitTime", "")),
        start=_moment(pairs.get("StartTime", "")),
        end=_moment(pairs.get("EndTime", "")),
        limit=seconds(pairs.get("TimeLimit", "")),
        exit_code=int(code),
        signal=int(signal or 0),
        name=pairs.get("JobName", ""),
        array_task=int(task) if task.isdigit() else None,
    )


def _from_squeue(line: str) -> Job:
    values = line.split("|")
    if len(values) < len(SQUEUE_FIELDS):
        raise ParseError("squeue", f"its line has {len(values)} fields, not {len(SQUEUE_FIELDS)}: {line[:120]!r}")
    field = dict(zip(SQUEUE_FIELDS, (value.strip() for value in values), strict=False))
    task = field["JobArrayID"].partition("_")[2]
    status = int(field["exit_code"]) if field["exit_code"].isdigit() else 0
    return Job(
        id=field["JobArrayID"],
        state=_state(field["State"]),
        reason=_given(field["Reason"]),
        nodes=_hosts(field["NodeList"]),
        wanted_nodes=int(field["NumNodes"].partition("-")[0]),
        restarts=int(field["RestartCnt"]),
        submitted=_moment(field["SubmitTime"]),
        start=_moment(field["StartTime"]),
        end=_moment(field["EndTime"]),
        limit=seconds(field["TimeLimit"]),
        # squeue shows the raw status of wait(2).
        exit_code=status >> 8,
        signal=status & 0x7F,
        name=field["Name"],
        array_task=int(task) if task.isdigit() else None,
    )


def _state(text: str) -> str:
    """The one state that says most: `CANCELLED+`, `CANCELLED by 0` and `COMPLETED,COMPLETING` occur."""
    states = re.findall(r"[A-Z_]+", text)
    if not states:
        raise ParseError("SLURM", f"{text!r} is no job state")
    return next((state for state in reversed(states) if state in (*WAITING, *HOLDING)), states[0])


def _hosts(text: str) -> tuple[str, ...]:
    return tuple(nodelist.expand(text)) if _given(text) else ()


def _given(text: str) -> str:
    return "" if text in _EMPTY else text


def _moment(text: str) -> float | None:
    """SLURM prints local time without an offset."""
    return datetime.fromisoformat(text).timestamp() if _given(text) else None
