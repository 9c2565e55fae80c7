"""The one table between our errors and the wire.

A guest sees a status code, a reason from a closed list and one short sentence; never a traceback, a path, a
header or another library's words.
"""

from collections.abc import Mapping

import grpc
from rlm_proto.v1 import types_pb2

from orchestrator import errors

DETAIL_KEY = "rlm-error-bin"
"""Trailing metadata with a serialised `ErrorDetail`."""
_MAX_MESSAGE_BYTES = 500

_Code = grpc.StatusCode

BY_ERROR: dict[type[errors.OrchestratorError], tuple[grpc.StatusCode, "types_pb2.ErrorReason.ValueType"]] = {
    errors.CallerError: (_Code.INVALID_ARGUMENT, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.InvalidRequestError: (_Code.INVALID_ARGUMENT, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.ContextInputError: (_Code.OUT_OF_RANGE, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.ModelNotAllowedError: (_Code.PERMISSION_DENIED, types_pb2.ERROR_REASON_MODEL_NOT_ALLOWED),
    errors.BudgetExceededError: (_Code.RESOURCE_EXHAUSTED, types_pb2.ERROR_REASON_BUDGET_EXCEEDED),
    errors.DepthExceededError: (_Code.FAILED_PRECONDITION, types_pb2.ERROR_REASON_DEPTH_EXCEEDED),
    errors.NotExecutingError: (_Code.FAILED_PRECONDITION, types_pb2.ERROR_REASON_NOT_EXECUTING),
    errors.CallIdReusedError: (_Code.ALREADY_EXISTS, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.UnauthenticatedError: (_Code.UNAUTHENTICATED, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.NotAllowedError: (_Code.PERMISSION_DENIED, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.NotFoundError: (_Code.NOT_FOUND, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.ConflictError: (_Code.FAILED_PRECONDITION, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.HashMismatchError: (_Code.DATA_LOSS, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.RunOverError: (_Code.CANCELLED, types_pb2.ERROR_REASON_CANCELLED),
    errors.RunCancelledError: (_Code.CANCELLED, types_pb2.ERROR_REASON_CANCELLED),
    errors.DeadlineExceededError: (_Code.DEADLINE_EXCEEDED, types_pb2.ERROR_REASON_DEADLINE_EXCEEDED),
    errors.ChildRunFailedError: (_Code.ABORTED, types_pb2.ERROR_REASON_CHILD_RUN_FAILED),
    errors.ModelError: (_Code.UNAVAILABLE, types_pb2.ERROR_REASON_MODEL_FAILED),
    errors.ReplayError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.SandboxError: (_Code.ABORTED, types_pb2.ERROR_REASON_CHILD_RUN_FAILED),
    errors.SandboxStartError: (_Code.ABORTED, types_pb2.ERROR_REASON_CHILD_RUN_FAILED),
    errors.SandboxBusyError: (_Code.ABORTED, types_pb2.ERROR_REASON_CHILD_RUN_FAILED),
    errors.SandboxLostError: (_Code.ABORTED, types_pb2.ERROR_REASON_CHILD_RUN_FAILED),
    errors.GuestProtocolError: (_Code.INVALID_ARGUMENT, types_pb2.ERROR_REASON_INVALID_REQUEST),
    errors.MachineError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.EngineError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.ImageMissingError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.KeyMissingError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.ProviderUnreachableError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.StoreError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.TakenOverError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.UnavailableError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.ServerError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
    errors.InvariantError: (_Code.INTERNAL, types_pb2.ERROR_REASON_INTERNAL),
}


def to_wire(error: errors.OrchestratorError) -> tuple[grpc.StatusCode, types_pb2.ErrorDetail]:
    """The status and detail a guest gets for an error."""
    code, reason = BY_ERROR[type(error)]
    if code is grpc.StatusCode.INTERNAL:
        # Its sentence is for the operator's log, not for a guest.
        return code, types_pb2.ErrorDetail(reason=reason, message="the orchestrator failed")
    message = str(error).encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore")
    detail = types_pb2.ErrorDetail(reason=reason, message=message)
    if isinstance(error, errors.BudgetExceededError):
        detail.shortfall.account = error.account
        detail.shortfall.wanted.CopyFrom(_amounts(error.wanted))
        detail.shortfall.left.CopyFrom(_amounts(error.left))
    return code, detail


def _amounts(amounts: Mapping[str, int]) -> types_pb2.Amounts:
    """The units that the wire knows; the sentence names the others (bytes and files of an upload)."""
    known = types_pb2.Amounts.DESCRIPTOR.fields_by_name
    return types_pb2.Amounts(**{unit: amount for unit, amount in amounts.items() if unit in known})
