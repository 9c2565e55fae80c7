from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator import access
from orchestrator.access import ModelAccess, open_models
from orchestrator.config import Settings
from orchestrator.conversation import Reply, StopReason
from orchestrator.errors import (
    Billing,
    InvalidRequestError,
    KeyMissingError,
    MachineError,
    ModelError,
    ModelNotAllowedError,
    ProviderUnreachableError,
)
from orchestrator.models.breaker import FAILURES_TO_OPEN, GuardedClient
from orchestrator.models.choice import HandPrice, Policy, Wanted
from orchestrator.models.platforms import Foundry
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.scripted import ScriptedClient
from orchestrator.pricing import Usage
from tests.fakes.provider import provider_at, served_here

SONNET, HAIKU, OPUS = "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-5-5"
SETTINGS = Settings(state_dir=Path("/nowhere"))
NOWHERE = "http://127.0.0.1:1"


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(base_url: str) -> None:
        pass

    monkeypatch.setattr(access, "check_address", check)


def wanted(root: str = SONNET, sub: str = HAIKU, *allow: str, by_hand: HandPrice | None = None) -> Wanted:
    return Wanted(roles={"root": root, "sub": sub}, allow=allow, by_hand=by_hand)


@pytest_asyncio.fixture
async def provider() -> AsyncIterator[ProviderProcess]:
    """Of Anthropic, with a key; nothing is ever sent."""
    async with served_here("") as process:
        yield process


@pytest.mark.usefixtures("reachable")
async def test_all_models_of_a_provider_are_behind_one_breaker(provider: ProviderProcess) -> None:
    async with open_models(wanted(SONNET, HAIKU, OPUS), SETTINGS, provider) as models:
        assert set(models) == {"root", "sub", SONNET, HAIKU, OPUS}
        clients = {id(model.client) for model in models.values()}
        assert len(clients) == 1
        assert isinstance(models["root"].client, GuardedClient)


@pytest.mark.usefixtures("reachable")
async def test_a_scripted_root_can_have_sub_calls_elsewhere(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("def run(question, depth):\n    yield ''\n    return ''\n")
    free = HandPrice(input_usd=Decimal(0), output_usd=Decimal(0))
    choice = wanted(f"scripted:{script}", "local", by_hand=free)
    async with served_here(NOWHERE) as provider, open_models(choice, SETTINGS, provider) as models:
        assert isinstance(models["root"].client, ScriptedClient)
        assert isinstance(models["sub"].client, GuardedClient)


@pytest.mark.usefixtures("reachable")
async def test_the_price_file_and_the_list_of_the_settings_count(
    provider: ProviderProcess, tmp_path: Path
) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(f'[aliases]\nquick = "{HAIKU}"\n')
    settings = replace(SETTINGS, prices_file=prices, models_allowed=(SONNET, "quick"))
    async with open_models(wanted(SONNET, "quick"), settings, provider) as models:
        assert set(models) == {"root", "sub", SONNET, HAIKU, "quick"}
    with pytest.raises(ModelNotAllowedError, match=OPUS):
        async with open_models(wanted(OPUS, "quick"), settings):
            pass
    prices.write_text("models = 1")
    with pytest.raises(InvalidRequestError, match="no field 'models'"):
        async with open_models(wanted(), settings):
            pass


async def test_anthropics_own_address_needs_a_key_and_a_server_of_ones_own_an_answer() -> None:
    with pytest.raises(KeyMissingError, match="set ANTHROPIC_API_KEY"), provider_at("", key="") as provider:
        async with open_models(wanted(), SETTINGS, provider):
            pass
    async with served_here(NOWHERE) as provider:
        with pytest.raises(ProviderUnreachableError, match=r"nothing answers at http://127\.0\.0\.1:1"):
            async with open_models(wanted(), SETTINGS, provider):
                pass


async def test_a_platform_without_its_key_is_refused_before_anything_is_sent() -> None:
    foundry = Foundry(resource="mine")
    with (
        pytest.raises(KeyMissingError, match="set ANTHROPIC_FOUNDRY_API_KEY"),
        provider_at("", key="", platform=foundry) as provider,
    ):
        async with open_models(wanted(), SETTINGS, provider):
            pass


async def test_a_model_of_a_provider_and_no_process_to_ask_it_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="needs a provider process"):
        async with open_models(wanted(), SETTINGS):
            pass


def test_calls_go_to_the_platform_unless_told_otherwise() -> None:
    foundry = Foundry(resource="mine")
    for url, platform, expected in (
        ("", None, "https://api.anthropic.com"),
        ("", foundry, "https://mine.services.ai.azure.com/anthropic/"),
        (NOWHERE, foundry, NOWHERE),
    ):
        with provider_at(url, platform=platform) as provider:
            assert provider.base_url == expected


# --- Whether the provider can be asked -------------------------------------------------------------------


class FakeProvider:
    """Answers, or fails."""

    failure: ModelError | None = None

    async def complete(self, request: ModelRequest) -> Completion:
        if self.failure is not None:
            raise self.failure
        return Completion(Reply((), StopReason.END_TURN), Usage())

    async def aclose(self) -> None:
        pass


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often it was connected to, and whether anybody accepts."""
    seen = {"connected": 0, "away": 0}

    async def check(base_url: str) -> None:
        seen["connected"] += 1
        if seen["away"]:
            raise ProviderUnreachableError(f"nothing answers at {base_url}")

    monkeypatch.setattr(access, "check_address", check)
    return seen


async def failing(client: GuardedClient, times: int) -> None:
    request = ModelRequest(
        model="m", system="", conversation=(), python_tool=False, max_tokens=1, timeout_s=1.0
    )
    for _ in range(times):
        with pytest.raises(ModelError):
            await client.complete(request)


async def test_a_provider_is_connected_to_seldom_while_all_is_well(address: dict[str, int]) -> None:
    models = ModelAccess(Policy(), GuardedClient(FakeProvider()), base_url="http://p.example")
    for _ in range(3):
        await models.look_at_provider()
    assert address["connected"] == 1
    assert not models.one_may_try


async def test_a_provider_whose_address_answers_nobody_is_looked_at_until_it_does(
    address: dict[str, int],
) -> None:
    models = ModelAccess(Policy(), GuardedClient(FakeProvider()), base_url="http://p.example")
    address["away"] = 1
    for _ in range(3):
        with pytest.raises(ProviderUnreachableError):
            await models.look_at_provider()
    address["away"] = 0
    await models.look_at_provider()
    assert address["connected"] == 4


async def test_a_key_that_is_refused_and_a_provider_that_fails_are_told_apart(
    address: dict[str, int],
) -> None:
    provider = FakeProvider()
    guarded = GuardedClient(provider)
    models = ModelAccess(Policy(), guarded, base_url="http://p.example")
    provider.failure = ModelError("not that key", billing=Billing.NOTHING, retryable=False, status=401)
    await failing(guarded, 1)
    with pytest.raises(KeyMissingError, match="start the server again"):
        await models.look_at_provider()
    provider.failure = ModelError("broke", billing=Billing.UNKNOWN, retryable=True, status=500)
    await failing(guarded, FAILURES_TO_OPEN)
    with pytest.raises(MachineError, match="does not work: broke"):
        await models.look_at_provider()
    provider.failure = None


async def test_a_server_of_scripted_models_alone_has_no_provider_to_look_at(address: dict[str, int]) -> None:
    await ModelAccess(Policy(), None).look_at_provider()
    assert not address["connected"]
