"""Root runs in the database."""

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    LargeBinary,
    Row,
    Select,
    bindparam,
    delete,
    exists,
    func,
    select,
    text,
    tuple_,
    type_coerce,
    update,
)

from orchestrator.budget import Amounts
from orchestrator.errors import (
    BudgetExceededError,
    CallIdReusedError,
    InvariantError,
    NotFoundError,
    TakenOverError,
)
from orchestrator.ids import RunId, TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import (
    ANSWER_HEAD_BYTES,
    LISTED_TEXT_BYTES,
    AuditRow,
    Quota,
    RunFilter,
    RunHead,
    RunRow,
    RunState,
    Wish,
)
from orchestrator.store.database import Database
from orchestrator.store.doomed import doom
from orchestrator.store.sql_audit import add_audit
from orchestrator.store.sql_heads import HEAD, head_of
from orchestrator.store.sql_homes import check_is_there
from orchestrator.store.sql_tenants import lock_tenant
from orchestrator.store.sql_usage import lock_windows
from orchestrator.store.tables import amounts_as, amounts_of, contexts, run_texts, runs, usage
from orchestrator.turn import Outcome

_PLAIN = (
    "run_id",
    "tenant_id",
    "idempotency_key",
    "request_hash",
    "context_id",
    "options",
    "created_at",
    "started_at",
    "ended_at",
    "outcome",
    "error",
    "resumed",
    "continues",
    "keeps_namespace",
    "home",
    "last_position",
)
"""Fields of `RunRow` that are columns as they are."""


class SqlRunBook:
    """`RunBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def create(
        self,
        row: RunRow,
        *,
        max_queued: int,
        quotas: Sequence[tuple[str, Quota]],
        audit: AuditRow | None = None,
    ) -> RunRow:
        """See `RunBook.create`."""

        async def work(connection: Transaction) -> RunRow:
            await lock_tenant(connection, row.tenant_id)
            there = await connection.execute(
                _WHOLE_BY_KEY, {"tenant": row.tenant_id, "key": row.idempotency_key}
            )
            if (found := there.one_or_none()) is not None:
                if found.request_hash != row.request_hash:
                    raise CallIdReusedError("this idempotency key was used for another request")
                return _row(found)
            await _check_context(connection, row)
            await _check_queue(connection, row.tenant_id, max_queued)
            await self._count(connection, row.tenant_id, quotas)
            await self._insert(connection, row)
            await self._audit(connection, audit)
            return row

        return await self._database.write(work)

    async def run(self, tenant_id: TenantId, run_id: RunId) -> RunRow | None:
        """See `RunBook.run`."""

        async def work(connection: Transaction) -> RunRow | None:
            found = await connection.execute(_WHOLE, {"run": run_id, "tenant": tenant_id})
            row = found.one_or_none()
            return None if row is None else _row(row)

        return await self._database.read(work)

    async def answer(self, tenant_id: TenantId, run_id: RunId, *, start: int, max_bytes: int) -> bytes | None:
        """See `RunBook.answer`."""
        found = (
            select(_part(run_texts.c.answer, start, max_bytes))
            .join(runs)
            .where(runs.c.run_id == run_id, runs.c.tenant_id == tenant_id)
        )

        async def work(connection: Transaction) -> bytes | None:
            part: Any = (await connection.execute(found)).scalar_one_or_none()
            return None if part is None else bytes(part)

        return await self._database.read(work)

    async def runs(
        self, tenant_id: TenantId, which: RunFilter, *, limit: int, before: tuple[float, RunId] | None = None
    ) -> Sequence[RunRow]:
        """See `RunBook.runs`."""
        found = (
            _with_heads()
            .where(runs.c.tenant_id == tenant_id)
            .order_by(runs.c.created_at.desc(), runs.c.run_id.desc())
            .limit(limit)
        )
        if which.states:
            found = found.where(runs.c.state.in_(sorted(which.states)))
        if which.outcomes:
            found = found.where(runs.c.outcome.in_(sorted(which.outcomes)))
        if which.created_from is not None:
            found = found.where(runs.c.created_at >= which.created_from)
        if which.created_before is not None:
            found = found.where(runs.c.created_at < which.created_before)
        if before is not None:
            found = found.where(tuple_(runs.c.created_at, runs.c.run_id) < tuple_(*before))
        return await self._rows(found)

    async def head(self, tenant_id: TenantId, run_id: RunId) -> RunRow | None:
        """See `RunBook.head`."""
        rows = await self._rows(_with_heads().where(runs.c.run_id == run_id, runs.c.tenant_id == tenant_id))
        return rows[0] if rows else None

    async def cancel(
        self, tenant_id: TenantId, run_id: RunId, *, at: float, error: str, audit: AuditRow
    ) -> RunState | None:
        """See `RunBook.cancel`."""
        its_own = (runs.c.run_id == run_id) & (runs.c.tenant_id == tenant_id)
        never_began = {
            "state": RunState.ENDED,
            "ended_at": at,
            "outcome": Outcome.CANCELLED.value,
            "error": error,
        }

        async def work(connection: Transaction) -> RunState | None:
            found = await connection.execute(select(*HEAD).where(its_own).with_for_update())
            row = found.one_or_none()
            if row is None:
                return None
            head = head_of(row)
            if head.state is RunState.ENDED or head.wish is Wish.CANCEL:
                return head.state
            end = never_began if head.state is RunState.QUEUED else {}
            await connection.execute(update(runs).where(its_own).values(wish=Wish.CANCEL, **end))
            await self._audit(connection, audit)
            return head.state

        return await self._database.write(work)

    async def resume(self, tenant_id: TenantId, run_id: RunId, *, audit: AuditRow) -> bool:
        """See `RunBook.resume`."""
        wish = (
            update(runs)
            .where(runs.c.run_id == run_id, runs.c.tenant_id == tenant_id)
            .where(runs.c.state == RunState.INTERRUPTED, runs.c.wish != Wish.CANCEL)
            .values(wish=Wish.RESUME)
        )

        async def work(connection: Transaction) -> bool:
            if not (await connection.execute(wish)).rowcount:
                return False
            await self._audit(connection, audit)
            return True

        return await self._database.write(work)

    async def wished(self, home: str) -> Sequence[RunHead]:
        """See `RunBook.wished`. What it says of wishes, the index says too."""
        found = (
            select(*HEAD)
            .where(runs.c.home == home, runs.c.wish != text("''"))
            .order_by(runs.c.created_at, runs.c.run_id)
        )

        async def work(connection: Transaction) -> Sequence[RunHead]:
            return [head_of(row) for row in await connection.execute(found)]

        return await self._database.read(work)

    async def granted(self, run_id: RunId, wish: Wish) -> None:
        """See `RunBook.granted`."""
        forget = update(runs).where(runs.c.run_id == run_id, runs.c.wish == wish).values(wish=Wish.NONE)

        async def work(connection: Transaction) -> None:
            await connection.execute(forget)

        await self._database.write(work)

    async def count_live(self, tenant_id: TenantId) -> Mapping[RunState, int]:
        """See `RunBook.count_live`."""
        counts = (
            select(runs.c.state, func.count().label("runs"))
            .where(runs.c.tenant_id == tenant_id, runs.c.state != RunState.ENDED)
            .group_by(runs.c.state)
        )

        async def work(connection: Transaction) -> Mapping[RunState, int]:
            return {RunState(row.state): row.runs for row in await connection.execute(counts)}

        return await self._database.read(work)

    async def started(
        self, run_id: RunId, *, at: float, resumed: bool, max_concurrent: int, epoch: int = 0
    ) -> bool:
        """See `RunBook.started`."""

        async def work(connection: Transaction) -> bool:
            found = await connection.execute(_ITS_TENANT_AND_HOME, {"run": run_id})
            its = found.one_or_none()
            if its is None:
                return False
            await lock_tenant(connection, its.tenant_id)
            await check_is_there(connection, its.home, epoch)
            others = await connection.execute(_OTHERS, {"tenant": its.tenant_id, "run": run_id})
            if others.scalar_one() >= max_concurrent:
                return False
            changed = await connection.execute(
                _START, {"run": run_id, "now": at, "resumes": int(resumed), "epoch_of_home": epoch}
            )
            return bool(changed.rowcount)

        return await self._database.write(work)

    async def interrupted(self, run_id: RunId, *, epoch: int = 0) -> None:
        """See `RunBook.interrupted`. Nothing happens to a run that has ended."""

        async def work(connection: Transaction) -> None:
            await connection.execute(
                update(runs)
                .where(runs.c.run_id == run_id, runs.c.state != RunState.ENDED, _is_under(epoch))
                .values(state=RunState.INTERRUPTED)
            )

        await self._database.write(work)

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
        """See `RunBook.ended`. Told again, it stays as it was."""

        async def work(connection: Transaction) -> None:
            end = {"state": RunState.ENDED, "ended_at": at, "outcome": outcome, "error": error}
            billed = amounts_as(confirmed, "confirmed_") | amounts_as(unconfirmed, "unconfirmed_")
            changed = await connection.execute(
                _END, {"run": run_id, "epochs": [0, epoch], "wish": Wish.NONE, **end, **billed}
            )
            if changed.rowcount:
                await connection.execute(_ANSWER, {"run": run_id, "answer": answer})
                return
            found = await connection.execute(select(runs.c.state).where(runs.c.run_id == run_id))
            state = found.scalar_one_or_none()
            if state is None:
                raise InvariantError("a run ended that is not there: it was removed with its tenant")
            if state != RunState.ENDED:
                raise TakenOverError("a run ended under an epoch of its home that is over")

        await self._database.write(work)

    async def delete(self, tenant_id: TenantId, run_id: RunId, *, audit: AuditRow | None = None) -> bool:
        """See `RunBook.delete`."""
        its_own = (runs.c.run_id == run_id) & (runs.c.tenant_id == tenant_id)

        async def work(connection: Transaction) -> bool:
            await lock_tenant(connection, tenant_id)
            # Events and texts go with it: `ON DELETE CASCADE`.
            gone = await connection.execute(
                delete(runs).where(its_own, runs.c.state == RunState.ENDED).returning(runs.c.context_id)
            )
            context_id = gone.scalar_one_or_none()
            if context_id is None:
                return False
            still_needed = exists().where(runs.c.context_id == contexts.c.context_id)
            await doom(
                self._database,
                connection,
                (contexts.c.context_id == context_id) & contexts.c.is_inline & ~still_needed,
            )
            await self._audit(connection, audit)
            return True

        was_there = await self._database.write(work)
        if was_there:
            await self._database.scrub()
        return was_there

    async def expired(self, tenant_id: TenantId, *, before: float, limit: int) -> Sequence[RunId]:
        """See `RunBook.expired`."""
        found = (
            select(runs.c.run_id)
            .where(runs.c.tenant_id == tenant_id, runs.c.state == RunState.ENDED, runs.c.ended_at < before)
            .order_by(runs.c.ended_at)
            .limit(limit)
        )

        async def work(connection: Transaction) -> Sequence[RunId]:
            return [RunId(run_id) for run_id in (await connection.execute(found)).scalars()]

        return await self._database.read(work)

    async def _rows(self, found: Select[Any]) -> Sequence[RunRow]:
        async def work(connection: Transaction) -> Sequence[RunRow]:
            return [_row(row) for row in await connection.execute(found)]

        return await self._database.read(work)

    async def _audit(self, connection: Transaction, row: AuditRow | None) -> None:
        if row is not None:
            await add_audit(self._database, connection, row)

    async def _count(
        self, connection: Transaction, tenant_id: TenantId, quotas: Sequence[tuple[str, Quota]]
    ) -> None:
        """One more run in each of these windows.

        Raises:
            BudgetExceededError: One of them has as many as it may.
        """
        windows = [window for window, _ in quotas]
        used = await lock_windows(self._database, connection, tenant_id, windows)
        for window, quota in quotas:
            if quota.max_runs is not None and used[window].runs >= quota.max_runs:
                raise BudgetExceededError("tenant", {"runs": 1}, {"runs": 0})
        await connection.execute(_COUNT_RUN, {"tenant": tenant_id, "windows": windows})

    async def _insert(self, connection: Transaction, row: RunRow) -> None:
        await connection.execute(
            self._database.insert(runs),
            {name: getattr(row, name) for name in _PLAIN}
            | {"state": row.state, "wish": row.wish}
            | amounts_as(row.confirmed, "confirmed_")
            | amounts_as(row.unconfirmed, "unconfirmed_"),
        )
        await connection.execute(
            self._database.insert(run_texts),
            {"run_id": row.run_id, "question": row.question, "answer": row.answer},
        )


def _is_under(epoch: int) -> ColumnElement[bool]:
    """Whether a run may be changed under this epoch of its home: nobody wrote to its tree yet, or it did."""
    return runs.c.epoch.in_((0, epoch))


async def _check_context(connection: Transaction, row: RunRow) -> None:
    """Raise unless what the run is asked about is there and its tenant's."""
    if not row.context_id:
        return
    found = await connection.execute(_CONTEXT, {"context": row.context_id, "tenant": row.tenant_id})
    if found.one_or_none() is None:
        raise NotFoundError("there is no such context")


async def _check_queue(connection: Transaction, tenant_id: TenantId, max_queued: int) -> None:
    waiting = await connection.execute(_QUEUED, {"tenant": tenant_id})
    if waiting.scalar_one() >= max_queued:
        raise BudgetExceededError("tenant", {"waiting runs": 1}, {"waiting runs": 0})


_ANSWER_LENGTH = func.coalesce(func.length(run_texts.c.answer), 0).label("answer_length_bytes")


def _whole() -> Select[Any]:
    """All but a long answer's rest."""
    head = _part(run_texts.c.answer, 0, ANSWER_HEAD_BYTES)
    return select(runs, run_texts.c.question, head, _ANSWER_LENGTH).join(run_texts)


def _with_heads() -> Select[Any]:
    heads = [_part(column, 0, LISTED_TEXT_BYTES) for column in (run_texts.c.question, run_texts.c.answer)]
    return select(runs, *heads, _ANSWER_LENGTH).join(run_texts)


def _part(column: Column[Any], start: int, max_bytes: int) -> ColumnElement[bytes]:
    """Bytes of a text, under its column's name; SQL counts from 1."""
    part = func.substr(type_coerce(column, LargeBinary), start + 1, max_bytes)
    return type_coerce(part, LargeBinary).label(column.name)


# Every run asks these. To put one together takes longer than to run it, and so they are put together once.
_WHOLE = _whole().where(runs.c.run_id == bindparam("run"), runs.c.tenant_id == bindparam("tenant"))
_WHOLE_BY_KEY = _whole().where(
    runs.c.tenant_id == bindparam("tenant"), runs.c.idempotency_key == bindparam("key")
)
_CONTEXT = select(contexts.c.context_id).where(
    contexts.c.context_id == bindparam("context"), contexts.c.tenant_id == bindparam("tenant")
)
_QUEUED = select(func.count()).where(runs.c.tenant_id == bindparam("tenant"), runs.c.state == RunState.QUEUED)
_COUNT_RUN = (
    update(usage)
    .where(usage.c.tenant_id == bindparam("tenant"))
    .where(usage.c.time_window.in_(bindparam("windows", expanding=True)))
    .values(runs=usage.c.runs + 1)
)
_ITS_TENANT_AND_HOME = select(runs.c.tenant_id, runs.c.home).where(runs.c.run_id == bindparam("run"))
_OTHERS = select(func.count()).where(
    runs.c.tenant_id == bindparam("tenant"),
    runs.c.state == RunState.RUNNING,
    runs.c.run_id != bindparam("run"),
)
_START = (
    update(runs)
    .where(runs.c.run_id == bindparam("run"), runs.c.state != RunState.ENDED)
    .where(runs.c.wish != Wish.CANCEL)
    .values(
        state=RunState.RUNNING,
        started_at=func.coalesce(runs.c.started_at, bindparam("now")),
        resumed=runs.c.resumed + bindparam("resumes"),
        epoch=bindparam("epoch_of_home"),
    )
)
_END = update(runs).where(
    runs.c.run_id == bindparam("run"),
    runs.c.state != RunState.ENDED,
    runs.c.epoch.in_(bindparam("epochs", expanding=True)),
)
_ANSWER = update(run_texts).where(run_texts.c.run_id == bindparam("run"))


def _row(row: Row[Any]) -> RunRow:
    question, answer = row.question, row.answer
    return RunRow(
        **{name: getattr(row, name) for name in _PLAIN},
        state=RunState(row.state),
        wish=Wish(row.wish),
        # A head may end in the middle of a character.
        question=question if isinstance(question, str) else question.decode("utf-8", "ignore"),
        answer=None if answer is None else bytes(answer),
        answer_length_bytes=row.answer_length_bytes,
        confirmed=amounts_of(row, "confirmed_"),
        unconfirmed=amounts_of(row, "unconfirmed_"),
    )
