"""What a child run gets to see, as its parent's cell may name it, and turning that into a staged context."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeAlias

from orchestrator.contexts.staging import Cancelled
from orchestrator.contexts.store import ContextStore, StagedContext, Upload
from orchestrator.errors import InvalidRequestError
from orchestrator.ids import TenantId
from orchestrator.limits import MAX_INLINE_CONTEXT_BYTES, MAX_UPLOAD_BYTES


@dataclass(frozen=True, slots=True)
class InlineText:
    """A text in the request itself."""

    data: bytes


@dataclass(frozen=True, slots=True)
class OwnRange:
    """A byte range of a text of the parent's own context."""

    path: str
    start_byte: int
    end_byte: int


@dataclass(frozen=True, slots=True)
class OwnPaths:
    """Some files of the parent's own context."""

    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class OwnFiles:
    """Some files of the parent's own context, by number."""

    runs: tuple[tuple[int, int], ...]
    """(first, how many)."""


@dataclass(frozen=True, slots=True)
class Uploaded:
    """What an upload of this run returned."""

    upload_id: str


ContextChoice: TypeAlias = InlineText | OwnRange | OwnPaths | OwnFiles | Uploaded


class ChildContexts:
    """The contexts that one run may hand to its children: parts of its own, and what it uploaded."""

    def __init__(self, contexts: ContextStore, tenant_id: TenantId, own: StagedContext) -> None:
        self._contexts = contexts
        self._tenant_id = tenant_id
        self._own = own
        self._uploads: dict[str, StagedContext] = {}
        self._uploaded_bytes = 0
        self._one_upload = asyncio.Lock()

    def fingerprint(self, choice: ContextChoice) -> str:
        """Equal for choices that give a child the same context, whatever this run's uploads are called."""
        if isinstance(choice, Uploaded):
            return self._upload(choice).content_id
        own = "" if isinstance(choice, InlineText) else self._own.content_id
        return hashlib.sha256(f"{own}\0{choice!r}".encode()).hexdigest()

    async def stage(self, choice: ContextChoice) -> StagedContext:
        """The child's context, which the caller must release.

        Raises:
            InvalidRequestError: The choice makes no sense.
            ContextInputError: This run's context has no such part.
        """
        match choice:
            case InlineText() if len(choice.data) > MAX_INLINE_CONTEXT_BYTES:
                raise InvalidRequestError(
                    f"a context in a request has at most {MAX_INLINE_CONTEXT_BYTES:,} bytes; "
                    "upload a larger one"
                )
            case InlineText():
                return await self._in_thread(
                    lambda stop: self._contexts.stage_text(self._tenant_id, choice.data, cancelled=stop)
                )
            case OwnRange():
                return await self._in_thread(
                    lambda stop: self._contexts.derive_range(
                        self._own, choice.path, choice.start_byte, choice.end_byte, cancelled=stop
                    )
                )
            case OwnPaths():
                return await self._in_thread(
                    lambda _stop: self._contexts.derive_paths(self._own, choice.paths)
                )
            case OwnFiles():
                return await self._in_thread(
                    lambda _stop: self._contexts.derive_files(self._own, choice.runs)
                )
            case Uploaded():
                whole = self._upload(choice)
                return self._contexts.share(whole)

    @asynccontextmanager
    async def uploading(self) -> AsyncIterator[Upload]:
        """An upload for the length of the block, to be handed to `finish_upload` in it.

        One at a time: side by side they could jointly pass what a run may upload.
        """
        async with self._one_upload:
            left_bytes = MAX_UPLOAD_BYTES - self._uploaded_bytes
            with self._contexts.upload(self._tenant_id, max_bytes=left_bytes) as upload:
                yield upload

    async def finish_upload(self, upload: Upload) -> str:
        """Keep a finished upload until the run ends; its id."""
        staged = await self._in_thread(lambda _stop: upload.finish())
        self._uploaded_bytes += staged.manifest.text_bytes
        upload_id = f"u{len(self._uploads) + 1}"
        self._uploads[upload_id] = staged
        return upload_id

    def close(self) -> None:
        """Drop the uploads."""
        for staged in self._uploads.values():
            self._contexts.release(staged)
        self._uploads.clear()

    def _upload(self, choice: Uploaded) -> StagedContext:
        staged = self._uploads.get(choice.upload_id)
        if staged is None:
            raise InvalidRequestError("this run has no such upload")
        return staged

    async def _in_thread(self, work: Callable[[Cancelled], StagedContext]) -> StagedContext:
        """Staging is disk work. When its caller is cancelled it is stopped, waited for, and released."""
        stopped = False
        staging = asyncio.ensure_future(asyncio.to_thread(work, lambda: stopped))
        try:
            return await asyncio.shield(staging)
        except asyncio.CancelledError:
            stopped = True
            staging.add_done_callback(self._release_unwanted)
            await asyncio.wait((staging,))
            raise

    def _release_unwanted(self, staging: asyncio.Future[StagedContext]) -> None:
        if not staging.cancelled() and staging.exception() is None:
            self._contexts.release(staging.result())
