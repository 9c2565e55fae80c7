"""The demo's context: a purchase log of 100,000 lines, the same every time it is made."""

import csv
import random
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from pathlib import Path

LINES = 100_000
COLUMNS = ("order", "date", "user", "product", "amount", "status")

_SEED = 20_251_123
_USERS = 400
_FIRST_DAY = date(2021, 1, 1)
_DAYS = (date(2025, 12, 31) - _FIRST_DAY).days + 1
_YEARS = range(2021, 2026)

_ACTIVE_SHARE = 0.45
"""How likely a user buys anything in a year; so about one in five buys in both of two given years."""
_UNLUCKY_SHARE = 0.05
"""How likely none of a user's orders in a year goes through: having ordered is not having bought."""

# Commas, quotes, years and a status inside of product names: a line can't be taken apart by eye.
_PRODUCTS = (
    "Desk lamp",
    "Desk, oak",
    "Chair, swivel, black",
    'Cable, 3" plug',
    "Calendar 2023, large print",
    "Calendar 2024, wall",
    "Diary, completed edition",
    "Café filter, paper",
    "Mug",
    'Monitor, 27"',
    "Notebook, A5, ruled",
    "Pens, blue, 12",
)
_STATUSES = ("completed",) * 8 + ("cancelled", "refunded")


@dataclass(frozen=True, slots=True)
class Purchase:
    """One line of the log."""

    order: str
    day: date
    user: str
    product: str
    cents: int
    status: str


def purchases() -> Iterator[Purchase]:
    """The log, in the order of its days."""
    chance = random.Random(_SEED)  # noqa: S311 - the same log every time is the point
    buyers = {year: _some_users(chance, _ACTIVE_SHARE) for year in _YEARS}
    unlucky = {year: set(_some_users(chance, _UNLUCKY_SHARE)) for year in _YEARS}
    for number in range(LINES):
        day = _FIRST_DAY + timedelta(days=number * _DAYS // LINES)
        user = chance.choice(buyers[day.year])
        status = "cancelled" if user in unlucky[day.year] else chance.choice(_STATUSES)
        yield Purchase(
            order=f"P{number + 1:06}",
            day=day,
            user=user,
            product=chance.choice(_PRODUCTS),
            cents=chance.randrange(100, 50_000),
            status=status,
        )


def write_log(path: Path) -> None:
    """Write the log as CSV with a header."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in purchases():
            amount = f"{one.cents // 100}.{one.cents % 100:02}"
            writer.writerow((one.order, one.day.isoformat(), one.user, one.product, amount, one.status))


def _some_users(chance: random.Random, share: float) -> list[str]:
    return [f"u{number:04}" for number in range(1, _USERS + 1) if chance.random() < share]
