"""A backup of a server that runs, and its restore: the commands of docs/runbook.md, on both databases."""

import shutil
import signal
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from orchestrator.store.books import Role, TenantRules
from orchestrator.store.database import open_database
from orchestrator.store.sql_tenants import SqlTenantBook
from tests.containers import containers_of
from tests.databases import POSTGRESQL, SQLITE, postgres
from tests.e2e.serving import client, serving
from tests.fakes.service import short_directory
from tests.postgres.server import PostgresServer

__all__ = ["postgres"]

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]

SCRIPT = """
from orchestrator.models.scripted import Wait

def run(question, depth):
    yield "said = llm_query('how are you?')\\nprint(said)"
    if "slow" in question:
        yield Wait(5.0)
    yield "FINAL(f'{said} {len(context)}')"

def complete(prompt):
    with open(LOG, "a") as log:
        log.write(prompt + "\\n")
    return "fine"
"""


class Kept(ABC):
    """A server's database, and what an administrator does to it."""

    url: str

    @abstractmethod
    def back_up(self, target: Path) -> None:
        """While the server runs."""

    @abstractmethod
    def lose(self) -> None:
        """All of it."""

    @abstractmethod
    def restore(self, source: Path) -> None:
        """Before a server starts; `url` may be another afterwards."""


class KeptInFile(Kept):
    def __init__(self, state: Path) -> None:
        self._file = state / "service.db"
        self.url = f"sqlite:///{self._file}"

    def back_up(self, target: Path) -> None:
        # What `sqlite3 service.db "VACUUM INTO 'copy.db'"` does.
        with closing(sqlite3.connect(self._file)) as database:
            database.execute("VACUUM INTO ?", (str(target),))

    def lose(self) -> None:
        for file in self._file.parent.glob("service.db*"):
            file.unlink()

    def restore(self, source: Path) -> None:
        shutil.copy(source, self._file)


class KeptInPostgres(Kept):
    def __init__(self, server: PostgresServer) -> None:
        self._server = server
        self.url = server.new_database()

    @property
    def _name(self) -> str:
        return self.url.partition("@/")[2].partition("?")[0]

    def back_up(self, target: Path) -> None:
        target.write_text(self._server.run("pg_dump", self._name))

    def lose(self) -> None:
        self._server.run("dropdb", "--force", self._name)

    def restore(self, source: Path) -> None:
        self.url = self._server.new_database()
        script = self._server.sockets / "restore.sql"
        shutil.copy(source, script)
        script.chmod(0o644)
        self._server.run(
            "psql", "--quiet", "-v", "ON_ERROR_STOP=1", "-d", self._name, "-f", "/sockets/restore.sql"
        )
        script.unlink()


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        (path / "state").mkdir(mode=0o700)
        yield path


@pytest.fixture(params=[SQLITE, pytest.param(POSTGRESQL, marks=[pytest.mark.docker, pytest.mark.long])])
def kept(request: pytest.FixtureRequest, directory: Path) -> Kept:
    if request.param == POSTGRESQL:
        return KeptInPostgres(request.getfixturevalue("postgres"))
    return KeptInFile(directory / "state")


async def new_key(url: str) -> str:
    async with open_database(url) as database:
        tenants = SqlTenantBook(database)
        tenant = await tenants.add_tenant("acme", TenantRules())
        return (await tenants.add_key(tenant.tenant_id, Role.RUN))[1]


async def started(call: Callable[[str, Any], Any], question: str) -> str:
    asked = pb.CreateRunRequest(idempotency_key=question, question=question.encode(), text=b"x" * 100)
    return str((await call("CreateRun", asked)).run.run_id)


async def watched(call: Callable[[str, Any], Any], run_id: str, until: bytes = b"") -> None:
    """To its end, or to the first event of a kind."""
    async for told in call("WatchRun", pb.WatchRunRequest(run_id=run_id)):
        if until and until in told.event_json:
            return


async def test_what_was_backed_up_while_the_server_ran_is_there_after_all_was_lost(
    directory: Path, settings: Settings, engine: DockerClient, kept: Kept
) -> None:
    state, backup = directory / "state", directory / "backup"
    async with serving(directory, settings, SCRIPT, RLM_STORE=kept.url) as server:
        key = await new_key(kept.url)
        async with client(server, key) as call:
            before = await started(call, "How many?")
            await watched(call, before)
            live = await started(call, "How many, slowly? (slow)")
            await watched(call, live, until=b'"cell_ended"')
            # The database first: a file without a row is removed, a row without its file would end its runs.
            kept.back_up(backup)
            shutil.copytree(state / "service", directory / "files")
            after = await started(call, "Too late for the backup")
            await watched(call, after)
        await server.end(signal.SIGKILL)
    kept.lose()
    shutil.rmtree(state / "service")

    kept.restore(backup)
    shutil.copytree(directory / "files", state / "service")
    async with (
        serving(directory, settings, SCRIPT, RLM_STORE=kept.url) as server,
        client(server, key) as call,
    ):
        for run_id in (before, live):
            await watched(call, run_id)
            told = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
            assert (told.outcome, told.answer) == ("answered", b"fine 100")
        with pytest.raises(grpc.aio.AioRpcError) as absent:
            await call("GetRun", pb.GetRunRequest(run_id=after))
        assert absent.value.code() is grpc.StatusCode.NOT_FOUND
        # A context is a file: a further question on it shows that it is there too.
        more = pb.ContinueRunRequest(run_id=before, idempotency_key="more", question=b"And again?")
        run_id = (await call("ContinueRun", more)).run.run_id
        await watched(call, run_id)
        assert (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run.answer == b"fine 100"
        assert await server.end(signal.SIGTERM) == 0
    assert not containers_of(engine, state)
