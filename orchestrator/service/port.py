"""What the service can do for a caller, whatever way the caller came: gRPC or HTTP.

Every method takes the caller first, checks its role, and sees only its tenant's. Errors are ours
(`orchestrator.errors`); the shells translate them. Times are Unix seconds.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from orchestrator.budget import ZERO, Amounts
from orchestrator.ids import RunId
from orchestrator.store.books import ContextRow, Role, RunFilter, RunRow, TenantRow, Used


@dataclass(frozen=True, kw_only=True, slots=True)
class Caller:
    """Who asks."""

    tenant: TenantRow
    key_id: str
    role: Role


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A run that is asked for."""

    idempotency_key: str
    question: str
    context_id: str = ""
    text: bytes | None = None
    """Instead of a context that was uploaded. Its shell limits its length: 4 MB with gRPC, a prompt with
    `/v1/messages`."""
    options: Mapping[str, object] = field(default_factory=dict)
    """`RunOptions` of run.proto, by field name; only what was set."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Created:
    """A run, and whether it had been created before."""

    run: RunRow
    existed: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    """Where an upload stands."""

    context: ContextRow
    next_offset: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What the caller's tenant used and may use."""

    day: Used
    month: Used
    live_runs: int
    held: Amounts = ZERO
    """Of what was used: what live runs have drawn and was not billed yet."""


class Office(Protocol):
    """The service. See run.proto for what each method promises; the names are the same.

    Raises, all of them:
        NotAllowedError: The key's role, or the tenant's rules, don't allow it.
        NotFoundError: No such run, context or text of this tenant.
        InvalidRequestError: A value that makes no sense.
        ConflictError: What is there is in no state for that.
        CallIdReusedError: An idempotency key that was used for another request.
        BudgetExceededError: A quota is used up.
        UnavailableError: The server drains, or its database does not answer.
    """

    async def authenticate(self, key: str | None) -> Caller:
        """Who has this key.

        Raises:
            UnauthenticatedError: Nobody.
        """
        ...

    async def create_run(self, caller: Caller, question: Question) -> Created:
        """Queue a question."""
        ...

    async def continue_run(
        self, caller: Caller, run_id: str, question: Question, *, keep_namespace: bool
    ) -> Created:
        """Queue a further question on the context of an answered run."""
        ...

    async def get_run(self, caller: Caller, run_id: str) -> RunRow:
        """One run. While it runs, its amounts are those of now."""
        ...

    async def list_runs(
        self, caller: Caller, which: RunFilter, *, limit: int, before: tuple[float, RunId] | None = None
    ) -> Sequence[RunRow]:
        """Newest first."""
        ...

    def watch_run(self, caller: Caller, run_id: str, from_position: int) -> AsyncIterator[tuple[int, bytes]]:
        """Positions and events of the run's tree; ends behind the last of an ended run.

        An event is one JSON object without a line break (`Event.to_json`, UTF-8), made once for all watchers.
        """
        ...

    def read_text(self, caller: Caller, run_id: str, sha256: str) -> AsyncIterator[bytes]:
        """A long text that an event of the run's tree refers to; an empty hash is the answer."""
        ...

    async def cancel_run(self, caller: Caller, run_id: str) -> RunRow:
        """Begin to end it."""
        ...

    async def resume_run(self, caller: Caller, run_id: str) -> RunRow:
        """Go on with an interrupted one."""
        ...

    async def delete_run(self, caller: Caller, run_id: str) -> None:
        """Remove an ended one for good."""
        ...

    async def start_upload(self, caller: Caller, *, sha256: str, length_bytes: int, name: str) -> Upload:
        """Begin an upload or take it up."""
        ...

    async def write_upload(self, caller: Caller, context_id: str, offset: int, data: bytes) -> Upload:
        """Add bytes; with the last of them the context is complete. An upload's id is its context's."""
        ...

    async def list_contexts(
        self, caller: Caller, *, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ContextRow]:
        """Newest first."""
        ...

    async def delete_context(self, caller: Caller, context_id: str) -> None:
        """Remove one for good."""
        ...

    async def get_usage(self, caller: Caller) -> Usage:
        """Of the tenant's day and month."""
        ...
