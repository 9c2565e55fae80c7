"""What a client of the service gives and gets: plain values, without protobuf or gRPC."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from orchestrator.budget import ZERO, Amounts
from orchestrator.store.books import Role, TenantRules


class RunState(StrEnum):
    """Where a run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    """Its server ended under it. It goes on when a server is back."""
    ENDED = "ended"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """How a question is to be answered. What is None is left to the tenant's defaults.

    The fields are those of `RunOptions` in run.proto.
    """

    model: str | None = None
    sub_model: str | None = None
    """Of sub-calls and child runs; None for `model`."""
    allow_models: Sequence[str] = ()
    """Models that cells may name besides, each `MODEL` or `NAME=MODEL`."""
    runtime: str | None = None
    """`runc` or `runsc`."""
    dialect: str | None = None
    """`tools` or `fences`."""
    memoise: bool = False
    """Ask identical sub-calls once and pay them once."""
    max_tokens: int | None = None
    max_cost_microusd: int | None = None
    max_calls: int | None = None
    max_child_runs: int | None = None
    max_depth: int | None = None
    max_turns: int | None = None
    max_concurrency: int | None = None
    deadline_s: float | None = None
    cell_timeout_s: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What is known of a root run. Text in it was written by models and cells: hostile to a terminal."""

    run_id: str
    idempotency_key: str
    state: RunState
    outcome: str
    """How it ended (docs/events.md); empty before."""
    error: str
    """Why there is no answer; empty otherwise."""
    answer: str | None
    """Its first 64 kB, in a list the first 200 bytes. `Client.read_answer` gives the whole."""
    answer_length_bytes: int
    """Of the whole."""
    answer_is_whole: bool
    question: str
    """Its first 4 kB, in a list the first 200 bytes."""
    context_id: str
    """Empty when the context was deleted."""
    options: RunOptions
    """As decided: with the tenant's defaults and maxima in it."""
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    confirmed: Amounts
    """What it and its children were billed."""
    unconfirmed: Amounts
    """What may have been billed besides."""
    resumed: int
    """How often."""
    next_position: int
    """The position after its last event."""
    continues: str
    """The run whose context it asks about further; empty for none."""

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.state is RunState.ENDED


@dataclass(frozen=True, kw_only=True, slots=True)
class Created:
    """A run, and whether the idempotency key had made it before."""

    run: Run
    existed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Context:
    """What questions can be asked about."""

    context_id: str
    name: str
    length_bytes: int
    """As uploaded."""
    sha256: str
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Uploaded:
    """A context that is there now."""

    context_id: str
    name: str
    length_bytes: int
    sha256: str
    existed: bool
    """It was there already, and no byte was sent."""
    notes: Sequence[str] = ()
    """What was left out of a directory, one sentence each."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What the caller's tenant used and may use, by UTC days and months."""

    day: Amounts = ZERO
    month: Amounts = ZERO
    runs_day: int = 0
    live_runs: int = 0
    """Queued and running."""
    day_limit: Mapping[str, int] = field(default_factory=dict)
    """By unit; what is not limited is not in it."""
    month_limit: Mapping[str, int] = field(default_factory=dict)
    max_concurrent_runs: int | None = None
    held: Amounts = ZERO
    """What calls in flight may cost at most."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """Who pays, and who is isolated from whom."""

    tenant_id: str
    name: str
    rules: TenantRules
    created_at: datetime


@dataclass(frozen=True, kw_only=True, slots=True)
class Key:
    """An API key of a tenant, without the key."""

    key_id: str
    tenant_id: str
    role: Role
    hint: str
    """Its last four characters, to tell it from others."""
    created_at: datetime
    revoked_at: datetime | None


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedKey:
    """A key that was just made."""

    key: Key
    api_key: str = field(repr=False)
    """The key itself, this once: it is stored as a hash."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedTenant:
    """A tenant that was just made, and its first key, of the role admin."""

    tenant: Tenant
    first: AddedKey


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What became of a question."""

    text: str | None
    """The whole answer; None when there is none, and `run` says why."""
    run: Run
    notes: Sequence[str] = ()
    """About the context: what was left out."""
