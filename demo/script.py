"""The model of the demo, played by a script: what it says was written in advance, what its cells do is real.

As a model would, it never sees the log: it looks at a few lines, has the pieces read by sub-calls that answer
with structured data, adds those up in Python, and has one piece counted again by a child run.
"""

import asyncio
import csv
import json
from collections import defaultdict
from collections.abc import Generator
from decimal import Decimal

from orchestrator.models.scripted import Cell, Step, Wait

THINKING_S = 0.15
"""A real model takes longer; with none of it one could not watch."""

# --- The root run's cells --------------------------------------------------------------------------------

PEEK = """\
lines = context.splitlines()
print(f"{type(context).__name__}, {len(context):,} characters, {len(lines):,} lines")
for number in (0, 1, 2, 3, len(lines) // 2, len(lines) - 1):
    print(f"{number:>7,}: {lines[number]}")
"""

CHUNK = '''\
header, rows = lines[0], lines[1:]
chunks = ["\\n".join([header, *rows[start:start + 5_000]]) for start in range(0, len(rows), 5_000)]

INSTRUCTIONS = """\\
Below is a part of a purchase log as CSV; products are quoted where they contain commas.
Only lines with the status "completed" count. Add up what each user spent in each year, in cents.
Answer with JSON only: {"lines": <lines below the header>, "spent": [[user, year, purchases, cents], ...]}
-----
"""
prompts = [INSTRUCTIONS + chunk for chunk in chunks]
print(f"{len(prompts)} prompts, the longest of {max(map(len, prompts)):,} characters")
'''

READ = """\
import json

answers = llm_query_batched(prompts, max_tokens=16_000)
parts = [json.loads(answer) for answer in answers]
counted = sum(part["lines"] for part in parts)
print(f"{len(parts)} parts with {counted:,} lines; complete: {counted == len(rows)}")
print(answers[0][:120], "...")
"""

ADD_UP = """\
from collections import defaultdict

bought = defaultdict(lambda: {2023: (0, 0), 2024: (0, 0)})
for part in parts:
    for user, year, purchases, cents in part["spent"]:
        if year in (2023, 2024):
            before = bought[user][year]
            bought[user][year] = (before[0] + purchases, before[1] + cents)

both = {user: years for user, years in sorted(bought.items()) if years[2023][0] and years[2024][0]}
print(f"{len(bought)} users bought in either year, {len(both)} in both")
print(list(both.items())[:2])
"""

CHECK = """\
place = 9
counted = rlm_query(
    "How many lines of this purchase log have the status completed, and to how many cents do their amounts "
    "add up? Answer with JSON only: [lines, cents]",
    chunks[place],
)
expected = [sum(row[2] for row in parts[place]["spent"]), sum(row[3] for row in parts[place]["spent"])]
print(f"child run: {counted}; sub-call: {expected}; they agree: {json.loads(counted) == expected}")
"""

ANSWER = """\
def average(purchases, cents):
    rounded = (2 * cents + purchases) // (2 * purchases)
    return f"{rounded // 100}.{rounded % 100:02}"

totals = {user: [a + b for a, b in zip(years[2023], years[2024])] for user, years in both.items()}
result = {
    "users": len(both),
    "average": average(*map(sum, zip(*totals.values()))),
    "average_by_user": {user: average(*total) for user, total in totals.items()},
}
FINAL_VAR("result")
"""

# --- The child run's cells -------------------------------------------------------------------------------

CHILD_COUNT = """\
import csv, io

lines = [line for line in csv.DictReader(io.StringIO(context)) if line["status"] == "completed"]
cents = sum(round(float(line["amount"]) * 100) for line in lines)
print(len(lines), cents)
"""

CHILD_ANSWER = "FINAL([len(lines), cents])"


def run(question: str, depth: int) -> Generator[Step, str, str]:
    """Play the model of a run."""
    if depth:
        yield from _slowly(Cell(CHILD_COUNT, "A part of a log: the csv module reads it."))
        yield from _slowly(Cell(CHILD_ANSWER))
        return "I could not count the lines."
    yield from _slowly(Cell(PEEK, "I look at the shape of the context first."))
    yield from _slowly(Cell(CHUNK, "CSV with quoted products. I cut it into pieces of 5,000 lines."))
    report = yield from _slowly(Cell(READ, "One sub-call a piece, all at once."))
    if "complete: True" not in report:
        return "The sub-calls did not read all lines, so there is no answer."
    yield from _slowly(Cell(ADD_UP, "All lines were read. Adding up is work for code."))
    report = yield from _slowly(Cell(CHECK, "I have one piece counted again, by a child run."))
    if "they agree: True" not in report:
        return "The child run counted something else, so there is no answer."
    yield from _slowly(Cell(ANSWER, "They agree."))
    return "The answer could not be put together."


def _slowly(cell: Cell) -> Generator[Step, str, str]:
    yield Wait(THINKING_S)
    return (yield cell)


async def complete(prompt: str) -> str:
    """Play the model of a sub-call: read the CSV in the prompt and answer with JSON."""
    await asyncio.sleep(THINKING_S)
    _, _, table = prompt.partition("\n-----\n")
    lines = list(csv.DictReader(table.splitlines()))
    spent: defaultdict[tuple[str, int], list[int]] = defaultdict(lambda: [0, 0])
    for line in lines:
        if line["status"] == "completed":
            total = spent[line["user"], int(line["date"][:4])]
            total[0] += 1
            total[1] += int(Decimal(line["amount"]) * 100)
    rows = [[user, year, *total] for (user, year), total in sorted(spent.items())]
    return json.dumps({"lines": len(lines), "spent": rows}, separators=(",", ":"))
