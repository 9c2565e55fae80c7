"""Numbers of the command line: read exactly, and refused with one sentence when they make no sense."""

import math
from decimal import ROUND_CEILING, Decimal, InvalidOperation

import typer

from orchestrator.store.rule_changes import Limit

_NONE = "none"
_MOST = 1_000_000_000_000_000
_MICROUSD = 1_000_000
_MOST_USD = 1_000_000
_MOST_SECONDS = 30 * 86_400.0


def usd(text: str) -> Decimal:
    """US dollars, exactly. 0 is allowed."""
    try:
        value = Decimal(text)
    except InvalidOperation:
        value = Decimal("NaN")
    if not value.is_finite() or not 0 <= value <= _MOST_USD:
        raise typer.BadParameter(
            f"{text[:40]!r} is not an amount of US dollars from 0 to {_MOST_USD:,}, such as 0.50."
        )
    return value


def microusd(given: str | int) -> int:
    """US dollars as micro-dollars, rounded up. 0 is allowed: it admits models that cost nothing."""
    if isinstance(given, int):
        return given  # a default, which typer passes through here too
    return int((usd(given) * _MICROUSD).to_integral_value(rounding=ROUND_CEILING))


def seconds(text: str) -> float:
    """A length of time above zero."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= _MOST_SECONDS:
        raise typer.BadParameter(f"{text[:40]!r} is not a number of seconds above 0 and at most 30 days.")
    return value


def limit(text: str) -> Limit:
    """A whole number, or `none`."""
    if text == _NONE:
        return Limit(None)
    if not text.isascii() or not text.isdecimal() or int(text[:20]) > _MOST:
        raise typer.BadParameter(f"{text[:40]!r} is neither a whole number up to {_MOST:,} nor {_NONE}.")
    return Limit(int(text))


def limit_usd(text: str) -> Limit:
    """US dollars as micro-dollars, or `none`."""
    return Limit(None) if text == _NONE else Limit(microusd(text))
