"""What the probes of `rlm doctor --probe` found, as a table and as JSON."""

import io
import shutil
from collections import Counter
from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from orchestrator.probes.finding import Finding, Verdict
from orchestrator.visible import visible_line

_LEAST_COLUMNS = 80
_MAX_DETAIL_CHARS = 200


def as_table(findings: Iterable[Finding]) -> str:
    """One row for each door, with what became of it on each runtime; below it what is not plainly closed."""
    found = list(findings)
    runtimes = list(dict.fromkeys(finding.runtime for finding in found))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    table.add_column("case")
    table.add_column("what holds")
    for runtime in runtimes:
        table.add_column(runtime)
    for key in dict.fromkeys((finding.case, finding.title) for finding in found):
        words = {one.runtime: _word(one) for one in found if (one.case, one.title) == key}
        table.add_row(
            *map(_shown, key),
            *(Text(words.get(runtime, "–")) for runtime in runtimes),
        )
    # Rich writes for no terminal here: what is printed leaves through `exits`, like everything else.
    columns = max(_LEAST_COLUMNS, shutil.get_terminal_size().columns)
    drawn = io.StringIO()
    Console(file=drawn, width=columns, color_system=None, highlight=False).print(table)
    lines = [line.rstrip() for line in drawn.getvalue().splitlines()]
    return "\n".join([*lines, *_explained(found)])


def summary(findings: Sequence[Finding]) -> str:
    """How many doors were tried, and how many are known to be closed."""
    counts = Counter(finding.verdict for finding in findings)
    told = ", ".join(f"{counts[verdict]} {verdict.value}" for verdict in Verdict)
    return f"{len(findings)} doors tried: {told}"


def as_objects(findings: Iterable[Finding]) -> list[dict[str, object]]:
    """The findings for `--json`."""
    return [
        {
            "case": finding.case,
            "title": finding.title,
            "runtime": finding.runtime,
            "verdict": finding.verdict.value,
            "detail": finding.detail or None,
        }
        for finding in findings
    ]


def _explained(findings: Iterable[Finding]) -> list[str]:
    lines = [
        f"{finding.case} on {finding.runtime}, {_word(finding)}:"
        f" {visible_line(finding.detail, _MAX_DETAIL_CHARS)}"
        for finding in findings
        if finding.verdict is not Verdict.CLOSED
    ]
    return ["", *lines] if lines else []


def _word(finding: Finding) -> str:
    word: str = finding.verdict.value
    return word if finding.ok else word.upper()


def _shown(text: str) -> Text:
    return Text(visible_line(text, _MAX_DETAIL_CHARS))
