import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from orchestrator.cli.events_file import EventsFile
from orchestrator.errors import InvalidRequestError
from orchestrator.trajectory import Event
from tests.unit.cli import hostile
from tests.unit.cli.story import Story


def _ignore(_line: str) -> None: ...


def test_each_event_is_on_its_line_as_soon_as_it_has_happened(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    file = EventsFile(path, inputs=[], warn=_ignore)
    story = Story()
    for event in (story.start(), story.end()):
        file(event)
        last_line = path.read_text().splitlines()[-1]
        assert json.loads(last_line) == event.to_json()
    file.close()
    assert len(path.read_text().splitlines()) == 2


def test_an_earlier_file_survives_until_the_first_event(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text("an earlier run, longer than one event" * 100)
    file = EventsFile(path, inputs=[], warn=_ignore)
    assert path.read_text().startswith("an earlier run")
    file(Story().start())
    file.close()
    assert len(path.read_text().splitlines()) == 1


def test_the_file_is_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    EventsFile(path, inputs=[], warn=_ignore).close()
    assert path.stat().st_mode & 0o077 == 0


def test_a_file_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match="cannot write --events"):
        EventsFile(tmp_path / "missing" / "events.jsonl", inputs=[], warn=_ignore)
    with pytest.raises(InvalidRequestError, match="cannot write --events"):
        EventsFile(tmp_path, inputs=[], warn=_ignore)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InvalidRequestError, match="cannot write --events"):
        EventsFile(tmp_path / "pipe", inputs=[], warn=_ignore)


def test_the_context_is_never_overwritten(tmp_path: Path) -> None:
    context = tmp_path / "log.txt"
    context.write_text("precious")
    link = tmp_path / "events.jsonl"
    link.symlink_to(context)
    with pytest.raises(InvalidRequestError, match="would overwrite the context"):
        EventsFile(link, inputs=[tmp_path / "missing", context], warn=_ignore)
    assert context.read_text() == "precious"


def test_a_full_disk_is_told_once_and_the_run_goes_on() -> None:
    warnings: list[str] = []
    file = EventsFile(Path("/dev/full"), inputs=[], warn=warnings.append)
    story = Story()
    for event in (story.start(), story.end()):
        file(event)
    file.close()
    assert len(warnings) == 1
    assert "No space left" in warnings[0]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(event=hostile.events)
def test_no_control_character_reaches_the_file_raw(tmp_path: Path, event: Event) -> None:
    path = tmp_path / "events.jsonl"
    file = EventsFile(path, inputs=[], warn=_ignore)
    file(event)
    file.close()
    line = path.read_bytes()
    assert line.endswith(b"\n")
    assert all(0x20 <= byte < 0x7F for byte in line[:-1])
    assert json.loads(line)["kind"] == event.kind
