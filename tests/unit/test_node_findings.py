"""What doctor and pre-flight make of nvidia-smi, the kernel log, sysfs, limits, libraries and NCCL's log.

The texts below are written by hand in the documented formats of those programs, as far as they are read.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from mirai_dist.node import fabric, gpus, limits, software, storage, transport
from mirai_dist.node.finding import EXIT_CODES, Finding, exit_code, worst
from mirai_dist.runtime import guard

GPU = """
 <gpu id="00000000:{bus}:00.0">
  <product_name>NVIDIA H100 80GB HBM3</product_name>
  <uuid>GPU-{uuid}</uuid>
  <pci><pci_gpu_link_info><link_widths>
    <max_link_width>16x</max_link_width><current_link_width>{width}</current_link_width>
  </link_widths></pci_gpu_link_info></pci>
  <{prefix}s>
   <{prefix}_gpu_idle>Active</{prefix}_gpu_idle>
   <{prefix}_sw_power_cap>Active</{prefix}_sw_power_cap>
   <{prefix}_hw_slowdown>{slow}</{prefix}_hw_slowdown>
   <{prefix}_hw_thermal_slowdown>{slow}</{prefix}_hw_thermal_slowdown>
  </{prefix}s>
  <ecc_errors>
   <volatile>
    <sram_correctable>3</sram_correctable><sram_uncorrectable_parity>0</sram_uncorrectable_parity>
    <dram_correctable>9</dram_correctable><dram_uncorrectable>{ecc}</dram_uncorrectable>
   </volatile>
   <aggregate><dram_uncorrectable>77</dram_uncorrectable></aggregate>
  </ecc_errors>
  <remapped_rows>
   <remapped_row_pending>{pending}</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
  </remapped_rows>
 </gpu>"""
HEALTHY = {
    "bus": "18", "uuid": "aa", "width": "16x", "prefix": "clocks_event_reason", "slow": "Not Active", "ecc": "0",
    "pending": "No",
}  # fmt: skip


def smi(*changes: dict[str, str]) -> gpus.Driver:
    bodies = "".join(GPU.format(**HEALTHY | {"uuid": f"u{i}"} | change) for i, change in enumerate(changes))
    head = "<driver_version>550.54.15</driver_version><cuda_version>12.4</cuda_version>"
    return gpus.parse_smi(f'<?xml version="1.0" ?><nvidia_smi_log>{head}{bodies}</nvidia_smi_log>')


def levels(found: list[Finding]) -> dict[str, str]:
    return {each.check: each.level for each in found}


def test_healthy_gpus_are_ok_though_idle_or_at_their_power_cap() -> None:
    driver = smi({}, {})
    assert (driver.version, driver.cuda, len(driver.gpus)) == ("550.54.15", "12.4", 2)
    found = gpus.findings(driver, [], 2)
    assert set(levels(found).values()) == {"ok"}, found
    assert found[0].value == "2 x NVIDIA H100 80GB HBM3, driver 550.54.15"


@pytest.mark.parametrize(
    ("change", "check", "level", "said"),
    [
        ({"ecc": "2"}, "gpu memory (ECC)", "suspect", "GPU 1: 2 uncorrectable errors"),
        ({"ecc": "N/A"}, "gpu memory (ECC)", "ok", ""),  # SRAM is still reported
        ({"pending": "Yes"}, "gpu memory (ECC)", "suspect", "GPU 1: row remapping pending"),
        ({"slow": "Active"}, "gpu clocks", "suspect", "GPU 1: hw_slowdown, hw_thermal_slowdown"),
        ({"slow": "Active", "prefix": "clocks_throttle_reason"}, "gpu clocks", "suspect", "GPU 1: hw_slowdown"),
        ({"width": "8x"}, "gpu pci width", "warn", "GPU 1: 8x of 16x"),
        ({"uuid": "u0"}, "gpu uuid", "suspect", "2 GPUs and 1 UUIDs"),
    ],
)
def test_what_is_wrong_with_one_gpu_is_named(change: dict[str, str], check: str, level: str, said: str) -> None:
    row = next(each for each in gpus.findings(smi({}, change), [], 2) if each.check == check)
    assert row.level == level and said in row.value


def test_xids_of_hardware_and_of_the_last_day_count() -> None:
    log = (
        "[  100.500000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module\n"
        "[ 5000.000000] NVRM: Xid (PCI:0000:3b:00): 31, pid=812, name=python, Ch 00000008\n"
        "[90000.250000] NVRM: Xid (PCI:0000:86:00): 79, pid=0, GPU has fallen off the bus.\n"
    )
    found = gpus.parse_xids(log, uptime=93600.25)
    assert [(xid.code, xid.bus, xid.age) for xid in found] == [
        (31, "PCI:0000:3b:00", 88600.25),
        (79, "PCI:0000:86:00", 3600.0),
    ]
    driver = smi({})

    def row(xids: list[gpus.Xid] | None) -> Finding:
        return gpus.findings(driver, xids, 1)[-1]

    assert row(found).level == "suspect" and "Xid 79 at PCI:0000:86:00 1.0 h ago" in row(found).value
    assert row(found[:1]).level == "warn" and row([]).level == "ok"
    assert row([replace(found[1], age=2 * gpus.RECENT)]).level == "warn"
    assert row(None).level == "skip" and "not checked" in row(None).value


def test_a_machine_without_gpu_says_that_nothing_was_checked() -> None:
    assert gpus.findings(gpus.Driver(), [], 0) == [Finding("gpu", "skip", "no GPU: not checked")]
    assert levels(gpus.findings(gpus.Driver(), [], 4)) == {"gpu": "warn"}
    assert levels(gpus.findings(gpus.Driver(problem="nvidia-smi ended with 15: GPU is lost"), [], 8)) == {
        "gpu driver": "suspect"
    }


def program(folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{text}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return str(folder)


def test_a_driver_that_fails_or_hangs_is_a_problem_and_not_an_absence(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    assert gpus.ask_driver() == gpus.Driver()
    monkeypatch.setenv("PATH", program(tmp_path / "a", "echo 'Unable to determine the device handle'; exit 15"))
    assert gpus.ask_driver().problem == "nvidia-smi ended with 15: Unable to determine the device handle"
    monkeypatch.setenv("PATH", program(tmp_path / "b", "echo No devices were found"))
    assert "printed no XML" in gpus.ask_driver().problem
    monkeypatch.setattr(gpus, "PATIENCE", 0.2)
    monkeypatch.setenv("PATH", program(tmp_path / "c", "exec /bin/sleep 20"))
    assert gpus.ask_driver().problem == "nvidia-smi did not answer within 0 s"


def device(root: Path, name: str, driver: str, layer: str, state: str = "4: ACTIVE", rate: str = "400 Gb/sec") -> None:
    port = root / "sys/class/infiniband" / name / "ports/1"
    port.mkdir(parents=True)
    for file, text in (("link_layer", layer), ("state", state), ("rate", rate)):
        (port / file).write_text(text + "\n")
    (root / "drivers" / driver).mkdir(parents=True, exist_ok=True)
    (port.parents[1] / "device").mkdir()
    (port.parents[1] / "device/driver").symlink_to(root / "drivers" / driver)


def test_fabric_devices_are_told_apart(tmp_path: Path) -> None:
    device(tmp_path, "mlx5_0", "mlx5_core", "InfiniBand")
    device(tmp_path, "mlx5_1", "mlx5_core", "InfiniBand", state="1: DOWN")
    device(tmp_path, "mlx5_2", "mlx5_core", "Ethernet", rate="100 Gb/sec")
    device(tmp_path, "rdmap16s27", "efa", "Unspecified")
    ports = fabric.read_ports(tmp_path)
    assert [port.kind for port in ports] == ["InfiniBand", "InfiniBand", "RoCE", "EFA"]
    assert fabric.summary(ports) == "1 x EFA 400 Gb/sec, 1 x InfiniBand 400 Gb/sec, 1 x RoCE 100 Gb/sec"
    assert levels(fabric.findings(ports, 8, [])) == {"fabric": "ok", "fabric ports": "warn", "EFA plugin": "warn"}
    plugin = [Path("/opt/amazon/ofi-nccl/lib/libnccl-net.so")]
    assert "EFA plugin" not in levels(fabric.findings(ports, 8, plugin))
    assert levels(fabric.findings([], 8, [])) == {"fabric": "warn"}
    assert levels(fabric.findings([], 0, [])) == {"fabric": "skip"}


def test_an_interface_that_is_not_here_fails(tmp_path: Path) -> None:
    for name in ("lo", "eth0"):
        (tmp_path / "sys/class/net" / name).mkdir(parents=True)

    def level(**env: str) -> list[str]:
        return [each.level for each in fabric.interfaces(env, tmp_path)]

    assert level(NCCL_SOCKET_IFNAME="eth") == ["ok"], "NCCL takes prefixes"
    assert level(GLOO_SOCKET_IFNAME="eth") == ["fail"], "gloo takes names"
    assert level(NCCL_SOCKET_IFNAME="=eth") == ["fail"]
    assert level(NCCL_SOCKET_IFNAME="ib0", GLOO_SOCKET_IFNAME="eth0") == ["fail", "ok"]
    assert level(NCCL_SOCKET_IFNAME="^docker") == [] == level()


FINE = limits.Limits(memlock=None, open_files=65536, processes=None, cores=16, machine_cores=128, shm=64 * limits.GIB)


@pytest.mark.parametrize(
    ("change", "check", "level"),
    [
        ({}, "", "ok"),
        ({"cores": 1}, "cores", "warn"),
        ({"cores": 1, "machine_cores": 1}, "cores", "ok"),
        ({"memlock": 64 << 10}, "locked memory (ulimit -l)", "fail"),
        ({"shm": 64 << 20}, "/dev/shm", "warn"),
        ({"shm": None}, "/dev/shm", "fail"),
        ({"open_files": 1024}, "open files (ulimit -n)", "warn"),
    ],
)
def test_limits(change: dict, check: str, level: str) -> None:
    found = levels(limits.findings(replace(FINE, **change), gpus=8, rdma=True))
    assert {name for name, each in found.items() if each != "ok"} == ({check} if level != "ok" else set())
    assert not check or found[check] == level


def test_small_locked_memory_matters_to_rdma_alone() -> None:
    assert levels(limits.findings(replace(FINE, memlock=64 << 10), 0, rdma=False))["locked memory (ulimit -l)"] == "ok"


def test_this_process_has_limits() -> None:
    here = limits.read()
    assert 1 <= here.cores <= here.machine_cores and here.open_files and limits.clock().level in ("ok", "warn", "skip")


def test_a_second_nccl_on_the_path_is_found_and_a_link_is_none(tmp_path: Path) -> None:
    wheel = tmp_path / "site/nvidia/nccl/lib"
    module = tmp_path / "module/lib"
    for folder in (wheel, module):
        folder.mkdir(parents=True)
    (wheel / "libnccl.so.2").write_text("one")
    (module / "libnccl.so").symlink_to(wheel / "libnccl.so.2")
    env = {"LD_LIBRARY_PATH": f"{module}:"}
    wheels = [str(tmp_path / "site")]
    assert software.nccl(software.library_path(env, tmp_path, wheels)).level == "ok"
    (module / "libnccl.so.2.19.3").write_text("two")
    found = software.nccl(software.library_path(env, tmp_path, wheels))
    assert found.level == "warn" and found.value.startswith("2 different: ") and "libnccl.so.2.19.3" in found.value
    assert software.nccl(software.library_path({}, tmp_path, [])).level == "skip"


def test_loaded_libraries_are_read_from_the_process_maps() -> None:
    maps = (
        "7f10a0000000-7f10a0021000 rw-p 00000000 00:00 0 \n"
        "7f10b0000000-7f10b4000000 r-xp 00000000 08:01 131090   /venv/nvidia/nccl/lib/libnccl.so.2\n"
        "7f10b4000000-7f10b4100000 r--p 04000000 08:01 131090   /venv/nvidia/nccl/lib/libnccl.so.2\n"
        "7f10c0000000-7f10c4000000 r-xp 00000000 08:01 77       /opt/nccl 2/libnccl.so.2.19.3\n"
        "7f10d0000000-7f10d4000000 r-xp 00000000 08:01 78       /opt/aws/libnccl-net.so\n"
        "7ffd1c7e0000-7ffd1c801000 rw-p 00000000 00:00 0        [stack]\n"
    )
    assert software.mapped(maps, "libnccl") == ["/opt/nccl 2/libnccl.so.2.19.3", "/venv/nvidia/nccl/lib/libnccl.so.2"]


def test_storage_is_written_and_left_clean(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(storage, "SIZE", 1 << 23)
    speed, found = storage.checkpoints(tmp_path / "new/run")
    assert speed > 0 and found.level == "ok" and not list((tmp_path / "new/run").iterdir())
    (tmp_path / "file").touch()
    speed, found = storage.checkpoints(tmp_path / "file")
    assert speed == 0 and found.level == "fail"
    assert storage.local({"SLURM_TMPDIR": str(tmp_path / "file/below")}).level == "fail"
    assert storage.local({"TMPDIR": str(tmp_path)}).value.startswith(f"{tmp_path}: ")


def test_a_launchers_variables_without_a_launcher_are_told() -> None:
    assert software.injected({"RANK": "0", "MASTER_PORT": "1"})[0].value == "set here: RANK, MASTER_PORT"
    assert software.injected({}) == []


def test_the_code_digest_is_of_the_code() -> None:
    assert software.code_digest() == software.code_digest() and len(software.code_digest()) == 12


IB = """\
n1:7:19 [0] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ib0:10.0.0.1<0>
n1:7:19 [0] NCCL INFO Using network IB
n1:7:19 [0] NCCL INFO Pattern 4, crossNic 0, nChannels 16, bw 20.000000/20.000000, type NVL/PIX, sameChannels 1
n1:7:19 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
n1:7:19 [0] NCCL INFO Channel 00/0 : 7[7] -> 8[0] [send] via NET/IB/0/GDRDMA
"""
EFA = """\
n1:7:19 [0] NCCL INFO NET/OFI Selected Provider is efa (found 4 nics)
n1:7:19 [0] NCCL INFO Using network AWS Libfabric
n1:7:19 [0] NCCL INFO Channel 00/0 : 7[901c0] -> 8[101c0] [receive] via NET/AWS Libfabric/0/GDRDMA
"""
SOCKET = """\
n1:7:19 [0] NCCL INFO NET/IB : No device found.
n1:7:19 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct
n1:7:19 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
"""


@pytest.mark.parametrize(
    ("log", "across", "inside"),
    [
        (IB, ("ib",), ("nvlink",)),
        (IB.replace("NVL/PIX", "PIX/PIX"), ("ib",), ("pcie",)),
        ("\n".join(line for line in IB.splitlines() if "Pattern" not in line), ("ib",), ("p2p",)),
        (EFA, ("efa",), ()),
        (EFA.replace("is efa (", "is tcp ("), ("tcp",), ()),
        (EFA.replace("AWS Libfabric", "Libfabric").replace("Provider is efa (", "provider is efa, fabric is efa ("),
         ("efa",), ()),
        (SOCKET, ("socket",), ("shm",)),
        (IB + SOCKET, ("ib", "socket"), ("nvlink", "shm")),
    ],
)  # fmt: skip
def test_the_transport_is_read_from_the_channels(log: str, across: tuple, inside: tuple) -> None:
    assert transport.parse(log) == transport.Seen(across, inside)


def test_what_cannot_be_known_is_unknown(tmp_path: Path) -> None:
    assert "names no channel" in transport.parse("n1:7:19 [0] NCCL INFO Using network IB").unknown
    assert "NCCL_DEBUG is not set" in transport.seen("nccl", {}).unknown
    assert "NCCL_DEBUG is WARN" in transport.seen("nccl", {"NCCL_DEBUG": "WARN"}).unknown
    assert "NCCL_DEBUG_FILE is not set" in transport.seen("nccl", {"NCCL_DEBUG": "INFO"}).unknown
    env = transport.wanted({}, tmp_path)
    assert "wrote no" in transport.seen("nccl", env).unknown
    transport.log_file(env["NCCL_DEBUG_FILE"]).write_text(IB)
    assert transport.seen("nccl", env).across == ("ib",)
    assert transport.seen("gloo", {}) == transport.Seen(("gloo",), ("gloo",))
    assert transport.wanted({"NCCL_DEBUG": "WARN"}, tmp_path).keys() == {"NCCL_DEBUG_SUBSYS", "NCCL_DEBUG_FILE"}


def test_levels_and_exit_codes() -> None:
    rows = [Finding(level, level, "") for level in ("skip", "warn", "fail", "suspect")]
    assert [exit_code(rows[:count]) for count in range(5)] == [0, 0, 0, 20, 30]
    assert worst([]) == "ok" and EXIT_CODES == {"fail": guard.DO_NOT_REQUEUE, "suspect": guard.SUSPECT_NODE}
    with pytest.raises(ValueError, match="'bad' is none of"):
        Finding("x", "bad", "")
