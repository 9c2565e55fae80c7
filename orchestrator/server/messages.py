"""Between the service's rows and run.proto's messages. Pure."""

import base64
import binascii
import math
from collections.abc import Mapping, Sequence
from typing import Any

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import types_pb2

from orchestrator.budget import Amounts
from orchestrator.errors import InvalidRequestError
from orchestrator.service.port import Upload, Usage
from orchestrator.store.books import ContextRow, Quota, RunFilter, RunRow, RunState, TenantRules

ANSWER_BYTES = 64 * 1024
QUESTION_BYTES = 4 * 1024
LISTED_BYTES = 200
DEFAULT_PAGE = 50
MAX_PAGE = 200
_MAX_TOKEN_CHARS = 200

_STATE: Mapping[RunState, "pb.RunState.ValueType"] = {
    RunState.QUEUED: pb.RUN_STATE_QUEUED,
    RunState.RUNNING: pb.RUN_STATE_RUNNING,
    RunState.INTERRUPTED: pb.RUN_STATE_INTERRUPTED,
    RunState.ENDED: pb.RUN_STATE_ENDED,
}
_STATE_OF = {value: state for state, value in _STATE.items()}


# --- To the client -------------------------------------------------------------------------------------


def run(row: RunRow, *, is_listed: bool = False) -> pb.Run:
    """A run; in a list with the first bytes of its texts only."""
    answer = row.answer or b""
    message = pb.Run(
        run_id=row.run_id,
        idempotency_key=row.idempotency_key,
        state=_STATE[row.state],
        outcome=row.outcome,
        error=row.error,
        answer=answer[: LISTED_BYTES if is_listed else ANSWER_BYTES],
        answer_length_bytes=max(row.answer_length_bytes, len(answer)),
        question=row.question.encode("utf-8", "replace")[: LISTED_BYTES if is_listed else QUESTION_BYTES],
        context_id=row.context_id,
        options=pb.RunOptions(**dict[str, Any](row.options)),
        created_at=_timestamp(row.created_at),
        confirmed=_amounts(row.confirmed),
        unconfirmed=_amounts(row.unconfirmed),
        resumed=row.resumed,
        next_position=row.last_position + 1,
        continues=row.continues or "",
    )
    if row.started_at is not None:
        message.started_at.CopyFrom(_timestamp(row.started_at))
    if row.ended_at is not None:
        message.ended_at.CopyFrom(_timestamp(row.ended_at))
    return message


def context(row: ContextRow) -> pb.Context:
    """A context."""
    return pb.Context(
        context_id=row.context_id,
        name=row.name,
        length_bytes=row.length_bytes,
        sha256=row.sha256,
        created_at=_timestamp(row.created_at),
    )


def started(upload: Upload) -> pb.StartUploadResponse:
    """Where an upload stands that was begun or taken up."""
    row = upload.context
    return pb.StartUploadResponse(
        upload_id=row.context_id,
        next_offset=upload.next_offset,
        context_id=row.context_id if row.is_complete else "",
    )


def uploaded(upload: Upload) -> pb.UploadResponse:
    """What came of the parts."""
    if upload.context.is_complete:
        return pb.UploadResponse(context=context(upload.context), next_offset=upload.next_offset)
    return pb.UploadResponse(next_offset=upload.next_offset)


def usage(used: Usage, rules: TenantRules) -> pb.GetUsageResponse:
    """What a tenant used and may use."""
    return pb.GetUsageResponse(
        day=_amounts(used.day.amounts),
        month=_amounts(used.month.amounts),
        runs_day=used.day.runs,
        live_runs=used.live_runs,
        day_limit=_quota(rules.per_day),
        month_limit=_quota(rules.per_month),
        max_concurrent_runs=rules.max_concurrent_runs,
        held=_amounts(used.held),
    )


def page_token(last: tuple[float, str]) -> str:
    """Where the next page begins. It says what its reader has seen, and opens nothing."""
    at, row_id = last
    return base64.urlsafe_b64encode(f"{at!r} {row_id}".encode()).decode()


# --- From the client -----------------------------------------------------------------------------------


def options_of(message: pb.RunOptions) -> dict[str, object]:
    """What was set, by field name."""
    return {field.name: list(value) if field.is_repeated else value for field, value in message.ListFields()}


def filter_of(request: pb.ListRunsRequest) -> RunFilter:
    """Which runs to list.

    Raises:
        InvalidRequestError: A state that is none.
    """
    if any(state not in _STATE_OF for state in request.states):
        raise InvalidRequestError("there is no such state of a run")
    return RunFilter(
        states=frozenset(_STATE_OF[state] for state in request.states),
        outcomes=frozenset(request.outcomes),
        created_from=_time(request, "created_from"),
        created_before=_time(request, "created_before"),
    )


def page_of(size: int, token: str) -> tuple[int, tuple[float, str] | None]:
    """How many rows to list, and behind which.

    Raises:
        InvalidRequestError: The size is out of range, or the token is none of ours.
    """
    if not 0 <= size <= MAX_PAGE:
        raise InvalidRequestError(f"page_size must be from 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}")
    if not token:
        return size or DEFAULT_PAGE, None
    try:
        at, row_id = (
            base64.urlsafe_b64decode(token[:_MAX_TOKEN_CHARS].encode("ascii")).decode("ascii").split(" ")
        )
        position = float(at), row_id
    except (ValueError, binascii.Error) as error:
        raise InvalidRequestError("page_token is none of this server's") from error
    if not math.isfinite(position[0]) or not row_id.isalnum():
        raise InvalidRequestError("page_token is none of this server's")
    return size or DEFAULT_PAGE, position


def text_of(data: bytes, what: str) -> str:
    """A client's text.

    Raises:
        InvalidRequestError: It is no UTF-8.
    """
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{what} is no UTF-8") from error


# --- Inside --------------------------------------------------------------------------------------------


def _amounts(amounts: Amounts) -> types_pb2.Amounts:
    return types_pb2.Amounts(**amounts._asdict())


def _quota(quota: Quota) -> types_pb2.Amounts:
    return types_pb2.Amounts(tokens=quota.max_tokens or 0, cost_microusd=quota.max_cost_microusd or 0)


def _timestamp(unix_s: float) -> Timestamp:
    stamp = Timestamp()
    stamp.FromMicroseconds(round(unix_s * 1_000_000))
    return stamp


def _time(request: Message, field: str) -> float | None:
    if not request.HasField(field):
        return None
    stamp: Timestamp = getattr(request, field)
    return stamp.seconds + stamp.nanos / 1e9


def last_of(rows: Sequence[RunRow] | Sequence[ContextRow], limit: int) -> str:
    """The token for the page behind these rows; empty when there is none."""
    if len(rows) < limit:
        return ""
    row = rows[-1]
    return page_token((row.created_at, row.run_id if isinstance(row, RunRow) else row.context_id))
