"""Services that come to a running server: a sandbox is made before it has a run, and its server with it.

gRPC takes services and interceptors only before a server starts. So the server starts with one handler that
finds nothing and one gate of its own; with the run come its services and its gate, once, and both then
answer for everything that follows.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio

from orchestrator.abuse import Offence
from orchestrator.errors import InvariantError
from orchestrator.rpc.gate import Gate
from orchestrator.rpc.guest_server import AddServices, GatedServices

_FoundHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"


class LateServices(grpc.GenericRpcHandler):
    """A run's services on a server that was started without them."""

    def __init__(self) -> None:
        self._gate = _GateBefore()
        self._handlers: list[grpc.GenericRpcHandler] = []
        self._is_bound = False

    def on_server(self, *others: AddServices) -> AddServices:
        """What to start the server with, besides the sandbox's own services."""

        def add(server: grpc.aio.Server) -> None:
            server.add_generic_rpc_handlers((self,))
            for other in others:
                other(server)

        return GatedServices(add, self._gate)

    def bind(self, services: Sequence[AddServices]) -> None:
        """The server's run is known: from now on these are served, behind the gate that is among them.

        Raises:
            InvariantError: It had been before. A sandbox is never used twice.
        """
        if self._is_bound:
            raise InvariantError("a sandbox was leased twice")
        self._is_bound = True
        for add in services:
            # What generated code calls a server, which is all that is needed here.
            add(cast(grpc.aio.Server, self))
            if isinstance(add, GatedServices):
                self._gate.give_way(add.gate)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> _FoundHandler:
        """See `grpc.GenericRpcHandler`."""
        for handler in self._handlers:
            found = handler.service(handler_call_details)
            if found is not None:
                return found
        return None

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        """Called by generated code, as on a server."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        """Called by generated code, which has given the same as a generic handler."""


class _GateBefore(Gate):
    """A server's gate until its run's own is there, which then also judges what this one let in."""

    def __init__(self) -> None:
        super().__init__()
        self._run_gate: Gate | None = None

    def give_way(self, run_gate: Gate) -> None:
        self._run_gate = run_gate
        run_gate.shut_with(self.shut)

    def blame(self, offence: Offence) -> None:
        if self._run_gate is None:
            super().blame(offence)
        else:
            self._run_gate.blame(offence)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_FoundHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _FoundHandler:
        if self._run_gate is None:
            return await super().intercept_service(continuation, handler_call_details)
        return await self._run_gate.intercept_service(continuation, handler_call_details)
