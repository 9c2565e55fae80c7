"""Frames: how the worker and the interpreter talk over a socket pair.

    4 bytes          8 bytes           header length     payload length
    header length    payload length    JSON object       raw bytes

Text travels as payload, not inside the JSON, so a prompt of 100 kB costs a copy and no escaping. There is no
pickle: either side may be run by hostile code. Both sides import this module; it does no I/O.
"""

import json
import struct
from collections.abc import Mapping
from typing import Any, NamedTuple

_PREFIX = struct.Struct("!IQ")

# A header may list the 100,000 paths of a child run's context.
MAX_HEADER_BYTES = 16 * 1024 * 1024

# The largest payload is a child run's answer. Uploads travel in parts.
MAX_PAYLOAD_BYTES = 256 * 1024 * 1024

_encode_json = json.JSONEncoder(separators=(",", ":")).encode
_decode_json = json.JSONDecoder().raw_decode


class FrameError(Exception):
    """The other side broke the framing. Nothing it says from here on can be read."""


class Frame(NamedTuple):
    """One message."""

    header: Mapping[str, Any]
    payload: bytes = b""


def encode_head(header: Mapping[str, Any], payload_bytes: int) -> bytes:
    """Everything of a frame but its payload, which need not be copied to be sent.

    Raises:
        FrameError: The header or the payload is over its cap.
    """
    encoded = _encode_json(header).encode("ascii")
    _check_caps(len(encoded), payload_bytes)
    return _PREFIX.pack(len(encoded), payload_bytes) + encoded


def encode(frame: Frame) -> bytes:
    """A whole frame as bytes.

    Raises:
        FrameError: The header or the payload is over its cap.
    """
    return encode_head(frame.header, len(frame.payload)) + frame.payload


class FrameDecoder:
    """Turns a stream of bytes, cut anywhere, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """Take the next bytes, give the frames they complete.

        Raises:
            FrameError: A length is over its cap, or a header is not a JSON object. The decoder is then
            useless.
        """
        frames: list[Frame] = []
        if not self._buffer:
            # Most often a read brings whole frames: those need not pass through the buffer.
            self._buffer += data[_take_frames(data, frames) :]
            return frames
        self._buffer += data
        with memoryview(self._buffer) as view:
            taken = _take_frames(view, frames)
        del self._buffer[:taken]
        return frames


def _take_frames(data: bytes | memoryview, frames: list[Frame]) -> int:
    """Append the frames that are whole; gives the length of those."""
    start = 0
    while len(data) - start >= _PREFIX.size:
        header_bytes, payload_bytes = _PREFIX.unpack_from(data, start)
        _check_caps(header_bytes, payload_bytes)
        header_start = start + _PREFIX.size
        payload_start = header_start + header_bytes
        end = payload_start + payload_bytes
        if len(data) < end:
            break
        header = _parse_header(bytes(data[header_start:payload_start]))
        frames.append(Frame(header, bytes(data[payload_start:end])))
        start = end
    return start


def _check_caps(header_bytes: int, payload_bytes: int) -> None:
    if header_bytes > MAX_HEADER_BYTES:
        raise FrameError(f"a header of {header_bytes} bytes; the cap is {MAX_HEADER_BYTES}")
    if payload_bytes > MAX_PAYLOAD_BYTES:
        raise FrameError(f"a payload of {payload_bytes} bytes; the cap is {MAX_PAYLOAD_BYTES}")


def _parse_header(encoded: bytes) -> dict[str, Any]:
    try:
        text = encoded.decode("ascii")
        header, end = _decode_json(text)
    except (ValueError, RecursionError) as error:
        raise FrameError("a header that is not JSON") from error
    if not isinstance(header, dict) or end != len(text):
        raise FrameError("a header that is not a JSON object")
    return header
