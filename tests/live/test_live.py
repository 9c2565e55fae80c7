"""A handful of runs against the real API: `make test-live`. They cost money, so never in CI.

Each run has a limit of its own, five cents; what the API answers is its own business, what it bills is ours.
"""

import os
from pathlib import Path

import pytest

from orchestrator import app, run_report
from orchestrator.config import Settings
from orchestrator.conversation import Dialect
from orchestrator.limits import RunLimits
from orchestrator.trajectory import CallSettled, Event
from orchestrator.turn import Outcome
from tests.e2e.conftest import engine, image_id, settings, state_dir
from tests.fakes.provider import provider_at

__all__ = ["engine", "image_id", "settings", "state_dir"]

pytestmark = [pytest.mark.live, pytest.mark.timeout(300)]

MODEL = "claude-haiku-5-5"
LIMITS = RunLimits(max_cost_microusd=50_000, max_tokens=400_000, max_calls=40, max_turns=8, deadline_s=240)
NEEDLE = "The password of the lighthouse is 'marmalade'."


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "log.txt"
    lines = [f"{number:05} keeper {number % 7} lit the lamp" for number in range(20_000)]
    lines[13_371] = f"13371 {NEEDLE}"
    path.write_text("\n".join(lines))
    return path


async def answered(
    settings: Settings, context: Path, question: str, dialect: Dialect = Dialect.TOOLS
) -> tuple[run_report.RunReport, list[Event]]:
    events: list[Event] = []
    options = app.RunOptions(
        question=question, context_paths=[context], model=MODEL, dialect=dialect, limits=LIMITS
    )
    # Where the key goes: Anthropic's own address.
    with provider_at("", os.environ["ANTHROPIC_API_KEY"]) as provider:
        report = await app.run(options, settings, provider=provider, observers=[events.append])
    cost_usd = report.tally.confirmed.cost_microusd / 1_000_000
    print(f"\nlive: {report.outcome.value}, {cost_usd:.4f} US dollars, {report.answer!r}")
    assert report.tally.confirmed.cost_microusd <= LIMITS.max_cost_microusd
    assert report.tally.open_calls == 0
    return report, events


async def test_a_needle_is_found_with_code(settings: Settings, log: Path) -> None:
    report, _ = await answered(settings, log, "What is the password of the lighthouse?")
    assert report.outcome is Outcome.ANSWERED
    assert "marmalade" in (report.answer or "")


async def test_sub_calls_are_made_and_no_hold_was_too_small(settings: Settings, log: Path) -> None:
    question = (
        "In one cell, call llm_query_batched on the first five lines, one prompt each, asking which keeper"
        " lit the lamp; then FINAL the list of the five replies."
    )
    report, events = await answered(settings, log, question)
    settled = [event.payload for event in events if isinstance(event.payload, CallSettled)]
    assert report.outcome is Outcome.ANSWERED
    assert len(settled) >= 6
    for call in settled:
        # The bound on which every budget rests, against the real tokenizer.
        assert call.usage.total_input <= call.input_bound_tokens


async def test_a_later_turn_reads_from_cache(settings: Settings, log: Path) -> None:
    question = (
        "First print 200 lines from the middle of the context, then, in a second cell, 200 lines from its"
        " end; then answer with the number of the very last line."
    )
    report, _ = await answered(settings, log, question)
    assert report.outcome is Outcome.ANSWERED
    assert report.tally.usage.cache_read > 0


async def test_the_dialect_of_fences_works_with_a_model_that_could_do_without(
    settings: Settings, log: Path
) -> None:
    report, _ = await answered(settings, log, "How many lines are there?", Dialect.FENCES)
    assert report.outcome is Outcome.ANSWERED
    assert "20000" in (report.answer or "").replace(",", "")
