"""What a guest sends on its stream: bytes to messages, messages through the state machine; and frames.

Input: steps, each a byte and what follows. 0: the host starts a cell. 1: two bytes of length and a message.
2: like 1, but a frame between worker and interpreter.
"""

import struct
from collections.abc import Iterator

from google.protobuf.message import DecodeError
from rlm_proto.v1 import broker_pb2, sandbox_pb2

from orchestrator.cells import CellResult
from orchestrator.errors import GuestProtocolError
from orchestrator.limits import (
    MAX_ANSWER_BYTES,
    MAX_TRACEBACK_BYTES,
    MAX_VARIABLE_NAME_BYTES,
    MAX_VARIABLES,
    OUTPUT_HEAD_BYTES,
    OUTPUT_TAIL_BYTES,
)
from orchestrator.rpc.shape import check_shape
from orchestrator.sandbox.protocol import AttachProtocol
from sandbox_image.worker.frames import FrameDecoder, FrameError, encode

_CELL, _MESSAGE, _FRAMES = 0, 1, 2
_LENGTH = struct.Struct(">H")
_REPLACED = 3
"""A byte that is not UTF-8 becomes three."""


def one_input(data: bytes) -> None:
    """Nothing but a protocol error comes out, and no result passes a cap."""
    protocol = AttachProtocol()
    decoder = FrameDecoder()
    try:
        for step, body in _steps(data):
            if step == _CELL:
                protocol.cell_started()
            elif step == _MESSAGE:
                result = _message(protocol, body)
                if result is not None:
                    _check(result)
            else:
                for frame in decoder.feed(body):
                    assert FrameDecoder().feed(encode(frame)) is not None
    except (GuestProtocolError, FrameError, DecodeError):
        pass
    lost = protocol.sandbox_lost()
    assert protocol.sandbox_lost().output_bytes == 0, "a cell is lost once"
    _check(lost)


def _message(protocol: AttachProtocol, body: bytes) -> CellResult | None:
    for message in (sandbox_pb2.AttachRequest, broker_pb2.CompleteRequest, broker_pb2.StartChildRunRequest):
        try:
            check_shape(body, message.DESCRIPTOR)
            message.FromString(body)
        except (GuestProtocolError, DecodeError):
            continue
    check_shape(body, sandbox_pb2.AttachRequest.DESCRIPTOR)
    return protocol.received(sandbox_pb2.AttachRequest.FromString(body))


def _check(result: CellResult) -> None:
    assert len(result.output_head) + len(result.output_tail) <= OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES
    assert result.cut_bytes >= 0
    assert result.output_bytes >= result.cut_bytes
    assert len(result.traceback) <= MAX_TRACEBACK_BYTES
    assert len(result.answer or "") <= MAX_ANSWER_BYTES
    assert len(result.variables) <= MAX_VARIABLES
    assert all(len(name) <= MAX_VARIABLE_NAME_BYTES for name in result.variables)
    for text in (result.output, result.traceback, result.answer or "", *result.variables):
        text.encode()


def _steps(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at < len(data):
        step = data[at] % 3
        at += 1
        if step == _CELL:
            yield step, b""
            continue
        if at + _LENGTH.size > len(data):
            return
        (length,) = _LENGTH.unpack_from(data, at)
        at += _LENGTH.size
        yield step, data[at : at + length]
        at += length


def seeds() -> Iterator[bytes]:
    """Honest conversations."""
    pb = sandbox_pb2
    hello = pb.AttachRequest(hello=pb.Hello(protocol_version=1, hash_seed=7))
    output = pb.AttachRequest(output=pb.OutputChunk(cell_id=1, offset=0, data=b"out\n"))
    tail = pb.AttachRequest(output=pb.OutputChunk(cell_id=1, offset=9, data=b"tail"))
    answer = pb.AttachRequest(answer=pb.AnswerChunk(cell_id=1, data="größer".encode()))
    said = pb.Answer(length_bytes=8)
    ok = pb.CellEnded(cell_id=1, output_bytes=13, ok=pb.CellOk(), answer=said, variables=[b"x", b"y"])
    error = pb.CellEnded(cell_id=1, output_bytes=4, error=pb.CellError(traceback=b"Traceback\n"))
    killed = pb.NamespaceLost(cause=pb.NamespaceLost.CAUSE_KILLED, status=9)
    lost = pb.CellEnded(cell_id=1, namespace_lost=killed)
    last = pb.CellEnded(
        cell_id=1, output_bytes=2, ok=pb.CellOk(), last_output=pb.OutputChunk(cell_id=1, data=b"ab")
    )
    yield _said(hello, _CELL, output, tail, answer, pb.AttachRequest(cell_ended=ok), _CELL)
    yield _said(hello, _CELL, output, pb.AttachRequest(cell_ended=error))
    yield _said(hello, _CELL, pb.AttachRequest(cell_ended=lost))
    yield _said(hello, _CELL, pb.AttachRequest(cell_ended=last))
    yield _said(hello, hello)
    complete = broker_pb2.CompleteRequest(call_id="c", prompt=b"p").SerializeToString()
    yield bytes([_MESSAGE]) + _LENGTH.pack(len(complete)) + complete
    frame = struct.pack("!IQ", 14, 3) + b'{"kind": "x"}\n' + b"abc"
    yield bytes([_FRAMES]) + _LENGTH.pack(len(frame)) + frame


def _said(*said: sandbox_pb2.AttachRequest | int) -> bytes:
    parts = []
    for one in said:
        if isinstance(one, int):
            parts.append(bytes([one]))
        else:
            body = one.SerializeToString()
            parts.append(bytes([_MESSAGE]) + _LENGTH.pack(len(body)) + body)
    return b"".join(parts)
