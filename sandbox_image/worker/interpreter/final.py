"""How a cell ends the run."""

import json
import os
import threading
from collections.abc import Mapping
from typing import Any, NoReturn

from sandbox_image.worker.interpreter.text import TextView


class RunEnded(BaseException):
    """Raised by FINAL to leave the cell. Not an Exception, so that `except Exception` lets it pass."""


def report_thread_error(args: threading.ExceptHookArgs) -> None:
    """Show an exception that ended a thread, as Python does; calling FINAL in one is not an error."""
    if args.exc_type is not RunEnded:
        threading.__excepthook__(args)


class FinalAnswer:
    """The run's answer, once a cell has given one. The first wins, from whatever thread, swallowed or not."""

    def __init__(self) -> None:
        self.max_bytes = 0
        self.content: bytes | None = None
        self._pid = os.getpid()

    def offer(self, value: Any) -> None:
        """Take the answer, unless there is one.

        Raises:
            TypeError: JSON cannot hold it.
            ValueError: It is longer than the run allows.
            RuntimeError: This is a forked child, whose memory nobody reads.
        """
        if os.getpid() != self._pid:
            raise RuntimeError("FINAL works only in the cell's own process; hand the value back to it first")
        if self.content is None:
            self.content = encode_answer(value, self.max_bytes)

    def offer_dict(self, answer: Any) -> None:
        """Take `answer["content"]` when `answer["ready"]` is set, and unset it if it cannot be taken.

        Raises:
            As `offer` does.
        """
        if not isinstance(answer, dict) or not answer.get("ready"):
            return
        try:
            self.offer(answer.get("content", ""))
        except (TypeError, ValueError):
            # Else every later cell would fail for it.
            answer["ready"] = False
            raise


def encode_answer(value: Any, max_bytes: int) -> bytes:
    """`value` as the answer's UTF-8 text.

    Raises:
        TypeError: It is no text and JSON cannot hold it.
        ValueError: It is longer than `max_bytes`.
    """
    if isinstance(value, TextView):
        _check_length(value.stretch.length_bytes, max_bytes)
        return bytes(value.stretch.view())
    text = value if isinstance(value, str) else _to_json(value)
    # Four bytes a character at most: a text far over the limit is refused before it is copied.
    _check_length(len(text), max_bytes)
    encoded = text.encode("utf-8", "replace")
    _check_length(len(encoded), max_bytes)
    return encoded


def look_up(name: Any, namespace: Mapping[str, Any]) -> Any:
    """The value of a variable by its name.

    Raises:
        TypeError: `name` is no string.
        NameError: There is no such variable; names like it are listed.
    """
    if not isinstance(name, str):
        raise TypeError(
            f'FINAL_VAR takes the name of a variable, as in FINAL_VAR("x"), not {type(name).__name__}'
        )
    if name in namespace:
        return namespace[name]
    import difflib  # noqa: PLC0415 - for a misspelt name alone

    near = difflib.get_close_matches(name, [known for known in list(namespace) if isinstance(known, str)])
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise NameError(f"FINAL_VAR: no variable is called {name[:100]!r}{hint}", name=name)


def _check_length(length_bytes: int, max_bytes: int) -> None:
    if length_bytes > max_bytes:
        raise ValueError(f"the answer has {length_bytes:,} bytes; this run allows {max_bytes:,}")


def _to_json(value: Any) -> str:
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(value, error)


def _refuse(value: Any, error: Exception) -> NoReturn:
    raise TypeError(
        "FINAL takes text or a value that JSON can hold, and this "
        f"{type(value).__name__} it cannot hold: {error}"
    ) from None
