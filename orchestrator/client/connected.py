"""A connection to one server, for one key, for the length of a block: what the clients have in common."""

from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc.aio

from orchestrator.client.channel import Tls, metadata_of, open_channel
from orchestrator.client.patience import Patience
from orchestrator.client.wire import Wire
from orchestrator.errors import InvariantError


def _nobody(_line: str) -> None:
    pass


class Connected:
    """Entered, it has a channel; what is said over it is its subclasses'."""

    def __init__(
        self,
        address: str,
        *,
        api_key: str,
        tls: Tls | None = None,
        plaintext: bool = False,
        patience: Patience | None = None,
        say: Callable[[str], None] = _nobody,
    ) -> None:
        """Nothing is sent before the block is entered.

        Args:
            address: `HOST:PORT`, or `unix:PATH`.
            api_key: As `rlm tenants add` or `rlm keys add` printed it.
            tls: None for none, which another machine's address refuses.
            plaintext: Send key and contexts unencrypted to another machine all the same.
            patience: How long the server may be away.
            say: Told when it is, and when it is back; one line each.
        """
        self._address = address
        self._metadata = metadata_of(api_key)
        self._tls = tls
        self._plaintext = plaintext
        self._patience = patience or Patience()
        self._say = say
        self._channel: grpc.aio.Channel | None = None
        self._open: Wire | None = None

    async def __aenter__(self) -> Self:
        self._channel = open_channel(self._address, self._tls, plaintext=self._plaintext)
        self._open = Wire(
            self._channel,
            address=self._address,
            metadata=self._metadata,
            patience=self._patience,
            say=self._say,
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        channel, self._channel, self._open = self._channel, None, None
        if channel is not None:
            await channel.close()

    @property
    def _wire(self) -> Wire:
        if self._open is None:
            raise InvariantError("the client is used outside of its `async with` block")
        return self._open
