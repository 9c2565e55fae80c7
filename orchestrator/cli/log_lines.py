"""The server's log, on stderr: a line for each record, without a control character.

An exception is told by its kind and the places it came through, never by its text: that may quote what a
model or a client wrote. Our own errors' sentences are made for a log, and are in the message.
"""

import json
import logging
import os
import traceback
from datetime import UTC, datetime

from orchestrator.cli import exits
from orchestrator.service.log_context import bound

_MAX_CHARS = 4_000
"""Of a message, and of a line of text. A JSON line is never cut: half an object is none."""
_LONGEST_ESCAPE = 12


class LogLines(logging.Handler):
    """Writes records as text, or as one JSON object each."""

    def __init__(self, *, as_json: bool) -> None:
        super().__init__(logging.INFO)
        self._as_json = as_json

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        try:
            message = record.getMessage()
        except Exception:  # a library's slip in its format string is no reason to fail
            message = str(record.msg)
        said = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": message,
            **bound(),
            **_exception(record),
        }
        if self._as_json:
            whole = json.dumps({name: _cut(str(value)) for name, value in said.items()})
            exits.tell(whole, max_chars=len(said) * _LONGEST_ESCAPE * (_MAX_CHARS + 100))
        else:
            exits.tell(_text(said), max_chars=_MAX_CHARS)


def _cut(text: str) -> str:
    return text if len(text) <= _MAX_CHARS else text[:_MAX_CHARS] + "..."


def _text(said: dict[str, str]) -> str:
    rest = "".join(
        f" {name}={value}" for name, value in said.items() if name not in {"at", "level", "logger", "message"}
    )
    return f"rlm: {said['level']}: {said['logger']}: {said['message']}{rest}"


def _exception(record: logging.LogRecord) -> dict[str, str]:
    if not record.exc_info or record.exc_info[1] is None:
        return {}
    error = record.exc_info[1]
    places = [
        f"{os.path.basename(frame.f_code.co_filename)}:{line}"
        for frame, line in traceback.walk_tb(error.__traceback__)
    ]
    return {"exception": type(error).__name__, "through": " ".join(places)}
