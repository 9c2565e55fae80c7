"""The HTTP side of the service on a real port, with a fake office behind it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx2
from starlette.types import ASGIApp

from orchestrator.server.http.app import make_app
from orchestrator.server.http.listening import listening
from orchestrator.store.books import Role
from tests.fakes.office import FakeOffice, Play

ANN, BOB, READER, RUNNER = "rlm_ann", "rlm_bob", "rlm_reader", "rlm_runner"
"""Keys: two tenants' admins, and weaker ones of the first."""


@dataclass(slots=True)
class House:
    """A server and what is behind it."""

    office: FakeOffice
    url: str
    app: ASGIApp
    is_ready: bool = True

    @asynccontextmanager
    async def client(self, key: str | None = ANN) -> AsyncIterator[httpx2.AsyncClient]:
        """A plain HTTP client with a key."""
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        # Nothing is encrypted here: to read the system's certificates takes longer than most of these tests.
        house = httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=30, verify=False)
        async with house as client:
            yield client


@asynccontextmanager
async def http_house(play: Play | None = None) -> AsyncIterator[House]:
    """For the length of the block."""
    office = FakeOffice(play)
    office.add_key(ANN, "ann")
    office.add_key(BOB, "bob")
    office.add_key(READER, "ann", Role.READ)
    office.add_key(RUNNER, "ann", Role.RUN)
    house = House(office, "", app=None)  # type: ignore[arg-type] # made below, of the house itself
    house.app = make_app(office, lambda: house.is_ready)
    try:
        async with listening(house.app, host="127.0.0.1", port=0) as (host, port):
            house.url = f"http://{host}:{port}"
            yield house
    finally:
        await office.aclose()
