"""Messages over a stream: four bytes of length, big-endian, and so many bytes of protobuf."""

import asyncio
import struct
from typing import Protocol

MAX_FRAME_BYTES = 256 * 1024 * 1024
"""Many times the largest conversation that a model's window holds. More is not a message of ours."""
BUFFER_BYTES = 1024 * 1024
"""What a reader takes in before it makes the other side wait. Large prompts come in few pieces then."""

_LENGTH = struct.Struct(">I")


class Message(Protocol):
    """What the generated classes have in common."""

    def SerializeToString(self) -> bytes: ...  # noqa: D102, N802 - protobuf's


def put(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a message without waiting for room."""
    payload = message.SerializeToString()
    writer.write(_LENGTH.pack(len(payload)) + payload)


async def send(writer: asyncio.StreamWriter, message: Message) -> None:
    """Send a message. The whole of it goes out in any case: cancelling ends only the wait for room.

    Raises:
        OSError: The other side is gone.
    """
    put(writer, message)
    await writer.drain()


async def receive(reader: asyncio.StreamReader) -> bytes | None:
    """The next message; None at the end of the stream, also when it comes in the middle of one.

    Raises:
        ValueError: It is no message of ours.
        OSError: The other side is gone.
    """
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > MAX_FRAME_BYTES:
            raise ValueError(f"a message of {length} bytes")
        return await reader.readexactly(length)
    except asyncio.IncompleteReadError:
        return None
