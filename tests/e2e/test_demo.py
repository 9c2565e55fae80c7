"""The demo's job."""

import json
from pathlib import Path

from demo import job, purchases
from demo.verify import right_answer
from orchestrator.config import Settings


async def test_the_demo_finds_the_right_answer_and_its_root_model_is_sent_little(
    settings: Settings, tmp_path: Path
) -> None:
    log = tmp_path / "purchases.csv"
    purchases.write_log(log)

    verdict = await job.ask(job.options(log), settings, observers=(), say=lambda _line: None)

    assert verdict.right, verdict.difference
    report = verdict.report
    assert report.context_bytes == log.stat().st_size > 5_000_000
    assert report.tally.root_request_bytes < report.context_bytes / 100
    assert report.tally.child_runs == 1
    assert report.tally.sub_calls_done == purchases.LINES / 5_000 + 1
    assert report.tally.sub_calls_failed == 0
    assert report.tally.usage.total > report.context_bytes / 4, "the sub-calls did read the log"


def test_the_demo_would_notice_a_wrong_answer(tmp_path: Path) -> None:
    """What it compares with depends on every line."""
    log = tmp_path / "purchases.csv"
    purchases.write_log(log)
    right = right_answer(log)
    text = log.read_text()
    one = next(line for line in text.splitlines() if ",2023-" in line and line.endswith(",completed"))
    log.write_text(text.replace(one, one.removesuffix("completed") + "cancelled"))
    assert json.dumps(right_answer(log)) != json.dumps(right)
