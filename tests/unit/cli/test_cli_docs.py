"""The documents say what the code writes."""

import dataclasses
import re
import typing
from collections.abc import Mapping
from pathlib import Path

import pytest
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.budget import Amounts
from orchestrator.cells import CellOutcome
from orchestrator.cli.remote import shapes
from orchestrator.cli.report import as_json
from orchestrator.client import Uploaded, messages, values
from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.pricing import Usage
from orchestrator.run_report import RunReport
from orchestrator.trajectory import INLINE_BYTES, VERSION, Blob, Event, Payload, RunEnded, Tally, Text
from orchestrator.turn import Outcome
from tests.unit.cli import hostile
from tests.unit.cli.story import ROOT

_DOCS = Path(__file__).parents[3] / "docs"
_EVENTS = (_DOCS / "events.md").read_text()
_COMMAND_LINE = (_DOCS / "command-line.md").read_text()
_CLIENT = (_DOCS / "client.md").read_text()

_TYPES: Mapping[object, str] = {
    str: "string",
    bool: "boolean",
    int: "integer",
    float: "number",
    Text: "text",
    Text | None: "text or null",
    RunId: "string",
    RunId | None: "string or null",
    Amounts: "amounts",
    Usage: "usage",
    tuple[str, ...]: "array of strings",
    Mapping[str, int]: "object",
    Mapping[str, float]: "object",
}


def _tables() -> dict[str, list[tuple[str, str]]]:
    """Fields and types by the name of the section they stand in."""
    tables: dict[str, list[tuple[str, str]]] = {}
    section = ""
    for line in _EVENTS.splitlines():
        if heading := re.fullmatch(r"#+ `?([\w ]+)`?", line):
            section = heading[1]
        elif row := re.fullmatch(r"\| `(\w+)` \| ([^|]+) \| [^|]+ \|", line):
            tables.setdefault(section, []).append((row[1], row[2]))
    return tables


@pytest.mark.parametrize("kind", hostile.payload_kinds, ids=lambda kind: kind.KIND)
def test_every_kind_of_event_is_documented_field_by_field(kind: type[Payload]) -> None:
    hints = typing.get_type_hints(kind)
    expected = [(item.name, _TYPES[hints[item.name]]) for item in dataclasses.fields(kind)]
    assert _tables()[kind.KIND] == expected


def test_no_kind_is_documented_that_does_not_exist() -> None:
    assert set(_tables()) - {"Every event"} == {kind.KIND for kind in hostile.payload_kinds}


def test_what_every_event_has_is_documented() -> None:
    ended = RunEnded(outcome="answered", answer=None, error="", turns=1, duration_s=1.0)
    common = [name for name in Event(ROOT, 0, 0.0, ended).to_json() if not hasattr(ended, name)]
    assert [name for name, _type in _tables()["Every event"]] == common
    assert f"Version {VERSION}." in _EVENTS
    assert f"{INLINE_BYTES:,} bytes" in _EVENTS


@pytest.mark.parametrize("shape", [Blob, Amounts, Usage])
def test_the_parts_of_composed_types_are_documented(shape: type) -> None:
    flat = " ".join(_EVENTS.split())
    parts = [rf'"{name}": (?:string|integer)' for name in typing.get_type_hints(shape)]
    assert re.search(r"\{" + ", ".join(parts) + r"\}", flat)


@pytest.mark.parametrize("outcome", [*Outcome, *CellOutcome])
def test_every_outcome_is_documented(outcome: Outcome | CellOutcome) -> None:
    assert f"`{outcome.value}`" in _EVENTS


def test_every_key_of_the_json_object_is_documented() -> None:
    report = RunReport(
        run_id=ROOT,
        outcome=Outcome.ANSWERED,
        answer="",
        error="",
        found_so_far="",
        tally=Tally(),
        limits=RunLimits(),
        duration_s=0.0,
        context_bytes=0,
        notes=(),
    )
    shown = as_json(report)
    assert isinstance(shown["usage"], dict)
    assert isinstance(shown["limits"], dict)
    documented = set(re.findall(r"`(?:usage\.)?(\w+)`", _COMMAND_LINE))
    assert {*shown, *shown["usage"], *shown["limits"], *(outcome.value for outcome in Outcome)} <= documented


def test_every_key_of_what_a_server_keeps_is_documented() -> None:
    run = shapes.run_object(messages.run_from_wire(pb.Run(options=pb.RunOptions(model="m"))))
    keys = {
        *run,
        *shapes.context_object(messages.context_from_wire(pb.Context())),
        *shapes.uploaded_object(Uploaded(context_id="", name="", length_bytes=0, sha256="", existed=False)),
        *shapes.usage_object(values.Usage()),
    }
    assert keys <= set(re.findall(r"`(\w+)`", _CLIENT))
