"""Protobuf messages to values and back. Nothing here fails on what a server sends."""

from dataclasses import fields
from datetime import UTC, datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp
from rlm_proto.v1 import run_pb2, types_pb2

from orchestrator.budget import Amounts
from orchestrator.client.values import Context, Run, RunOptions, RunState, Usage

_STATES = {
    run_pb2.RUN_STATE_QUEUED: RunState.QUEUED,
    run_pb2.RUN_STATE_RUNNING: RunState.RUNNING,
    run_pb2.RUN_STATE_INTERRUPTED: RunState.INTERRUPTED,
    run_pb2.RUN_STATE_ENDED: RunState.ENDED,
}
_TO_WIRE = {state: number for number, state in _STATES.items()}
_EPOCH = datetime.fromtimestamp(0, UTC)


def options_to_wire(options: RunOptions) -> run_pb2.RunOptions:
    """Only what was given is set."""
    given = {item.name: getattr(options, item.name) for item in fields(options)}
    return run_pb2.RunOptions(**{name: value for name, value in given.items() if value is not None})


def options_from_wire(message: run_pb2.RunOptions) -> RunOptions:
    """What a server decided."""
    limits = (
        "max_tokens",
        "max_cost_microusd",
        "max_calls",
        "max_child_runs",
        "max_depth",
        "max_turns",
        "max_concurrency",
        "deadline_s",
        "cell_timeout_s",
    )
    given: Any = message  # its types know the fields by name only
    return RunOptions(
        model=message.model or None,
        sub_model=message.sub_model or None,
        allow_models=tuple(message.allow_models),
        runtime=message.runtime or None,
        dialect=message.dialect or None,
        memoise=message.memoise,
        **{name: getattr(message, name) for name in limits if given.HasField(name)},
    )


def state_to_wire(state: RunState) -> run_pb2.RunState.ValueType:
    """For a filter."""
    return _TO_WIRE[state]


def run_from_wire(message: run_pb2.Run) -> Run:
    """A state that this client does not know counts as running: it has not ended."""
    has_answer = message.answer_length_bytes or message.outcome == "answered"
    return Run(
        run_id=message.run_id,
        idempotency_key=message.idempotency_key,
        state=_STATES.get(message.state, RunState.RUNNING),
        outcome=message.outcome,
        error=message.error,
        # Cut at a byte, so its last character may be half there.
        answer=text_from_wire(message.answer) if has_answer else None,
        answer_length_bytes=message.answer_length_bytes,
        answer_is_whole=len(message.answer) == message.answer_length_bytes,
        question=text_from_wire(message.question),
        context_id=message.context_id,
        options=options_from_wire(message.options),
        created_at=time_from_wire(message.created_at),
        started_at=time_from_wire(message.started_at) if message.HasField("started_at") else None,
        ended_at=time_from_wire(message.ended_at) if message.HasField("ended_at") else None,
        confirmed=amounts_from_wire(message.confirmed),
        unconfirmed=amounts_from_wire(message.unconfirmed),
        resumed=message.resumed,
        next_position=message.next_position,
        continues=message.continues,
    )


def context_from_wire(message: run_pb2.Context) -> Context:
    """A context."""
    return Context(
        context_id=message.context_id,
        name=message.name,
        length_bytes=message.length_bytes,
        sha256=message.sha256,
        created_at=time_from_wire(message.created_at),
    )


def usage_from_wire(message: run_pb2.GetUsageResponse) -> Usage:
    """A tenant's usage."""
    return Usage(
        day=amounts_from_wire(message.day),
        month=amounts_from_wire(message.month),
        runs_day=message.runs_day,
        live_runs=message.live_runs,
        day_limit=_limited(message.day_limit),
        month_limit=_limited(message.month_limit),
        max_concurrent_runs=message.max_concurrent_runs or None,
        held=amounts_from_wire(message.held),
    )


def amounts_from_wire(message: types_pb2.Amounts) -> Amounts:
    """Amounts, zero where nothing was set."""
    return Amounts(message.tokens, message.cost_microusd, message.calls, message.child_runs)


def text_from_wire(data: bytes) -> str:
    """UTF-8, with replacement: what models and cells wrote need not be valid."""
    return data.decode("utf-8", "replace")


def time_to_wire(moment: datetime) -> Timestamp:
    """A moment with a time zone."""
    stamp = Timestamp()
    stamp.FromDatetime(moment.astimezone(UTC))
    return stamp


def _limited(message: types_pb2.Amounts) -> dict[str, int]:
    return {unit: amount for unit, amount in amounts_from_wire(message)._asdict().items() if amount}


def time_from_wire(stamp: Timestamp) -> datetime:
    """In UTC."""
    try:
        return stamp.ToDatetime(tzinfo=UTC)
    except (ValueError, OverflowError):
        # Beyond the years of Python's calendar. A clock that is so wrong is no reason to lose an answer.
        return _EPOCH
