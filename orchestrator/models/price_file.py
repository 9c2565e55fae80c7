"""The file that says what models cost and hold: ours (`prices.toml`) and a user's of the same shape.

Read strictly, because a misspelt key or a missing digit here is money: every mistake is refused with one
sentence that names the model and the field. Prices are decimal text from the file to the integer.
"""

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import ROUND_CEILING, Decimal
from pathlib import Path
from typing import Any

from orchestrator.errors import InvalidRequestError
from orchestrator.pricing import ModelCard, Tier

MOST_USD_PER_MTOK = 1_000_000
_MOST_TOKENS = 1_000_000_000
_MOST_CHARS = 256 * 1024
_MOST_LINE_CHARS = 1_000
"""The library takes minutes for a key of fifty thousand parts. No honest line has a fifth of this."""
_MICROUSD = 1_000_000
_PRICES = ("input", "output", "cache_read", "cache_write")
_ALIAS = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class PriceList:
    """What a price file says."""

    cards: Mapping[str, ModelCard] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    """From names of the user's own to names of models."""


def read(path: Path) -> PriceList:
    """A user's price file.

    Raises:
        InvalidRequestError: It cannot be read, or has a mistake.
    """
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidRequestError(f"the price file {path} cannot be read: {error.strerror}") from error
    # TOMLDecodeError is one, and so is what Python says of a number with more digits than it reads.
    except ValueError as error:
        raise InvalidRequestError(f"the price file {path} is no TOML: {error}") from error
    except InvalidRequestError as error:
        raise InvalidRequestError(f"the price file {path}: {error}") from error


def parse(text: str) -> PriceList:
    """The text of a price file.

    Raises:
        InvalidRequestError: It has a mistake.
        ValueError: It is no TOML.
    """
    if len(text) > _MOST_CHARS or any(len(line) > _MOST_LINE_CHARS for line in text.splitlines()):
        raise InvalidRequestError(
            f"it has more than {_MOST_CHARS:,} characters, or a line of more than {_MOST_LINE_CHARS:,}"
        )
    # Decimal, because 0.1 is not a binary fraction and money is not approximate.
    try:
        content = tomllib.loads(text, parse_float=Decimal)
    except RecursionError:
        raise InvalidRequestError("it nests too deep") from None
    _only(content, {"as_of", "source", "model", "aliases"}, "the file")
    entries = content.get("model", [])
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InvalidRequestError("models are written as tables headed [[model]]")
    cards: dict[str, ModelCard] = {}
    for entry in entries:
        card = _card(entry)
        if card.name in cards:
            raise InvalidRequestError(f"the model {card.name!r} is there twice")
        cards[card.name] = card
    return PriceList(cards, _aliases(content.get("aliases", {})))


def check_alias(name: str) -> None:
    """Raise unless the name can stand for a model.

    Raises:
        InvalidRequestError: It cannot.
    """
    if not _ALIAS.fullmatch(name):
        raise InvalidRequestError(
            f"{name[:100]!r} is no name for a model: letters, digits and . _ - are, 64 at most"
        )


def microusd(usd: Decimal | int) -> int:
    """Whole micro-dollars, rounded up."""
    return int((Decimal(usd) * _MICROUSD).to_integral_value(rounding=ROUND_CEILING))


def _aliases(table: object) -> Mapping[str, str]:
    if not isinstance(table, dict):
        raise InvalidRequestError("aliases are written in a table headed [aliases]")
    for name, model in table.items():
        check_alias(name)
        if not isinstance(model, str) or not model:
            raise InvalidRequestError(f"the alias {name!r} has to stand for the name of a model")
        if model in table:
            raise InvalidRequestError(f"the alias {name!r} stands for another alias; it needs a model")
    return table


def _card(entry: Mapping[str, Any]) -> ModelCard:
    name = entry.get("name")
    if not isinstance(name, str) or not name:
        raise InvalidRequestError("a [[model]] has no name")
    where = f"the model {name!r}"
    _only(entry, {"name", "window_tokens", "max_output_tokens", "tiers"}, where)
    window_tokens = _tokens(entry, "window_tokens", where)
    max_output_tokens = _tokens(entry, "max_output_tokens", where)
    if max_output_tokens > window_tokens:
        raise InvalidRequestError(f"{where}: max_output_tokens is larger than window_tokens")
    return ModelCard(
        name=name,
        window_tokens=window_tokens,
        max_output_tokens=max_output_tokens,
        tiers=_tiers(entry.get("tiers"), window_tokens, where),
    )


def _tiers(tables: object, window_tokens: int, where: str) -> tuple[Tier, ...]:
    if not isinstance(tables, list) or not tables or not all(isinstance(table, dict) for table in tables):
        raise InvalidRequestError(f"{where}: tiers has to be a list of one or more tables of prices")
    tiers: list[Tier] = []
    for number, table in enumerate(tables, start=1):
        here = f"{where}, tier {number}"
        _only(table, {"up_to_input_tokens", *_PRICES}, here)
        is_last = number == len(tables)
        if not is_last or "up_to_input_tokens" in table:
            edge = _tokens(table, "up_to_input_tokens", here)
        else:
            edge = window_tokens
        if tiers and edge <= tiers[-1].up_to_input_tokens:
            raise InvalidRequestError(f"{here}: up_to_input_tokens must rise from tier to tier")
        if is_last and edge < window_tokens:
            raise InvalidRequestError(
                f"{here}: the last tier must reach the window, {window_tokens:,} tokens"
            )
        prices = {kind: microusd(_usd(table, kind, here)) for kind in _PRICES}
        tiers.append(Tier(up_to_input_tokens=edge, **prices))
    return tuple(tiers)


def _tokens(table: Mapping[str, Any], key: str, where: str) -> int:
    value = table.get(key)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MOST_TOKENS:
        raise InvalidRequestError(f"{where}: {key} has to be a whole number of tokens above 0")
    return value


def _usd(table: Mapping[str, Any], key: str, where: str) -> Decimal:
    value = table.get(key)
    # Only a number of the file is one: True is an int, and text may look like one.
    usd = (
        Decimal(value) if isinstance(value, int | Decimal) and not isinstance(value, bool) else Decimal("NaN")
    )
    if not usd.is_finite() or not 0 <= usd <= MOST_USD_PER_MTOK:
        raise InvalidRequestError(f"{where}: {key} has to be an amount of US dollars for a million tokens")
    return usd


def _only(table: Mapping[str, Any], known: set[str], where: str) -> None:
    unknown = sorted(set(table) - known)
    if unknown:
        raise InvalidRequestError(
            f"{where} has no field {unknown[0]!r}; there are {', '.join(sorted(known))}"
        )
