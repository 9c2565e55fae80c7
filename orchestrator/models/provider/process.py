"""The provider process's side: it holds the credentials, and is the only one to talk to the model provider.

Rules:

1. Nothing is served before the process is closed to others of its user, and the credentials are read.
2. Where calls go is said once, in the first message. Whatever comes later chooses a model and its words.
3. What goes back passes `_Outbox`, and nothing does that has a credential in it: no provider repeats one in
   a reply, but a careless gateway may.
4. It writes no logs and no files, and has no standard streams. It ends with the channel, or is killed.
"""

import asyncio
import os
import socket
import traceback
from collections.abc import Callable, Sequence

from rlm_proto.v1 import provider_pb2 as pb

from orchestrator.collector import collecting_seldom
from orchestrator.errors import Billing, MachineError, ModelError, OrchestratorError
from orchestrator.models import credentials, platforms
from orchestrator.models.credentials import Credentials
from orchestrator.models.platforms import Platform
from orchestrator.models.port import ModelClient
from orchestrator.models.provider import frames, hardening, sealed, wire

_NO_KEY = "none"
"""Sent to a server of one's own when no key is set: the SDK insists on sending one."""


def main(channel_fd: int, credentials_fd: int) -> None:
    """Be the provider process, on descriptors inherited from the orchestrator."""
    hardening.close_this_process()
    # For this process alone (`launch`). A program that a platform's library starts has its own.
    os.environ.pop("PYTHONPATH", None)
    asyncio.run(serve(socket.socket(fileno=channel_fd), lambda: sealed.unseal(credentials_fd)))


async def serve(channel: socket.socket, unseal: Callable[[], dict[str, str]]) -> None:
    """Serve the channel until its other end closes.

    Args:
        channel: To the orchestrator; closed in the end.
        unseal: Gives the credentials, once where calls go is known.
    """
    reader, writer = await asyncio.open_unix_connection(sock=channel, limit=frames.BUFFER_BYTES)
    try:
        await _serve(reader, writer, unseal)
    finally:
        writer.close()


async def _serve(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, unseal: Callable[[], dict[str, str]]
) -> None:
    first = await frames.receive(reader)
    if first is None:
        return
    told = pb.ToProvider.FromString(first).open
    try:
        platform = wire.platform_of(told)
        found = credentials.for_place(platform, told.base_url, unseal())
        platforms.check_url(told.base_url)
        if platform is not None:
            platforms.check_installed(platform)
    except OrchestratorError as error:
        await frames.send(writer, wire.refused(error))
        return
    try:
        client = _client(platform, told.base_url, found)
    except (OrchestratorError, ImportError) as error:
        why = MachineError(f"the model provider's library cannot be used: {error}")
        await frames.send(writer, wire.refused(why))
        return
    try:
        await frames.send(writer, pb.FromProvider(opened=pb.ProviderOpened(credentials=sorted(found))))
        with collecting_seldom():
            await _Calls(client, _Outbox(writer, credentials.remarkable(found))).serve(reader)
    finally:
        await client.aclose()


def _client(platform: Platform | None, base_url: str, found: Credentials) -> ModelClient:
    # Here and not above: it takes a second, and whether there is a key can be said before.
    from orchestrator.models import sdk  # noqa: PLC0415
    from orchestrator.models.anthropic_client import AnthropicClient  # noqa: PLC0415

    if platform is None:
        return AnthropicClient(sdk.anthropic_api(found.get(credentials.ANTHROPIC_KEY, _NO_KEY), base_url))
    if credentials.AWS_CONTAINER in found:
        # The one credential that Amazon's library reads by itself.
        os.environ[credentials.AWS_CONTAINER] = found[credentials.AWS_CONTAINER]
    return AnthropicClient(sdk.on_platform(credentials.with_credentials(platform, found), base_url))


class _Calls:
    """The calls under way, each a task of its own."""

    def __init__(self, client: ModelClient, outbox: "_Outbox") -> None:
        self._client = client
        self._outbox = outbox
        self._tasks: dict[int, asyncio.Task[None]] = {}

    async def serve(self, reader: asyncio.StreamReader) -> None:
        """Until the channel ends, or says something that makes no sense; then every call ends too."""
        try:
            async with asyncio.TaskGroup() as group:
                while (payload := await frames.receive(reader)) is not None:
                    message = pb.ToProvider.FromString(payload)
                    match message.WhichOneof("message"):
                        case "call":
                            self._begin(group, message.call)
                        case "cancel":
                            self._cancel(message.cancel.id)
                        case _:
                            break
                for task in self._tasks.values():
                    task.cancel()
        except* OSError:
            # The orchestrator is gone. There is nobody left to tell.
            pass

    def _begin(self, group: asyncio.TaskGroup, call: pb.ModelCall) -> None:
        self._tasks[call.id] = task = group.create_task(self._answer(call))
        task.add_done_callback(lambda _task: self._tasks.pop(call.id, None))

    def _cancel(self, call_id: int) -> None:
        task = self._tasks.get(call_id)
        if task is not None:
            task.cancel()

    async def _answer(self, call: pb.ModelCall) -> None:
        try:
            completion = await self._client.complete(wire.request_of(call))
        except ModelError as error:
            answer = wire.failed(call.id, error)
        except Exception as error:  # whatever it is, the call that waits must hear of it
            why = f"the provider process failed: {_described(error)}"
            answer = wire.failed(call.id, ModelError(why, billing=Billing.UNKNOWN, retryable=False))
        else:
            answer = wire.completed(call.id, completion)
        await self._outbox.send(call.id, answer)


def _described(error: BaseException) -> str:
    """Its kind and where it was raised. Its text may quote anything."""
    *_, last = traceback.walk_tb(error.__traceback__)
    frame, line = last
    return f"{type(error).__name__} in {os.path.basename(frame.f_code.co_filename)}, line {line}"


class _Outbox:
    """The way back to the orchestrator."""

    def __init__(self, writer: asyncio.StreamWriter, secrets: Sequence[bytes]) -> None:
        self._writer = writer
        self._secrets = secrets

    async def send(self, call_id: int, answer: pb.FromProvider) -> None:
        """Send a call's answer, or that it was withheld."""
        said = answer.SerializeToString()
        if any(secret in said for secret in self._secrets):
            why = "the provider's reply repeats the API key, and was withheld: do not trust that server"
            answer = wire.failed(call_id, ModelError(why, billing=Billing.UNKNOWN, retryable=False))
        await frames.send(self._writer, answer)
