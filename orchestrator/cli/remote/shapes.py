"""The objects of `--json` for what a server keeps (docs/client.md). Keys may be added, never renamed.

Times are UTC, in the form of RFC 3339; costs stand in micro-dollars, as in events.
"""

from dataclasses import asdict
from datetime import UTC, datetime

from orchestrator.budget import Amounts
from orchestrator.client import Context, Run, Uploaded, Usage


def run_object(run: Run) -> dict[str, object]:
    """A run without its answer."""
    options = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(run.options).items()
        if value not in (None, (), False)
    }
    return {
        "run_id": run.run_id,
        "state": run.state.value,
        "outcome": run.outcome or None,
        "error": run.error or None,
        "question": run.question,
        "context_id": run.context_id or None,
        "answer_length_bytes": run.answer_length_bytes if run.answer is not None else None,
        "options": options,
        "created_at": moment(run.created_at),
        "started_at": moment(run.started_at),
        "ended_at": moment(run.ended_at),
        "confirmed": amounts(run.confirmed),
        "unconfirmed": amounts(run.unconfirmed),
        "resumed": run.resumed,
        "next_position": run.next_position,
        "idempotency_key": run.idempotency_key,
        "continues": run.continues or None,
    }


def context_object(context: Context) -> dict[str, object]:
    """A context."""
    return {
        "context_id": context.context_id,
        "name": context.name,
        "length_bytes": context.length_bytes,
        "sha256": context.sha256,
        "created_at": moment(context.created_at),
    }


def uploaded_object(uploaded: Uploaded) -> dict[str, object]:
    """A context that was just sent."""
    return asdict(uploaded) | {"notes": list(uploaded.notes)}


def usage_object(usage: Usage) -> dict[str, object]:
    """A tenant's usage."""
    return {
        "day": amounts(usage.day),
        "month": amounts(usage.month),
        "runs_day": usage.runs_day,
        "live_runs": usage.live_runs,
        "day_limit": dict(usage.day_limit),
        "month_limit": dict(usage.month_limit),
        "max_concurrent_runs": usage.max_concurrent_runs,
        "held": amounts(usage.held),
    }


def amounts(value: Amounts) -> dict[str, int]:
    """By unit."""
    return value._asdict()


def moment(value: datetime | None) -> str | None:
    """To the millisecond."""
    if value is None:
        return None
    return value.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
