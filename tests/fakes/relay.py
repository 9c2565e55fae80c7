"""A TCP relay between a client and a server, for connections that break where a test wants them to."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress


class Relay:
    """Passes bytes on until it is told not to."""

    def __init__(self, target: str) -> None:
        self.target = target
        """`HOST:PORT` of the server. Another one from the next connection on."""
        self._writers: set[asyncio.StreamWriter] = set()
        self.connections = 0
        """So many were made."""
        self.sent_bytes = 0
        """By clients, all connections together."""
        self.cut_up: list[int] = []
        """A connection each: cut when its client has sent so many bytes."""
        self.cut_down: list[int] = []
        """Likewise when its server has."""

    def cut(self) -> None:
        """Break what there is."""
        for writer in self._writers:
            writer.transport.abort()

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client."""
        self.connections += 1
        up = self.cut_up.pop(0) if self.cut_up else None
        down = self.cut_down.pop(0) if self.cut_down else None
        with suppress(OSError):
            its_reader, its_writer = await asyncio.open_connection(*self.target.rsplit(":", 1))
            ours = {writer, its_writer}
            self._writers |= ours
            try:
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._pass(reader, its_writer, ours, up, counted=True))
                    group.create_task(self._pass(its_reader, writer, ours, down))
            finally:
                self._writers -= ours
        writer.transport.abort()

    async def _pass(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        ours: set[asyncio.StreamWriter],
        most_bytes: int | None,
        *,
        counted: bool = False,
    ) -> None:
        passed = 0
        with suppress(OSError):
            while data := await reader.read(16_384):
                passed += len(data)
                self.sent_bytes += len(data) * counted
                writer.write(data)
                await writer.drain()
                if most_bytes is not None and passed >= most_bytes:
                    break
        for one in ours:
            one.transport.abort()


@asynccontextmanager
async def relayed(target: str) -> AsyncIterator[tuple[Relay, str]]:
    """A relay to `target`, and its address, for the length of the block."""
    relay = Relay(target)
    server = await asyncio.start_server(relay, "127.0.0.1", 0)
    try:
        yield relay, f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        relay.cut()
        await server.wait_closed()
