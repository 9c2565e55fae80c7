"""What a run tree looks like at the moment, folded from its events. No clock, no terminal.

Text in here is as hostile as in the events; whoever shows it makes it visible first.
"""

from dataclasses import dataclass, field
from enum import Enum

from orchestrator import trajectory
from orchestrator.ids import RunId
from orchestrator.models.catalogue import SCRIPTED_PREFIX
from orchestrator.trajectory import Event, Tally, Text
from orchestrator.turn import Outcome


class Phase(Enum):
    """What a run is waiting for."""

    STARTING = "starting its sandbox"
    READY = "sandbox ready"
    ASKING = "asking the model"
    REPLIED = "reading the reply"
    CELL = "cell running"
    BETWEEN = "between turns"
    ENDED = "ended"


@dataclass(slots=True)
class Counts:
    """Sub-calls of one sort."""

    in_flight: int = 0
    done: int = 0
    failed: int = 0

    @property
    def total(self) -> int:
        """However they ended, or have not yet."""
        return self.in_flight + self.done + self.failed

    def end(self, *, failed: bool) -> None:
        """One of those in flight is over."""
        self.in_flight -= 1
        if failed:
            self.failed += 1
        else:
            self.done += 1

    def __str__(self) -> str:
        parts = ((self.done, "done"), (self.in_flight, "in flight"), (self.failed, "failed"))
        return ", ".join(f"{count:,} {word}" for count, word in parts if count) or "none"


@dataclass(slots=True)
class RunNode:
    """One run of the tree."""

    label: str
    """`root`, `child 1`, `child 1.2`: by order of start."""
    depth: int
    model: str
    question: Text
    started_at: float
    phase_at: float
    scripted: bool
    """Whether what is shown of it was said by a script and not by a model."""
    phase: Phase = Phase.STARTING
    turn: int = 0
    code: Text = ""
    """Of the current or last cell."""
    calls: Counts = field(default_factory=Counts)
    """Plain completions of the current or last cell."""
    children_asked: Counts = field(default_factory=Counts)
    """Child runs that cell asked for, refused ones too."""
    children: list["RunNode"] = field(default_factory=list)
    outcome: str = ""
    """How it ended; empty while it goes on."""
    error: str = ""
    trouble: str = ""
    """What the last cell lost or used up of its sandbox; empty while the next one runs."""
    last_output: Text = ""
    """Of the last cell that wrote anything."""
    ended_at: float = 0.0
    open_calls: dict[str, Counts] = field(default_factory=dict)
    """Sub-calls in flight, and where each is counted."""

    @property
    def answered(self) -> bool:
        """Whether it ended with an answer."""
        return self.outcome == Outcome.ANSWERED.value


class RunTree:
    """All runs of one tree, and what they have used. An observer: it never raises."""

    def __init__(self) -> None:
        self.root: RunNode | None = None
        self.root_id: RunId | None = None
        self.tally = Tally()
        self._nodes: dict[RunId, RunNode] = {}

    def node(self, run_id: RunId) -> RunNode | None:
        """The node of a run that has started."""
        return self._nodes.get(run_id)

    def add(self, event: Event) -> None:
        """Fold one event in."""
        self.tally.add(event)
        if isinstance(event.payload, trajectory.RunStarted):
            self._plant(event, event.payload)
            return
        node = self._nodes.get(event.run_id)
        if node is not None:
            _advance(node, event)

    def _plant(self, event: Event, started: trajectory.RunStarted) -> None:
        parent = self._nodes.get(started.parent) if started.parent is not None else None
        if parent is None:
            label = "root"
        else:
            number = len(parent.children) + 1
            label = f"child {number}" if parent is self.root else f"{parent.label}.{number}"
        node = RunNode(
            label=label,
            depth=started.depth,
            model=started.model,
            question=started.question,
            started_at=event.at,
            phase_at=event.at,
            scripted=started.model.startswith(SCRIPTED_PREFIX)
            or started.sub_model.startswith(SCRIPTED_PREFIX),
        )
        self._nodes[event.run_id] = node
        if parent is not None:
            parent.children.append(node)
        elif self.root is None:
            self.root, self.root_id = node, event.run_id


def _advance(node: RunNode, event: Event) -> None:
    payload = event.payload
    match payload:
        case trajectory.SandboxLeased() if node.phase is Phase.STARTING:
            _enter(node, Phase.READY, event)
        case trajectory.TurnStarted():
            node.turn = payload.turn
            _enter(node, Phase.ASKING, event)
        case trajectory.ModelReplied():
            _enter(node, Phase.REPLIED, event)
        case trajectory.CellStarted():
            node.code = payload.code
            node.calls, node.children_asked = Counts(), Counts()
            node.trouble = ""
            _enter(node, Phase.CELL, event)
        case trajectory.CellEnded():
            if head(payload.output):
                node.last_output = payload.output
            node.trouble = trouble(payload)
            _enter(node, Phase.BETWEEN, event)
        case trajectory.SubCallStarted():
            counts = node.calls if payload.what == "complete" else node.children_asked
            counts.in_flight += 1
            node.open_calls[payload.call] = counts
        case trajectory.SubCallEnded():
            asked = node.open_calls.pop(payload.call, None)
            if asked is not None:
                asked.end(failed=bool(payload.error))
        case trajectory.RunEnded():
            node.outcome, node.error, node.ended_at = payload.outcome, payload.error, event.at
            _enter(node, Phase.ENDED, event)
        case _:
            pass


def trouble(ended: trajectory.CellEnded) -> str:
    """What a cell lost or used up of its sandbox, in words; empty for an ordinary cell."""
    parts = []
    if ended.loss:
        parts.append(f"sandbox lost: {ended.loss.replace('_', ' ')}")
    if ended.used_up:
        parts.append(f"used up: {', '.join(name.replace('_', ' ') for name in ended.used_up)}")
    return "; ".join(parts)


def _enter(node: RunNode, phase: Phase, event: Event) -> None:
    node.phase, node.phase_at = phase, event.at


def head(text: Text) -> str:
    """A text, or the beginning of a long one."""
    return text if isinstance(text, str) else text.head
