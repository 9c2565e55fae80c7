"""Progress as plain lines, for a stderr that is no terminal: few enough to read, in any log.

Turns are told of the root run only; of child runs their start and end. All sub-calls of a cell are one line,
and while nothing else is worth one, a summary stands in at most every ten seconds.
"""

from types import TracebackType

from orchestrator import trajectory
from orchestrator.cli import exits, words
from orchestrator.cli.tree import RunNode, RunTree, head, trouble
from orchestrator.trajectory import Event
from orchestrator.visible import visible_line

PROGRESS_S = 10.0
_LABEL_WIDTH = 10


class PlainLines:
    """Tells the tree's events as lines on stderr."""

    def __init__(self, tree: RunTree) -> None:
        self._tree = tree
        self._told_at = 0.0

    def on_event(self, event: Event) -> None:
        """Tell an event that the tree has folded in already."""
        for line in self.lines(event):
            exits.tell(line)

    def say(self, line: str) -> None:
        """Tell what is being waited for."""
        exits.tell(f"rlm: {line}")

    def warn(self, text: str) -> None:
        """Tell what went wrong beside the run."""
        exits.tell_block(text)

    async def __aenter__(self) -> "PlainLines":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to take down."""

    def lines(self, event: Event) -> list[str]:
        """What is told of an event; not yet made visible."""
        root, node = self._tree.root, self._tree.node(event.run_id)
        if root is None or node is None:
            return []
        texts = _texts(node, event)
        if not texts and event.at - self._told_at >= PROGRESS_S:
            node = root
            texts = [_progress(self._tree, root)]
        if not texts:
            return []
        self._told_at = event.at
        label = words.SCRIPTED_LABEL if node.scripted else ""
        start = f"{label}{event.at - root.started_at:7.1f} s  {node.label:<{_LABEL_WIDTH}} "
        return [start + text for text in texts]


def _texts(node: RunNode, event: Event) -> list[str]:
    payload = event.payload
    match payload:
        case trajectory.RunStarted() if node.depth:
            return [f"started at depth {node.depth}: “{visible_line(head(node.question), 100)}”"]
        case trajectory.RunStarted():
            return [f"started: {payload.model}, sub-calls {payload.sub_model or payload.model}"]
        case trajectory.SandboxLeased() if not node.depth:
            wait = words.duration(payload.wait_s)
            return [f"sandbox {payload.sandbox_id} ready after {wait} ({payload.runtime})"]
        case trajectory.TurnStarted() if not node.depth:
            return [f"turn {payload.turn}: asking the model ({payload.request_bytes:,} bytes)"]
        case trajectory.CellStarted() if not node.depth:
            code = head(payload.code).strip()
            lines = code.count("\n") + 1
            return [f"turn {payload.turn}: cell, {words.many(lines, 'line')}: {visible_line(code, 100)}"]
        case trajectory.CellEnded() if not node.depth:
            return [_cell(node, payload)]
        case trajectory.HistoryCompacted():
            return [
                f"turn {payload.turn}: old output taken out of the conversation:"
                f" {words.many(payload.reports, 'report')}, {payload.freed_bytes:,} bytes"
            ]
        case trajectory.GuestMisbehaved():
            counts = ", ".join(
                f"{count:,} {visible_line(what, 100)}" for what, count in payload.counts.items()
            )
            return [f"the guest misbehaved on its socket: {counts}"]
        case trajectory.RunEnded():
            took = words.duration(payload.duration_s)
            why = f": {payload.error}" if payload.error else ""
            return [f"{payload.outcome} after {words.many(payload.turns, 'turn')}, {took}{why}"]
        case _:
            return []


def _cell(node: RunNode, ended: trajectory.CellEnded) -> str:
    text = f"turn {ended.turn}: cell {ended.outcome} after {words.duration(ended.duration_s)}"
    if seen := trouble(ended):
        text += f", {seen}"
    if ended.output_bytes:
        text += f", {ended.output_bytes:,} bytes of output"
    if node.calls.total:
        text += f"; sub-calls: {node.calls}"
    if node.children_asked.total:
        text += f"; child runs: {node.children_asked}"
    if ended.lost_variables:
        text += f"; {words.many(len(ended.lost_variables), 'variable')} lost"
    last_line = head(ended.traceback).strip().rpartition("\n")[2]
    return f"{text}: {last_line}" if last_line else text


def _progress(tree: RunTree, root: RunNode) -> str:
    text = f"turn {root.turn}: {root.phase.value}"
    if root.calls.total:
        text += f"; sub-calls: {root.calls}"
    if root.children_asked.total:
        text += f"; child runs: {root.children_asked}"
    return f"{text}; {words.used(tree.tally)}"
