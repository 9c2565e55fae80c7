"""What JSON says and is answered: the forms of requests and replies, and how rows become replies.

The names and meanings are those of run.proto. Times are RFC 3339 in UTC, text is text, and what is not set is
null or empty. A field that nobody knows is refused, so that a misspelt limit is not a missing one.
"""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field

from orchestrator.budget import Amounts
from orchestrator.limits import MAX_INLINE_TEXT_BYTES
from orchestrator.service.port import Caller, Created, Upload, Usage
from orchestrator.store.books import ContextRow, Quota, Role, RunRow, RunState

_SHOWN_ANSWER_BYTES = 64 * 1024
_SHOWN_QUESTION_BYTES = 4 * 1024
_LISTED_BYTES = 200
"""Of answers and questions in a list."""
MAX_PAGE = 200
DEFAULT_PAGE = 50


def _at_most_4_mb(text: str | None) -> str | None:
    if text is not None and len(text.encode("utf-8", "replace")) > MAX_INLINE_TEXT_BYTES:
        raise ValueError(f"longer than {MAX_INLINE_TEXT_BYTES:,} bytes; upload it as a context")
    return text


class _Asked(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Given(BaseModel):
    model_config = ConfigDict(frozen=True)


# --- Requests ------------------------------------------------------------------------------------------


class OptionsForm(_Asked):
    """How a question is to be answered. What is not set is the tenant's default."""

    model: str | None = Field(default=None, description="Of the root run.")
    sub_model: str | None = Field(
        default=None, description="Of sub-calls and child runs; by default `model`."
    )
    allow_models: list[str] | None = Field(
        default=None,
        max_length=20,
        description="Models that cells may name besides, each `MODEL` or `NAME=MODEL`.",
    )
    runtime: Literal["runc", "runsc"] | None = Field(
        default=None, description="By default what the tenant must have."
    )
    dialect: Literal["tools", "fences"] | None = Field(default=None, description="How models ask for cells.")
    memoise: bool | None = Field(default=None, description="Identical sub-calls are asked and paid once.")
    max_tokens: int | None = Field(default=None, ge=1, description="Of the run tree, input and output.")
    max_cost_microusd: int | None = Field(default=None, ge=0, description="Millionths of a US dollar.")
    max_calls: int | None = Field(default=None, ge=1, description="Attempts at a provider.")
    max_child_runs: int | None = Field(default=None, ge=0, description="Child runs.")
    max_depth: int | None = Field(default=None, ge=0, description="Edges from the root run.")
    max_turns: int | None = Field(default=None, ge=1, description="Turns of each run.")
    max_concurrency: int | None = Field(default=None, ge=1, description="Provider calls in flight at once.")
    deadline_s: float | None = Field(default=None, gt=0, description="Seconds from the run's start.")
    cell_timeout_s: float | None = Field(default=None, gt=0, description="Seconds of guest time of one cell.")

    def chosen(self) -> dict[str, object]:
        """Only what was set."""
        return self.model_dump(exclude_none=True)


class CreateRunForm(_Asked):
    """One question."""

    idempotency_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="Chosen by the client; a repeat with the same request returns the first one's run. The"
        " header `Idempotency-Key` says the same. Without either each request makes a run.",
    )
    question: str = Field(min_length=1, description="At most 1 MB.")
    context_id: str | None = Field(
        default=None,
        pattern="^[A-Za-z0-9_-]{1,64}$",
        description="A context that was uploaded; or `text`.",
    )
    text: Annotated[str | None, AfterValidator(_at_most_4_mb)] = Field(
        default=None, description="The context itself, at most 4 MB; or `context_id`."
    )
    options: OptionsForm = OptionsForm()


class ContinueRunForm(_Asked):
    """A further question on the context of a run that was answered."""

    idempotency_key: str | None = Field(
        default=None,
        min_length=1,
        max_length=100,
        description="As for a new run; the header will do as well.",
    )
    question: str = Field(min_length=1, description="At most 1 MB.")
    keep_namespace: bool = Field(default=False, description="Run that run's cells again first.")
    options: OptionsForm = OptionsForm()


class StartUploadForm(_Asked):
    """What will come."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$", description="Of all of it, lower-case hex.")
    length_bytes: int = Field(ge=0, description="Of all of it.")
    name: str = Field(
        min_length=1,
        max_length=255,
        description="A file name. A zip or tar archive is taken as the files in it, all else as one text.",
    )


# What a query says is text, so these convert.


class _Queried(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ListRunsQuery(_Queried):
    """Filters and paging."""

    state: list[RunState] = Field(default=[], description="Only runs in one of these states.")
    outcome: list[str] = Field(default=[], description="Only runs with one of these outcomes.")
    created_from: AwareDatetime | None = Field(
        default=None, description="Only runs created at or after this; RFC 3339, with its zone."
    )
    created_before: AwareDatetime | None = Field(
        default=None, description="Only runs created before this; likewise."
    )
    page_size: int = Field(default=DEFAULT_PAGE, ge=1, le=MAX_PAGE)
    page_token: str | None = Field(default=None, description="From the page before.")


class PageQuery(_Queried):
    """Paging."""

    page_size: int = Field(default=DEFAULT_PAGE, ge=1, le=MAX_PAGE)
    page_token: str | None = Field(default=None, description="From the page before.")


class WatchQuery(_Queried):
    """From where."""

    from_: int | None = Field(
        default=None,
        alias="from",
        ge=0,
        description="The first position to send; 0 by default. The header `Last-Event-ID` wins over it.",
    )


class UploadQuery(_Queried):
    """Where the body belongs."""

    offset: int = Field(ge=0, description="Bytes before it.")


class NoQuery(_Queried):
    """Nothing is asked in the query."""


# --- Replies -------------------------------------------------------------------------------------------


class AmountsReply(_Given):
    """What can be limited."""

    tokens: int
    cost_microusd: int
    calls: int
    child_runs: int

    @classmethod
    def of(cls, amounts: Amounts) -> "AmountsReply":
        """From our own."""
        return cls(**amounts._asdict())


class RunReply(_Given):
    """What is known of a root run."""

    run_id: str
    idempotency_key: str
    state: RunState
    outcome: str = Field(description="How it ended, see docs/events.md; empty before.")
    error: str = Field(description="Why there is no answer; empty otherwise.")
    answer: str | None = Field(description="Its first 64 kB; `/answer` has the whole. In a list 200 bytes.")
    answer_length_bytes: int
    question: str = Field(description="Its first 4 kB; in a list 200 bytes.")
    context_id: str = Field(description="Empty when the context was deleted.")
    options: dict[str, object] = Field(description="As they were decided, the tenant's defaults included.")
    created_at: str
    started_at: str | None
    ended_at: str | None
    confirmed: AmountsReply = Field(description="What the run tree was billed.")
    unconfirmed: AmountsReply = Field(description="What may have been billed besides.")
    resumed: int = Field(description="How often it was resumed.")
    next_position: int = Field(description="Behind its last event.")
    continues: str = Field(description="The run that it continues; empty for none.")

    @classmethod
    def of(cls, row: RunRow, *, listed: bool = False) -> "RunReply":
        """From a row; in a list texts are shorter."""
        answer = row.answer or b""
        return cls(
            run_id=row.run_id,
            idempotency_key=row.idempotency_key,
            state=row.state,
            outcome=row.outcome,
            error=row.error,
            answer=None
            if row.answer is None
            else _cut(answer, _LISTED_BYTES if listed else _SHOWN_ANSWER_BYTES),
            answer_length_bytes=max(row.answer_length_bytes, len(answer)),
            question=_cut(
                row.question.encode("utf-8", "replace"), _LISTED_BYTES if listed else _SHOWN_QUESTION_BYTES
            ),
            context_id=row.context_id,
            options=dict(row.options),
            created_at=time_of(row.created_at),
            started_at=_time_or_none(row.started_at),
            ended_at=_time_or_none(row.ended_at),
            confirmed=AmountsReply.of(row.confirmed),
            unconfirmed=AmountsReply.of(row.unconfirmed),
            resumed=row.resumed,
            next_position=row.last_position + 1,
            continues=row.continues or "",
        )


class CreatedReply(_Given):
    """A run as it was stored."""

    run: RunReply
    existed: bool = Field(description="It had been created before, under the same key.")

    @classmethod
    def of(cls, created: Created) -> "CreatedReply":
        """From our own."""
        return cls(run=RunReply.of(created.run), existed=created.existed)


class RunsReply(_Given):
    """A page of runs, newest first."""

    runs: Sequence[RunReply]
    next_page_token: str = Field(description="Empty after the last.")


class ContextReply(_Given):
    """What questions can be asked about."""

    context_id: str
    name: str
    length_bytes: int
    sha256: str
    created_at: str

    @classmethod
    def of(cls, row: ContextRow) -> "ContextReply":
        """From a row."""
        return cls(
            context_id=row.context_id,
            name=row.name,
            length_bytes=row.length_bytes,
            sha256=row.sha256,
            created_at=time_of(row.created_at),
        )


class ContextsReply(_Given):
    """A page of contexts, newest first."""

    contexts: Sequence[ContextReply]
    next_page_token: str = Field(description="Empty after the last.")


class UploadReply(_Given):
    """Where an upload stands."""

    upload_id: str
    next_offset: int = Field(description="So many bytes are there.")
    context: ContextReply | None = Field(description="Set when all of it is there.")

    @classmethod
    def of(cls, upload: Upload) -> "UploadReply":
        """From our own."""
        row = upload.context
        return cls(
            upload_id=row.context_id,
            next_offset=upload.next_offset,
            context=ContextReply.of(row) if row.is_complete else None,
        )


class LimitReply(_Given):
    """What a day or a month may have; null is no limit."""

    tokens: int | None
    cost_microusd: int | None
    runs: int | None

    @classmethod
    def of(cls, quota: Quota) -> "LimitReply":
        """From our own."""
        return cls(tokens=quota.max_tokens, cost_microusd=quota.max_cost_microusd, runs=quota.max_runs)


class UsageReply(_Given):
    """What was used in this day and month (UTC), what live runs have drawn included, and what may be."""

    day: AmountsReply
    month: AmountsReply
    runs_day: int
    runs_month: int
    live_runs: int = Field(description="Queued or running.")
    held: AmountsReply = Field(description="What live runs have drawn of it and was not billed yet.")
    day_limit: LimitReply
    month_limit: LimitReply
    max_concurrent_runs: int
    role: Role = Field(description="Of the key that asks.")

    @classmethod
    def of(cls, caller: Caller, usage: Usage) -> "UsageReply":
        """From our own."""
        rules = caller.tenant.rules
        return cls(
            day=AmountsReply.of(usage.day.amounts),
            month=AmountsReply.of(usage.month.amounts),
            runs_day=usage.day.runs,
            runs_month=usage.month.runs,
            live_runs=usage.live_runs,
            held=AmountsReply.of(usage.held),
            day_limit=LimitReply.of(rules.per_day),
            month_limit=LimitReply.of(rules.per_month),
            max_concurrent_runs=rules.max_concurrent_runs,
            role=caller.role,
        )


class FaultReply(_Given):
    """What went wrong."""

    type: str = Field(description="A word for programs, such as `not_found_error`.")
    message: str = Field(description="A sentence for people.")


class ErrorReply(_Given):
    """The one form of all errors."""

    type: Literal["error"]
    error: FaultReply


class StateReply(_Given):
    """Whether the server is alive, or ready."""

    status: str
    because: list[str] = []
    """What keeps it from being ready, a sentence each."""


def time_of(at: float) -> str:
    """RFC 3339, in UTC."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _time_or_none(at: float | None) -> str | None:
    return None if at is None else time_of(at)


def _cut(text: bytes, max_bytes: int) -> str:
    if len(text) <= max_bytes:
        return text.decode("utf-8", "replace")
    # A character that the cut falls into is left out.
    return text[:max_bytes].decode("utf-8", "ignore")


def query_values(pairs: Sequence[tuple[str, str]], lists: frozenset[str]) -> Mapping[str, object]:
    """A query as its form wants it: what may come several times as lists.

    A name that comes twice and may not keeps its last value, as everywhere on the web.
    """
    single: dict[str, object] = {name: value for name, value in pairs if name not in lists}
    listed: dict[str, list[str]] = {}
    for name, value in pairs:
        if name in lists:
            listed.setdefault(name, []).append(value)
    return single | listed
