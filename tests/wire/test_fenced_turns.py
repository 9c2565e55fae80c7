"""Fenced cells over real HTTP with the real SDK: turn machine, client and a strict server; no sandbox."""

from collections.abc import Sequence
from typing import Any

from orchestrator import prompts, turn
from orchestrator.cells import CellOutcome, CellResult
from orchestrator.conversation import Dialect
from orchestrator.models.anthropic_client import AnthropicClient
from orchestrator.models.port import ModelRequest
from orchestrator.models.sdk import anthropic_api
from tests.fakes.anthropic_server import Blocks, FakeAnthropic, Play, Say, serve, thinking

TASK = prompts.task("How many?", depth=0, context_shape="one text: 10 characters", levels_below=1)


async def run(plays: Sequence[Play], *, window_tokens: int = 1_000_000) -> tuple[list[str], turn.End, Any]:
    """The cells of a run of that model, its end, and what the server saw. A cell's output is its own code."""
    codes: list[str] = []
    left = list(plays)

    async def converse(fake: FakeAnthropic) -> turn.End:
        client = AnthropicClient(anthropic_api("key", fake.url))
        state, actions = turn.start(TASK, max_turns=20, window_tokens=window_tokens, dialect=Dialect.FENCES)
        try:
            while True:
                match actions[-1]:
                    case turn.AskModel() as ask:
                        request = ModelRequest(
                            model="local",
                            system=prompts.system(Dialect.FENCES),
                            conversation=ask.conversation,
                            python_tool=False,
                            stop_sequences=(prompts.INVENTED_OUTPUT,),
                            max_tokens=1_000,
                            timeout_s=30,
                        )
                        said = await client.complete(request)
                        event: turn.Event = turn.ModelReplied(said.reply, said.usage.total)
                    case turn.RunCell(code):
                        codes.append(code)
                        event = turn.CellEnded(CellResult(outcome=CellOutcome.OK, output_head=code))
                    case turn.End() as end:
                        return end
                    case other:
                        raise AssertionError(other)
                state, actions = turn.step(state, event)
        finally:
            await client.aclose()

    async with serve(lambda body: left.pop(0)) as fake:
        end = await converse(fake)
    return codes, end, fake


def told(body: dict[str, Any]) -> str:
    """The text of the last thing the model was told."""
    return "\n\n".join(block["text"] for block in body["messages"][-1]["content"])


async def test_a_run_without_tools_is_a_conversation_that_the_api_takes() -> None:
    codes, end, fake = await run(
        [
            Blocks([thinking("Look first."), *Say("Let me look.\n```repl\nprint(1)\n```").content]),
            Say("Well."),
            Say("```python\nx = '''\n```\n'''\n```\n\nOutput:\n42"),
            Say("FINAL_VAR(x)"),
            Say("I know.\nFINAL(4 (or 5))\nBye."),
        ]
    )
    assert codes == ["print(1)", "x = '''\n```\n'''", "FINAL_VAR('x')"]
    assert (end.outcome, end.answer) == (turn.Outcome.ANSWERED, "4 (or 5)")
    assert [served.outcome for served in fake.log] == ["served"] * 5
    last = fake.log[-1].body
    assert "tools" not in last
    assert "tool_choice" not in last
    said = [message["content"][-1]["text"] for message in last["messages"] if message["role"] == "assistant"]
    assert said[2] == "```python\nx = '''\n```\n'''\n```", "what was invented is never sent back"
    assert told(fake.log[1].body) == prompts.told_report("print(1)")
    assert told(fake.log[2].body) == prompts.REPLY_ONLY_WORDS


async def test_a_model_that_plays_the_sandbox_is_stopped_where_it_begins() -> None:
    invented = prompts.INVENTED_OUTPUT + " 0]\n" + "42\n" * 100
    codes, end, fake = await run([Say("```repl\nprint(1)\n```" + invented), Say("FINAL(1)")])
    assert (codes, end.answer) == (["print(1)"], "1")
    assert fake.log[0].billed["output_tokens"] < 40


async def test_a_forgotten_fence_is_made_up_for_by_the_stop() -> None:
    codes, _, _ = await run([Say("```repl\nprint(1)" + prompts.INVENTED_OUTPUT + "]\n42"), Say("FINAL(1)")])
    assert codes == ["print(1)"]


async def test_a_cell_longer_than_the_output_limit_is_never_run() -> None:
    codes, end, fake = await run([Say("```repl\n" + "x = 1\n" * 2_000 + "```"), Say("FINAL(1)")])
    assert (codes, end.answer) == ([], "1")
    assert "NOT run" in told(fake.log[1].body)


async def test_a_long_run_reads_its_past_from_cache_until_it_is_compacted() -> None:
    cells = [f"```repl\nprint('{number} {'x' * 3_000}')\n```" for number in range(12)]
    codes, end, fake = await run([*map(Say, cells), Say("FINAL(1)")], window_tokens=30_000)
    assert len(codes) == 12
    assert end.answer == "1"
    assert all(served.billed["cache_read_input_tokens"] > 0 for served in fake.log[1:4])
    assert prompts.told_report(prompts.OUTPUT_ELIDED) in str(fake.log[-1].body).replace("\\n", "\n")
