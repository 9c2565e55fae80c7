"""What every `ModelClient` promises, over every one we ship. A new one joins `PLAYS` and nothing else."""

import asyncio
from collections.abc import AsyncIterator, Callable, Generator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from orchestrator import prompts
from orchestrator.conversation import Entry, Reply, StopReason, Told, ToolReport
from orchestrator.errors import Billing, ModelError
from orchestrator.models import scripted
from orchestrator.models.anthropic_client import AnthropicClient
from orchestrator.models.port import ModelClient, ModelRequest
from orchestrator.models.sdk import anthropic_api
from tests.fakes import anthropic_server as fake
from tests.fakes.provider import provider_in_this_process


@dataclass
class Scene:
    """What the model is to do, in nobody's words."""

    turns: list[str] = field(default_factory=list)
    """The code of its cells, one a turn; then it answers `done`."""
    sub_call: str = "an answer"
    hangs: bool = False
    refuses: bool = False
    fails_first: ModelError | None = None


# --- The clients ---------------------------------------------------------------------------------------


@asynccontextmanager
async def _server(scene: Scene) -> AsyncIterator[str]:
    failures = [scene.fails_first] if scene.fails_first else []

    def respond(body: dict[str, Any]) -> fake.Play:
        if failures:
            failures.pop()
            return fake.Refuse(529, "overloaded_error")
        if scene.hangs:
            return fake.Slow(3_600)
        if scene.refuses:
            return fake.Blocks([], "refusal")
        if "tools" not in body:
            return fake.Say(scene.sub_call)
        turn = len(body["messages"]) // 2
        return fake.Call(scene.turns[turn]) if turn < len(scene.turns) else fake.Say("done")

    async with fake.serve(respond) as server:
        yield server.url


@asynccontextmanager
async def _anthropic(scene: Scene) -> AsyncIterator[ModelClient]:
    async with _server(scene) as url:
        client = AnthropicClient(anthropic_api("key", url))
        try:
            yield client
        finally:
            await client.aclose()


@asynccontextmanager
async def _provider(scene: Scene) -> AsyncIterator[ModelClient]:
    async with _server(scene) as url, provider_in_this_process(url) as client:
        yield client


@asynccontextmanager
async def _scripted(scene: Scene) -> AsyncIterator[ModelClient]:
    class Script:
        def run(self, question: str, depth: int) -> Generator[scripted.Step, str, str]:
            if scene.fails_first:
                yield scripted.Fail(scene.fails_first)
            if scene.hangs:
                yield scripted.Wait(3_600)
            if scene.refuses:
                yield scripted.Refuse()
            for code in scene.turns:  # noqa: UP028 - a list can't be sent reports
                yield code
            return "done"

        async def complete(self, prompt: str) -> Any:
            if scene.hangs:
                await asyncio.sleep(3_600)
            return scripted.Refuse() if scene.refuses else scene.sub_call

    client = scripted.ScriptedClient(Script())
    try:
        yield client
    finally:
        await client.aclose()


Opens = Callable[[Scene], AbstractAsyncContextManager[ModelClient]]


@pytest.fixture(params=[_anthropic, _provider, _scripted], ids=["anthropic", "provider", "scripted"])
def opens(request: pytest.FixtureRequest) -> Opens:
    """A client of each kind, playing a scene."""
    client: Opens = request.param
    return client


TASK = Told(prompts.task("How many?", depth=0, context_shape="one text, 10 bytes", levels_below=1))
TURN = ModelRequest(
    model="m",
    system="You write Python.",
    conversation=(TASK,),
    python_tool=True,
    max_tokens=1_000,
    timeout_s=30.0,
)
SUB_CALL = replace(TURN, system="", conversation=(Told("What is it?"),), python_tool=False)


# --- The promises --------------------------------------------------------------------------------------


async def test_a_run_goes_turn_by_turn_from_cells_to_an_answer(opens: Opens) -> None:
    entries: list[Entry] = [TASK]
    codes = []
    async with opens(Scene(turns=["a = 1", "print(a)"])) as client:
        while True:
            reply = (await client.complete(replace(TURN, conversation=tuple(entries)))).reply
            if reply.stop is not StopReason.TOOL_USE:
                break
            call: Any = reply.content[-1]
            assert (call["type"], call["name"]) == ("tool_use", "python")
            codes.append(call["input"]["code"])
            entries += [reply, ToolReport(call["id"], "1")]
    assert codes == ["a = 1", "print(a)"]
    assert (reply.text, reply.stop) == ("done", StopReason.END_TURN)


async def test_a_sub_call_is_answered_with_text(opens: Opens) -> None:
    async with opens(Scene(sub_call="forty-two")) as client:
        completion = await client.complete(SUB_CALL)
    assert (completion.reply.text, completion.reply.stop) == ("forty-two", StopReason.END_TURN)


async def test_the_same_request_of_a_sub_call_costs_the_same_every_time(opens: Opens) -> None:
    async with opens(Scene()) as client:
        first, second = [(await client.complete(SUB_CALL)).usage for _ in range(2)]
    assert first == second
    assert first.total_input > 0
    assert first.output > 0


async def test_an_answer_never_has_more_tokens_than_were_allowed(opens: Opens) -> None:
    async with opens(Scene(sub_call="word " * 1_000)) as client:
        completion = await client.complete(replace(SUB_CALL, max_tokens=100))
    assert completion.reply.stop is StopReason.MAX_TOKENS
    assert 0 < completion.usage.output <= 100
    assert ("word " * 1_000).startswith(completion.reply.text)


async def test_an_answer_ends_before_a_stop_sequence(opens: Opens) -> None:
    async with opens(Scene(sub_call="forty\n[two]\n[three]")) as client:
        request = replace(SUB_CALL, stop_sequences=("\n[three", "\n[two"))
        completion = await client.complete(request)
    assert completion.reply == Reply(({"type": "text", "text": "forty"},), StopReason.STOP_SEQUENCE)


async def test_a_second_turn_reads_from_cache_what_the_first_one_sent(opens: Opens) -> None:
    async with opens(Scene(turns=["1", "2"])) as client:
        first = await client.complete(TURN)
        call_id = str(first.reply.content[-1]["id"])
        entries = (TASK, first.reply, ToolReport(call_id, "one"))
        second = await client.complete(replace(TURN, conversation=entries))
    assert first.usage.cache_read == 0
    assert second.usage.cache_read >= first.usage.total_input > 0


async def test_a_refusal_is_a_reply_and_not_an_error(opens: Opens) -> None:
    async with opens(Scene(refuses=True)) as client:
        assert (await client.complete(SUB_CALL)).reply == Reply((), StopReason.REFUSAL)
        assert (await client.complete(TURN)).reply.stop is StopReason.REFUSAL


async def test_a_failed_attempt_is_a_model_error_and_the_next_one_may_succeed(opens: Opens) -> None:
    busy = ModelError("overloaded", billing=Billing.NOTHING, retryable=True, status=529)
    async with opens(Scene(fails_first=busy, turns=["1"])) as client:
        with pytest.raises(ModelError) as caught:
            await client.complete(TURN)
        assert (caught.value.billing, caught.value.retryable) == (Billing.NOTHING, True)
        assert (await client.complete(TURN)).reply.stop is StopReason.TOOL_USE


@pytest.mark.parametrize("request_kind", [TURN, SUB_CALL], ids=["turn", "sub-call"])
async def test_the_client_gives_up_by_itself(opens: Opens, request_kind: ModelRequest) -> None:
    async with opens(Scene(hangs=True)) as client:
        with pytest.raises(ModelError) as caught:
            await client.complete(replace(request_kind, timeout_s=0.1))
    assert (caught.value.billing, caught.value.retryable) == (Billing.UNKNOWN, True)


async def test_cancelling_is_not_an_error_of_the_model(opens: Opens) -> None:
    async with opens(Scene(hangs=True)) as client:
        call = asyncio.create_task(client.complete(SUB_CALL))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call


async def test_closing_fails_the_calls_in_flight_and_all_later_ones(opens: Opens) -> None:
    async with opens(Scene(hangs=True)) as client:
        calls = [asyncio.create_task(client.complete(SUB_CALL)) for _ in range(3)]
        await asyncio.sleep(0.05)
        await client.aclose()
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, ModelError)
            assert (outcome.billing, outcome.retryable) == (Billing.UNKNOWN, False)
        with pytest.raises(ModelError, match="closed") as caught:
            await client.complete(SUB_CALL)
        assert caught.value.billing is Billing.NOTHING


async def test_closing_fails_a_call_whatever_it_is_at(opens: Opens) -> None:
    for moments in range(24):
        async with opens(Scene(hangs=True)) as client:
            call = asyncio.create_task(client.complete(SUB_CALL))
            for _ in range(moments):
                await asyncio.sleep(0)
            await client.aclose()
            (outcome,) = await asyncio.gather(call, return_exceptions=True)
            assert isinstance(outcome, ModelError)
            assert not outcome.retryable, f"after {moments} turns of the event loop"


async def test_many_calls_side_by_side_do_not_disturb_each_other(opens: Opens) -> None:
    async with opens(Scene(turns=["1"])) as client:
        requests = [TURN if number % 2 else SUB_CALL for number in range(40)]
        replies = [c.reply for c in await asyncio.gather(*map(client.complete, requests))]
    assert [reply.stop for reply in replies] == [StopReason.END_TURN, StopReason.TOOL_USE] * 20
