"""A real model answers sub-calls from real containers; its own counters are the witness of every bill.

It is a small base model: these tests prove the path, not the answers.
"""

import asyncio
import json
import random
import time
from collections.abc import Callable, Sequence
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator import app, run_report
from orchestrator.config import Settings
from orchestrator.conversation import Dialect
from orchestrator.limits import RunLimits
from orchestrator.pricing import Usage
from orchestrator.trajectory import CallSettled, Event, Tally
from orchestrator.turn import Outcome
from tests.fakes.provider import provider_at
from tests.local_model.conftest import WINDOW_TOKENS, Counted, LocalModel

MODEL = "gemma-3-270m"
CITIES = ("Paris", "Rome", "Berlin", "Madrid", "Vienna", "Oslo", "Lisbon", "Athens", "Dublin", "Prague")
NAMES = ("Anna", "Ben", "Cara", "Dan", "Eva", "Finn", "Gina", "Hugo", "Ida", "Jon")
EXAMPLES = """\
Text: Maria moved to London in 1984.
City: London

Text: In 2003 Peter opened a bakery in Warsaw.
City: Warsaw

"""
LONG_CALL = "llm_query('One, two, three, four, five, six, seven, eight,', max_tokens=4000)"


class Asked:
    """A scripted root run over a context whose sub-calls go to the local model."""

    def __init__(self, settings: Settings, model: LocalModel, directory: Path) -> None:
        self.events: list[Event] = []
        self._settings = settings
        self._model = model
        self._directory = directory

    async def run(
        self, context: str, *cells: str, root: str = "", limits: RunLimits | None = None, question: str = "?"
    ) -> run_report.RunReport:
        script, path = self._directory / "script.py", self._directory / "context.txt"
        script.write_text(
            f"def run(question, depth):\n    for cell in {list(cells)!r}:\n        yield cell\n"
            "    return 'the script is over'\n"
        )
        path.write_text(context)
        options = app.RunOptions(
            question=question,
            context_paths=[path],
            model=root or f"scripted:{script}",
            sub_model=MODEL,
            dialect=Dialect.FENCES if root else Dialect.TOOLS,
            limits=limits or RunLimits(),
            price_input_usd_per_mtok=Decimal("0.10"),
            price_output_usd_per_mtok=Decimal("0.50"),
            window_tokens=WINDOW_TOKENS,
        )
        with provider_at(self._model.url, self._model.key) as provider:
            return await app.run(options, self._settings, provider=provider, observers=[self.events.append])

    @property
    def settled(self) -> list[CallSettled]:
        """The local model's calls; a scripted model counts for itself."""
        payloads = (event.payload for event in self.events)
        return [call for call in payloads if isinstance(call, CallSettled) and call.model == MODEL]

    @property
    def confirmed(self) -> Usage:
        usage = Usage()
        for call in self.settled:
            usage = usage.plus(call.usage)
        return usage


@pytest.fixture
def asked(settings: Settings, local_model: LocalModel, tmp_path: Path) -> Asked:
    return Asked(settings, local_model, tmp_path)


async def until(holds: Callable[[], bool], within_s: float) -> float:
    """Wait for what the server says; how long it took."""
    started_s = time.monotonic()
    while not await asyncio.to_thread(holds):
        if time.monotonic() - started_s > within_s:
            pytest.fail(f"not within {within_s} s")
        await asyncio.sleep(0.05)
    return time.monotonic() - started_s


async def test_a_hundred_extractions_are_paid_to_the_token(
    asked: Asked, local_model: LocalModel, record_property: Callable[[str, object], None]
) -> None:
    chance = random.Random(7)  # noqa: S311 - a test's data
    facts = [(chance.choice(NAMES), chance.choice(CITIES), chance.randint(1950, 2020)) for _ in range(100)]
    lines = [f"{name} moved to {city} in {year}." for name, city, year in facts]
    cell = (
        f"prompts = [{EXAMPLES!r} + f'Text: {{line}}\\nCity:' for line in context.splitlines()]\n"
        "replies = llm_query_batched(prompts, max_tokens=5)\n"
        "FINAL([reply.strip().split('\\n')[0] for reply in replies])"
    )
    before, started_s = local_model.counted(), time.monotonic()
    report = await asked.run("\n".join(lines), cell)
    wall_s = time.monotonic() - started_s
    counted = local_model.counted().since(before)

    assert report.outcome is Outcome.ANSWERED
    answers: Sequence[str] = json.loads(report.answer or "")
    right = sum(answer == city for answer, (_, city, _) in zip(answers, facts, strict=True))
    # Far fewer would mean that the model is not sent what the cell wrote.
    assert right >= 50

    usage = asked.confirmed
    assert [call.error for call in asked.settled] == [""] * 100
    assert counted == Counted(usage.total_input, usage.output)
    prompts = [f"{EXAMPLES}Text: {line}\nCity:" for line in lines]
    assert usage.total_input == sum(map(local_model.count_tokens, prompts))
    assert report.tally.unconfirmed.tokens == 0
    assert report.tally.open_calls == 0
    figures = (
        f"{right} of 100 right, {wall_s:.1f} s with the sandbox, {usage.total_input:,} tokens read"
        f" ({usage.cache_read:,} of them cached), {usage.output:,} written,"
        f" {usage.total / wall_s:,.0f} a second"
    )
    record_property("figures", figures)
    print(f"\nlocal model: {figures}")


async def test_cancelling_in_mid_generation_frees_the_slot_and_charges_the_hold(
    asked: Asked, local_model: LocalModel
) -> None:
    before = local_model.counted()
    running = asyncio.create_task(asked.run("x", LONG_CALL))
    await until(lambda: local_model.busy_slots() == 1 or running.done(), within_s=30)
    await asyncio.sleep(1.0)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    freed_s = await until(lambda: local_model.busy_slots() == 0, within_s=5)

    generated = local_model.counted().since(before).generated_tokens
    (call,) = asked.settled
    assert 0 < generated < 4_000
    assert call.usage == Usage()
    assert call.unconfirmed.tokens >= generated + local_model.count_tokens("One, two, three,")
    assert Tally.of(asked.events).open_calls == 0
    print(f"\nlocal model: slot free {freed_s:.2f} s after the cancellation, {generated} tokens generated")


async def test_the_deadline_ends_a_generation_and_frees_the_slot(
    asked: Asked, local_model: LocalModel
) -> None:
    report = await asked.run("x", LONG_CALL, limits=RunLimits(deadline_s=6))

    assert report.outcome is Outcome.DEADLINE
    await until(lambda: local_model.busy_slots() == 0, within_s=5)
    (call,) = asked.settled
    assert call.unconfirmed.tokens > 4_000
    assert report.tally.open_calls == 0
    # What a run that is over has left behind slows no later one.
    assert (await asked.run("x", "FINAL(llm_query('1 2 3 4', max_tokens=4))")).outcome is Outcome.ANSWERED


async def test_as_a_root_it_runs_cells_or_fails_and_every_token_is_in_the_ledger(
    asked: Asked, local_model: LocalModel
) -> None:
    question = (
        "How many lines has the context?\n\n"
        "Example. Task: print the first line. Answer:\n"
        "```repl\nprint(context.splitlines()[0])\n```\n\n"
        "Example. Task: how many characters has the context? Answer:\n"
        "```repl\nFINAL(len(context))\n```\n\n"
        "Task: how many lines has the context? Answer:"
    )
    before = local_model.counted()
    # A turn may write a sixteenth of the budget, and this model does not stop by itself.
    limits = RunLimits(max_turns=1, max_depth=0, max_tokens=17_000, deadline_s=150)
    report = await asked.run("a\nb\nc\n", root=MODEL, limits=limits, question=question)
    counted = local_model.counted().since(before)

    usage = asked.confirmed
    assert asked.settled
    assert report.outcome is not Outcome.INTERNAL_ERROR
    if report.tally.unconfirmed.tokens == 0:
        assert counted == Counted(usage.total_input, usage.output)
    else:
        assert (
            counted.prompt_tokens + counted.generated_tokens <= usage.total + report.tally.unconfirmed.tokens
        )
    print(
        f"\nlocal model: as a root run: {report.outcome.value}, {len(asked.settled)} calls, {report.answer!r}"
    )
