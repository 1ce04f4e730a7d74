"""Before torch: the tasks of a SLURM step find each other, agree on a port, and become the ranks.

    srun python -m mirai_dist.runtime.rendezvous --patience 45 -- -m mirai_dist ...                (one task a rank)
    srun python -m mirai_dist.runtime.rendezvous --patience 45 --torchrun 8 -- -m mirai_dist ...   (one task a node)

Rank 0 listens on its node, everybody else calls there. What would otherwise be ten silent minutes, or several runs of
one node each, ends here in one line that names the hosts: a node that cannot reach the first one, a task that never
came, two nodes that are one. The port that torch is to listen on is probed by the host that will use it, so a port
that somebody holds is passed over.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from mirai_dist.runtime import nodelist
from mirai_dist.runtime.guard import SUSPECT_NODE, leave

_PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_PORTS = 12000  # candidates below the first port that the kernel hands out by itself
_TRIED = 16  # ports that are tried before all are called taken
_ANSWER = 5.0  # seconds in which whoever listens must answer, to be one of us
_CALL = 3.0  # seconds one attempt to connect may take
_PAUSE = 0.3
# What a container's start-up hook may have set for a launcher that is not ours.
_FOREIGN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK")


class LaunchError(RuntimeError):
    """The ranks cannot find each other or their devices. One line; starting again as it is will not help."""

    exit_code = 20


class UnreachableError(RuntimeError):
    """Hosts that do not reach each other. One line; another choice of hosts may help. `suspects`: those to avoid."""

    exit_code = SUSPECT_NODE

    def __init__(self, what: str, suspects: Sequence[str]) -> None:
        super().__init__(what)
        self.suspects = list(suspects)


@dataclass(frozen=True)
class Step:
    """What SLURM says about this task and the step it belongs to."""

    rank: int
    ranks: int
    node: int
    hosts: tuple[str, ...]
    token: str  # of this attempt of this step of this job

    @property
    def head(self) -> str:
        return self.hosts[0]


def find_step(env: Mapping[str, str]) -> Step:
    """Read SLURM's variables. Raises LaunchError where srun did not start this process."""
    if "SLURM_STEP_NODELIST" not in env or "SLURM_PROCID" not in env:
        raise LaunchError("SLURM_STEP_NODELIST or SLURM_PROCID is not set: start this with srun")
    rank, ranks, node = (number(env, name) for name in ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_NODEID"))
    hosts = tuple(nodelist.expand(env["SLURM_STEP_NODELIST"]))
    if rank == 0 and node != 0:
        # Everybody would call the first host, and rank 0 listen elsewhere.
        raise LaunchError("rank 0 is not on the first host of the step; use srun --distribution=block")
    parts = (env.get(name, "0") for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT"))
    return Step(rank, ranks, node, hosts, "mirai " + ".".join(parts))


def derived_port(env: Mapping[str, str], first_ephemeral: int | None = None) -> int:
    """Port of rank 0 for this job step, the same on all nodes, below the range the kernel hands out by itself."""
    return candidates(env, first_ephemeral)[0]


def candidates(env: Mapping[str, str], first_ephemeral: int | None = None) -> list[int]:
    """Ports to try for this job step, in order, the same on all nodes. Raises LaunchError where there are none."""
    first = _first_ephemeral() if first_ephemeral is None else first_ephemeral
    lowest = max(1024, first - _PORTS)
    if first <= lowest:
        raise LaunchError(f"all ports from {first} on are handed out by the kernel; set MASTER_PORT to a free one")
    # Two steps of one job may share their first node, and a requeued job may meet its own dying predecessor.
    parts = [number(env, name) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    start = parts[0] * 31 + parts[1] * 7 + parts[2]
    return [lowest + (start + offset) % (first - lowest) for offset in range(min(_TRIED, first - lowest))]


def listen(ports: Sequence[int], backlog: int = 4096) -> socket.socket:
    """A listening socket on the first of these ports that is free. Raises LaunchError when all are taken."""
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    for port in ports:
        try:
            return socket.create_server(
                ("", port), family=family, backlog=backlog, dualstack_ipv6=family == socket.AF_INET6
            )
        except OSError:  # somebody holds it; the loop says so if all are held
            continue
    said = f"{ports[0]} to {ports[-1]}" if len(ports) > 1 else f"{ports[0]}"
    raise LaunchError(f"{socket.gethostname()}: port {said} is taken; set MASTER_PORT to a free one")


def meet(step: Step, ports: Sequence[int], master_port: int | None, patience: float) -> int | None:
    """The port that rank 0's host has free for the run, once all tasks are there; None if it told us to give up.

    ports: where the meeting may take place. master_port: the only one the run may use, None for any.
    patience: seconds. Raises UnreachableError naming hosts, LaunchError when no port is free or hosts coincide.
    """
    if step.rank == 0:
        with listen(ports) as server:
            others = [master_port] if master_port else [port for port in ports if port != server.getsockname()[1]]
            with listen(others) as held:  # until all know it
                port = held.getsockname()[1]
                _Host(step, server, patience).gather(port)
                return port
    return _call(step, ports, patience)


class _Host:
    """Rank 0's side of the meeting."""

    def __init__(self, step: Step, server: socket.socket, patience: float) -> None:
        self.step = step
        self.server = server
        self.deadline = time.monotonic() + patience
        self.patience = patience
        self.guests: dict[int, tuple[socket.socket, str, int]] = {}  # rank -> connection, host name, node

    def gather(self, port: int) -> None:
        """Wait for everybody, then tell them the port."""
        try:
            while len(self.guests) < self.step.ranks - 1:
                self.server.settimeout(max(0.0, self.deadline - time.monotonic()) or 0.001)
                try:
                    connection, _ = self.server.accept()
                except TimeoutError:
                    raise self._missing() from None
                self._welcome(connection)
            self._refuse_twins()
            self._tell({"port": port})
        finally:
            self._tell({"over": True})
            for connection, _, _ in self.guests.values():
                connection.close()

    def _welcome(self, connection: socket.socket) -> None:
        connection.settimeout(_ANSWER)
        try:
            hello = _receive(connection)
            if hello.get("token") != self.step.token:  # another job's task, or no task at all
                connection.close()
                return
            _send(connection, {"token": self.step.token})
        except (OSError, ValueError):  # whoever it was has left; a task of ours calls again
            connection.close()
            return
        self.guests[hello["rank"]] = (connection, hello["host"], hello["node"])

    def _tell(self, message: dict[str, Any]) -> None:
        for connection, _, _ in self.guests.values():
            try:
                _send(connection, message)
            except OSError:  # it has left; what it left with is told by its own last line
                continue

    def _missing(self) -> UnreachableError:
        step = self.step
        present = {0, *(node for _, _, node in self.guests.values())}
        missing = [host for node, host in enumerate(step.hosts) if node not in present]
        count = len(self.guests) + 1
        here = socket.gethostname()
        if not missing:
            return UnreachableError(f"{here}: {count} of {step.ranks} tasks came in {self.patience:.0f} s", [])
        alone = len(missing) == len(step.hosts) - 1 and len(missing) > 1
        what = f"{here}: only {count} of {step.ranks} tasks came in {self.patience:.0f} s; nothing from "
        what += f"{', '.join(missing)}" + (": this host itself may be out of reach" if alone else "")
        return UnreachableError(f"{what}; check the network between them", [step.head] if alone else missing)

    def _refuse_twins(self) -> None:
        names: dict[str, int] = {socket.gethostname(): 0}
        for _, host, node in self.guests.values():
            if names.setdefault(host, node) != node:
                what = f"nodes {names[host]} and {node} of the job are both called {host}"
                raise LaunchError(f"{what}; every node must be a host of its own, with a name of its own")


def _call(step: Step, ports: Sequence[int], patience: float) -> int | None:
    """Every other rank's side: call until the first host answers."""
    deadline = time.monotonic() + patience + _ANSWER  # the host gives up first, and says more
    reason = "it never answered"
    while time.monotonic() < deadline:
        for port in ports:
            try:
                connection = socket.create_connection((step.head, port), timeout=_CALL)
            except ConnectionRefusedError as error:  # nobody there yet, or at the next port
                reason = str(error)
                continue
            except OSError as error:  # no name, no route: the same for all ports
                reason = str(error)
                break
            with connection:
                if _is_ours(connection, step):
                    return _wait(connection, step, deadline)
        time.sleep(_PAUSE)
    here = socket.gethostname()
    what = f"{here} (rank {step.rank}) cannot reach {step.head}, where rank 0 is, at ports {ports[0]} to {ports[-1]}"
    raise UnreachableError(f"{what} ({reason}, for {patience:.0f} s); check name and route from here", [step.head])


def _is_ours(connection: socket.socket, step: Step) -> bool:
    connection.settimeout(_ANSWER)
    try:
        _send(connection, {"token": step.token, "rank": step.rank, "host": socket.gethostname(), "node": step.node})
        return _receive(connection).get("token") == step.token
    except (OSError, ValueError):  # somebody else's service has this port
        return False


def _wait(connection: socket.socket, step: Step, deadline: float) -> int | None:
    connection.settimeout(max(1.0, deadline - time.monotonic()))
    try:
        return _receive(connection).get("port")
    except (OSError, ValueError) as error:
        here = socket.gethostname()
        what = f"{here} (rank {step.rank}) lost {step.head}, where rank 0 is, before all had come: {error}"
        raise UnreachableError(what, [step.head]) from None


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def _receive(connection: socket.socket) -> dict[str, Any]:
    """One line of JSON. Raises OSError, or ValueError for anything else than an object."""
    data = b""
    while not data.endswith(b"\n"):
        byte = connection.recv(1)
        if not byte or len(data) > 4096:
            raise ConnectionResetError("the connection was closed")
        data += byte
    message = json.loads(data)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message


def command(step: Step, port: int | None, torchrun: int | None, rest: Sequence[str]) -> list[str]:
    """Arguments of the interpreter that this task becomes. port: None where one task is all there is."""
    if torchrun is None:
        return list(rest)
    shape = ["--standalone"]
    if port is not None:
        shape = ["--nnodes", str(step.ranks), "--node-rank", str(step.rank), "--rdzv-backend", "static"]
        shape += ["--master-addr", step.head, "--master-port", str(port)]
    return ["-m", "mirai_dist.runtime.torchrun", *shape, "--nproc-per-node", str(torchrun), *rest]


def environment(env: Mapping[str, str], step: Step, port: int | None, ranks_here: int | None) -> dict[str, str]:
    """What this task's successor sees: SLURM's step, and where rank 0 listens."""
    theirs = {name: value for name, value in env.items() if name not in _FOREIGN}
    if port is not None:
        theirs |= {"MASTER_ADDR": step.head, "MASTER_PORT": str(port)}
    if ranks_here is not None and ranks_here > 1:
        theirs.setdefault("OMP_NUM_THREADS", "1")
    return theirs


def number(env: Mapping[str, str], name: str) -> int:
    """A variable that a launcher sets, 0 where it does not. Raises LaunchError for what is no number."""
    value = env.get(name, "0")
    if not value.isdigit():
        raise LaunchError(f"{name} is {value!r}, which is no number; the launcher must set it")
    return int(value)


def _first_ephemeral() -> int:
    return int(_PORT_RANGE.read_text().split()[0]) if _PORT_RANGE.exists() else 32768


def _make_scratch(env: Mapping[str, str]) -> None:
    """TMPDIR on this node: the batch script ran on the first one alone."""
    folder = env.get("TMPDIR")
    try:
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        where = f"{socket.gethostname()}: TMPDIR {folder} cannot be made ({error.strerror})"
        raise LaunchError(f"{where}; set `scratch` in the cluster file to a folder that tasks can write") from None


def run(options: argparse.Namespace) -> NoReturn:
    """Meet, then exec."""
    env = os.environ
    step = find_step(env)
    port = None
    if step.ranks > 1:
        own = number(env, "MASTER_PORT") or None
        port = meet(step, candidates(env), own, options.patience)
        if port is None:
            os._exit(SUSPECT_NODE)  # rank 0 has told why
    _make_scratch(env)
    argv = [sys.executable, *command(step, port, options.torchrun, options.command)]
    os.execve(argv[0], argv, environment(env, step, port, options.torchrun))


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Command line; the batch script writes it."""
    parser = argparse.ArgumentParser(prog="rendezvous", description="Meet the other tasks of the step, then go on.")
    parser.add_argument("--run-dir", type=Path, required=True, help="run directory, for the record of a failure")
    parser.add_argument("--patience", type=float, required=True, help="seconds in which all must have come")
    parser.add_argument("--torchrun", type=int, metavar="N", help="become a torchrun of N ranks; default: one rank")
    parser.add_argument("command", nargs="+", help="arguments of Python, after --")
    return parser.parse_args(arguments)


def main() -> NoReturn:
    """Entry point of a task; an exception leaves a record and exits hard."""
    options = parse(sys.argv[1:])
    try:
        run(options)
    except Exception as error:  # noqa: BLE001  one line and a record, as for a rank
        leave(error, options.run_dir, int(os.environ.get("SLURM_PROCID", "0")))


if __name__ == "__main__":
    main()
