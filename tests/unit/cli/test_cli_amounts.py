from decimal import Decimal

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli import amounts


@pytest.mark.parametrize(
    ("text", "microusd"),
    [("0.1", 100_000), ("5", 5_000_000), ("0.0000001", 1), ("1.0000001", 1_000_001), ("0", 0), ("1e-6", 1)],
)
def test_dollars_are_read_exactly_and_rounded_up(text: str, microusd: int) -> None:
    assert amounts.microusd(text) == microusd


@given(st.decimals(min_value=0, max_value=1_000_000, allow_nan=False, places=9))
def test_a_limit_is_never_less_than_asked_nor_a_micro_dollar_more(usd: Decimal) -> None:
    limit = amounts.microusd(str(usd))
    assert 0 <= limit - usd * 1_000_000 < 1


@pytest.mark.parametrize(
    "text", ["nan", "NaN", "inf", "-inf", "-0.01", "", "five", "1e999999999", "$1", "sNaN"]
)
def test_an_amount_that_makes_no_sense_is_refused(text: str) -> None:
    for read in (amounts.microusd, amounts.usd):
        with pytest.raises(typer.BadParameter, match="US dollars"):
            read(text)


def test_a_price_may_be_zero() -> None:
    assert amounts.usd("0") == 0


@pytest.mark.parametrize("text", ["0", "-1", "nan", "inf", "1e9", "soon", ""])
def test_a_time_that_makes_no_sense_is_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="seconds"):
        amounts.seconds(text)


def test_a_default_passes_through_unchanged() -> None:
    assert amounts.microusd(5_000_000) == 5_000_000
    assert amounts.seconds("0.5") == 0.5
