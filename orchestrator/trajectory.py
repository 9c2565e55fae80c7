"""What happened in a run, as an append-only list of events, and what can be read off it.

Everything that is shown, written or counted comes from these events. An event belongs to one run; `seq` is
dense from 0 within it. Text that came from a model or a guest may be long: over `INLINE_BYTES` it stands as a
`Blob`, whose whole text is in the store under its hash.

The JSON form (`Event.to_json`, one object a line in `--events` files) is documented in docs/events.md and
carries `"v": 1`; fields may be added within a version, never renamed or removed.
"""

import dataclasses
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from types import NoneType, UnionType
from typing import Any, ClassVar, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from orchestrator.budget import Amounts
from orchestrator.ids import RunId
from orchestrator.pricing import Usage

VERSION = 1
INLINE_BYTES = 4_096
"""Longer text goes into the blob store (design, "Everything that happens is an event")."""


@dataclass(frozen=True, slots=True)
class Blob:
    """A long text: its head, and where the whole is."""

    head: str
    """The first characters, at most `INLINE_BYTES` of UTF-8."""
    length_bytes: int
    sha256: str


Text: TypeAlias = str | Blob


def shorten(text: str) -> tuple[Text, bytes | None]:
    """The form in which a text enters an event, and the bytes to store beside it, if it is long."""
    data = text.encode("utf-8", "replace")
    if len(data) <= INLINE_BYTES:
        return data.decode(), None
    return blob_of(data, hashlib.sha256(data).hexdigest()), data


def blob_of(data: bytes, sha256: str) -> Blob:
    """The form of a long text that is there as UTF-8, and whose hash is known."""
    return Blob(data[:INLINE_BYTES].decode("utf-8", "ignore"), len(data), sha256)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStarted:
    """A run began."""

    KIND: ClassVar[str] = "run_started"
    question: Text
    context: str
    """Its shape, as the model is told."""
    model: str
    sub_model: str
    depth: int
    parent: RunId | None
    parent_call: str
    """The sub-call that started it, in the parent's events; empty for a root run."""
    limits: Mapping[str, float]
    dialect: str = "tools"


@dataclass(frozen=True, kw_only=True, slots=True)
class SandboxLeased:
    """A sandbox is ready for the run."""

    KIND: ClassVar[str] = "sandbox_leased"
    sandbox_id: str
    runtime: str
    image: str
    hash_seed: int
    wait_s: float
    """From asking for it to its worker's Hello."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TurnStarted:
    """The model is asked for a turn."""

    KIND: ClassVar[str] = "turn_started"
    turn: int
    request_bytes: int
    """Of the whole request: system prompt and conversation."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CallHeld:
    """An attempt at a provider is about to be made: its worst case is held. Written before the call."""

    KIND: ClassVar[str] = "call_held"
    call: str
    """`turn-3` for turn 3's own (`turn-3.2` when it had to be asked for again), `3.14` for the fourteenth
    sub-call of its cell. Unique in the run."""
    attempt: int
    model: str
    input_bound_tokens: int
    """What the input can't exceed; part of what is held."""
    held: Amounts


@dataclass(frozen=True, kw_only=True, slots=True)
class CallSettled:
    """The attempt is over and paid."""

    KIND: ClassVar[str] = "call_settled"
    call: str
    attempt: int
    model: str
    input_bound_tokens: int
    usage: Usage
    """Confirmed by the provider; zeros when unknown."""
    confirmed: Amounts
    unconfirmed: Amounts
    error: str
    """Empty when the attempt succeeded."""
    duration_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReplied:
    """What the model said in a turn, verbatim."""

    KIND: ClassVar[str] = "model_replied"
    turn: int
    content: Text
    """JSON of the content blocks."""
    stop: str


@dataclass(frozen=True, kw_only=True, slots=True)
class CellStarted:
    """A cell runs."""

    KIND: ClassVar[str] = "cell_started"
    turn: int
    code: Text
    invented_bytes: int = 0
    """What its model wrote behind it, which was cut off."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CellEnded:
    """It is over."""

    KIND: ClassVar[str] = "cell_ended"
    turn: int
    outcome: str
    output: Text
    output_bytes: int
    cut_bytes: int
    traceback: Text
    status: int
    lost_variables: tuple[str, ...]
    duration_s: float
    guest_s: float
    passed: str = ""
    """The limit of the cell clock that it passed."""
    used_up: tuple[str, ...] = ()
    """What of its sandbox it used up."""
    loss: str = ""
    """Why its sandbox went away."""
    used_up_limits: Mapping[str, int] = field(default_factory=dict)
    """How much of each there was, as its model was told. What is not in here was told without a number."""
    answer: Text | None = None
    """Set when it ended the run."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SubCallStarted:
    """A cell asked for a completion or a child run."""

    KIND: ClassVar[str] = "sub_call_started"
    call: str
    turn: int
    what: str
    """`complete` or `child_run`."""
    model: str
    prompt: Text
    request_hash: str
    occurrence: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SubCallEnded:
    """It was answered or refused."""

    KIND: ClassVar[str] = "sub_call_ended"
    call: str
    answer: Text
    error: str
    """Empty when it was answered."""
    error_kind: str
    memoised: bool
    """Answered by an identical call of the run tree, and not paid again."""
    duration_s: float
    truncated: bool = False
    """The answer reached its output limit."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HistoryCompacted:
    """Old outputs were taken out of the conversation."""

    KIND: ClassVar[str] = "history_compacted"
    turn: int
    reports: int
    freed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResumed:
    """An orchestrator ended during the run, and another goes on with it."""

    KIND: ClassVar[str] = "run_resumed"
    times: int
    """1 when it is the first time."""
    turn: int
    """The last turn that was asked for, which is where it goes on."""
    cells: int
    """How many cells its variables come from, which are run again if it still needs a sandbox."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReplayDiverged:
    """A cell that was run again did not do what it did the first time, or could not be run again."""

    KIND: ClassVar[str] = "replay_diverged"
    turn: int
    """Of the cell."""
    why: str
    namespace: str
    """What of the run's variables: `kept` (it only printed something else), `uncertain`, `lost`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuestMisbehaved:
    """What the run's guest did on its socket that no other event tells. Once, before the run's end."""

    KIND: ClassVar[str] = "guest_misbehaved"
    counts: Mapping[str, int]
    """By what it was, in words."""
    unrecorded_refusals: int
    """Sub-calls that a budget refused, and that are not among the events, because so many already are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunEnded:
    """The run is over. Nothing follows but late settlements of calls that were still in flight."""

    KIND: ClassVar[str] = "run_ended"
    outcome: str
    answer: Text | None
    error: str
    turns: int
    duration_s: float


Payload: TypeAlias = (
    RunStarted
    | SandboxLeased
    | TurnStarted
    | CallHeld
    | CallSettled
    | ModelReplied
    | CellStarted
    | CellEnded
    | SubCallStarted
    | SubCallEnded
    | HistoryCompacted
    | RunResumed
    | ReplayDiverged
    | GuestMisbehaved
    | RunEnded
)


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of a trajectory."""

    run_id: RunId
    seq: int
    at: float
    """Unix time, in seconds."""
    payload: Payload

    @property
    def kind(self) -> str:
        """The payload's kind."""
        return self.payload.KIND

    def to_json(self) -> dict[str, object]:
        """The event as a JSON object."""
        body = {
            item.name: _plain(getattr(self.payload, item.name)) for item in dataclasses.fields(self.payload)
        }
        return {
            "v": VERSION,
            "run_id": self.run_id,
            "seq": self.seq,
            "at": round(self.at, 6),
            "kind": self.kind,
            **body,
        }

    @classmethod
    def from_json(cls, said: Mapping[str, object]) -> "Event":
        """The event of which `to_json` made this.

        Fields that this version does not know are left out, and those that an older one did not have get
        their defaults.

        Raises:
            ValueError: It is of another version or of no known kind, or a field is missing or no such value.
        """
        if said.get("v") != VERSION:
            raise ValueError(f"an event of version {said.get('v')!r}")
        kind = _KINDS.get(str(said.get("kind")))
        if kind is None:
            raise ValueError(f"an event of the unknown kind {said.get('kind')!r}")
        hints = _hints_of(cast(Any, kind))
        known = {name: _typed(hint, said[name], name) for name, hint in hints.items() if name in said}
        missing = sorted(_required(cast(Any, kind)) - known.keys())
        if missing:
            raise ValueError(f"a {kind.KIND} without {', '.join(missing)}")
        return cls(
            RunId(_one(str, said.get("run_id"), "run_id")),
            _one(int, said.get("seq"), "seq"),
            float(_number(said.get("at"), "at")),
            kind(**known),
        )


_KINDS: Mapping[str, type[Payload]] = {kind.KIND: kind for kind in get_args(Payload)}


@cache
def _hints_of(kind: type[object]) -> Mapping[str, object]:
    hints = get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(cast(Any, kind))}


@cache
def _required(kind: type[object]) -> frozenset[str]:
    return frozenset(
        item.name
        for item in dataclasses.fields(cast(Any, kind))
        if item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
    )


_T = TypeVar("_T")
_Counters = TypeVar("_Counters", Amounts, Usage)


def _one(kind: type[_T], value: object, name: str) -> _T:
    """The value, if it is one of exactly this type: `True` is no number."""
    if type(value) is not kind:
        raise ValueError(f"{name} is no {kind.__name__}")
    return value


def _number(value: object, name: str) -> int | float:
    return value if type(value) is int else _one(float, value, name)


def _counters(kind: type[_Counters], value: object, name: str) -> _Counters:
    said = _one(dict, value, name)
    return kind(**{unit: _one(int, said.get(unit, 0), name) for unit in kind._fields})


def _typed(hint: object, value: object, name: str) -> Any:
    """The value of a field, as its type hint says."""
    if get_origin(hint) in {Union, UnionType}:
        if value is None and NoneType in get_args(hint):
            return None
        is_blob = Blob in get_args(hint) and isinstance(value, dict)
        return _typed(Blob if is_blob else str, value, name)
    if get_origin(hint) is tuple:
        return tuple(_one(str, item, name) for item in _one(list, value, name))
    if get_origin(hint) is Mapping:
        of = get_args(hint)[1]
        return {_one(str, key, name): _typed(of, item, name) for key, item in _one(dict, value, name).items()}
    if hint is Blob:
        said = _one(dict, value, name)
        head, sha256 = (_one(str, said.get(part), name) for part in ("head", "sha256"))
        return Blob(head, _one(int, said.get("length_bytes"), name), sha256)
    if hint is Amounts:
        return _counters(Amounts, value, name)
    if hint is Usage:
        return _counters(Usage, value, name)
    if hint is float:
        return _number(value, name)
    for plain in (str, int, bool):
        if hint is plain:
            return _one(plain, value, name)
    raise TypeError(f"{name} is of a type that nobody reads: {hint}")


def _plain(value: object) -> object:
    if isinstance(value, Blob):
        return dataclasses.asdict(value)
    if isinstance(value, Amounts | Usage):
        return value._asdict()
    if isinstance(value, tuple):
        return list(value)
    if isinstance(value, Mapping):
        return dict(value)
    return value


LOST = "the orchestrator ended during this call"
"""The error of an attempt that `settle_after_crash` settles."""


def settle_after_crash(events: Iterable[Event]) -> list[tuple[RunId, CallSettled]]:
    """What a crash left unsettled, settled: the whole hold of each such attempt, as unconfirmed.

    An attempt is held for in the record before it is made, so nothing a provider may have billed is missing
    here; what never went out is charged too, because nobody can tell any more. To be appended to the run's
    events, with a ledger entry each; settled so, the attempt is not found again.

    Args:
        events: Of any runs; those of one run in order.
    """
    open_holds: dict[tuple[RunId, str, int], CallHeld] = {}
    for event in events:
        match event.payload:
            case CallHeld() as held:
                open_holds[event.run_id, held.call, held.attempt] = held
            case CallSettled() as settled:
                # None when the hold could not be recorded: the attempt was then not made.
                open_holds.pop((event.run_id, settled.call, settled.attempt), None)
            case _:
                pass
    return [
        (
            run_id,
            CallSettled(
                call=held.call,
                attempt=held.attempt,
                model=held.model,
                input_bound_tokens=held.input_bound_tokens,
                usage=Usage(),
                confirmed=Amounts(),
                unconfirmed=held.held,
                error=LOST,
                duration_s=0.0,
            ),
        )
        for (run_id, _, _), held in open_holds.items()
    ]


@dataclass(slots=True)
class Line:
    """What one model was used for at one depth."""

    usage: Usage = field(default_factory=Usage)
    cost_microusd: int = 0
    """Of `usage`, so confirmed."""
    unconfirmed: Amounts = field(default_factory=Amounts)
    calls: int = 0
    """Attempts that were or may have been billed."""
    retried: int = 0
    """Attempts after the first of a call."""
    refused: int = 0
    """Sub-calls that the budget, the depth or the allow-list refused."""
    memoised: int = 0
    """Sub-calls that an identical one answered."""


_REFUSALS = {"BudgetExceededError", "DepthExceededError"}


@dataclass(slots=True)
class Tally:
    """What a run tree has used and done, added up from its events."""

    usage: Usage = field(default_factory=Usage)
    confirmed: Amounts = field(default_factory=Amounts)
    unconfirmed: Amounts = field(default_factory=Amounts)
    lines: dict[tuple[str, int], Line] = field(default_factory=dict)
    """By model and depth."""
    root_turns: int = 0
    child_runs: int = 0
    max_depth_reached: int = 0
    root_request_bytes: int = 0
    """What the root model was sent in all attempts at its turns, before caching."""
    open_calls: int = 0
    sub_calls_done: int = 0
    sub_calls_in_flight: int = 0
    sub_calls_failed: int = 0
    losses: list[str] = field(default_factory=list)
    """Why sandboxes of the tree went away under a cell, in order."""
    bound_tokens: int = 0
    """Input bounds of the calls whose usage is confirmed: what the bound over-reserves can be read off it."""
    _root: RunId | None = None
    _turn_bytes: int = 0
    """Of the root's present turn."""
    _depths: dict[RunId, int] = field(default_factory=dict)
    _models: dict[tuple[RunId, str], str] = field(default_factory=dict)
    """Of the sub-calls in flight."""

    def add(self, event: Event) -> None:
        """Count one event. Events of one run come in order; runs may interleave."""
        payload = event.payload
        match payload:
            case RunStarted():
                self._depths[event.run_id] = payload.depth
                self.max_depth_reached = max(self.max_depth_reached, payload.depth)
                if payload.parent is None:
                    self._root = event.run_id
                else:
                    self.child_runs += 1
            case TurnStarted() if event.run_id == self._root:
                self.root_turns = payload.turn
                self._turn_bytes = payload.request_bytes
            case CallHeld():
                self.open_calls += 1
                if event.run_id == self._root and payload.call.startswith("turn-"):
                    self.root_request_bytes += self._turn_bytes
            case CallSettled():
                self._settled(event.run_id, payload)
            case SubCallStarted():
                self.sub_calls_in_flight += 1
                self._models[event.run_id, payload.call] = payload.model
            case SubCallEnded():
                self._sub_call_ended(event.run_id, payload)
            case CellEnded() if payload.loss:
                self.losses.append(payload.loss)
            case _:
                pass

    def input_tokens_per_byte(self) -> float | None:
        """Measured on this run's own calls; None before one is confirmed."""
        return self.usage.total_input / self.bound_tokens if self.bound_tokens else None

    @classmethod
    def of(cls, events: Iterable[Event]) -> "Tally":
        """The tally of a whole trajectory."""
        tally = cls()
        for event in events:
            tally.add(event)
        return tally

    def _line(self, model: str, run_id: RunId) -> Line:
        return self.lines.setdefault((model, self._depths.get(run_id, 0)), Line())

    def _settled(self, run_id: RunId, settled: CallSettled) -> None:
        self.open_calls -= 1
        self.usage = self.usage.plus(settled.usage)
        self.confirmed = self.confirmed.plus(settled.confirmed)
        self.unconfirmed = self.unconfirmed.plus(settled.unconfirmed)
        if settled.usage.total_input:
            self.bound_tokens += settled.input_bound_tokens
        line = self._line(settled.model, run_id)
        line.usage = line.usage.plus(settled.usage)
        line.cost_microusd += settled.confirmed.cost_microusd
        line.unconfirmed = line.unconfirmed.plus(settled.unconfirmed)
        line.calls += settled.confirmed.calls + settled.unconfirmed.calls
        line.retried += settled.attempt > 1

    def _sub_call_ended(self, run_id: RunId, ended: SubCallEnded) -> None:
        self.sub_calls_in_flight -= 1
        line = self._line(self._models.pop((run_id, ended.call), ""), run_id)
        line.memoised += ended.memoised
        line.refused += ended.error_kind in _REFUSALS
        if ended.error:
            self.sub_calls_failed += 1
        else:
            self.sub_calls_done += 1
