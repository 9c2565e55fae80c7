"""From a gRPC status to the words the interpreter turns into an exception."""

from typing import Any

import grpc
from google.protobuf.message import DecodeError
from rlm_proto.v1 import types_pb2

_DETAIL_KEY = "rlm-error-bin"

# For a status that carries no detail of ours, so the transport made it.
_REASON_BY_STATUS = {
    grpc.StatusCode.CANCELLED: "CANCELLED",
    grpc.StatusCode.DEADLINE_EXCEEDED: "DEADLINE_EXCEEDED",
    grpc.StatusCode.INVALID_ARGUMENT: "INVALID_REQUEST",
    grpc.StatusCode.OUT_OF_RANGE: "INVALID_REQUEST",
}


def is_back_pressure(error: grpc.aio.AioRpcError) -> bool:
    """Whether the transport, not the broker, turned the call away. It was not seen, so it can be repeated."""
    return error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED and _detail(error) is None


def describe(error: grpc.aio.AioRpcError) -> dict[str, Any]:
    """Reason, sentence and, for a budget, the amounts."""
    detail = _detail(error)
    if detail is None:
        reason = _REASON_BY_STATUS.get(error.code(), "INTERNAL")
        return {"reason": reason, "message": error.details() or error.code().name}
    described: dict[str, Any] = {
        "reason": _reason_name(int(detail.reason)),
        "message": detail.message or error.details() or "",
    }
    if detail.HasField("shortfall"):
        described["account"] = detail.shortfall.account
        described["wanted"] = _amounts(detail.shortfall.wanted)
        described["left"] = _amounts(detail.shortfall.left)
    return described


def _reason_name(number: int) -> str:
    # A host newer than this image may know more reasons.
    known = types_pb2.ErrorReason.DESCRIPTOR.values_by_number.get(number)
    return known.name.removeprefix("ERROR_REASON_") if known else "INTERNAL"


def _detail(error: grpc.aio.AioRpcError) -> types_pb2.ErrorDetail | None:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAIL_KEY and isinstance(value, bytes):
            try:
                return types_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None


def _amounts(amounts: types_pb2.Amounts) -> dict[str, int]:
    return {
        "tokens": amounts.tokens,
        "cost_microusd": amounts.cost_microusd,
        "calls": amounts.calls,
        "child_runs": amounts.child_runs,
    }
