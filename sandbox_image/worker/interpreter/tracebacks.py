"""Tracebacks as a model should see them: its own lines, and never too many."""

import os
import sys
import traceback
from collections.abc import Iterator
from types import TracebackType
from typing import cast

from sandbox_image.worker.protocol import TRACEBACK_BYTES

_CUT = b"\n... [%d bytes of the traceback cut] ...\n"

# Frames from here are not the cell's: the standard library, installed packages, this package.
_FOREIGN = tuple(
    path + os.sep
    for path in {
        os.path.dirname(os.__file__),
        *(path for path in sys.path if path.endswith("-packages")),
        os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))),
    }
)


def format_error(error: BaseException, trace: TracebackType | None) -> bytes:
    """The traceback, trimmed to the cell's own frames, at most `TRACEBACK_BYTES`.

    Showing an exception runs code of the cell (`__str__`, `__notes__`, ...), which may do anything; whatever
    it raises, an interrupt included, is named in place of the traceback.
    """
    try:
        shown = traceback.TracebackException(type(error), error, trace, compact=True)
        for one in _chain(shown):
            one.stack = traceback.StackSummary.from_list(
                [frame for frame in one.stack if not _is_foreign(frame.filename)]
            )
        # Line by line and each cut, so that a message of 100 MB is copied once and not several times.
        lines = [cut(line.encode("utf-8", "replace"), TRACEBACK_BYTES) for line in shown.format()]
        return cut(b"".join(lines).rstrip(b"\n"), TRACEBACK_BYTES)
    except BaseException as failure:
        text = f"{type(error).__name__}: (it could not be shown: {type(failure).__name__})"
        return cut(text.encode("utf-8", "replace"), TRACEBACK_BYTES)


def cut(text: bytes, limit_bytes: int) -> bytes:
    """`text` with its middle left out where it is over the limit; the start and the end say most."""
    if len(text) <= limit_bytes:
        return text
    note = _CUT % len(text)
    keep = limit_bytes - len(note)
    start, end = text[: keep // 2], text[-(keep - keep // 2) :]
    # A character cut in two is dropped.
    return start.decode("utf-8", "ignore").encode() + note + end.decode("utf-8", "ignore").encode()


def _is_foreign(filename: str) -> bool:
    return filename.startswith(_FOREIGN) or filename.startswith("<frozen ")


def _chain(shown: traceback.TracebackException) -> Iterator[traceback.TracebackException]:
    """The exception, its causes and contexts, and the members of groups."""
    waiting = [shown]
    seen: set[int] = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        waiting += [other for other in (one.__cause__, one.__context__, *(one.exceptions or ())) if other]


def current_error() -> tuple[BaseException, TracebackType | None]:
    """The exception being handled. From `sys`, because a class may redefine `__traceback__`."""
    _, error, trace = sys.exc_info()
    return cast(BaseException, error), trace
