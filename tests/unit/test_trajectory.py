import dataclasses
import hashlib
import json
import typing
from collections.abc import Mapping
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import trajectory
from orchestrator.budget import Amounts
from orchestrator.ids import RunId
from orchestrator.pricing import Usage
from orchestrator.trajectory import (
    INLINE_BYTES,
    Blob,
    CallHeld,
    CallSettled,
    Event,
    Payload,
    RunEnded,
    RunStarted,
    SubCallEnded,
    SubCallStarted,
    Tally,
    TurnStarted,
    shorten,
)

ROOT, CHILD = RunId("r0"), RunId("r1")
any_text = st.text(alphabet=st.characters(), max_size=60)


# --- Long texts -------------------------------------------------------------------------------------------


def test_a_text_of_the_inline_size_stays_in_its_event() -> None:
    text = "x" * INLINE_BYTES
    assert shorten(text) == (text, None)


def test_a_longer_text_becomes_a_head_and_the_hash_of_the_whole() -> None:
    text = "x" * (INLINE_BYTES + 1)
    data = text.encode()
    assert shorten(text) == (Blob("x" * INLINE_BYTES, len(data), hashlib.sha256(data).hexdigest()), data)


@given(st.text(alphabet="a€😀\ud800", min_size=1_000, max_size=6_000))
def test_a_head_is_the_beginning_and_no_character_is_cut(text: str) -> None:
    short, data = shorten(text)
    sent = text.replace("\ud800", "?")
    if isinstance(short, Blob):
        assert data == sent.encode()
        assert sent.startswith(short.head)
        assert INLINE_BYTES - 4 < len(short.head.encode()) <= INLINE_BYTES
        assert short.length_bytes == len(sent.encode())
    else:
        assert (short, data) == (sent, None)
        assert len(sent.encode()) <= INLINE_BYTES


# --- JSON -------------------------------------------------------------------------------------------------


def payloads(text: st.SearchStrategy[str]) -> st.SearchStrategy[Payload]:
    """Any payload, with this text wherever there can be text."""
    amounts = st.builds(Amounts, *[st.integers(0, 2**62)] * 4)
    by_type: dict[object, st.SearchStrategy[object]] = {
        str: text,
        bool: st.booleans(),
        int: st.integers(),
        float: st.floats(allow_nan=False, allow_infinity=False),
        Amounts: amounts,
        Usage: st.builds(Usage, *[st.integers(0, 2**40)] * 4),
        RunId | None: st.none() | st.just(ROOT),
        trajectory.Text: text.map(lambda words: shorten(words)[0]),
        trajectory.Text | None: st.none() | text.map(lambda words: shorten(words * 500)[0]),
        tuple[str, ...]: st.lists(text, max_size=3).map(tuple),
        Mapping[str, int]: st.dictionaries(text, st.integers(), max_size=2),
        typing.get_type_hints(RunStarted)["limits"]: st.just({"max_tokens": 5, "deadline_s": 1.5}),
    }
    kinds = []
    for kind in typing.get_args(Payload):
        hints = typing.get_type_hints(kind)
        fields = {item.name: by_type[hints[item.name]] for item in dataclasses.fields(kind)}
        kinds.append(st.builds(kind, **fields))
    return st.one_of(kinds)


@given(payloads(any_text))
def test_every_event_is_valid_json_whatever_text_is_in_it(payload: Payload) -> None:
    event = Event(ROOT, 3, 1_700_000_000.123456789, payload)
    line = json.dumps(event.to_json())
    assert "\n" not in line
    read = json.loads(line)
    assert {
        "v": 1,
        "run_id": "r0",
        "seq": 3,
        "at": 1_700_000_000.123457,
        "kind": payload.KIND,
    }.items() <= read.items()
    assert set(read) - {"v", "run_id", "seq", "at", "kind"} == {
        item.name for item in dataclasses.fields(payload)
    }


@given(payloads(any_text), st.integers(0, 2**40), st.integers(0, 2**31))
def test_every_event_is_read_back_as_it_was(payload: Payload, seq: int, at_ms: int) -> None:
    event = Event(ROOT, seq, at_ms / 1_000, payload)
    assert Event.from_json(event.to_json()) == event


@given(payloads(st.text(max_size=60)))
def test_every_event_of_whole_characters_survives_being_written_and_read(payload: Payload) -> None:
    event = Event(ROOT, 0, 0.5, payload)
    assert Event.from_json(json.loads(json.dumps(event.to_json()))) == event


A_TURN = Event(ROOT, 3, 1.5, TurnStarted(turn=2, request_bytes=9))


def test_fields_of_a_later_version_are_left_out() -> None:
    assert Event.from_json({**A_TURN.to_json(), "colour": "red"}) == A_TURN


def test_fields_that_an_older_version_did_not_have_get_their_defaults() -> None:
    event = Event(ROOT, 0, 0.0, started())
    said = event.to_json()
    del said["dialect"]
    assert Event.from_json(said) == event


@pytest.mark.parametrize(
    "changed",
    [
        {"v": 2},
        {"v": None},
        {"kind": "turn_stopped"},
        {"kind": None},
        {"run_id": 1},
        {"seq": True},
        {"seq": 1.0},
        {"at": "now"},
        {"turn": "2"},
        {"turn": None},
        {"request_bytes": []},
    ],
)
def test_what_is_no_event_is_not_read_as_one(changed: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"."):
        Event.from_json({**A_TURN.to_json(), **changed})


def test_an_event_without_a_needed_field_is_not_read() -> None:
    said = A_TURN.to_json()
    del said["request_bytes"]
    with pytest.raises(ValueError, match="a turn_started without request_bytes"):
        Event.from_json(said)


def test_every_kind_of_payload_has_a_name_of_its_own() -> None:
    names = [kind.KIND for kind in typing.get_args(Payload)]
    assert len(set(names)) == len(names)


def test_amounts_usage_and_blobs_are_objects_with_names() -> None:
    settled = CallSettled(
        call="turn-1",
        attempt=1,
        model="m",
        input_bound_tokens=9,
        usage=Usage(1, 2, 3, 4),
        confirmed=Amounts(10, 20, 1),
        unconfirmed=Amounts(),
        error="",
        duration_s=0.5,
    )
    read = Event(ROOT, 0, 0.0, settled).to_json()
    assert read["usage"] == {"input": 1, "cache_read": 2, "cache_write": 3, "output": 4}
    assert read["confirmed"] == {"tokens": 10, "cost_microusd": 20, "calls": 1, "child_runs": 0}
    ended = RunEnded(outcome="answered", answer=Blob("head", 9, "hash"), error="", turns=1, duration_s=1.0)
    assert Event(ROOT, 1, 0.0, ended).to_json()["answer"] == {
        "head": "head",
        "length_bytes": 9,
        "sha256": "hash",
    }


# --- The tally --------------------------------------------------------------------------------------------


def started(depth: int = 0, parent: RunId | None = None) -> RunStarted:
    return RunStarted(
        question="q",
        context="c",
        model="m",
        sub_model="m",
        depth=depth,
        parent=parent,
        parent_call="call-1" if parent else "",
        limits={},
    )


def settled(
    usage: Usage,
    confirmed: Amounts,
    unconfirmed: Amounts = Amounts(),  # noqa: B008 - a tuple
    *,
    model: str = "m",
    attempt: int = 1,
) -> CallSettled:
    return CallSettled(
        call="c",
        attempt=attempt,
        model=model,
        input_bound_tokens=60,
        usage=usage,
        confirmed=confirmed,
        unconfirmed=unconfirmed,
        error="",
        duration_s=0.0,
    )


HELD = CallHeld(call="c", attempt=1, model="m", input_bound_tokens=9, held=Amounts(9, 9, 1))


def _held(call: str) -> CallHeld:
    return replace(HELD, call=call)


SUB_CALL = SubCallStarted(
    call="c", turn=1, what="complete", model="m", prompt="p", request_hash="h", occurrence=0
)


def sub_call_ended(error: str = "", kind: str = "", *, memoised: bool = False) -> SubCallEnded:
    return SubCallEnded(call="c", answer="", error=error, error_kind=kind, memoised=memoised, duration_s=0.0)


def tally(*payloads: Payload | tuple[RunId, Payload]) -> Tally:
    """Of the root's events, or of those of the run named beside one."""
    events = []
    for seq, item in enumerate(payloads):
        run_id, payload = item if isinstance(item, tuple) else (ROOT, item)
        events.append(Event(run_id, seq, 0.0, payload))
    return Tally.of(events)


def test_usage_is_added_up_over_the_whole_tree() -> None:
    first = settled(Usage(1, 2, 3, 4), Amounts(10, 7, 1))
    second = settled(Usage(), Amounts(), Amounts(50, 30, 1))
    total = tally(started(), first, (CHILD, started(1, ROOT)), (CHILD, second), first)
    assert total.usage == Usage(2, 4, 6, 8)
    assert (total.confirmed, total.unconfirmed) == (Amounts(20, 14, 2), Amounts(50, 30, 1))


def test_turns_and_request_bytes_are_the_roots_alone() -> None:
    total = tally(
        started(),
        TurnStarted(turn=1, request_bytes=100),
        _held("turn-1"),
        (CHILD, started(1, ROOT)),
        (CHILD, TurnStarted(turn=7, request_bytes=900)),
        TurnStarted(turn=2, request_bytes=150),
        _held("2.1"),
        _held("turn-2"),
        TurnStarted(turn=3, request_bytes=1_000),
    )
    assert (total.root_turns, total.root_request_bytes) == (3, 250)


def test_child_runs_are_counted_and_the_depth_they_reach() -> None:
    grandchild = RunId("r2")
    total = tally(started(), (CHILD, started(1, ROOT)), (grandchild, started(2, CHILD)))
    assert (total.child_runs, total.max_depth_reached) == (2, 2)


def test_calls_and_sub_calls_in_flight_come_and_go() -> None:
    total = tally(started(), HELD, HELD, settled(Usage(), Amounts()), SUB_CALL, SUB_CALL, SUB_CALL)
    assert (total.open_calls, total.sub_calls_in_flight) == (1, 3)
    total.add(Event(ROOT, 9, 0.0, sub_call_ended()))
    total.add(Event(ROOT, 10, 0.0, sub_call_ended("refused")))
    assert (total.sub_calls_in_flight, total.sub_calls_done, total.sub_calls_failed) == (1, 1, 1)


def test_what_was_used_is_told_apart_by_model_and_depth() -> None:
    first = settled(Usage(1, 0, 0, 2), Amounts(3, 5, 1))
    again = settled(Usage(), Amounts(), Amounts(50, 30, 1), attempt=2)
    other = settled(Usage(4, 0, 0, 5), Amounts(9, 7, 1), model="other")
    total = tally(started(), first, (CHILD, started(1, ROOT)), (CHILD, first), (CHILD, again), other)
    assert set(total.lines) == {("m", 0), ("m", 1), ("other", 0)}
    line = total.lines["m", 1]
    assert (line.usage, line.cost_microusd, line.unconfirmed) == (Usage(1, 0, 0, 2), 5, Amounts(50, 30, 1))
    assert (line.calls, line.retried) == (2, 1)


def test_the_lines_add_up_to_the_whole() -> None:
    one = settled(Usage(1, 2, 3, 4), Amounts(10, 7, 1))
    total = tally(started(), one, (CHILD, started(1, ROOT)), (CHILD, one), (CHILD, one))
    whole = Usage()
    for line in total.lines.values():
        whole = whole.plus(line.usage)
    assert whole == total.usage
    assert sum(line.cost_microusd for line in total.lines.values()) == total.confirmed.cost_microusd


def test_refused_and_memoised_sub_calls_are_counted_where_they_were_made() -> None:
    refused = sub_call_ended("too low", "BudgetExceededError")
    broken = sub_call_ended("it broke", "ModelError")
    total = tally(started(), SUB_CALL, refused, SUB_CALL, broken, SUB_CALL, sub_call_ended(memoised=True))
    line = total.lines["m", 0]
    assert (line.refused, line.memoised) == (1, 1)
    assert (total.sub_calls_failed, total.sub_calls_done) == (2, 1)


def test_how_far_the_bound_is_above_the_truth_is_measured_on_confirmed_calls_alone() -> None:
    assert tally(started()).input_tokens_per_byte() is None
    unknown = settled(Usage(), Amounts(), Amounts(90, 9, 1))
    total = tally(started(), settled(Usage(input=15), Amounts(15, 1, 1)), unknown)
    assert total.input_tokens_per_byte() == 15 / 60
