"""What the reports of all ranks come to: which hosts are unfit and why, what needs attention. Plain data, no torch."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from mirai_dist.node.finding import LEVELS, Finding, worst
from mirai_dist.runtime.outliers import Measure, Outlier, Sample, by_host, slow

EVERYWHERE = "all hosts"
GOOD = ("ok", "skip")
# GPUs of a kind differ by some per cent. CPU ranks share their cores with whatever else runs there.
ON_GPU = (
    Measure("matrix products", "TFLOP/s", floor=0.15, scale=1e-12),
    Measure("link to other hosts", "GB/s", floor=0.4, scale=1e-9),
    Measure("link inside the host", "GB/s", floor=0.4, scale=1e-9),
    Measure("writing checkpoints", "MB/s", floor=0.75, suspect=False, scale=1e-6),
)
ON_CPU = (
    Measure("matrix products", "TFLOP/s", floor=0.75, scale=1e-12),
    Measure("link to other hosts", "GB/s", floor=0.9, suspect=False, scale=1e-9),
    Measure("link inside the host", "GB/s", floor=0.9, suspect=False, scale=1e-9),
    Measure("writing checkpoints", "MB/s", floor=0.9, suspect=False, scale=1e-6),
)
CLOCK_SKEW = 1.0  # seconds by which clocks may differ


@dataclass(frozen=True)
class Report:
    """What one rank says. same, usual: what its host is (node/examine.py), from one rank of each host.

    values: measure -> speed, 0 is none. clock: seconds ahead of the first rank's clock, and the uncertainty. across,
    inside, unknown: the transports it has seen (node/transport.py).
    """

    rank: int
    host: str
    findings: tuple[Finding, ...] = ()
    same: Mapping[str, str] = field(default_factory=dict)
    usual: Mapping[str, str] = field(default_factory=dict)
    uuid: str = ""
    values: Mapping[str, float] = field(default_factory=dict)
    clock: tuple[float, float] | None = None
    across: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    unknown: str = ""


def load_report(document: Mapping[str, Any]) -> Report:
    """A report from its JSON."""
    findings = tuple(Finding(**each) for each in document["findings"])
    return Report(**{**document, "findings": findings})


@dataclass(frozen=True)
class Verdict:
    """`found`: (host, finding) of all that is not good. `hosts`: those examined, in the scheduler's order.

    medians: of each measure, over all ranks. paces: of each host, its worst measure as a fraction of the median.
    seconds: that it took to find this out.
    """

    hosts: tuple[str, ...]
    found: tuple[tuple[str, Finding], ...]
    reports: tuple[Report, ...]
    medians: Mapping[str, float]
    paces: Mapping[str, float]
    seconds: float = 0.0

    @property
    def level(self) -> str:
        """ok, warn, fail or suspect."""
        level = worst(finding for _, finding in self.found)
        return "ok" if level in GOOD else level

    def reasons(self, host: str, least: str = "warn") -> list[str]:
        """Why a host is in doubt, worst first."""
        rows = [finding for where, finding in self.found if where == host and reaches(finding, least)]
        return [str(each) for each in sorted(rows, key=lambda each: -LEVELS.index(each.level))]

    @property
    def suspects(self) -> dict[str, str]:
        """Unfit hosts, each with its reason."""
        named = dict.fromkeys([*self.hosts, *(host for host, _ in self.found)])
        every = [(host, self.reasons(host, "suspect")) for host in named]
        return {host: reasons[0] for host, reasons in every if reasons}

    def line(self) -> str:
        """The verdict in one line."""
        if self.level == "ok":
            return f"{len(self.hosts)} hosts, nothing to remark"
        rows = [f"{_some(hosts)}: {finding}" for finding, hosts in self.grouped() if finding.level == self.level]
        return _some(rows, "; ")

    def grouped(self) -> list[tuple[Finding, list[str]]]:
        """Each finding once, with the hosts it is about; worst first."""
        hosts: dict[Finding, list[str]] = {}
        for host, finding in self.found:
            hosts.setdefault(finding, []).append(host)
        return sorted(hosts.items(), key=lambda row: -LEVELS.index(row[0].level))

    def document(self) -> dict[str, Any]:
        """All of it as JSON."""
        return {
            "verdict": {"ok": "pass"}.get(self.level, self.level),
            "line": self.line(),
            "seconds": self.seconds,
            "hosts": list(self.hosts),
            "suspects": self.suspects,
            "findings": [{**asdict(finding), "hosts": hosts} for finding, hosts in self.grouped()],
            "medians": dict(self.medians),
            "ranks": [_row(report) for report in self.reports],
        }


def _row(report: Report) -> dict[str, Any]:
    row: dict[str, Any] = {"rank": report.rank, "host": report.host, "measured": dict(report.values)}
    if report.clock:
        row["clock"] = {"ahead_of_first": report.clock[0], "uncertainty": report.clock[1]}
    if report.across or report.inside:
        row["transport"] = {"to_other_hosts": report.across, "inside_the_host": report.inside}
    return row


def _some(names: Sequence[str], separator: str = ", ") -> str:
    more = [f"and {len(names) - 3} more"] if len(names) > 3 else []
    return separator.join([*names[:3], *more])


def reaches(finding: Finding, least: str) -> bool:
    """Whether a finding is at least this bad."""
    return LEVELS.index(finding.level) >= LEVELS.index(least)


def judge(
    reports: Sequence[Report],
    measures: Sequence[Measure],
    quiet: Sequence[tuple[str, Finding]] = (),
    expected: Sequence[str] = (),
    nodes: int | None = None,
) -> Verdict:
    """Compare what the ranks report.

    quiet: hosts that do not. expected: transports that must be in use. nodes: how many the launcher speaks of.
    """
    hosts = tuple(dict.fromkeys(report.host for report in reports))
    found = [
        *quiet,
        *_of_nodes(reports, len(hosts)),
        *_unlike(reports, "same", "suspect"),
        *_unlike(reports, "usual", "warn"),
        *_twice(reports),
        *_clocks(reports),
        *_transports(reports, expected),
    ]
    if nodes is not None and nodes != len(hosts):
        what = f"the launcher speaks of {nodes} nodes, and the ranks are on {len(hosts)}"
        found.append((EVERYWHERE, Finding("hosts", "warn", what, "check the task shape of srun or torchrun")))
    names = dict.fromkeys(name for report in reports for name in report.values)
    medians = {name: statistics.median(each.values[name] for each in reports if name in each.values) for name in names}
    paces = dict.fromkeys(hosts, 1.0)
    for measure in measures:
        samples = [Sample(each.host, each.rank, value) for each in reports if (value := each.values.get(measure.name))]
        found += [(host, _short(outlier, measure)) for host, outlier in by_host(slow(samples, measure)).items()]
        for sample in samples if measure.suspect else ():
            paces[sample.host] = min(paces[sample.host], sample.value / medians[measure.name])
    return Verdict(hosts, tuple(found), tuple(reports), medians, paces)


def silent(host: str, stage: str, seconds: float) -> tuple[str, Finding]:
    """A host from which no answer came."""
    what = f"a rank did not finish this within {seconds:.0f} s"
    return host, Finding(stage, "suspect", what, "the node may be hung or very slow")


def _short(outlier: Outlier, measure: Measure) -> Finding:
    value, median = (number * measure.scale for number in (outlier.sample.value, outlier.median))
    what = f"{value:.3g} {measure.unit} on rank {outlier.sample.rank}, median of the others {median:.3g}"
    return Finding(measure.name, "suspect" if measure.suspect else "warn", what)


def _of_nodes(reports: Iterable[Report], hosts: int) -> list[tuple[str, Finding]]:
    """What each host found out about itself. A failure that most hosts do not have is the fault of those: suspect."""
    rows = {(report.host, finding): None for report in reports for finding in report.findings}
    bad = [(host, finding) for host, finding in rows if finding.level not in GOOD]
    with_failure = Counter(check for _, check in {(h, f.check) for h, f in bad if f.level == "fail"})
    return [
        (host, Finding(each.check, "suspect", each.value, each.advice))
        if each.level == "fail" and with_failure[each.check] * 2 <= hosts
        else (host, each)
        for host, each in bad
    ]


def _unlike(reports: Sequence[Report], which: str, level: str) -> list[tuple[str, Finding]]:
    """Hosts whose value of some item is not the majority's; without a majority nobody can say who is wrong."""
    tables: dict[str, Mapping[str, str]] = {each.host: getattr(each, which) for each in reports if each.same}
    items = dict.fromkeys(item for table in tables.values() for item in table)
    found = []
    for item in items:
        values = {host: table.get(item, "none") for host, table in tables.items()}
        usual, count = Counter(values.values()).most_common(1)[0]
        if count == len(values):
            continue
        if count * 2 > len(values):
            odd = {host: value for host, value in values.items() if value != usual}
            found += [(host, Finding(item, level, f"{value}, elsewhere {usual}")) for host, value in odd.items()]
        else:
            kinds = {value: [host for host in values if values[host] == value] for value in values.values()}
            told = "; ".join(f"{value} on {', '.join(where)}" for value, where in kinds.items())
            found.append((EVERYWHERE, Finding(item, "fail" if level == "suspect" else level, told, "make them equal")))
    return found


def _twice(reports: Iterable[Report]) -> list[tuple[str, Finding]]:
    owners: dict[str, list[Report]] = {}
    for report in reports:
        if report.uuid:
            owners.setdefault(report.uuid, []).append(report)
    advice = "give each rank its own GPU: one task a GPU, no CUDA_VISIBLE_DEVICES that names one twice"
    found = []
    for uuid, sharing in owners.items():
        if len(sharing) > 1:
            told = ", ".join(str(each.rank) for each in sharing)
            found.append((sharing[0].host, Finding("gpu uuid", "fail", f"ranks {told} share {uuid}", advice)))
    return found


def _clocks(reports: Iterable[Report]) -> list[tuple[str, Finding]]:
    """Clocks that are certainly off the median clock by more than CLOCK_SKEW."""
    clocks = {report.host: report.clock for report in reports if report.clock}
    if not clocks:
        return []
    middle = statistics.median(offset for offset, _ in clocks.values())
    found = []
    for host, (offset, uncertainty) in clocks.items():
        ahead = offset - middle
        value = f"{ahead:+.3f} s from the median clock, known to {abs(uncertainty):.3f} s"
        if uncertainty < 0:
            found.append((host, Finding("clock", "warn", "was set while it was looked at", "check NTP on this node")))
        elif abs(ahead) - uncertainty > CLOCK_SKEW:
            found.append((host, Finding("clock", "warn", value, "check NTP on this node")))
    return found


def _transports(reports: Sequence[Report], expected: Sequence[str]) -> list[tuple[str, Finding]]:
    """Whether what is expected is what every rank uses. What cannot be known is a failure, not an agreement."""
    wrong: dict[str, Finding] = {}
    for report in reports:
        for name in expected:
            if finding := _transport(report, name, len({each.host for each in reports})):
                wrong.setdefault(report.host, finding)
    hosts = len({report.host for report in reports})
    level = "suspect" if len(wrong) * 2 <= hosts else "fail"
    return [(host, Finding(each.check, level, each.value, each.advice)) for host, each in wrong.items()]


def _transport(report: Report, name: str, hosts: int) -> Finding | None:
    inside = name in ("nvlink", "pcie", "shm")
    used = report.inside if inside else report.across
    where = "inside the host" if inside else "to other hosts"
    if report.unknown:
        return Finding("transport", "fail", f"{name} is expected, and what is used is not known: {report.unknown}")
    if not used and (inside or hosts == 1):
        return Finding("transport", "fail", f"{name} is expected, and rank {report.rank} talks to nobody {where}")
    if set(used) - {name}:
        return Finding("transport", "fail", f"{', '.join(used)} {where}, expected {name}")
    return None
