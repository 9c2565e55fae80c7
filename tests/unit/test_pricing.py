import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.pricing import ModelCard, Tier, Usage, free_model

SMALL = Tier(
    up_to_input_tokens=100, input=1_000_000, output=5_000_000, cache_read=100_000, cache_write=1_250_000
)
LARGE = Tier(
    up_to_input_tokens=1_000, input=2_000_000, output=10_000_000, cache_read=200_000, cache_write=2_500_000
)
CARD = ModelCard(name="m", window_tokens=1_000, max_output_tokens=200, tiers=(SMALL, LARGE))


def test_a_call_is_billed_as_a_whole_at_the_tier_of_its_input() -> None:
    assert CARD.cost_microusd(Usage(input=100, output=10)) == 100 + 50
    assert CARD.cost_microusd(Usage(input=101, output=10)) == 202 + 100


def test_cached_tokens_count_for_the_tier() -> None:
    assert CARD.cost_microusd(Usage(input=1, cache_read=50, cache_write=50)) == 2 + 10 + 125


def test_output_does_not_count_for_the_tier() -> None:
    assert CARD.cost_microusd(Usage(input=100, output=200)) == 100 + 1_000


def test_more_input_than_the_window_is_billed_at_the_last_tier() -> None:
    assert CARD.cost_microusd(Usage(input=2_000)) == 4_000


def test_a_bill_is_rounded_up_once() -> None:
    tenth = Tier(up_to_input_tokens=9, input=100_000, output=100_000, cache_read=100_000, cache_write=100_000)
    assert tenth.cost_microusd(Usage()) == 0
    assert tenth.cost_microusd(Usage(input=1)) == 1
    assert tenth.cost_microusd(Usage(2, 2, 3, 3)) == 1
    assert tenth.cost_microusd(Usage(2, 3, 3, 3)) == 2


def test_a_bill_is_an_integer() -> None:
    assert type(CARD.cost_microusd(Usage(10**15, 1, 1, 1))) is int


def test_totals_count_every_token_once() -> None:
    usage = Usage(input=1, cache_read=10, cache_write=100, output=1_000)
    assert (usage.total, usage.total_input) == (1_111, 111)
    assert usage.plus(usage) == Usage(2, 20, 200, 2_000)


@pytest.mark.parametrize(("bound", "tiers"), [(0, 1), (100, 1), (101, 2), (10_000, 2)])
def test_the_tiers_a_request_can_reach_are_all_up_to_its_bound(bound: int, tiers: int) -> None:
    assert len(CARD.reachable_tiers(bound)) == tiers


def test_a_free_model_costs_nothing() -> None:
    card = free_model("local", window_tokens=8, max_output_tokens=8)
    assert card.cost_microusd(Usage(10**9, 10**9, 10**9, 10**9)) == 0


prices = st.integers(0, 10**8)
tiers = st.builds(
    Tier, up_to_input_tokens=st.just(0), input=prices, output=prices, cache_read=prices, cache_write=prices
)
counts = st.integers(0, 5_000)


@given(
    cheap=tiers,
    dear=tiers,
    edge=st.integers(1, 4_000),
    usage=st.builds(Usage, counts, counts, counts, counts),
    spare=st.integers(0, 1_000),
)
def test_no_bill_is_higher_than_the_dearest_prices_of_its_bounds(
    cheap: Tier, dear: Tier, edge: int, usage: Usage, spare: int
) -> None:
    """Whatever a provider prices how: this is what a hold relies on."""
    first = Tier(up_to_input_tokens=edge, **_prices(cheap))
    second = Tier(up_to_input_tokens=edge + 1_000, **_prices(dear))
    card = ModelCard(name="m", window_tokens=edge + 1_000, max_output_tokens=1, tiers=(first, second))
    bound = usage.total_input + spare
    held = -(-bound * card.dearest_input(bound) // 1_000_000)
    held += -(-usage.output * card.dearest_output(bound) // 1_000_000)
    assert card.cost_microusd(usage) <= held


def _prices(tier: Tier) -> dict[str, int]:
    return {
        "input": tier.input,
        "output": tier.output,
        "cache_read": tier.cache_read,
        "cache_write": tier.cache_write,
    }
