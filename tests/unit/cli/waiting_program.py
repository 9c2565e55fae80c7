"""`rlm` with a run that spends something, waits for ever, and takes a while to clean up: for signal tests.

Writes `started` and `cleaned` into the folder that the first context path names.
"""

import asyncio
from collections.abc import Callable, Sequence

from orchestrator import app
from orchestrator.app import RunOptions
from orchestrator.cli.main import main
from orchestrator.config import Settings
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.run_report import RunReport
from orchestrator.runs.recorder import Observer
from tests.unit.cli.story import Story


async def _run(
    options: RunOptions,
    settings: Settings,
    *,
    provider: ProviderProcess | None = None,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> RunReport:
    folder = options.context_paths[0]
    story = Story()
    story.start(question="why \x1b]0;evil\x07?")
    story.turn(1, code="print('\x1b]0;evil\x07')")
    story.cell_ends(1, output="half an answer\n")
    story.turn(2, code="print('\x1b]0;evil\x07')")
    story.pays("c1")
    for event in story.events:
        for observer in observers:
            observer(event)
    (folder / "started").touch()
    try:
        await asyncio.sleep(3_600)
    finally:
        await asyncio.sleep(0.5)
        (folder / "cleaned").touch()
    raise AssertionError


if __name__ == "__main__":
    app.run = _run
    main()
