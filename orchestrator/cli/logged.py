"""What libraries log, shown where it can neither reach the terminal raw nor break the live view."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeAlias

from orchestrator.cli.live import LiveView
from orchestrator.cli.plain import PlainLines

Display: TypeAlias = LiveView | PlainLines


class Logged(logging.Handler):
    """Hands warnings to a display."""

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


@contextmanager
def logged(display: Display) -> Iterator[None]:
    """Warnings of the block's libraries go to the display."""
    handler = Logged(display)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
