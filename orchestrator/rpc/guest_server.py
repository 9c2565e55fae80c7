"""The gRPC server of one sandbox, on a socket of its own.

The socket is the identity: the services handed in are built for one run, and nothing a guest sends can make
them another's. Stopping the server revokes everything.
"""

import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio

from orchestrator.errors import SandboxStartError
from orchestrator.limits import MAX_CALLS_IN_GUEST, MAX_MESSAGE_BYTES

SOCKET_NAME = "broker.sock"
_MAX_SOCKET_PATH_BYTES = 107

AddServices = Callable[[grpc.aio.Server], None]
"""Registers services on a server."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_concurrent_streams", 2 * MAX_CALLS_IN_GUEST),
    # One worker makes one connection; the slack is for a reconnect whose predecessor is not yet reaped.
    ("grpc.max_allowed_incoming_connections", 4),
    # A connection that never speaks would hold a descriptor of ours for ever.
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.max_metadata_size", 8_192),
    # No compression: nothing is gained on a Unix socket, and a bomb needs it.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),
)


@asynccontextmanager
async def guest_server(
    directory: Path, add_services: Sequence[AddServices], *, group_id: int | None
) -> AsyncIterator[Path]:
    """Serve on `directory / SOCKET_NAME` for the length of the block.

    Args:
        directory: Mounted read-only into one sandbox; nothing in it is ever opened by us.
        add_services: The guest's services, and nothing else.
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
    server = grpc.aio.server(
        options=_OPTIONS,
        # The stream of cells, the sub-calls, and a few cheap ones beside them.
        maximum_concurrent_rpcs=2 * MAX_CALLS_IN_GUEST,
    )
    for add in add_services:
        add(server)
    try:
        server.add_insecure_port(f"unix:{path}")
        await server.start()
    except RuntimeError as error:
        raise SandboxStartError(f"could not listen on {path}") from error
    try:
        if group_id is None:
            path.chmod(0o666)
        else:
            os.chown(path, -1, group_id)
            path.chmod(0o660)
        yield path
    finally:
        await server.stop(grace=None)
