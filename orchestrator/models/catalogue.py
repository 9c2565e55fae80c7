"""Which models there are, what they hold and what they cost (`prices.toml`)."""

import re
from collections.abc import Mapping
from decimal import Decimal, InvalidOperation
from functools import cache
from importlib.resources import files

from orchestrator.errors import InvalidRequestError, ModelNotAllowedError
from orchestrator.models.price_file import MOST_USD_PER_MTOK, microusd, parse
from orchestrator.pricing import ModelCard, Tier, free_model

SCRIPTED_PREFIX = "scripted:"
"""`scripted:FILE` is a model played by a Python script; it costs nothing."""

_SNAPSHOT_DATE = re.compile(r"-20\d{6}\Z")

# What the Messages API charges unless a model's own table says otherwise.
_CACHE_WRITE_FACTOR = Decimal("1.25")
_CACHE_READ_FACTOR = Decimal("0.1")

_WINDOW_TOKENS = 200_000
_MAX_OUTPUT_TOKENS = 32_000


def lookup(name: str, priced_by_user: Mapping[str, ModelCard] | None = None) -> ModelCard:
    """The card of a model, a user's own price first.

    A dated snapshot (`claude-haiku-4-5-20251001`) has the card of its model.

    Raises:
        ModelNotAllowedError: Nothing says what the model costs.
    """
    if priced_by_user and name in priced_by_user:
        return priced_by_user[name]
    if name.startswith(SCRIPTED_PREFIX):
        return free_model(name, window_tokens=1_000_000, max_output_tokens=128_000)
    known = known_models()
    card = known.get(name) or known.get(_SNAPSHOT_DATE.sub("", name))
    if card is None:
        raise ModelNotAllowedError(
            f"no price is known for the model {name[:100]!r}: give one with --price-input and --price-output"
            " (US dollars for a million tokens; 0 is allowed, said explicitly) or in the file RLM_PRICES_FILE"
            f", or choose one of {', '.join(known)}"
        )
    return card


def priced_by_hand(
    name: str,
    *,
    input_usd: Decimal | str,
    output_usd: Decimal | str,
    window_tokens: int = _WINDOW_TOKENS,
    max_output_tokens: int = _MAX_OUTPUT_TOKENS,
) -> ModelCard:
    """A card from prices a user gave, in US dollars for a million tokens.

    Cache writes and reads are priced with the usual factors of the Messages API, 1.25 and 0.1. A small window
    bounds the output too.

    Raises:
        InvalidRequestError: A price that is no number, negative or absurd.
    """
    input_price, output_price = _price("input", input_usd), _price("output", output_usd)
    tier = Tier(
        up_to_input_tokens=window_tokens,
        input=microusd(input_price),
        output=microusd(output_price),
        cache_read=microusd(input_price * _CACHE_READ_FACTOR),
        cache_write=microusd(input_price * _CACHE_WRITE_FACTOR),
    )
    return ModelCard(
        name=name,
        window_tokens=window_tokens,
        max_output_tokens=min(max_output_tokens, window_tokens),
        tiers=(tier,),
    )


@cache
def known_models() -> Mapping[str, ModelCard]:
    """Every model of the price file, by name."""
    return parse(files(__package__).joinpath("prices.toml").read_text(encoding="utf-8")).cards


def _price(which: str, given: Decimal | str) -> Decimal:
    try:
        price = Decimal(given)
    except InvalidOperation:
        price = Decimal("NaN")
    if not price.is_finite() or not 0 <= price <= MOST_USD_PER_MTOK:
        raise InvalidRequestError(
            f"the {which} price {str(given)[:40]!r} is not an amount of US dollars for a million tokens"
        )
    return price
