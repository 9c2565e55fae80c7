"""An upper bound of a request's input tokens, known before it is sent.

Why bytes: a byte-level tokenizer never makes more tokens than there are bytes, because each merge only joins;
those of the models we know all fall back to single bytes. So the UTF-8 bytes of everything that is sent,
plus what the provider adds itself, can't be too low. It is about four times too high for English text; the
ledger makes up for that by waiting for holds to come back, never by guessing (budget, rule 5).
"""

from collections.abc import Iterator
from operator import attrgetter

from orchestrator.conversation import Conversation, utf8_bytes

_LENGTH = attrgetter("length_bytes")
"""Three times a turn of each entry: a third of the time of a loop in Python."""

REQUEST_OVERHEAD_TOKENS = 64
"""Framing of a request: role markers, beginning and end."""
ENTRY_OVERHEAD_TOKENS = 32
"""Framing of one entry: role, block type, tool call id."""
TOOL_OVERHEAD_TOKENS = 1_600
"""Our tool's schema and the instructions providers put beside tools (Anthropic documents up to some 700)."""


def input_bound_tokens(system: str, conversation: Conversation, *, python_tool: bool) -> int:
    """No provider can count more input tokens than this for such a request."""
    bound = REQUEST_OVERHEAD_TOKENS + ENTRY_OVERHEAD_TOKENS * len(conversation)
    if python_tool:
        bound += TOOL_OVERHEAD_TOKENS
    return bound + request_bytes(system, conversation)


def request_bytes(system: str, conversation: Conversation) -> int:
    """What a request says, in bytes of UTF-8: all that is ours or the model's, without any wire format."""
    lengths_bytes: Iterator[int] = map(_LENGTH, conversation)
    return utf8_bytes(system) + sum(lengths_bytes)
