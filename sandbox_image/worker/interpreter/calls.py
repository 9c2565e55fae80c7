"""Sub-calls as conversations: what is asked, what is made of the replies.

Each is a generator that yields requests and receives replies, so the same code serves the blocking and the
async functions. It blocks nowhere: the thread that reads replies moves it on.
"""

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, TypeVar, cast

from sandbox_image.worker import protocol
from sandbox_image.worker.frames import Frame
from sandbox_image.worker.interpreter.child_context import Files, Inline, Place, Range, Upload
from sandbox_image.worker.interpreter.errors import SubCallError
from sandbox_image.worker.interpreter.link import CallLink, Request

_T = TypeVar("_T")

_CACHE_WORTH_PROMPTS = 3
_CACHE_WORTH_BYTES = 16_384

_upload_numbers = itertools.count(1)

Steps = Generator[Request, Frame, _T]


class Reply(str):
    """What a model answered: a `str` that also knows whether it was cut off."""

    truncated: bool = False
    """True when the model stopped because it reached `max_tokens`."""


def complete(
    prompt: str, model: str | None, max_tokens: int | None, shared_prefix_bytes: int = 0
) -> Steps[str]:
    """Ask a model for one completion."""
    frame = yield Request(
        protocol.COMPLETE,
        {"model": model, "max_tokens": max_tokens, "shared_prefix_bytes": shared_prefix_bytes},
        encode(prompt),
    )
    reply = Reply(frame.payload.decode("utf-8", "replace"))
    reply.truncated = bool(frame.header["truncated"])
    return reply


def child_run(question: str, place: Place, max_tokens: int | None) -> Steps[str]:
    """Run a question over a context in a sandbox of its own."""
    encoded = encode(question)
    header: dict[str, Any] = {"question_bytes": len(encoded), "max_tokens": max_tokens}
    payload = encoded
    if isinstance(place, Upload):
        upload_id = yield from _upload(place)
        header |= {"context": "upload", "upload_id": upload_id}
    elif isinstance(place, Range):
        header |= {"context": "range", "path": place.path}
        header |= {"start_byte": place.start_byte, "end_byte": place.end_byte}
    elif isinstance(place, Files):
        header |= {"context": "files", "runs": place.runs}
    elif isinstance(place, Inline):
        header |= {"context": "inline"}
        payload = encoded + place.text
    frame = yield Request(protocol.CHILD_RUN, header, payload)
    return frame.payload.decode("utf-8", "replace")


def budget() -> Steps[dict[str, Any]]:
    """Ask what is left."""
    frame = yield Request(protocol.BUDGET, {})
    left: Mapping[str, Any] = frame.header["budget"]
    return dict(left)


def shared_prefix_bytes(prompts: Sequence[str]) -> int:
    """How many bytes all prompts of a batch begin with, if it pays to have a provider cache them, else 0.

    Writing a cache costs a quarter more than reading without one, reading it a tenth: two calls that read are
    enough. Providers cache nothing below some thousand tokens.
    """
    if len(prompts) < _CACHE_WORTH_PROMPTS:
        return 0
    # What the first and the last in order share, all between them share too.
    first, last = min(prompts), max(prompts)
    differs = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    length_bytes = len(encode(first[: next(differs, len(first))]))
    return length_bytes if length_bytes >= _CACHE_WORTH_BYTES else 0


def encode(text: str) -> bytes:
    """`text` as it crosses the wire. A lone surrogate, which UTF-8 cannot hold, becomes a question mark."""
    return text.encode("utf-8", "replace")


def _upload(upload: Upload) -> Steps[str]:
    number = next(_upload_numbers)
    for part in upload.parts():
        header = {"upload": number, "pieces": part.pieces}
        yield Request(protocol.UPLOAD_PART, header, part.payload, windowed=False)
    frame = yield Request(protocol.UPLOAD_END, {"upload": number}, windowed=False)
    upload_id: str = frame.header["upload_id"]
    return upload_id


class Conversation:
    """Moves one generator on with each reply, until it returns or raises."""

    def __init__(
        self, link: CallLink, steps: Steps[Any], on_done: Callable[[Any, Exception | None], None]
    ) -> None:
        self._link = link
        self._steps = steps
        self._on_done = on_done
        self._request_id: int | None = None
        self._cancelled = False

    def start(self) -> None:
        """Make the first request. `on_done` is called later, or at once where that is refused."""
        self._advance(None, None)

    def cancel(self) -> None:
        """Give up. `on_done` is told of a SubCallCancelled, unless it has been called."""
        self._cancelled = True
        if self._request_id is not None:
            self._link.cancel(self._request_id)

    def _advance(self, frame: Frame | None, error: SubCallError | None) -> None:
        try:
            # None is what starts a generator; the type knows only what comes after that.
            request = self._steps.throw(error) if error else self._steps.send(cast(Frame, frame))
        except StopIteration as end:
            self._on_done(end.value, None)
        except Exception as failure:
            self._on_done(None, failure)
        else:
            self._request_id = self._link.request(request, self._advance)
            if self._cancelled:
                self._link.cancel(self._request_id)
