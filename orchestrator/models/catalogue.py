"""Which models there are, what they hold and what they cost (`prices.toml`)."""

import re
import tomllib
from collections.abc import Mapping
from decimal import ROUND_CEILING, Decimal, InvalidOperation
from functools import cache
from importlib.resources import files
from typing import Any

from orchestrator.errors import InvalidRequestError, ModelNotAllowedError
from orchestrator.pricing import ModelCard, Tier, free_model

SCRIPTED_PREFIX = "scripted:"
"""`scripted:FILE` is a model played by a Python script; it costs nothing."""

_MICROUSD = 1_000_000
_MOST_USD_PER_MTOK = 1_000_000
_SNAPSHOT_DATE = re.compile(r"-20\d{6}\Z")

# What the Messages API charges unless a model's own table says otherwise.
_CACHE_WRITE_FACTOR = Decimal("1.25")
_CACHE_READ_FACTOR = Decimal("0.1")


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
            " (US dollars for a million tokens; 0 is allowed, said explicitly),"
            f" or choose one of {', '.join(known)}"
        )
    return card


def priced_by_hand(
    name: str,
    *,
    input_usd: Decimal | str,
    output_usd: Decimal | str,
    window_tokens: int = 200_000,
    max_output_tokens: int = 32_000,
) -> ModelCard:
    """A card from prices a user gave, in US dollars for a million tokens.

    Cache writes and reads are priced with the usual factors of the Messages API, 1.25 and 0.1.

    Raises:
        InvalidRequestError: A price that is no number, negative or absurd.
    """
    input_price, output_price = _price("input", input_usd), _price("output", output_usd)
    tier = Tier(
        up_to_input_tokens=window_tokens,
        input=_microusd(input_price),
        output=_microusd(output_price),
        cache_read=_microusd(input_price * _CACHE_READ_FACTOR),
        cache_write=_microusd(input_price * _CACHE_WRITE_FACTOR),
    )
    return ModelCard(
        name=name, window_tokens=window_tokens, max_output_tokens=max_output_tokens, tiers=(tier,)
    )


@cache
def known_models() -> Mapping[str, ModelCard]:
    """Every model of the price file, by name."""
    # Decimal, because 0.1 is not a binary fraction and money is not approximate.
    text = files(__package__).joinpath("prices.toml").read_text(encoding="utf-8")
    return {card.name: card for card in map(_card, tomllib.loads(text, parse_float=Decimal)["model"])}


def _card(entry: Mapping[str, Any]) -> ModelCard:
    window_tokens = int(entry["window_tokens"])
    tiers = tuple(
        Tier(
            up_to_input_tokens=tier.get("up_to_input_tokens", window_tokens),
            **{kind: _microusd(tier[kind]) for kind in ("input", "output", "cache_read", "cache_write")},
        )
        for tier in entry["tiers"]
    )
    return ModelCard(
        name=entry["name"],
        window_tokens=window_tokens,
        max_output_tokens=int(entry["max_output_tokens"]),
        tiers=tiers,
    )


def _price(which: str, given: Decimal | str) -> Decimal:
    try:
        price = Decimal(given)
    except InvalidOperation:
        price = Decimal("NaN")
    if not price.is_finite() or not 0 <= price <= _MOST_USD_PER_MTOK:
        raise InvalidRequestError(
            f"the {which} price {str(given)[:40]!r} is not an amount of US dollars for a million tokens"
        )
    return price


def _microusd(usd: Decimal) -> int:
    return int((usd * _MICROUSD).to_integral_value(rounding=ROUND_CEILING))
