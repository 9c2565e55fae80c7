"""Servers and their state directories, in the database. See `HomeBook`.

Locks are taken in this order: a tenant, a home, its runs and rooms. Appends to a run tree lock the run
alone, and find out by its epoch.
"""

from collections.abc import Sequence

from sqlalchemy import ColumnElement, and_, bindparam, case, delete, exists, or_, select, update

from orchestrator.errors import TakenOverError
from orchestrator.store.backend import Transaction
from orchestrator.store.books import AuditRow, RunHead, RunState, TakenOver, Wish
from orchestrator.store.clock import database_now
from orchestrator.store.database import Database
from orchestrator.store.sql_audit import add_audit
from orchestrator.store.sql_heads import HEAD, head_of
from orchestrator.store.tables import contexts, homes, rooms, runs

_TAKEN_OVER = "this server was not heard of for too long, and another one has settled its runs"
_SETTLED = ""
"""As settler: nobody, because nothing is left to settle."""


class SqlHomeBook:
    """`HomeBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def knows(self, home: str) -> bool:
        """See `HomeBook.knows`."""
        entered = exists().where(homes.c.home == home)
        # A database that was of the first version has contexts, and no homes.
        kept = exists().where(contexts.c.home == home)

        async def work(connection: Transaction) -> bool:
            return bool((await connection.execute(select(or_(entered, kept)))).scalar_one())

        return await self._database.read(work)

    async def enter(self, home: str, *, lease_s: float) -> int:
        """See `HomeBook.enter`."""
        new = self._database.insert(homes).values(home=home, epoch=0, heard_until=0.0)
        enter = (
            update(homes)
            .where(homes.c.home == home)
            .values(epoch=homes.c.epoch + 1, heard_until=database_now() + lease_s, settler=None)
            .returning(homes.c.epoch)
        )

        async def work(connection: Transaction) -> int:
            await connection.execute(new.on_conflict_do_nothing())
            epoch: int = (await connection.execute(enter)).scalar_one()
            await connection.execute(delete(rooms).where(rooms.c.home == home))
            return epoch

        return await self._database.write(work)

    async def beat(self, home: str, epoch: int, *, lease_s: float) -> bool:
        """See `HomeBook.beat`."""
        extend = (
            update(homes)
            .where(homes.c.home == home, homes.c.epoch == epoch)
            .values(heard_until=database_now() + lease_s)
        )
        others = select(exists().where(homes.c.home != home, homes.c.heard_until > database_now()))

        async def work(connection: Transaction) -> bool:
            if not (await connection.execute(extend)).rowcount:
                raise TakenOverError(_TAKEN_OVER)
            return bool((await connection.execute(others)).scalar_one())

        return await self._database.write(work)

    async def is_there(self, home: str) -> bool:
        """See `HomeBook.is_there`."""
        found = select(homes.c.home).where(homes.c.home == home, homes.c.heard_until > database_now())

        async def work(connection: Transaction) -> bool:
            return (await connection.execute(found)).one_or_none() is not None

        return await self._database.read(work)

    async def lost(self, *, by: str) -> Sequence[str]:
        """See `HomeBook.lost`."""
        found = select(homes.c.home).where(self._is_lost(by)).order_by(homes.c.home)

        async def work(connection: Transaction) -> Sequence[str]:
            return (await connection.execute(found)).scalars().all()

        return await self._database.read(work)

    async def take_over(self, home: str, *, by: str, audit: AuditRow) -> TakenOver | None:
        """See `HomeBook.take_over`."""
        # Looked at again under the lock: another server, or its own, may have been quicker.
        found = select(homes).where(homes.c.home == home, self._is_lost(by)).with_for_update()
        its_runs = and_(runs.c.home == home, runs.c.state != RunState.ENDED)

        async def work(connection: Transaction) -> TakenOver | None:
            row = (await connection.execute(found)).one_or_none()
            if row is None:
                return None
            epoch = row.epoch + 1
            await connection.execute(
                update(homes).where(homes.c.home == home).values(epoch=epoch, settler=by)
            )
            await connection.execute(update(runs).where(its_runs).values(_claimed(epoch)))
            await connection.execute(delete(rooms).where(rooms.c.home == home))
            to_settle = runs.c.state == RunState.INTERRUPTED
            if row.settler == _SETTLED:
                to_settle &= runs.c.wish == Wish.CANCEL
            heads = await connection.execute(select(*HEAD).where(its_runs, to_settle))
            taken = TakenOver(epoch=epoch, runs=[head_of(one) for one in heads])
            await add_audit(self._database, connection, audit)
            return taken

        return await self._database.write(work)

    async def settled(self, home: str, epoch: int) -> None:
        """See `HomeBook.settled`."""
        done = update(homes).where(homes.c.home == home, homes.c.epoch == epoch).values(settler=_SETTLED)

        async def work(connection: Transaction) -> None:
            await connection.execute(done)

        await self._database.write(work)

    async def claim(self, home: str, epoch: int) -> Sequence[RunHead]:
        """See `HomeBook.claim`."""
        its_runs = and_(runs.c.home == home, runs.c.state != RunState.ENDED)
        granted = and_(runs.c.home == home, runs.c.wish != "", runs.c.state == RunState.ENDED)

        async def work(connection: Transaction) -> Sequence[RunHead]:
            await check_is_there(connection, home, epoch)
            await connection.execute(update(runs).where(granted).values(wish=Wish.NONE))
            await connection.execute(update(runs).where(its_runs).values(_claimed(epoch)))
            heads = await connection.execute(
                select(*HEAD).where(its_runs).order_by(runs.c.created_at, runs.c.run_id)
            )
            return [head_of(one) for one in heads]

        return await self._database.write(work)

    def _is_lost(self, by: str) -> ColumnElement[bool]:
        settler = homes.alias()
        has_a_settler = exists().where(
            settler.c.home == homes.c.settler, settler.c.heard_until > database_now()
        )
        is_to_be_cancelled = exists().where(
            runs.c.home == homes.c.home,
            runs.c.wish != "",
            runs.c.wish == Wish.CANCEL,
            runs.c.state == RunState.INTERRUPTED,
        )
        return and_(
            homes.c.home != by,
            homes.c.heard_until < database_now(),
            or_(
                homes.c.settler.is_(None),
                homes.c.settler == by,
                and_(homes.c.settler != _SETTLED, ~has_a_settler),
                and_(homes.c.settler == _SETTLED, is_to_be_cancelled),
            ),
        )


# Every run that starts asks this: it is put together once.
_EPOCH = select(homes.c.epoch).where(homes.c.home == bindparam("home")).with_for_update(read=True)


async def check_is_there(connection: Transaction, home: str, epoch: int) -> None:
    """Raise unless this epoch is still the home's, and keep it so until the transaction ends.

    Raises:
        TakenOverError: It is not.
    """
    found = await connection.execute(_EPOCH, {"home": home})
    if (found.scalar_one_or_none() or 0) != epoch:
        raise TakenOverError(_TAKEN_OVER)


def _claimed(epoch: int) -> dict[str, object]:
    """Of runs that have not ended, and are another epoch's from now on: nobody runs them."""
    interrupted = case((runs.c.state == RunState.RUNNING, RunState.INTERRUPTED), else_=runs.c.state)
    return {"epoch": epoch, "state": interrupted}
