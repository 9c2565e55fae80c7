"""Models behind the Anthropic Messages API, through Anthropic's own SDK, wherever they are served (`sdk`).

Importing this module costs about a second and 75 MB: nothing imports it before a run needs it.

Decisions:

- One path, streamed, whatever the length of the reply: long replies need it. The stream is read as plain JSON
  events. CPU for 1,000 concurrent calls with replies of 10 / 500 words: this 1.9 / 2.8 s; the SDK without
  streaming over aiohttp 2.1 / 1.8 s, with its own stream helper 3.0 / 8.4 s, over its default transport
  7.2 / 6.6 s (best of three, two busy cores; `bench/model_transport.py`).
- Exceptions of the SDK are never chained: their text may quote the response, and that the key.
"""

from contextlib import aclosing

import aiohttp
import httpx2
from aiohttp.http_exceptions import HttpProcessingError
from anthropic import AnthropicError, APIStatusError

from orchestrator.errors import ModelError
from orchestrator.models import failures
from orchestrator.models.in_flight import InFlight
from orchestrator.models.messages_api import Json, MessageAssembler, completion, parse_json, request_params
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.models.sdk import Connection

FOREIGN_ERRORS = (
    AnthropicError,
    httpx2.HTTPError,
    httpx2.StreamError,
    httpx2.InvalidURL,
    aiohttp.ClientError,
    HttpProcessingError,
    OSError,
    EOFError,
)
"""What SDK, adapter and transport raise when a connection fails. In the middle of a stream none of them hides
those of the one below."""

_CONNECT_TIMEOUT_S = 10.0


class AnthropicClient:
    """A `ModelClient` for any server that speaks the Messages API."""

    def __init__(self, connection: Connection) -> None:
        """Nothing is sent before the first call."""
        self._connection = connection
        self._in_flight = InFlight()

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`."""
        params = request_params(request)
        async with self._in_flight.attempt(request.timeout_s):
            outcome = await self._attempt(params, request.timeout_s)
        # Raised out here, with nothing chained to it.
        if isinstance(outcome, ModelError):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        """See `ModelClient`."""
        await self._in_flight.close()
        await self._connection.sdk.close()

    async def _attempt(self, params: Json, timeout_s: float) -> Completion | ModelError:
        try:
            return await self._stream(params, timeout_s)
        except ModelError as failure:
            return failure
        except APIStatusError as error:
            return failures.of_response(
                error.status_code,
                error_type=error.type,
                error_code=error.error_code,
                headers=error.response.headers,
            )
        except FOREIGN_ERRORS as error:
            return failures.of_transport(error)
        except ValueError:
            return failures.of_unreadable_reply("JSON")

    async def _stream(self, params: Json, timeout_s: float) -> Completion:
        timeout = httpx2.Timeout(timeout_s, connect=_CONNECT_TIMEOUT_S, pool=None)
        async with await self._connection.sdk.messages.create(
            **params, stream=True, timeout=timeout
        ) as stream:
            response = stream.response
            if response.headers.get("content-type", "").startswith("application/json"):
                # Some servers that speak the API don't stream.
                return completion(parse_json(await response.aread()))
            assembler = MessageAssembler()
            async with aclosing(self._connection.events(response)) as events:
                async for event in events:
                    if event.data:
                        assembler.feed(parse_json(event.data))
            return assembler.completion()
