from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cli.frame import Row, frame
from orchestrator.cli.tree import RunTree
from orchestrator.limits import RunLimits
from orchestrator.trajectory import Event
from tests.unit.cli import hostile
from tests.unit.cli.story import Story, unsafe_characters


def _frame(events: list[Event], *, height: int = 40, now: float = 1_005.0, status: str = "") -> list[Row]:
    tree = RunTree()
    for event in events:
        tree.add(event)
    return frame(tree, limits=RunLimits(), now=now, height=height, status=status)


def _text(rows: list[Row]) -> str:
    return "\n".join(row.text for row in rows)


def test_before_the_run_begins_only_what_is_waited_for_is_shown() -> None:
    assert _text(_frame([], status="staging the context")) == "staging the context"


def test_a_running_cell_is_shown_with_its_code_and_sub_calls() -> None:
    story = Story()
    story.start()
    story.turn(2, code="rows = parse(context)\nprint(rows)")
    for number in range(5):
        story.sub_call_starts(f"c{number}")
    story.sub_call_ends("c0")
    story.sub_call_ends("c1", error="refused")
    story.pays("c0", tokens=1_234, microusd=70_000)
    text = _text(_frame(story.events))
    assert "root · big-model · turn 2 of 40 · cell running for 5.0 s" in text
    assert "│ rows = parse(context)\n" in text
    assert "sub-calls: 1 done, 3 in flight, 1 failed" in text
    assert "used  1,234 tokens · $0.0700 · 1 model call · 0 child runs" in text
    assert "left  4,998,766 tokens · $4.9300 · 999 model calls · 100 child runs · 59:55" in text


def test_a_lost_sandbox_is_shown_until_the_next_cell_runs() -> None:
    story = Story()
    story.start()
    story.turn(1)
    story.sandbox_goes(1, "engine_gone")
    assert "sandbox lost: engine gone" in _text(_frame(story.events))
    story.turn(2)
    assert "sandbox lost" not in _text(_frame(story.events))


def test_the_counts_are_those_of_the_cell_that_runs() -> None:
    story = Story()
    story.start()
    story.turn(1)
    story.sub_call_starts("late")
    story.cell_ends(1)
    story.turn(2)
    story.sub_call_ends("late")
    assert "sub-calls" not in _text(_frame(story.events))


def test_unconfirmed_usage_is_named_apart() -> None:
    story = Story()
    story.start()
    story.pays("c1", tokens=100, microusd=10_000, unconfirmed=True)
    assert "(of these unconfirmed: 100 tokens, $0.0100)" in _text(_frame(story.events))


def test_hundreds_of_child_runs_are_folded_and_those_that_run_stay() -> None:
    story = Story()
    story.start()
    story.turn(1)
    children = [story.child(number) for number in range(300)]
    for number, run_id in enumerate(children):
        if number not in {7, 250}:
            story.end("turn_limit" if number == 100 else "answered", run_id=run_id)
    rows = _frame(story.events, height=24)
    text = _text(rows)
    assert len(rows) <= 24
    assert "child 8 ·" in text
    assert "child 251 ·" in text
    assert "child 101 · turn_limit" in text
    assert "more child runs: " in text
    shown = text.count("child ") - text.count("more child runs") - 2
    assert f"{300 - shown} more child runs: {300 - shown} answered" in text


def test_a_child_run_of_a_child_run_stands_below_it() -> None:
    story = Story()
    story.start()
    first = story.child(1)
    story.start(story.child(99), parent=first, depth=2)
    assert "    child 1.1 ·" in _text(_frame(story.events))


def test_an_ended_run_says_how_and_why() -> None:
    story = Story()
    story.start()
    story.turn(1)
    story.wait(4)
    story.end("deadline", "the deadline passed")
    text = _text(_frame(story.events, now=9_999.0))
    assert "root · big-model · deadline after 1 turn, 4.0 s: the deadline passed" in text
    assert "print(1)" not in text


def test_what_a_script_said_or_did_is_labelled() -> None:
    story = Story(model="scripted:demo.py")
    story.start()
    story.turn(1, code="a\nb\n" * 30)
    story.sub_call_starts("c")
    for number in range(30):
        story.child(number)
    rows = _frame(story.events, height=20)
    assert all(row.text.startswith("[scripted] ") for row in rows[:-2])
    assert [row.text[:4] for row in rows[-2:]] == ["used", "left"]


def test_a_run_whose_sub_calls_are_scripted_is_labelled_too() -> None:
    story = Story(sub_model="scripted:demo.py")
    story.start()
    assert _frame(story.events)[0].text.startswith("[scripted] ")


@given(
    height=st.integers(-1, 60),
    code_lines=st.integers(1, 100),
    children=st.integers(0, 60),
    grandchildren=st.integers(0, 20),
)
def test_a_frame_is_never_higher_than_the_terminal(
    height: int, code_lines: int, children: int, grandchildren: int
) -> None:
    story = Story()
    story.start()
    story.turn(1, code="x = 1\n" * code_lines)
    for number in range(children):
        parent = story.child(number)
        story.turn(1, code="y = 2\n" * code_lines, run_id=parent)
        if number < 3:
            for below in range(grandchildren):
                run_id = story.child(1_000 + number * 100 + below)
                story.start(run_id, parent=parent, depth=2)
    rows = _frame(story.events, height=height, status="waiting")
    assert len(rows) <= max(0, height)
    assert not any("\n" in row.text for row in rows)
    if height >= 3:
        assert rows[-1].text.startswith("left")


@given(st.lists(hostile.events, max_size=25), hostile.texts)
def test_no_terminal_control_character_is_ever_in_a_frame(events: list[Event], status: str) -> None:
    for row in _frame(events, now=1.7e9, status=status):
        assert not list(unsafe_characters(row.text))
        assert "\n" not in row.text
