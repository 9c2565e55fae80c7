"""`rlm serve` as a process of its own, for tests."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
from rlm_proto.v1 import run_pb2_grpc

from orchestrator.config import Settings
from orchestrator.store.books import Role, TenantRules
from orchestrator.store.database import open_database
from orchestrator.store.sql_tenants import SqlTenantBook


class Process:
    """A server process that is ready."""

    def __init__(self, process: asyncio.subprocess.Process, grpc_address: str, http_address: str) -> None:
        self.process = process
        self.grpc = grpc_address
        self.http = http_address

    async def end(self, number: signal.Signals) -> int:
        """Send a signal and wait for the end."""
        self.process.send_signal(number)
        async with asyncio.timeout(60):
            return await self.process.wait()


@asynccontextmanager
async def serving(directory: Path, settings: Settings, script: str, **more: str) -> AsyncIterator[Process]:
    """A server on a state directory, for the length of the block or until its test has ended it.

    Its models are played by `script`, which finds in `LOG` a file to write to.
    """
    played = directory / "script.py"
    played.write_text(f"LOG = {str(directory / 'asked')!r}\n{script}")
    others = {
        name: value for name, value in os.environ.items() if not name.startswith(("RLM_", "ANTHROPIC_"))
    }
    ours = {"RLM_MODEL": f"scripted:{played}", "RLM_DRAIN_S": "0", "RLM_IMAGE": settings.image}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator", "serve",
        "--grpc", "127.0.0.1:0", "--http", "127.0.0.1:0", "--state-dir", str(directory / "state"),
        env={**others, **ours, **more},
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        async with asyncio.timeout(60):
            line = (await process.stdout.readline()).decode()
        found = re.fullmatch(r"ready: grpc (\S+), http (\S+)\n", line)
        assert found, line
        yield Process(process, found[1], found[2])
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def new_key(
    directory: Path, name: str = "acme", rules: TenantRules | None = None, *, store_url: str = ""
) -> str:
    """A tenant of the server's, made as an operator beside it would."""
    async with open_database(store_url or f"sqlite:///{directory / 'state' / 'service.db'}") as database:
        tenants = SqlTenantBook(database)
        tenant = await tenants.add_tenant(name, rules or TenantRules())
        return (await tenants.add_key(tenant.tenant_id, Role.ADMIN))[1]


@asynccontextmanager
async def client(server: Process, key: str) -> AsyncIterator[Callable[[str, Any], Any]]:
    """Calls a method by its name."""
    async with grpc.aio.insecure_channel(server.grpc) as channel:
        stub = run_pb2_grpc.RunServiceStub(channel)

        def call(method: str, request: Any) -> Any:
            return getattr(stub, method)(
                request, metadata=(("authorization", f"Bearer {key}"),), timeout=120.0
            )

        yield call
