"""`rlm run --server`, whose server is killed in the middle: the command waits, and takes up where it was."""

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from orchestrator.config import Settings
from tests.e2e.serving import new_key, serving
from tests.fakes.relay import relayed
from tests.fakes.service import short_directory

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]

SCRIPT = """
from orchestrator.models.scripted import Wait

def run(question, depth):
    yield "said = llm_query('how are you?')\\nprint(said)"
    yield Wait(3.0)
    yield "FINAL(f'{said} {len(context)}')"
    return "no cell ended the run"

def complete(prompt):
    with open(LOG, "a") as log:
        log.write(prompt + "\\n")
    return "fine"
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@asynccontextmanager
async def asking(address: str, key: str, *words: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "orchestrator", *words, "--server", address,
        env={"PATH": os.environ["PATH"], "RLM_API_KEY": key},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def said_until(process: asyncio.subprocess.Process, words: str) -> str:
    assert process.stderr is not None
    said = ""
    async for line in process.stderr:
        said += line.decode()
        if words in said:
            return said
    raise AssertionError(said)


async def test_a_command_whose_server_is_killed_and_followed_by_another_prints_the_answer(
    directory: Path, settings: Settings, tmp_path: Path
) -> None:
    context, events = tmp_path / "context.txt", tmp_path / "events.jsonl"
    context.write_text("x" * 100)
    words = ("run", "How many?", "--context", str(context), "--events", str(events))
    async with serving(directory, settings, SCRIPT) as server, relayed(server.grpc) as (relay, address):
        key = await new_key(directory)
        async with asking(address, key, *words) as process:
            said = await said_until(process, "turn 2: asking the model")
            await server.end(signal.SIGKILL)
            said += await said_until(process, "does not answer")
            async with serving(directory, settings, SCRIPT) as following:
                relay.target = following.grpc
                stdout, rest = await process.communicate()
    said += rest.decode()
    assert process.returncode == 0, said
    assert stdout == b"fine 100\n"
    lines = [line for line in said.splitlines() if address in line]
    assert len([line for line in lines if "does not answer" in line]) == 1
    assert len([line for line in lines if "is back; going on from event" in line]) == 1
    kinds = [(told["run_id"], told["seq"]) for told in map(json.loads, events.read_text().splitlines())]
    assert [seq for _run_id, seq in kinds] == list(range(len(kinds))), "no gap and no repeat"
    assert (directory / "asked").read_text() == "how are you?\n", "no answer was paid for twice"
