"""The worker's life: connect, serve one session, end."""

import asyncio
import sys

import grpc
from rlm_proto.v1 import broker_pb2_grpc, sandbox_pb2_grpc

from sandbox_image.worker.guest import InterpreterFailed
from sandbox_image.worker.processes import Reaper
from sandbox_image.worker.session import Places, Session
from sandbox_image.worker.spawn import Spawned

# The host sends code and completions, each far below this.
_MAX_MESSAGE_BYTES = 64 * 1024 * 1024

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A repeated call would be a second call to the broker; what may be repeated is decided in `subcalls`.
    ("grpc.enable_retries", 0),
    # There is no network, hence no proxy, whatever the environment says.
    ("grpc.enable_http_proxy", 0),
)


def serve(socket_path: str, context_dir: str, work_dir: str, spawned: Spawned) -> int:
    """Serve until the host closes the stream or it breaks; gives the exit code."""
    return asyncio.run(_serve(socket_path, Places(context_dir, work_dir), spawned))


async def _serve(socket_path: str, places: Places, spawned: Spawned) -> int:
    reaper = Reaper(asyncio.get_running_loop())
    channel = grpc.aio.insecure_channel(f"unix:{socket_path}", options=_CHANNEL_OPTIONS)
    sandbox: sandbox_pb2_grpc.SandboxServiceAsyncStub = sandbox_pb2_grpc.SandboxServiceStub(channel)
    broker: broker_pb2_grpc.BrokerServiceAsyncStub = broker_pb2_grpc.BrokerServiceStub(channel)
    session = Session(sandbox.Attach(), broker, reaper, places)
    try:
        await session.run(spawned)
    except (grpc.aio.AioRpcError, asyncio.InvalidStateError, InterpreterFailed, OSError) as error:
        print(f"worker: {error}", file=sys.stderr)
        return 1
    finally:
        await reaper.kill_all()
    return 0
