from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from orchestrator.server.serve import books_of
from orchestrator.service.books import Books
from orchestrator.store.database import open_database
from tests.fakes.service import new_database


@pytest.fixture
async def books(tmp_path: Path) -> AsyncIterator[Books]:
    """An empty database of the kind that one server has."""
    async with open_database(await new_database(tmp_path / "service.db")) as database:
        yield books_of(database)
