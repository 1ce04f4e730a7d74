"""A real SLURM cluster on this machine for the tests: slurmctld, and nodes that are namespaces with a slurmd each.

Every node has its own host name, network address, processes and /dev/shm, and reaches the others through a bridge, so
that a wrong address, a killed node or a cut cable shows as it would on a real cluster. Needs root and Debian's
packages, which `install` brings. Nothing is written outside one folder below /tmp, and nothing is ended by name.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

PACKAGES = ("slurmctld", "slurmd", "slurm-client", "munge", "iproute2")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "unshare", "setpriv")
FREEZER = Path("/sys/fs/cgroup/freezer")
SBIN = f"{os.environ['PATH']}:/usr/sbin:/sbin"
NODE = Path(__file__).with_name("node.sh")

CONFIGURATION = """\
ClusterName=tests
SlurmctldHost={host}({gateway})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CredType=cred/munge
# How long a requeued job waits before it may start again; the default is two minutes.
AuthInfo=socket={folder}/munge/socket,cred_expire=6
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
MailProg=/bin/true
ProctrackType=proctrack/{tracking}
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
# Nodes claim more than the machine has.
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=2,sched_interval=2,sched_min_interval=200000,batch_sched_delay=0
# Short clocks: a lost node is known after fifteen seconds, and what ignores TERM is killed after ten.
SlurmdTimeout=15
SlurmctldTimeout=30
MessageTimeout=10
KillWait=10
MinJobAge=86400
ReturnToService=2
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=main Nodes=ALL Default=YES PriorityTier=10 DefaultTime=10 MaxTime=INFINITE State=UP
PartitionName=scavenge Nodes=ALL PriorityTier=1 GraceTime=0 MaxTime=INFINITE State=UP
PartitionName=grace Nodes=ALL PriorityTier=1 GraceTime=20 MaxTime=INFINITE State=UP
PartitionName=urgent Nodes=ALL PriorityTier=100 PreemptMode=OFF MaxTime=INFINITE State=UP
"""


class UnavailableError(RuntimeError):
    """This machine cannot have the cluster; the reason, in one line."""


@dataclass
class TestCluster:
    """The cluster. `folder` holds everything; `env` is what sbatch and its kin need."""

    __test__ = False

    nodes: int
    folder: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="mirai-slurm-", dir="/tmp")))
    _daemons: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)

    @property
    def tag(self) -> str:
        return str(os.getpid())

    @property
    def names(self) -> list[str]:
        """Host names; those of two clusters on one machine differ, as their control groups are named after them."""
        return [f"t{self.tag}n{number}" for number in range(1, self.nodes + 1)]

    @property
    def network(self) -> str:
        """The private network of the nodes, without its last byte."""
        return f"10.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}"

    @property
    def env(self) -> dict[str, str]:
        return {
            "SLURM_CONF": str(self.folder / "etc" / "slurm.conf"),
            "PATH": SBIN,
            "MIRAI_TEST_NETWORK": f"{self.network}.0/24",
        }

    def start(self) -> TestCluster:
        """Configure and start everything. Raises RuntimeError with the end of the logs when it does not come up."""
        try:
            self._configure()
            self._daemon("munged", "munged", "--foreground", *self._munge_options())
            until(lambda: (self.folder / "munge/socket").exists(), 10, "munged")
            _ip("link", "add", self.bridge, "type", "bridge")
            _ip("address", "add", f"{self.network}.1/24", "dev", self.bridge)
            _ip("link", "set", self.bridge, "up")
            self._daemon("slurmctld", "slurmctld", "-D", "-c", "-f", self.env["SLURM_CONF"])
            for name in self.names:
                self.boot(name)
            self.wait_for_nodes()
        except BaseException:
            logs = "\n".join(_end_of(path) for path in sorted((self.folder / "log").glob("*")))
            self.stop()
            raise RuntimeError(f"the test cluster did not come up:\n{logs}") from None
        return self

    def stop(self) -> None:
        """End every process, by the pids that were started; remove interfaces, control groups and files."""
        for name in self.names:
            self._end(name, signal.SIGKILL)
            _ip("link", "delete", self._cable(name), check=False)
        for name in ("slurmctld", "munged"):
            self._end(name, signal.SIGTERM)
        _ip("link", "delete", self.bridge, check=False)
        for name in self.names:
            groups = FREEZER / f"slurm_{name}"
            for group in sorted([*groups.rglob("*/"), groups], key=lambda path: -len(path.parts)):
                with suppress(OSError):  # a process on its way out; an empty group harms nobody
                    group.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)

    def boot(self, name: str) -> None:
        """Start a node: namespaces, its end of the cable, slurmd."""
        pid_file = self.folder / "nodes" / name / "pid"
        pid_file.parent.mkdir(parents=True, exist_ok=True)
        pid_file.unlink(missing_ok=True)
        address = f"{self.network}.{10 + self.names.index(name) + 1}/24"
        spaces = ("--net", "--uts", "--pid", "--ipc", "--mount", "--fork", "--kill-child=KILL", "--propagation=private")
        self._daemon(name, "unshare", *spaces, "bash", str(NODE), name, address, str(self.folder))
        until(lambda: pid_file.exists() and pid_file.read_text().strip().isdigit(), 10, f"namespaces of {name}")
        pid = pid_file.read_text().strip()
        _ip("link", "add", self._cable(name), "type", "veth", "peer", "name", "eth0", "netns", pid)
        _ip("link", "set", self._cable(name), "master", self.bridge, "up")

    def cut_power(self, name: str) -> None:
        """The node is gone between two instructions, and nobody gets a FIN: its cable goes first."""
        self.cut_cable(name)
        self._end(name, signal.SIGKILL)

    def cut_cable(self, name: str) -> None:
        """The node lives, and reaches nobody."""
        _ip("link", "set", self._cable(name), "down")

    def kill_slurmd(self, name: str) -> None:
        """Only the daemon: what runs on the node lives on, and SLURM does not know."""
        init = int((self.folder / "nodes" / name / "pid").read_text())
        for child in Path(f"/proc/{init}/task/{init}/children").read_text().split():
            if Path(f"/proc/{child}/comm").read_text().strip() == "slurmd":
                os.kill(int(child), signal.SIGKILL)

    def mislead(self, name: str, about: str) -> None:
        """On one node a host's name leads to an address that nobody has; SLURM itself goes by addresses."""
        hosts = self.folder / "nodes" / name / "hosts"
        lines = (self.folder / "etc/hosts").read_text().splitlines()
        wrong = [f"{self.network}.250 {about}" if line.endswith(f" {about}") else line for line in lines]
        hosts.write_text("\n".join([*wrong, ""]))
        assert self.inside(name, "mount", "--bind", str(hosts), "/etc/hosts").wait(10) == 0

    def heal(self, name: str) -> None:
        """Whatever was done to the node, it is a fresh one afterwards."""
        self._end(name, signal.SIGKILL)
        _ip("link", "delete", self._cable(name), check=False)
        self.boot(name)
        self.wait_for_nodes()

    def wait_for_nodes(self) -> None:
        """Until every node is up and idle; one that came back drained is resumed."""

        def idle() -> bool:
            said = self.run("sinfo", "-h", "-N", "-p", "main", "-o", "%N %T").split("\n")
            states = dict(line.split() for line in said if line)
            for name, state in states.items():
                if "drain" in state:
                    self.run("scontrol", "update", f"NodeName={name}", "State=RESUME")
            return list(states.values()) == ["idle"] * self.nodes

        until(idle, 60, "idle nodes")

    def run(self, *command: str, timeout: float = 30.0) -> str:
        """Output of one of SLURM's commands; CalledProcessError with what it said when it fails."""
        env = {**os.environ, **self.env}
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def inside(self, name: str, *command: str) -> subprocess.Popen[str]:
        """A process on a node, not started by SLURM."""
        pid = (self.folder / "nodes" / name / "pid").read_text().strip()
        enter = ["nsenter", "-t", pid, "--net", "--uts", "--pid", "--ipc", "--mount", "--"]
        return subprocess.Popen([*enter, *command], env={**os.environ, **self.env}, text=True)

    @property
    def bridge(self) -> str:
        return f"mb{self.tag}"

    def _cable(self, name: str) -> str:
        return f"mv{self.tag}n{self.names.index(name) + 1}"

    def _daemon(self, name: str, *command: str) -> None:
        with (self.folder / "log" / f"{name}.out").open("ab") as out:
            # Where the tests are killed, what they started goes with them.
            self._daemons[name] = subprocess.Popen(
                ("setpriv", "--pdeathsig", "KILL", *command), env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True,
            )  # fmt: skip

    def _end(self, name: str, number: signal.Signals) -> None:
        """End a daemon. A node's is unshare, whose end is the end of process 1 of the node, and so of the node."""
        process = self._daemons.pop(name, None)
        if process is None:
            return
        process.send_signal(number)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _munge_options(self) -> list[str]:
        names = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        return [f"--{option}={self.folder}/munge/{name}" for option, name in names.items()]

    def _configure(self) -> None:
        for name in ("etc", "log", "state", "spool", "munge", "nodes"):
            (self.folder / name).mkdir(mode=0o755, parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge/key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        gateway, host = f"{self.network}.1", socket.gethostname().partition(".")[0]
        addresses = {name: f"{self.network}.{10 + number}" for number, name in enumerate(self.names, 1)}
        shape = "Port=6818 CPUs=16 Sockets=1 CoresPerSocket=16 ThreadsPerCore=1 RealMemory=64000"
        values = {
            "folder": self.folder,
            "host": host,
            "gateway": gateway,
            "port": _free_port(),
            "tracking": "cgroup" if (FREEZER / "release_agent").exists() else "linuxproc",
            "nodes": "\n".join(f"NodeName={name} NodeAddr={at} {shape}" for name, at in addresses.items()),
        }
        files = {
            "slurm.conf": CONFIGURATION.format(**values),
            "cgroup.conf": "CgroupPlugin=cgroup/v1\nCgroupMountpoint=/sys/fs/cgroup\nCgroupAutomount=no\n"
            "ConstrainCores=no\nConstrainRAMSpace=no\nConstrainDevices=no\n",
            "hosts": "".join(
                f"{at} {name}\n" for name, at in {"localhost": "127.0.0.1", host: gateway, **addresses}.items()
            ),
            "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
        }
        for name, text in files.items():
            (self.folder / "etc" / name).write_text(text)


def install() -> None:
    """Bring the packages, without starting their services. Raises UnavailableError with the reason."""
    if os.geteuid() != 0:
        raise UnavailableError("a SLURM cluster with nodes of their own needs root")
    if not all(shutil.which(program, path=SBIN) for program in PROGRAMS):
        _apt()
    probe = subprocess.run(["unshare", "--net", "--uts", "--pid", "--ipc", "--mount", "--fork", "true"])
    if probe.returncode:
        raise UnavailableError("this machine does not allow new namespaces")


def _apt() -> None:
    if not shutil.which("apt-get"):
        raise UnavailableError("SLURM is not installed, and there is no apt-get to install it with")
    policy = Path("/usr/sbin/policy-rc.d")  # what keeps a package from starting its service
    ours = not policy.exists()
    if ours:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "PATH": SBIN}
    quiet = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "timeout": 300, "env": env}
    try:
        for command in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
            done = subprocess.run(["apt-get", "-qq", *command], **quiet)
            if done.returncode:
                raise UnavailableError(f"apt-get {command[0]} failed: {done.stderr.strip()[-300:]}")
    finally:
        if ours:
            policy.unlink()


def until(true: Callable[[], bool], seconds: float, what: str) -> None:
    """Poll; AssertionError when it takes too long."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds:.0f} s"
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], env={**os.environ, "PATH": SBIN}, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def _end_of(path: Path) -> str:
    return f"{path.name}: {path.read_text(errors='replace')[-800:]}"
