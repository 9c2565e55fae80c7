"""`rlm run`: one question, shown while it is being answered, and reported however it ends."""

import asyncio
import time
from contextlib import ExitStack
from pathlib import Path

from orchestrator import app
from orchestrator.app import RunOptions
from orchestrator.cli import ending, exits, signals
from orchestrator.cli.ending import End
from orchestrator.cli.events_file import EventsFile
from orchestrator.cli.exits import Exit
from orchestrator.cli.live import LiveView
from orchestrator.cli.logged import Display, logged
from orchestrator.cli.plain import PlainLines
from orchestrator.cli.tree import RunTree, head
from orchestrator.collector import collecting_seldom
from orchestrator.config import Settings
from orchestrator.errors import ModelError, OrchestratorError
from orchestrator.errors import SandboxError as SandboxFailure
from orchestrator.ids import RunId
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.run_report import RunReport
from orchestrator.runs.recorder import Observer
from orchestrator.turn import Outcome


def run(
    options: RunOptions,
    settings: Settings,
    *,
    provider: ProviderProcess | None,
    events_path: Path | None,
    as_json: bool,
    live: bool,
) -> Exit:
    """Answer one question and print what came of it.

    stdout gets the answer alone, or the object of `--json`; everything else goes to stderr.

    Args:
        options: The question.
        settings: The process's settings.
        provider: Has the provider's credentials; None for scripted models alone.
        events_path: Where every event is written.
        as_json: Print the object of docs/command-line.md.
        live: Show the run tree live; stderr is a terminal that can.

    Raises:
        InvalidRequestError: The events file cannot be written. Nothing has been started.
    """
    tree = RunTree()
    display = LiveView(tree, options.limits) if live else PlainLines(tree)
    observers: list[Observer] = [tree.add, display.on_event]
    with ExitStack() as stack:
        if events_path is not None:
            file = EventsFile(events_path, inputs=options.context_paths, warn=display.warn)
            stack.callback(file.close)
            observers.insert(0, file)
        stack.enter_context(logged(display))
        stack.enter_context(collecting_seldom())
        end = asyncio.run(_watched(options, settings, tree, display, observers, provider=provider))
    return ending.show(end, tree, as_json=as_json, live=live)


async def _watched(
    options: RunOptions,
    settings: Settings,
    tree: RunTree,
    display: Display,
    observers: list[Observer],
    *,
    provider: ProviderProcess | None,
) -> End:
    started_s = time.monotonic()

    def stopping(signals_so_far: int) -> None:
        if signals_so_far == 1:
            display.say("stopping: calls and containers are being ended")
        else:
            display.say("still stopping; killing this process would leave its containers to the next one")

    def unfinished(outcome: Outcome, why: str) -> RunReport:
        return _from_events(tree, options, outcome, why, time.monotonic() - started_s)

    async with display:
        work = app.run(options, settings, provider=provider, observers=observers, say=display.say)
        try:
            finished = await signals.until_stopped(work, stopping)
        except signals.StoppedError:
            return End(unfinished(Outcome.CANCELLED, "stopped by a signal"), Exit.NO_ANSWER)
        except OrchestratorError as error:
            return End(unfinished(_outcome_of(error), str(error)), exits.exit_for(error), error)
        # Whatever it is: what was spent and found is still to be told.
        except Exception as error:
            why = f"unexpected {type(error).__name__}"
            return End(unfinished(Outcome.INTERNAL_ERROR, why), Exit.NO_ANSWER, error)
    answered = finished.outcome is Outcome.ANSWERED
    return End(finished, Exit.DONE if answered else Exit.NO_ANSWER)


def _from_events(
    tree: RunTree, options: RunOptions, outcome: Outcome, why: str, duration_s: float
) -> RunReport:
    """The report of a run that could not make its own."""
    return RunReport(
        run_id=tree.root_id or RunId(""),
        outcome=outcome,
        answer=None,
        error=why,
        found_so_far=head(tree.root.last_output) if tree.root is not None else "",
        tally=tree.tally,
        limits=options.limits,
        duration_s=duration_s,
        context_bytes=0,
        notes=(),
    )


def _outcome_of(error: OrchestratorError) -> Outcome:
    if isinstance(error, SandboxFailure):
        return Outcome.SANDBOX_LOST
    if isinstance(error, ModelError):
        return Outcome.MODEL_FAILED
    return Outcome.INTERNAL_ERROR
