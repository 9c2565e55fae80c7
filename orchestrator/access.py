"""From model names to models: which client serves them, and what they cost."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.config import Settings
from orchestrator.errors import InvalidRequestError, KeyMissingError, ProviderUnreachableError
from orchestrator.models import price_file
from orchestrator.models.breaker import GuardedClient
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.models.choice import Policy, Wanted, choose
from orchestrator.models.platforms import ANTHROPIC_URL
from orchestrator.models.port import Model, ModelClient
from orchestrator.models.price_file import PriceList
from orchestrator.models.scripted import ScriptedClient, load_script

_CONNECT_S = 5.0
_NO_KEY = "none"
"""Sent to a server of one's own when no key is set: the SDK insists on sending one."""
_PROVIDER = ""
"""What stands for the provider where a scripted model has its own name: all its models share one client, and
so one circuit breaker."""


@asynccontextmanager
async def open_models(
    wanted: Wanted, settings: Settings, *, base_url: str
) -> AsyncIterator[dict[str, Model]]:
    """The models of a run tree by name, role and alias, connected for the length of the block.

    Raises:
        ModelNotAllowedError: The settings don't allow a model, or nothing says what it costs.
        InvalidRequestError: A script or price file that does not load, an address that is none.
        KeyMissingError: The provider needs a key and there is none.
        MachineError: The platform's own library is not installed.
        ProviderUnreachableError: Nothing answers at the address.
    """
    prices = price_file.read(settings.prices_file) if settings.prices_file else PriceList()
    cards = choose(wanted, Policy(prices=prices, allowed=settings.models_allowed))
    clients: dict[str, ModelClient] = {}
    try:
        for served_by in {_served_by(card.name) for card in cards.values()}:
            clients[served_by] = (
                ScriptedClient(load_script(Path(served_by.removeprefix(SCRIPTED_PREFIX))))
                if served_by
                else await _provider(settings, base_url)
            )
        yield {name: Model(card, clients[_served_by(card.name)]) for name, card in cards.items()}
    finally:
        for client in clients.values():
            await client.aclose()


def provider_url(settings: Settings, base_url: str = "") -> str:
    """The address that calls go to."""
    return base_url or (settings.platform.url if settings.platform else ANTHROPIC_URL)


def _served_by(model: str) -> str:
    return model if model.startswith(SCRIPTED_PREFIX) else _PROVIDER


async def check_address(base_url: str) -> None:
    """Raise unless something accepts connections at the address.

    Raises:
        InvalidRequestError: It is no http or https URL.
        ProviderUnreachableError: Nothing answers there.
    """
    url = urlsplit(base_url)
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise InvalidRequestError(f"{base_url!r} is no http or https address")
    try:
        port = url.port or (443 if url.scheme == "https" else 80)
        async with asyncio.timeout(_CONNECT_S):
            _, writer = await asyncio.open_connection(url.hostname, port)
    except ValueError as error:
        raise InvalidRequestError(f"{base_url!r} has no valid port") from error
    except (OSError, TimeoutError) as error:
        raise ProviderUnreachableError(
            f"nothing answers at {base_url}: check --base-url and the network"
        ) from error
    writer.close()


async def _provider(settings: Settings, base_url: str) -> ModelClient:
    url = provider_url(settings, base_url)
    if not settings.platform and not settings.api_key and url == ANTHROPIC_URL:
        raise KeyMissingError(
            "no key for the model provider: set ANTHROPIC_API_KEY, or name a server with --base-url"
        )
    await check_address(url)
    # Here and not above: it takes a second and 75 MB, and a scripted run needs neither.
    from orchestrator.models import sdk  # noqa: PLC0415
    from orchestrator.models.anthropic_client import AnthropicClient  # noqa: PLC0415

    connection = (
        sdk.on_platform(settings.platform, url)
        if settings.platform
        else sdk.anthropic_api(settings.api_key or _NO_KEY, url)
    )
    return GuardedClient(AnthropicClient(connection))
