"""How a request to `/v1/messages` becomes a question and a context, and an answer a reply. Pure.

Rules (docs/http.md tells them to users):

1. A text is *long* from `LONG_BYTES` on. Instructions are short, material is long.
2. What was said before the last message, every document, and every long text is material. The short texts of
   the last message are the question, in their order; when they are long together, only the last of them.
3. When the last message has no short text, its last long one holds the question too. Its first and its last
   paragraph are taken as it (of one over `EDGE_BYTES` its line at the edge), because people ask before their
   material or behind it; the whole text is the context, so that nothing of it is lost.
4. Short texts of `system` come before the question, long ones are material.
5. One piece of material is the context as it is. Several are one text, each under a heading line, and the
   question is told what the headings look like. Without any material the question is the context too.
6. The answer is cut at `max_tokens`, a token being taken as `BYTES_PER_TOKEN` bytes: an answer comes out of
   a variable and no tokenizer ever saw it.
"""

import codecs
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orchestrator.errors import InvalidRequestError
from orchestrator.pricing import Usage
from orchestrator.server.http.forms import OptionsForm

LONG_BYTES = 16 * 1024
"""Some 4,000 tokens: longer than instructions are, shorter than what is worth a program."""
EDGE_BYTES = 4 * 1024
"""Of a long text the model is shown no more than this much from either end."""
BYTES_PER_TOKEN = 4

# --- The form of a request -----------------------------------------------------------------------------


def _as_blocks(content: Any) -> Any:
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class _Sent(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _Block(_Sent):
    cache_control: dict[str, Any] | None = Field(
        default=None, description="Ignored: contexts are stored once."
    )


class TextBlock(_Block):
    """Text."""

    type: Literal["text"]
    text: str
    citations: None = Field(default=None, description="Not supported.")


class TextSource(_Sent):
    """A document as text."""

    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class ContentSource(_Sent):
    """A document as blocks of text."""

    type: Literal["content"]
    content: Annotated[list[TextBlock], BeforeValidator(_as_blocks)]


class Citations(_Sent):
    """Whether citations are wanted."""

    enabled: Literal[False] = Field(description="Citations are not supported.")


class DocumentBlock(_Block):
    """A document of text. PDF, files and addresses are not supported."""

    type: Literal["document"]
    source: Annotated[TextSource | ContentSource, Field(discriminator="type")]
    title: str | None = None
    context: str | None = Field(default=None, description="What is to be known about it.")
    citations: Citations | None = None


Block = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]


class MessageForm(_Sent):
    """One message."""

    role: Literal["user", "assistant"]
    content: Annotated[list[Block], BeforeValidator(_as_blocks)]


class MessagesForm(BaseModel):
    """A request to `/v1/messages`."""

    # Others are looked at by `refuse_unsupported`, which can say why.
    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    model: str = Field(min_length=1, description="Of the root run.")
    max_tokens: int = Field(ge=1, description="The answer is cut there, at 4 bytes a token.")
    messages: list[MessageForm] = Field(min_length=1)
    system: Annotated[list[TextBlock] | None, BeforeValidator(_as_blocks)] = Field(
        default=None, description="Comes before the question."
    )
    stream: bool = False
    metadata: dict[str, Any] | None = Field(default=None, description="Ignored.")
    cache_control: dict[str, Any] | None = Field(default=None, description="Ignored.")
    service_tier: Literal["auto", "standard_only"] | None = Field(default=None, description="Ignored.")
    rlm: OptionsForm = Field(default=OptionsForm(), description="Limits and more; not of the Messages API.")


_UNSUPPORTED = {
    "tools": "a run uses tools of its own",
    "tool_choice": "a run uses tools of its own",
    "thinking": "a run's models think as they are set up to",
    "output_config": "the answer is text",
    "temperature": "the answer comes from many calls",
    "top_p": "the answer comes from many calls",
    "top_k": "the answer comes from many calls",
    "stop_sequences": "the answer comes from a variable, not from a sampler",
    "container": "a run has a sandbox of its own",
    "mcp_servers": "a sandbox has no network",
    "context_management": "there is no window to manage",
}


def refuse_unsupported(form: MessagesForm) -> None:
    """Refuse what is asked for and cannot be had, rather than answer something else.

    What says that a feature is off is taken: no tools, no stop sequences, thinking disabled.

    Raises:
        InvalidRequestError: Names the field and says why.
    """
    for name, value in (form.model_extra or {}).items():
        if value is None or value == [] or (name == "thinking" and value == {"type": "disabled"}):
            continue
        why = _UNSUPPORTED.get(name)
        if why is None:
            raise InvalidRequestError(f"{name}: extra inputs are not permitted")
        raise InvalidRequestError(f"{name}: not supported here, {why}")


# --- Question and context ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Material:
    """Something long, and what it is."""

    label: str
    text: str


@dataclass(frozen=True, slots=True)
class Mapped:
    """What a run is asked."""

    question: str
    context: str


def mapped(form: MessagesForm) -> Mapped:
    """The question and the context of a request.

    Raises:
        InvalidRequestError: It has no question, or what it asks for is not supported.
    """
    refuse_unsupported(form)
    *earlier, last = form.messages
    if last.role != "user":
        raise InvalidRequestError("messages: the last one must be the user's; there is no prefill")
    texts = [block.text for block in form.system or ()]
    instructions = [text for text in texts if not _is_long(text)]
    material = [Material("system", text) for text in texts if _is_long(text)]
    material += _said(earlier)
    asked, more = _asked(last)
    material += more
    if not asked:
        raise InvalidRequestError("messages: the last one asks nothing; add a short text behind the material")
    if len(material) > 1:
        asked += (
            f"(The context has {len(material)} parts. Each begins with a line such as"
            f" {_heading(1, len(material), material[0].label)!r}.)",
        )
    question = "\n\n".join((*instructions, *asked))
    return Mapped(question=question, context=_joined(material) or "\n\n".join(asked))


def _is_long(text: str) -> bool:
    return len(text) >= LONG_BYTES or len(text.encode("utf-8", "replace")) >= LONG_BYTES


def _said(messages: Sequence[MessageForm]) -> Iterator[Material]:
    for number, message in enumerate(messages, start=1):
        for block in message.content:
            if isinstance(block, DocumentBlock):
                yield _document(block)
            elif block.text.strip():
                yield Material(f"message {number}, {message.role}", block.text)


def _asked(last: MessageForm) -> tuple[tuple[str, ...], list[Material]]:
    """What the last message asks, and its material, in order."""
    texts = [block for block in last.content if isinstance(block, TextBlock) and block.text.strip()]
    short = [block for block in texts if not _is_long(block.text)]
    if short and _is_long("".join(block.text for block in short)):
        del short[:-1]
    material = []
    for block in last.content:
        if isinstance(block, DocumentBlock):
            material.append(_document(block))
        elif block.text.strip() and not any(block is one for one in short):
            material.append(Material("text", block.text))
    if short:
        return tuple(block.text for block in short), material
    return _edges(texts[-1].text) if texts else (), material


def _document(block: DocumentBlock) -> Material:
    if isinstance(block.source, TextSource):
        text = block.source.data
    else:
        text = "\n\n".join(part.text for part in block.source.content)
    label = f"document {block.title!r}" if block.title else "document"
    return Material(label, f"{block.context}\n\n{text}" if block.context else text)


def _edges(text: str) -> tuple[str, ...]:
    """The first and the last paragraph, or line, of a long text, as far as they are short."""
    # A character has at least one byte: no more of the text has to be looked at.
    first, last = text.lstrip()[: EDGE_BYTES + 1], text.rstrip()[-EDGE_BYTES - 1 :]
    found = (
        _short(first.partition("\n\n")[0]) or _short(first.partition("\n")[0]),
        _short(last.rpartition("\n\n")[2]) or _short(last.rpartition("\n")[2]),
    )
    edges = tuple(edge.strip() for edge in found if edge)
    return ("(The prompt is in the context. It begins and ends as follows.)", *edges) if edges else ()


def _short(text: str) -> str:
    return "" if len(text.encode("utf-8", "replace")) > EDGE_BYTES else text


def _joined(material: Sequence[Material]) -> str:
    if len(material) < 2:
        return material[0].text if material else ""
    return "\n\n".join(
        f"{_heading(number, len(material), one.label)}\n{one.text}"
        for number, one in enumerate(material, start=1)
    )


def _heading(number: int, of: int, label: str) -> str:
    return f"=== part {number} of {of}: {label} ==="


# --- The reply -----------------------------------------------------------------------------------------


class AnswerText:
    """An answer that comes in parts, as text, and cut where it must end."""

    def __init__(self, max_tokens: int) -> None:
        self._left_bytes = max_tokens * BYTES_PER_TOKEN
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.is_cut = False
        """Some of it was left out; nothing more is to be fed."""

    def feed(self, part: bytes, *, is_last: bool = False) -> str:
        """The text of the next part. A character may be held back until the rest of it comes."""
        if self.is_cut:
            return ""
        if len(part) > self._left_bytes:
            self.is_cut = True
            # What the cut leaves of a character is not an error of the answer's: it is dropped, not replaced.
            held_back = self._decoder.getstate()[0]
            return (held_back + part[: self._left_bytes]).decode("utf-8", "ignore")
        self._left_bytes -= len(part)
        return self._decoder.decode(part, is_last)

    @property
    def stop_reason(self) -> str:
        """As the Messages API says it."""
        return "max_tokens" if self.is_cut else "end_turn"


def usage_json(usage: Usage) -> dict[str, int]:
    """What the run tree was billed, in the words of the Messages API."""
    return {
        "input_tokens": usage.input,
        "cache_creation_input_tokens": usage.cache_write,
        "cache_read_input_tokens": usage.cache_read,
        "output_tokens": usage.output,
    }


def message_json(
    run_id: str, model: str, *, content: Sequence[str], stop_reason: str | None, usage: Usage
) -> dict[str, object]:
    """A message of the assistant."""
    return {
        "id": f"msg_{run_id}",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [{"type": "text", "text": text} for text in content],
        "stop_reason": stop_reason,
        "stop_sequence": None,
        "usage": usage_json(usage),
    }
