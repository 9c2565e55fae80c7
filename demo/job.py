"""The demo's question, asked of the orchestrator with a scripted model and checked."""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo.verify import right_answer
from orchestrator import app
from orchestrator.app import RunOptions
from orchestrator.config import Settings
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.run_report import RunReport
from orchestrator.runs.recorder import Observer

QUESTION = """\
Which users bought something in 2023 and also in 2024, and what do they spend on average?
Only lines with the status "completed" are purchases. An average is the mean amount of the purchases of both \
years together, rounded to cents, half a cent upwards.
Answer with one JSON object: "users", how many users these are; "average", over all their purchases; \
"average_by_user", an object from user to average, sorted by user. Averages are strings such as "12.30"."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of the run, next to what should have."""

    report: RunReport
    right: bool
    difference: str
    """Where the answer is wrong; empty when it is right."""


def options(log: Path) -> RunOptions:
    """The question about the log at `log`, for a model played by `demo/script.py`."""
    script = os.path.relpath(Path(__file__).with_name("script.py"))
    return RunOptions(question=QUESTION, context_paths=(log,), model=SCRIPTED_PREFIX + script)


async def ask(
    asked: RunOptions, settings: Settings, *, observers: Sequence[Observer], say: Callable[[str], None]
) -> Verdict:
    """Run it in a real container, and compare the answer with one that no model had a part in.

    Raises:
        OrchestratorError: As `app.run` does.
    """
    report = await app.run(asked, settings, observers=observers, say=say)
    (log,) = asked.context_paths
    difference = _difference(report, json.dumps(right_answer(log)))
    return Verdict(report, not difference, difference)


def _difference(report: RunReport, right: str) -> str:
    if report.answer is None:
        return f"there is no answer: {report.error}"
    try:
        found = json.loads(report.answer)
    except ValueError:
        return "the answer is not JSON"
    wanted = json.loads(right)
    if found == wanted and list(found["average_by_user"]) == list(wanted["average_by_user"]):
        return ""
    return f"the answer should begin with {right[:200]}"
