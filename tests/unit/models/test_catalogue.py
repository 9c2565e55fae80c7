import subprocess
import sys
from decimal import Decimal

import pytest

from orchestrator.errors import InvalidRequestError, ModelNotAllowedError
from orchestrator.models import catalogue
from orchestrator.pricing import Usage

_MTOK = 1_000_000


def test_every_known_model_has_rising_tiers_that_cover_its_window() -> None:
    for card in catalogue.known_models().values():
        edges = [tier.up_to_input_tokens for tier in card.tiers]
        assert edges == sorted(set(edges)), card.name
        assert edges[-1] == card.window_tokens
        assert 0 < card.max_output_tokens < card.window_tokens


def test_a_cache_read_is_the_cheapest_and_output_the_dearest_token_of_every_tier() -> None:
    for card in catalogue.known_models().values():
        for tier in card.tiers:
            assert 0 < tier.cache_read < tier.input < tier.cache_write < tier.output


def test_prices_are_exact_micro_dollars() -> None:
    opus = catalogue.lookup("claude-opus-5-5")
    assert opus.cost_microusd(Usage(input=_MTOK)) == 4_000_000
    assert opus.cost_microusd(Usage(output=_MTOK)) == 20_000_000
    haiku = catalogue.lookup("claude-haiku-5-5")
    assert haiku.tiers[0].cache_write == 125_000


def test_a_long_haiku_prompt_is_billed_whole_at_the_higher_tier() -> None:
    haiku = catalogue.lookup("claude-haiku-5-5")
    assert haiku.cost_microusd(Usage(input=100_000, output=1_000)) == 10_000 + 500
    assert haiku.cost_microusd(Usage(input=90_000, cache_read=10_001, output=1_000)) == -(
        -(90_000 * 500_000 + 10_001 * 50_000 + 1_000 * 2_500_000) // _MTOK
    )


def test_a_dated_snapshot_has_the_card_of_its_model() -> None:
    assert catalogue.lookup("claude-haiku-4-5-20251001").tiers == catalogue.lookup("claude-haiku-4-5").tiers


def test_an_unknown_model_is_refused_with_the_way_to_price_it() -> None:
    with pytest.raises(
        ModelNotAllowedError, match=r"'gemma'.*--price-input and --price-output.*0 is allowed"
    ):
        catalogue.lookup("gemma")


def test_a_scripted_model_is_free() -> None:
    card = catalogue.lookup("scripted:demo.py")
    assert card.cost_microusd(Usage(1_000, 1_000, 1_000, 1_000)) == 0


def test_a_users_own_price_comes_before_the_table() -> None:
    mine = catalogue.priced_by_hand("claude-opus-5-5", input_usd=Decimal("0.5"), output_usd="1")
    card = catalogue.lookup("claude-opus-5-5", {"claude-opus-5-5": mine})
    assert card.cost_microusd(Usage(input=_MTOK, output=_MTOK)) == 1_500_000
    assert card.cost_microusd(Usage(cache_write=_MTOK)) == 625_000
    assert card.cost_microusd(Usage(cache_read=_MTOK)) == 50_000


def test_a_price_of_zero_said_explicitly_is_free() -> None:
    local = catalogue.priced_by_hand("gemma", input_usd="0", output_usd="0")
    assert local.cost_microusd(Usage(_MTOK, _MTOK, _MTOK, _MTOK)) == 0


@pytest.mark.parametrize("price", ["-1", "NaN", "Infinity", "cheap", "", "1e9"])
def test_a_price_that_is_no_amount_is_refused(price: str) -> None:
    with pytest.raises(InvalidRequestError, match="price"):
        catalogue.priced_by_hand("gemma", input_usd=price, output_usd="1")


def test_the_catalogue_and_the_scripted_model_do_not_import_the_sdk() -> None:
    program = (
        "import sys, orchestrator.models.catalogue, orchestrator.models.scripted\n"
        "sys.exit('anthropic' in sys.modules or 'aiohttp' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
