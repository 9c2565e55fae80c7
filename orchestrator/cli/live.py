"""The live view on a terminal: a frame of the run tree, redrawn a few times a second."""

import asyncio
import sys
import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.text import Text

from orchestrator.cli import exits
from orchestrator.cli.frame import Row, Style, frame
from orchestrator.cli.tree import RunTree
from orchestrator.limits import RunLimits
from orchestrator.trajectory import Event

_REDRAW_S = 0.25
_STYLES: dict[Style, str] = {"run": "bold", "code": "cyan", "quiet": "dim", "good": "green", "bad": "red"}


class LiveView:
    """Shows the tree while the block lasts; the last frame stays.

    Redrawn by a task of the event loop and not by rich's thread: the tree changes under that one's hands.
    """

    def __init__(self, tree: RunTree, limits: RunLimits) -> None:
        self._tree = tree
        self.limits = limits
        """Of the run. To be replaced when a server has decided them."""
        self._status = ""
        self._status_at = 0.0
        self._warnings: list[str] = []
        self._console = Console(file=sys.stderr, highlight=False, markup=False, emoji=False)
        # Nothing else prints while it stands, so nothing needs redirecting around it.
        self._live = Live(
            console=self._console, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        self._redrawing: asyncio.Task[None] | None = None

    def on_event(self, event: Event) -> None:
        """The tree has folded it in already; the next frame shows it."""

    def say(self, line: str) -> None:
        """Show what is being waited for, until the root run does something else."""
        self._status, self._status_at = line, time.time()

    def warn(self, text: str) -> None:
        """Keep a text until the view is down, and print it below."""
        self._warnings.append(text)

    async def __aenter__(self) -> "LiveView":
        self._live.start()
        self._redrawing = asyncio.create_task(self._redraw())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._status = ""
        try:
            if await self._stop_redrawing():
                self._draw()
            self._live.stop()
        except OSError:
            pass  # the terminal was closed; the run's end does not depend on it
        for text in self._warnings:
            exits.tell_block(text)

    async def _stop_redrawing(self) -> bool:
        """Whether it had been going well: a view that cannot be drawn must not cost the answer."""
        if self._redrawing is None:
            return False
        self._redrawing.cancel()
        await asyncio.wait([self._redrawing])
        if self._redrawing.cancelled():
            return True
        failure = self._redrawing.exception()
        if failure is not None:
            self.warn(f"rlm: the live view failed, which is a bug: {failure!r}")
        return False

    async def _redraw(self) -> None:
        while True:
            try:
                self._draw()
            except OSError:
                return
            await asyncio.sleep(_REDRAW_S)

    def _draw(self) -> None:
        now = time.time()
        root = self._tree.root
        stale = root is not None and self._status_at < root.phase_at
        rows = frame(
            self._tree,
            limits=self.limits,
            now=now,
            # The cursor stands on a line of its own below.
            height=self._console.height - 1,
            status="" if stale else self._status,
        )
        self._live.update(styled(rows), refresh=True)


def styled(rows: list[Row]) -> Text:
    """The rows for rich, each one line however narrow the terminal is."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for number, row in enumerate(rows):
        text.append("\n" if number else "")
        text.append(row.text, _STYLES[row.style])
    return text


def stderr_can_be_redrawn(environment_term: str | None) -> bool:
    """Whether stderr is a terminal that moves its cursor."""
    return sys.stderr.isatty() and environment_term not in {None, "", "dumb"}
