"""Sandboxes with one flag missing, or one door opened, for the probes to notice.

They are made here, in the tests, by changing the body that the engine is sent: the product has no setting
that could make one. What is opened leads to canaries only: to a directory of ours, to processes and devices
that nothing is done to, and to addresses of this machine where the probes themselves listen.
"""

import socketserver
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from orchestrator.probes import sandbox
from orchestrator.sandbox import docker_driver, recheck
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.sandbox.posture import Resources, create_arguments

Body = dict[str, Any]
Change = Callable[[Body], None]


@dataclass(frozen=True, kw_only=True)
class Control:
    """A weaker sandbox."""

    name: str
    """What was opened, in a few words."""
    removes: tuple[str, ...] = ()
    """Entries of the golden description that are missing in it."""
    change: Change
    opens: tuple[str, ...]
    """Cases whose probes have to see an open door."""
    runtime: str = "runc"


@contextmanager
def weakened(change: Change) -> Iterator[None]:
    """Within the block sandboxes are made with `change`, and not compared with what they should be."""

    def create_weakened(spec: SandboxSpec, resources: Resources, **named: Any) -> Body:
        body: Body = create_arguments(spec, resources, **named)
        change(body)
        return body

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(docker_driver, "create_arguments", create_weakened)
        patch.setattr(recheck, "check", lambda *_asked, **_named: None)
        # Where a network is opened, only this machine is asked.
        patch.setattr(sandbox, "METADATA_SERVICE", "127.0.0.1")
        patch.setattr(sandbox, "SOME_NAME", "localhost")
        yield


# --- Changes -------------------------------------------------------------------------------------------


def host(**values: Any) -> Change:
    """Sets entries of HostConfig; None removes one."""

    def change(body: Body) -> None:
        for name, value in values.items():
            if value is None:
                body["HostConfig"].pop(name)
            else:
                body["HostConfig"][name] = value

    return change


def top(**values: Any) -> Change:
    """Sets entries beside HostConfig."""
    return lambda body: body.update(values)


def both(*changes: Change) -> Change:
    """One after the other."""

    def change(body: Body) -> None:
        for each in changes:
            each(body)

    return change


def security(kept: int, *instead: str) -> Change:
    """Keeps one of the two security options."""

    def change(body: Body) -> None:
        body["HostConfig"]["SecurityOpt"] = [body["HostConfig"]["SecurityOpt"][kept], *instead]

    return change


UNCONFINED = security(0, "seccomp=unconfined")


def tmp(option: str, instead: str) -> Change:
    """Replaces one option of /tmp."""

    def change(body: Body) -> None:
        options = [
            each for each in body["HostConfig"]["Tmpfs"]["/tmp"].split(",") if not each.startswith(option)
        ]
        body["HostConfig"]["Tmpfs"]["/tmp"] = ",".join([*options, instead] if instead else options)

    return change


def ulimit(name: str) -> Change:
    """Leaves one limit to the engine."""

    def change(body: Body) -> None:
        limits = [limit for limit in body["HostConfig"]["Ulimits"] if limit["Name"] != name]
        assert len(limits) == len(body["HostConfig"]["Ulimits"]) - 1
        body["HostConfig"]["Ulimits"] = limits

    return change


def writable(target: str) -> Change:
    """Mounts one of the two directories writable, for everybody: of the probes' own sandbox."""

    def change(body: Body) -> None:
        for mount in body["HostConfig"]["Mounts"]:
            if mount["Target"] == target:
                mount["ReadOnly"] = False
                directory = Path(mount["Source"])
                directory.chmod(0o777)
                for path in directory.iterdir():
                    if path.is_file():
                        _make_writable_copy(path)

    return change


def _make_writable_copy(path: Path) -> None:
    # A copy, because a context's file is a link to the blob of the store.
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o666)


def bound(source: Path, target: str) -> Change:
    """Mounts a directory of canaries."""

    def change(body: Body) -> None:
        body["HostConfig"]["Mounts"].append(
            {"Type": "bind", "Source": str(source), "Target": target, "ReadOnly": False}
        )

    return change


class _Engine(socketserver.BaseRequestHandler):
    """Answers as an engine does."""

    def handle(self) -> None:
        self.request.recv(1_024)
        self.request.sendall(b"HTTP/1.0 200 OK\r\n\r\n")


@contextmanager
def canary_directory() -> Iterator[Path]:
    """A directory in which everybody may write, with a socket that answers like an engine's."""
    with tempfile.TemporaryDirectory(prefix="rlm-canary") as name:
        directory = Path(name)
        directory.chmod(0o777)
        (directory / "note").write_text("canary")
        (directory / "note").chmod(0o666)
        with socketserver.ThreadingUnixStreamServer(str(directory / "docker.sock"), _Engine) as server:
            (directory / "docker.sock").chmod(0o777)
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            try:
                yield directory
            finally:
                server.shutdown()
                thread.join()


# --- The controls --------------------------------------------------------------------------------------

AS_ROOT = top(User="0:0")
HOST_NETWORK = both(host(NetworkMode="host"), top(NetworkDisabled=False, Hostname=""))


def without(entry: str, change: Change, *opens: str, runtime: str = "runc") -> Control:
    """A sandbox that lacks one entry of the golden description."""
    return Control(name=f"without {entry}", removes=(entry,), change=change, opens=opens, runtime=runtime)


FLAGS = (
    without("User", AS_ROOT, "A04"),
    without("WorkingDir", top(WorkingDir="/context"), "C04"),
    without("Env", top(Env=["HOME=/tmp", "PATH=/usr/local/bin:/usr/bin:/bin", "KEY=canary"]), "A08"),
    Control(
        # Each alone is enough; both are told, because engines differ in what they do with one of them.
        name="without NetworkDisabled and HostConfig.NetworkMode",
        removes=("NetworkDisabled", "HostConfig.NetworkMode"),
        change=HOST_NETWORK,
        opens=("A05", "A11", "C06", "D02", "D03"),
    ),
    without("HostConfig.Runtime", host(Runtime="runc"), "A14", runtime="runsc"),
    without("HostConfig.IpcMode", host(IpcMode="host"), "A05", "A11"),
    without("HostConfig.ShmSize", host(ShmSize=64 << 20), "B09"),
    without("HostConfig.CgroupnsMode", host(CgroupnsMode="host"), "A05", "A11"),
    without("HostConfig.CapDrop", host(CapDrop=None), "A01"),
    Control(
        # With our profile such a sandbox does not even start: its filter is set before its user.
        name="without HostConfig.SecurityOpt no-new-privileges",
        removes=("HostConfig.SecurityOpt no-new-privileges",),
        change=host(SecurityOpt=["seccomp=unconfined"]),
        opens=("A02",),
    ),
    without(
        "HostConfig.SecurityOpt seccomp",
        UNCONFINED,
        *("A03", "A10", "A11", "B03", "C01", "C07", "C08", "C09", "C12", "C13"),
    ),
    Control(
        name="with the engine's own profile instead of ours",
        change=security(0),
        opens=("A10", "C07", "C09", "C12"),
    ),
    without("HostConfig.MaskedPaths", host(MaskedPaths=[]), "A09"),
    # As root, because the rights of the kernel's own files stop everybody else too.
    without("HostConfig.ReadonlyPaths", both(host(ReadonlyPaths=[]), AS_ROOT), "A09"),
    without("HostConfig.ReadonlyRootfs", both(host(ReadonlyRootfs=False), AS_ROOT), "A06", "B02"),
    without("HostConfig.Tmpfs size", tmp("size", ""), "B09", "B12"),
    without("HostConfig.Tmpfs nr_inodes", tmp("nr_inodes", ""), "B10"),
    without("HostConfig.Tmpfs noexec", tmp("noexec", "exec"), "A06", "B11"),
    without("HostConfig.Tmpfs nosuid", tmp("nosuid", "suid"), "A06"),
    without("HostConfig.Tmpfs nodev", tmp("nodev", "dev"), "A06"),
    without("HostConfig.Mounts /context", writable("/context"), "A06", "B01", "B02"),
    without("HostConfig.Mounts /run/rlm", writable("/run/rlm"), "A06", "B02", "G19"),
    without("HostConfig.Memory", host(Memory=0, MemorySwap=0), "A11", "A12"),
    without("HostConfig.MemorySwap", host(MemorySwap=-1), "A11", "A12"),
    without("HostConfig.OomScoreAdj", host(OomScoreAdj=0), "A11"),
    without("HostConfig.NanoCpus", host(NanoCpus=0), "A11"),
    without("HostConfig.CpuShares", host(CpuShares=0), "A12"),
    without("HostConfig.PidsLimit", host(PidsLimit=0), "A11", "A12"),
    without("HostConfig.Ulimits nofile", ulimit("nofile"), "A12"),
    without("HostConfig.Ulimits fsize", ulimit("fsize"), "A12"),
    without("HostConfig.Ulimits core", ulimit("core"), "A12", "C10"),
    without("HostConfig.Ulimits memlock", ulimit("memlock"), "A12"),
    without("HostConfig.Ulimits msgqueue", ulimit("msgqueue"), "A12", "C09"),
    without("HostConfig.LogConfig", host(LogConfig=None), "A11"),
    without("HostConfig.RestartPolicy", host(RestartPolicy={"Name": "unless-stopped"}), "A11"),
    without("HostConfig.Init", host(Init=True), "C03"),
)
"""One for each flag of the posture that is a part of the wall."""

NO_WALL: Mapping[str, str] = {
    "Image": "pinned by id: N05",
    "Hostname": "says nothing; that it can't be set from inside is C13",
    "AttachStdin": "nobody attaches: B08",
    "AttachStdout": "nobody attaches: B08",
    "AttachStderr": "nobody attaches: B08",
    "OpenStdin": "nobody attaches: B08",
    "Tty": "nobody attaches: B08",
    "StopSignal": "a sandbox is removed, never asked to stop",
    "Labels": "for the reaper: F01",
    "HostConfig.AutoRemove": "the driver removes it, and looks first how it ended: F01",
}
"""The other entries of the description, and where they are looked after."""

_DEVICE = {"PathOnHost": "/dev/null", "PathInContainer": "/dev/canary", "CgroupPermissions": "r"}

DOORS = (
    Control(name="a device", change=host(Devices=[_DEVICE]), opens=("A07", "A11")),
    Control(name="a capability", change=host(CapAdd=["CHOWN"]), opens=("A01",)),
    Control(name="the host's processes", change=host(PidMode="host"), opens=("A05", "A11", "C03")),
    Control(
        name="the host's names", change=both(host(UTSMode="host"), top(Hostname="")), opens=("A05", "A11")
    ),
    Control(
        name="a network and any system call", change=both(HOST_NETWORK, UNCONFINED), opens=("D01", "D02")
    ),
    Control(name="root and nothing masked", change=both(host(MaskedPaths=[]), AS_ROOT), opens=("A09", "C11")),
)
"""Doors that no flag of ours closes, because nobody opens them."""


def doors_to(directory: Path) -> tuple[Control, ...]:
    """Doors to a directory of canaries on the host."""
    return (
        Control(
            name="a directory of the host, with an engine's socket",
            change=bound(directory, "/mnt/canary"),
            opens=("A06", "B02", "B16", "D04", "D05"),
        ),
        Control(
            name="cgroup files that can be written", change=bound(directory, "/sys/fs/cgroup"), opens=("C02",)
        ),
    )
