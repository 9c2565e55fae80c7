"""`rlm tenants` and `rlm keys` with `--server`: their work on a server."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from orchestrator.cli.remote.connection import Connection
from orchestrator.cli.remote.session import carry_out_with
from orchestrator.client import AdminClient

T = TypeVar("T")


def carry_out(connection: Connection, work: Callable[[AdminClient], Coroutine[Any, Any, T]]) -> T:
    """What the work returns. A signal ends the command.

    Raises:
        OrchestratorError: See `AdminClient`.
    """
    return carry_out_with(AdminClient, connection, work)
