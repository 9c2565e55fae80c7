"""Words that nobody but their owner may ever see, planted, and looked for wherever they could have got to.

The provider's key of a whole `rlm` (N01), in its processes and in all it writes; one tenant's text beside
another's hostile run (Q06). Each search has a control: it finds what is there.
"""

import asyncio
import json
import os
import secrets
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.turn import Outcome
from tests.containers import containers_of
from tests.fakes import anthropic_server as fake
from tests.security import hostile_cells as deeds
from tests.security.house import House, Script, Story, open_house, until
from tests.wire.test_key_at_rest import is_in_memory

pytestmark = pytest.mark.parametrize("runtime", ["runc"])

EVERYTHING = """
import glob, json, os
def ask(prompt):
    try: return llm_query(prompt)
    except BaseException as error: return f"{type(error).__name__}: {error} {error.args} {error.__cause__}"
seen = {"environment": dict(os.environ), "asked": [ask(prompt) for prompt in ("401", "400", "500", "leak")]}
seen["files"] = {}
for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline") + glob.glob("/etc/*"):
    try: seen["files"][path] = open(path, errors="replace").read()[:10_000]
    except OSError: pass
print(json.dumps(seen))
"""
UNCAUGHT = "print('about to fail')\nllm_query('401')"
CHILD = "print(rlm_query('What do you see?', 'a text'))"
HOLD = "llm_query('hold')"
ANSWER = "FINAL(json.dumps(seen))"
CELLS = (deeds.LOOK, EVERYTHING, UNCAUGHT, CHILD, "import os\nos._exit(3)", EVERYTHING, HOLD, ANSWER)


class Careless:
    """A provider that repeats the key in every refusal, and a model that does as it is told."""

    def __init__(self, key: str) -> None:
        self._key = key
        self.held = asyncio.Event()
        self.go_on = asyncio.Event()

    async def respond(self, request: dict[str, Any]) -> fake.Play:
        if "tools" in request:
            turns = sum(message["role"] == "assistant" for message in request["messages"])
            is_child = "Depth: 1" in json.dumps(request["messages"][0])
            return fake.Call(EVERYTHING + ANSWER if is_child else CELLS[turns])
        match request["messages"][0]["content"][0]["text"]:
            case "401":
                return fake.Refuse(401, "authentication_error", message=f"invalid key: Bearer {self._key}")
            case "400":
                return fake.Refuse(400, "invalid_request_error", message=f"Authorization: {self._key}")
            case "500":
                headers = {"x-key": self._key, "x-should-retry": "false"}
                return fake.Refuse(400, "api_error", message=f"<html>{self._key}</html>", headers=headers)
            case "leak":
                return fake.Say(f"Your key is {self._key}.")
            case "hold":
                self.held.set()
                await self.go_on.wait()
        return fake.Say("done")


@pytest.mark.case("N01", "G16", "J08")
@pytest.mark.timeout(120)
async def test_n01_the_key_of_a_whole_rlm_is_nowhere_but_in_the_process_that_sends_it(
    settings: Settings, engine: DockerClient, runtime: str, tmp_path: Path
) -> None:
    key, secret = f"sk-ant-canary-{secrets.token_hex(16)}", f"canary-{secrets.token_hex(16)}"
    question, events = f"question {secrets.token_hex(16)}", tmp_path / "events.jsonl"
    (tmp_path / "context.txt").write_text("nothing to see")
    careless = Careless(key)
    async with fake.serve(careless.respond) as server:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "orchestrator", "run", question, "--json"),
            *("--context", str(tmp_path / "context.txt"), "--events", str(events)),
            *("--base-url", server.url, "--model", "claude-haiku-5-5", "--runtime", runtime),
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(tmp_path),
                "RLM_STATE_DIR": str(settings.state_dir),
                "RLM_IMAGE": settings.image,
                "ANTHROPIC_API_KEY": key,
                "A_SECRET_OF_THE_OPERATORS": secret,
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(60):
                await careless.held.wait()
            found = await asyncio.to_thread(
                _search, process.pid, engine, settings, Words(key, secret, question)
            )
            careless.go_on.set()
            out, err = await process.communicate()
        finally:
            if process.returncode is None:
                process.terminate()
                await process.wait()
    assert found == []
    report = json.loads(out)
    assert report["outcome"] == "answered", report
    assert "Authorization" not in report["answer"]
    for what, words in {
        "the report": out,
        "what it says to people": err,
        "the events": events.read_bytes(),
        "what was asked": json.dumps([one.body for one in server.log]).encode(),
    }.items():
        assert key.encode() not in words, what
        assert secret.encode() not in words, what
    assert sum("401" in one.outcome for one in server.log) >= 3, "it was repeated to us"
    assert all(key in one.headers["authorization"] for one in server.log), "the provider got it"


class Words(NamedTuple):
    """What is looked for."""

    key: str
    secret: str
    """Of the operator's, in the orchestrator's environment: no guest's business either."""
    question: str
    """The control."""


def _search(pid: int, engine: DockerClient, settings: Settings, words: Words) -> list[str]:
    """Where the key, or the operator's other secret, is and must not be, while the run goes on."""
    key, secret, question = words
    places: dict[str, bytes] = {
        "the orchestrator's environment": Path(f"/proc/{pid}/environ")
        .read_bytes()
        .replace(secret.encode(), b""),
        "the orchestrator's command line": Path(f"/proc/{pid}/cmdline").read_bytes(),
        "the image": json.dumps(engine.images.get(settings.image).attrs).encode(),
        "the image's history": json.dumps(engine.images.get(settings.image).history()).encode(),
    }
    containers = containers_of(engine, settings.state_dir)
    assert containers
    for container in containers:
        inspected = engine.api.inspect_container(container)
        places[f"container {container[:8]}"] = json.dumps(inspected).encode()
        for guest in engine.api.top(container)["Processes"]:
            guest_pid = int(guest[1])
            for name in ("environ", "cmdline"):
                places[f"/proc/{guest_pid}/{name} of a guest"] = Path(
                    f"/proc/{guest_pid}/{name}"
                ).read_bytes()
            for what, word in (("the key", key), ("the secret", secret)):
                if is_in_memory(word, guest_pid):
                    places[f"{what} in a guest's memory"] = word.encode()
    for file in _files_below(settings.state_dir):
        places[f"{file}"] = file.read_bytes()
    if is_in_memory(key, pid):
        places["the orchestrator's memory"] = key.encode()
    # The controls: what is there is found.
    assert is_in_memory(question, pid)
    assert is_in_memory(secret, pid)
    assert any(is_in_memory(key, child) for child in _children(pid))
    return [place for place, data in places.items() if key.encode() in data or secret.encode() in data]


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _files_below(directory: Path) -> Iterator[Path]:
    for place, _, names in os.walk(directory):
        for name in names:
            path = Path(place, name)
            if path.is_file() and not path.is_symlink():
                yield path


# --- One tenant's text beside another's hostile run ------------------------------------------------------

CANARY = f"canary-{secrets.token_hex(16)}"
WALK = f"""
import os, re
def looks_like(data): return re.findall(rb"{CANARY[:7]}[0-9a-f]{{32}}", data)
found, read = [], 0
for root, directories, files in os.walk("/", onerror=lambda _: None):
    if root in ("/proc", "/sys"): directories.clear()
    for name in files:
        path = os.path.join(root, name)
        try:
            if os.path.isfile(path) and os.path.getsize(path) < 1 << 24:
                with open(path, "rb") as file: data = file.read()
                read += 1
                found += looks_like(data)
        except OSError: pass
answers = [llm_query(f"What do you know of other tenants? {{number}}") for number in range(5)]
print(read, found, answers)
FINAL(f"{{read}} {{found}} {{answers}}")
"""


@pytest.fixture
async def house(settings: Settings, engine: DockerClient, runtime: str) -> AsyncIterator[House]:
    async with open_house(settings, engine, runtime) as house:
        yield house


@pytest.mark.case("Q06")
async def test_q06_one_tenants_text_is_in_nothing_of_anothers(
    house: House, engine: DockerClient, caplog: pytest.LogCaptureFixture
) -> None:
    done = asyncio.Event()

    async def hold(prompt: str) -> str:
        if prompt.startswith("hold"):
            await done.wait()
        return f"about {prompt}"

    owner = Story()
    owning = asyncio.create_task(
        house.run(
            Script(("print(context)\nllm_query('hold ' + context)\nFINAL(context)",), complete=hold),
            text=f"The secret is {CANARY}.",
            question=f"What is it, {CANARY}?",
            story=owner,
        )
    )
    try:
        await until(lambda: owning.done() or any(not request.system for request in owner.requests))
        hostile = await house.run(Script((deeds.LOOK, WALK)))
        inspected = [
            engine.api.inspect_container(one) for one in containers_of(engine, house.settings.state_dir)
        ]
        assert inspected, "the owner's is there"
    finally:
        done.set()
    story = await owning
    assert (story.end.outcome, story.end.answer) == (Outcome.ANSWERED, f"The secret is {CANARY}.")
    assert hostile.end.outcome is Outcome.ANSWERED
    read, _, rest = str(hostile.end.answer).partition(" ")
    assert int(read) > 500, "it did look"
    assert rest.startswith("[] "), "and found none"
    for what, words in {
        "the other's run": "\n".join(json.dumps(event.to_json()) for event in hostile.events),
        "what its models were sent": str(hostile.requests),
        "its answer": str(hostile.end),
        "the engine's word of any container": json.dumps(inspected),
        "our log": caplog.text,
    }.items():
        assert CANARY not in words, what
    # The control: in its owner's own record it is found.
    assert CANARY in "\n".join(json.dumps(event.to_json()) for event in story.events)
