import io
import sys
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from orchestrator import trajectory
from orchestrator.cli.plain import PlainLines
from orchestrator.cli.tree import RunTree
from orchestrator.trajectory import Blob, Event
from tests.unit.cli import hostile
from tests.unit.cli.story import ROOT, Story, unsafe_characters


def _lines(events: list[Event]) -> list[str]:
    tree = RunTree()
    plain = PlainLines(tree)
    lines: list[str] = []
    for event in events:
        tree.add(event)
        lines += plain.lines(event)
    return lines


def test_a_turn_is_three_lines_however_many_sub_calls_it_makes() -> None:
    story = Story()
    story.start()
    story.turn(1, code="a = 1\nb = 2")
    for number in range(1_000):
        story.sub_call_starts(f"c{number}")
        story.sub_call_ends(f"c{number}", error="refused" if number == 5 else "")
    story.sub_call_starts("child", what="child_run")
    story.sub_call_ends("child")
    story.cell_ends(1, output="done\n")
    texts = [line.partition(" s  ")[2] for line in _lines(story.events)]
    assert texts == [
        "root       started: big-model, sub-calls small-model",
        "root       turn 1: asking the model (2,000 bytes)",
        "root       turn 1: cell, 2 lines: a = 1\\nb = 2",
        "root       turn 1: cell ok after 0.3 s, 5 bytes of output;"
        " sub-calls: 999 done, 1 failed; child runs: 1 done",
    ]


def test_of_a_child_run_only_start_and_end_are_told() -> None:
    story = Story()
    story.start()
    run_id = story.child(1, question="which?")
    story.turn(1, run_id=run_id)
    story.cell_ends(1, run_id=run_id)
    story.wait(2)
    story.end("turn_limit", "no answer within 1 turns", run_id=run_id)
    texts = [line.strip() for line in _lines(story.events)[1:]]
    assert texts == [
        "0.0 s  child 1    started at depth 1: “which?”",
        "2.0 s  child 1    turn_limit after 1 turn, 3.0 s: no answer within 1 turns",
    ]


def test_a_long_silence_is_broken_every_ten_seconds() -> None:
    story = Story()
    story.start()
    story.turn(1)
    for number in range(100):
        story.wait(1)
        story.sub_call_starts(f"c{number}")
    lines = _lines(story.events)
    assert len(lines) == 3 + 10
    assert "turn 1: cell running; sub-calls: 10 in flight; used" not in lines[3]
    assert "turn 1: cell running; sub-calls: 10 in flight; 0 tokens" in lines[3]


def test_a_failed_cell_shows_the_last_line_of_its_traceback() -> None:
    story = Story()
    story.start()
    story.turn(1)
    story.tell(
        trajectory.CellEnded(
            turn=1,
            outcome="killed",
            output="",
            output_bytes=0,
            cut_bytes=0,
            traceback="Traceback\n  line 1\nValueError: no\n",
            status=0,
            lost_variables=("a", "b"),
            duration_s=61.0,
            guest_s=61.0,
        )
    )
    assert _lines(story.events)[-1].endswith("cell killed after 1:01; 2 variables lost: ValueError: no")


def test_a_lost_sandbox_and_what_was_used_up_are_told() -> None:
    story = Story()
    story.start()
    story.turn(1)
    story.sandbox_goes(1, "out_of_memory")
    assert _lines(story.events)[-1].endswith("cell sandbox_lost after 0.3 s, sandbox lost: out of memory")
    story.turn(2)
    story.sandbox_goes(2, "", "memory", "tmp_bytes")
    assert _lines(story.events)[-1].endswith("cell ok after 0.3 s, used up: memory, tmp bytes")


def test_compaction_is_told() -> None:
    story = Story()
    story.start()
    story.tell(trajectory.HistoryCompacted(turn=3, reports=2, freed_bytes=40_000))
    assert (
        "turn 3: old output taken out of the conversation: 2 reports, 40,000 bytes"
        in _lines(story.events)[-1]
    )


def test_a_guest_that_misbehaved_is_told() -> None:
    story = Story()
    story.start()
    counts = {"malformed messages": 101, "refused calls": 2_000}
    story.tell(trajectory.GuestMisbehaved(counts=counts, unrecorded_refusals=0))
    assert "misbehaved on its socket: 101 malformed messages, 2,000 refused calls" in _lines(story.events)[-1]


def test_lines_of_a_scripted_run_are_labelled() -> None:
    story = Story(model="scripted:demo.py")
    story.start()
    story.turn(1)
    run_id = story.child(1)
    story.end(run_id=run_id)
    story.wait(11)
    story.sub_call_starts("c")
    lines = _lines(story.events)
    assert len(lines) == 6
    assert all(line.startswith("[scripted] ") for line in lines)


def test_a_long_question_is_cut() -> None:
    story = Story()
    story.start()
    story.tell(
        trajectory.RunStarted(
            question=Blob("x" * 4_000, 9_000, "0" * 64),
            context="",
            model="m",
            sub_model="",
            depth=1,
            parent=ROOT,
            parent_call="c",
            limits={},
        ),
        run_id=story.child(1),
    )
    assert len(_lines(story.events)[-1]) < 200


@given(st.lists(hostile.events, max_size=25), hostile.texts)
def test_no_terminal_control_character_is_ever_written(events: list[Event], said: str) -> None:
    stream = io.StringIO()
    tree = RunTree()
    with patch.object(sys, "stderr", stream):
        plain = PlainLines(tree)
        plain.say(said)
        plain.warn(said)
        for event in events:
            tree.add(event)
            plain.on_event(event)
    assert not list(unsafe_characters(stream.getvalue()))
    assert stream.getvalue().count("\n") <= 2 + said.count("\n") + len(events)
