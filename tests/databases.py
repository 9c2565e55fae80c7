"""Fixtures of tests in real databases: SQLite in a file, PostgreSQL in a container, each test with its own.

A conftest imports those it wants. Without engine or image the tests on PostgreSQL fail. They never skip.
"""

from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.store.database import Database, open_database
from tests.postgres.server import PostgresServer, postgres_server

SQLITE, POSTGRESQL = "sqlite", "postgresql"
DATABASES = [SQLITE, pytest.param(POSTGRESQL, marks=pytest.mark.docker)]
"""Every kind of database that we ship for."""


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One for all tests of a process; each has a database of its own in it."""
    with postgres_server() as server:
        yield server


@pytest.fixture
def new_store_url(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[str], str]:
    """Makes an empty database of the kind; its URL."""

    def make(kind: str) -> str:
        if kind == SQLITE:
            return f"sqlite:///{tmp_path}/rlm.db"
        server: PostgresServer = request.getfixturevalue("postgres")
        return server.new_database()

    return make


@pytest.fixture(params=DATABASES)
def store_url(request: pytest.FixtureRequest, new_store_url: Callable[[str], str]) -> str:
    """Of a database in which there is no table yet."""
    return new_store_url(request.param)


@pytest.fixture
async def database(store_url: str) -> AsyncIterator[Database]:
    async with open_database(store_url) as opened:
        yield opened
