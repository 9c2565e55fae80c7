"""Opening a database: from nothing, by several at once, by an older version, by a URL that makes no sense."""

import asyncio
import hashlib
import secrets
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, make_url, text

from orchestrator.errors import StoreError
from orchestrator.store import migrate
from orchestrator.store.backend import Transaction
from orchestrator.store.books import Role, TenantRules
from orchestrator.store.database import Database, open_database
from orchestrator.store.postgresql import Postgresql
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_operators import SqlOperatorBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.store.tables import metadata
from tests.databases import POSTGRESQL

SECRET = "hunter2-hunter2"  # noqa: S105 - that must not be told


async def test_the_migrations_make_the_tables_that_the_code_uses(database: Database) -> None:
    def compare(connection: Connection) -> list[object]:
        return list(compare_metadata(MigrationContext.configure(connection), metadata))

    async def work(connection: Transaction) -> list[object]:
        return await connection.run_sync(compare)

    assert await database.read(work) == []


FILLED = """
INSERT INTO tenants (tenant_id, name, rules, created_at) VALUES ('tanna', :name, :rules, 1.5);
INSERT INTO api_keys (key_id, tenant_id, key_sha256, role, hint, created_at) VALUES
    ('kanna', 'tanna', :hash, 'admin', 'abcd', 2.5);
INSERT INTO audit (at, tenant_id, actor, action, target, detail) VALUES
    (3.5, 'tanna', :actor, :action, :target, :detail)
"""
"""Of a database that the first version made, in the words of its day."""


async def test_a_database_of_the_first_version_is_brought_up_to_date_and_keeps_what_it_has(
    store_url: str,
) -> None:
    key = "rlm_" + "k" * 40
    values = {
        "name": b"Anna",
        "rules": '{"per_day":{"max_tokens":5,"max_cost_microusd":null,"max_runs":null},'
        '"per_month":{"max_tokens":null,"max_cost_microusd":null,"max_runs":null},"max_concurrent_runs":3,'
        '"max_queued_runs":4,"models":["m"],"runtimes":[],"max_limits":{"max_depth":1},'
        '"max_context_bytes":99,"retention_days":null}',
        "hash": hashlib.sha256(key.encode()).digest(),
        "actor": b"operator",
        "action": b"AddTenant",
        "target": b"tanna",
        "detail": b"",
    }

    async def fill(connection: Transaction) -> None:
        for statement in FILLED.split(";"):
            its = {name: value for name, value in values.items() if f":{name}" in statement}
            await connection.execute(text(statement).bindparams(**its))

    async with open_database(store_url, up_to="r0001") as old:
        await old.write(fill)
    async with open_database(store_url) as database:
        found = await SqlTenantBook(database).who_has(key)
        assert found is not None
        tenant, row = found
        assert (tenant.name, tenant.created_at, row.key_id, row.role) == ("Anna", 1.5, "kanna", Role.ADMIN)
        assert tenant.rules.per_day.max_tokens == 5
        assert dict(tenant.rules.max_limits) == {"max_depth": 1}
        ((_, written),) = await SqlAuditBook(database).read()
        assert (written.at, written.actor, written.action) == (3.5, "operator", "AddTenant")
        operators = SqlOperatorBook(database)
        made, fresh = await operators.add_key()
        assert await operators.who_has(fresh) == made


async def test_the_migrations_have_one_head() -> None:
    scripts = ScriptDirectory(str(Path(migrate.__file__).parent / "migrations"))
    assert len(scripts.get_heads()) == 1


async def test_several_may_open_an_empty_database_at_once(store_url: str) -> None:
    async def use(name: str) -> None:
        async with open_database(store_url) as database:
            await SqlTenantBook(database).add_tenant(name, TenantRules())

    await asyncio.gather(*(use(f"tenant {number}") for number in range(4)))
    async with open_database(store_url) as database:
        assert len(await SqlTenantBook(database).tenants()) == 4


async def test_what_was_written_is_there_when_it_is_opened_again(store_url: str) -> None:
    async with open_database(store_url) as database:
        added = await SqlTenantBook(database).add_tenant("anna", TenantRules())
    async with open_database(store_url) as database:
        await database.ping()
        assert await SqlTenantBook(database).tenants() == [added]


async def test_five_hundred_readers_at_once_get_their_turn_and_writers_go_on(database: Database) -> None:
    async def read(connection: Transaction) -> int:
        one: int = (await connection.execute(text("SELECT 1"))).scalar_one()
        return one

    tenants = SqlTenantBook(database)
    reading = asyncio.gather(*(database.read(read) for _ in range(500)))
    await asyncio.gather(*(tenants.add_tenant(f"tenant {number}", TenantRules()) for number in range(10)))
    assert await reading == [1] * 500
    assert len(await tenants.tenants()) == 10


async def test_a_later_versions_database_is_left_alone(store_url: str) -> None:
    async with open_database(store_url) as database:

        async def work(connection: Transaction) -> None:
            await connection.execute(text("UPDATE alembic_version SET version_num = 'r9999'"))

        await database.write(work)
    with pytest.raises(StoreError, match="later version"):
        async with open_database(store_url):
            pass


async def test_a_failed_statement_tells_nothing_of_its_values(database: Database) -> None:
    async def work(connection: Transaction) -> None:
        await connection.execute(text("SELECT :value FROM nowhere"), {"value": SECRET})

    with pytest.raises(StoreError) as raised:
        await database.read(work)
    error: BaseException | None = raised.value
    while error is not None:
        assert SECRET not in str(error)
        error = error.__cause__


@pytest.mark.parametrize(
    "url",
    [
        "",
        "rlm.db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:///rlm.db?mode=memory",
        f"mysql://root:{SECRET}@localhost/rlm",
        f"postgresql+psycopg://root:{SECRET}@localhost/rlm",
        f"postgresql://root:{SECRET}@localhost:port/rlm",
        f"://{SECRET}",
    ],
)
async def test_a_url_that_makes_no_sense_is_not_repeated(url: str) -> None:
    with pytest.raises(StoreError) as raised:
        async with open_database(url, patience_s=0):
            pass
    assert SECRET not in str(raised.value)


async def test_a_file_whose_directory_is_missing_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(StoreError):
        async with open_database(f"sqlite:///{tmp_path}/missing/rlm.db"):
            pass


async def test_a_file_of_another_kind_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "letter.txt"
    file.write_bytes(b"Dear Anna, " * 1_000)
    with pytest.raises(StoreError, match="another kind"):
        async with open_database(f"sqlite:///{file}"):
            pass
    assert file.read_bytes() == b"Dear Anna, " * 1_000


async def test_the_file_is_its_owners_alone(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/rlm.db") as database:
        await SqlTenantBook(database).add_tenant("anna", TenantRules())
        modes = modes_of(tmp_path)
    assert set(modes.values()) == {0o600}
    assert {"rlm.db", "rlm.db-wal"} <= set(modes)


async def test_of_what_was_deleted_no_byte_stays_in_the_file_or_its_journal(tmp_path: Path) -> None:
    canary = secrets.token_hex(16)
    async with open_database(f"sqlite:///{tmp_path}/rlm.db") as database:
        tenants = SqlTenantBook(database)
        anna = await tenants.add_tenant("anna", TenantRules(models=(canary,) * 300))
        assert canary.encode() in all_bytes(tmp_path)
        await tenants.set_rules(anna.tenant_id, TenantRules())
        await database.scrub()
        assert canary.encode() not in all_bytes(tmp_path)


def modes_of(directory: Path) -> dict[str, int]:
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in directory.iterdir()}


def all_bytes(directory: Path) -> bytes:
    return b"".join(path.read_bytes() for path in directory.iterdir())


async def test_a_server_that_is_not_there_is_told_by_its_place_without_a_secret(tmp_path: Path) -> None:
    url = f"postgresql://anna:{SECRET}@/books?host={tmp_path}"
    with pytest.raises(StoreError, match="the database books does not answer") as raised:
        async with open_database(url, patience_s=0):
            pass
    assert SECRET not in str(raised.value)


@pytest.mark.docker
async def test_a_wrong_password_is_told_as_that(new_store_url: Callable[[str], str]) -> None:
    user, _, rest = new_store_url(POSTGRESQL).rpartition("@")
    url = f"{user.rpartition(':')[0]}:{SECRET}@{rest}"
    with pytest.raises(StoreError, match="refuses the user or the password") as raised:
        async with open_database(url):
            pass
    assert SECRET not in str(raised.value)


@pytest.mark.docker
async def test_a_database_that_the_server_lacks_is_told_as_that(new_store_url: Callable[[str], str]) -> None:
    with pytest.raises(StoreError, match="does not exist"):
        async with open_database(new_store_url(POSTGRESQL).replace("/rlm_", "/none_")):
            pass


@pytest.mark.docker
async def test_a_transaction_whose_number_was_lost_in_a_crash_was_not_committed(
    new_store_url: Callable[[str], str],
) -> None:
    url = new_store_url(POSTGRESQL)
    backend = Postgresql(make_url(url), url)
    try:
        assert await backend.was_committed(str(10**12)) is False
    finally:
        await backend.close()
