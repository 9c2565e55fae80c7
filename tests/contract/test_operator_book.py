"""What every OperatorBook must do, and what the changes of tenants leave in the audit log."""

import string

import pytest
from sqlalchemy import select

from orchestrator.errors import InvalidRequestError
from orchestrator.store.backend import Transaction
from orchestrator.store.books import OPERATOR_KEY_PREFIX, Role, TenantRules
from orchestrator.store.database import Database
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_operators import SqlOperatorBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.store.tables import metadata


@pytest.fixture
def book(database: Database) -> SqlOperatorBook:
    return SqlOperatorBook(database)


async def everything(database: Database) -> str:
    """All rows of all tables, as text."""

    async def work(connection: Transaction) -> str:
        rows = [
            str(tuple(row))
            for table in metadata.sorted_tables
            for row in await connection.execute(select(table))
        ]
        return "\n".join(rows)

    return await database.read(work)


async def test_an_operators_key_is_told_once_and_stored_as_a_hash(
    book: SqlOperatorBook, database: Database
) -> None:
    row, key = await book.add_key()
    assert key.startswith(OPERATOR_KEY_PREFIX)
    secret = key.removeprefix(OPERATOR_KEY_PREFIX)
    assert len(secret) == 40
    assert set(secret) <= set(string.ascii_letters + string.digits)
    assert row.hint == key[-4:]
    assert await book.who_has(key) == row
    assert await book.keys() == [row]
    assert secret[:-4] not in await everything(database)


@pytest.mark.parametrize("key", ["", "rlmop_", "rlmop_" + "0" * 40, "\0", "\ud800"])
async def test_nobody_has_an_unknown_key(book: SqlOperatorBook, key: str) -> None:
    await book.add_key()
    assert await book.who_has(key) is None


async def test_a_revoked_key_is_unknown_from_then_on_and_others_are_not(book: SqlOperatorBook) -> None:
    (old, old_key), (new, new_key) = await book.add_key(), await book.add_key()
    assert await book.revoke_key(old.key_id)
    assert await book.who_has(old_key) is None
    assert await book.who_has(new_key) == new
    first = (await book.keys())[0]
    assert first.revoked_at is not None
    assert await book.revoke_key(old.key_id)
    assert (await book.keys())[0] == first
    assert not await book.revoke_key("knone")


async def test_no_operators_key_is_a_tenants_and_no_tenants_an_operators(
    book: SqlOperatorBook, database: Database
) -> None:
    tenants = SqlTenantBook(database)
    anna = await tenants.add_tenant("anna", TenantRules())
    row, key = await tenants.add_key(anna.tenant_id, Role.ADMIN)
    operator, operators_key = await book.add_key()
    assert await tenants.who_has(operators_key) is None
    assert await book.who_has(key) is None
    assert not await book.revoke_key(row.key_id)
    assert not await tenants.revoke_key(anna.tenant_id, operator.key_id)
    await tenants.remove_tenant(anna.tenant_id)
    assert await book.who_has(operators_key) == operator


async def test_a_change_that_says_by_whom_is_in_the_audit_log_and_one_that_failed_is_not(
    book: SqlOperatorBook, database: Database
) -> None:
    tenants = SqlTenantBook(database)
    operator, _ = await book.add_key(by="operator")
    anna = await tenants.add_tenant("anna", TenantRules(), by="key:k1")
    with pytest.raises(InvalidRequestError):
        await tenants.add_tenant("anna", TenantRules(), by="key:k1")
    row, _ = await tenants.add_key(anna.tenant_id, Role.READ, by="key:k1")
    await tenants.change_rules(anna.tenant_id, lambda rules: rules, by="key:k1")
    assert not await tenants.revoke_key(anna.tenant_id, "knone", by="key:k1")
    assert await tenants.revoke_key(anna.tenant_id, row.key_id, by="key:k1")
    assert not await book.revoke_key("knone", by="operator")
    assert await book.revoke_key(operator.key_id, by="operator")
    await tenants.remove_tenant(anna.tenant_id, by="key:k1")
    written = [row for _, row in await SqlAuditBook(database).read()]
    assert [(one.action, one.actor, one.target, one.tenant_id, one.detail) for one in written] == [
        ("AddOperatorKey", "operator", operator.key_id, None, ""),
        ("AddTenant", "key:k1", anna.tenant_id, anna.tenant_id, ""),
        ("AddKey", "key:k1", row.key_id, anna.tenant_id, "read"),
        ("SetRules", "key:k1", anna.tenant_id, anna.tenant_id, ""),
        ("RevokeKey", "key:k1", row.key_id, anna.tenant_id, ""),
        ("RevokeOperatorKey", "operator", operator.key_id, None, ""),
        ("RemoveTenant", "key:k1", anna.tenant_id, anna.tenant_id, ""),
    ]


async def test_a_tenant_and_its_first_key_are_added_together_or_not_at_all(database: Database) -> None:
    tenants = SqlTenantBook(database)
    anna, row, key = await tenants.add_tenant_with_key("anna", TenantRules(), Role.ADMIN, by="operator")
    assert await tenants.who_has(key) == (anna, row)
    with pytest.raises(InvalidRequestError):
        await tenants.add_tenant_with_key("anna", TenantRules(), Role.ADMIN, by="operator")
    assert await tenants.keys(anna.tenant_id) == [row]
    actions = [one.action for _, one in await SqlAuditBook(database).read()]
    assert actions == ["AddTenant", "AddKey"]


async def test_tenants_are_listed_in_parts_and_those_removed_are_told_from_others(database: Database) -> None:
    tenants = SqlTenantBook(database)
    made = [await tenants.add_tenant(name, TenantRules()) for name in ("a", "b", "c")]
    assert await tenants.tenants(limit=2) == made[:2]
    assert await tenants.tenants(after="b") == made[2:]
    await tenants.remove_tenant(made[0].tenant_id)
    asked = [tenant.tenant_id for tenant in made]
    assert await tenants.removed(asked) == {made[0].tenant_id}
    assert await tenants.removed([]) == frozenset()
