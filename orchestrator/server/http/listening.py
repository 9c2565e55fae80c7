"""The port: uvicorn around an application, for the length of a block."""

import asyncio
import socket
import ssl
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from orchestrator.errors import InvalidRequestError
from orchestrator.limits import (
    HTTP_HEAD_S,
    HTTP_KEEP_ALIVE_S,
    HTTP_PART_TAKEN_S,
    HTTP_STREAMS_END_S,
    MAX_HTTP_CONNECTIONS,
    MAX_HTTP_HEADER_BYTES,
    MAX_HTTP_IDLE_CONNECTIONS,
)
from orchestrator.server.http.requests import LET_IN
from orchestrator.shielding import run_shielded

_BACKLOG = 2_048


@dataclass(frozen=True, kw_only=True, slots=True)
class Certificates:
    """Files for TLS."""

    certificate: str
    """With its chain, PEM."""
    key: str
    client_authority: str | None = None
    """Only clients with a certificate of this authority are let in; None lets in all."""


class _UntilTheEnd:
    """What the end of the server cuts off is no fault of the application: it needs no traceback each."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self.is_ending = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            # The task ends here either way.
            if not self.is_ending:
                raise


class _Idle:
    """Connections without a request that was let in, oldest first."""

    def __init__(self) -> None:
        self._connections: OrderedDict[_Connection, None] = OrderedDict()

    def add(self, connection: "_Connection") -> None:
        """One more; the oldest goes when there are too many."""
        self._connections[connection] = None
        self._connections.move_to_end(connection)
        while len(self._connections) > MAX_HTTP_IDLE_CONNECTIONS:
            self._connections.popitem(last=False)[0].transport.close()

    def discard(self, connection: "_Connection") -> None:
        """It has a request, or is gone."""
        self._connections.pop(connection, None)


class _Connection(H11Protocol):
    """Closed when its headers don't come, or when what it is sent is not taken: uvicorn waits for ever."""

    def __init__(self, idle: _Idle, *, app_state: dict[str, Any], **given: Any) -> None:
        # Starlette hands the state on with each request.
        super().__init__(app_state={**app_state, LET_IN: self._let_in}, **given)
        self._idle = idle

    _due: asyncio.TimerHandle | None = None
    """Its headers."""
    _taken_due: asyncio.TimerHandle | None = None
    """What waits to be sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn has it
        super().connection_made(transport)
        self._expect_head(HTTP_HEAD_S)
        self._idle.add(self)

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._idle.add(self)
        self._expect_head(HTTP_KEEP_ALIVE_S + HTTP_HEAD_S)

    def pause_writing(self) -> None:
        super().pause_writing()
        # Not `close`, which first waits until all is taken.
        self._taken_due = self.loop.call_later(HTTP_PART_TAKEN_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._taken_due is not None:
            self._taken_due.cancel()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        for due in (self._due, self._taken_due):
            if due is not None:
                due.cancel()
        self._idle.discard(self)
        super().connection_lost(exc)

    def _let_in(self) -> None:
        self._idle.discard(self)

    def _expect_head(self, within_s: float) -> None:
        if self._due is not None:
            self._due.cancel()
        self._due = self.loop.call_later(within_s, self._close_unless_asked, self.cycle)

    def _close_unless_asked(self, before: object) -> None:
        if self.cycle is before:
            self.transport.close()


class _Server(uvicorn.Server):
    """Without uvicorn's own signal handlers: the process has one place that says when it ends."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def listening(
    app: ASGIApp, *, host: str, port: int, certificates: Certificates | None = None
) -> AsyncIterator[tuple[str, int]]:
    """Serve for the length of the block; gives the address that it has.

    At the end no connection is taken any more, requests under way are given `HTTP_STREAMS_END_S`, and what is
    left then is cancelled.

    Args:
        app: What answers.
        host: An address of this machine.
        port: 0 for any that is free.
        certificates: None for plain HTTP.

    Raises:
        InvalidRequestError: The address cannot be had, or the certificates cannot be read.
    """
    try:
        bound = socket.create_server((host, port), family=_family(host), backlog=_BACKLOG)
    except OSError as error:
        raise InvalidRequestError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    until_the_end = _UntilTheEnd(app)
    config = uvicorn.Config(
        until_the_end,
        # h11 is the one of uvicorn's parsers that limits headers.
        http=partial(_Connection, _Idle()),  # type: ignore[arg-type] # a class, it says, and calls it
        limit_concurrency=MAX_HTTP_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HTTP_HEADER_BYTES,
        ws="none",
        lifespan="off",
        loop="none",
        log_config=None,
        # Its warnings are one for each odd request, and so a stranger's way to fill the log.
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=HTTP_KEEP_ALIVE_S,
        timeout_graceful_shutdown=HTTP_STREAMS_END_S,
        backlog=_BACKLOG,
        ssl_certfile=certificates.certificate if certificates else None,
        ssl_keyfile=certificates.key if certificates else None,
        ssl_ca_certs=certificates.client_authority if certificates else None,
        ssl_cert_reqs=ssl.CERT_REQUIRED if certificates and certificates.client_authority else ssl.CERT_NONE,
    )
    with bound:
        try:
            config.load()
        except (OSError, ssl.SSLError) as error:
            raise InvalidRequestError("the TLS certificate or its key cannot be read") from error
        server = _Server(config)
        serving = asyncio.create_task(server.serve(sockets=[bound]))
        try:
            while not server.started:
                if serving.done():
                    serving.result()
                await asyncio.sleep(0.005)
            yield bound.getsockname()[:2]
        finally:
            until_the_end.is_ending = True
            server.should_exit = True
            await run_shielded(_ended(serving))


async def _ended(serving: asyncio.Task[None]) -> None:
    await serving


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
