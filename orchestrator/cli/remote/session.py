"""A command's work on a server: the connection opened, signals heard, failures told."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import typer

from orchestrator.cli import exits, signals
from orchestrator.cli.exits import Exit
from orchestrator.cli.remote.connection import Connection
from orchestrator.client import AdminClient, Client, Tls

T = TypeVar("T")
C = TypeVar("C", Client, AdminClient)


def client_of(connection: Connection, say: Callable[[str], None]) -> Client:
    """A client, not yet connected.

    Raises:
        InvalidRequestError: The key cannot be one.
    """
    return of_kind(Client, connection, say)


def of_kind(kind: type[C], connection: Connection, say: Callable[[str], None]) -> C:
    """Likewise, of this kind."""
    tls = connection.tls
    return kind(
        connection.address,
        api_key=connection.api_key,
        tls=Tls(ca=tls.ca, certificate=tls.certificate, private_key=tls.private_key) if tls else None,
        plaintext=connection.plaintext,
        say=say,
    )


def carry_out(connection: Connection, work: Callable[[Client], Coroutine[Any, Any, T]]) -> T:
    """What the work returns. A signal ends the command.

    Raises:
        OrchestratorError: See `Client`.
    """
    return carry_out_with(Client, connection, work)


def carry_out_with(kind: type[C], connection: Connection, work: Callable[[C], Coroutine[Any, Any, T]]) -> T:
    """Likewise, with a client of this kind."""

    async def connected() -> T:
        async with of_kind(kind, connection, lambda line: exits.tell(f"rlm: {line}")) as client:
            return await work(client)

    try:
        return asyncio.run(signals.until_stopped(connected(), lambda _count: None))
    except signals.StoppedError:
        exits.tell("rlm: stopped")
        raise typer.Exit(Exit.NO_ANSWER) from None
