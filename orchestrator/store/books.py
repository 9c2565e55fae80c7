"""What a service keeps in its database besides events: tenants, keys, runs, contexts, quotas, an audit log.

Rules that every implementation keeps:

1. Whatever is written is durable when the call returns, or the call raises `StoreError` and nothing was
   written. A store that does not answer raises it too.
2. Whoever asks for one tenant's rows gives its id, and finds nothing of any other's. What is another's and
   what is not there are the same: None.
3. What is deleted is gone from the database; what it cost, and that it was deleted, stays.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from orchestrator.budget import ZERO, Amounts
from orchestrator.fair_rooms import Answer, Claim, Room
from orchestrator.ids import RunId, TenantId
from orchestrator.store.port import RunStore
from orchestrator.trajectory import Event

LISTED_TEXT_BYTES = 4_096
"""Of a question and of an answer in a list."""
MAX_UNFINISHED_UPLOADS = 1_000
"""Of one tenant: each is a row and a file, however short it says it is."""
ANSWER_HEAD_BYTES = 64 * 1024
"""Of an answer, where one run is looked at: clients look often, and an answer may have megabytes."""


class Role(StrEnum):
    """What an API key may do. Each may do what those before it may."""

    READ = "read"
    """See runs, events, contexts and usage."""
    RUN = "run"
    """Create, cancel, resume and continue runs; upload contexts."""
    ADMIN = "admin"
    """Delete, and manage the tenant's keys."""


OPERATOR_KEY_PREFIX = "rlmop_"
"""Of keys that are no tenant's, so that one is known for what it is wherever it turns up."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Quota:
    """What a tenant may use in a day or a month (UTC). None is no limit."""

    max_tokens: int | None = None
    max_cost_microusd: int | None = None
    max_runs: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRules:
    """What a tenant may do. The defaults limit nothing but what one server has to offer."""

    per_day: Quota = field(default_factory=Quota)
    per_month: Quota = field(default_factory=Quota)
    max_concurrent_runs: int = 10
    """Root runs that run at once; others wait."""
    max_concurrent_sandboxes: int | None = None
    """Sandboxes at once over all servers, with the chains that its runs have reserved; what needs more waits.
    None for all that a server has."""
    max_queued_runs: int = 1_000
    """Root runs that may wait; one more is refused."""
    models: Sequence[str] = ()
    """Patterns of models it may name, as in RLM_MODELS_ALLOWED; empty for all that the server allows."""
    runtimes: Sequence[str] = ()
    """`runc`, `runsc`; empty for both."""
    max_limits: Mapping[str, float] = field(default_factory=dict)
    """By the names of `RunLimits`: no run gets more. Where it is less than a default it is the default."""
    max_context_bytes: int = 64 * 1024**3
    """All contexts that it keeps, together."""
    retention_days: int | None = None
    """Ended runs and unused contexts are deleted so long after; None for never."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRow:
    """A tenant."""

    tenant_id: TenantId
    name: str
    """Unique among those not removed. For people; never part of a path."""
    rules: TenantRules
    created_at: float
    """Unix time in seconds, like all times here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeyRow:
    """An API key, without the key."""

    key_id: str
    tenant_id: TenantId
    role: Role
    hint: str
    """Its last four characters, to tell it from others."""
    created_at: float
    revoked_at: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class OperatorKeyRow:
    """A key of the installation, without the key: it manages tenants, and is none's."""

    key_id: str
    hint: str
    """Its last four characters, to tell it from others."""
    created_at: float
    revoked_at: float | None


class RunState(StrEnum):
    """Where a root run stands."""

    QUEUED = "queued"
    RUNNING = "running"
    INTERRUPTED = "interrupted"
    ENDED = "ended"


class Wish(StrEnum):
    """What the server of a run's home is to do about it: what any server was asked, stored before the asker
    is told, until it is done. A later wish replaces an earlier one; nothing replaces `CANCEL`.
    """

    NONE = ""
    START = "start"
    """It was created on another server: queue it."""
    RESUME = "resume"
    """Go on with it, if it is still interrupted."""
    CANCEL = "cancel"
    """End it as cancelled, if it has not ended; then forget it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunHead:
    """What tells a run from others, and how it stands."""

    run_id: RunId
    tenant_id: TenantId
    state: RunState
    wish: Wish


@dataclass(frozen=True, kw_only=True, slots=True)
class TakenOver:
    """The runs of a server that is away, in the hands of another."""

    epoch: int
    """Under which the other may write to them, until their own server is back."""
    runs: Sequence[RunHead]
    """Interrupted ones, to be settled, or to be ended where that is wished."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRow:
    """A root run as the service keeps it. Everything about what happened in it is in its events."""

    run_id: RunId
    tenant_id: TenantId
    idempotency_key: str
    request_hash: str
    """Of what was asked for under that key."""
    question: str
    context_id: str
    """Empty when the context was deleted."""
    options: Mapping[str, object]
    """`RunOptions` of run.proto, as decided, by field name."""
    state: RunState
    created_at: float
    started_at: float | None = None
    ended_at: float | None = None
    outcome: str = ""
    error: str = ""
    answer: bytes | None = None
    """UTF-8. What comes from a store is its head (`ANSWER_HEAD_BYTES`), in lists a shorter one, like the
    question's; `RunBook.answer` has the rest."""
    answer_length_bytes: int = 0
    """Of the whole answer."""
    confirmed: Amounts = ZERO
    unconfirmed: Amounts = ZERO
    resumed: int = 0
    continues: RunId | None = None
    keeps_namespace: bool = False
    home: str = ""
    """The state directory, by its id, whose server runs it and nobody else: contexts are files there."""
    last_position: int = -1
    """Of its tree's last event; -1 before the first."""
    wish: Wish = Wish.NONE


@dataclass(frozen=True, kw_only=True, slots=True)
class ContextRow:
    """A context that was uploaded whole, or one that is being uploaded."""

    context_id: str
    tenant_id: TenantId
    name: str
    sha256: str
    length_bytes: int
    """Of all of it."""
    home: str
    created_at: float
    is_complete: bool
    is_inline: bool = False
    """Came with a question, and goes with the last run that needs it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DoomedContext:
    """A context that was deleted, whose file is still on its home's disk."""

    context_id: str
    tenant_id: TenantId
    name: str


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditRow:
    """Who did what."""

    at: float
    tenant_id: TenantId | None
    actor: str
    """`key:ID`, or `operator` for a command on the server's machine."""
    action: str
    """The method's name, `CreateRun`."""
    target: str
    """An id, never text of a user's."""
    detail: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Used:
    """What a tenant used in a window of time."""

    amounts: Amounts = ZERO
    """Confirmed and unconfirmed, and what run trees have drawn and not given back."""
    runs: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFilter:
    """Which runs to list."""

    states: frozenset[RunState] = frozenset()
    """Empty for all."""
    outcomes: frozenset[str] = frozenset()
    created_from: float | None = None
    created_before: float | None = None


class TenantBook(Protocol):
    """Tenants and their keys.

    With `by` a change writes its row of the audit log in the same transaction: neither is there without the
    other. Without it there is no row.
    """

    async def add_tenant(self, name: str, rules: TenantRules, *, by: str | None = None) -> TenantRow:
        """A new tenant.

        Raises:
            InvalidRequestError: The name is taken, or is none.
        """
        ...

    async def add_tenant_with_key(
        self, name: str, rules: TenantRules, role: Role, *, by: str | None = None
    ) -> tuple[TenantRow, KeyRow, str]:
        """Likewise, with its first key: both or neither. See `add_key`."""
        ...

    async def tenants(self, *, after: str = "", limit: int | None = None) -> Sequence[TenantRow]:
        """Those that were not removed, by name: those behind a name, and no more than so many."""
        ...

    async def tenant(self, name_or_id: str) -> TenantRow | None:
        """One of them."""
        ...

    async def removed(self, tenant_ids: Collection[TenantId]) -> frozenset[TenantId]:
        """Which of these are not there, or not any more."""
        ...

    async def set_rules(self, tenant_id: TenantId, rules: TenantRules) -> None:
        """Give it other rules; they count from the next request on."""
        ...

    async def change_rules(
        self, tenant_id: TenantId, change: Callable[[TenantRules], TenantRules], *, by: str | None = None
    ) -> TenantRow:
        """Likewise, from those that it has at that moment: two changes at once are both there afterwards.

        Raises:
            NotFoundError: There is no such tenant.
        """
        ...

    async def remove_tenant(self, tenant_id: TenantId, *, by: str | None = None) -> None:
        """Remove a tenant, its keys, runs, events and contexts. Its ledger stays."""
        ...

    async def add_key(self, tenant_id: TenantId, role: Role, *, by: str | None = None) -> tuple[KeyRow, str]:
        """A new key, and what is told once: the key itself, `rlm_` and 40 characters. Stored as a hash."""
        ...

    async def keys(self, tenant_id: TenantId) -> Sequence[KeyRow]:
        """All of a tenant's, revoked ones too, oldest first."""
        ...

    async def revoke_key(self, tenant_id: TenantId, key_id: str, *, by: str | None = None) -> bool:
        """From now on it is unknown. False when the tenant has no such key."""
        ...

    async def who_has(self, key: str) -> tuple[TenantRow, KeyRow] | None:
        """Whose key it is; None when it is unknown, revoked, or its tenant was removed."""
        ...

    async def opening(self, key_ids: Collection[str]) -> frozenset[str]:
        """Those of these keys that open something now: not revoked, and their tenants not removed."""
        ...


class OperatorBook(Protocol):
    """Keys of the installation. No tenant's key is ever among them, and none of them among a tenant's.

    `by` as in `TenantBook`.
    """

    async def add_key(self, *, by: str | None = None) -> tuple[OperatorKeyRow, str]:
        """A new key, and what is told once: `OPERATOR_KEY_PREFIX` and 40 characters. Stored as a hash."""
        ...

    async def keys(self) -> Sequence[OperatorKeyRow]:
        """All, revoked ones too, oldest first."""
        ...

    async def revoke_key(self, key_id: str, *, by: str | None = None) -> bool:
        """From now on it is unknown. False when there is no such key."""
        ...

    async def who_has(self, key: str) -> OperatorKeyRow | None:
        """Which one it is; None when it is unknown or revoked."""
        ...


class RunBook(Protocol):
    """Root runs. Their events are `RunStore`'s."""

    async def create(
        self,
        row: RunRow,
        *,
        max_queued: int,
        quotas: Sequence[tuple[str, Quota]],
        audit: AuditRow | None = None,
    ) -> RunRow:
        """Store a queued run and count it against the tenant's quotas of runs, or return the one that was
        stored under its idempotency key.

        Args:
            row: The run.
            max_queued: Of the tenant's, over all servers.
            quotas: The windows that now fall into, `day:2026-11-23` and `month:2026-11`, with their limits.
            audit: Stored with it; not with a repeat.

        Raises:
            CallIdReusedError: The idempotency key was used for another request.
            BudgetExceededError: A quota of runs, or of waiting runs, is used up.
            NotFoundError: The tenant or its context was removed meanwhile.
        """
        ...

    async def run(self, tenant_id: TenantId, run_id: RunId) -> RunRow | None:
        """One run of the tenant's."""
        ...

    async def answer(self, tenant_id: TenantId, run_id: RunId, *, start: int, max_bytes: int) -> bytes | None:
        """A part of its answer, empty behind its end; None when there is no answer, or no such run."""
        ...

    async def runs(
        self, tenant_id: TenantId, which: RunFilter, *, limit: int, before: tuple[float, RunId] | None = None
    ) -> Sequence[RunRow]:
        """Newest first, those behind `before` in that order, with no more than the head of their texts
        (`LISTED_TEXT_BYTES`): a page of whole answers could be gigabytes.
        """
        ...

    async def head(self, tenant_id: TenantId, run_id: RunId) -> RunRow | None:
        """One run, with no more of its texts than `runs` has."""
        ...

    async def cancel(
        self, tenant_id: TenantId, run_id: RunId, *, at: float, error: str, audit: AuditRow
    ) -> RunState | None:
        """Store the wish that it ends as cancelled. One that never began has ended when this returns.

        Nothing is written, the audit entry neither, when it has ended or that is wished already. How it stood
        before; None when there is no such run.
        """
        ...

    async def resume(self, tenant_id: TenantId, run_id: RunId, *, audit: AuditRow) -> bool:
        """Store the wish that it goes on; False when it is not interrupted, or is to be cancelled."""
        ...

    async def wished(self, home: str) -> Sequence[RunHead]:
        """Runs of this home about which something is wished, oldest first. Nearly always none."""
        ...

    async def granted(self, run_id: RunId, wish: Wish) -> None:
        """It was done: forget it, unless something else is wished by now."""
        ...

    async def count_live(self, tenant_id: TenantId) -> Mapping[RunState, int]:
        """How many of the tenant's have not ended, by state, over all servers."""
        ...

    async def started(
        self, run_id: RunId, *, at: float, resumed: bool, max_concurrent: int, epoch: int = 0
    ) -> bool:
        """It is running, and its tree is written under this epoch; False, and nothing written, when so many
        of its tenant's run already, over all servers, or when it has ended or is to be cancelled.

        Args:
            run_id: Queued or interrupted, or running when its server was killed.
            at: The run's first start keeps its time.
            resumed: Count it.
            max_concurrent: Of the tenant's, this one included.
            epoch: Of its home, as `HomeBook.enter` gave it; 0 where no server ever entered.

        Raises:
            TakenOverError: The home has another epoch by now.
        """
        ...

    async def interrupted(self, run_id: RunId, *, epoch: int = 0) -> None:
        """Its server ends and leaves it to the next. Nothing happens under an epoch that is over."""
        ...

    async def ended(
        self,
        run_id: RunId,
        *,
        at: float,
        outcome: str,
        error: str,
        answer: bytes | None,
        confirmed: Amounts,
        unconfirmed: Amounts,
        epoch: int = 0,
    ) -> None:
        """It is over, and nothing is wished about it any more. Stored before anybody is told.

        Raises:
            InvariantError: There is no such run.
            TakenOverError: It is another epoch's by now.
        """
        ...

    async def delete(self, tenant_id: TenantId, run_id: RunId, *, audit: AuditRow | None = None) -> bool:
        """Remove an ended run with its events and texts, and the context that came with it, unless others
        need that: it is doomed then, see `ContextBook.doomed`. False when there is none that has ended.
        """
        ...

    async def expired(self, tenant_id: TenantId, *, before: float, limit: int) -> Sequence[RunId]:
        """Runs that ended before."""
        ...


class ContextBook(Protocol):
    """Contexts that were uploaded. Their bytes are files of the server's state directory."""

    async def begin(self, row: ContextRow, *, max_bytes: int) -> ContextRow:
        """Store one that is about to come, or return the tenant's with the same hash, length, name and home.

        Raises:
            BudgetExceededError: The tenant's contexts would be larger than `max_bytes`, uploads counted whole
                from their beginning; or too many of its uploads are unfinished.
        """
        ...

    async def complete(self, tenant_id: TenantId, context_id: str) -> None:
        """All of it is there."""
        ...

    async def context(self, tenant_id: TenantId, context_id: str) -> ContextRow | None:
        """One of the tenant's, complete or not."""
        ...

    async def contexts(
        self, tenant_id: TenantId, *, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ContextRow]:
        """Complete ones, newest first; those that came with a question are left out."""
        ...

    async def delete(self, tenant_id: TenantId, context_id: str, *, audit: AuditRow | None = None) -> bool:
        """Remove it; False when there is none. Ended runs about it are left without one. Its file is doomed.

        Raises:
            ConflictError: A run that has not ended needs it.
        """
        ...

    async def unused(
        self,
        tenant_id: TenantId,
        *,
        inline_before: float,
        unfinished_before: float,
        others_before: float | None,
        limit: int,
    ) -> Sequence[ContextRow]:
        """Those that no stored run refers to: such as came with a question and are older than
        `inline_before`, uploads begun before `unfinished_before` that are not complete, and whatever is older
        than `others_before` (None: nothing else).
        """
        ...

    async def all_of(self, home: str) -> Sequence[ContextRow]:
        """Every tenant's on this state directory: files without a row may be removed."""
        ...

    async def doomed(self, home: str) -> Sequence[DoomedContext]:
        """Contexts that were deleted, by any server, and whose files this home is to remove."""
        ...

    async def buried(self, context_ids: Sequence[str]) -> None:
        """Their files are gone."""
        ...


class HomeBook(Protocol):
    """The state directories that have runs and contexts, and whether their servers are there.

    A server enters, and is heard of for as long as its lease, which it extends again and again. By the
    database's clock. Each enter, and each take-over by another server, begins a new epoch of the home. What
    a server does for a run it does under an epoch, and the transaction that stores it fails when that is
    over. So there is one at a time who can write to a run tree, whoever else believes to be.
    """

    async def knows(self, home: str) -> bool:
        """Whether it was ever entered here, or has contexts here."""
        ...

    async def enter(self, home: str, *, lease_s: float) -> int:
        """A server is there; the epoch that begins with it. Whoever was before is so no more, and has no room
        (`RoomBook`).
        """
        ...

    async def beat(self, home: str, epoch: int, *, lease_s: float) -> bool:
        """It is still there; whether any other server is.

        Raises:
            TakenOverError: The epoch is over. It has to enter again.
        """
        ...

    async def is_there(self, home: str) -> bool:
        """Whether its server is heard of."""
        ...

    async def claim(self, home: str, epoch: int) -> Sequence[RunHead]:
        """All runs of the home that have not ended, oldest first, to be gone on with under this epoch. None
        of them runs.

        Raises:
            TakenOverError: The epoch is over.
        """
        ...

    async def lost(self, *, by: str) -> Sequence[str]:
        """Homes whose servers are away and where something is to be settled, which no other server does."""
        ...

    async def take_over(self, home: str, *, by: str, audit: AuditRow) -> TakenOver | None:
        """Take what is to be settled from a server that is away; None when it is back, or another is quicker.

        From then on none of its runs runs, whatever it believes, and it has no room for sandboxes.
        """
        ...

    async def settled(self, home: str, epoch: int) -> None:
        """That is done. Nothing happens when the epoch is over."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TenantRooms:
    """A tenant's, at all servers."""

    most: int | None
    """Sandboxes that it may have at once, as its rules say now; None for no limit."""
    rooms: Mapping[str, Room]
    """By home."""


class RoomBook(Protocol):
    """How many sandboxes of a tenant each server may have, of tenants that have a limit. See `fair_rooms`."""

    async def claim(self, tenant_id: TenantId, home: str, epoch: int, claim: Claim) -> Answer | None:
        """Claim a server's room anew, by the rules that the tenant has now; None when these have no limit.

        In one transaction that nobody else's claim for the tenant overlaps.

        Raises:
            NotFoundError: There is no such tenant.
            TakenOverError: The epoch is over. What it claimed is others' now.
        """
        ...

    async def around(self, home: str) -> Mapping[TenantId, TenantRooms]:
        """All rooms of the tenants of which this home has one."""
        ...

    async def give_up(self, home: str, epoch: int) -> None:
        """It has none any more. Nothing happens under an epoch that is over."""
        ...


class UsageBook(Protocol):
    """What tenants used, by windows of time."""

    async def used(self, tenant_id: TenantId, window: str) -> Used:
        """In `day:2026-11-23` or `month:2026-11`."""
        ...

    async def held(self, tenant_id: TenantId) -> Amounts:
        """What its run trees that have not ended drew and no ledger entry explains yet.

        It is what calls in flight may cost, and what was drawn ahead; it counts as used until it is given
        back. Child runs are left out, as no ledger entry tells of them.
        """
        ...

    async def grant(
        self, tenant_id: TenantId, windows: Mapping[str, Quota], wanted: Amounts, *, tree: RunId
    ) -> Amounts:
        """Draw up to `wanted` from all windows at once, never more than the tightest has left.

        In one transaction that holds the windows' rows, so that no number of servers can draw more than
        there is. What the run tree of that root run drew is kept beside it, until it is given back.
        """
        ...

    async def charge(
        self, tenant_id: TenantId, windows: Sequence[str], overdraft: Amounts, *, tree: RunId
    ) -> None:
        """Add to what was used, past every quota."""
        ...

    async def give_back(self, tenant_id: TenantId, unused: Amounts, *, tree: RunId) -> None:
        """Return a part of what the tree drew to the windows it was drawn from, the last draw first.

        Raises:
            InvariantError: The tree has not drawn so much.
        """
        ...

    async def reclaim(self, tenant_id: TenantId, *, tree: RunId) -> Amounts:
        """Give back what a tree drew and no ledger entry of it explains: its server was killed.

        To be called when nobody draws for the tree, and after its open calls were settled; a second time
        does nothing. What was given back. What is explained stays drawn: who goes on with the tree counts
        its past use as drawn already, and draws only for what comes. Child runs stay drawn: no quota
        counts them, and no ledger entry tells of them.
        """
        ...


class AuditBook(Protocol):
    """Append-only."""

    async def write(self, row: AuditRow) -> None:
        """One more."""
        ...

    async def read(
        self, *, tenant_id: TenantId | None = None, after: int = 0, limit: int = 1_000
    ) -> Sequence[tuple[int, AuditRow]]:
        """In order, with their numbers."""
        ...


OnStored = Callable[[int, Sequence[Event]], None]
"""Told of what was stored: the position of the first, and the events, whose positions follow it."""


class TreeBook(Protocol):
    """The events of run trees, in one order for each tree.

    Positions are dense from 0 in a tree, and given in the transaction that stores the events: whoever sees
    one sees all before it. A tree has one writing process at a time (`HomeBook`).
    """

    def tree(
        self, tenant_id: TenantId, root: RunId, *, on_stored: OnStored | None = None, epoch: int = 0
    ) -> RunStore:
        """Where the runs of this tree keep their events; texts are found by its runs only.

        It takes events under the epoch that the run has, and raises `TakenOverError` under another one.
        `on_stored` is called once they are durable; two appends of different runs may tell in either order.
        """
        ...

    async def tree_events(
        self, root: RunId, from_position: int, *, limit: int
    ) -> Sequence[tuple[int, bytes]]:
        """Positions and events as stored (`Event.to_json`, one object, UTF-8), as far as there are any."""
        ...

    async def tree_blob(self, root: RunId, sha256: str) -> bytes | None:
        """A long text that an event of this tree refers to."""
        ...

    async def tree_blob_part(self, root: RunId, sha256: str, *, start: int, max_bytes: int) -> bytes | None:
        """A part of one, empty behind its end."""
        ...
