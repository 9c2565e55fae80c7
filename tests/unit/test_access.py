from collections.abc import AsyncIterator
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest
import pytest_asyncio

from orchestrator import access
from orchestrator.access import open_models
from orchestrator.config import Settings
from orchestrator.errors import (
    InvalidRequestError,
    KeyMissingError,
    ModelNotAllowedError,
    ProviderUnreachableError,
)
from orchestrator.models.breaker import GuardedClient
from orchestrator.models.choice import HandPrice, Wanted
from orchestrator.models.platforms import Foundry
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.scripted import ScriptedClient
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
