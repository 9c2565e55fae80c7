"""Many calls at once: none lost, none out of order, none unpaid, none refused that could wait."""

import asyncio
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.broker.service import serve_broker
from orchestrator.budget import Amounts
from orchestrator.cells import CellClock
from orchestrator.limits import RunLimits
from orchestrator.models import catalogue
from orchestrator.models.anthropic_client import AnthropicClient
from orchestrator.models.port import Model, ModelClient
from orchestrator.models.sdk import anthropic_api
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.run import run_to_end
from orchestrator.runs.sub_calls import SubCalls
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from orchestrator.trajectory import CallHeld, SubCallEnded
from tests.fakes import anthropic_server
from tests.fakes.tree import FakeTree
from tests.ledger.guests import assert_paid
from tests.ledger.witness import Provider, prompt_of

PLENTY = {"max_tokens": 10**9, "max_cost_microusd": 10**9, "max_calls": 10_000}


async def _run_child(tree: RunTree, spec: RunSpec) -> RunResult:
    return await run_to_end(tree, spec, serve_broker)


async def ask_all(
    tree: FakeTree, client: ModelClient, prompts: list[bytes], *, max_tokens: int | None = None
) -> list[str | BaseException]:
    """All prompts at once, as one cell's; the answers in the prompts' order."""
    spec = tree.spec()
    calls = SubCalls(tree.tree, spec, tree.recorder, _run_child)
    clock = CellClock(started_s=time.monotonic(), cell_timeout_s=1e6, cell_cpu_s=1e6, cell_ceiling_s=1e6)
    with calls.executing(1, clock):
        asked = (
            calls.complete(f"c{number}", prompt, model_name="", max_tokens=max_tokens)
            for number, prompt in enumerate(prompts)
        )
        answers = await asyncio.gather(*asked, return_exceptions=True)
    await calls.aclose(5.0)
    tree.contexts.release(spec.context)
    tree.contexts.close()
    assert_paid(tree, client)
    return [answer if isinstance(answer, BaseException) else answer.text for answer in answers]


@pytest.mark.case("I01")
async def test_of_64_calls_each_worth_half_the_budget_those_are_served_that_fit(tmp_path: Path) -> None:
    provider = Provider(lambda _: "x" * 10_000, delay_s=0.01)
    limits = RunLimits(max_tokens=2_300, max_concurrency=64)
    async with SandboxSlots(4).admit(0) as slots:
        tree = FakeTree(tmp_path, slots, provider, limits=limits)
        answers = await ask_all(tree, provider, [b"hello"] * 64, max_tokens=1_000)
    assert len(provider.log) == sum(isinstance(answer, str) for answer in answers) == 2
    assert tree.account.used().tokens == provider.billed_tokens() <= 2_300


async def test_a_thousand_calls_of_200_ms_a_hundred_at_once(tmp_path: Path) -> None:
    provider = Provider(lambda request: prompt_of(request)[::-1], delay_s=0.2)
    prompts = [f"prompt number {number}" for number in range(1_000)]
    limits = RunLimits(**PLENTY, max_concurrency=100)
    async with SandboxSlots(4).admit(0) as slots:
        tree = FakeTree(tmp_path, slots, provider, limits=limits)
        answers = await ask_all(tree, provider, [prompt.encode() for prompt in prompts])
    assert answers == [prompt[::-1] for prompt in prompts]
    assert provider.in_flight_at_most == 100
    assert len(provider.log) == 1_000
    cost = sum(tree.model.card.cost_microusd(usage) for usage in provider.log)
    assert tree.account.confirmed == Amounts(provider.billed_tokens(), cost, 1_000)
    assert tree.account.unconfirmed == Amounts()
    assert len(tree.payloads(SubCallEnded)) == 1_000


async def test_two_hundred_calls_through_the_real_client(tmp_path: Path) -> None:
    prompts = [f"prompt number {number}" for number in range(200)]

    def respond(body: anthropic_server.Json) -> anthropic_server.Play:
        (text,) = body["messages"][0]["content"]
        return anthropic_server.Slow(0.05, anthropic_server.Say(text["text"][::-1]))

    async with anthropic_server.serve(respond) as fake, SandboxSlots(4).admit(0) as slots:
        client = AnthropicClient(anthropic_api("key", fake.url))
        tree = FakeTree(tmp_path, slots, client, limits=RunLimits(**PLENTY, max_concurrency=50))
        answers = await ask_all(tree, client, [prompt.encode() for prompt in prompts])
        await client.aclose()
    assert answers == [prompt[::-1] for prompt in prompts]
    assert fake.most_in_flight <= 50
    assert [served.outcome for served in fake.log] == ["served"] * 200
    assert tree.account.confirmed.tokens == sum(fake.billed().values())
    assert tree.account.unconfirmed == Amounts()


def real_texts(size_bytes: int) -> Iterator[bytes]:
    """Python's own standard library, in pieces."""
    rest = b""
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        rest += path.read_bytes()
        while len(rest) >= size_bytes:
            yield rest[:size_bytes]
            rest = rest[size_bytes:]


@pytest.mark.parametrize("concurrency", [16, 100])
async def test_a_hundred_prompts_of_100_kb_under_a_dollar_are_all_served(
    tmp_path: Path, concurrency: int
) -> None:
    """All at once they would have to hold seven dollars; they wait for each other's holds to come back."""
    card = catalogue.lookup("claude-haiku-5-5")
    provider = Provider(lambda _: "a summary " * 50, delay_s=0.01)
    prompts = [text for text, _ in zip(real_texts(100_000), range(100), strict=False)]
    limits = RunLimits(max_cost_microusd=1_000_000, max_tokens=10**9, max_concurrency=concurrency)
    async with SandboxSlots(4).admit(0) as slots:
        tree = FakeTree(tmp_path, slots, provider, limits=limits)
        tree.tree = replace(tree.tree, models={"sub": Model(card, provider)})
        answers = await ask_all(tree, provider, prompts)
    assert len(prompts) == 100
    assert answers == ["a summary " * 50] * 100
    cost = sum(card.cost_microusd(usage) for usage in provider.log)
    assert tree.account.confirmed == Amounts(provider.billed_tokens(), cost, 100)
    assert cost < 1_000_000
    held = [one for one in tree.payloads(CallHeld) if isinstance(one, CallHeld)]
    whole_holds = [one.held.cost_microusd for one in held]
    assert sum(whole_holds) > 5_000_000
    assert provider.in_flight_at_most * max(whole_holds) <= 1_000_000
