import pytest

from orchestrator.conversation import Block, Reply, StopReason
from orchestrator.reply import (
    CALL_CUT_OFF,
    BadCall,
    CutOff,
    Empty,
    Refused,
    ReplyKind,
    SaysAnswer,
    WantsCell,
    WindowFull,
    read_reply,
)

TEXT: Block = {"type": "text", "text": " words\n"}
THINKING: Block = {"type": "thinking", "thinking": "is this an answer?", "signature": "s"}


def call(arguments: object = None, *, call_id: str = "a", name: str = "python") -> Block:
    given = {"code": "1 + 1"} if arguments is None else arguments
    return {"type": "tool_use", "id": call_id, "name": name, "input": given}


def read(*content: Block, stop: StopReason = StopReason.TOOL_USE) -> ReplyKind:
    return read_reply(Reply(content, stop))


@pytest.mark.parametrize("stop", StopReason)
def test_a_reply_of_text_is_read_by_why_it_stopped(stop: StopReason) -> None:
    expected = {
        StopReason.REFUSAL: Refused(),
        StopReason.WINDOW_FULL: WindowFull(),
        StopReason.MAX_TOKENS: CutOff(),
    }
    assert read(TEXT, stop=stop) == expected.get(stop, SaysAnswer("words"))


@pytest.mark.parametrize("stop", StopReason)
def test_a_whole_call_runs_unless_the_reply_was_cut_or_refused(stop: StopReason) -> None:
    cut = BadCall(("a",), CALL_CUT_OFF)
    expected = {StopReason.REFUSAL: Refused(), StopReason.MAX_TOKENS: cut, StopReason.WINDOW_FULL: cut}
    assert read(TEXT, call(), stop=stop) == expected.get(stop, WantsCell("a", "1 + 1", ()))


def test_thinking_is_not_an_answer() -> None:
    assert read(THINKING, stop=StopReason.END_TURN) == Empty()
    assert read(THINKING, TEXT, stop=StopReason.END_TURN) == SaysAnswer("words")


@pytest.mark.parametrize("content", [(), ({"type": "text", "text": "\n \t"},), ({"type": "text"},)])
def test_no_words_are_no_answer(content: tuple[Block, ...]) -> None:
    assert read(*content, stop=StopReason.END_TURN) == Empty()


def test_further_calls_are_listed_as_not_run() -> None:
    assert read(call(), call(call_id="b"), call(call_id="c")) == WantsCell("a", "1 + 1", ("b", "c"))


def test_an_earlier_call_of_a_reply_that_was_cut_is_whole() -> None:
    cut_last = read(call(), call({}, call_id="b"), stop=StopReason.MAX_TOKENS)
    assert cut_last == WantsCell("a", "1 + 1", ("b",))


def test_another_tool_is_not_run_and_all_calls_are_answered() -> None:
    kind = read(call(name="bash"), call(call_id="b"))
    assert isinstance(kind, BadCall)
    assert kind.call_ids == ("a", "b")
    assert "`python`" in kind.why


@pytest.mark.parametrize(
    "arguments", [{}, {"code": None}, {"code": 7}, {"code": ["x"]}, "x", [], {"Code": "x"}]
)
def test_arguments_that_are_no_code_are_not_run(arguments: object) -> None:
    kind = read(call(arguments))
    assert isinstance(kind, BadCall)
    assert "`code`" in kind.why


def test_empty_code_is_code() -> None:
    assert read(call({"code": ""})) == WantsCell("a", "", ())


def test_further_arguments_do_not_matter() -> None:
    assert read(call({"code": "1", "timeout": 5})) == WantsCell("a", "1", ())


def test_blocks_of_kinds_we_do_not_know_are_passed_over() -> None:
    assert read({"type": "citation_list", "text": 7}, TEXT, stop=StopReason.END_TURN) == SaysAnswer("words")
