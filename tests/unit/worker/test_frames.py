"""Framing: pure, and robust against a hostile other side."""

import itertools
import struct

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from sandbox_image.worker import frames
from sandbox_image.worker.frames import Frame, FrameDecoder, FrameError

HEADERS = st.dictionaries(st.text(), st.none() | st.integers() | st.text() | st.lists(st.text()))
FRAMES = st.lists(st.builds(Frame, HEADERS, st.binary(max_size=300)))
SIZES = st.lists(st.integers(1, 500), min_size=1)


@given(sent=FRAMES, sizes=SIZES)
@example(sent=[Frame({"kind": "é"}, b"payload"), Frame({}, b"")], sizes=[1])
def test_frames_survive_any_cut_of_the_stream(sent: list[Frame], sizes: list[int]) -> None:
    stream = b"".join(map(frames.encode, sent))
    decoder = FrameDecoder()
    received: list[Frame] = []
    for size in itertools.cycle(sizes):
        received += decoder.feed(stream[:size])
        stream = stream[size:]
        if not stream:
            break
    assert received == sent


@pytest.mark.parametrize(
    "stream",
    [
        struct.pack("!IQ", frames.MAX_HEADER_BYTES + 1, 0),
        struct.pack("!IQ", 2, frames.MAX_PAYLOAD_BYTES + 1),
        struct.pack("!IQ", 2, 0) + b"[]",
        struct.pack("!IQ", 2, 0) + b"\xff{",
        struct.pack("!IQ", 5, 0) + b"{'a'}",
        struct.pack("!IQ", 100_000, 0) + b"[" * 100_000,
    ],
)
def test_what_is_no_frame_is_refused(stream: bytes) -> None:
    with pytest.raises(FrameError):
        FrameDecoder().feed(stream)


def test_a_frame_over_its_cap_is_not_sent() -> None:
    with pytest.raises(FrameError):
        frames.encode_head({}, frames.MAX_PAYLOAD_BYTES + 1)


@given(st.binary(max_size=100))
def test_any_bytes_give_frames_or_a_frame_error(stream: bytes) -> None:
    try:
        decoded = FrameDecoder().feed(stream)
    except FrameError:
        return
    assert all(isinstance(frame, Frame) for frame in decoded)
