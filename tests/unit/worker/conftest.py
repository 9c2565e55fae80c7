from collections.abc import AsyncIterator

import pytest_asyncio

from tests.unit.worker import host
from tests.unit.worker.host import Host


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def _worker() -> AsyncIterator[Host]:
    async with host.started() as worker:
        yield worker


@pytest_asyncio.fixture(loop_scope="module")
async def shared(_worker: Host) -> AsyncIterator[Host]:
    """A worker for all tests of a module, for those that need no namespace of their own."""
    _worker.broker.reset()
    yield _worker
    await _worker.settled()
