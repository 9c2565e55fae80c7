"""Asks the demo's question, shows the run while it goes on, and says whether the answer is right.

Exit code: 0 right, 1 wrong or none, 2 wrong use, 3 the machine lacks something.
"""

import asyncio
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from demo import job, purchases
from demo.job import Verdict
from orchestrator.cli import exits, signals, words
from orchestrator.cli.exits import Exit
from orchestrator.cli.live import LiveView, stderr_can_be_redrawn
from orchestrator.cli.plain import PlainLines
from orchestrator.cli.tree import RunTree
from orchestrator.config import read_settings
from orchestrator.errors import OrchestratorError
from orchestrator.visible import visible_line

_ANSWER_CHARS = 150


async def _ask(log: Path) -> Verdict:
    asked, tree = job.options(log), RunTree()
    live = stderr_can_be_redrawn(os.environ.get("TERM"))
    display = LiveView(tree, asked.limits) if live else PlainLines(tree)
    async with display:
        return await signals.until_stopped(
            job.ask(
                asked,
                read_settings(os.environ),
                observers=(tree.add, display.on_event),
                say=display.say,
            ),
            lambda _stops: display.say("stopping: calls and containers are being ended"),
        )


def _results(verdict: Verdict) -> Iterator[str]:
    report = verdict.report
    tally = report.tally
    answer = report.answer or report.found_so_far or "none"
    sent, size = tally.root_request_bytes, report.context_bytes
    yield f"{words.SCRIPTED_LABEL}answer: {visible_line(answer, _ANSWER_CHARS)}"
    yield (
        "verdict: RIGHT, equal to the answer computed with csv and sqlite3"
        if verdict.right
        else f"verdict: WRONG, {verdict.difference}"
    )
    yield (
        f"the root model was sent {sent:,} bytes in all {words.many(tally.root_turns, 'turn')} together; "
        f"the context has {size:,} bytes, {size / max(sent, 1):,.0f} times as much"
    )
    yield (
        f"{words.many(tally.usage.total, 'token')}, {words.many(tally.sub_calls_done, 'sub-call')} answered, "
        f"{words.many(tally.child_runs, 'child run')} among them, {words.duration(report.duration_s)}"
    )


def main() -> Exit:
    """Run the demo."""
    with tempfile.TemporaryDirectory(prefix="rlm-demo-") as directory:
        log = Path(directory) / "purchases.csv"
        purchases.write_log(log)
        exits.tell(f"demo: a purchase log of {purchases.LINES:,} lines, {log.stat().st_size:,} bytes")
        exits.tell(
            "demo: the model is played by demo/script.py; the container, its cells and all else is real"
        )
        for line in job.QUESTION.splitlines():
            exits.tell(f"demo: | {line}")
        try:
            verdict = asyncio.run(_ask(log))
        except OrchestratorError as error:
            exits.complain(error)
            return exits.exit_for(error)
        except signals.StoppedError:
            exits.tell("demo: stopped")
            return Exit.NO_ANSWER
    for line in _results(verdict):
        exits.put(line)
    return Exit.DONE if verdict.right else Exit.NO_ANSWER


if __name__ == "__main__":
    sys.exit(main())
