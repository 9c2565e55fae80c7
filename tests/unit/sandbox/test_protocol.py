from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rlm_proto.v1 import sandbox_pb2 as pb

from orchestrator.cells import CellOutcome, CellResult
from orchestrator.errors import GuestProtocolError
from orchestrator.limits import (
    ANSWER_CHUNK_BYTES,
    MAX_ANSWER_BYTES,
    MAX_ANSWER_CHUNKS,
    MAX_OUTPUT_CHUNK_BYTES,
    MAX_TRACEBACK_BYTES,
    MAX_VARIABLE_NAME_BYTES,
    MAX_VARIABLES,
    OUTPUT_HEAD_BYTES,
    OUTPUT_TAIL_BYTES,
)
from orchestrator.sandbox.protocol import AttachProtocol

pytestmark = pytest.mark.case("G14")

HELLO = pb.AttachRequest(hello=pb.Hello(protocol_version=1, hash_seed=7))


def output(offset: int, data: bytes, cell_id: int = 1) -> pb.AttachRequest:
    return pb.AttachRequest(output=pb.OutputChunk(cell_id=cell_id, offset=offset, data=data))


def answer(data: bytes, cell_id: int = 1) -> pb.AttachRequest:
    return pb.AttachRequest(answer=pb.AnswerChunk(cell_id=cell_id, data=data))


def ended(output_bytes: int = 0, cell_id: int = 1, **more: Any) -> pb.AttachRequest:
    outcome = {} if {"error", "interrupted", "namespace_lost"} & set(more) else {"ok": pb.CellOk()}
    fields: dict[str, Any] = {"cell_id": cell_id, "output_bytes": output_bytes, **outcome, **more}
    return pb.AttachRequest(cell_ended=pb.CellEnded(**fields))


def lost(cause: int, status: int = 0) -> pb.NamespaceLost:
    return pb.NamespaceLost(cause=cause, status=status)  # type: ignore[arg-type]


@pytest.fixture
def protocol() -> AttachProtocol:
    """With a cell running."""
    attached = AttachProtocol()
    attached.received(HELLO)
    assert attached.cell_started() == 1
    return attached


def result(protocol: AttachProtocol, *messages: pb.AttachRequest) -> CellResult:
    *before, last = messages
    assert [protocol.received(message) for message in before] == [None] * len(before)
    over = protocol.received(last)
    assert over is not None
    return over


def assert_refused(protocol: AttachProtocol, *messages: pb.AttachRequest) -> None:
    *before, last = messages
    for message in before:
        protocol.received(message)
    with pytest.raises(GuestProtocolError):
        protocol.received(last)


# --- Order ------------------------------------------------------------------------------------------------


def test_hello_brings_the_hash_seed() -> None:
    protocol = AttachProtocol()
    assert protocol.hash_seed == 0
    assert protocol.received(HELLO) is None
    assert protocol.hash_seed == 7


@pytest.mark.parametrize(
    "hello", [pb.Hello(protocol_version=1), pb.Hello(hash_seed=1), pb.Hello(protocol_version=2, hash_seed=1)]
)
def test_a_hello_of_another_version_or_without_a_seed_is_refused(hello: pb.Hello) -> None:
    assert_refused(AttachProtocol(), pb.AttachRequest(hello=hello))


def test_a_second_hello_is_refused(protocol: AttachProtocol) -> None:
    assert_refused(protocol, HELLO)


@pytest.mark.parametrize("message", [output(0, b"x"), answer(b"x"), ended(), pb.AttachRequest()])
def test_nothing_but_hello_is_allowed_before_a_cell_runs(message: pb.AttachRequest) -> None:
    protocol = AttachProtocol()
    protocol.received(HELLO)
    assert_refused(protocol, message)


@pytest.mark.parametrize("message", [output(0, b"x"), answer(b"x"), ended()])
def test_a_report_on_a_cell_that_is_over_is_refused(
    protocol: AttachProtocol, message: pb.AttachRequest
) -> None:
    assert_refused(protocol, ended(), message)


@pytest.mark.parametrize("cell_id", [0, 2, 2**32 - 1])
def test_a_report_on_another_cell_is_refused(protocol: AttachProtocol, cell_id: int) -> None:
    assert_refused(protocol, output(0, b"x", cell_id))


def test_the_next_cell_starts_afresh(protocol: AttachProtocol) -> None:
    result(protocol, output(0, b"one"), answer(b"no"), ended(3, answer=pb.Answer(length_bytes=2)))
    assert protocol.cell_started() == 2
    assert result(protocol, output(0, b"two", 2), ended(3, 2)) == CellResult(
        outcome=CellOutcome.OK, output_head="two", output_bytes=3
    )


# --- Output -----------------------------------------------------------------------------------------------


def test_output_is_joined_in_order(protocol: AttachProtocol) -> None:
    over = result(protocol, output(0, b"ab"), output(2, b"cd"), ended(4))
    assert (over.output, over.output_bytes, over.cut_bytes) == ("abcd", 4, 0)


def test_a_gap_is_where_output_was_cut(protocol: AttachProtocol) -> None:
    over = result(protocol, output(0, b"head"), output(1_004, b"ta"), output(1_006, b"il"), ended(1_008))
    assert (over.output_head, over.output_tail) == ("head", "tail")
    assert (over.output_bytes, over.cut_bytes) == (1_008, 1_000)


@pytest.mark.parametrize(
    "chunks",
    [
        [output(0, b"abc"), output(2, b"x")],
        [output(0, b"a"), output(0, b"a")],
        [output(0, b"a"), output(5, b"b"), output(9, b"c")],
        [output(5, b"b"), output(0, b"a")],
    ],
)
def test_output_that_overlaps_or_has_two_gaps_is_refused(
    protocol: AttachProtocol, chunks: list[pb.AttachRequest]
) -> None:
    assert_refused(protocol, *chunks)


@pytest.mark.parametrize("size", [0, MAX_OUTPUT_CHUNK_BYTES + 1])
def test_an_output_chunk_that_is_empty_or_too_large_is_refused(protocol: AttachProtocol, size: int) -> None:
    assert_refused(protocol, output(0, b"x" * size))


def test_all_output_together_is_capped(protocol: AttachProtocol) -> None:
    most = OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES
    assert_refused(protocol, output(0, b"x" * most), output(most, b"x"))


@pytest.mark.parametrize("claimed", [0, 3, 5, 2**64 - 1])
def test_a_length_that_does_not_add_up_is_refused(protocol: AttachProtocol, claimed: int) -> None:
    assert_refused(protocol, output(0, b"four"), ended(claimed))


def test_output_that_is_not_utf8_is_replaced(protocol: AttachProtocol) -> None:
    assert result(protocol, output(0, b"a\xff\xc3"), ended(3)).output == "a\ufffd\ufffd"


# --- Answers ----------------------------------------------------------------------------------------------


def test_an_answer_comes_in_parts_even_within_a_character(protocol: AttachProtocol) -> None:
    data = "größe".encode()
    over = result(
        protocol, answer(data[:3]), answer(data[3:]), ended(answer=pb.Answer(length_bytes=len(data)))
    )
    assert over.answer == "größe"


def test_an_empty_answer_is_an_answer(protocol: AttachProtocol) -> None:
    assert result(protocol, ended(answer=pb.Answer())).answer == ""


def test_no_answer_is_none(protocol: AttachProtocol) -> None:
    assert result(protocol, ended()).answer is None


@pytest.mark.parametrize(
    "last", [ended(), ended(answer=pb.Answer(length_bytes=1)), ended(answer=pb.Answer(length_bytes=3))]
)
def test_an_answer_that_was_not_announced_or_does_not_add_up_is_refused(
    protocol: AttachProtocol, last: pb.AttachRequest
) -> None:
    assert_refused(protocol, answer(b"42"), last)


@pytest.mark.parametrize("size", [0, ANSWER_CHUNK_BYTES + 1])
def test_an_answer_chunk_that_is_empty_or_too_large_is_refused(protocol: AttachProtocol, size: int) -> None:
    assert_refused(protocol, answer(b"x" * size))


def test_the_whole_answer_is_capped(protocol: AttachProtocol) -> None:
    chunks = [answer(b"x" * ANSWER_CHUNK_BYTES)] * (MAX_ANSWER_BYTES // ANSWER_CHUNK_BYTES)
    assert_refused(protocol, *chunks, answer(b"x"))


# --- Outcomes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, CellResult(outcome=CellOutcome.OK)),
        (
            {"error": pb.CellError(traceback=b"E\xff")},
            CellResult(outcome=CellOutcome.ERROR, traceback="E\ufffd"),
        ),
        (
            {"interrupted": pb.CellInterrupted(traceback=b"where")},
            CellResult(outcome=CellOutcome.INTERRUPTED, traceback="where"),
        ),
        ({"namespace_lost": lost(1)}, CellResult(outcome=CellOutcome.KILLED)),
        ({"namespace_lost": lost(2, 3)}, CellResult(outcome=CellOutcome.EXITED, status=3)),
        ({"namespace_lost": lost(3, 11)}, CellResult(outcome=CellOutcome.SIGNALLED, status=11)),
        ({"namespace_lost": lost(4)}, CellResult(outcome=CellOutcome.OUT_OF_MEMORY)),
    ],
)
def test_every_end_of_a_cell_has_its_outcome(
    protocol: AttachProtocol, fields: dict[str, Any], expected: CellResult
) -> None:
    assert result(protocol, ended(**fields)) == expected


@pytest.mark.parametrize("cause", [0, 5, -1])
def test_a_namespace_lost_for_no_known_cause_is_refused(protocol: AttachProtocol, cause: int) -> None:
    assert_refused(protocol, ended(namespace_lost=lost(cause)))


def test_an_end_without_an_outcome_is_refused(protocol: AttachProtocol) -> None:
    assert_refused(protocol, pb.AttachRequest(cell_ended=pb.CellEnded(cell_id=1)))


@pytest.mark.parametrize("kind", ["error", "interrupted"])
def test_a_traceback_is_capped(protocol: AttachProtocol, kind: str) -> None:
    part: Any = pb.CellError if kind == "error" else pb.CellInterrupted
    assert_refused(protocol, ended(**{kind: part(traceback=b"x" * (MAX_TRACEBACK_BYTES + 1))}))


# --- Variables --------------------------------------------------------------------------------------------


def test_the_names_that_went_with_a_namespace_are_those_it_had_before(protocol: AttachProtocol) -> None:
    first = result(protocol, ended(variables=[b"rows", b"\xff"]))
    assert (first.variables, first.lost_variables) == (("rows", "\ufffd"), ())
    protocol.cell_started()
    second = result(protocol, ended(cell_id=2, namespace_lost=lost(1), variables=[]))
    assert second.lost_variables == ("rows", "\ufffd")
    protocol.cell_started()
    assert result(protocol, ended(cell_id=3, namespace_lost=lost(1))).lost_variables == ()


@pytest.mark.parametrize("names", [[b"x"] * (MAX_VARIABLES + 1), [b"x" * (MAX_VARIABLE_NAME_BYTES + 1)]])
def test_too_many_names_or_too_long_ones_are_refused(protocol: AttachProtocol, names: list[bytes]) -> None:
    assert_refused(protocol, ended(variables=names))


# --- A stream that breaks ---------------------------------------------------------------------------------


def test_what_a_cell_wrote_before_its_sandbox_was_lost_is_kept(protocol: AttachProtocol) -> None:
    result(protocol, ended(variables=[b"rows"]))
    protocol.cell_started()
    protocol.received(output(0, b"head", 2))
    protocol.received(output(104, b"tail", 2))
    assert protocol.sandbox_lost() == CellResult(
        outcome=CellOutcome.SANDBOX_LOST,
        output_head="head",
        output_tail="tail",
        output_bytes=108,
        cut_bytes=100,
        lost_variables=("rows",),
    )


def test_a_sandbox_lost_between_cells_wrote_nothing() -> None:
    assert AttachProtocol().sandbox_lost() == CellResult(outcome=CellOutcome.SANDBOX_LOST)


# --- Anything at all --------------------------------------------------------------------------------------


def _parsed(data: bytes) -> pb.AttachRequest:
    """Whatever bytes happen to be a message."""
    message = pb.AttachRequest()
    try:
        message.ParseFromString(data)
    except Exception:
        return pb.AttachRequest()
    return message


small_bytes = st.binary(max_size=20)
ids = st.sampled_from([0, 1, 1, 1, 2, 2**32 - 1])
sizes = st.sampled_from([0, 1, 2, 5, 20, 2**63, 2**64 - 1])
anything = st.one_of(
    st.builds(
        lambda version, seed: pb.AttachRequest(hello=pb.Hello(protocol_version=version, hash_seed=seed)),
        ids,
        ids,
    ),
    st.builds(output, sizes, small_bytes, ids),
    st.builds(answer, small_bytes, ids),
    st.builds(
        lambda length, cell_id, names, told, cause: ended(
            length,
            cell_id,
            variables=names,
            **({} if told is None else {"answer": pb.Answer(length_bytes=told)}),
            **({} if cause is None else {"namespace_lost": lost(cause, cause)}),
        ),
        sizes,
        ids,
        st.lists(small_bytes, max_size=3),
        st.none() | sizes,
        st.none() | st.integers(-1, 6),
    ),
    st.binary(max_size=60).map(_parsed),
)


@given(st.lists(st.one_of(anything, st.just("cell")), max_size=30))
@settings(max_examples=300, deadline=None)
def test_no_message_raises_anything_but_a_protocol_error_or_passes_a_cap(
    steps: list[pb.AttachRequest | str],
) -> None:
    protocol = AttachProtocol()
    for step in steps:
        over: CellResult | None = None
        try:
            if isinstance(step, str):
                protocol.cell_started()
            else:
                over = protocol.received(step)
        except GuestProtocolError:
            over = protocol.sandbox_lost()
        if over is not None:
            assert len(over.output_head) + len(over.output_tail) <= OUTPUT_HEAD_BYTES + OUTPUT_TAIL_BYTES
            assert over.output_bytes >= 0
            assert over.cut_bytes >= 0
            assert over.answer is None or len(over.answer) <= MAX_ANSWER_BYTES


# --- Answers that cost more than they look ----------------------------------------------------------------


def test_an_answer_is_read_as_a_whole_wherever_its_chunks_are_cut(protocol: AttachProtocol) -> None:
    text = "a€\U0001f600" * 50
    data = text.encode() + b"\xe2\x82"
    chunks = [answer(data[at : at + 7]) for at in range(0, len(data), 7)]
    over = result(protocol, *chunks, ended(answer=pb.Answer(length_bytes=len(data))))
    assert over.answer == text + "\ufffd"


def test_an_answer_in_more_chunks_than_any_honest_one_is_refused(protocol: AttachProtocol) -> None:
    assert_refused(protocol, *([answer(b"x")] * (MAX_ANSWER_CHUNKS + 1)))


def test_an_answer_that_replacing_makes_longer_than_allowed_is_refused(protocol: AttachProtocol) -> None:
    junk = answer(b"\xff" * ANSWER_CHUNK_BYTES)
    assert_refused(protocol, *([junk] * (MAX_ANSWER_BYTES // ANSWER_CHUNK_BYTES // 3 + 1)))
