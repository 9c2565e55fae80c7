"""`rlm run`: one question, shown while it is being answered, and reported however it ends."""

import asyncio
import logging
import sys
import time
import traceback
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from orchestrator import app
from orchestrator.app import RunOptions, RunReport
from orchestrator.cli import exits, report, signals
from orchestrator.cli.events_file import EventsFile
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.cli.live import LiveView
from orchestrator.cli.plain import PlainLines
from orchestrator.cli.tree import RunTree, head
from orchestrator.collector import collecting_seldom
from orchestrator.config import Settings
from orchestrator.errors import CallerError, InvariantError, MachineError, ModelError, OrchestratorError
from orchestrator.errors import SandboxError as SandboxFailure
from orchestrator.ids import RunId
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.runs.recorder import Observer
from orchestrator.turn import Outcome

Display: TypeAlias = LiveView | PlainLines


class _Logged(logging.Handler):
    """What libraries log, shown where it can neither reach the terminal raw nor break the live view."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.WARNING)
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Show one record."""
        try:
            text = self.format(record)
        except Exception:  # a library's slip in its format string is no reason to fail
            text = str(record.msg)
        self._display.warn(f"rlm: {record.name}: {text}")


@dataclass(frozen=True, slots=True)
class _End:
    """How `app.run` came back."""

    report: RunReport
    code: Exit
    failure: BaseException | None = None


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
        logged = _Logged(display)
        logging.getLogger().addHandler(logged)
        stack.callback(logging.getLogger().removeHandler, logged)
        stack.enter_context(collecting_seldom())
        end = asyncio.run(_watched(options, settings, tree, display, observers, provider=provider))
    return _print(end, tree, as_json=as_json, live=live)


async def _watched(
    options: RunOptions,
    settings: Settings,
    tree: RunTree,
    display: Display,
    observers: list[Observer],
    *,
    provider: ProviderProcess | None,
) -> _End:
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
            return _End(unfinished(Outcome.CANCELLED, "stopped by a signal"), Exit.NO_ANSWER)
        except OrchestratorError as error:
            return _End(unfinished(_outcome_of(error), str(error)), exits.exit_for(error), error)
        # Whatever it is: what was spent and found is still to be told.
        except Exception as error:
            why = f"unexpected {type(error).__name__}"
            return _End(unfinished(Outcome.INTERNAL_ERROR, why), Exit.NO_ANSWER, error)
    answered = finished.outcome is Outcome.ANSWERED
    return _End(finished, Exit.DONE if answered else Exit.NO_ANSWER)


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


def _print(end: _End, tree: RunTree, *, as_json: bool, live: bool) -> Exit:
    began = tree.root is not None
    if isinstance(end.failure, CallerError | MachineError):
        exits.complain(end.failure)
        if not began:
            return end.code
    elif end.failure is not None and (
        isinstance(end.failure, InvariantError) or not isinstance(end.failure, OrchestratorError)
    ):
        exits.tell_block("".join(traceback.format_exception(end.failure)))
        exits.tell("rlm: this is a bug: please report the lines above, after removing what is confidential")
    scripted = tree.root is not None and tree.root.scripted
    for line in report.summary(end.report, scripted=scripted, notes=live):
        exits.tell(line)
    if as_json:
        read = exits.put(json_line(report.as_json(end.report)))
    elif end.report.answer is not None:
        read = exits.put(end.report.answer)
    else:
        read = True
    if not read:
        exits.tell("rlm: the answer could not be written to stdout")
        return Exit.NO_ANSWER
    return end.code


def stderr_can_be_redrawn(environment_term: str | None) -> bool:
    """Whether stderr is a terminal that moves its cursor."""
    return sys.stderr.isatty() and environment_term not in {None, "", "dumb"}
