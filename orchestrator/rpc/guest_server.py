"""The gRPC server of one sandbox, on a socket of its own.

The socket is the identity: the services handed in are built for one run, and nothing a guest sends can make
them another's. Stopping the server revokes everything.
"""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import grpc.aio

from orchestrator.errors import SandboxStartError
from orchestrator.limits import MAX_CALLS_ON_SOCKET, MAX_GUEST_CONNECTIONS, MAX_MESSAGE_BYTES
from orchestrator.rpc.gate import Gate

SOCKET_NAME = "broker.sock"
_MAX_SOCKET_PATH_BYTES = 107

AddServices = Callable[[grpc.aio.Server], None]
"""Registers services on a server."""


@dataclass(frozen=True, slots=True)
class GatedServices:
    """Services that bring their run's gate. Every call on their server passes it, also other services'."""

    add: AddServices
    gate: Gate

    def __call__(self, server: grpc.aio.Server) -> None:
        """See `AddServices`."""
        self.add(server)


_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    # Per connection; all connections together are bounded by the gate.
    ("grpc.max_concurrent_streams", MAX_CALLS_ON_SOCKET),
    ("grpc.max_allowed_incoming_connections", MAX_GUEST_CONNECTIONS),
    # A connection that never speaks would hold a descriptor of ours for ever. Honest ones take milliseconds.
    ("grpc.server_handshake_timeout_ms", 5_000),
    # One without a call. The worker's has the stream of cells, which lives as long as the run: no age limit.
    ("grpc.max_connection_idle_ms", 30_000),
    # Past this, and past the absolute limit always, a call's metadata is refused before anybody sees it.
    ("grpc.max_metadata_size", 4_096),
    ("grpc.absolute_max_metadata_size", 8_192),
    # No compression: nothing is gained on a Unix socket, and a bomb needs it.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # Pings serve no purpose on a Unix socket, whose end is always noticed: the third unasked one is the last.
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.http2.min_ping_interval_without_data_ms", 300_000),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 300_000),
    # A stream that nobody reads yet may send this much ahead and no more: no guessing of larger windows.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65_536),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_channelz", 0),
)


@asynccontextmanager
async def guest_server(
    directory: Path, add_services: Sequence[AddServices], *, group_id: int | None
) -> AsyncIterator[Path]:
    """Serve on `directory / SOCKET_NAME` for the length of the block.

    Args:
        directory: Mounted read-only into one sandbox; nothing in it is ever opened by us.
        add_services: The guest's services, and nothing else. With a `GatedServices` among them its gate is
            everybody's; without one the server has a gate of its own, which nobody hears of.
        group_id: The sandbox's group, which alone may connect. None when we are not root and cannot give a
            file away: then everybody may who can reach the directory, and its parents are private.

    Raises:
        SandboxStartError: The socket could not be bound, most likely because its path is too long.
    """
    path = directory / SOCKET_NAME
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH_BYTES:
        raise SandboxStartError(
            f"the socket path {str(path)!r} is longer than {_MAX_SOCKET_PATH_BYTES} bytes: "
            "use a shorter RLM_STATE_DIR"
        )
    gate = next((services.gate for services in add_services if isinstance(services, GatedServices)), Gate())
    server = grpc.aio.server(
        interceptors=(gate,),
        options=_OPTIONS,
        # Never reached: the gate turns away before, and counts.
        maximum_concurrent_rpcs=MAX_CALLS_ON_SOCKET * MAX_GUEST_CONNECTIONS,
    )
    for add in add_services:
        add(server)
    try:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    except RuntimeError as error:
        raise SandboxStartError(f"could not listen on {path}") from error
    stopping = asyncio.create_task(_stop_when_shut(gate, server))
    try:
        if group_id is None:
            path.chmod(0o666)
        else:
            os.chown(path, -1, group_id)
            path.chmod(0o660)
        yield path
    finally:
        stopping.cancel()
        await asyncio.wait((stopping,))
        await server.stop(grace=None)


async def _stop_when_shut(gate: Gate, server: grpc.aio.Server) -> None:
    """A guest that went too far is heard no more, however long its run takes to end."""
    await gate.shut.wait()
    await server.stop(grace=None)
