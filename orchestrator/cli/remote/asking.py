"""`rlm run --server` and `rlm runs watch`: a run on a server, shown and reported like one of this process.

Stopping one that was asked here: the first signal asks the server to cancel it, and its end is waited for;
the second leaves it to itself. Stopping to watch one changes nothing for it.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import ExitStack, aclosing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from orchestrator.cli import ending, exits, report, signals, words
from orchestrator.cli.ending import End
from orchestrator.cli.events_file import EventsFile
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.cli.live import LiveView
from orchestrator.cli.logged import Display, logged
from orchestrator.cli.plain import PlainLines
from orchestrator.cli.remote.connection import Connection
from orchestrator.cli.remote.session import client_of
from orchestrator.cli.tree import RunTree, head
from orchestrator.client import Client, Run, RunOptions
from orchestrator.errors import CallerError, OrchestratorError
from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.run_report import RunReport
from orchestrator.trajectory import Event, RunStarted
from orchestrator.turn import Outcome

LEFT = "left"
"""In the object of `--json`, for a run that goes on without its watcher."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """What is asked."""

    question: str
    context_paths: Sequence[Path]
    options: RunOptions


def question(text: str, context_paths: Sequence[Path], options: Mapping[str, Any]) -> Question:
    """A question of a command line.

    Args:
        text: What is asked.
        context_paths: What about.
        options: By the names of `RunOptions`; others mean nothing to a server.
    """
    known = {item.name for item in fields(RunOptions)}
    given = {name: value for name, value in options.items() if name in known}
    return Question(question=text, context_paths=tuple(context_paths), options=RunOptions(**given))


def ask(
    connection: Connection, asked: Question, *, events_path: Path | None, as_json: bool, live: bool
) -> Exit:
    """Have a question answered, and print what came of it as `rlm run` does.

    Args:
        connection: To the server.
        asked: What is asked.
        events_path: Where every event is written.
        as_json: Print the object of docs/command-line.md.
        live: Show the run tree live; stderr is a terminal that can.

    Raises:
        InvalidRequestError: The events file cannot be written. Nothing has been asked.
    """

    def work(visit: "_Visit", client: Client) -> Coroutine[Any, Any, _Finish]:
        return visit.ask(client, asked)

    return _shown(connection, work, asked.context_paths, events_path, as_json=as_json, live=live)


def watch(
    connection: Connection, run_id: str, *, events_path: Path | None, as_json: bool, live: bool
) -> Exit:
    """Show a run from its beginning to its end, likewise."""

    def work(visit: "_Visit", client: Client) -> Coroutine[Any, Any, _Finish]:
        return visit.watch(client, run_id)

    return _shown(connection, work, (), events_path, as_json=as_json, live=live)


class _Finish(NamedTuple):
    """A run that has ended, with its whole answer."""

    run: Run
    answer: str | None


@dataclass(slots=True)
class _Visit:
    """One run on a server, as far as this command has to do with it."""

    connection: Connection
    tree: RunTree
    display: Display
    file: EventsFile | None
    run_id: str = ""
    """Empty before there is one."""
    limits: RunLimits = field(default_factory=RunLimits)
    notes: Sequence[str] = ()
    is_asking: bool = False
    """The question is on its way, or was taken: stopping has to ask the server."""
    _client: Client | None = None
    _task: asyncio.Task[_Finish] | None = None
    _created: asyncio.Event = field(default_factory=asyncio.Event)
    _cancelling: asyncio.Task[None] | None = None

    async def ask(self, client: Client, asked: Question) -> _Finish:
        """Upload, ask, follow."""
        self.display.say(f"sending the context to {self.connection.address}")
        uploaded = await client.upload(*asked.context_paths)
        self.notes = uploaded.notes
        self.is_asking = True
        created = await client.create_run(
            asked.question, context_id=uploaded.context_id, options=asked.options
        )
        self._met(created.run)
        self.display.say(f"run {self.run_id} on {self.connection.address} is {created.run.state.value}")
        self._created.set()
        return await self._follow(client)

    async def watch(self, client: Client, run_id: str) -> _Finish:
        """Follow."""
        self._met(await client.get_run(run_id))
        return await self._follow(client)

    async def attend(self, work: "_Work") -> _Finish:
        """The work with a connection, stopped by signals.

        Raises:
            StoppedError: A signal came. The run may go on.
            OrchestratorError: The server refused, or was away for too long.
        """

        async def connected() -> _Finish:
            async with client_of(self.connection, self.display.say) as client:
                self._client = client
                try:
                    return await work(self, client)
                finally:
                    await self._stop_cancelling()

        self._task = asyncio.create_task(connected())
        with signals.heard(self._stop):
            await asyncio.wait([self._task])
        if self._task.cancelled():
            raise signals.StoppedError
        return self._task.result()

    def _met(self, run: Run) -> None:
        self.run_id = run.run_id
        given = {item.name: getattr(run.options, item.name, None) for item in fields(RunLimits)}
        self._hold_to(
            replace(self.limits, **{name: value for name, value in given.items() if value is not None})
        )

    def _hold_to(self, limits: RunLimits) -> None:
        self.limits = limits
        if isinstance(self.display, LiveView):
            self.display.limits = limits

    async def _follow(self, client: Client) -> _Finish:
        async with aclosing(client.watch(self.run_id)) as events:
            async for _position, event in events:
                self._show(event)
        run = await client.get_run(self.run_id)
        return _Finish(run, await client.read_answer(run))

    def _show(self, raw: Mapping[str, object]) -> None:
        if self.file is not None:
            self.file.write(raw)
        event = _decoded(raw)
        if event is None:
            return
        if isinstance(event.payload, RunStarted) and event.payload.parent is None:
            self._hold_to(_limits(event.payload.limits, self.limits))
        self.tree.add(event)
        self.display.on_event(event)

    def _stop(self, signals_so_far: int) -> None:
        task = self._task
        if task is None:
            return
        # Cancelled once: cleaning up is not disturbed by further signals.
        if not self.is_asking or self._client is None:
            if signals_so_far == 1:
                self.display.say("stopping" if self.run_id else "stopping: nothing has been asked yet")
                task.cancel()
        elif signals_so_far == 1:
            self.display.say("asking the server to cancel the run; once more leaves it running")
            self._cancelling = asyncio.create_task(self._cancel(self._client))
        elif signals_so_far == 2:
            task.cancel()

    async def _cancel(self, client: Client) -> None:
        await self._created.wait()
        try:
            await client.cancel_run(self.run_id)
        except OrchestratorError as error:
            self.display.warn(f"rlm: the run was not cancelled: {error}")
        else:
            self.display.say("the server is ending the run")

    async def _stop_cancelling(self) -> None:
        if self._cancelling is not None:
            self._cancelling.cancel()
            await asyncio.wait([self._cancelling])


_Work: TypeAlias = Callable[[_Visit, Client], Coroutine[Any, Any, _Finish]]


def _shown(
    connection: Connection,
    work: _Work,
    inputs: Sequence[Path],
    events_path: Path | None,
    *,
    as_json: bool,
    live: bool,
) -> Exit:
    tree = RunTree()
    display = LiveView(tree, RunLimits()) if live else PlainLines(tree)
    with ExitStack() as stack:
        file = None
        if events_path is not None:
            file = EventsFile(events_path, inputs=inputs, warn=display.warn)
            stack.callback(file.close)
        stack.enter_context(logged(display))
        visit = _Visit(connection, tree, display, file)
        end, is_left = asyncio.run(_ended(visit, work))
    if is_left:
        return _show_left(visit, end, as_json=as_json)
    return ending.show(end, tree, as_json=as_json, live=live)


async def _ended(visit: _Visit, work: _Work) -> tuple[End, bool]:
    """How it ended for this command, and whether the run may go on."""
    started_s = time.monotonic()

    def unfinished(outcome: Outcome, why: str) -> RunReport:
        return _report(visit, outcome, None, why, time.monotonic() - started_s)

    async with visit.display:
        try:
            run, answer = await visit.attend(work)
        except signals.StoppedError:
            may_go_on = bool(visit.run_id) or visit.is_asking
            return End(unfinished(Outcome.CANCELLED, "stopped by a signal"), Exit.NO_ANSWER), may_go_on
        except OrchestratorError as error:
            end = End(unfinished(Outcome.INTERNAL_ERROR, str(error)), exits.exit_for(error), error)
            # One that was deleted meanwhile does not go on.
            return end, bool(visit.run_id) and not isinstance(error, CallerError)
        # Whatever it is: what was spent and found is still to be told.
        except Exception as error:
            why = f"unexpected {type(error).__name__}"
            end = End(unfinished(Outcome.INTERNAL_ERROR, why), Exit.NO_ANSWER, error)
            return end, bool(visit.run_id)
    outcome, why = _outcome(run)
    code = Exit.DONE if outcome is Outcome.ANSWERED else Exit.NO_ANSWER
    return End(_report(visit, outcome, answer, why, time.monotonic() - started_s), code), False


def _report(visit: _Visit, outcome: Outcome, answer: str | None, error: str, duration_s: float) -> RunReport:
    root = visit.tree.root
    return RunReport(
        run_id=RunId(visit.run_id),
        outcome=outcome,
        answer=answer if outcome is Outcome.ANSWERED else None,
        error=error,
        found_so_far=head(root.last_output) if root is not None and outcome is not Outcome.ANSWERED else "",
        tally=visit.tree.tally,
        limits=visit.limits,
        duration_s=duration_s,
        context_bytes=0,
        notes=visit.notes,
    )


def _show_left(visit: _Visit, end: End, *, as_json: bool) -> Exit:
    if isinstance(end.failure, OrchestratorError):
        exits.complain(end.failure)
    if end.failure is not None:
        ending.tell_bug(end.failure)
    address, options = visit.connection.address, visit.connection.options
    if visit.run_id:
        exits.tell(f"rlm: run {visit.run_id} is left as it is on {address}; this shows it again:")
        exits.tell(f"rlm:   rlm runs watch {visit.run_id} {options}".rstrip())
    else:
        exits.tell(f"rlm: {address} may have taken the question; this shows it:")
        exits.tell(f"rlm:   rlm runs list {options}".rstrip())
    exits.tell(f"rlm: used so far {words.used(visit.tree.tally)}")
    if as_json:
        # No outcome of a run: it has none yet.
        exits.put(json_line(report.as_json(end.report) | {"outcome": LEFT}))
    return end.code


def _outcome(run: Run) -> tuple[Outcome, str]:
    try:
        return Outcome(run.outcome), run.error
    except ValueError:
        return (
            Outcome.INTERNAL_ERROR,
            run.error or f"an outcome that this client does not know: {run.outcome}",
        )


def _limits(told: Mapping[str, float], otherwise: RunLimits) -> RunLimits:
    """Those of the run's first event, which tells of all of them."""
    known = {item.name for item in fields(RunLimits)}
    limits: dict[str, Any] = {name: value for name, value in told.items() if name in known}
    return replace(otherwise, **limits)


def _decoded(raw: Mapping[str, object]) -> Event | None:
    """None for an event that this client cannot show: a newer server may have more kinds."""
    try:
        return Event.from_json(raw)
    except (OrchestratorError, ValueError, TypeError, KeyError):
        return None
