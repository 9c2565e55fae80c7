"""A run's past, read off its events: what its machine was fed, the cells it ran, the sub-calls they made.

What becomes of it after a restart is in `replay.py`. Pure: no I/O, no clock. Long texts are looked up by the
caller before.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from orchestrator import turn
from orchestrator.budget import ZERO, Amounts
from orchestrator.cells import CellLimit, CellOutcome, CellResult, Resource, SandboxLoss, UsedUp
from orchestrator.conversation import Dialect, Reply, StopReason
from orchestrator.errors import (
    ReplayError,
    RunCancelledError,
)
from orchestrator.ids import RunId, child_run_id
from orchestrator.reply import what_counts
from orchestrator.runs.divergence import Namespace, note_of
from orchestrator.trajectory import (
    LOST,
    Blob,
    CallSettled,
    CellEnded,
    CellStarted,
    Event,
    ModelReplied,
    Payload,
    ReplayDiverged,
    RunEnded,
    RunResumed,
    RunStarted,
    SandboxLeased,
    SubCallEnded,
    SubCallStarted,
    Text,
    TurnStarted,
    settle_after_crash,
)

Fed: TypeAlias = turn.Event
"""What the machine is fed. Under a name of its own, because a field of `Step` is called `turn`."""

TextOf = Callable[[Text], str]
"""The whole of a recorded text. Raises ReplayError when it is not there."""


@dataclass(slots=True, eq=False)
class PastCall:
    """A sub-call, as recorded."""

    started: SubCallStarted
    ended: SubCallEnded | None = None
    """None when it was under way at a restart."""
    rank: int | None = None
    """0 for the first that its cell was told the end of, if only an error, 1 for the second, and so on; None
    when the cell never heard of it again."""


@dataclass(slots=True, eq=False)
class PastCell:
    """A cell, as recorded."""

    turn: int
    code: str
    result: CellResult | None = None
    """None when it was running at the last restart."""
    starts: int = 0
    calls: dict[tuple[str, int], PastCall] = field(default_factory=dict)
    """By request hash and occurrence."""
    names: int = 0
    """How many names of sub-calls are taken."""
    answers: int = 0
    note: str = ""
    """What its model is to be told behind its report."""


@dataclass(frozen=True, slots=True)
class Step:
    """Something the machine was fed."""

    turn: int
    event: "Fed"


@dataclass(slots=True, eq=False)
class RunPast:
    """One run, as far as it is recorded."""

    run_id: RunId
    started: RunStarted
    started_at_s: float
    """Unix time."""
    last_at_s: float
    """Of the latest event, whatever the clock did in between."""
    length: int = 0
    """In events; the next one's `seq`."""
    ended: RunEnded | None = None
    answer: str | None = None
    """Of a run that has ended."""
    times: int = 0
    """How often it was resumed."""
    hash_seed: int = 0
    """Of its last sandbox; 0 when it had none."""
    turn: int = 0
    asked: Counter[int] = field(default_factory=Counter)
    """How often each turn was asked for."""
    steps: list[Step] = field(default_factory=list)
    cells: dict[int, PastCell] = field(default_factory=dict)
    """By turn."""
    to_run_again: list[PastCell] = field(default_factory=list)
    """What the namespace is made of, in order."""
    interrupted: int = 0
    """The turn of a cell that is among what the namespace is made of, and was interrupted; 0 for none."""
    began_anew: bool = False
    """Whether it lost the namespace that it began with."""
    found_so_far: str = ""
    confirmed: Amounts = ZERO
    unconfirmed: Amounts = ZERO

    @property
    def running(self) -> PastCell | None:
        """The cell that was running when the record ends."""
        cell = self.cells.get(self.turn)
        return cell if cell is not None and cell.result is None else None

    def elapsed_s(self, now_s: float) -> float:
        """Seconds since it began. A clock that was set back does not make it younger than its record.

        Args:
            now_s: Unix time.
        """
        return max(0.0, max(now_s, self.last_at_s) - self.started_at_s)


def read_run(events: Sequence[Event], text_of: TextOf) -> RunPast:
    """A run's past.

    Args:
        events: All of one run's, at least one.
        text_of: Gives the texts that `long_texts` names.

    Raises:
        ReplayError: They are not what a run of ours leaves behind.
    """
    if any(event.seq != seq for seq, event in enumerate(events)):
        raise ReplayError("the run's events have gaps")
    first = events[0].payload
    if not isinstance(first, RunStarted):
        raise ReplayError("the run's events do not begin with its start")
    past = RunPast(
        run_id=events[0].run_id,
        started=first,
        started_at_s=events[0].at,
        last_at_s=max(event.at for event in events),
        length=len(events),
    )
    reading = _Reading(past, text_of)
    try:
        for event in events:
            reading.add(event.payload)
    except (ValueError, KeyError, TypeError) as error:
        raise ReplayError("the run's events contradict each other") from error
    return past


class _Reading:
    """Reads one run's events, one after the other."""

    def __init__(self, past: RunPast, text_of: TextOf) -> None:
        self._past = past
        self._text_of = text_of
        self._dialect = Dialect(past.started.dialect)
        self._open_turn = 0
        """A turn that was asked for and has no reply yet."""
        self._turn_tokens = 0
        self._diverged: list[ReplayDiverged] = []
        """Since the last restart, and not yet told."""
        self._calls: dict[str, PastCall] = {}
        self._wants_sandbox = False

    def add(self, payload: Payload) -> None:
        """The next event."""
        match payload:
            case TurnStarted():
                self._turn_started(payload)
            case ModelReplied():
                self._replied(payload)
            case CellStarted():
                self._cell_started(payload)
            case CellEnded():
                self._cell_ended(payload)
            case SubCallStarted():
                self._sub_call_started(payload)
            case SubCallEnded():
                self._sub_call_ended(payload)
            case _:
                self._add_other(payload)

    def _add_other(self, payload: Payload) -> None:
        """One that is no step of the run's own course."""
        past = self._past
        match payload:
            case CallSettled():
                past.confirmed = past.confirmed.plus(payload.confirmed)
                past.unconfirmed = past.unconfirmed.plus(payload.unconfirmed)
                if payload.call.startswith("turn-") and not payload.error:
                    self._turn_tokens = payload.usage.total
            case SandboxLeased():
                past.hash_seed = payload.hash_seed
                if self._wants_sandbox:
                    self._wants_sandbox = False
                    self._feed(turn.SandboxReplaced())
            case RunResumed():
                past.times = payload.times
                self._open_turn = 0
                self._diverged.clear()
            case ReplayDiverged():
                self._diverged.append(payload)
            case RunEnded():
                past.ended = payload
                past.answer = None if payload.answer is None else self._text_of(payload.answer)
            case _:
                pass

    def _feed(self, event: turn.Event) -> None:
        self._past.steps.append(Step(self._past.turn, event))

    def _note(self) -> str:
        """What the model is about to be told of the last restart."""
        note = note_of(self._diverged)
        if any(one.namespace == Namespace.LOST for one in self._diverged):
            self._forget_namespace()
        self._diverged.clear()
        return note

    def _forget_namespace(self) -> None:
        self._past.to_run_again.clear()
        self._past.interrupted = 0
        self._past.began_anew = True

    def _turn_started(self, started: TurnStarted) -> None:
        if self._open_turn:
            self._feed(turn.BudgetShort("the budget was too low"))
        self._past.turn = self._open_turn = started.turn
        self._past.asked[started.turn] += 1
        note = self._note()
        if note:
            self._feed(turn.Noted(note))

    def _replied(self, replied: ModelReplied) -> None:
        said = Reply(tuple(json.loads(self._text_of(replied.content))), StopReason(replied.stop))
        self._open_turn = 0
        self._feed(turn.ModelReplied(said, self._turn_tokens))
        self._past.found_so_far = what_counts(said, self._dialect).text.strip() or self._past.found_so_far

    def _cell_started(self, started: CellStarted) -> None:
        cell = self._past.cells.get(started.turn)
        if cell is None:
            cell = self._past.cells[started.turn] = PastCell(started.turn, self._text_of(started.code))
        cell.starts += 1
        cell.note = self._note() or cell.note

    def _cell_ended(self, ended: CellEnded) -> None:
        past, cell = self._past, self._past.cells[ended.turn]
        result = cell.result = result_of(ended, self._text_of)
        self._feed(turn.CellEnded(result, cell.note))
        past.found_so_far = result.output.strip() or past.found_so_far
        self._wants_sandbox = result.outcome is CellOutcome.SANDBOX_LOST
        if not result.outcome.namespace_kept:
            self._forget_namespace()
        elif result.outcome is CellOutcome.INTERRUPTED:
            past.interrupted = ended.turn
        else:
            past.to_run_again.append(cell)

    def _sub_call_started(self, started: SubCallStarted) -> None:
        cell = self._past.cells[started.turn]
        call = cell.calls[started.request_hash, started.occurrence] = PastCall(started)
        cell.names += 1
        self._calls[started.call] = call

    def _sub_call_ended(self, ended: SubCallEnded) -> None:
        call = self._calls[ended.call]
        if ended.error == LOST:
            return
        call.ended = ended
        cell = self._past.cells[call.started.turn]
        # What came after its cell was over, or only because of that, the cell never heard of.
        if cell.result is None and ended.error_kind != RunCancelledError.__name__:
            call.rank = cell.answers
            cell.answers += 1
            cell.starts = min(cell.starts, 1)  # it got further


def result_of(ended: CellEnded, text_of: TextOf) -> CellResult:
    """What a cell was recorded to have come to; its report is the recorded one, word for word."""
    return CellResult(
        outcome=CellOutcome(ended.outcome),
        # With the cut named in it already.
        output_head=text_of(ended.output),
        output_bytes=ended.output_bytes,
        traceback=text_of(ended.traceback),
        status=ended.status,
        answer=None if ended.answer is None else text_of(ended.answer),
        lost_variables=ended.lost_variables,
        duration_s=ended.duration_s,
        guest_s=ended.guest_s,
        passed=CellLimit(ended.passed) if ended.passed else None,
        used_up=tuple(UsedUp(Resource(name), ended.used_up_limits.get(name, 0)) for name in ended.used_up),
        loss=SandboxLoss(ended.loss) if ended.loss else None,
    )


def long_texts(events: Iterable[Event]) -> Iterator[Blob]:
    """The long texts without which a run's past can't be read. Answers of sub-calls are not
    among them: each is looked up when its cell asks.
    """
    for event in events:
        match event.payload:
            case ModelReplied(content=text) | CellStarted(code=text) | RunEnded(answer=text):
                texts: tuple[Text | None, ...] = (text,)
            case CellEnded() as ended:
                texts = (ended.output, ended.traceback, ended.answer)
            case _:
                continue
        for one in texts:
            if isinstance(one, Blob):
                yield one


# --- A run tree ---------------------------------------------------------------------------------------------


def child_ids(events: Iterable[Event]) -> Iterator[RunId]:
    """The child runs that a run has asked for; some may never have begun."""
    for event in events:
        match event.payload:
            case SubCallStarted(what="child_run") as call:
                yield child_run_id(event.run_id, call.turn, call.request_hash, call.occurrence)
            case _:
                pass


def left_open(events: Sequence[Event]) -> list[tuple[RunId, Payload]]:
    """What a crash left open in a run tree, brought to its end: attempts are settled at their whole hold,
    sub-calls are lost. To be appended to their runs' events; then nothing is found any more.

    Args:
        events: Of any runs; those of one run in order.
    """
    calls: dict[tuple[RunId, str], SubCallStarted] = {}
    for event in events:
        match event.payload:
            case SubCallStarted() as started:
                calls[event.run_id, started.call] = started
            case SubCallEnded() as ended:
                calls.pop((event.run_id, ended.call), None)
            case _:
                pass
    lost = [
        (
            run_id,
            SubCallEnded(
                call=call,
                answer="",
                error=LOST,
                error_kind=RunCancelledError.__name__,
                memoised=False,
                duration_s=0.0,
            ),
        )
        for run_id, call in calls
    ]
    return [*settle_after_crash(events), *lost]


class TreePast:
    """A run tree, as far as it is recorded, with nothing open any more."""

    def __init__(self, runs: Iterable[RunPast]) -> None:
        self._runs = {run.run_id: run for run in runs}
        self._below: dict[RunId, list[RunPast]] = {}
        for run in self._runs.values():
            if run.started.parent is not None:
                self._below.setdefault(run.started.parent, []).append(run)

    def __iter__(self) -> Iterator[RunPast]:
        return iter(self._runs.values())

    def run(self, run_id: RunId) -> RunPast | None:
        """One of its runs; None when it never began."""
        return self._runs.get(run_id)

    def used(self, run_id: RunId) -> tuple[Amounts, Amounts]:
        """Confirmed and unconfirmed, of a run and all below it, the child runs that it began among them."""
        run, below = self._runs[run_id], self._below.get(run_id, [])
        confirmed, unconfirmed = run.confirmed.plus(Amounts(child_runs=len(below))), run.unconfirmed
        for child in below:
            more_confirmed, more_unconfirmed = self.used(child.run_id)
            confirmed, unconfirmed = confirmed.plus(more_confirmed), unconfirmed.plus(more_unconfirmed)
        return confirmed, unconfirmed
