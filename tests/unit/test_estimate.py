import json

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.conversation import (
    Block,
    Conversation,
    Reply,
    StopReason,
    Told,
    ToolReport,
    utf8_bytes,
)
from orchestrator.estimate import input_bound_tokens

any_text = st.text(alphabet=st.characters(), max_size=40)
blocks: st.SearchStrategy[Block] = st.one_of(
    st.builds(lambda words: {"type": "text", "text": words}, any_text),
    st.builds(
        lambda code: {"type": "tool_use", "id": "a", "name": "python", "input": {"code": code}}, any_text
    ),
)
entries = st.one_of(
    st.builds(Told, any_text),
    st.builds(ToolReport, any_text, any_text),
    st.builds(lambda content: Reply(tuple(content), StopReason.TOOL_USE), st.lists(blocks, max_size=3)),
)
conversations = st.lists(entries, max_size=6).map(tuple)


def sent_bytes(conversation: Conversation) -> int:
    """The text of a conversation as it goes over the wire, without any framing."""
    total = 0
    for entry in conversation:
        if isinstance(entry, Reply):
            total += sum(utf8_bytes(json.dumps(block, ensure_ascii=False)) for block in entry.content)
        else:
            total += utf8_bytes(entry.text)
        if isinstance(entry, ToolReport):
            total += utf8_bytes(entry.call_id)
    return total


@given(any_text, conversations, st.booleans())
def test_the_bound_is_never_below_the_bytes_that_are_sent(
    system: str, conversation: Conversation, python_tool: bool
) -> None:
    bound = input_bound_tokens(system, conversation, python_tool=python_tool)
    assert bound > utf8_bytes(system) + sent_bytes(conversation)


@given(conversations, entries)
def test_a_longer_conversation_has_a_higher_bound(conversation: Conversation, entry: Told) -> None:
    shorter = input_bound_tokens("", conversation, python_tool=False)
    assert input_bound_tokens("", (*conversation, entry), python_tool=False) > shorter


def test_the_tool_is_paid_for() -> None:
    with_tool = input_bound_tokens("", (), python_tool=True)
    assert with_tool - input_bound_tokens("", (), python_tool=False) >= 700


def test_every_entry_is_paid_for_even_an_empty_one() -> None:
    many = input_bound_tokens("", (Told(""),) * 100, python_tool=False)
    assert many - input_bound_tokens("", (), python_tool=False) >= 100


def test_bytes_and_not_characters_are_counted() -> None:
    assert utf8_bytes("aä€😀") == 1 + 2 + 3 + 4


def test_a_lone_surrogate_is_one_byte_because_it_is_sent_as_a_question_mark() -> None:
    assert utf8_bytes("\ud800a\udfff") == 3
