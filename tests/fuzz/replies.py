"""What a model writes: fences and answers in its text, JSON in its tool calls and in the provider's events.

Input: a byte that says which, and the text.
"""

import json
from collections.abc import Iterator

from orchestrator import fences
from orchestrator.cli.json_line import json_line
from orchestrator.conversation import PYTHON_TOOL, Dialect, Reply, StopReason
from orchestrator.errors import ModelError
from orchestrator.models.messages_api import MessageAssembler, parse_json
from orchestrator.reply import BadCall, SaysAnswer, WantsCell, read_reply, what_counts
from orchestrator.visible import visible, visible_line

_FENCES, _JSON, _EVENTS = 0, 1, 2


def one_input(data: bytes) -> None:
    """Every reply means something, whatever is in it; what was read of it can be written and sent back."""
    if not data:
        return
    which, text = data[0] % 3, data[1:].decode("utf-8", "replace")
    if which == _FENCES:
        _fences(text)
    elif which == _JSON:
        _json(text)
    else:
        _events(text)


def _fences(text: str) -> None:
    found = fences.read(text)
    if found is not None:
        assert 0 < found.end <= len(text)
        assert fences.read(text[: found.end]) == found, "what follows makes no difference"
    half = len(text) // 2
    blocks = tuple({"type": "text", "text": part} for part in (text[:half], text[half:]) if part)
    for stop in (StopReason.END_TURN, StopReason.MAX_TOKENS, StopReason.WINDOW_FULL):
        reply = Reply(blocks, stop)
        meaning = read_reply(reply, Dialect.FENCES)
        counts = what_counts(reply, Dialect.FENCES)
        assert text.startswith(counts.text)
        if isinstance(meaning, WantsCell | SaysAnswer):
            assert read_reply(counts, Dialect.FENCES) == meaning
    shown = visible(text)
    assert visible(shown) == shown
    assert len(visible_line(text, 40).splitlines()) <= 1


def _json(text: str) -> None:
    try:
        value = parse_json(text)
    except ValueError:
        return
    written = json_line(value)
    assert written.isascii()
    assert parse_json(written) == value


def _events(text: str) -> None:
    assembler = MessageAssembler()
    try:
        for line in text.split("\n"):
            assembler.feed(parse_json(line))
        said = assembler.completion().reply
    except (ValueError, ModelError):
        return
    meaning = read_reply(said)
    assert isinstance(read_reply(said, Dialect.FENCES), object)
    assert not isinstance(meaning, BadCall) or meaning.why
    json_line(list(said.content))


def seeds() -> Iterator[bytes]:
    """Honest replies, and some that are not."""
    for text in (
        "Let me look.\n\n```repl\nprint(context[:500])\n```\nOutput:\n",
        "```python\nx = '''\n```\n'''\n```",
        '```repl\nprint("```")  # it\'s\n``` ',
        "FINAL(see (b) and (c))",
        'FINAL("a \\"quoted\\" one")',
        "FINAL_VAR(`x`)\n",
        "~~~\nFINAL(1)\n~~~\n```json\n{}\n```\nFINAL(2)",
        "```repl\nunfinished",
        "\x1b]0;t\x07 \u202e \u2028 `````",
    ):
        yield bytes([_FENCES]) + text.encode()
    for text in ('{"code": "print(1)"}', '[1e5, null, {"a": [true, "\\ud83d\\ude00"]}]', '"\\ud800"', "NaN"):
        yield bytes([_JSON]) + text.encode()
    usage = {"input_tokens": 3, "output_tokens": 1}
    call = {"type": "tool_use", "id": "t", "name": PYTHON_TOOL, "input": {}}
    delta = {"type": "input_json_delta", "partial_json": '{"code": "1"}'}
    streamed = (
        {"type": "message_start", "message": {"usage": usage, "content": []}},
        {"type": "content_block_start", "index": 0, "content_block": call},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "hi"}},
        {"type": "message_delta", "delta": {"stop_reason": "tool_use"}, "usage": {"output_tokens": 1}},
        {"type": "message_stop"},
    )
    yield bytes([_EVENTS]) + "\n".join(map(json.dumps, streamed)).encode()
    failed = {"type": "error", "error": {"type": "overloaded_error", "details": {"error_code": "x"}}}
    yield bytes([_EVENTS]) + json.dumps(failed).encode()
