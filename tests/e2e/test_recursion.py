"""A tree of real containers with room for one chain of them."""

from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator import app
from orchestrator.config import Settings
from orchestrator.limits import RunLimits
from orchestrator.turn import Outcome

SCRIPT = """
def run(question, depth):
    if depth == 3:
        yield "FINAL(1)"
    yield "FINAL(1 + sum(map(int, rlm_query_batched([('How many?', 'x')] * 3))))"
    return "no cell ended the run"
"""


@pytest.mark.timeout(240)
async def test_depth_3_and_width_3_with_room_for_one_chain_only(settings: Settings, tmp_path: Path) -> None:
    script, context = tmp_path / "script.py", tmp_path / "context.txt"
    script.write_text(SCRIPT)
    context.write_text("x")
    report = await app.run(
        app.RunOptions(
            question="How many?",
            context_paths=[context],
            model=f"scripted:{script}",
            limits=RunLimits(max_depth=3),
        ),
        replace(settings, max_sandboxes=4),
    )
    assert (report.outcome, report.answer) == (Outcome.ANSWERED, "40")
    assert report.tally.child_runs == 39
    assert report.tally.open_calls == 0
