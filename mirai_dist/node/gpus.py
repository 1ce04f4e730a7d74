"""NVIDIA GPUs as the driver sees them: `nvidia-smi -q -x`, the kernel log's Xid lines, the PCI bus. No CUDA."""

from __future__ import annotations

import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass
from pathlib import Path

from mirai_dist.node.finding import Finding

PATIENCE = 20.0  # seconds; a driver that takes longer to answer is stuck
RECENT = 86400.0  # seconds; an older Xid may have been repaired since
# Clocks held down from outside the job: broken cooling or power. sw_power_cap and idle are normal.
_HELD_DOWN = ("hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown")
# Codes that NVIDIA's catalogue puts down to hardware or a dead driver; the others are mostly the application's.
HARDWARE_XIDS = frozenset({48, 62, 64, 74, 79, 95, 119, 120, 140})
_XID = re.compile(r"^\[\s*(?P<at>\d+\.\d+)\].*NVRM: Xid \((?P<bus>[^)]+)\): (?P<code>\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Gpu:
    """One GPU. `uncorrectable`: ECC errors since the driver was loaded, None where ECC is off or absent."""

    name: str
    uuid: str
    held_down: tuple[str, ...]
    uncorrectable: int | None
    remapping: str  # "", "pending" or "failed": memory rows to be replaced at the next reset, or none left
    link_width: str
    max_link_width: str


@dataclass(frozen=True)
class Driver:
    """What the driver says. `problem`: why it says nothing; then there are no GPUs in the list."""

    version: str = ""
    cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Xid:
    """One error the driver wrote into the kernel log; `age` in seconds."""

    code: int
    bus: str
    age: float


def parse_smi(text: str) -> Driver:
    """What `nvidia-smi -q -x` printed. Raises ElementTree.ParseError for anything else."""
    root = ElementTree.fromstring(text)
    gpus = tuple(_gpu(node) for node in root.iter("gpu"))
    return Driver(_text(root, "driver_version"), _text(root, "cuda_version"), gpus)


def _gpu(node: ElementTree.Element) -> Gpu:
    # clocks_throttle_reason_* until driver 535, clocks_event_reason_* since.
    reasons = [each for each in node.iter() if re.fullmatch(r"clocks_(event|throttle)_reason_\w+", each.tag)]
    active = [re.sub(r"clocks_(event|throttle)_reason_", "", each.tag) for each in reasons if each.text == "Active"]
    volatile = node.find("ecc_errors/volatile")
    errors = [] if volatile is None else [each for each in volatile.iter() if "uncorrectable" in each.tag]
    counts = [int(each.text) for each in errors if each.text and each.text.isdigit()]
    rows = {name: _text(node, f"remapped_rows/remapped_row_{name}") for name in ("pending", "failure")}
    remapping = "failed" if rows["failure"] == "Yes" else "pending" if rows["pending"] == "Yes" else ""
    widths = "pci/pci_gpu_link_info/link_widths/"
    return Gpu(
        name=_text(node, "product_name"),
        uuid=_text(node, "uuid"),
        held_down=tuple(name for name in active if name in _HELD_DOWN),
        uncorrectable=sum(counts) if counts else None,
        remapping=remapping,
        link_width=_text(node, f"{widths}current_link_width"),
        max_link_width=_text(node, f"{widths}max_link_width"),
    )


def _text(node: ElementTree.Element, path: str) -> str:
    return (node.findtext(path) or "").strip()


def parse_xids(log: str, uptime: float) -> list[Xid]:
    """Xid errors in the output of dmesg. uptime: seconds since boot, which its time stamps count from."""
    return [Xid(int(each["code"]), each["bus"], uptime - float(each["at"])) for each in _XID.finditer(log)]


def ask_driver() -> Driver:
    """Run nvidia-smi. An empty `problem` and no GPUs: there is no nvidia-smi here."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return Driver()
    try:
        done = subprocess.run([program, "-q", "-x"], capture_output=True, text=True, timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        return Driver(problem=f"nvidia-smi did not answer within {PATIENCE:.0f} s")
    if done.returncode:
        said = " ".join((done.stdout + done.stderr).split())[:200]
        return Driver(problem=f"nvidia-smi ended with {done.returncode}: {said}")
    try:
        return parse_smi(done.stdout)
    except ElementTree.ParseError as error:
        return Driver(problem=f"nvidia-smi -q -x printed no XML ({error})")


def read_xids() -> list[Xid] | None:
    """Xid errors in the kernel log; None where an ordinary user may not read it."""
    program = shutil.which("dmesg")
    if program is None:
        return None
    done = subprocess.run([program], capture_output=True, text=True, errors="replace")
    if done.returncode:
        return None
    return parse_xids(done.stdout, float(Path("/proc/uptime").read_text().split()[0]))


def on_the_bus(root: Path = Path("/")) -> int:
    """NVIDIA graphics or compute devices on the PCI bus, with or without a driver."""
    found = 0
    for device in (root / "sys/bus/pci/devices").glob("*"):
        vendor, kind = device / "vendor", device / "class"
        if vendor.exists() and kind.exists() and vendor.read_text().strip() == "0x10de":
            found += kind.read_text().startswith("0x03")
    return found


def findings(driver: Driver, xids: list[Xid] | None, bus: int) -> list[Finding]:
    """What the driver, the kernel log and the PCI bus say about this node's GPUs."""
    if driver.problem:
        return [Finding("gpu driver", "suspect", driver.problem, "take the node out; reset its GPUs or reboot it")]
    if not driver.gpus:
        if bus:
            what = f"{bus} NVIDIA devices on the PCI bus, and no driver answers"
            advice = "load the driver, or give the container its GPUs (docker --gpus, apptainer --nv)"
            return [Finding("gpu", "warn", what, advice)]
        return [Finding("gpu", "skip", "no GPU: not checked")]
    names = sorted({gpu.name for gpu in driver.gpus})
    rows = [Finding("gpu", "ok", f"{len(driver.gpus)} x {', '.join(names)}, driver {driver.version}")]
    if len(names) > 1:
        rows[0] = Finding("gpu", "warn", rows[0].value, "unlike GPUs run at the pace of the slowest")
    distinct = len({gpu.uuid for gpu in driver.gpus})
    if distinct != len(driver.gpus):
        rows.append(Finding("gpu uuid", "suspect", f"{len(driver.gpus)} GPUs and {distinct} UUIDs", "reboot the node"))
    return [*rows, _ecc(driver.gpus), _clocks(driver.gpus), _links(driver.gpus), _xid(xids)]


def _ecc(gpus: tuple[Gpu, ...]) -> Finding:
    bad = [f"GPU {i}: row remapping {gpu.remapping}" for i, gpu in enumerate(gpus) if gpu.remapping]
    bad += [f"GPU {i}: {gpu.uncorrectable} uncorrectable errors" for i, gpu in enumerate(gpus) if gpu.uncorrectable]
    if bad:
        return Finding("gpu memory (ECC)", "suspect", "; ".join(bad), "reset the GPU; replace it if they come back")
    if any(gpu.uncorrectable is None for gpu in gpus):
        return Finding("gpu memory (ECC)", "skip", "ECC is off or not reported: not checked")
    return Finding("gpu memory (ECC)", "ok", "no uncorrectable error, no row to be remapped")


def _clocks(gpus: tuple[Gpu, ...]) -> Finding:
    held = [f"GPU {i}: {', '.join(gpu.held_down)}" for i, gpu in enumerate(gpus) if gpu.held_down]
    if held:
        return Finding("gpu clocks", "suspect", "; ".join(held), "look at cooling and power of this node")
    return Finding("gpu clocks", "ok", "not held down by heat or power")


def _links(gpus: tuple[Gpu, ...]) -> Finding:
    narrow = [
        f"GPU {i}: {gpu.link_width} of {gpu.max_link_width}"
        for i, gpu in enumerate(gpus)
        if gpu.max_link_width.endswith("x") and gpu.link_width != gpu.max_link_width
    ]
    if narrow:
        return Finding("gpu pci width", "warn", "; ".join(narrow), "reseat the GPU if its copies are slow")
    return Finding("gpu pci width", "ok", f"{gpus[0].link_width or 'not reported'}")


def _xid(xids: list[Xid] | None) -> Finding:
    if xids is None:
        return Finding("gpu errors (Xid)", "skip", "the kernel log is not readable here: not checked")
    grave = [xid for xid in xids if xid.code in HARDWARE_XIDS]
    told = ", ".join(f"Xid {xid.code} at {xid.bus} {xid.age / 3600:.1f} h ago" for xid in (grave or xids)[-3:])
    if any(xid.age < RECENT for xid in grave):
        return Finding("gpu errors (Xid)", "suspect", told, "take the node out and look the code up")
    if xids:
        return Finding("gpu errors (Xid)", "warn", told, "look the code up: most such are the application's")
    return Finding("gpu errors (Xid)", "ok", "none in the kernel log")
