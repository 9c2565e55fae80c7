"""What a model is told and what it says, in no provider's words but its own.

A conversation is a tuple of entries. What the model said is kept verbatim, block by block, because thinking
blocks must be sent back untouched; everything else is ours.

Each entry knows its length: a conversation is measured at every turn, and to measure all of it again would
cost more with each.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from functools import cached_property
from typing import TypeAlias

Block: TypeAlias = Mapping[str, object]
"""One content block of a reply, as JSON. Its shape is that of the Messages API: `type` is `text`, `tool_use`,
`thinking`, ... A client of another API translates to it."""


class Dialect(StrEnum):
    """How a model asks for a cell."""

    TOOLS = "tools"
    """A call of our one tool; its report is the call's result."""
    FENCES = "fences"
    """A fenced block in its text, for models without tool use; its report is text we send (`fences`)."""


class StopReason(Enum):
    """Why a model stopped writing."""

    END_TURN = "end_turn"
    TOOL_USE = "tool_use"
    MAX_TOKENS = "max_tokens"
    STOP_SEQUENCE = "stop_sequence"
    REFUSAL = "refusal"
    WINDOW_FULL = "model_context_window_exceeded"
    OTHER = "other"
    """Anything a provider adds later; treated like the end of the turn."""


@dataclass(frozen=True, slots=True)
class Told:
    """Text we send: the task, or a note."""

    text: str
    cached_chars: int = 0
    """So many characters of its beginning are worth caching: other requests begin with them too."""
    length_bytes: int = field(init=False, repr=False, compare=False)
    """Of what it says, in UTF-8, without any wire format."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "length_bytes", utf8_bytes(self.text))


@dataclass(frozen=True, slots=True)
class CellReport(Told):
    """What became of the cell in the reply before it. Unlike other text, it may be elided to make room."""


@dataclass(frozen=True)
class Reply:
    """What the model said, verbatim."""

    content: tuple[Block, ...]
    stop: StopReason

    @cached_property
    def length_bytes(self) -> int:
        """Of its blocks as JSON, in UTF-8. Found out when it is asked for: a sub-call's reply never is."""
        return sum(utf8_bytes(json.dumps(dict(block), ensure_ascii=False)) for block in self.content)

    @property
    def text(self) -> str:
        """The text blocks, joined; thinking is not text."""
        return "".join(str(block.get("text", "")) for block in self.content if block.get("type") == "text")


@dataclass(frozen=True, slots=True)
class ToolReport:
    """The result of one tool call of the reply before it. A cell's may be elided too."""

    call_id: str
    text: str
    is_error: bool = False
    length_bytes: int = field(init=False, repr=False, compare=False)
    """Of text and id, in UTF-8."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "length_bytes", utf8_bytes(self.text) + utf8_bytes(self.call_id))


Entry: TypeAlias = Told | Reply | ToolReport
Conversation: TypeAlias = tuple[Entry, ...]

PYTHON_TOOL = "python"
"""The one tool: a cell, in its string argument `code`."""


def utf8_bytes(text: str) -> int:
    """Length of the text on the wire. Lone surrogates are sent as `?`, one byte."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))
