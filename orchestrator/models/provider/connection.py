"""From a provider process that was started to a client that asks it."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

from google.protobuf.message import DecodeError
from rlm_proto.v1 import provider_pb2 as pb

from orchestrator.errors import MachineError
from orchestrator.models.provider import frames, wire
from orchestrator.models.provider.client import ProviderClient
from orchestrator.models.provider.launch import ProviderProcess

_OPEN_S = 60.0
"""To the first word of a process that may have been started just now, on a machine that is very busy: it has
imported the provider's library then."""


@dataclass(frozen=True, slots=True)
class Connection:
    """An open channel."""

    client: ProviderClient
    credentials: Sequence[str]
    """The names of the credentials that the process was given and will send."""


async def connect(process: ProviderProcess) -> Connection:
    """Tell the process where calls go, and wait until it can make them. Once for each process; closing the
    client closes the channel.

    Raises:
        KeyMissingError: A credential is missing, or can't be one.
        InvalidRequestError: The address makes no sense.
        MachineError: The platform's own library is not installed, or the process does not work.
    """
    reader, writer = await asyncio.open_unix_connection(sock=process.channel, limit=frames.BUFFER_BYTES)
    try:
        async with asyncio.timeout(_OPEN_S):
            opened = await _opened(process, reader, writer)
    except (TimeoutError, OSError, ValueError, DecodeError) as error:
        await _abort(writer)
        raise MachineError(
            f"the process that asks the model provider does not work: {type(error).__name__}"
        ) from error
    except BaseException:
        await _abort(writer)
        raise
    return Connection(ProviderClient(reader, writer), tuple(opened.credentials))


async def _opened(
    process: ProviderProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> pb.ProviderOpened:
    await frames.send(writer, wire.open_provider(process.base_url, process.platform))
    payload = await frames.receive(reader)
    if payload is None:
        raise MachineError("the process that asks the model provider ended while it started")
    answer = pb.FromProvider.FromString(payload)
    if answer.HasField("refused"):
        raise wire.refusal(answer.refused)
    return answer.opened


async def _abort(writer: asyncio.StreamWriter) -> None:
    writer.transport.abort()
    with suppress(OSError):
        await writer.wait_closed()
