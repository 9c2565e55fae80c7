"""What a model's reply asks for. Each odd reply has a defined meaning; none is guessed at."""

from dataclasses import dataclass
from typing import TypeAlias

from orchestrator import fences
from orchestrator.conversation import PYTHON_TOOL, Block, Dialect, Reply, StopReason


@dataclass(frozen=True, slots=True)
class WantsCell:
    """Run this code. `not_run` are further tool calls of the same reply."""

    call_id: str
    """Empty for a fenced cell."""
    code: str
    not_run: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class SaysAnswer:
    """A reply without a tool call: its text is the answer. With fences: the text in its FINAL."""

    text: str


@dataclass(frozen=True, slots=True)
class OnlyWords:
    """With fences: text with neither a cell nor an answer."""

    text: str


@dataclass(frozen=True, slots=True)
class BadCall:
    """A cell that can't be run; the model is told why. `call_ids` are all tool calls of the reply, if any."""

    call_ids: tuple[str, ...]
    why: str


@dataclass(frozen=True, slots=True)
class CutOff:
    """It ran into the output limit without a cell: not an answer."""


@dataclass(frozen=True, slots=True)
class Empty:
    """Neither text nor a cell."""


@dataclass(frozen=True, slots=True)
class Refused:
    """The provider's or the model's refusal. What was said may not be sent back."""


@dataclass(frozen=True, slots=True)
class WindowFull:
    """The conversation no longer fits into the model's window."""


ReplyKind: TypeAlias = WantsCell | SaysAnswer | OnlyWords | BadCall | CutOff | Empty | Refused | WindowFull

_CUT = {StopReason.MAX_TOKENS, StopReason.WINDOW_FULL}
CALL_CUT_OFF = (
    "Your reply reached its output limit in the middle of this cell, so it was NOT run. "
    "Write a shorter cell, or split the work over several."
)


def read_reply(reply: Reply, dialect: Dialect = Dialect.TOOLS) -> ReplyKind:
    """What the reply asks for."""
    if reply.stop is StopReason.REFUSAL:
        return Refused()
    if dialect is Dialect.FENCES:
        return _read_text(reply)
    calls = [block for block in reply.content if block.get("type") == "tool_use"]
    if calls:
        return _read_calls(reply, calls)
    if reply.stop is StopReason.WINDOW_FULL:
        return WindowFull()
    if reply.stop is StopReason.MAX_TOKENS:
        return CutOff()
    text = reply.text.strip()
    return SaysAnswer(text) if text else Empty()


def what_counts(reply: Reply, dialect: Dialect) -> Reply:
    """The reply as it goes into the conversation: what a model invented behind a fenced cell is left out.

    What is left is verbatim, block by block; only a text is cut, and nothing after it is kept. A tool call
    nobody offered is left out too: it would have to be answered.
    """
    if dialect is Dialect.TOOLS:
        return reply
    text = reply.text
    found = fences.read(text)
    left = len(text) if found is None else found.end
    counts: list[Block] = []
    for block in reply.content:
        if block.get("type") == "tool_use":
            continue
        if block.get("type") == "text":
            words = str(block.get("text", ""))
            if len(words) > left:
                counts += [{**block, "text": words[:left]}] if left else []
                break
            left -= len(words)
        counts.append(block)
    return Reply(tuple(counts), reply.stop)


def _read_text(reply: Reply) -> ReplyKind:
    text = reply.text
    found = fences.read(text)
    match found:
        case fences.FencedCell(code) if found.closed or reply.stop not in _CUT:
            return WantsCell("", code, ())
        case fences.FencedAnswer(answer) if found.closed or reply.stop not in _CUT:
            return SaysAnswer(answer)
    if reply.stop is StopReason.WINDOW_FULL:
        return WindowFull()
    if reply.stop is StopReason.MAX_TOKENS:
        return BadCall((), CALL_CUT_OFF) if isinstance(found, fences.FencedCell) else CutOff()
    return OnlyWords(text.strip()) if text.strip() else Empty()


def _read_calls(reply: Reply, calls: list[Block]) -> ReplyKind:
    ids = tuple(str(call.get("id", "")) for call in calls)
    # Only the last block of a reply can be cut, so an earlier call is whole and may run.
    if reply.stop in _CUT and len(calls) == 1:
        return BadCall(ids, CALL_CUT_OFF)
    first = calls[0]
    if first.get("name") != PYTHON_TOOL:
        return BadCall(ids, f"There is no such tool; the only one is `{PYTHON_TOOL}`.")
    arguments = first.get("input")
    code = arguments.get("code") if isinstance(arguments, dict) else None
    if not isinstance(code, str):
        return BadCall(ids, f"`{PYTHON_TOOL}` takes one string argument, `code`.")
    return WantsCell(ids[0], code, ids[1:])
