"""One frame of the live view: rows of text from a run tree, never more than fit.

Pure: the caller says how high the terminal is and what time it is. Rows are safe to show.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Literal, NamedTuple, TypeAlias

from orchestrator.cli import words
from orchestrator.cli.exits import MAX_LINE_CHARS
from orchestrator.cli.tree import Phase, RunNode, RunTree, head
from orchestrator.limits import RunLimits
from orchestrator.visible import visible_line

Style: TypeAlias = Literal["run", "code", "quiet", "good", "bad"]

# Tried in this order until a frame fits: lines of code a run, children a run.
_DETAILS = ((12, 20), (8, 12), (6, 8), (4, 5), (3, 3), (2, 2), (1, 2), (0, 2), (0, 1), (0, 0))
_QUESTION_CHARS = 60


class Row(NamedTuple):
    """One row, and what it shows."""

    text: str
    style: Style


def frame(tree: RunTree, *, limits: RunLimits, now: float, height: int, status: str = "") -> list[Row]:
    """The frame, at most `height` rows high. `status` is what is being waited for, if anything is said."""
    footer = _footer(tree, limits, now, status)[-height:] if height > 0 else []
    room = height - len(footer)
    if tree.root is None or room <= 0:
        return footer
    rows: list[Row] = []
    for code_lines, children in _DETAILS:
        rows = list(_rows(tree.root, limits, now, code_lines, children))
        if len(rows) <= room:
            return rows + footer
    hidden = len(rows) - room + 1
    return [*rows[: room - 1], _row(0, f"… {words.many(hidden, 'more row')}", "quiet"), *footer]


def _footer(tree: RunTree, limits: RunLimits, now: float, status: str) -> list[Row]:
    rows = [_row(0, status, "quiet")] if status else []
    if tree.root is not None:
        elapsed_s = (tree.root.ended_at or now) - tree.root.started_at
        rows.append(_row(0, f"used  {words.used(tree.tally)} · {words.duration(elapsed_s)}", "quiet"))
        rows.append(_row(0, f"left  {words.left(tree.tally, limits, elapsed_s)}", "quiet"))
    return rows


def _rows(node: RunNode, limits: RunLimits, now: float, code_lines: int, children: int) -> Iterator[Row]:
    indent = node.depth
    yield _headline(node, limits, now)
    if node.phase is Phase.CELL and code_lines:
        code = head(node.code).rstrip().split("\n")
        for line in code[:code_lines]:
            yield _row(indent, f"  │ {line.expandtabs(4)}", "code", node)
        if not isinstance(node.code, str):
            yield _row(indent, f"  │ … in all {node.code.length_bytes:,} bytes", "code", node)
        elif len(code) > code_lines:
            yield _row(indent, f"  │ … {words.many(len(code) - code_lines, 'more line')}", "code", node)
    if node.trouble and node.phase is not Phase.ENDED:
        yield _row(indent, f"  {node.trouble}", "bad", node)
    if node.calls.total and node.phase is not Phase.ENDED:
        style: Style = "bad" if node.calls.failed else "quiet"
        yield _row(indent, f"  sub-calls: {node.calls}", style, node)
    shown = _worth_showing(node, children)
    for child in shown:
        yield from _rows(child, limits, now, code_lines, children)
    if len(shown) < len(node.children):
        yield _folded(node, shown)


def _headline(node: RunNode, limits: RunLimits, now: float) -> Row:
    name = f"{node.label} · {node.model}" if node.depth == 0 else node.label
    question = f" · “{visible_line(head(node.question), _QUESTION_CHARS)}”" if node.depth else ""
    if node.phase is Phase.ENDED:
        took = words.duration(node.ended_at - node.started_at)
        text = f"{name} · {node.outcome} after {words.many(node.turn, 'turn')}, {took}"
        if node.error:
            text += f": {node.error}"
        return _row(node.depth, text + question, "good" if node.answered else "bad", node)
    turn = f"turn {node.turn} of {limits.max_turns} · " if node.turn else ""
    since = words.duration(now - node.phase_at)
    return _row(node.depth, f"{name} · {turn}{node.phase.value} for {since}{question}", "run", node)


def _worth_showing(node: RunNode, most: int) -> list[RunNode]:
    """Those that still run, then those that failed, then the newest; in the order they started."""
    if len(node.children) <= most:
        return node.children
    running = [child for child in node.children if child.phase is not Phase.ENDED]
    ended = [child for child in reversed(node.children) if child.phase is Phase.ENDED]
    ended.sort(key=lambda child: child.answered)
    chosen = {id(child) for child in (running + ended)[:most]}
    return [child for child in node.children if id(child) in chosen]


def _folded(node: RunNode, shown: list[RunNode]) -> Row:
    known = {id(child) for child in shown}
    states = Counter(child.outcome or "running" for child in node.children if id(child) not in known)
    counts = ", ".join(f"{count:,} {state}" for state, count in sorted(states.items()))
    more = words.many(sum(states.values()), "more child run")
    return _row(node.depth + 1, f"… {more}: {counts}", "quiet", node)


def _row(indent: int, text: str, style: Style, node: RunNode | None = None) -> Row:
    label = words.SCRIPTED_LABEL if node is not None and node.scripted else ""
    return Row(visible_line(f"{label}{'  ' * indent}{text}", MAX_LINE_CHARS), style)
