"""What the size of a context costs a cell: `python -m bench.big_context [--megabytes N] [--runtime R]`.

`first_cell`: from the lease message to the result of a cell that reads 100 characters in the middle of a text
staged before: 1 kB, and a gigabyte of each of four kinds (`bench.texts`). Each time in a new sandbox; they
take turns. Likewise for a mapping of one file and one of 100,000.

`regular_expressions`: a pattern over the gigabyte in a cell, `context.finditer(pattern)`, against
`re.finditer` over an `mmap` of the same file in the same cell; both only count, and take turns. On text
beyond ASCII the plain one works on bytes, so it may find something else (`same` says whether the counts
agree), and it has no positions in characters. `memory_mib` is what the interpreter's anonymous memory grew by
at most meanwhile.

`deriving`: putting a child run's context together from a part of its parent's, on the host.
"""

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.measuring import at_most, keep, spread_ms
from bench.texts import ALPHABETS, write_text
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.contexts.store import StagedContext
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import Machine, Workplace, open_machine, open_workplace
from orchestrator.sandbox.lease import LeasedSandbox

_LEASES = 10
_ROUNDS = 3
_MANY_FILES = 100_000
_CELL_S = 1_200.0
_DENSE_CHARACTERS = 150_000_000
"""Fewer would fit a `str`."""

FIRST_CELL = """
def _anonymous_kib():
    return int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0])
_before = _anonymous_kib()
middle = len(context) // 2
piece = context[middle:middle + 100]
print(len(piece), _anonymous_kib() - _before)
"""
FILE_CELL = "print(len(context), len(context['00500.txt' if len(context) > 1 else '00000.txt']))"

REGEX_CELL = """
import json, mmap, re, time

def _anonymous_kib():
    return int(open("/proc/self/status").read().partition("RssAnon:")[2].split()[0])

def _timed(matches):
    began, count = time.perf_counter(), 0
    for _match in matches:
        count += 1
    return time.perf_counter() - began, count

def _grown_kib(matches):
    before, most = _anonymous_kib(), 0
    for number, _match in enumerate(matches):
        if number %% 10_000 == 0:
            most = max(most, _anonymous_kib() - before)
    return max(most, _anonymous_kib() - before)

file = open("/context/blob", "rb")
mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
pattern, rounds, characters = %r, %d, %r
text = context[:characters]
data = mapped if characters is None else memoryview(mapped)[:text.stretch.length_bytes]
plain, ours = [], []
for _ in range(rounds):
    plain.append(_timed(re.finditer(pattern.encode(), data)))
    ours.append(_timed(text.finditer(pattern)))
with_positions, _ = _timed(match.start() for match in text.finditer(pattern))
grown_kib = _grown_kib(text.finditer(pattern))
print(json.dumps({
    "plain_s": min(plain)[0], "ours_s": min(ours)[0], "with_start_s": with_positions,
    "matches": ours[0][1], "same": plain[0][1] == ours[0][1], "memory_mib": grown_kib / 1024,
}))
"""


@dataclass(frozen=True)
class Pattern:
    """A regular expression, and what it stands for."""

    what: str
    text: str
    is_dense: bool = False
    """Matches are so close together that making them is most of the work. A part of the text is enough."""


ANY_TEXT = (
    Pattern("a heading, once a megabyte", "Chapter [0-9]{6}"),
    Pattern("a number at the end of each line", ", [0-9]+", is_dense=True),
    Pattern("a number, as Unicode knows them", r"Chapter \d+"),
    Pattern("whole lines that begin with a word", r"(?m)^Chapter .*$"),
)
WORDS = Pattern("every word", r"\w+", is_dense=True)
OF_THE_KIND = {
    "ascii": Pattern("a word in ten thousand", "qu[aeiou]x[a-z]*"),
    "sparse": Pattern("words with a letter beyond ASCII", "naïve[a-z]*"),
    "cyrillic": Pattern("a word in thousands", "шум[а-я]*"),
    "han": Pattern("two characters in sequence", "一[丁七]"),
}


PATTERNS: dict[str, tuple[Pattern, ...]] = {
    kind: (*ANY_TEXT, pattern) for kind, pattern in OF_THE_KIND.items()
}
PATTERNS["ascii"] += (WORDS,)


class Bench:
    """A machine to lease sandboxes from."""

    def __init__(self, workplace: Workplace, machine: Machine, runtime: str) -> None:
        self.contexts = workplace.contexts
        self._machine = machine
        self._runtime = runtime

    @asynccontextmanager
    async def sandbox(self, context: StagedContext) -> AsyncIterator[tuple[LeasedSandbox, float]]:
        """A new sandbox with a context, and when its lease began."""
        began_s = 0.0

        def put(directory: Path) -> None:
            nonlocal began_s
            began_s = time.perf_counter()
            self.contexts.link_into(context, directory)

        async with self._machine.leases.open(
            put, runtime=self._runtime, guest_services=(), max_concurrent_calls=1
        ) as sandbox:
            yield sandbox, began_s

    async def first_cell(self, context: StagedContext, code: str) -> tuple[float, str]:
        """Seconds from the lease to the first cell's result, and what it printed."""
        async with self.sandbox(context) as (sandbox, began_s):
            printed = await run(sandbox, code)
            return time.perf_counter() - began_s, printed


async def run(sandbox: LeasedSandbox, code: str) -> str:
    """What a cell printed."""
    clock = CellClock(
        started_s=time.monotonic(), cell_timeout_s=_CELL_S, cell_cpu_s=_CELL_S, cell_ceiling_s=_CELL_S
    )
    result = await sandbox.run_cell(code, clock)
    assert result.outcome is CellOutcome.OK, result
    return result.output


async def first_cells(
    bench: Bench, contexts: dict[str, StagedContext], code: str
) -> dict[str, dict[str, Any]]:
    """Milliseconds for each context, and the most that the interpreter's memory grew by, if the cell says."""
    took_s: dict[str, list[float]] = {name: [] for name in contexts}
    said: dict[str, int] = {}
    for number in range(1 + _LEASES):
        for name, context in contexts.items():
            one_s, printed = await bench.first_cell(context, code)
            if number:
                took_s[name].append(one_s)
            said[name] = max(said.get(name, 0), int(printed.split()[1]))
    return {name: {**spread_ms(took_s[name]), "second_figure": said[name]} for name in contexts}


async def regular_expressions(
    bench: Bench, context: StagedContext, patterns: Sequence[Pattern]
) -> list[dict[str, Any]]:
    """One row for each pattern."""
    rows: list[dict[str, Any]] = []
    async with bench.sandbox(context) as (sandbox, _):
        for pattern in patterns:
            part = _DENSE_CHARACTERS if pattern.is_dense else None
            rounds = 1 if pattern.is_dense else _ROUNDS  # a dense one takes many seconds
            told = json.loads(await run(sandbox, REGEX_CELL % (pattern.text, rounds, part)))
            ratio = told["ours_s"] / told["plain_s"]
            rows.append({"what": pattern.what, "pattern": pattern.text, "ratio": round(ratio, 2), **told})
            rows[-1]["is_dense"] = pattern.is_dense
            print(rows[-1], flush=True)
    return rows


def deriving_ms(bench: Bench, text: StagedContext, files: StagedContext) -> dict[str, float]:
    """Milliseconds on the host for parts of a text and of a mapping, the median of some."""
    length_bytes = text.manifest.text_bytes
    # Every character of `sparse` that is no ASCII is far from these two.
    ways: dict[str, Callable[[], StagedContext]] = {
        "1 kB of the text": lambda: bench.contexts.derive_range(text, "", 0, 1_000),
        "half of the text": lambda: bench.contexts.derive_range(text, "", 10, 10 + length_bytes // 2),
        "the whole text": lambda: bench.contexts.derive_range(text, "", 0, length_bytes),
        "100 files": lambda: bench.contexts.derive_files(files, [(1_000, 100)]),
        "half of the files": lambda: bench.contexts.derive_files(files, [(0, _MANY_FILES // 2)]),
        "all files": lambda: bench.contexts.derive_files(files, [(0, _MANY_FILES)]),
    }
    took: dict[str, float] = {}
    for name, derive in ways.items():
        spans_s: list[float] = []
        for _ in range(10):
            began_s = time.perf_counter()
            derived = derive()
            spans_s.append(time.perf_counter() - began_s)
            bench.contexts.release(derived)
        took[name] = round(statistics.median(spans_s) * 1_000, 3)
    return took


def _stage_text(bench: Bench, place: Path, kind: str, length_bytes: int) -> StagedContext:
    file = place / kind
    write_text(file, kind, length_bytes)
    staged = bench.contexts.stage_paths(LOCAL_TENANT, [file])
    file.unlink()
    return staged


def _stage_files(bench: Bench, count: int) -> StagedContext:
    with bench.contexts.upload(LOCAL_TENANT) as upload:
        for number in range(count):
            upload.start_file(b"%05d.txt" % number)
            upload.write(b"a text of some words, number %d\n" % number)
        return upload.finish()


async def measure(megabytes: int, runtime: str) -> dict[str, Any]:
    """Everything."""
    with tempfile.TemporaryDirectory(prefix="rlm") as state:
        settings = Settings(state_dir=Path(state) / "s")
        async with (
            open_workplace(settings) as workplace,
            open_machine(settings, workplace, runtime=runtime) as machine,
        ):
            bench = Bench(workplace, machine, runtime)
            small = _stage_text(bench, Path(state), "ascii", 1_000)
            texts = {
                kind: await asyncio.to_thread(_stage_text, bench, Path(state), kind, megabytes * 1_000_000)
                for kind in ALPHABETS
            }
            one, many = _stage_files(bench, 1), await asyncio.to_thread(_stage_files, bench, _MANY_FILES)
            first = await first_cells(bench, {"1 kB": small, **texts}, FIRST_CELL)
            files = await first_cells(bench, {"1 file": one, f"{_MANY_FILES:,} files": many}, FILE_CELL)
            deriving = deriving_ms(bench, texts["sparse"], many)
            searched = {
                kind: await regular_expressions(bench, text, PATTERNS[kind]) for kind, text in texts.items()
            }
    return {
        "aims": _aims(megabytes, first, files, searched),
        "megabytes": megabytes,
        "runtime": runtime,
        "first_cell_ms": first,
        "first_cell_of_files_ms": files,
        "deriving_ms": deriving,
        "regular_expressions": searched,
    }


def _aims(
    megabytes: int,
    first: dict[str, dict[str, Any]],
    files: dict[str, dict[str, Any]],
    searched: dict[str, list[dict[str, Any]]],
) -> list[dict[str, object]]:
    base_ms = first["1 kB"]["p50"]
    rows: list[dict[str, object]] = []
    for kind in ALPHABETS:
        more_ms = round(first[kind]["p50"] - base_ms, 1)
        rows.append(
            at_most(f"lease and first cell, {megabytes:,} MB {kind}, beyond that of 1 kB", more_ms, 30, " ms")
        )
    grown_mib = max(first[kind]["second_figure"] for kind in ALPHABETS) / 1024
    rows.append(at_most("the interpreter's growth by it", round(grown_mib, 1), 30, " MiB"))
    one, many = files.values()
    rows.append(
        at_most(
            "lease and first cell, 100,000 files, beyond that of one", many["p50"] - one["p50"], 10, " ms"
        )
    )
    everything = [row for of_kind in searched.values() for row in of_kind]
    for kind in ALPHABETS:
        worst = max(row["ratio"] for row in searched[kind] if not row["is_dense"])
        rows.append(at_most(f"regular expressions, {kind}, the slowest of four", worst, 1.25, "×"))
    worst = max(row["ratio"] for row in everything if row["is_dense"] and row["same"])
    rows.append(
        at_most("regular expressions that match every 10 to 100 bytes, the slowest", worst, 1.25, "×")
    )
    grown = round(max(row["memory_mib"] for row in everything), 1)
    rows.append(at_most("resident growth by any of the expressions", grown, 50, " MiB"))
    return rows


def main() -> None:
    """Print the figures and keep them."""
    parser = argparse.ArgumentParser(description=__doc__)
    # From 200 on: what fits a str is one, and no view is asked.
    parser.add_argument("--megabytes", type=int, default=1_000)
    parser.add_argument("--runtime", default="runc")
    chosen = parser.parse_args()
    measured = asyncio.run(measure(chosen.megabytes, chosen.runtime))
    for what in measured.items():
        print(*what)
    keep("big_context", measured)


if __name__ == "__main__":
    main()
