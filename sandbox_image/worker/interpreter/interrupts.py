"""When SIGINT may raise: only while a cell's code runs.

Rules:

1. Between cells SIGINT does nothing.
2. While a cell runs it raises `CellInterrupt` in the main thread, wherever the code is.
3. Where half a step would break us (a frame half sent), it waits for the end of `held`.
4. In an async cell the first one cancels the cell's task, so that `finally` blocks can await; the next
raises.
"""

# Not `signal`, whose detour over enumerations costs fifteen times the call: this is in every cell's way.
import _signal  # type: ignore[import-not-found]
import threading
from collections.abc import Callable
from types import FrameType, TracebackType


class CellInterrupt(KeyboardInterrupt):
    """The orchestrator stopped this cell. Shown as the KeyboardInterrupt it is."""


CellInterrupt.__name__ = CellInterrupt.__qualname__ = "KeyboardInterrupt"
CellInterrupt.__module__ = "builtins"


class Interrupts:
    """The SIGINT handler and its state. Only the main thread touches it, where Python runs handlers."""

    def __init__(self) -> None:
        self.fired = False
        """Whether the present cell has been interrupted."""
        self._armed = False
        self._held = 0
        self._pending = False
        self._cancel: Callable[[], object] | None = None
        self._main_thread = threading.main_thread()

    def arm(self) -> None:
        """A cell's code starts. A cell may have put another handler in place; ours comes back."""
        _signal.signal(_signal.SIGINT, self._handle)
        self.fired = False
        self._pending = False
        self._armed = True

    def disarm(self) -> None:
        """The cell's code is over."""
        self._armed = False
        self._cancel = None

    def cancel_first(self, cancel: Callable[[], object]) -> None:
        """The cell is async, and `cancel` cancels its code."""
        self._cancel = cancel

    def __enter__(self) -> None:
        """Hold interrupts back, in the main thread; other threads get none anyway. Nests."""
        if threading.current_thread() is self._main_thread:
            self._held += 1

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if threading.current_thread() is self._main_thread:
            self._held -= 1
            if self._pending and not self._held:
                self._pending = False
                self._interrupt()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        if not self._armed:
            return
        if self._held:
            self._pending = True
        else:
            self._interrupt()

    def _interrupt(self) -> None:
        first = not self.fired
        self.fired = True
        if first and self._cancel is not None:
            self._cancel()
        else:
            raise CellInterrupt("the cell was interrupted")
