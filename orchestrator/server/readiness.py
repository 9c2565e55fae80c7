"""Whether this server can answer questions now: what runs stand on is asked, not assumed.

Rules:

1. The server is ready when every part answers, each within `ANSWER_S`. A part that still owes an answer is
   not asked again; it is not well until it has given it.
2. Parts are asked side by side: one that hangs hides nothing about the others.
3. What is said changes the log once, not with each look. Clients are told which part it is, and not more: an
   address or a path is for the log.
4. Who is not ready starts no run and keeps those that run (`Execution.hold`).
"""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from orchestrator.errors import KeyMissingError, MachineError, OrchestratorError
from orchestrator.models.provider.launch import ProviderProcess

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 2.0
ANSWER_S = 5.0
_MIB = 1024 * 1024
LEAST_FREE_BYTES = 64 * _MIB
"""Of the disk with the state directory. What runs has to be written down when it is full of contexts too."""
LEAST_FREE_FILES = 1_000

Look = Callable[[], Awaitable[None]]
"""Asks one part; raises an `OrchestratorError` or an `OSError` when it is not well."""

DATABASE = "the database does not answer"
ENGINE = "the container engine does not answer"
PROVIDER = "the model provider does not answer"
KEY_REFUSED = "the model provider does not accept the server's key"
DISK = "the disk of the state directory is full"
DRAINING = "the server drains"
CREDENTIALS = "the process that holds the provider's credentials has ended; start the server again"


class Readiness:
    """What was found at the last look."""

    def __init__(
        self,
        parts: Mapping[str, Look],
        provider: ProviderProcess | None = None,
        *,
        answer_s: float = ANSWER_S,
    ) -> None:
        """Looks at nothing yet.

        Args:
            parts: What to ask, by what clients are told when it is not well.
            provider: The process with the provider's credentials. When it has ended, so has this server.
            answer_s: How long a part may take.
        """
        self._parts = parts
        self._provider = provider
        self._answer_s = answer_s
        self._asked: dict[str, asyncio.Task[None]] = {}
        self._why: dict[str, str] = {}
        self.broken = ""
        """Why this process will never be ready again; empty while it may be."""

    @property
    def is_ready(self) -> bool:
        """Whether every part was well."""
        return not self._why

    @property
    def told(self) -> Sequence[str]:
        """What is not well, a sentence each, for clients."""
        return tuple(self._why)

    async def look(self) -> None:
        """Ask everything once."""
        if self._provider is not None and self._provider.has_ended:
            self.broken = CREDENTIALS
            self._why = {self.broken: self.broken}
            return
        for part, look in self._parts.items():
            if part not in self._asked:
                self._asked[part] = asyncio.ensure_future(look())
        await asyncio.wait(self._asked.values(), timeout=self._answer_s)
        self._say(dict(filter(None, map(self._answer, self._parts))))

    async def aclose(self) -> None:
        """Wait for nobody any more."""
        for task in self._asked.values():
            task.cancel()
        if self._asked:
            # One that asks a database which hangs finishes what it has begun.
            await asyncio.wait(self._asked.values(), timeout=self._answer_s)
        self._asked.clear()

    def _answer(self, part: str) -> tuple[str, str] | None:
        """What is told of a part that is not well, and what is logged."""
        if not self._asked[part].done():
            return part, f"no answer for {self._answer_s:g} s"
        try:
            self._asked.pop(part).result()
        except KeyMissingError as error:
            return KEY_REFUSED, str(error)
        except (OrchestratorError, OSError) as error:
            return part, str(error)
        except Exception as error:
            # A look that fails is no reason to stop looking.
            _log.exception("a look at what the server needs failed")
            return part, type(error).__name__
        return None

    def _say(self, why: dict[str, str]) -> None:
        for part, reason in why.items():
            if part not in self._why:
                _log.error("not ready: %s (%s)", part, reason)
        if self._why and not why:
            _log.info("ready again")
        self._why = why


def room_in(directory: Path) -> Look:
    """A look at the disk of a directory."""

    async def look() -> None:
        found = await asyncio.to_thread(os.statvfs, directory)
        # A file system without a fixed number of files says 0 of 0.
        no_files = found.f_files and found.f_favail < LEAST_FREE_FILES
        if no_files or found.f_bavail * found.f_frsize < LEAST_FREE_BYTES:
            free_mib = found.f_bavail * found.f_frsize // _MIB
            raise MachineError(f"{directory} has room for {free_mib:,} MiB and {found.f_favail:,} files only")

    return look


@asynccontextmanager
async def looking(
    readiness: Readiness,
    *,
    say_ready: Callable[[bool], Awaitable[None]],
    on_broken: Callable[[], None],
    every_s: float = LOOK_EVERY_S,
) -> AsyncIterator[None]:
    """Look now and then for the length of the block, which begins after the first look.

    Args:
        readiness: What is asked.
        say_ready: Told after each look.
        on_broken: Told when looking on makes no sense; nothing is looked at any more.
        every_s: From one look to the next.
    """

    async def look() -> bool:
        await readiness.look()
        await say_ready(readiness.is_ready)
        if readiness.broken:
            _log.error("%s", readiness.broken)
            on_broken()
        return not readiness.broken

    async def look_on() -> None:
        while True:
            await asyncio.sleep(every_s)
            if not await look():
                return

    await look()
    task = asyncio.create_task(look_on())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
        await readiness.aclose()
