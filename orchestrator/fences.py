"""Cells in fenced blocks, for models without tool use: what the text of a reply asks for.

    ```repl                   the first block of a reply is its cell; `python` and `py` are taken for `repl`,
    print(len(context))       because small models write them whatever they are told
    ```

Rules. They live in this file and nowhere else:

1. A fence stands at the beginning of a line, unindented, and has three backticks or more. Tildes and other
   languages are prose.
2. A fence inside a Python string does not end the cell. Python's own tokens decide what is one.
3. What follows the cell was written without having seen its output, and does not count: imagined outputs,
   further blocks, an answer.
4. In a reply without a cell, a line outside of all blocks that begins with `FINAL(` is the answer, up to the
   parenthesis that closes it, and `FINAL_VAR(` the name of a variable that holds it. `FINAL("text")` is taken
   without its quotes. A reply with a cell has no such answer: it would be a plan at best.
5. What is still open where the text ends goes on to that end. `closed` is False then; the caller knows if the
   model stopped there or was cut off.

Every step is linear in the length of the text: a model under attack can write anything. Repetitions are
possessive (`*+`, `++`), so they never try again what they have taken.
"""

import ast
import itertools
import operator
import re
import warnings
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class FencedCell:
    """Run this code."""

    code: str
    end: int
    """Where it ends in the text, its fence included."""
    closed: bool


@dataclass(frozen=True, slots=True)
class FencedAnswer:
    """`FINAL(...)` in prose."""

    text: str
    end: int
    closed: bool


Found: TypeAlias = FencedCell | FencedAnswer


def _long(quote: str) -> str:
    return rf"{quote * 3}(?:[^{quote}\\]++|\\.|{quote}(?!{quote * 2}))*+{quote * 3}"


def _short(quote: str) -> str:
    """Up to its quote or the end of its line, where Python would give it up."""
    return rf"{quote}(?!{quote * 2})(?:[^{quote}\\\r\n]++|\\(?:\r\n|.))*+"


def _block(fence: str) -> str:
    """Of any language, and whatever is in it."""
    return rf"{fence}[^\n]*+(?:\n(?!{fence})[^\n]*+)*+(?:\n{fence}[^\n]*+)?+(?:\n|\Z)"


_OPENING = re.compile(r"^`{3,}+(?:repl|python|py)[ \t]*+\r?$", re.MULTILINE | re.IGNORECASE)
_CLOSING = re.compile(r"\n`{3,}+")
_UP_TO_CLOSING = re.compile(
    "(?:"
    + "|".join(
        (
            r"""[^'"#\n]++""",
            r"#[^\r\n]*+",
            _long("'"),
            _long('"'),
            _short("'") + "'?",
            _short('"') + '"?',
            r"\n(?!```)",
        )
    )
    + ")*+",
    re.DOTALL,
)
_UP_TO_CALL = re.compile(
    "(?:"
    + "|".join((_block("```"), _block("~~~"), r"(?![ \t]*+FINAL(?:_VAR)?\()[^\n]*+\n"))
    + r")*+[ \t]*+(?P<name>FINAL|FINAL_VAR)\("
)
_ONE_STRING = re.compile(
    rf"\s*+(?P<string>{_long(chr(39))}|{_long(chr(34))}|{_short(chr(39))}'|{_short(chr(34))}\")\s*+\)",
    re.DOTALL,
)
_STEPS = [(byte == ord("(")) - (byte == ord(")")) for byte in range(256)]
"""What a byte adds to the depth of parentheses."""


def read(text: str) -> Found | None:
    """What the text asks for; None when it is prose only."""
    opening = _OPENING.search(text)
    if opening is None:
        return _read_call(text)
    return _read_cell(text, opening.end())


def _read_cell(text: str, start: int) -> FencedCell | None:
    stop = _match_end(_UP_TO_CLOSING, text, start)
    closing = _CLOSING.match(text, stop)
    closed = closing is not None
    if not closed:
        # A string that never ends. Python will refuse the cell, so the next fence may as well end it.
        closing = _CLOSING.search(text, stop)
    stop, end = closing.span() if closing else (len(text), len(text))
    code = text[start + 1 : stop].removesuffix("\r")
    return FencedCell(code, end, closed) if closed or code.strip() else None


def _read_call(text: str) -> Found | None:
    call = _UP_TO_CALL.match(text)
    return None if call is None else _read_argument(text, call["name"], call.end())


def _read_argument(text: str, name: str, start: int) -> Found | None:
    string = _ONE_STRING.match(text, start)
    if string is not None:
        argument, end, closed = _value(string["string"]), string.end(), True
    else:
        stop = _closing_parenthesis(text, start)
        closed = stop >= 0
        argument, end = (text[start:stop], stop + 1) if closed else (text[start:], len(text))
    argument = argument.strip()
    if not argument:
        return None
    if name == "FINAL":
        return FencedAnswer(argument, end, closed)
    return FencedCell(f"FINAL_VAR({argument.strip('`')!r})", end, closed)


def _closing_parenthesis(text: str, start: int) -> int:
    """Where the parenthesis that was opened before `start` is closed; -1 if nowhere."""
    # One byte a character. Without a loop of our own, for a text of parentheses only.
    steps = map(_STEPS.__getitem__, text[start:].encode("latin-1", "replace"))
    try:
        return start - 1 + operator.indexOf(itertools.accumulate(steps, initial=1), 0)
    except ValueError:
        return -1


def _value(string: str) -> str:
    """Of a Python string; as it stands if its escapes make no sense."""
    try:
        with warnings.catch_warnings():
            # Python warns of escapes it does not know, and takes them as they stand. So do we.
            warnings.simplefilter("ignore")
            return str(ast.literal_eval(string))
    except (SyntaxError, ValueError):
        return string


def _match_end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    return start if match is None else match.end()
