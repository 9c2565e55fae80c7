"""A server that is managed from afar: an operator's key, a tenant of its making, a run in a container."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from tests.containers import containers_of
from tests.e2e.serving import Process, serving
from tests.fakes.service import short_directory

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

SCRIPT = """
from orchestrator.models.scripted import Wait

def run(question, depth):
    yield "print(len(context))"
    if "slow" in question:
        yield Wait(600.0)
    yield "FINAL(f'{len(context)} characters')"
    return "no cell ended the run"
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


class Rlm:
    """Commands as people type them."""

    def __init__(self, directory: Path, *at: str, key: str = "") -> None:
        self._at = at
        self._environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(directory),
            "RLM_STATE_DIR": str(directory / "state"),
            "RLM_API_KEY": key,
        }

    async def __call__(self, *words: str, code: int = 0) -> Any:
        """What it printed as an object, or what it said on stderr when it is to fail."""
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator", *words, *self._at, "--json",
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode == code, (out, err)
        return json.loads(out) if code == 0 else err.decode()


async def test_a_tenant_is_added_asks_and_is_removed_through_the_server_with_an_operators_key(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    context = directory / "letter.txt"
    context.write_text("x" * 1_234)
    async with serving(directory, settings, SCRIPT) as server:
        made = await Rlm(directory)("keys", "add", "--operator")
        operator = through(directory, server, made["api_key"])
        added = await operator("tenants", "add", "acme", "--max-concurrent-runs", "2")
        acme = through(directory, server, added["api_key"])
        told = await acme("run", "How long?", "--context", str(context))
        assert (told["outcome"], told["answer"]) == ("answered", "1234 characters")
        assert "an operator's key is no tenant's" in await operator("runs", "list", code=2)

        (tenant,) = (await operator("tenants", "list"))["tenants"]
        assert (tenant["name"], tenant["rules"]["max_concurrent_runs"]) == ("acme", 2)
        await operator("tenants", "set", "acme", "--max-runs-per-day", "1")
        again = ("run", "How long?", "--context", str(context))
        assert "budget" in await acme(*again, code=2)
        await operator("tenants", "set", "acme", "--max-runs-per-day", "none")

        # As the runbook has it for a key that leaked: the new one first, then the old one goes.
        fresh = await acme("keys", "add", "--role", "admin")
        acme = through(directory, server, fresh["api_key"])
        (leaked,) = [key for key in (await acme("keys", "list"))["keys"] if key["key_id"] != fresh["key_id"]]
        assert leaked["hint"] == added["api_key"][-4:]
        await acme("keys", "revoke", leaked["key_id"])
        await through(directory, server, added["api_key"])("usage", code=2)

        asking = asyncio.create_task(acme("run", "How long, slow?", "--context", str(context), code=2))
        await until(lambda: bool(containers_of(engine, directory / "state")))
        gone = await operator("tenants", "remove", "acme")
        assert gone == {"tenant_id": added["tenant_id"], "removed": True}
        await until(lambda: not containers_of(engine, directory / "state"))
        await asking
        assert (await operator("tenants", "list"))["tenants"] == []
        files = [path for path in (directory / "state" / "service" / "contexts").rglob("*") if path.is_file()]
        await until(lambda: not any(path.exists() for path in files))

        await Rlm(directory)("keys", "revoke", made["key_id"], "--operator")
        await operator("tenants", "list", code=2)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - of what happens in other processes
            await asyncio.sleep(0.2)


def through(directory: Path, server: Process, key: str) -> Rlm:
    """Commands for a server, with a key."""
    return Rlm(directory, "--server", server.grpc, key=key)
