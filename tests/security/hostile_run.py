"""`rlm` with a run in which everything that a model, a guest or a document can word is hostile.

Reads the payload from the context file, and ends as that is called: `answered`, `failed`, ...
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from orchestrator import app
from orchestrator.app import RunOptions
from orchestrator.cli import provider
from orchestrator.cli.main import main
from orchestrator.config import Settings
from orchestrator.errors import ContextInputError
from orchestrator.run_report import RunReport
from orchestrator.runs.recorder import Observer
from orchestrator.trajectory import Tally
from orchestrator.turn import Outcome
from tests.fakes.provider import NoProcess
from tests.unit.cli.story import ROOT, Story

_SHOWN_S = 0.6
"""Long enough for the live view to draw it."""


async def _run(
    options: RunOptions,
    settings: Settings,
    *,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = lambda _line: None,
    **_: Any,
) -> RunReport:
    (path,) = options.context_paths
    bad = path.read_bytes().decode("utf-8", "surrogatepass")
    if path.stem == "refused":
        raise ContextInputError(f"'{bad}' does not exist")
    story = Story(model=f"model {bad}", sub_model=f"small {bad}")
    story.start(question=f"why {bad}")
    child = story.child(1, question=f"what {bad}")
    story.turn(1, code=f"print('{bad}')\n{bad}\n{bad}")
    story.sub_call_starts("c1")
    story.sub_call_ends("c1", error=f"refused {bad}")
    story.pays("c1")
    story.cell_ends(1, output=f"out {bad}\n")
    story.end("model_failed", error=f"child {bad}", run_id=child)
    for event in story.events:
        for observer in observers:
            observer(event)
    say(f"staging {bad}")
    await asyncio.sleep(_SHOWN_S)
    logging.getLogger("some.library").warning("peer said %s", bad)
    if path.stem == "broken":
        raise ValueError(bad)
    answered = path.stem == "answered"
    for observer in observers:
        observer(story.end("answered" if answered else "model_failed", error=f"because {bad}"))
    return RunReport(
        run_id=ROOT,
        outcome=Outcome.ANSWERED if answered else Outcome.MODEL_FAILED,
        answer=f"answer {bad}" if answered else None,
        error="" if answered else f"error {bad}",
        found_so_far=f"found {bad}",
        tally=Tally.of(story.events),
        limits=options.limits,
        duration_s=1.0,
        context_bytes=2,
        notes=(f"note {bad}",),
    )


if __name__ == "__main__":
    app.run = _run
    provider.ProviderProcess = NoProcess  # type: ignore[assignment,attr-defined,unused-ignore] # no key is needed for this
    main()
