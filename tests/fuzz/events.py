"""Events: what is written of them reads back as it was, and everything that reads them holds.

Input: lines of an events file. What does not fit a field is made to; everything else may be in it.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Iterator
from typing import Any, cast

from orchestrator import trajectory
from orchestrator.budget import Amounts
from orchestrator.cli.frame import frame
from orchestrator.cli.json_line import json_line
from orchestrator.cli.plain import PlainLines
from orchestrator.cli.tree import RunTree
from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.pricing import Usage
from orchestrator.trajectory import Blob, Event, Payload, Tally, settle_after_crash
from orchestrator.visible import visible, visible_line
from tests.unit.cli.story import Story

_KINDS: dict[str, type[Payload]] = {kind.KIND: kind for kind in typing.get_args(trajectory.Payload)}
_HINTS = {kind: typing.get_type_hints(kind) for kind in _KINDS.values()}
_HEIGHT = 12
_MOST_EVENTS = 50


def one_input(data: bytes) -> None:
    """Written, read, folded, drawn and told, without an exception or a control character."""
    events = []
    for line in data.split(b"\n")[:_MOST_EVENTS]:
        try:
            said = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(said, dict) and str(said.get("kind")) in _KINDS:
            events.append(_event(said))
    tree = RunTree()
    plain = PlainLines(tree)
    for event in events:
        written = json_line(event.to_json())
        assert len(written.splitlines()) == 1
        assert written.isascii()
        assert written.isprintable()
        assert _event(json.loads(written)) == _without_halves(event), "it reads back as it was written"
        tree.add(event)
        for text in plain.lines(event):
            assert len(visible_line(text, 400).splitlines()) <= 1
    rows = frame(tree, limits=RunLimits(), now=2e9, height=_HEIGHT, status="x")
    assert len(rows) <= _HEIGHT
    assert all(visible(row.text) == row.text for row in rows)
    assert Tally.of(events) == tree.tally
    left_open = settle_after_crash(events)
    settled = [Event(run_id, 0, 0.0, payload) for run_id, payload in left_open]
    assert not settle_after_crash([*events, *settled])


def _event(said: dict[str, object]) -> Event:
    kind = _KINDS[str(said["kind"])]
    fields: dict[str, Any] = {
        item.name: _fit(_HINTS[kind][item.name], said.get(item.name)) for item in dataclasses.fields(kind)
    }
    return Event(
        RunId(_text(said.get("run_id"))),
        _whole(said.get("seq")),
        round(_number(said.get("at")), 6),
        kind(**fields),
    )


def _fit(hint: object, value: object) -> object:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        parts = typing.get_args(hint)
        if value is None and type(None) in parts:
            return None
        if Blob in parts and isinstance(value, dict):
            return _fit(Blob, value)
        return _fit(str if str in parts else parts[0], value)
    if hint is bool:
        return bool(value)
    if hint is int:
        return _whole(value)
    if hint is float:
        return _number(value)
    if hint in {Amounts, Usage}:
        amounts = value if isinstance(value, dict) else {}
        known = cast(type[Amounts], hint)  # or Usage, which has its fields too
        return known(*(_whole(amounts.get(name)) for name in known._fields))
    if hint is Blob:
        blob = value if isinstance(value, dict) else {}
        return Blob(_text(blob.get("head")), _whole(blob.get("length_bytes")), _text(blob.get("sha256")))
    if typing.get_origin(hint) is tuple:
        return tuple(map(_text, value)) if isinstance(value, list) else ()
    if hint in {str, RunId}:
        return _text(value)
    if isinstance(value, dict):
        return {_text(name): _number(amount) for name, amount in value.items()}
    return {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _whole(value: object) -> int:
    return value % 10**12 if isinstance(value, int) else 0


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, int | float) else 0.0
    except OverflowError:
        return 0.0
    return number % 1e9 if math.isfinite(number) else 0.0


def _without_halves(event: Event) -> Event:
    """JSON joins the two halves of a character that stand side by side; nothing else changes."""
    return _event(json.loads(json.dumps(event.to_json())))


def seeds() -> Iterator[bytes]:
    """A small story, whole and in parts."""
    story = Story()
    story.start(question="why?")
    story.turn(1, code="print(llm_query('x'))")
    story.pays("c1")
    story.cell_ends(1, output="half an answer\n")
    story.turn(2, code="print('\x1b]0;evil\x07')")
    story.end()
    lines = [json_line(event.to_json()) for event in story.events]
    yield "\n".join(lines).encode()
    yield from (line.encode() for line in dict.fromkeys(lines))
    hostile = {
        "kind": "cell_ended",
        "output": "\ud83d\ude00\ud800\u2028\x1b[2J\x00",
        "lost_variables": ["\r"],
    }
    yield "\n".join([lines[0], json.dumps(hostile)]).encode()
    for kind in _KINDS:
        yield json.dumps({"v": 1, "run_id": "r", "seq": 0, "at": 1.5, "kind": kind}).encode()
