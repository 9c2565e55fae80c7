"""One interpreter process as the worker sees it."""

import asyncio
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from sandbox_image.worker import protocol
from sandbox_image.worker.frames import Frame
from sandbox_image.worker.link import FrameLink
from sandbox_image.worker.output import Chunk
from sandbox_image.worker.processes import Reaper
from sandbox_image.worker.pump import OutputPump
from sandbox_image.worker.spawn import Spawned

_DRAIN_TIMEOUT_S = 1.0


class InterpreterFailed(Exception):  # noqa: N818 - says what happened
    """An interpreter ended before it could run a cell. Another one would do the same."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where an interpreter's messages go. Called from within the event loop's read callbacks."""

    on_control: Callable[[Frame], None]
    """`answer` and `ended` frames."""
    on_call: Callable[[Frame], None]
    """Requests of sub-calls."""
    on_output: Callable[[Chunk], None]
    """Output of the running cell, cut to its limits."""


class Guest:
    """A running interpreter. Made by `open`, over when `exit_code` is done, released by `close`."""

    def __init__(self, spawned: Spawned, listener: Listener, exit_code: asyncio.Future[int]) -> None:
        loop = asyncio.get_running_loop()
        self.hash_seed = spawned.hash_seed
        self.exit_code = exit_code
        self.pump = OutputPump(loop, spawned.output_fd, listener.on_output)
        self.control: FrameLink
        self.calls: FrameLink
        self._pid = spawned.pid
        self._listener = listener
        self._milestone: asyncio.Future[str] = loop.create_future()

    @classmethod
    async def open(cls, spawned: Spawned, listener: Listener, reaper: Reaper) -> Self:
        """Connect to a spawned interpreter and wait until it can be leased.

        Raises:
            InterpreterFailed: It ended first.
        """
        guest = cls(spawned, listener, reaper.watch(spawned.pid))
        guest.calls = await FrameLink.open(spawned.calls, listener.on_call, guest._kill)
        guest.control = await FrameLink.open(spawned.control, guest._on_control, guest._kill)
        await guest._reach(protocol.READY)
        return guest

    async def lease(self, terms: dict[str, object]) -> None:
        """Give it the limits and let it open the context.

        Raises:
            InterpreterFailed: It ended, most likely because the context is missing or broken.
        """
        self.control.send({"kind": protocol.LEASE, **terms})
        await self._reach(protocol.LEASED)

    def interrupt(self) -> None:
        """SIGINT to the interpreter alone, and SIGCONT for one that stopped itself."""
        if not self.exit_code.done():
            os.kill(self._pid, signal.SIGINT)
            os.kill(self._pid, signal.SIGCONT)

    async def drain(self) -> None:
        """Handle what a dead interpreter had still sent."""
        # The links end by themselves once every holder of the other end is dead. The time limit is for a
        # process that outlives SIGKILL.
        self.control.pause(False)
        await asyncio.wait([self.control.lost, self.calls.lost], timeout=_DRAIN_TIMEOUT_S)

    def close(self) -> None:
        """Let go of everything. An interpreter that still runs ends when it finds no worker."""
        self.control.close()
        self.calls.close()
        self.pump.close()

    async def _reach(self, milestone: str) -> None:
        waiting: list[asyncio.Future[object]] = [self._milestone, self.exit_code]  # type: ignore[list-item]
        await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if not self._milestone.done() or self._milestone.result() != milestone:
            raise InterpreterFailed(f"the interpreter ended before it was {milestone}")
        self._milestone = asyncio.get_running_loop().create_future()

    def _on_control(self, frame: Frame) -> None:
        if frame.header["kind"] in (protocol.READY, protocol.LEASED):
            self._milestone.set_result(frame.header["kind"])
        else:
            self._listener.on_control(frame)

    def _kill(self) -> None:
        # It, or a cell that found its socket, does not speak the protocol.
        if not self.exit_code.done():
            os.kill(self._pid, signal.SIGKILL)
