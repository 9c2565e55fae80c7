import time

import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import sandbox_pb2

from orchestrator.errors import GuestProtocolError
from orchestrator.limits import MAX_FIELDS_IN_MESSAGE, MAX_NESTED_MESSAGE_BYTES, MAX_PROMPT_BYTES
from orchestrator.rpc.shape import check_shape

CHILD = pb.StartChildRunRequest.DESCRIPTOR
COMPLETE = pb.CompleteRequest.DESCRIPTOR


def varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))


@pytest.mark.parametrize(
    "message",
    [
        pb.CompleteRequest(),
        pb.CompleteRequest(call_id="c", prompt=b"x" * MAX_PROMPT_BYTES, model="m", max_tokens=-1),
        pb.StartChildRunRequest(call_id="c", question=b"q" * 3_000_000, inline=b"x" * (1 << 20)),
        pb.StartChildRunRequest(paths=pb.ContextPaths(paths=[b"a/b.txt"] * 100_000)),
        pb.StartChildRunRequest(files=pb.ContextFiles(runs=range(200_000))),
        pb.GetBudgetResponse(tokens=1, deadline_s=1.5),
        sandbox_pb2.AttachRequest(answer=sandbox_pb2.AnswerChunk(cell_id=1, data=b"x" * 262_144)),
    ],
)
def test_what_our_library_sends_passes(message: pb.CompleteRequest) -> None:
    check_shape(message.SerializeToString(), message.DESCRIPTOR)


@pytest.mark.case("G09")
@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"\x0a\x00" * (MAX_FIELDS_IN_MESSAGE + 1), "fields"),
        (b"\x2a" + varint(MAX_NESTED_MESSAGE_BYTES + 1) + bytes(MAX_NESTED_MESSAGE_BYTES + 1), "too long"),
        (b"\x0b" * 10_000, "group"),
        (b"\x0a\x05abc", "cut off"),
        (b"\x0d\x00", "cut off"),
        (b"\x09" + bytes(7), "cut off"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "cut off"),
        (b"\x18" + b"\x80" * 20, "number"),
        (b"\x18\x80", "number"),
        (b"\xff" * 64, "number"),
        (b"\x0e\x00", "group"),
    ],
)
def test_what_nobody_honest_sends_is_refused_unparsed(data: bytes, why: str) -> None:
    with pytest.raises(GuestProtocolError, match=why):
        check_shape(data, CHILD)


@pytest.mark.case("G09")
def test_eight_megabytes_of_two_byte_fields_are_refused_in_no_time() -> None:
    data = b"\x0a\x00" * (4 << 20)
    began_s = time.perf_counter()
    with pytest.raises(GuestProtocolError):
        check_shape(data, COMPLETE)
    assert time.perf_counter() - began_s < 1


@given(st.binary(max_size=200))
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    try:
        check_shape(data, CHILD)
    except GuestProtocolError:
        return
    # What passes is at least framed as a message, so a parser's only quarrel can be with a field's content.
    try:
        pb.StartChildRunRequest.FromString(data)
    except DecodeError:
        return


@given(
    st.builds(
        pb.StartChildRunRequest,
        call_id=st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
        question=st.binary(max_size=200),
        inline=st.binary(max_size=200),
        max_tokens=st.integers(-(2**63), 2**63 - 1),
    )
)
def test_every_whole_message_passes_and_every_cut_of_it_is_decided(
    message: pb.StartChildRunRequest,
) -> None:
    data = message.SerializeToString()
    check_shape(data, CHILD)
    for end in range(len(data)):
        try:
            check_shape(data[:end], CHILD)
        except GuestProtocolError:
            continue
