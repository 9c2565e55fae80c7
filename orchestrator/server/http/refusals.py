"""The one table between our errors and HTTP, and the one shape in which they are told.

The shape is that of the Messages API, for all resources: `{"type": "error", "error": {"type", "message"}}`.
What another tenant has and what nobody has give the same bytes: neither id nor kind is repeated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from starlette.responses import JSONResponse

from orchestrator import errors

_MAX_MESSAGE_BYTES = 500
OVERLOADED = 529
"""What the Messages API says where others say 503; its clients wait and try again."""
_UNAVAILABLE = 503
_RETRY_AFTER_S = "2"


@dataclass(frozen=True, slots=True)
class Refusal:
    """How an error is told."""

    status: int
    kind: str


_INVALID = Refusal(400, "invalid_request_error")
_CONFLICT = Refusal(409, "conflict_error")
_OURS = Refusal(500, "api_error")
_LATER = Refusal(_UNAVAILABLE, "overloaded_error")
_TOO_LATE = Refusal(504, "timeout_error")

BY_ERROR: Mapping[type[errors.OrchestratorError], Refusal] = {
    errors.CallerError: _INVALID,
    errors.InvalidRequestError: _INVALID,
    errors.ContextInputError: _INVALID,
    errors.ModelNotAllowedError: Refusal(403, "permission_error"),
    errors.BudgetExceededError: Refusal(429, "rate_limit_error"),
    errors.DepthExceededError: _INVALID,
    errors.NotExecutingError: _CONFLICT,
    errors.CallIdReusedError: _CONFLICT,
    errors.UnauthenticatedError: Refusal(401, "authentication_error"),
    errors.NotAllowedError: Refusal(403, "permission_error"),
    errors.NotFoundError: Refusal(404, "not_found_error"),
    errors.ConflictError: _CONFLICT,
    errors.HashMismatchError: Refusal(422, "invalid_request_error"),
    errors.RunOverError: _OURS,
    errors.RunCancelledError: _OURS,
    errors.DeadlineExceededError: _TOO_LATE,
    errors.ChildRunFailedError: _OURS,
    errors.ReplayError: _OURS,
    errors.ModelError: _OURS,
    errors.SandboxError: _OURS,
    errors.SandboxStartError: _OURS,
    errors.SandboxBusyError: _LATER,
    errors.SandboxLostError: _OURS,
    errors.GuestProtocolError: _OURS,
    errors.MachineError: _OURS,
    errors.EngineError: _OURS,
    errors.ImageMissingError: _OURS,
    errors.KeyMissingError: _OURS,
    errors.ProviderUnreachableError: _OURS,
    errors.StoreError: _LATER,
    errors.TakenOverError: _LATER,
    errors.UnavailableError: _LATER,
    errors.ServerError: _OURS,
    errors.InvariantError: _OURS,
}


class RequestRefusedError(Exception):
    """What HTTP itself is refused for, before anything of ours is asked.

    Attributes:
        refusal: How it is told.
        may_retry: Whether a library should send the same again by itself.
    """

    def __init__(self, status: int, kind: str, message: str, *, may_retry: bool = True) -> None:
        super().__init__(message)
        self.refusal = Refusal(status, kind)
        self.may_retry = may_retry


def too_large(max_bytes: int) -> RequestRefusedError:
    """A body that is longer than its route takes."""
    return RequestRefusedError(413, "request_too_large", f"the body is longer than {max_bytes:,} bytes")


NO_RUN = "there is no such run, context or text"


def told(error: Exception, *, absent: str = NO_RUN) -> tuple[Refusal, str]:
    """How an error is told, and its sentence. What is not the caller's business is our own failure.

    Args:
        error: What was raised.
        absent: The sentence about what is not there, or another's: its own might tell the two apart.
    """
    if isinstance(error, RequestRefusedError):
        return error.refusal, _short(str(error))
    if isinstance(error, TimeoutError):
        return _TOO_LATE, "the service did not answer in time"
    if not isinstance(error, errors.OrchestratorError):
        return _OURS, "the service failed"
    refusal = BY_ERROR[type(error)]
    if isinstance(error, errors.NotFoundError):
        return refusal, absent
    if refusal is _OURS:
        # Its sentence is for the operator's log.
        return refusal, "the service failed"
    if refusal is _LATER:
        return refusal, "the service cannot take this now; try again"
    return refusal, _short(str(error))


def _short(sentence: str) -> str:
    return sentence.encode("utf-8", "replace")[:_MAX_MESSAGE_BYTES].decode("utf-8", "ignore")


def body_of(refusal: Refusal, message: str) -> dict[str, object]:
    """The JSON of a refusal."""
    return {"type": "error", "error": {"type": refusal.kind, "message": message}}


def refused(
    error: Exception,
    *,
    unavailable: int = _UNAVAILABLE,
    headers: Mapping[str, str] | None = None,
    absent: str = NO_RUN,
) -> JSONResponse:
    """The response that tells an error."""
    refusal, message = told(error, absent=absent)
    extra = dict(headers or {})
    if refusal is _LATER:
        extra["retry-after"] = _RETRY_AFTER_S
    # A day's quota does not come back in the seconds after which a client would try again.
    if isinstance(error, errors.BudgetExceededError) or not getattr(error, "may_retry", True):
        extra["x-should-retry"] = "false"
    if refusal.status == 401:
        extra["www-authenticate"] = "Bearer"
    status = unavailable if refusal.status == _UNAVAILABLE else refusal.status
    return JSONResponse(body_of(refusal, message), status, headers=extra)
