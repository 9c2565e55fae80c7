"""What the host sees of the sandbox that is probed: a word that no guest has a part in."""

import hashlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from secrets import token_hex
from typing import Any

from orchestrator.sandbox.posture import Resources

NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")
_BACKLOG = 16
_MAX_DATAGRAM_BYTES = 2_048
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_V1_FILES = {
    "memory": ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.swappiness"),
    "cpu": ("cpu.cfs_quota_us", "cpu.cfs_period_us", "cpu.shares"),
    "pids": ("pids.max",),
}
_V2_FILES = ("memory.max", "memory.swap.max", "cpu.max", "cpu.weight", "pids.max")


class HostUnseenError(Exception):
    """A judge needs what this process cannot read of the host."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """The process that the engine started for the sandbox, read from the host's /proc."""

    status: Mapping[str, str]
    namespaces: Mapping[str, str]
    command: str
    cgroup: Mapping[str, str]
    """Its limits by the names of their files: those of version 1, or those of version 2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Host:
    """What the judges compare with."""

    runtime: str
    machine: str
    """Architecture, as uname says."""
    release: str
    """Of the host's kernel."""
    namespaces: Mapping[str, str]
    """Of this process, that is the host's or those of the orchestrator's own container."""
    uid: int
    """Of this process."""
    resources: Resources
    inspected: Mapping[str, Any]
    """The engine's description of the container."""
    sandbox: Process | None
    arrived: Mapping[str, int]
    """Connections and datagrams that reached a listener of ours, by its address."""
    context_changed: bool
    core_pattern: str

    @property
    def process(self) -> Process:
        """The sandbox's process.

        Raises:
            HostUnseenError: It cannot be read.
        """
        if self.sandbox is None:
            raise HostUnseenError(
                "the sandbox's process cannot be read on the host: run this as root on the engine's machine"
            )
        return self.sandbox

    @property
    def config(self) -> Mapping[str, Any]:
        """What the engine was told of the host's side."""
        host_config: Mapping[str, Any] = self.inspected["HostConfig"]
        return host_config


def read_process(pid: int | str) -> Process | None:
    """A process as /proc shows it; None if it can't be read. Blocks."""
    try:
        status = dict(
            line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line
        )
        return Process(
            status={name: value.strip() for name, value in status.items()},
            namespaces=read_namespaces(pid),
            command=Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ").strip(),
            cgroup=_read_cgroup(Path(f"/proc/{pid}/cgroup").read_text()),
        )
    except OSError:
        return None


def read_namespaces(pid: int | str) -> dict[str, str]:
    """The namespaces of a process, by kind. Blocks.

    Raises:
        OSError: It is gone, or somebody else's.
    """
    return {name: os.readlink(f"/proc/{pid}/ns/{name}") for name in NAMESPACES}


def _read_cgroup(memberships: str) -> dict[str, str]:
    """The limits of the cgroups in a /proc/PID/cgroup file, of either version or both at once."""
    found: dict[str, str] = {}
    for line in memberships.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            _read_files(_CGROUP_ROOT / path.lstrip("/"), _V2_FILES, found)
        for controller, names in _V1_FILES.items():
            if controller in controllers.split(","):
                _read_files(_CGROUP_ROOT / controller / path.lstrip("/"), names, found)
    return found


def _read_files(directory: Path, names: Sequence[str], into: dict[str, str]) -> None:
    for name in names:
        with suppress(OSError):
            into[name] = (directory / name).read_text().strip()


def file_hashes(directory: Path) -> dict[str, str]:
    """SHA-256 of every file in it. Blocks."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


@dataclass(slots=True)
class Listeners:
    """Listeners on addresses of this machine that nothing in a sandbox may reach.

    Nobody serves them: a connection that is made waits in the kernel's queue and is counted at the end.
    """

    tcp: dict[str, socket.socket] = field(default_factory=dict)
    udp: dict[str, socket.socket] = field(default_factory=dict)
    abstract: dict[str, socket.socket] = field(default_factory=dict)

    def arrived(self) -> dict[str, int]:
        """How many connections and datagrams came, by address; they are dropped."""
        streams = {**self.tcp, **{"@" + name: line for name, line in self.abstract.items()}}
        return {
            **{name: _accepted(line) for name, line in streams.items()},
            **{f"udp {name}": _received(line) for name, line in self.udp.items()},
        }


@contextmanager
def listening(hosts: Sequence[str]) -> Iterator[Listeners]:
    """Listeners on those of the addresses that this machine has, for the length of the block."""
    listeners = Listeners()
    with ExitStack() as stack:
        for host in hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with suppress(OSError):  # an address that this machine lacks
                _listen(listeners.tcp, stack, family, socket.SOCK_STREAM, host)
                _listen(listeners.udp, stack, family, socket.SOCK_DGRAM, host)
        name = f"rlm-probe-{token_hex(8)}"
        line = stack.enter_context(socket.socket(socket.AF_UNIX))
        line.bind("\0" + name)
        line.listen(_BACKLOG)
        line.setblocking(False)
        listeners.abstract[name] = line
        yield listeners


def _listen(
    into: dict[str, socket.socket], stack: ExitStack, family: socket.AddressFamily, kind: int, host: str
) -> None:
    line = stack.enter_context(socket.socket(family, kind))
    line.bind((host, 0))
    line.setblocking(False)
    if kind == socket.SOCK_STREAM:
        line.listen(_BACKLOG)
    into[f"{host} {line.getsockname()[1]}"] = line


def _accepted(line: socket.socket) -> int:
    count = 0
    with suppress(BlockingIOError):
        while True:
            line.accept()[0].close()
            count += 1
    return count


def _received(line: socket.socket) -> int:
    count = 0
    with suppress(BlockingIOError):
        while True:
            line.recv(_MAX_DATAGRAM_BYTES)
            count += 1
    return count
