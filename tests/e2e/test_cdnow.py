"""69,659 real purchases of a record shop's customers, 1997 and 1998."""

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.limits import RunLimits
from tests.e2e.playing import Player
from tests.e2e.public_data import unpacked

pytestmark = [pytest.mark.realdata, pytest.mark.timeout(180)]

SCRIPT = Path(__file__).parent / "scripts" / "cdnow.py"
ROWS = 69_659

QUESTION = """\
Which customers bought something in 1997 and also in 1998, and what do they spend on average?
Every line is a purchase. The average is the mean of the dollars of all purchases of both years, in whole \
cents, half a cent upwards. Answer with a JSON object from customer, as written, to cents."""

# Integer division rounds down, so adding half of the divisor first rounds half up.
AVERAGES = """
    SELECT customer, (2 * SUM(cents) + COUNT(*)) / (2 * COUNT(*))
    FROM purchases
    WHERE year IN (1997, 1998)
    GROUP BY customer
    HAVING COUNT(DISTINCT year) = 2
    ORDER BY customer
"""


def averages(path: Path) -> dict[str, int]:
    rows = [line.split() for line in path.read_text("ascii").splitlines()[1:]]
    assert len(rows) == ROWS
    with closing(sqlite3.connect(":memory:")) as database:
        database.execute("CREATE TABLE purchases (customer TEXT, year INTEGER, cents INTEGER)")
        database.executemany(
            "INSERT INTO purchases VALUES (?, ?, ?)",
            ((customer, int(day) // 10_000, round(float(paid) * 100)) for customer, day, _, paid in rows),
        )
        return dict(database.execute(AVERAGES))


async def test_buyers_of_both_years_and_their_averages_are_found_in_real_purchases(player: Player) -> None:
    purchases = unpacked("lifetimes==0.11.3") / "lifetimes" / "datasets" / "CDNOW_master.txt"

    played = await player.run(SCRIPT, purchases, question=QUESTION)

    right = averages(purchases)
    assert len(right) > 5_000
    assert played.report.answer is not None, played.report.error
    assert json.loads(played.report.answer) == right
    assert played.report.tally.sub_calls_done == -(-ROWS // 5_000)
    assert played.report.tally.root_request_bytes < played.report.context_bytes / 50


async def test_a_budget_too_small_for_the_job_ends_it_without_a_wrong_answer(player: Player) -> None:
    purchases = unpacked("lifetimes==0.11.3") / "lifetimes" / "datasets" / "CDNOW_master.txt"

    played = await player.run(SCRIPT, purchases, question=QUESTION, limits=RunLimits(max_tokens=300_000))

    assert played.report.answer == "Some lines were not read."
    assert "BudgetExceeded: the budget of the run tree is too low" in played.told[1].splitlines()[-1]
    used = played.report.tally.confirmed.plus(played.report.tally.unconfirmed)
    assert used.tokens <= 300_000
