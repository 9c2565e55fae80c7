"""From model names to models: which client serves them, and what they cost."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.errors import InvalidRequestError, KeyMissingError, ProviderUnreachableError
from orchestrator.models.catalogue import SCRIPTED_PREFIX, lookup
from orchestrator.models.port import Model, ModelClient
from orchestrator.models.scripted import ScriptedClient, load_script
from orchestrator.pricing import ModelCard
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS

ANTHROPIC_URL = "https://api.anthropic.com"
_CONNECT_S = 5.0
_NO_KEY = "none"
"""Sent to a server of one's own when no key is set: the SDK insists on sending one."""


@asynccontextmanager
async def open_models(
    root: str, sub: str, *, base_url: str, api_key: str, priced_by_user: Mapping[str, ModelCard]
) -> AsyncIterator[dict[str, Model]]:
    """The models of a run tree by name and alias, connected for the length of the block.

    Raises:
        ModelNotAllowedError: Nothing says what a model costs.
        InvalidRequestError: A script that does not load, an address that is none.
        KeyMissingError: Anthropic's own address and no key.
        ProviderUnreachableError: Nothing answers at the address.
    """
    cards = {name: lookup(name, priced_by_user) for name in (root, sub)}
    clients: dict[str, ModelClient] = {}
    try:
        for name in cards:
            key = name if name.startswith(SCRIPTED_PREFIX) else ""
            if key not in clients:
                clients[key] = (
                    ScriptedClient(load_script(Path(name.removeprefix(SCRIPTED_PREFIX))))
                    if key
                    else await _anthropic(base_url or ANTHROPIC_URL, api_key)
                )
        models = {
            name: Model(card, clients[name if name.startswith(SCRIPTED_PREFIX) else ""])
            for name, card in cards.items()
        }
        yield {**models, ROOT_ALIAS: models[root], SUB_ALIAS: models[sub]}
    finally:
        for client in clients.values():
            await client.aclose()


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


async def _anthropic(base_url: str, api_key: str) -> ModelClient:
    if not api_key and base_url == ANTHROPIC_URL:
        raise KeyMissingError(
            "no key for the model provider: set ANTHROPIC_API_KEY, or name a server with --base-url"
        )
    await check_address(base_url)
    # Here and not above: it takes a second and 75 MB, and a scripted run needs neither.
    from orchestrator.models.anthropic_client import AnthropicClient  # noqa: PLC0415

    return AnthropicClient(api_key or _NO_KEY, base_url)
