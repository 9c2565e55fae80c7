"""A sandbox driver without a sandbox: the worker as a plain process of this machine.

For tests of what happens between the host and a guest, where a container would only cost time. It isolates
nothing.
"""

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from orchestrator.errors import SandboxStartError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.rpc.guest_server import SOCKET_NAME
from orchestrator.sandbox.port import Counters, Ending, Found, SandboxSpec

_ROOT = Path(__file__).resolve().parents[2]


class ProcessDriver:
    """See `SandboxDriver`."""

    instance_id = InstanceId("i0")
    image = "this machine's Python"

    def __init__(self) -> None:
        self._workers: dict[SandboxId, asyncio.subprocess.Process] = {}
        self.live_at_most = 0

    async def start(self, spec: SandboxSpec) -> None:
        if spec.runtime != "runc":
            raise SandboxStartError(f"no runtime {spec.runtime!r}")
        work_dir = tempfile.mkdtemp(prefix="rlm-work-")
        self._workers[spec.sandbox_id] = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "sandbox_image.worker",
            str(spec.socket_dir / SOCKET_NAME),
            str(spec.context_dir),
            work_dir,
            env={"PATH": os.environ["PATH"], "PYTHONPATH": f"{_ROOT}:{_ROOT / 'proto'}", "HOME": work_dir},
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
            cwd=work_dir,
        )
        self.live_at_most = max(self.live_at_most, len(self._workers))

    async def destroy(self, sandbox_id: SandboxId) -> None:
        worker = self._workers.pop(sandbox_id, None)
        if worker is None:
            return
        work_dir = _environment(worker.pid).get("HOME")
        for pid in _session(worker.pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await worker.wait()
        if work_dir:
            shutil.rmtree(work_dir, ignore_errors=True)

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        worker = self._workers.get(sandbox_id)
        ticks = sum(_cpu_ticks(pid) for pid in _session(worker.pid)) if worker else 0
        return ticks / os.sysconf("SC_CLK_TCK")

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        worker = self._workers.get(sandbox_id)
        if worker is None:
            return Ending.GONE
        return Ending.RUNNING if worker.returncode is None else Ending.EXITED

    def counters(self, sandbox_id: SandboxId) -> Counters:
        return Counters(oom_kills=None, refused_forks=None)

    async def found(self) -> Sequence[Found]:
        return [Found(sandbox_id, self.instance_id, 0, 0) for sandbox_id in self._workers]

    async def aclose(self) -> None:
        for sandbox_id in tuple(self._workers):
            await self.destroy(sandbox_id)


def _session(leader: int) -> list[int]:
    """The processes of the worker's session and those below them, whose session may be another."""
    children: dict[int, list[int]] = {}
    for pid, parent in _parents():
        children.setdefault(parent, []).append(pid)
    found = [leader]
    for pid in found:
        found += children.get(pid, [])
    return found


def _parents() -> Iterator[tuple[int, int]]:
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                yield int(name), int(_stat(int(name))[1])


def _cpu_ticks(pid: int) -> int:
    with suppress(OSError):
        fields = _stat(pid)
        return int(fields[11]) + int(fields[12])
    return 0


def _stat(pid: int) -> list[str]:
    """The fields of proc(5)'s stat after the name, which may hold anything: state first, then the parent."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()


def _environment(pid: int) -> dict[str, str]:
    with suppress(OSError):
        pairs = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        return dict(os.fsdecode(pair).split("=", 1) for pair in pairs if b"=" in pair)
    return {}
