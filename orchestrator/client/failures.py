"""A status of the wire, and the detail beside it, as one of our errors again; and whether waiting helps.

The server's way is `orchestrator.rpc.status`. It sends an `ErrorDetail` with every failure of its own, so a
status without one comes from the transport: a connection that broke, a server that ended, a proxy.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from rlm_proto.v1 import types_pb2

from orchestrator import errors
from orchestrator.budget import Amounts
from orchestrator.client.messages import amounts_from_wire
from orchestrator.errors import BudgetExceededError, OrchestratorError
from orchestrator.rpc.status import DETAIL_KEY

_Code = grpc.StatusCode
_MAX_QUOTED_CHARS = 300

_BY_CODE: dict[grpc.StatusCode, type[OrchestratorError]] = {
    _Code.INVALID_ARGUMENT: errors.InvalidRequestError,
    _Code.UNAUTHENTICATED: errors.UnauthenticatedError,
    _Code.PERMISSION_DENIED: errors.NotAllowedError,
    _Code.NOT_FOUND: errors.NotFoundError,
    _Code.ALREADY_EXISTS: errors.CallIdReusedError,
    _Code.FAILED_PRECONDITION: errors.ConflictError,
    _Code.OUT_OF_RANGE: errors.ContextInputError,
    _Code.DATA_LOSS: errors.HashMismatchError,
    _Code.UNAVAILABLE: errors.UnavailableError,
    _Code.DEADLINE_EXCEEDED: errors.DeadlineExceededError,
    _Code.CANCELLED: errors.RunCancelledError,
}
"""Of failures that the server told of. What is not here is `ServerError`."""

_OF_THE_TRANSPORT = {
    _Code.UNAVAILABLE,
    _Code.DEADLINE_EXCEEDED,
    _Code.CANCELLED,
    # Back-pressure, as types.proto says.
    _Code.RESOURCE_EXHAUSTED,
    # A stream that was reset under way; our own INTERNAL has a detail.
    _Code.INTERNAL,
}
"""Without a detail, the same call may go well in a moment."""


@dataclass(frozen=True, slots=True)
class Failure:
    """Why a call failed."""

    error: OrchestratorError
    passes: bool
    """Whether the same call may go well later."""
    is_own_deadline: bool = False
    """The client's own deadline for the call passed; the server may be well."""


def failure_of(error: grpc.aio.AioRpcError, address: str) -> Failure:
    """What a failed call means for its caller.

    Args:
        error: As gRPC raised it.
        address: Who was called, for the sentence.
    """
    code, said = error.code(), error.details() or ""
    detail = _detail(error.trailing_metadata())
    if detail is None:
        return _of_transport(code, said, address)
    message = detail.message or said or f"the server refused: {code.name}"
    if code is _Code.RESOURCE_EXHAUSTED:
        return Failure(_too_little(detail, message), passes=False)
    kind = _BY_CODE.get(code, errors.ServerError)
    if detail.reason == types_pb2.ERROR_REASON_MODEL_NOT_ALLOWED:
        kind = errors.ModelNotAllowedError
    return Failure(kind(message), passes=code is _Code.UNAVAILABLE)


def _of_transport(code: grpc.StatusCode, said: str, address: str) -> Failure:
    why = said[:_MAX_QUOTED_CHARS] or code.name
    if "connection refused" in said.lower():
        why = "connection refused"
    if code is _Code.UNAVAILABLE and "handshake failed" in said.lower():
        # Time changes no certificate.
        return Failure(errors.ServerError(f"no TLS with {address}: {why}"), passes=False)
    if code is _Code.UNIMPLEMENTED:
        return Failure(
            errors.ServerError(
                f"{address} does not know this call: it is no `rlm serve`, an older one, or does not offer it"
            ),
            passes=False,
        )
    if code in _OF_THE_TRANSPORT:
        return Failure(
            errors.UnavailableError(f"{address} does not answer: {why}"),
            passes=True,
            is_own_deadline=code is _Code.DEADLINE_EXCEEDED,
        )
    kind = _BY_CODE.get(code, errors.ServerError)
    return Failure(kind(f"{address} refused: {why}"), passes=False)


def _too_little(detail: types_pb2.ErrorDetail, message: str) -> BudgetExceededError:
    shortfall = detail.shortfall
    error = BudgetExceededError(
        shortfall.account or "tenant", _by_unit(shortfall.wanted), _by_unit(shortfall.left)
    )
    # The server's sentence: it knows units that the detail has no field for.
    error.args = (message,)
    return error


def _by_unit(amounts: types_pb2.Amounts) -> dict[str, int]:
    return dict(Amounts._asdict(amounts_from_wire(amounts)))


def _detail(metadata: Iterable[tuple[str, Any]] | None) -> types_pb2.ErrorDetail | None:
    for key, value in metadata or ():
        if key == DETAIL_KEY and isinstance(value, bytes):
            try:
                return types_pb2.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None
