"""Runs of models without tool use in real containers: fenced cells, their sub-calls and their child runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator import app, prompts
from orchestrator.app import RunOptions
from orchestrator.config import Settings
from orchestrator.conversation import Dialect
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.trajectory import CellEnded, CellStarted, Event, RunStarted
from orchestrator.turn import Outcome
from tests.fakes import anthropic_server as fake
from tests.fakes.provider import provider_at

pytestmark = [pytest.mark.docker, pytest.mark.timeout(120)]

KEY = "sk-test-0123456789-canary"

INVENTED = "\n\nOutput: 1 1\nFINAL(1 1)"
ROOT = [
    # A fence inside a string, and an output that was never printed.
    "Let me look.\n```repl\nquote = '''\n```\n'''\nprint(len(context), len(quote))\n```" + INVENTED,
    # What a small model writes instead of `repl`, with a sub-call and a child run.
    "```python\nshout = llm_query('hello')\nbelow = rlm_query('And below?', context[:50])\n```",
    # No cell and no answer.
    "Now I know enough.",
    "FINAL_VAR(nothing)",
    "```repl\nfound = [shout, below, quote]\n```",
    "FINAL_VAR(found)\n",
]
CHILD = ["```repl\nprint(len(context))\n```", "It is short.\nFINAL(fifty (50))"]


def respond(request: dict[str, Any]) -> fake.Play:
    assert "tools" not in request
    if "system" not in request:
        return fake.Say(request["messages"][0]["content"][0]["text"].upper())
    turns = sum(message["role"] == "assistant" for message in request["messages"])
    return fake.Say((ROOT if "Depth: 0" in json.dumps(request["messages"][0]) else CHILD)[turns])


async def test_a_model_without_tools_answers_from_a_real_container(
    settings: Settings, tmp_path: Path
) -> None:
    context = tmp_path / "small.txt"
    context.write_text("x" * 1_000)
    events: list[Event] = []
    options = RunOptions(
        question="What is in it?",
        context_paths=[context],
        model="claude-sonnet-5-5",
        sub_model="claude-haiku-5-5",
        dialect=Dialect.FENCES,
    )
    async with fake.serve(respond, key=KEY) as server:
        with provider_at(server.url, KEY) as provider:
            report = await app.run(options, settings, provider=provider, observers=[events.append])

    assert report.outcome is Outcome.ANSWERED
    assert json.loads(report.answer or "") == ["HELLO", "fifty (50)", "\n```\n"]
    root = [event.payload for event in events if event.run_id == report.run_id]
    outputs = [payload.output for payload in root if isinstance(payload, CellEnded)]
    assert outputs[0] == "1000 5\n"
    cells = [payload for payload in root if isinstance(payload, CellStarted)]
    assert [cell.invented_bytes for cell in cells] == [len(INVENTED), 0, 0, 0, 1]
    assert cells[-1].code == "FINAL_VAR('found')"
    assert all(e.payload.dialect == "fences" for e in events if isinstance(e.payload, RunStarted))

    assert {served.outcome for served in server.log} == {"served"}
    last = next(served.body for served in reversed(server.log) if "Depth: 0" in json.dumps(served.body))
    said = [block["text"] for message in last["messages"] for block in message["content"]]
    assert prompts.told_report("1000 5") in said
    assert prompts.REPLY_ONLY_WORDS in said
    assert not any("Output: 1 1" in text for text in said)
    assert "no variable is called 'nothing'" in "".join(said)


SCRIPT = """
def run(question, depth):
    seen = yield "print(len(context))"
    below = yield "print(rlm_query('And below?', 'four'))" if depth == 0 else "pass"
    return f"depth {depth} saw {seen}; {below}"
"""


async def test_a_script_written_for_tools_plays_with_fences(settings: Settings, tmp_path: Path) -> None:
    script, context = tmp_path / "script.py", tmp_path / "small.txt"
    script.write_text(SCRIPT)
    context.write_text("x" * 1_000)
    options = RunOptions(
        question="What is in it?",
        context_paths=[context],
        model=SCRIPTED_PREFIX + str(script),
        dialect=Dialect.FENCES,
    )
    report = await app.run(options, settings)
    assert report.error == ""
    assert report.answer == "depth 0 saw 1000; depth 1 saw 4; [no output]"
