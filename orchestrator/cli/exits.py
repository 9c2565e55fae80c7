"""How the command ends, and what it may write where.

  0  answered; doctor: all is well
  1  ended without an answer: the outcome says why (cancelling is one of them)
  2  wrong use: something the caller can change in the call
  3  the machine lacks something: engine, image, key, an address that answers

Everything goes through here on its way to a stream, and leaves without a terminal control character,
whoever wrote it.
"""

import os
import sys
from enum import IntEnum
from typing import TextIO

from orchestrator.errors import CallerError, MachineError, OrchestratorError
from orchestrator.visible import visible, visible_line

MAX_LINE_CHARS = 400


class Exit(IntEnum):
    """The exit codes."""

    DONE = 0
    NO_ANSWER = 1
    WRONG_USE = 2
    MACHINE = 3


def exit_for(error: OrchestratorError) -> Exit:
    """The exit code of an error that ended the command."""
    if isinstance(error, CallerError):
        return Exit.WRONG_USE
    if isinstance(error, MachineError):
        return Exit.MACHINE
    return Exit.NO_ANSWER


def tell(text: str, *, max_chars: int = MAX_LINE_CHARS) -> None:
    """One line on stderr."""
    _write(sys.stderr, visible_line(text, max_chars))


def tell_block(text: str) -> None:
    """Lines on stderr. Those behind the first are set in, so that no text can forge a line of ours."""
    _write(sys.stderr, visible(text.rstrip("\n").expandtabs(4).replace("\n", "\n    ")))


def complain(error: OrchestratorError) -> None:
    """The sentence of an error."""
    tell(f"rlm: {error}", max_chars=2_000)


def put(text: str) -> bool:
    """Text and a newline on stdout; whether somebody was there to read it."""
    return _write(sys.stdout, visible(text))


def _write(stream: TextIO, text: str) -> bool:
    encoding = stream.encoding or "utf-8"
    try:
        print(text.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)
    except OSError:
        # The reader is gone. What could not be written would be tried again at exit, and fail again.
        _discard(stream)
        return False
    return True


def _discard(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
