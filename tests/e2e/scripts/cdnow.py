"""Plays a model that is asked about the CDNOW purchases: sub-calls read pieces, code adds up."""

import json
from collections.abc import Generator

PEEK = """\
lines = context.splitlines()
print(len(lines), "lines")
print(*lines[:3], lines[-1], sep="\\n")
"""

READ = '''\
import json

rows = lines[1:]
INSTRUCTIONS = """\\
Each line below is a purchase: customer, date as yyyymmdd, number of CDs, dollars.
Answer with JSON only: {"lines": <how many>, "spent": [[customer, year, purchases, cents], ...]}
-----
"""
pieces = [INSTRUCTIONS + "\\n".join(rows[start:start + 5_000]) for start in range(0, len(rows), 5_000)]
parts = [json.loads(answer) for answer in llm_query_batched(pieces, max_tokens=60_000)]
print(len(parts), "parts, all lines read:", sum(part["lines"] for part in parts) == len(rows))
'''

ANSWER = """\
totals = {}
for part in parts:
    for customer, year, purchases, cents in part["spent"]:
        years = totals.setdefault(customer, {1997: [0, 0], 1998: [0, 0]})
        years[year] = [years[year][0] + purchases, years[year][1] + cents]

result = {}
for customer in sorted(totals):
    (before, spent_before), (after, spent_after) = totals[customer].values()
    if before and after:
        purchases, cents = before + after, spent_before + spent_after
        result[customer] = (2 * cents + purchases) // (2 * purchases)
FINAL_VAR("result")
"""


def run(question: str, depth: int) -> Generator[str, str, str]:
    """Play the model of the run."""
    yield PEEK
    report = yield READ
    if "all lines read: True" not in report:
        return "Some lines were not read."
    yield ANSWER
    return "There is no result."


def complete(prompt: str) -> str:
    """Play the model of a sub-call."""
    lines = prompt.partition("\n-----\n")[2].splitlines()
    spent: dict[tuple[str, int], tuple[int, int]] = {}
    for line in lines:
        customer, day, _, dollars = line.split()
        purchases, cents = spent.get((customer, int(day[:4])), (0, 0))
        spent[customer, int(day[:4])] = (purchases + 1, cents + int(dollars.replace(".", "")))
    rows = [[customer, year, *total] for (customer, year), total in spent.items()]
    return json.dumps({"lines": len(lines), "spent": rows}, separators=(",", ":"))
