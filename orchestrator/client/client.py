"""The asynchronous client of `rlm serve`: what run.proto offers, with plain values and patience.

async with Client("127.0.0.1:7443", api_key=key) as client:
    answer = await client.ask("Which city is named most often?", Path("letters/"))
    print(answer.text)
"""

import hashlib
import secrets
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from datetime import datetime
from pathlib import Path

import grpc.aio
from rlm_proto.v1 import run_pb2

from orchestrator.client import messages, packing, uploading, watching
from orchestrator.client.connected import Connected
from orchestrator.client.failures import failure_of
from orchestrator.client.values import (
    Answer,
    Context,
    Created,
    Run,
    RunOptions,
    RunState,
    Uploaded,
    Usage,
)
from orchestrator.client.watching import Event
from orchestrator.errors import ConflictError, NotFoundError, ServerError

MAX_INLINE_BYTES = 4_000_000
"""A text up to here goes with its question; longer ones are uploaded."""
_CREATE_S = 120.0
"""One attempt to send a question with such a text over a slow line."""
_TEXT_S = 300.0
"""One stream of a long text. It is taken up where it broke."""
_PAGE = 100
_DEFAULT_OPTIONS = RunOptions()


class Client(Connected):
    """A connection to one server, for one key.

    Every method:

    * has a deadline for each attempt, and tries again for `patience.call_s` while the server does not answer;
      it says so through `say`, in one line;
    * raises our errors (`orchestrator.errors`): `UnauthenticatedError`, `NotAllowedError` (the key's role, or
      the tenant's rules), `NotFoundError`, `InvalidRequestError`, `ConflictError`, `BudgetExceededError`,
      `UnavailableError` (away for longer than there is patience), `ServerError` (broken, or none of ours).
    """

    # --- Runs ------------------------------------------------------------------------------------------

    async def create_run(
        self,
        question: str,
        *,
        context_id: str = "",
        text: str | bytes | None = None,
        options: RunOptions = _DEFAULT_OPTIONS,
        idempotency_key: str | None = None,
    ) -> Created:
        """Queue a question about a context that was uploaded, or about a text of at most 4 MB.

        It is stored when this returns. However often the request has to be sent, there is one run.

        Args:
            question: What is asked.
            context_id: Of an uploaded context.
            text: Instead of one.
            options: How it is to be answered.
            idempotency_key: 1 to 100 characters, yours to choose: a program that asks again after its own
                crash gets the same run. Made up when it is None.

        Raises:
            CallIdReusedError: The key was used for another request.
            BudgetExceededError: A quota of the tenant is used up, or too many of its runs wait.
        """
        request = run_pb2.CreateRunRequest(
            idempotency_key=idempotency_key or _new_key(),
            question=question.encode("utf-8", "replace"),
            options=messages.options_to_wire(options),
        )
        if text is not None:
            request.text = _utf8(text)
        else:
            request.context_id = context_id
        response = await self._wire.call(self._wire.stub.CreateRun, request, timeout_s=_CREATE_S)
        return Created(run=messages.run_from_wire(response.run), existed=response.existed)

    async def continue_run(
        self,
        run_id: str,
        question: str,
        *,
        keep_namespace: bool = False,
        options: RunOptions | None = None,
        idempotency_key: str | None = None,
    ) -> Created:
        """Queue a further question on the context of an answered run, as a run of its own.

        Args:
            run_id: The answered run.
            question: What is asked.
            keep_namespace: Run its cells again first, with their recorded answers, for their variables.
            options: Instead of that run's; None for the same.
            idempotency_key: As in `create_run`.

        Raises:
            ConflictError: The run has not ended, or its context is gone.
        """
        request = run_pb2.ContinueRunRequest(
            run_id=run_id,
            idempotency_key=idempotency_key or _new_key(),
            question=question.encode("utf-8", "replace"),
            keep_namespace=keep_namespace,
            options=messages.options_to_wire(options) if options is not None else None,
        )
        response = await self._wire.call(self._wire.stub.ContinueRun, request)
        return Created(run=messages.run_from_wire(response.run), existed=response.existed)

    async def get_run(self, run_id: str) -> Run:
        """What became of a run so far."""
        response = await self._wire.call(self._wire.stub.GetRun, run_pb2.GetRunRequest(run_id=run_id))
        return messages.run_from_wire(response.run)

    async def list_runs(
        self,
        *,
        states: Collection[RunState] = (),
        outcomes: Collection[str] = (),
        created_from: datetime | None = None,
        created_before: datetime | None = None,
    ) -> AsyncGenerator[Run, None]:
        """The tenant's runs, newest first, page by page as they are taken.

        Args:
            states: Only these; empty for all.
            outcomes: Only these; empty for all.
            created_from: Only runs created then or later.
            created_before: Only runs created earlier.
        """
        request = run_pb2.ListRunsRequest(
            states=[messages.state_to_wire(state) for state in states], outcomes=outcomes, page_size=_PAGE
        )
        if created_from is not None:
            request.created_from.CopyFrom(messages.time_to_wire(created_from))
        if created_before is not None:
            request.created_before.CopyFrom(messages.time_to_wire(created_before))
        while True:
            page = await self._wire.call(self._wire.stub.ListRuns, request)
            for run in page.runs:
                yield messages.run_from_wire(run)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    def watch(self, run_id: str, from_position: int = 0) -> AsyncGenerator[tuple[int, Event], None]:
        """The events of a run's tree with their positions, past ones first, until the run has ended.

        A connection that breaks is made again, for up to `patience.watch_s` without the server, and the
        events go on at the next one: none is missing, none comes twice. Events are those of docs/events.md,
        as mappings; skip kinds you don't know.

        Args:
            run_id: The root run.
            from_position: The first event that is wanted, from 0.
        """

        async def is_over() -> bool:
            return (await self.get_run(run_id)).is_over

        return watching.watch(self._wire, run_id, from_position, is_over)

    async def read_text(self, run_id: str, sha256: str = "") -> AsyncGenerator[bytes, None]:
        """A long text that an event of the run's tree refers to, or the answer, in parts.

        A connection that breaks is made again, and what has come is not given twice.

        Args:
            run_id: The root run.
            sha256: The text's hash, from the event; empty for the answer.

        Raises:
            ServerError: What came has another hash.
        """
        if sha256:
            request = run_pb2.ReadTextRequest(run_id=run_id, sha256=sha256)
        else:
            request = run_pb2.ReadTextRequest(run_id=run_id, answer=True)
        wire = self._wire
        row = wire.row(wire.patience.call_s)
        digest = hashlib.sha256()
        given = 0
        while True:
            # A text does not change, so what has been given is skipped.
            skip = given
            call = wire.stub.ReadText(request, timeout=_TEXT_S, metadata=wire.metadata)
            try:
                async for message in call:
                    data, skip = message.data[skip:], max(0, skip - len(message.data))
                    if data:
                        row.heard()
                        digest.update(data)
                        given += len(data)
                        yield data
                break
            except grpc.aio.AioRpcError as error:
                failure = failure_of(error, wire.address)
                if not failure.passes:
                    raise failure.error from error
                await wire.pause(row, failure.error)
            finally:
                call.cancel()
        if sha256 and digest.hexdigest() != sha256:
            raise ServerError(f"{wire.address} sent another text than the event refers to")

    async def read_answer(self, run: Run) -> str | None:
        """A run's whole answer; None when it has none."""
        if run.answer is None or run.answer_is_whole:
            return run.answer
        data = bytearray()
        async with aclosing(self.read_text(run.run_id)) as parts:
            async for part in parts:
                data += part
        return messages.text_from_wire(bytes(data))

    async def cancel_run(self, run_id: str) -> Run:
        """End a run as cancelled; it has begun to end when this returns. An ended one stays as it is."""
        response = await self._wire.call(self._wire.stub.CancelRun, run_pb2.CancelRunRequest(run_id=run_id))
        return messages.run_from_wire(response.run)

    async def resume_run(self, run_id: str) -> Run:
        """Go on with a run that was interrupted by the end of a server, and that no server resumed.

        Raises:
            ConflictError: It is not interrupted, or cannot be resumed; the sentence says why.
        """
        response = await self._wire.change(
            self._wire.stub.ResumeRun, run_pb2.ResumeRunRequest(run_id=run_id), already=ConflictError
        )
        if response is None:
            return await self.get_run(run_id)
        return messages.run_from_wire(response.run)

    async def delete_run(self, run_id: str) -> None:
        """Remove a run's events, texts and answer for good.

        Raises:
            ConflictError: It has not ended. Cancel it first.
        """
        await self._wire.change(
            self._wire.stub.DeleteRun, run_pb2.DeleteRunRequest(run_id=run_id), already=NotFoundError
        )

    # --- Contexts --------------------------------------------------------------------------------------

    async def upload(self, *paths: Path, name: str | None = None) -> Uploaded:
        """Send a file as it is; a directory, or several paths, as a tar archive made for the purpose.

        What the server has already is not sent: not a context with the same content and name, and not the
        part of one that an upload before had sent when it broke.

        Args:
            paths: What questions will be asked about. Below a directory no link is followed.
            name: Instead of the path's own. How it ends says whether it is an archive (`.zip`, `.tar.gz`).

        Raises:
            ContextInputError: There is nothing to read, it cannot be read, or it changed while it was sent.
            BudgetExceededError: More bytes than the tenant may keep.
            MachineError: There is no room for the archive; TMPDIR names another place.
        """
        async with packing.packed(paths, name) as packed:
            return await uploading.upload(self._wire, packed)

    async def upload_bytes(self, data: bytes, name: str = "context.txt") -> Uploaded:
        """Likewise for a text that is no file."""
        async with packing.packed_bytes(data, name) as packed:
            return await uploading.upload(self._wire, packed)

    async def list_contexts(self) -> AsyncGenerator[Context, None]:
        """The tenant's contexts, newest first, page by page as they are taken."""
        request = run_pb2.ListContextsRequest(page_size=_PAGE)
        while True:
            page = await self._wire.call(self._wire.stub.ListContexts, request)
            for context in page.contexts:
                yield messages.context_from_wire(context)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def delete_context(self, context_id: str) -> None:
        """Remove a context for good.

        Raises:
            ConflictError: A run that has not ended needs it.
        """
        await self._wire.change(
            self._wire.stub.DeleteContext,
            run_pb2.DeleteContextRequest(context_id=context_id),
            already=NotFoundError,
        )

    # --- The tenant ------------------------------------------------------------------------------------

    async def get_usage(self) -> Usage:
        """What the tenant has used in this day and month, and what it may."""
        return messages.usage_from_wire(
            await self._wire.call(self._wire.stub.GetUsage, run_pb2.GetUsageRequest())
        )

    # --- All of it at once -----------------------------------------------------------------------------

    async def ask(
        self,
        question: str,
        context: Path | Sequence[Path] | str | bytes,
        *,
        options: RunOptions = _DEFAULT_OPTIONS,
        idempotency_key: str | None = None,
        on_event: Callable[[int, Event], None] | None = None,
    ) -> Answer:
        """Send a context, ask a question about it, and wait for what becomes of it.

        Cancelling this leaves the run running: its id is in the first event, and in `list_runs`.

        Args:
            question: What is asked.
            context: Paths are uploaded. A `str` is a text, never a path; one of more than 4 MB is uploaded.
            options: How the question is to be answered.
            idempotency_key: As in `create_run`.
            on_event: Told each event and its position.
        """
        notes: Sequence[str] = ()
        context_id, text = "", None
        if isinstance(context, str | bytes):
            text = _utf8(context)
            if len(text) > MAX_INLINE_BYTES:
                context_id, text = (await self.upload_bytes(text)).context_id, None
        else:
            paths = (context,) if isinstance(context, Path) else context
            uploaded = await self.upload(*paths)
            context_id, notes = uploaded.context_id, uploaded.notes
        created = await self.create_run(
            question, context_id=context_id, text=text, options=options, idempotency_key=idempotency_key
        )
        run = await self.wait(created.run.run_id, on_event=on_event)
        return Answer(text=await self.read_answer(run), run=run, notes=notes)

    async def wait(
        self, run_id: str, *, from_position: int = 0, on_event: Callable[[int, Event], None] | None = None
    ) -> Run:
        """Watch a run until it has ended; the run as it is then."""
        async with aclosing(self.watch(run_id, from_position)) as events:
            async for position, event in events:
                if on_event is not None:
                    on_event(position, event)
        return await self.get_run(run_id)


def _utf8(text: str | bytes) -> bytes:
    return text if isinstance(text, bytes) else text.encode("utf-8", "replace")


def _new_key() -> str:
    return secrets.token_hex(16)
