"""The right answer, computed without a model, a sandbox or any code of the orchestrator: csv and sqlite3."""

import csv
import sqlite3
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

# Integer division rounds down, so adding half of the divisor first rounds half up.
_AVERAGES = """
    SELECT user, (2 * SUM(cents) + COUNT(*)) / (2 * COUNT(*))
    FROM purchases
    WHERE status = 'completed' AND year IN (2023, 2024)
    GROUP BY user
    HAVING COUNT(DISTINCT year) = 2
    ORDER BY user
"""
_OVERALL = """
    SELECT (2 * SUM(cents) + COUNT(*)) / (2 * COUNT(*))
    FROM purchases
    WHERE status = 'completed' AND year IN (2023, 2024)
      AND user IN (SELECT user FROM purchases WHERE status = 'completed' AND year = 2023)
      AND user IN (SELECT user FROM purchases WHERE status = 'completed' AND year = 2024)
"""


def right_answer(log: Path) -> dict[str, Any]:
    """What `job.QUESTION` asks for, of the log at `log`."""
    with closing(sqlite3.connect(":memory:")) as database, log.open(encoding="utf-8", newline="") as file:
        database.execute("CREATE TABLE purchases (user TEXT, year INTEGER, cents INTEGER, status TEXT)")
        database.executemany(
            "INSERT INTO purchases VALUES (?, ?, ?, ?)",
            (
                (line["user"], int(line["date"][:4]), int(Decimal(line["amount"]) * 100), line["status"])
                for line in csv.DictReader(file)
            ),
        )
        averages = {user: _amount(cents) for user, cents in database.execute(_AVERAGES)}
        ((overall,),) = database.execute(_OVERALL)
    return {"users": len(averages), "average": _amount(overall), "average_by_user": averages}


def _amount(cents: int) -> str:
    return f"{Decimal(cents) / 100:.2f}"
