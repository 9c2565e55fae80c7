"""The client for programs without an event loop.

One loop in a thread of its own, for the length of the block. `asyncio.run` for each call would be shorter,
but a gRPC channel belongs to its loop, so that each call would connect anew, and a watcher could not be an
iterator; and it would not work below somebody else's loop, as in a notebook.

Nothing is written twice: each method is the asynchronous one, waited for.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Concatenate, Generic, ParamSpec, Self, TypeVar

from orchestrator.client.admin import AdminClient
from orchestrator.client.channel import Tls
from orchestrator.client.client import Client
from orchestrator.client.connected import Connected
from orchestrator.client.patience import Patience
from orchestrator.client.values import Answer, RunOptions
from orchestrator.errors import InvariantError

P = ParamSpec("P")
T = TypeVar("T")


C = TypeVar("C", bound=Connected)


def _waits(
    method: Callable[Concatenate[C, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["_Waiting[C]", P], T]:
    def waiting(self: "_Waiting[C]", /, *arguments: P.args, **options: P.kwargs) -> T:
        return self.run(method(self.client, *arguments, **options))

    waiting.__doc__ = method.__doc__
    return waiting


def _iterates(
    method: Callable[Concatenate[C, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate["_Waiting[C]", P], Iterator[T]]:
    def iterating(self: "_Waiting[C]", /, *arguments: P.args, **options: P.kwargs) -> Iterator[T]:
        items = method(self.client, *arguments, **options)
        try:
            while True:
                try:
                    item = self.run(anext(items))
                except StopAsyncIteration:
                    return
                yield item
        finally:
            self.run(items.aclose())

    iterating.__doc__ = method.__doc__
    return iterating


class _Waiting(Generic[C]):
    """One client, its loop, and the thread of that."""

    def __init__(self, client: C) -> None:
        self.client = client
        """What does the work, on the loop's thread alone."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        loop = self._loop = asyncio.new_event_loop()
        # A daemon: a program that forgets to leave the block can end all the same.
        self._thread = threading.Thread(target=loop.run_forever, name="rlm-client", daemon=True)
        self._thread.start()
        try:
            self.run(self.client.__aenter__())
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self.client.__aexit__(kind, error, trace))
        finally:
            self._stop()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Carry something out on the loop's thread, and wait for it."""
        if self._loop is None:
            work.close()
            raise InvariantError("the client is used outside of its `with` block")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            # Ctrl-C, while the call goes on over there. Of a call that has ended nothing is left to cancel.
            future.cancel()
            raise

    def _stop(self) -> None:
        loop, thread, self._loop, self._thread = self._loop, self._thread, None, None
        if loop is None or thread is None:
            return

        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await loop.shutdown_asyncgens()
            await loop.shutdown_default_executor()

        asyncio.run_coroutine_threadsafe(end(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class SyncClient(_Waiting[Client]):
    """`Client` without `async`: `with SyncClient(...) as client:`, and the same methods and errors.

    Ctrl-C ends the wait for a call, and the call. To be used by one thread at a time.
    """

    def __init__(
        self,
        address: str,
        *,
        api_key: str,
        tls: Tls | None = None,
        plaintext: bool = False,
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """See `Client`. `say` is called in the loop's thread."""
        super().__init__(
            Client(address, api_key=api_key, tls=tls, plaintext=plaintext, patience=patience, say=say)
        )

    create_run = _waits(Client.create_run)
    continue_run = _waits(Client.continue_run)
    get_run = _waits(Client.get_run)
    list_runs = _iterates(Client.list_runs)
    watch = _iterates(Client.watch)
    wait = _waits(Client.wait)
    read_text = _iterates(Client.read_text)
    read_answer = _waits(Client.read_answer)
    cancel_run = _waits(Client.cancel_run)
    resume_run = _waits(Client.resume_run)
    delete_run = _waits(Client.delete_run)
    upload = _waits(Client.upload)
    upload_bytes = _waits(Client.upload_bytes)
    list_contexts = _iterates(Client.list_contexts)
    delete_context = _waits(Client.delete_context)
    get_usage = _waits(Client.get_usage)
    ask = _waits(Client.ask)


class SyncAdminClient(_Waiting[AdminClient]):
    """`AdminClient` without `async`, as `SyncClient` is `Client`."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str,
        tls: Tls | None = None,
        plaintext: bool = False,
        patience: Patience | None = None,
        say: Callable[[str], None] = lambda _line: None,
    ) -> None:
        """See `Client`. `say` is called in the loop's thread."""
        super().__init__(
            AdminClient(address, api_key=api_key, tls=tls, plaintext=plaintext, patience=patience, say=say)
        )

    add_tenant = _waits(AdminClient.add_tenant)
    list_tenants = _iterates(AdminClient.list_tenants)
    get_tenant = _waits(AdminClient.get_tenant)
    set_rules = _waits(AdminClient.set_rules)
    remove_tenant = _waits(AdminClient.remove_tenant)
    add_key = _waits(AdminClient.add_key)
    list_keys = _waits(AdminClient.list_keys)
    revoke_key = _waits(AdminClient.revoke_key)


def ask(
    question: str,
    context: Path | Sequence[Path] | str | bytes,
    *,
    server: str,
    api_key: str,
    tls: Tls | None = None,
    options: RunOptions | None = None,
) -> Answer:
    """One question, with a connection of its own. See `Client.ask`."""
    with SyncClient(server, api_key=api_key, tls=tls) as client:
        return client.ask(question, context, options=options or RunOptions())
