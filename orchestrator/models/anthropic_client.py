"""Models behind the Anthropic Messages API, through Anthropic's own SDK.

Importing this module costs about a second and 75 MB: nothing imports it before a run needs it.

Decisions:

- One path, streamed, whatever the length of the reply: long replies need it. The stream is read as plain JSON
  events. CPU for 1,000 concurrent calls with replies of 10 / 500 words: this 2.2 / 2.7 s; the SDK without
  streaming over aiohttp 2.1 / 2.5 s, with its own stream helper 2.9 / 9.3 s, over its default transport
  11.5 / 12.4 s (best of three, two busy cores).
- The SDK retries nothing and the connection pool has no limit, so there is one place that retries
  (`retry`), one that limits calls in flight (the run tree's limit), and no waiting for a connection that
  would look like a slow provider.
- Nothing is taken from the environment: not keys, not addresses, not ANTHROPIC_CUSTOM_HEADERS, not proxies.
  A proxy must be named, since it sees prompts. Only SSL_CERT_FILE and SSL_CERT_DIR count: they name whom to
  trust, not whom to send to. Redirects are not followed. (ANTHROPIC_LOG, the SDK's own switch for logging
  requests, works as ever.)
- Exceptions of the SDK are never chained: their text may quote the response, and that the key.
"""

from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast
from urllib.parse import urlsplit

import aiohttp
import httpx2
from aiohttp.http_exceptions import HttpProcessingError
from anthropic import AnthropicError, APIStatusError, AsyncAnthropic, AsyncStream, DefaultAioHttpClient

from orchestrator.errors import InvalidRequestError, KeyMissingError, ModelError
from orchestrator.models import failures
from orchestrator.models.in_flight import InFlight
from orchestrator.models.messages_api import Json, MessageAssembler, completion, parse_json, request_params
from orchestrator.models.port import Completion, ModelRequest

ANTHROPIC_URL = "https://api.anthropic.com"

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
# Shorter than any server's: a request on a connection the server just closed would count as maybe billed.
_KEEPALIVE_S = 15.0
_SENT_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "anthropic-version",
        "authorization",
        "connection",
        "content-length",
        "content-type",
        "user-agent",
    }
)


class AnthropicClient:
    """A `ModelClient` for any server that speaks the Messages API."""

    def __init__(self, api_key: str, base_url: str = ANTHROPIC_URL, *, proxy: str | None = None) -> None:
        """Nothing is sent before the first call.

        Raises:
            KeyMissingError: The key is empty or can't be a key.
            InvalidRequestError: An address that is no http or https URL.
        """
        self._key = api_key.strip()
        if not self._key or not self._key.isascii() or not self._key.isprintable() or " " in self._key:
            raise KeyMissingError("the API key is empty or has characters that no key has")
        for url in (base_url,) if proxy is None else (base_url, proxy):
            _check_url(url)
        self._in_flight = InFlight()
        self._sdk = AsyncAnthropic(
            api_key=self._key,
            base_url=base_url,
            max_retries=0,
            open_telemetry=False,
            http_client=DefaultAioHttpClient(
                # Zero is the transport's word for no limit.
                limits=httpx2.Limits(max_connections=0, keepalive_expiry=_KEEPALIVE_S),
                verify=httpx2.create_ssl_context(),
                trust_env=False,
                proxy=proxy,
                follow_redirects=False,
                event_hooks={"request": [self._clean_headers]},
            ),
        )

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
        self._in_flight.close()
        await self._sdk.close()

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
        async with await self._sdk.messages.create(**params, stream=True, timeout=timeout) as stream:
            response = stream.response
            if response.headers.get("content-type", "").startswith("application/json"):
                # Some servers that speak the API don't stream.
                return completion(parse_json(await response.aread()))
            assembler = MessageAssembler()
            raw = cast(AsyncGenerator[Any], AsyncStream.raw_events(response))
            async with aclosing(raw) as events:
                async for event in events:
                    if event.data:
                        assembler.feed(parse_json(event.data))
            return assembler.completion()

    async def _clean_headers(self, request: httpx2.Request) -> None:
        """Send what the API needs; not what the environment or the SDK's telemetry would add."""
        for name in [name for name in request.headers if name not in _SENT_HEADERS]:
            del request.headers[name]
        request.headers["authorization"] = f"Bearer {self._key}"


def _check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        known = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:
        known = False
    if not known:
        # Not quoted: it may hold a password.
        raise InvalidRequestError("the model provider's address, or the proxy's, is no http or https URL")
