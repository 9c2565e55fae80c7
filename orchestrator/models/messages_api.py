"""Our conversations in the words of the Anthropic Messages API, and its replies in ours. No I/O.

Prompt caching, for the turns of a run: one breakpoint behind the system prompt (the tool comes before it, so
it is covered too) and one at the end of each of the last two user turns. The later one writes what the next
turn's earlier one reads. A sub-call has one behind the beginning that it shares with others of its batch, and
none otherwise: nobody sends its prefix again, and a write costs a quarter more.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, TypeAlias

from orchestrator.conversation import PYTHON_TOOL, Conversation, Reply, StopReason, Told
from orchestrator.models import failures
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage

Json: TypeAlias = dict[str, Any]

_TOOL: Json = {
    "name": PYTHON_TOOL,
    "description": "Runs one cell of Python in the live namespace and shows what it printed.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The cell's source code."}},
        "required": ["code"],
        "additionalProperties": False,
    },
}
_CACHED = {"type": "ephemeral"}
_CACHED_USER_TURNS = 2
_MOST_TOKENS = 100_000_000
_MOST_LEVELS = 100
"""Of JSON inside JSON. No honest reply has ten, and what nests to Python's limit can't be written again."""


# --- Request -------------------------------------------------------------------------------------------


def request_params(request: ModelRequest) -> Json:
    """The body of the request."""
    messages = _messages(request.conversation)
    params: Json = {"model": request.model, "max_tokens": request.max_tokens, "messages": messages}
    if request.system:
        params["system"] = [{"type": "text", "text": _sendable(request.system), "cache_control": _CACHED}]
        for message in [m for m in messages if m["role"] == "user"][-_CACHED_USER_TURNS:]:
            message["content"][-1]["cache_control"] = _CACHED
    if request.stop_sequences:
        params["stop_sequences"] = list(request.stop_sequences)
    if request.python_tool:
        params["tools"] = [_TOOL]
        params["tool_choice"] = {"type": "auto", "disable_parallel_tool_use": True}
    return params


def _messages(conversation: Conversation) -> list[Json]:
    """Alternating turns. What we say between two replies is one turn, with the tool results first."""
    messages: list[Json] = []
    for entry in conversation:
        if isinstance(entry, Reply):
            role = "assistant"
            # Verbatim, but for empty text, which a model may write and the API refuses to read.
            blocks = [dict(block) for block in entry.content if block.get("text") != ""]
        elif isinstance(entry, Told):
            role, blocks = "user", _text_blocks(entry)
        else:
            role, blocks = "user", [_tool_result(entry.call_id, entry.text, is_error=entry.is_error)]
        if not blocks:
            continue
        if messages and messages[-1]["role"] == role:
            messages[-1]["content"] += blocks
        else:
            messages.append({"role": role, "content": blocks})
    for message in messages:
        if message["role"] == "user":
            message["content"].sort(key=lambda block: block["type"] != "tool_result")
    return messages


def _text_blocks(told: Told) -> list[Json]:
    """One block, or two with a cache breakpoint between them. The API refuses a block of white space."""
    parts = [told.text[: told.cached_chars], told.text[told.cached_chars :]]
    if not all(part.strip() for part in parts):
        return [{"type": "text", "text": _sendable(told.text)}]
    shared, own = ({"type": "text", "text": _sendable(part)} for part in parts)
    return [{**shared, "cache_control": _CACHED}, own]


def _tool_result(call_id: str, text: str, *, is_error: bool) -> Json:
    block = {"type": "tool_result", "tool_use_id": call_id, "content": _sendable(text)}
    return {**block, "is_error": True} if is_error else block


def _sendable(text: str) -> str:
    """Lone surrogates become `?`: they are no Unicode and can't be sent."""
    return text.encode("utf-8", "replace").decode()


# --- Reply ---------------------------------------------------------------------------------------------


def completion(message: object) -> Completion:
    """A whole message, as the API returns it.

    Raises:
        ModelError: It is no message, or does not say what it cost.
    """
    if not isinstance(message, dict):
        raise failures.of_unreadable_reply("message")
    blocks = message.get("content")
    if not isinstance(blocks, list) or not all(isinstance(b, dict) and "type" in b for b in blocks):
        raise failures.of_unreadable_reply("content")
    usage = _usage(message.get("usage"))
    try:
        stop = StopReason(message.get("stop_reason"))
    except ValueError:
        stop = StopReason.OTHER
    return Completion(Reply(tuple(blocks), stop), usage)


class MessageAssembler:
    """Puts a streamed message together from its events.

    It works on plain JSON instead of the SDK's models, so that blocks and fields the SDK does not know yet
    are kept verbatim too.
    """

    def __init__(self) -> None:
        self._message: Json = {}
        self._blocks: dict[int, Json] = {}
        self._texts: dict[tuple[int, str], list[str]] = {}
        self.is_done = False

    @property
    def usage_told(self) -> bool:
        """Whether the provider has begun to count."""
        return bool(self._message)

    def feed(self, event: Json) -> None:
        """Take the next event.

        Raises:
            ModelError: It reports a failure, or makes no sense.
        """
        try:
            self._feed(event)
        except (KeyError, TypeError, AttributeError):
            raise failures.of_unreadable_reply("events") from None

    def completion(self) -> Completion:
        """The message, once done.

        Raises:
            ModelError: The stream ended early, or its message is not valid.
        """
        if not self.is_done:
            raise failures.of_unfinished_stream()
        for (index, field), parts in self._texts.items():
            text = "".join(parts)
            self._blocks[index][field] = _tool_input(text) if field == "input" else text
        return completion({**self._message, "content": [self._blocks[n] for n in sorted(self._blocks)]})

    def _feed(self, event: Json) -> None:
        match event["type"]:
            case "message_start":
                self._message = dict(event["message"])
            case "content_block_start":
                self._blocks[event["index"]] = dict(event["content_block"])
            case "content_block_delta":
                self._feed_delta(event["index"], event["delta"])
            case "message_delta":
                self._message |= event["delta"]
                told = event.get("usage") or {}
                # Running totals; what a provider leaves out or null has not changed.
                self._message["usage"] = {
                    **(self._message.get("usage") or {}),
                    **{counter: amount for counter, amount in told.items() if amount is not None},
                }
            case "message_stop":
                self.is_done = True
            case "error":
                error = event["error"]
                code = (error.get("details") or {}).get("error_code")
                raise failures.of_stream_event(error.get("type"), code, usage_told=self.usage_told)

    def _feed_delta(self, index: int, delta: Json) -> None:
        block = self._blocks[index]
        match delta["type"]:
            case "text_delta":
                self._append(index, "text", delta["text"])
            case "thinking_delta":
                self._append(index, "thinking", delta["thinking"])
            case "input_json_delta":
                self._append(index, "input", delta["partial_json"])
            case "signature_delta":
                block["signature"] = delta["signature"]
            case "citations_delta":
                block["citations"] = [*(block.get("citations") or ()), delta["citation"]]

    def _append(self, index: int, field: str, text: str) -> None:
        first = self._blocks[index].get(field)
        # A list, joined once: adding up a long reply piece by piece would copy it every time.
        self._texts.setdefault((index, field), [first] if isinstance(first, str) else []).append(text)


def parse_json(text: str | bytes) -> Any:
    """JSON that can be sent on: lone surrogates, which JSON can spell, become `?`.

    Raises:
        ValueError: It is no JSON, holds a number that JSON has no word for, or nests too deep.
    """
    try:
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise ValueError("nested too deep") from None
    if _is_too_deep(value):
        raise ValueError("nested too deep")
    return json.loads(_sendable(json.dumps(value, ensure_ascii=False))) if _spells_surrogates(text) else value


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number too large to be sent back")
    return number


def _is_too_deep(value: object) -> bool:
    level = [value]
    for _ in range(_MOST_LEVELS):
        level = [
            part
            for outer in level
            if isinstance(outer, dict | list)
            for part in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _spells_surrogates(text: str | bytes) -> bool:
    return (b"\\ud" in text.lower()) if isinstance(text, bytes) else ("\\ud" in text.lower())


def _tool_input(text: str) -> Json:
    """Empty when it was cut off: an input has to be an object to be sent back."""
    try:
        value = parse_json(text or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _usage(told: object) -> Usage:
    if not isinstance(told, Mapping):
        raise failures.of_unreadable_reply("usage")
    usage = Usage(
        input=_count(told.get("input_tokens")),
        cache_read=_count(told.get("cache_read_input_tokens") or 0),
        cache_write=_count(told.get("cache_creation_input_tokens") or 0),
        output=_count(told.get("output_tokens")),
    )
    if usage.total_input == 0:
        # No request is empty: the server does not count.
        raise failures.of_unreadable_reply("usage")
    return usage


def _count(tokens: object) -> int:
    if isinstance(tokens, bool) or not isinstance(tokens, int) or not 0 <= tokens <= _MOST_TOKENS:
        raise failures.of_unreadable_reply("usage")
    return tokens
