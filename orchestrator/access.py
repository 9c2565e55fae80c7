"""From model names to models: which client serves them, and what they cost."""

import asyncio
import math
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from orchestrator.config import Settings
from orchestrator.errors import InvalidRequestError, KeyMissingError, MachineError, ProviderUnreachableError
from orchestrator.models import price_file
from orchestrator.models.breaker import GuardedClient
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.models.choice import Policy, Wanted, choose
from orchestrator.models.port import Model, ModelClient
from orchestrator.models.price_file import PriceList
from orchestrator.models.provider.connection import connect
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.scripted import ScriptedClient, load_script
from orchestrator.pricing import ModelCard
from orchestrator.shielding import run_shielded

_CONNECT_S = 5.0
_CONNECT_EVERY_S = 15.0
"""While nothing speaks against the provider; else with each look."""
_PROVIDER = ""
"""What stands for the provider where a scripted model has its own name: all its models share one client, and
so one circuit breaker."""
_NO_PROVIDER = "a model of a provider needs a provider process to ask, and there is none"


def chosen(wanted: Wanted, settings: Settings) -> dict[str, ModelCard]:
    """What is known of the models of a run tree, by name, role and alias. Nothing is connected to.

    Raises:
        ModelNotAllowedError: The settings don't allow a model, or nothing says what it costs.
        InvalidRequestError: A price file that does not load, or a name that cannot be one.
    """
    return choose(wanted, _policy(settings))


def _policy(settings: Settings) -> Policy:
    prices = price_file.read(settings.prices_file) if settings.prices_file else PriceList()
    return Policy(prices=prices, allowed=settings.models_allowed)


@asynccontextmanager
async def open_models(
    wanted: Wanted, settings: Settings, provider: ProviderProcess | None = None
) -> AsyncIterator[dict[str, Model]]:
    """The models of a run tree by name, role and alias, connected for the length of the block.

    Args:
        wanted: The models.
        settings: The process's settings.
        provider: The process to ask for all models but scripted ones. It can be connected to once.

    Raises:
        ModelNotAllowedError: The settings don't allow a model, or nothing says what it costs.
        InvalidRequestError: A script or price file that does not load, an address that is none, a model of a
            provider and no process to ask it.
        KeyMissingError: The provider needs a key and there is none.
        MachineError: The platform's own library is not installed, or the provider process does not work.
        ProviderUnreachableError: Nothing answers at the address.
    """
    cards = chosen(wanted, settings)
    async with AsyncExitStack() as stack:
        client = None
        if any(not _served_by(card.name) for card in cards.values()):
            client = await stack.enter_async_context(_asked_of(provider))
        yield await stack.enter_async_context(_models(cards, client))


class ModelAccess:
    """The models of all runs of a process that serves many: one connection, one circuit breaker."""

    def __init__(self, policy: Policy, provider: ModelClient | None, *, base_url: str = "") -> None:
        """Of what the settings say, and a connected client for all models but scripted ones.

        The client is the caller's to close, after the last run.

        Args:
            policy: The settings' say.
            provider: The client; None where only scripted models are served.
            base_url: Where it sends to; empty where nobody looks whether that answers.
        """
        self._policy = policy
        self._provider = provider
        self._base_url = base_url
        self._answered_at_s = -math.inf

    async def look_at_provider(self) -> None:
        """Whether the provider can be asked now, as far as that can be known without asking it anything.

        Its address is connected to, now and then while all is well. What calls met counts besides.

        Raises:
            ProviderUnreachableError: Nothing answers at its address.
            KeyMissingError: It does not accept the key that this process was started with.
            MachineError: It fails whoever asks.
        """
        if not self._base_url:
            return
        guarded = self._provider if isinstance(self._provider, GuardedClient) else None
        trouble = guarded.trouble if guarded is not None else None
        if trouble is not None or time.monotonic() >= self._answered_at_s + _CONNECT_EVERY_S:
            self._answered_at_s = -math.inf
            await check_address(self._base_url)
            self._answered_at_s = time.monotonic()
        if guarded is None:
            return
        guarded.reached()
        if guarded.trouble is None:
            return
        if guarded.is_key_refused:
            raise KeyMissingError(f"{guarded.trouble}: start the server again with one that it accepts")
        raise MachineError(f"the model provider does not work: {guarded.trouble}")

    @property
    def one_may_try(self) -> bool:
        """Whether one run, while the provider is in trouble, would find out if that is over."""
        return isinstance(self._provider, GuardedClient) and self._provider.may_be_over

    def chosen(self, wanted: Wanted) -> dict[str, ModelCard]:
        """See `chosen`; the price file was read once."""
        return choose(wanted, self._policy)

    @asynccontextmanager
    async def models(self, wanted: Wanted) -> AsyncIterator[dict[str, Model]]:
        """The models of one run tree, for the length of the block.

        Raises:
            ModelNotAllowedError: As `chosen`.
            InvalidRequestError: A script that does not load, a model of a provider and no provider.
        """
        async with _models(self.chosen(wanted), self._provider) as models:
            yield models


@asynccontextmanager
async def open_access(settings: Settings, provider: ProviderProcess | None) -> AsyncIterator[ModelAccess]:
    """Access to models for the length of the block. What a person got wrong is said now, before any run.

    Whether the provider answers is not: it may be down for a while, and `look_at_provider` tells.

    Args:
        settings: The process's settings.
        provider: The process to ask; None where only scripted models are served. It can be connected to once.

    Raises:
        InvalidRequestError: A price file that does not load, an address that is none.
        KeyMissingError: The provider needs a key and there is none.
        MachineError: The platform's own library is not installed, or the provider process does not work.
    """
    policy = await asyncio.to_thread(_policy, settings)
    if provider is None:
        yield ModelAccess(policy, None)
        return
    async with _connected(provider) as client:
        yield ModelAccess(policy, client, base_url=provider.base_url)


@asynccontextmanager
async def _models(
    cards: Mapping[str, ModelCard], provider: ModelClient | None
) -> AsyncIterator[dict[str, Model]]:
    """Scripted models have a client of each run's own; all others share the one that is handed in."""
    clients: dict[str, ModelClient] = {}
    async with AsyncExitStack() as stack:
        for served_by in {_served_by(card.name) for card in cards.values()}:
            if served_by:
                script = load_script(Path(served_by.removeprefix(SCRIPTED_PREFIX)))
                clients[served_by] = ScriptedClient(script)
                stack.push_async_callback(clients[served_by].aclose)
            elif provider is None:
                raise InvalidRequestError(_NO_PROVIDER)
            else:
                clients[served_by] = provider
        yield {name: Model(card, clients[_served_by(card.name)]) for name, card in cards.items()}


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


@asynccontextmanager
async def _asked_of(provider: ProviderProcess | None) -> AsyncIterator[ModelClient]:
    if provider is None:
        raise InvalidRequestError(_NO_PROVIDER)
    async with _connected(provider) as client:
        await check_address(provider.base_url)
        yield client


@asynccontextmanager
async def _connected(provider: ProviderProcess) -> AsyncIterator[GuardedClient]:
    connection = await connect(provider)
    try:
        yield GuardedClient(connection.client)
    finally:
        await run_shielded(connection.client.aclose())
