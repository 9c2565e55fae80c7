"""`rlm serve` as a process, real containers, a scripted model: through its whole life."""

import json
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from tests.containers import containers_of
from tests.e2e.serving import client, new_key, serving
from tests.fakes.service import short_directory

pytestmark = [pytest.mark.docker, pytest.mark.timeout(240)]

# The answer needs what the first cell put into the namespace, and what a sub-call said before the kill.
SCRIPT = """
from orchestrator.models.scripted import Wait

def run(question, depth):
    yield "import random\\nnumber = random.random()\\nsaid = llm_query('how are you?')\\nprint(number)"
    if "slow" in question:
        yield Wait(2.0)
    yield "FINAL(f'{said} {len(context)} {number}')"
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


def asking(key: str, question: bytes, runtime: str = "") -> pb.CreateRunRequest:
    return pb.CreateRunRequest(
        idempotency_key=key, question=question, text=b"x" * 100, options=pb.RunOptions(runtime=runtime)
    )


async def kinds(call: Callable[[str, Any], Any], run_id: str, last: str = "") -> Sequence[dict[str, Any]]:
    """Events from the first on, up to the first of a kind, or to the run's end."""
    events: list[dict[str, Any]] = []
    async for told in call("WatchRun", pb.WatchRunRequest(run_id=run_id)):
        events.append(json.loads(told.event_json))
        if events[-1]["kind"] == last:
            break
    return events


async def test_a_question_is_answered_in_a_container_and_sigterm_ends_it_all(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    async with serving(directory, settings, SCRIPT) as server:
        key = await new_key(directory)
        async with client(server, key) as call:
            run = (await call("CreateRun", asking("1", b"How many?"))).run
            events = await kinds(call, run.run_id)
            assert events[-1]["outcome"] == "answered"
            told = (await call("GetRun", pb.GetRunRequest(run_id=run.run_id))).run
            assert told.answer.startswith(b"fine 100 0.")
        assert await server.end(signal.SIGTERM) == 0
    assert not containers_of(engine, directory / "state")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
async def test_a_server_that_ends_in_the_middle_of_a_run_is_followed_by_one_that_answers_it(
    directory: Path,
    settings: Settings,
    engine: DockerClient,
    number: signal.Signals,
) -> None:
    async with serving(directory, settings, SCRIPT) as server:
        key = await new_key(directory)
        async with client(server, key) as call:
            run = (await call("CreateRun", asking("1", b"How many, slowly? (slow)"))).run
            before = await kinds(call, run.run_id, last="cell_ended")
        await server.end(number)
    async with serving(directory, settings, SCRIPT) as server, client(server, key) as call:
        after = await kinds(call, run.run_id)
        told = (await call("GetRun", pb.GetRunRequest(run_id=run.run_id))).run
        printed = before[-1]["output"].strip()
        assert after[: len(before)] == before
        assert (told.outcome, told.answer.decode()) == ("answered", f"fine 100 {printed}")
        assert told.resumed == 1
        assert (directory / "asked").read_text() == "how are you?\n", "no answer was paid for twice"
        again = await call("CreateRun", asking("1", b"How many, slowly? (slow)"))
        assert again.existed
        assert await server.end(signal.SIGTERM) == 0
    assert not containers_of(engine, directory / "state")


@pytest.mark.runsc
async def test_one_server_has_runs_on_both_runtimes_and_offers_no_other(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    async with serving(directory, settings, SCRIPT, RLM_RUNTIMES="runsc,runc") as server:
        key = await new_key(directory)
        async with client(server, key) as call:
            runs = {
                asked: (await call("CreateRun", asking(asked or "any", b"How many?", asked))).run
                for asked in ("", "runc", "runsc")
            }
            for asked, run in runs.items():
                assert run.options.runtime == (asked or "runsc")
                events = await kinds(call, run.run_id)
                (leased,) = [event for event in events if event["kind"] == "sandbox_leased"]
                assert leased["runtime"] == run.options.runtime
                assert events[-1]["outcome"] == "answered"
        assert await server.end(signal.SIGTERM) == 0
    assert not containers_of(engine, directory / "state")
