"""The client library and the commands on top of it, against the real service on a real port."""

import asyncio
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.client import Client, Patience, RunState, SyncClient
from orchestrator.errors import NotAllowedError, NotFoundError, UnauthenticatedError, UnavailableError
from tests.fakes.model import FakeModel, runs
from tests.fakes.service import Account, Server, open_server, short_directory

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[Server]:
    async with open_server(directory, FakeModel(otherwise=runs("FINAL('forty-two')"))) as one:
        yield one


@pytest.fixture
async def account(server: Server) -> Account:
    return await server.account("acme")


async def test_a_question_about_a_directory_is_asked_and_answered_in_one_call(
    server: Server, account: Account, tmp_path: Path
) -> None:
    (tmp_path / "one.txt").write_text("one")
    (tmp_path / "link").symlink_to("one.txt")
    heard: list[tuple[int, str]] = []
    async with Client(server.port.address, api_key=account.run) as client:
        answer = await client.ask(
            "How many?",
            tmp_path,
            on_event=lambda position, event: heard.append((position, str(event["kind"]))),
        )
        assert answer.text == "forty-two"
        assert (answer.run.state, answer.run.outcome) == (RunState.ENDED, "answered")
        assert [position for position, _ in heard] == list(range(len(heard)))
        assert (heard[0][1], heard[-1][1]) == ("run_started", "run_ended")
        assert answer.notes, "that a link was left out"
        (context,) = [one async for one in client.list_contexts()]
        assert context.context_id == answer.run.context_id
        again = await client.upload(tmp_path)
        assert (again.existed, again.context_id) == (True, context.context_id)
        assert [run.run_id async for run in client.list_runs()] == [answer.run.run_id]
        assert (await client.get_usage()).day.tokens == answer.run.confirmed.tokens > 0


async def test_one_key_is_one_run_however_often_it_is_sent(server: Server, account: Account) -> None:
    async with Client(server.port.address, api_key=account.run) as client:
        first = await client.create_run("How many?", text="text", idempotency_key="k")
        second = await client.create_run("How many?", text="text", idempotency_key="k")
    assert (first.existed, second.existed) == (False, True)
    assert first.run.run_id == second.run.run_id


async def test_errors_come_back_as_what_they_were(server: Server, account: Account) -> None:
    async with Client(server.port.address, api_key=account.read) as client:
        with pytest.raises(NotFoundError):
            await client.get_run("r" + "0" * 20)
        with pytest.raises(NotAllowedError):
            await client.create_run("How many?", text="text")
    async with Client(server.port.address, api_key="rlm_" + "x" * 40) as client:
        with pytest.raises(UnauthenticatedError):
            await client.get_usage()


async def test_a_server_that_stays_away_is_given_up_in_one_sentence() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
    patience = Patience(call_s=0.5, watch_s=0.5)
    async with Client(address, api_key="rlm_" + "x" * 40, patience=patience) as client:
        with pytest.raises(UnavailableError):
            await client.get_usage()


class Relay:
    """A port of its own in front of a server, whose connections can be cut."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self.made = 0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        theirs = await asyncio.open_connection(self._host, int(self._port))
        self._writers |= {writer, theirs[1]}
        await asyncio.gather(_pipe(reader, theirs[1]), _pipe(theirs[0], writer))

    def cut(self) -> None:
        """All connections, in the middle of whatever they carry."""
        for writer in self._writers:
            writer.transport.abort()
        self._writers.clear()


async def _pipe(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()


async def test_a_watch_goes_on_where_it_was_when_its_connection_breaks(
    server: Server, account: Account
) -> None:
    relay = Relay(server.port.address)
    said: list[str] = []
    async with (
        await asyncio.start_server(relay, "127.0.0.1", 0) as listening,
        Client(
            f"127.0.0.1:{listening.sockets[0].getsockname()[1]}", api_key=account.run, say=said.append
        ) as client,
    ):
        run_id = (await client.create_run("How many?", text="text")).run.run_id
        await client.wait(run_id)
        positions = []
        async for position, _ in client.watch(run_id):
            positions.append(position)
            if position == 3:
                relay.cut()
        assert positions == list(range(len(positions)))
        assert len(positions) > 4
        relay.cut()


async def test_without_a_loop_of_ones_own_the_same_can_be_asked(server: Server, account: Account) -> None:
    def ask() -> str | None:
        with SyncClient(server.port.address, api_key=account.run) as client:
            return client.ask("How many?", "text").text

    assert await asyncio.to_thread(ask) == "forty-two"


# --- The commands ------------------------------------------------------------------------------------------

Rlm = Callable[..., Any]


@pytest.fixture
def rlm(server: Server, account: Account, tmp_path: Path) -> Rlm:
    """Runs `rlm` as a user of the server does."""

    async def command(*words: str, key: str = account.admin, code: int = 0) -> str:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator", *words,
            env={"PATH": os.environ["PATH"], "HOME": str(tmp_path), "RLM_API_KEY": key},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode == code, (out, err)
        return out.decode()

    return command


async def test_a_run_on_a_server_looks_like_one_here_and_its_commands_show_it(
    rlm: Rlm, server: Server, tmp_path: Path
) -> None:
    context = tmp_path / "context.txt"
    context.write_text("some text")
    at = ("--server", server.port.address)
    assert await rlm("run", "How many?", "--context", str(context), *at) == "forty-two\n"
    told = json.loads(await rlm("run", "How many?", "--context", str(context), "--json", *at))
    assert (told["outcome"], told["answer"]) == ("answered", "forty-two")
    listed = json.loads(await rlm("runs", "list", "--json", *at))
    assert len(listed["runs"] if isinstance(listed, dict) else listed) == 2
    run_id = told["run_id"]
    assert "forty-two" in await rlm("runs", "show", run_id, *at)
    assert "forty-two" in await rlm("runs", "watch", run_id, *at)
    await rlm("runs", "export", run_id, str(tmp_path / "export"), *at)
    assert list((tmp_path / "export").iterdir())
    await rlm("runs", "delete", run_id, *at)
    await rlm("runs", "show", run_id, *at, code=2)


async def test_a_key_that_is_none_is_told_in_one_sentence(rlm: Rlm, server: Server) -> None:
    await rlm("usage", "--server", server.port.address, key="rlm_" + "x" * 40, code=2)


async def test_tenants_and_keys_are_managed_beside_the_server(rlm: Rlm, directory: Path) -> None:
    store = ("--store", f"sqlite:///{directory}/service.db")
    made = json.loads(await rlm("tenants", "add", "other", "--max-runs-per-day", "3", "--json", *store))
    assert made["tenant_id"]
    assert made["api_key"].startswith("rlm_")
    assert "other" in await rlm("tenants", "list", *store)
    assert "admin" in await rlm("keys", "list", "other", *store)
    await rlm("tenants", "set", "other", "--max-runs-per-day", "none", *store)
