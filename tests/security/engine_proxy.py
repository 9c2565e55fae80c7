"""A container engine that stops answering when a test wants it to: a socket in front of the real one."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

_ENGINE = "/var/run/docker.sock"
_MOST_HEAD_BYTES = 64 * 1024
_SANDBOX = re.compile(r"rlm-(s[0-9a-z]+)")


@dataclass(frozen=True, slots=True)
class Asked:
    """One call to the engine."""

    method: str
    path: str
    """Without the version."""

    @property
    def sandbox(self) -> str:
        """The sandbox it is about, or nothing."""
        named = _SANDBOX.search(self.path)
        return named[1] if named else ""


@dataclass(slots=True)
class EngineProxy:
    """Passes calls on, one connection each, but for those that `is_stuck`: these never get an answer."""

    socket: Path
    is_stuck: Callable[[Asked], bool] = lambda _asked: False
    passes_stuck_calls_on: bool = False
    """Whether the real engine carries out a call whose answer never comes."""
    asked: list[Asked] = field(default_factory=list)
    stuck: list[Asked] = field(default_factory=list)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            first, _, rest = head.partition(b"\r\n")
            method, target, _ = first.decode().split(" ", 2)
            asked = Asked(method, re.sub(r"^/v[0-9.]+", "", target))
            length = re.search(rb"(?i)content-length: *(\d+)", rest)
            body = await reader.readexactly(int(length[1])) if length else b""
            self.asked.append(asked)
            stuck = self.is_stuck(asked)
            if stuck:
                self.stuck.append(asked)
            if not stuck or self.passes_stuck_calls_on:
                rest = re.sub(rb"(?i)connection: [^\r]*\r\n", b"", rest)
                request = first + b"\r\nConnection: close\r\n" + rest + body
                await self._pass_on(request, None if stuck else writer)
            if stuck:
                await reader.read()  # until the caller gives up
        finally:
            writer.close()

    @staticmethod
    async def _pass_on(request: bytes, answer: asyncio.StreamWriter | None) -> None:
        engine, asking = await asyncio.open_unix_connection(_ENGINE)
        try:
            asking.write(request)
            while data := await engine.read(65_536):
                if answer is not None:
                    answer.write(data)
                    await answer.drain()
        finally:
            asking.close()


@asynccontextmanager
async def engine_proxy(directory: Path) -> AsyncIterator[EngineProxy]:
    """A proxy for the length of the block."""
    proxy = EngineProxy(directory / "engine.sock")
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            await proxy.serve(reader, writer)
        serving.discard(task)

    server = await asyncio.start_unix_server(serve, proxy.socket, limit=_MOST_HEAD_BYTES)
    try:
        yield proxy
    finally:
        server.close()
        for task in serving:
            task.cancel()
        await asyncio.gather(*serving, return_exceptions=True)
