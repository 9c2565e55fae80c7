"""Provider processes for tests: real ones, asked to send to a fake provider, and none."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self, cast

from orchestrator.models.platforms import ANTHROPIC_URL, Platform
from orchestrator.models.provider.client import ProviderClient
from orchestrator.models.provider.connection import connect
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.provider.process import serve
from orchestrator.models.provider.sealed import SealedCredentials

KEY = "sk-ant-test-0123456789-canary"


def provider_at(
    url: str, key: str = KEY, *, platform: Platform | None = None, **credentials: str
) -> ProviderProcess:
    """A process that has the key and sends to the address; close it."""
    given = {**({"ANTHROPIC_API_KEY": key} if key else {}), **credentials}
    return ProviderProcess(SealedCredentials.of(given), base_url=url, platform=platform)


class _SameProcess:
    """What `connect` needs of a provider process, which is served here, in a task."""

    def __init__(self, url: str, channel: socket.socket) -> None:
        self.base_url = url
        self.platform = None
        self.channel = channel


@asynccontextmanager
async def served_here(url: str, **credentials: str) -> AsyncIterator[ProviderProcess]:
    """As if a provider process had been started: served by a task, over a real channel.

    Without the second that another process takes to start. By default it has the key.
    """
    ours, theirs = socket.socketpair()
    given = credentials or {"ANTHROPIC_API_KEY": KEY}
    serving = asyncio.create_task(serve(theirs, lambda: given))
    try:
        yield cast(ProviderProcess, _SameProcess(url or ANTHROPIC_URL, ours))
    finally:
        # Unless it was connected to and so ends by itself, as the process would.
        ours.close()
        await serving


@asynccontextmanager
async def provider_in_this_process(url: str, **credentials: str) -> AsyncIterator[ProviderClient]:
    """A client of `served_here`."""
    async with served_here(url, **credentials) as process:
        connection = await connect(process)
        try:
            yield connection.client
        finally:
            await connection.client.aclose()


class NoProcess:
    """Stands in for the process where nobody asks it anything; it would cost each test a second."""

    def __init__(self, credentials: SealedCredentials, **told: object) -> None:
        os.close(credentials.take())
        self.told = told
        self.is_open = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.is_open = False
