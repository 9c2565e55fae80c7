"""A model played by a Python script: for tests, demos, and watching what a run does without a key.

A script is a module with

    def run(question: str, depth: int) -> Generator[Step, str, str]: ...
    def complete(prompt: str) -> str: ...

`run` plays the model of a run. It yields one step a turn, mostly the code of a cell, is sent what the run
told it since (the cell's report, or a note), and returns the text of its last answer. `complete` plays the
model of a sub-call; it may be a coroutine function, and may return `Say`, `Refuse` or `Fail`.

The client keeps no conversation. At every turn it replays `run` from the recorded entries and compares what
it yields with what it said then. So a resumed run works like any other, and a script that is not
deterministic is told so. Old reports may have been elided: a script must not depend on them twice.

A script plays in either dialect, and is sent the same reports: its cells become tool calls or fenced blocks,
its last answer becomes text or a cell that calls FINAL. What it says is taken as it stands, fences and all.

A script is trusted like any program of the user's; it runs in the orchestrator's own process.
"""

import asyncio
import hashlib
import importlib.util
import inspect
import json
import re
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias

from orchestrator import prompts
from orchestrator.conversation import (
    PYTHON_TOOL,
    Block,
    CellReport,
    Conversation,
    Dialect,
    Entry,
    Reply,
    StopReason,
    Told,
)
from orchestrator.errors import Billing, InvalidRequestError, ModelError
from orchestrator.models.in_flight import InFlight
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage
from orchestrator.reply import what_counts

BYTES_PER_TOKEN = 4
"""The price of simplicity: every text is counted as one token for four bytes of UTF-8, rounded up."""


# --- What a script can play ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell, with something said before it. A plain `str` is a cell too."""

    code: str
    text: str = ""


@dataclass(frozen=True, slots=True)
class Say:
    """A reply without a cell. An empty text is an empty reply."""

    text: str


@dataclass(frozen=True, slots=True)
class Refuse:
    """The provider's safety system stopped the model."""


@dataclass(frozen=True, slots=True)
class CutOff:
    """The output limit was hit: in this text, or in a tool call whose code then never arrived."""

    text: str = ""


@dataclass(frozen=True, slots=True)
class TwoCells:
    """Two tool calls in one reply, although only one was allowed."""

    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Raw:
    """Any reply at all, block by block."""

    content: tuple[Block, ...]
    stop: StopReason


@dataclass(frozen=True, slots=True)
class Fail:
    """The attempt fails, so many times; the next one goes on behind it."""

    error: ModelError
    times: int = 1


@dataclass(frozen=True, slots=True)
class Wait:
    """The provider takes its time; then the script goes on."""

    seconds: float


Step: TypeAlias = str | Cell | Say | Refuse | CutOff | TwoCells | Raw | Fail | Wait


def load_script(path: Path) -> ModuleType:
    """Run a script's file as a module.

    Raises:
        InvalidRequestError: There is no such file, or it is no Python module with a `run` or `complete`.
    """
    spec = importlib.util.spec_from_file_location(f"rlm_script_{path.stem}", path)
    if spec is None or spec.loader is None or not path.is_file():
        raise InvalidRequestError(f"there is no Python script at {path}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        what = f"{type(error).__name__}: {error}"
        raise InvalidRequestError(f"the script {path} does not load: {what}") from error
    if not hasattr(module, "run") and not hasattr(module, "complete"):
        raise InvalidRequestError(f"the script {path} has neither run(question, depth) nor complete(prompt)")
    return module


# --- The client ----------------------------------------------------------------------------------------


class ScriptedClient:
    """A `ModelClient` that plays a script."""

    def __init__(self, script: object) -> None:
        """`script` is a module, or anything else with a `run` and a `complete`."""
        self._script = script
        self._in_flight = InFlight()
        # The one thing remembered: how often a step that leaves no trace was played at a point of a run.
        self._played: Counter[tuple[str, int, int]] = Counter()

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`."""
        is_turn = request.python_tool or bool(request.system)
        async with self._in_flight.attempt(request.timeout_s):
            reply = await (self._turn(request) if is_turn else self._sub_call(request))
        return Completion(reply, _usage(request, reply))

    async def aclose(self) -> None:
        """See `ModelClient`."""
        await self._in_flight.close()

    async def _sub_call(self, request: ModelRequest) -> Reply:
        try:
            answer = self._part("complete")(_told(request.conversation))
            if inspect.isawaitable(answer):
                answer = await answer
        except ModelError:
            raise
        except Exception as error:
            raise _raised("complete()", error) from error
        match answer:
            case str(text) | Say(text):
                return _stopped(_sub_call_reply(text, request.max_tokens), request.stop_sequences)
            case Refuse():
                return _REFUSAL
            case Fail(failure):
                raise failure
        raise _broken(f"complete() returned {type(answer).__name__}, not text")

    async def _turn(self, request: ModelRequest) -> Reply:
        dialect = Dialect.TOOLS if request.python_tool else Dialect.FENCES
        question, depth = task_of(request.conversation)
        player = self._part("run")(question, depth)
        if not inspect.isgenerator(player):
            raise _broken("run() is not a generator function: it must yield at least one step")
        step = _next(player, None)
        rounds = _rounds(request.conversation)
        for turn, (recorded, told) in enumerate(rounds):
            while _leaves_no_trace(step):
                step = _next(player, "")
            if recorded is None:
                is_same = _is_removed(step)
            else:
                played = _stopped(_reply(step, turn, dialect), request.stop_sequences)
                is_same = _same(recorded, what_counts(played, dialect))
            if not is_same:
                raise _broken(
                    f"at turn {turn + 1} the script does not do what it did the first time;"
                    " it may depend on nothing but its question, its depth and the latest report"
                )
            if isinstance(step, _Returned):
                raise _broken(f"run() returned its answer at turn {turn + 1} and was asked to go on")
            step = _next(player, told)
        traceless = 0
        while _leaves_no_trace(step):
            traceless += 1
            if await self._plays_now(step, (_fingerprint(request.conversation), len(rounds), traceless)):
                break
            step = _next(player, "")
        player.close()
        reply = _stopped(_reply(step, len(rounds), dialect), request.stop_sequences)
        if _tokens(_size(reply)) > request.max_tokens:
            raise _broken(f"its reply at turn {len(rounds) + 1} is longer than {request.max_tokens} tokens")
        return reply

    async def _plays_now(self, step: "Step | _Returned", point: tuple[str, int, int]) -> bool:
        """Whether the step is this turn's reply. It is not when it was played before, or was a wait."""
        if isinstance(step, Wait):
            await asyncio.sleep(step.seconds)
            return False
        times = step.times if isinstance(step, Fail) else 1
        if self._played[point] == times:
            return False
        self._played[point] += 1
        if isinstance(step, Fail):
            raise step.error
        return True

    def _part(self, name: str) -> Callable[..., Any]:
        part: Callable[..., Any] | None = getattr(self._script, name, None)
        if part is None:
            raise _broken(f"it has no {name}()")
        return part


# --- The task in the first entry -----------------------------------------------------------------------

_QUESTION = re.compile(r"<question>\s*(.*)\s*</question>", re.DOTALL)
_DEPTH = re.compile(r"^\s*depth:\s*(\d{1,3})\b", re.MULTILINE | re.IGNORECASE)


def task_of(conversation: Conversation) -> tuple[str, int]:
    """The question and the depth, as the first entry tells them.

    The entry holds `<question>`, the question, `</question>`, and outside of it a line `Depth: N`.
    """
    first = conversation[0] if conversation else None
    if not isinstance(first, Told):
        raise _broken("the conversation does not begin with a task")
    question = _QUESTION.search(first.text)
    if question is None:
        raise _broken("the task has no <question>...</question>")
    # The question may hold anything, a line about depth included.
    depth = _DEPTH.search(first.text[: question.start()] + "\n" + first.text[question.end() :])
    if depth is None:
        raise _broken("the task has no line 'Depth: N'")
    return question[1].strip(), int(depth[1])


# --- Steps and replies ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Returned:
    text: str


_REFUSAL = Reply((), StopReason.REFUSAL)
_REMOVAL_NOTES = (prompts.REPLY_EMPTY, prompts.REPLY_REFUSED)


def _next(player: Generator[Any, Any, Any], sent: str | None) -> "Step | _Returned":
    """The next thing the script does. Its exceptions are its author's to see."""
    try:
        step = next(player) if sent is None else player.send(sent)
    except StopIteration as end:
        if not isinstance(end.value, str):
            raise _broken("run() ended without returning an answer") from None
        return _Returned(end.value)
    except Exception as error:
        raise _raised("run()", error) from error
    if not isinstance(step, Step):
        raise _broken(f"run() yielded {type(step).__name__}, which is no step")
    return step


def _leaves_no_trace(step: "Step | _Returned") -> bool:
    """Whether the conversation afterwards is as if it had never been played."""
    return isinstance(step, Fail | Wait) or (isinstance(step, Raw) and step.stop is StopReason.WINDOW_FULL)


def _is_removed(step: "Step | _Returned") -> bool:
    """Whether the loop keeps only its own note about such a reply."""
    return isinstance(step, Refuse) or step == Say("")


def _reply(step: "Step | _Returned", turn: int, dialect: Dialect) -> Reply:
    match step:
        case str(code):
            return _cells(turn, dialect, code)
        case Cell(code, text):
            return _cells(turn, dialect, code, text=text)
        case TwoCells(first, second):
            return _cells(turn, dialect, first, second)
        case _Returned(text) if dialect is Dialect.FENCES:
            return _cells(turn, dialect, f"FINAL({text!r})")
        case Say(text) | _Returned(text):
            return Reply(_text(text), StopReason.END_TURN)
        case Refuse():
            return _REFUSAL
        case CutOff(""):
            torn = _call(turn, 1, {}) if dialect is Dialect.TOOLS else _text("```repl\nx = ")[0]
            return Reply((torn,), StopReason.MAX_TOKENS)
        case CutOff(text):
            return Reply(_text(text), StopReason.MAX_TOKENS)
        case Raw(content, stop):
            return Reply(content, stop)
    raise AssertionError(f"{step!r} is played before it gets here")


def _cells(turn: int, dialect: Dialect, *codes: str, text: str = "") -> Reply:
    if dialect is Dialect.FENCES:
        words = (text, *(f"```repl\n{code}\n```" for code in codes))
        return Reply(_text("\n".join(filter(None, words))), StopReason.END_TURN)
    calls = (_call(turn, number, {"code": code}) for number, code in enumerate(codes, 1))
    return Reply((*_text(text), *calls), StopReason.TOOL_USE)


def _stopped(reply: Reply, stop_sequences: Sequence[str]) -> Reply:
    """The reply as a provider ends it."""
    said: list[Block] = []
    for block in reply.content:
        text = str(block.get("text", ""))
        stops = [at for at in map(text.find, stop_sequences) if at >= 0]
        if stops:
            return Reply((*said, *_text(text[: min(stops)])), StopReason.STOP_SEQUENCE)
        said.append(block)
    return reply


def _sub_call_reply(text: str, max_tokens: int) -> Reply:
    """The text, cut like a provider cuts it."""
    room = max_tokens * BYTES_PER_TOKEN
    cut = text.encode("utf-8", "replace")[:room].decode(errors="ignore")
    return Reply(_text(cut), StopReason.END_TURN if cut == text else StopReason.MAX_TOKENS)


def _text(text: str) -> tuple[Block, ...]:
    return ({"type": "text", "text": text},) if text else ()


def _call(turn: int, number: int, argument: dict[str, str]) -> Block:
    call_id = f"toolu_scripted_{turn + 1}_{number}"
    return {"type": "tool_use", "id": call_id, "name": PYTHON_TOOL, "input": argument}


def _rounds(conversation: Conversation) -> list[tuple[Reply | None, str]]:
    """Every reply so far, None where the loop removed it, with what was told after it."""
    rounds: list[tuple[Reply | None, list[str]]] = []
    for before, entry in pairwise(conversation):
        if isinstance(entry, Reply):
            rounds.append((entry, []))
        elif entry.text in _REMOVAL_NOTES and not isinstance(before, Reply):
            rounds.append((None, [entry.text]))
        elif rounds:
            is_fenced = isinstance(entry, CellReport)
            rounds[-1][1].append(prompts.report_in(entry.text) if is_fenced else entry.text)
    return [(reply, "\n\n".join(since)) for reply, since in rounds]


def _same(recorded: Reply, played: Reply) -> bool:
    """Compared as JSON: a record that was stored and read back has lists for tuples."""
    return recorded.stop is played.stop and _as_json(recorded) == _as_json(played)


def _as_json(reply: Reply) -> str:
    return json.dumps(reply.content, default=dict, ensure_ascii=False, sort_keys=True)


def _fingerprint(conversation: Conversation) -> str:
    """Of the task and the replies: what is told in between may be elided later."""
    said = [_as_json(entry) for entry in conversation if isinstance(entry, Reply)]
    return hashlib.sha256("\0".join((_told(conversation[:1]), *said)).encode("utf-8", "replace")).hexdigest()


def _told(entries: Conversation) -> str:
    return "\n\n".join(entry.text for entry in entries)


# --- Usage ---------------------------------------------------------------------------------------------


def _usage(request: ModelRequest, reply: Reply) -> Usage:
    """Tokens by length. A turn reads from cache what the turn before it sent, and writes the rest."""
    sizes = [_bytes(request.system), *map(_size, request.conversation)]
    total, output = _tokens(sum(sizes)), _tokens(_size(reply))
    if not request.system:
        return Usage(input=total, output=output)
    replies = [n for n, entry in enumerate(request.conversation) if isinstance(entry, Reply)]
    read = _tokens(sum(sizes[: replies[-1] + 1])) if replies else 0
    return Usage(cache_read=read, cache_write=total - read, output=output)


def _size(entry: Entry) -> int:
    if isinstance(entry, Reply):
        other = [dict(block) for block in entry.content if block["type"] != "text"]
        return _bytes(entry.text) + (_bytes(json.dumps(other, ensure_ascii=False)) if other else 0)
    return _bytes(entry.text)


def _bytes(text: str) -> int:
    return len(text.encode("utf-8", "replace"))


def _tokens(size_bytes: int) -> int:
    return -(-size_bytes // BYTES_PER_TOKEN)


def _broken(what: str) -> ModelError:
    return ModelError(f"the script is wrong: {what}", billing=Billing.NOTHING, retryable=False)


def _raised(where: str, error: Exception) -> ModelError:
    """Without the exception's text, which may quote a prompt; the cause is chained."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    line = f" at line {frame.tb_lineno}" if frame is not None else ""
    return _broken(f"{where} raised {type(error).__name__}{line}")
