from dataclasses import replace
from decimal import Decimal
from pathlib import Path

import pytest

from orchestrator import access
from orchestrator.access import open_models, provider_url
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
from orchestrator.models.scripted import ScriptedClient

SONNET, HAIKU, OPUS = "claude-sonnet-5-5", "claude-haiku-5-5", "claude-opus-5-5"
SETTINGS = Settings(state_dir=Path("/nowhere"), api_key="key")


@pytest.fixture
def reachable(monkeypatch: pytest.MonkeyPatch) -> None:
    async def check(base_url: str) -> None:
        pass

    monkeypatch.setattr(access, "check_address", check)


def wanted(root: str = SONNET, sub: str = HAIKU, *allow: str, by_hand: HandPrice | None = None) -> Wanted:
    return Wanted(roles={"root": root, "sub": sub}, allow=allow, by_hand=by_hand)


@pytest.mark.usefixtures("reachable")
async def test_all_models_of_a_provider_are_behind_one_breaker() -> None:
    async with open_models(wanted(SONNET, HAIKU, OPUS), SETTINGS, base_url="") as models:
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
    async with open_models(choice, SETTINGS, base_url="http://127.0.0.1:1") as models:
        assert isinstance(models["root"].client, ScriptedClient)
        assert isinstance(models["sub"].client, GuardedClient)


@pytest.mark.usefixtures("reachable")
async def test_the_price_file_and_the_list_of_the_settings_count(tmp_path: Path) -> None:
    prices = tmp_path / "prices.toml"
    prices.write_text(f'[aliases]\nquick = "{HAIKU}"\n')
    settings = replace(SETTINGS, prices_file=prices, models_allowed=(SONNET, "quick"))
    async with open_models(wanted(SONNET, "quick"), settings, base_url="") as models:
        assert set(models) == {"root", "sub", SONNET, HAIKU, "quick"}
    with pytest.raises(ModelNotAllowedError, match=OPUS):
        async with open_models(wanted(OPUS, "quick"), settings, base_url=""):
            pass
    prices.write_text("models = 1")
    with pytest.raises(InvalidRequestError, match="no field 'models'"):
        async with open_models(wanted(), settings, base_url=""):
            pass


async def test_anthropics_own_address_needs_a_key_and_a_server_of_ones_own_an_answer() -> None:
    with pytest.raises(KeyMissingError):
        async with open_models(wanted(), replace(SETTINGS, api_key=""), base_url=""):
            pass
    with pytest.raises(ProviderUnreachableError, match=r"nothing answers at http://127\.0\.0\.1:1"):
        async with open_models(wanted(), replace(SETTINGS, api_key=""), base_url="http://127.0.0.1:1"):
            pass


@pytest.mark.usefixtures("reachable")
async def test_a_platform_without_its_key_is_refused_before_anything_is_sent() -> None:
    settings = replace(SETTINGS, platform=Foundry(resource="mine"))
    with pytest.raises(KeyMissingError):
        async with open_models(wanted(), settings, base_url=""):
            pass


def test_calls_go_to_the_platform_unless_told_otherwise() -> None:
    settings = replace(SETTINGS, platform=Foundry(resource="mine"))
    assert provider_url(SETTINGS) == "https://api.anthropic.com"
    assert provider_url(settings) == "https://mine.services.ai.azure.com/anthropic/"
    assert provider_url(settings, "http://127.0.0.1:1") == "http://127.0.0.1:1"
