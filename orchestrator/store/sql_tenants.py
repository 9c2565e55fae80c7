"""Tenants and their keys in the database."""

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from typing import Any

from sqlalchemy import Row, bindparam, delete, or_, select, update

from orchestrator.errors import InvalidRequestError, NotFoundError
from orchestrator.ids import TenantId, new_key_id, new_tenant_id
from orchestrator.store.backend import Transaction
from orchestrator.store.books import AuditRow, KeyRow, Quota, Role, TenantRow, TenantRules
from orchestrator.store.database import Database
from orchestrator.store.doomed import doom
from orchestrator.store.key_secrets import HINT_CHARS, could_be_key, hash_of, new_key
from orchestrator.store.sql_audit import add_audit
from orchestrator.store.tables import api_keys, contexts, draws, rooms, runs, tenants, usage

KEY_PREFIX = "rlm_"
MAX_NAME_CHARS = 100
_KEYS_IN_QUERY = 500
"""A statement has room for some thousands of values."""


# Every call looks a key up, and most writes lock a tenant. To put a statement together takes longer than to
# run it: these are put together once.
_WHOSE = (
    select(api_keys)
    .join(tenants, tenants.c.tenant_id == api_keys.c.tenant_id)
    .where(api_keys.c.key_sha256 == bindparam("sha256"))
    .where(api_keys.c.revoked_at.is_(None), tenants.c.removed_at.is_(None))
)
_TENANT = select(tenants).where(tenants.c.tenant_id == bindparam("tenant"))
_TENANT_BY_EITHER = (
    select(tenants)
    .where(tenants.c.removed_at.is_(None))
    .where(or_(tenants.c.tenant_id == bindparam("tenant"), tenants.c.name == bindparam("called")))
    .order_by(tenants.c.tenant_id != bindparam("tenant"))
    .limit(1)
)
_LOCK = (
    select(tenants.c.tenant_id)
    .where(tenants.c.tenant_id == bindparam("tenant"), tenants.c.removed_at.is_(None))
    .with_for_update()
)


class SqlTenantBook:
    """`TenantBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add_tenant(self, name: str, rules: TenantRules, *, by: str | None = None) -> TenantRow:
        """See `TenantBook.add_tenant`. A name is printable, at most `MAX_NAME_CHARS` long."""
        row = _new_tenant(name, rules)

        async def work(connection: Transaction) -> None:
            await self._insert_tenant(connection, row, by)

        await self._database.write(work)
        return row

    async def add_tenant_with_key(
        self, name: str, rules: TenantRules, role: Role, *, by: str | None = None
    ) -> tuple[TenantRow, KeyRow, str]:
        """See `TenantBook.add_tenant_with_key`."""
        row = _new_tenant(name, rules)
        key, secret = _new_key(row.tenant_id, role)

        async def work(connection: Transaction) -> None:
            await self._insert_tenant(connection, row, by)
            await self._insert_key(connection, key, secret, by)

        await self._database.write(work)
        return row, key, secret

    async def _insert_tenant(self, connection: Transaction, row: TenantRow, by: str | None) -> None:
        added = await connection.execute(
            self._database.insert(tenants)
            .values(
                tenant_id=row.tenant_id,
                name=row.name,
                rules=_rules_as_json(row.rules),
                created_at=row.created_at,
            )
            .on_conflict_do_nothing()
        )
        if not added.rowcount:
            raise InvalidRequestError(f"there is a tenant called {row.name!r} already")
        await self._note(connection, by, row.tenant_id, "AddTenant", row.tenant_id)

    async def tenants(self, *, after: str = "", limit: int | None = None) -> Sequence[TenantRow]:
        """See `TenantBook.tenants`."""
        found = (
            select(tenants)
            .where(tenants.c.removed_at.is_(None), tenants.c.name > after)
            .order_by(tenants.c.name)
            .limit(limit)
        )

        async def work(connection: Transaction) -> list[TenantRow]:
            return [_tenant(row) for row in await connection.execute(found)]

        return await self._database.read(work)

    async def tenant(self, name_or_id: str) -> TenantRow | None:
        """See `TenantBook.tenant`. An id goes before a name that looks like one."""

        async def work(connection: Transaction) -> TenantRow | None:
            found = await connection.execute(_TENANT_BY_EITHER, {"tenant": name_or_id, "called": name_or_id})
            row = found.one_or_none()
            return None if row is None else _tenant(row)

        return await self._database.read(work)

    async def removed(self, tenant_ids: Collection[TenantId]) -> frozenset[TenantId]:
        """See `TenantBook.removed`."""
        there = select(tenants.c.tenant_id).where(
            tenants.c.tenant_id.in_(tenant_ids), tenants.c.removed_at.is_(None)
        )

        async def work(connection: Transaction) -> frozenset[TenantId]:
            return frozenset(tenant_ids).difference((await connection.execute(there)).scalars())

        return await self._database.read(work)

    async def set_rules(self, tenant_id: TenantId, rules: TenantRules) -> None:
        """See `TenantBook.set_rules`.

        Raises:
            NotFoundError: There is no such tenant.
        """
        await self.change_rules(tenant_id, lambda _rules: rules)

    async def change_rules(
        self, tenant_id: TenantId, change: Callable[[TenantRules], TenantRules], *, by: str | None = None
    ) -> TenantRow:
        """See `TenantBook.change_rules`."""
        its_row = select(tenants).where(tenants.c.tenant_id == tenant_id)

        async def work(connection: Transaction) -> TenantRow:
            await lock_tenant(connection, tenant_id)
            tenant = _tenant((await connection.execute(its_row)).one())
            changed = replace(tenant, rules=change(tenant.rules))
            await connection.execute(
                update(tenants)
                .where(tenants.c.tenant_id == tenant_id)
                .values(rules=_rules_as_json(changed.rules))
            )
            await self._note(connection, by, tenant_id, "SetRules", tenant_id)
            return changed

        return await self._database.write(work)

    async def remove_tenant(self, tenant_id: TenantId, *, by: str | None = None) -> None:
        """See `TenantBook.remove_tenant`. Its row stays, so that the ledger means somebody; its name is free.

        Raises:
            NotFoundError: There is no such tenant.
        """

        async def work(connection: Transaction) -> None:
            await lock_tenant(connection, tenant_id)
            await doom(self._database, connection, contexts.c.tenant_id == tenant_id)
            for table in (api_keys, runs, draws, usage, rooms):
                await connection.execute(delete(table).where(table.c.tenant_id == tenant_id))
            await connection.execute(
                update(tenants).where(tenants.c.tenant_id == tenant_id).values(removed_at=time.time())
            )
            await self._note(connection, by, tenant_id, "RemoveTenant", tenant_id)

        await self._database.write(work)
        await self._database.scrub()

    async def add_key(self, tenant_id: TenantId, role: Role, *, by: str | None = None) -> tuple[KeyRow, str]:
        """See `TenantBook.add_key`.

        Raises:
            NotFoundError: There is no such tenant.
        """
        row, key = _new_key(tenant_id, role)

        async def work(connection: Transaction) -> None:
            await lock_tenant(connection, tenant_id)
            await self._insert_key(connection, row, key, by)

        await self._database.write(work)
        return row, key

    async def _insert_key(self, connection: Transaction, row: KeyRow, key: str, by: str | None) -> None:
        await connection.execute(
            self._database.insert(api_keys).values(
                key_id=row.key_id,
                tenant_id=row.tenant_id,
                key_sha256=hash_of(key),
                role=row.role.value,
                hint=row.hint,
                created_at=row.created_at,
            )
        )
        await self._note(connection, by, row.tenant_id, "AddKey", row.key_id, detail=row.role.value)

    async def keys(self, tenant_id: TenantId) -> Sequence[KeyRow]:
        """See `TenantBook.keys`."""
        found = (
            select(api_keys)
            .where(api_keys.c.tenant_id == tenant_id)
            .order_by(api_keys.c.created_at, api_keys.c.key_id)
        )

        async def work(connection: Transaction) -> list[KeyRow]:
            return [_key(row) for row in await connection.execute(found)]

        return await self._database.read(work)

    async def revoke_key(self, tenant_id: TenantId, key_id: str, *, by: str | None = None) -> bool:
        """See `TenantBook.revoke_key`. One that was revoked before keeps its time."""
        its_key = (api_keys.c.tenant_id == tenant_id) & (api_keys.c.key_id == key_id)
        revoke = (
            update(api_keys).where(its_key, api_keys.c.revoked_at.is_(None)).values(revoked_at=time.time())
        )

        async def work(connection: Transaction) -> bool:
            await connection.execute(revoke)
            found = await connection.execute(select(api_keys.c.key_id).where(its_key))
            if found.one_or_none() is None:
                return False
            await self._note(connection, by, tenant_id, "RevokeKey", key_id)
            return True

        return await self._database.write(work)

    async def who_has(self, key: str) -> tuple[TenantRow, KeyRow] | None:
        """See `TenantBook.who_has`."""
        if not could_be_key(key, KEY_PREFIX):
            return None
        sha256 = hash_of(key)

        async def work(connection: Transaction) -> tuple[TenantRow, KeyRow] | None:
            key_row = (await connection.execute(_WHOSE, {"sha256": sha256})).one_or_none()
            if key_row is None:
                return None
            tenant_row = await connection.execute(_TENANT, {"tenant": key_row.tenant_id})
            return _tenant(tenant_row.one()), _key(key_row)

        return await self._database.read(work)

    async def opening(self, key_ids: Collection[str]) -> frozenset[str]:
        """See `TenantBook.opening`."""
        wanted, opening = sorted(key_ids), set[str]()
        for begin in range(0, len(wanted), _KEYS_IN_QUERY):
            opening |= await self._opening(wanted[begin : begin + _KEYS_IN_QUERY])
        return frozenset(opening)

    async def _opening(self, key_ids: Sequence[str]) -> set[str]:
        found = (
            select(api_keys.c.key_id)
            .join(tenants, tenants.c.tenant_id == api_keys.c.tenant_id)
            .where(api_keys.c.key_id.in_(key_ids))
            .where(api_keys.c.revoked_at.is_(None), tenants.c.removed_at.is_(None))
        )

        async def work(connection: Transaction) -> set[str]:
            return set((await connection.execute(found)).scalars())

        return await self._database.read(work)

    async def _note(
        self,
        connection: Transaction,
        by: str | None,
        tenant_id: TenantId,
        action: str,
        target: str,
        *,
        detail: str = "",
    ) -> None:
        if by is None:
            return
        row = AuditRow(
            at=time.time(), tenant_id=tenant_id, actor=by, action=action, target=target, detail=detail
        )
        await add_audit(self._database, connection, row)


def _new_tenant(name: str, rules: TenantRules) -> TenantRow:
    if not name.strip() or not name.isprintable() or len(name) > MAX_NAME_CHARS:
        raise InvalidRequestError(f"a tenant's name is 1 to {MAX_NAME_CHARS} printable characters")
    return TenantRow(tenant_id=new_tenant_id(), name=name, rules=rules, created_at=time.time())


def _new_key(tenant_id: TenantId, role: Role) -> tuple[KeyRow, str]:
    key = new_key(KEY_PREFIX)
    row = KeyRow(
        key_id=new_key_id(),
        tenant_id=tenant_id,
        role=role,
        hint=key[-HINT_CHARS:],
        created_at=time.time(),
        revoked_at=None,
    )
    return row, key


async def lock_tenant(connection: Transaction, tenant_id: TenantId) -> None:
    """Nobody else changes what counts against this tenant's limits, until the transaction ends.

    Raises:
        NotFoundError: It is not there any more.
    """
    found = await connection.execute(_LOCK, {"tenant": tenant_id})
    if found.one_or_none() is None:
        raise NotFoundError("there is no such tenant")


def _rules_as_json(rules: TenantRules) -> dict[str, Any]:
    plain = asdict(rules)
    return {
        **plain,
        "models": list(rules.models),
        "runtimes": list(rules.runtimes),
        "max_limits": dict(rules.max_limits),
    }


def rules_from_json(plain: dict[str, Any]) -> TenantRules:
    """Rules that were stored before a field was there have its default."""
    return TenantRules(
        **{
            **plain,
            "per_day": Quota(**plain["per_day"]),
            "per_month": Quota(**plain["per_month"]),
            "models": tuple(plain["models"]),
            "runtimes": tuple(plain["runtimes"]),
        }
    )


def _tenant(row: Row[Any]) -> TenantRow:
    return TenantRow(
        tenant_id=TenantId(row.tenant_id),
        name=row.name,
        rules=rules_from_json(row.rules),
        created_at=row.created_at,
    )


def _key(row: Row[Any]) -> KeyRow:
    return KeyRow(
        key_id=row.key_id,
        tenant_id=TenantId(row.tenant_id),
        role=Role(row.role),
        hint=row.hint,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
    )
