"""The SDK's clients, one for each place where the models are served, all made the same careful way.

Importing this module costs what importing the SDK costs: a second and 75 MB. The provider process does so
(`provider.process`), and nothing else.

- The SDK retries nothing and the connection pool has no limit, so there is one place that retries (`retry`),
  one that limits calls in flight (the run tree's limit), and no waiting for a connection that would look like
  a slow provider.
- Nothing is taken from the environment: not keys, not addresses, not ANTHROPIC_CUSTOM_HEADERS, not proxies.
  A proxy must be named, since it sees prompts. SSL_CERT_FILE and SSL_CERT_DIR count: they name whom to trust,
  not whom to send to. Redirects are not followed. One exception: without a token or keys, Amazon's and
  Google's own libraries look for credentials, and they do so everywhere.
- Headers are cleaned when a request is built, so before it is signed.
"""

from collections.abc import AsyncGenerator, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias, cast
from urllib.parse import urlsplit

import httpx2
from anthropic import (
    AnthropicError,
    AsyncAnthropic,
    AsyncAnthropicBedrock,
    AsyncAnthropicFoundry,
    AsyncAnthropicVertex,
    AsyncStream,
    DefaultAioHttpClient,
)
from anthropic.lib.bedrock._stream_decoder import AWSEventStreamDecoder

from orchestrator.errors import Billing, InvalidRequestError, ModelError
from orchestrator.models import credentials, failures
from orchestrator.models.platforms import (
    ANTHROPIC_URL,
    Bedrock,
    Foundry,
    Platform,
    Vertex,
    check_installed,
    check_url,
)

# A request sent on a connection that the server just closed counts as maybe billed. So: shorter than the five
# seconds of many servers; and none over plain HTTP, where a new connection costs next to nothing, and where
# llama.cpp's server closes each one behind a streamed reply without a word.
_KEEPALIVE_S = 4.0
_KEEPALIVE_PLAIN_S = 0.0
_SENT_HEADERS = frozenset(
    {
        "accept",
        "accept-encoding",
        "anthropic-version",
        "connection",
        "content-length",
        "content-type",
        "user-agent",
    }
)

Events: TypeAlias = AsyncGenerator[Any]
"""Server-sent events, or what the SDK makes to look like them."""


@dataclass(frozen=True, slots=True)
class Connection:
    """A client of the SDK, and how to read its streams."""

    sdk: AsyncAnthropic | AsyncAnthropicBedrock | AsyncAnthropicVertex
    events: Callable[[httpx2.Response], Events]


def anthropic_api(api_key: str, base_url: str = ANTHROPIC_URL, *, proxy: str | None = None) -> Connection:
    """Anthropic's own address, or any server that speaks the Messages API. Nothing is sent yet.

    Raises:
        KeyMissingError: The key is empty or can't be a key.
        InvalidRequestError: An address that is no http or https URL.
    """
    key = credentials.checked("the API key", api_key)
    for url in (base_url,) if proxy is None else (base_url, proxy):
        check_url(url)
    http = _http(base_url, {"authorization": f"Bearer {key}"}, proxy)
    sdk = AsyncAnthropic(
        api_key=key, base_url=base_url, max_retries=0, open_telemetry=False, http_client=http
    )
    return Connection(sdk, _server_sent)


def on_platform(platform: Platform, base_url: str = "", *, proxy: str | None = None) -> Connection:
    """A cloud platform; `base_url` is empty for its public address. Nothing is sent yet.

    Raises:
        KeyMissingError: A key is missing.
        InvalidRequestError: An address that is no http or https URL, or credentials that contradict.
        MachineError: The platform's own library is not installed.
    """
    url = base_url or platform.url
    for given in (url,) if proxy is None else (url, proxy):
        check_url(given)
    check_installed(platform)
    try:
        match platform:
            case Bedrock():
                return _bedrock(platform, url, proxy)
            case Vertex():
                return _vertex(platform, url, proxy)
            case Foundry():
                return _foundry(platform, url, proxy)
    except (ValueError, AnthropicError) as error:
        raise InvalidRequestError(f"no client for {type(platform).__name__}: {error}") from error


# --- The platforms -------------------------------------------------------------------------------------


class _BedrockSdk(AsyncAnthropicBedrock):
    async def _prepare_request(self, request: httpx2.Request) -> None:
        with _before_anything_is_sent("Amazon"):
            await super()._prepare_request(request)


class _VertexSdk(AsyncAnthropicVertex):
    async def _prepare_request(self, request: httpx2.Request) -> None:
        with _before_anything_is_sent("Google"):
            await super()._prepare_request(request)


@contextmanager
def _before_anything_is_sent(whose: str) -> Iterator[None]:
    """Finding credentials goes wrong in ways of another library's; none of them costs anything."""
    try:
        yield
    except Exception as error:
        raise ModelError(
            f"no credentials for the model provider: {whose}'s library reports {type(error).__name__}",
            billing=Billing.NOTHING,
            retryable=False,
        ) from None


def _bedrock(platform: Bedrock, url: str, proxy: str | None) -> Connection:
    sdk = _BedrockSdk(
        aws_region=platform.region,
        # A token wins over keys, as in Amazon's own library.
        **(
            {"api_key": credentials.checked("the Bedrock token", platform.bearer_token)}
            if platform.bearer_token
            else {
                "aws_access_key": platform.access_key_id or None,
                "aws_secret_key": platform.secret_access_key or None,
                "aws_session_token": platform.session_token or None,
                "aws_profile": platform.profile or None,
            }
        ),
        base_url=url,
        max_retries=0,
        open_telemetry=False,
        http_client=_http(url, {}, proxy),
    )
    return Connection(sdk, _amazon_events)


def _vertex(platform: Vertex, url: str, proxy: str | None) -> Connection:
    sdk = _VertexSdk(
        region=platform.region,
        project_id=platform.project_id,
        access_token=platform.access_token or None,
        base_url=url,
        max_retries=0,
        open_telemetry=False,
        http_client=_http(url, {}, proxy),
    )
    return Connection(sdk, _server_sent)


def _foundry(platform: Foundry, url: str, proxy: str | None) -> Connection:
    key = credentials.checked("the Foundry key", platform.api_key)
    sdk = AsyncAnthropicFoundry(
        api_key=key,
        base_url=url,
        max_retries=0,
        open_telemetry=False,
        http_client=_http(url, {"x-api-key": key, "api-key": key}, proxy),
    )
    return Connection(sdk, _server_sent)


# --- Transport -----------------------------------------------------------------------------------------


class _CleanHttp(DefaultAioHttpClient):
    """Sends what the API needs; not what the environment or the SDK's telemetry would add."""

    authentication: Mapping[str, str] = {}

    def build_request(self, *args: Any, **kwargs: Any) -> httpx2.Request:
        request = super().build_request(*args, **kwargs)
        for name in [name for name in request.headers if name not in _SENT_HEADERS]:
            del request.headers[name]
        request.headers.update(self.authentication)
        return request


def _http(url: str, authentication: Mapping[str, str], proxy: str | None) -> _CleanHttp:
    keepalive_s = _KEEPALIVE_S if urlsplit(url).scheme == "https" else _KEEPALIVE_PLAIN_S
    http = _CleanHttp(
        # Zero is the transport's word for no limit.
        limits=httpx2.Limits(max_connections=0, keepalive_expiry=keepalive_s),
        verify=httpx2.create_ssl_context(),
        trust_env=False,
        proxy=proxy,
        follow_redirects=False,
    )
    http.authentication = authentication
    return http


def _server_sent(response: httpx2.Response) -> Events:
    return cast(Events, AsyncStream.raw_events(response))


async def _amazon_events(response: httpx2.Response) -> Events:
    try:
        async for event in AWSEventStreamDecoder().aiter_bytes(response.aiter_bytes()):
            yield event
    except Exception as error:
        # Not imported for its exceptions: who uses another platform does not have it.
        if type(error).__module__.partition(".")[0] != "botocore":
            raise
        raise failures.of_unreadable_reply("events") from None
