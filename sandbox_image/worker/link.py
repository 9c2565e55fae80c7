"""The worker's end of a socket to the interpreter, on the event loop."""

import asyncio
import socket
from collections.abc import Callable, Mapping
from typing import Any, Self, cast

from sandbox_image.worker.frames import Frame, FrameDecoder, encode_head

# Below this, joining head and payload is cheaper than a second system call.
_JOIN_BYTES = 4096

# One read takes no more. The loop's own way allocates four times this anew for each.
_RECEIVE_BYTES = 65_536


class FrameLink(asyncio.BufferedProtocol):
    """Sends frames, and hands each one that arrives to `on_frame`, from within the loop's read callback.

    Nothing that arrives is trusted: cells can write to the other end. An exception from `on_frame`, or bytes
    that are no frames, close the link and call `on_broken`.
    """

    def __init__(self, on_frame: Callable[[Frame], None], on_broken: Callable[[], None]) -> None:
        self._on_frame = on_frame
        self._on_broken = on_broken
        self._decoder = FrameDecoder()
        self._received = memoryview(bytearray(_RECEIVE_BYTES))
        self._transport: asyncio.Transport | None = None
        self._paused = False
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done once everything the other side sent has been read and it is gone."""

    @classmethod
    async def open(
        cls, sock: socket.socket, on_frame: Callable[[Frame], None], on_broken: Callable[[], None]
    ) -> Self:
        """Put a connected socket on the running loop."""
        loop = asyncio.get_running_loop()
        _, link = await loop.create_unix_connection(lambda: cls(on_frame, on_broken), sock=sock)
        return link

    def send(self, header: Mapping[str, Any], payload: bytes = b"") -> None:
        """Send one frame, or nothing when the other side is gone.

        Never blocks. What the other side does not read is buffered, so a sender of many frames waits for
        replies in between.
        """
        if self._transport is None or self._transport.is_closing():
            return
        head = encode_head(header, len(payload))
        if len(payload) < _JOIN_BYTES:
            self._transport.write(head + payload)
        else:
            self._transport.write(head)
            self._transport.write(payload)

    def pause(self, paused: bool) -> None:
        """Stop, or go on, reading; what the other side writes then waits in the kernel."""
        if self._transport is None or paused == self._paused or self._transport.is_closing():
            return
        self._paused = paused
        if paused:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()

    def close(self) -> None:
        """Close the socket. `lost` is done soon after."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Called by the loop."""
        self._transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Called by the loop."""
        return self._received

    def buffer_updated(self, nbytes: int) -> None:
        """Called by the loop."""
        try:
            for frame in self._decoder.feed(self._received[:nbytes]):
                self._on_frame(frame)
        except Exception:
            self.close()
            self._on_broken()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called by the loop."""
        if not self.lost.done():
            self.lost.set_result(None)
