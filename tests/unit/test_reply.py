import pytest

from orchestrator.conversation import Block, Dialect, Reply, StopReason
from orchestrator.reply import (
    CALL_CUT_OFF,
    BadCall,
    CutOff,
    Empty,
    OnlyWords,
    Refused,
    ReplyKind,
    SaysAnswer,
    WantsCell,
    WindowFull,
    read_reply,
    what_counts,
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


# --- Fences -----------------------------------------------------------------------------------------------


def words(text: str) -> Block:
    return {"type": "text", "text": text}


def read_fenced(*content: Block, stop: StopReason = StopReason.END_TURN) -> ReplyKind:
    return read_reply(Reply(content, stop), Dialect.FENCES)


WHOLE, OPEN = words("Look.\n```repl\n1\n```\n"), words("```repl\n1")
FINAL, OPEN_FINAL = words("FINAL(42)"), words("FINAL(42")


@pytest.mark.parametrize("stop", StopReason)
def test_a_fenced_reply_is_read_by_why_it_stopped(stop: StopReason) -> None:
    if stop is StopReason.REFUSAL:
        expected: list[ReplyKind] = [Refused()] * 5
    elif stop is StopReason.MAX_TOKENS:
        cut = BadCall((), CALL_CUT_OFF)
        expected = [WantsCell("", "1", ()), cut, SaysAnswer("42"), CutOff(), CutOff()]
    elif stop is StopReason.WINDOW_FULL:
        expected = [WantsCell("", "1", ()), WindowFull(), SaysAnswer("42"), WindowFull(), WindowFull()]
    else:
        cell, answer = WantsCell("", "1", ()), SaysAnswer("42")
        expected = [cell, cell, answer, answer, OnlyWords("words")]
    replies = (WHOLE, OPEN, FINAL, OPEN_FINAL, TEXT)
    assert [read_fenced(block, stop=stop) for block in replies] == expected


def test_a_fence_in_thinking_is_a_thought() -> None:
    thought: Block = {"type": "thinking", "thinking": "```repl\n1\n```", "signature": "s"}
    assert read_fenced(thought) == Empty()
    assert read_fenced(thought, TEXT) == OnlyWords("words")


def test_a_cell_may_go_over_several_blocks() -> None:
    content = (THINKING, words("```repl\nfirst"), words("\nsecond\n``"), words("`\nmore"), THINKING)
    assert read_fenced(*content) == WantsCell("", "first\nsecond", ())
    kept = what_counts(Reply(content, StopReason.END_TURN), Dialect.FENCES)
    assert kept.content == (THINKING, words("```repl\nfirst"), words("\nsecond\n``"), words("`"))


@pytest.mark.parametrize("content", [(THINKING, TEXT, THINKING), (OPEN, THINKING), (THINKING,), ()])
def test_a_reply_with_nothing_to_cut_off_counts_verbatim(content: tuple[Block, ...]) -> None:
    reply = Reply(content, StopReason.END_TURN)
    assert what_counts(reply, Dialect.FENCES) == reply


def test_what_counts_asks_for_the_same() -> None:
    reply = Reply((THINKING, words(f"{WHOLE['text']}\nFINAL(1)"), WHOLE), StopReason.END_TURN)
    kept = what_counts(reply, Dialect.FENCES)
    assert kept.text == str(WHOLE["text"]).rstrip()
    assert read_reply(kept, Dialect.FENCES) == read_reply(reply, Dialect.FENCES)
    assert what_counts(kept, Dialect.FENCES) == kept


def test_with_tools_a_fence_is_text_and_all_of_it_counts() -> None:
    reply = Reply((words("```repl\n1\n```\nmore"),), StopReason.END_TURN)
    assert read_reply(reply) == SaysAnswer("```repl\n1\n```\nmore")
    assert what_counts(reply, Dialect.TOOLS) is reply
