"""What tenants used, by windows of time, and what their run trees have drawn of it."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Label, Table, bindparam, delete, func, select, update

from orchestrator.budget import UNLIMITED, ZERO, Amounts
from orchestrator.errors import InvariantError
from orchestrator.ids import RunId, TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import Quota, RunState, Used
from orchestrator.store.database import Database
from orchestrator.store.tables import amounts_as, amounts_of, draws, ledger, runs, usage

# Every run draws and gives back. To put a statement together takes longer than to run it: these are put
# together once.
_USED = (
    select(usage)
    .where(usage.c.tenant_id == bindparam("tenant"))
    .where(usage.c.time_window.in_(bindparam("windows", expanding=True)))
    .order_by(usage.c.time_window)
    .with_for_update()
)
_ADD = (
    update(usage)
    .where(usage.c.tenant_id == bindparam("tenant"))
    .where(usage.c.time_window.in_(bindparam("windows", expanding=True)))
    .values({unit: usage.c[unit] + bindparam(f"more_{unit}") for unit in Amounts._fields})
)
# The newest draw grows while the windows are the same: a run of an hour leaves one row, not hundreds.
_GROW = (
    update(draws)
    .where(
        draws.c.draw_id
        == select(func.max(draws.c.draw_id)).where(draws.c.root_run_id == bindparam("tree")).scalar_subquery()
    )
    .where(draws.c.time_windows == bindparam("windows"))
    .values({unit: draws.c[unit] + bindparam(f"more_{unit}") for unit in Amounts._fields})
)
_DRAWN = (
    select(draws)
    .where(draws.c.tenant_id == bindparam("tenant"), draws.c.root_run_id == bindparam("tree"))
    .order_by(draws.c.draw_id.desc())
    .with_for_update()
)
_SHRINK = (
    update(draws)
    .where(draws.c.draw_id == bindparam("draw"))
    .values({unit: bindparam(f"left_{unit}") for unit in Amounts._fields})
)
_FORGET = delete(draws).where(draws.c.draw_id == bindparam("draw"))


class SqlUsageBook:
    """`UsageBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def used(self, tenant_id: TenantId, window: str) -> Used:
        """See `UsageBook.used`."""
        found = select(usage).where(usage.c.tenant_id == tenant_id, usage.c.time_window == window)

        async def work(connection: Transaction) -> Used:
            row = (await connection.execute(found)).one_or_none()
            return Used() if row is None else Used(amounts=amounts_of(row), runs=row.runs)

        return await self._database.read(work)

    async def held(self, tenant_id: TenantId) -> Amounts:
        """See `UsageBook.held`."""

        async def work(connection: Transaction) -> Amounts:
            drawn = await _sum_of_live(connection, draws, "", tenant_id)
            explained = await _sum_of_live(connection, ledger, "confirmed_", tenant_id)
            explained = explained.plus(await _sum_of_live(connection, ledger, "unconfirmed_", tenant_id))
            return drawn.minus(explained).above_zero()._replace(child_runs=0)

        return await self._database.read(work)

    async def grant(
        self, tenant_id: TenantId, windows: Mapping[str, Quota], wanted: Amounts, *, tree: RunId
    ) -> Amounts:
        """See `UsageBook.grant`."""

        async def work(connection: Transaction) -> Amounts:
            used = await lock_windows(self._database, connection, tenant_id, windows)
            granted = wanted
            for window, quota in windows.items():
                granted = most_of(granted, quota, used[window].amounts)
            if granted != ZERO:
                await self._draw(connection, tenant_id, list(windows), granted, tree)
            return granted

        return await self._database.write(work, lane=f"usage {tenant_id}")

    async def charge(
        self, tenant_id: TenantId, windows: Sequence[str], overdraft: Amounts, *, tree: RunId
    ) -> None:
        """See `UsageBook.charge`."""

        async def work(connection: Transaction) -> None:
            await lock_windows(self._database, connection, tenant_id, windows)
            await self._draw(connection, tenant_id, list(windows), overdraft, tree)

        await self._database.write(work, lane=f"usage {tenant_id}")

    async def give_back(self, tenant_id: TenantId, unused: Amounts, *, tree: RunId) -> None:
        """See `UsageBook.give_back`."""

        async def work(connection: Transaction) -> None:
            if await self._return(connection, tenant_id, unused, tree) != ZERO:
                raise InvariantError("more was given back than was drawn")

        await self._database.write(work, lane=f"usage {tenant_id}")

    async def reclaim(self, tenant_id: TenantId, *, tree: RunId) -> Amounts:
        """See `UsageBook.reclaim`."""

        async def work(connection: Transaction) -> Amounts:
            drawn = await _sum(connection, draws, "", tree)
            explained = await _sum(connection, ledger, "confirmed_", tree)
            explained = explained.plus(await _sum(connection, ledger, "unconfirmed_", tree))
            unused = drawn.minus(explained).above_zero()._replace(child_runs=0)
            await self._return(connection, tenant_id, unused, tree)
            return unused

        return await self._database.write(work, lane=f"usage {tenant_id}")

    async def _draw(
        self,
        connection: Transaction,
        tenant_id: TenantId,
        windows: Sequence[str],
        amounts: Amounts,
        tree: RunId,
    ) -> None:
        await _add(connection, tenant_id, windows, amounts)
        grown = await connection.execute(
            _GROW, {"tree": tree, "windows": list(windows), **amounts_as(amounts, "more_")}
        )
        if not grown.rowcount:
            await connection.execute(
                self._database.insert(draws),
                {
                    "tenant_id": tenant_id,
                    "root_run_id": tree,
                    "time_windows": list(windows),
                    **amounts_as(amounts),
                },
            )

    async def _return(
        self, connection: Transaction, tenant_id: TenantId, unused: Amounts, tree: RunId
    ) -> Amounts:
        """Give it back to the newest draws first; what they do not cover."""
        found = await connection.execute(_DRAWN, {"tenant": tenant_id, "tree": tree})
        for draw in found.all():
            if unused == ZERO:
                break
            drawn = amounts_of(draw)
            back = Amounts(*map(min, unused, drawn))
            unused = unused.minus(back)
            await lock_windows(self._database, connection, tenant_id, draw.time_windows)
            await _add(connection, tenant_id, draw.time_windows, ZERO.minus(back))
            if back == drawn:
                await connection.execute(_FORGET, {"draw": draw.draw_id})
            else:
                left = amounts_as(drawn.minus(back), "left_")
                await connection.execute(_SHRINK, {"draw": draw.draw_id, **left})
        return unused


def most_of(wanted: Amounts, quota: Quota, used: Amounts) -> Amounts:
    """How much of it a quota still leaves, unit by unit."""
    limit = Amounts(
        tokens=UNLIMITED if quota.max_tokens is None else quota.max_tokens,
        cost_microusd=UNLIMITED if quota.max_cost_microusd is None else quota.max_cost_microusd,
        calls=UNLIMITED,
        child_runs=UNLIMITED,
    )
    return Amounts(*map(min, wanted, limit.minus(used).above_zero()))


async def lock_windows(
    database: Database, connection: Transaction, tenant_id: TenantId, windows: Iterable[str]
) -> dict[str, Used]:
    """What was used in these windows, which nobody else changes until the transaction ends.

    Always in the same order, so that two never wait for each other.
    """
    wanted = sorted(set(windows))
    if not wanted:
        return {}
    its = {"tenant": tenant_id, "windows": wanted}
    found = (await connection.execute(_USED, its)).all()
    if len(found) < len(wanted):
        await connection.execute(
            database.insert(usage).on_conflict_do_nothing(),
            [{"tenant_id": tenant_id, "time_window": window} for window in wanted],
        )
        found = (await connection.execute(_USED, its)).all()
    return {row.time_window: Used(amounts=amounts_of(row), runs=row.runs) for row in found}


async def _add(
    connection: Transaction, tenant_id: TenantId, windows: Sequence[str], amounts: Amounts
) -> None:
    """To windows that are locked."""
    await connection.execute(
        _ADD, {"tenant": tenant_id, "windows": list(windows), **amounts_as(amounts, "more_")}
    )


async def _sum(connection: Transaction, table: Table, prefix: str, tree: RunId) -> Amounts:
    """Of a tree's rows."""
    found = await connection.execute(select(*_sums(table, prefix)).where(table.c.root_run_id == tree))
    return amounts_of(found.one())


async def _sum_of_live(connection: Transaction, table: Table, prefix: str, tenant_id: TenantId) -> Amounts:
    """Of the rows of a tenant's trees that have not ended."""
    live = select(runs.c.run_id).where(runs.c.tenant_id == tenant_id, runs.c.state != RunState.ENDED)
    found = await connection.execute(select(*_sums(table, prefix)).where(table.c.root_run_id.in_(live)))
    return amounts_of(found.one())


def _sums(table: Table, prefix: str) -> list[Label[Any]]:
    return [func.coalesce(func.sum(table.c[prefix + unit]), 0).label(unit) for unit in Amounts._fields]
