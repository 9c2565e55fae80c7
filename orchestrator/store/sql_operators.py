"""Keys of the installation in the database."""

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select, update

from orchestrator.ids import new_key_id
from orchestrator.store.backend import Transaction
from orchestrator.store.books import OPERATOR_KEY_PREFIX, AuditRow, OperatorKeyRow
from orchestrator.store.database import Database
from orchestrator.store.key_secrets import HINT_CHARS, hash_of, new_key
from orchestrator.store.sql_audit import add_audit
from orchestrator.store.tables import operator_keys


class SqlOperatorBook:
    """`OperatorBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_key(self, *, by: str | None = None) -> tuple[OperatorKeyRow, str]:
        """See `OperatorBook.add_key`."""
        key = new_key(OPERATOR_KEY_PREFIX)
        row = OperatorKeyRow(
            key_id=new_key_id(), hint=key[-HINT_CHARS:], created_at=time.time(), revoked_at=None
        )

        async def work(connection: Transaction) -> None:
            await connection.execute(
                self._database.insert(operator_keys).values(
                    key_id=row.key_id, key_sha256=hash_of(key), hint=row.hint, created_at=row.created_at
                )
            )
            await self._note(connection, by, "AddOperatorKey", row.key_id)

        await self._database.write(work)
        return row, key

    async def keys(self) -> Sequence[OperatorKeyRow]:
        """See `OperatorBook.keys`."""
        found = select(operator_keys).order_by(operator_keys.c.created_at, operator_keys.c.key_id)

        async def work(connection: Transaction) -> list[OperatorKeyRow]:
            return [_key(row) for row in await connection.execute(found)]

        return await self._database.read(work)

    async def revoke_key(self, key_id: str, *, by: str | None = None) -> bool:
        """See `OperatorBook.revoke_key`. One that was revoked before keeps its time."""
        its = operator_keys.c.key_id == key_id

        async def work(connection: Transaction) -> bool:
            await connection.execute(
                update(operator_keys)
                .where(its, operator_keys.c.revoked_at.is_(None))
                .values(revoked_at=time.time())
            )
            found = await connection.execute(select(operator_keys.c.key_id).where(its))
            if found.one_or_none() is None:
                return False
            await self._note(connection, by, "RevokeOperatorKey", key_id)
            return True

        return await self._database.write(work)

    async def who_has(self, key: str) -> OperatorKeyRow | None:
        """See `OperatorBook.who_has`."""
        found = select(operator_keys).where(
            operator_keys.c.key_sha256 == hash_of(key), operator_keys.c.revoked_at.is_(None)
        )

        async def work(connection: Transaction) -> OperatorKeyRow | None:
            row = (await connection.execute(found)).one_or_none()
            return None if row is None else _key(row)

        return await self._database.read(work)

    async def _note(self, connection: Transaction, by: str | None, action: str, key_id: str) -> None:
        if by is not None:
            row = AuditRow(at=time.time(), tenant_id=None, actor=by, action=action, target=key_id)
            await add_audit(self._database, connection, row)


def _key(row: Row[Any]) -> OperatorKeyRow:
    return OperatorKeyRow(
        key_id=row.key_id, hint=row.hint, created_at=row.created_at, revoked_at=row.revoked_at
    )
