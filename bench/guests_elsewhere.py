"""Guests that only play their interpreter, hundreds of them in one other process.

What is measured here then is the orchestrator alone, with its sockets, servers and gRPC as they are.
"""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Self

from orchestrator.ids import InstanceId, SandboxId
from orchestrator.rpc.guest_server import SOCKET_NAME
from orchestrator.sandbox.port import Counters, Ending, Found, SandboxSpec
from tests.fakes.in_process_driver import Guest


class GuestsElsewhere:
    """A `SandboxDriver`; its sandboxes end when their servers do. To be used as a context manager."""

    instance_id = InstanceId("i0")
    image = "none"

    def __init__(self) -> None:
        self._process: asyncio.subprocess.Process
        self._alive: set[SandboxId] = set()

    async def __aenter__(self) -> Self:
        self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.guests_elsewhere", stdin=asyncio.subprocess.PIPE
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def start(self, spec: SandboxSpec) -> None:
        """See `SandboxDriver`."""
        assert self._process.stdin is not None
        self._alive.add(spec.sandbox_id)
        self._process.stdin.write(f"unix:{spec.socket_dir / SOCKET_NAME}\n".encode())
        await self._process.stdin.drain()

    async def destroy(self, sandbox_id: SandboxId) -> None:
        """See `SandboxDriver`."""
        self._alive.discard(sandbox_id)

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        """See `SandboxDriver`."""
        return 0.0

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        """See `SandboxDriver`."""
        return Ending.RUNNING if sandbox_id in self._alive else Ending.GONE

    def counters(self, sandbox_id: SandboxId) -> Counters:
        """See `SandboxDriver`."""
        return Counters(oom_kills=None, refused_forks=None)

    async def found(self) -> Sequence[Found]:
        """See `SandboxDriver`."""
        return [Found(sandbox_id, self.instance_id, 0, 0) for sandbox_id in self._alive]

    async def aclose(self) -> None:
        """See `SandboxDriver`."""


async def _serve() -> None:
    """Be all guests whose addresses come in, a line each, until there are no more."""
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    guests: set[asyncio.Task[None]] = set()
    while line := await reader.readline():
        guest = asyncio.create_task(Guest(line.decode().strip()).serve())
        guests.add(guest)
        guest.add_done_callback(guests.discard)
    for guest in tuple(guests):
        guest.cancel()
        with suppress(asyncio.CancelledError):
            await guest


if __name__ == "__main__":
    asyncio.run(_serve())
