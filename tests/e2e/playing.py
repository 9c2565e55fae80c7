"""Runs through `app.run`, in real containers, with a model that says what a test has written down."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator import access, app
from orchestrator.app import RunOptions
from orchestrator.config import Settings
from orchestrator.conversation import Entry, Reply, Told, ToolReport
from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.models.scripted import ScriptedClient, Step
from orchestrator.run_report import RunReport
from orchestrator.trajectory import CellEnded, Event, Payload, RunStarted

LAST_WORDS = "the script is over"
"""What a script of cells says when none of them gave an answer."""

_SCRIPT = """\
import asyncio
from orchestrator.errors import *
from orchestrator.models.scripted import *

def run(question, depth):
    for step in {steps} if depth == 0 else {child_steps}:
        yield step
    return {last_words!r}

async def complete(prompt):
{complete}
"""

Before = Callable[[ModelRequest], Awaitable[None]]


async def _nothing(request: ModelRequest) -> None:
    """Before a request that nobody waits for."""


@dataclass(kw_only=True, slots=True)
class Played:
    """A run and all that was said in it."""

    events: list[Event] = field(default_factory=list)
    requests: list[ModelRequest] = field(default_factory=list)
    """Everything any model of the run tree was sent, in order."""
    finished: RunReport | None = None

    @property
    def report(self) -> RunReport:
        """What `app.run` came back with."""
        assert self.finished is not None
        return self.finished

    @property
    def root_id(self) -> RunId:
        """The root run."""
        return next(
            event.run_id
            for event in self.events
            if isinstance(event.payload, RunStarted) and event.payload.parent is None
        )

    def of_root(self, kind: type[Payload]) -> list[Payload]:
        """The root run's events of a kind."""
        return [
            event.payload
            for event in self.events
            if event.run_id == self.root_id and isinstance(event.payload, kind)
        ]

    @property
    def cells(self) -> list[CellEnded]:
        """How the root run's cells ended."""
        return [payload for payload in self.of_root(CellEnded) if isinstance(payload, CellEnded)]

    @property
    def root_requests(self) -> list[ModelRequest]:
        """What the root run's model was sent."""
        return [request for request in self.requests if _is_root(request)]

    @property
    def root_requests_as_text(self) -> list[str]:
        """Those requests, word for word."""
        return [
            "\n".join((request.system, *map(_as_text, request.conversation)))
            for request in self.root_requests
        ]

    @property
    def told(self) -> list[str]:
        """What the root run's model was told about its cells; one that ended the run is not among them."""
        return [entry.text for entry in self.root_requests[-1].conversation if isinstance(entry, ToolReport)]


def _as_text(entry: Entry) -> str:
    return repr(entry.content) if isinstance(entry, Reply) else entry.text


def _is_root(request: ModelRequest) -> bool:
    first = request.conversation[0]
    return bool(request.system) and isinstance(first, Told) and "\nDepth: 0\n" in first.text


class Player:
    """Plays scripts. There is one to a test."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        monkeypatch: pytest.MonkeyPatch,
        *,
        runtime: str = "runc",
    ) -> None:
        self.settings = settings
        self._runtime = runtime
        self._directory = directory
        self._monkeypatch = monkeypatch

    def script(
        self,
        steps: Sequence[Step],
        *,
        child_steps: Sequence[Step] = (),
        complete: str = "return prompt",
    ) -> Path:
        """The file of a script that runs these cells, or takes other steps of `models.scripted`.

        Args:
            steps: Of the root run.
            child_steps: Of every child run.
            complete: The body of the coroutine function that answers a sub-call's `prompt`.
        """
        path = self._directory / f"script{len(list(self._directory.glob('script*.py')))}.py"
        body = "\n".join(f"    {line}" for line in complete.splitlines())
        path.write_text(
            _SCRIPT.format(
                steps=list(steps), child_steps=list(child_steps), last_words=LAST_WORDS, complete=body
            )
        )
        return path

    def context(self, text: str = "nothing to see", name: str = "context.txt") -> Path:
        """A file with that text."""
        path = self._directory / name
        path.write_text(text)
        return path

    async def run(
        self,
        script: Path,
        context: Path | None = None,
        *,
        question: str = "What is in there?",
        limits: RunLimits | None = None,
        before: Before = _nothing,
        played: Played | None = None,
        settings: Settings | None = None,
    ) -> Played:
        """Run a script against a context.

        Args:
            script: A file as `rlm run --model scripted:FILE` takes it.
            context: A file or directory; some short text unless given.
            question: What the script is asked.
            limits: Of the run tree.
            before: Awaited before each request is answered.
            played: Filled while the run goes on; for runs that don't return.
            settings: Others than the test's.
        """
        into = Played() if played is None else played

        class Recording(ScriptedClient):
            async def complete(self, request: ModelRequest) -> Completion:
                into.requests.append(request)
                await before(request)
                return await super().complete(request)

        self._monkeypatch.setattr(access, "ScriptedClient", Recording)
        options = RunOptions(
            question=question,
            context_paths=(self.context() if context is None else context,),
            model=SCRIPTED_PREFIX + str(script),
            runtime=self._runtime,
            limits=RunLimits() if limits is None else limits,
        )
        into.finished = await app.run(options, settings or self.settings, observers=(into.events.append,))
        return into

    async def cells(
        self, *cells: str, limits: RunLimits | None = None, complete: str = "return prompt"
    ) -> Played:
        """Run these cells one after the other."""
        return await self.run(self.script(cells, complete=complete), limits=limits)
