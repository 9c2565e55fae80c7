from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequestError
from orchestrator.server.http.messages_mapping import (
    EDGE_BYTES,
    LONG_BYTES,
    AnswerText,
    Mapped,
    MessagesForm,
    mapped,
)

LONG = "A line of a report.\n" * (LONG_BYTES // 10)


def text(content: str) -> dict[str, Any]:
    return {"type": "text", "text": content}


def document(data: str, **more: Any) -> dict[str, Any]:
    return {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": data}, **more}


def user(*blocks: dict[str, Any]) -> dict[str, Any]:
    return {"role": "user", "content": list(blocks)}


def asked(*messages: dict[str, Any], system: Any = None) -> Mapped:
    body = {"model": "m", "max_tokens": 10, "messages": list(messages), "system": system}
    return mapped(MessagesForm.model_validate(body))


def test_the_last_text_behind_a_long_one_is_the_question() -> None:
    assert asked(user(text(LONG), text("Why?"))) == Mapped("Why?", LONG)


def test_short_texts_around_a_long_one_are_the_question_together() -> None:
    assert asked(user(text("Read this."), text(LONG), text("Why?"))) == Mapped("Read this.\n\nWhy?", LONG)


def test_a_short_prompt_is_question_and_context() -> None:
    assert asked({"role": "user", "content": "Why?"}) == Mapped("Why?", "Why?")


def test_system_comes_before_the_question_and_a_long_system_is_material() -> None:
    assert asked(user(text("Why?")), system="Be brief.") == Mapped("Be brief.\n\nWhy?", "Why?")
    assert asked(user(text("Why?")), system=[text("Be brief."), text(LONG)]) == Mapped(
        "Be brief.\n\nWhy?", LONG
    )


def test_a_document_is_material_however_short() -> None:
    assert asked(user(document("green"), text("Which?"))) == Mapped("Which?", "green")
    with_more = document("green", title="Sky", context="From 1999.")
    assert asked(user(with_more, text("Which?"))) == Mapped("Which?", "From 1999.\n\ngreen")
    blocks = {"type": "document", "source": {"type": "content", "content": [text("a"), text("b")]}}
    assert asked(user(blocks, text("Which?"))) == Mapped("Which?", "a\n\nb")


def test_earlier_messages_are_material_under_headings() -> None:
    found = asked(user(text("Hello.")), {"role": "assistant", "content": "Hi."}, user(text("Why?")))
    assert found.context == (
        "=== part 1 of 2: message 1, user ===\nHello.\n\n=== part 2 of 2: message 2, assistant ===\nHi."
    )
    assert found.question.startswith("Why?\n\n(The context has 2 parts. ")
    assert "=== part 1 of 2: message 1, user ===" in found.question


def test_many_short_texts_that_are_long_together_are_material_but_for_the_last() -> None:
    pieces = [text(f"piece {n} " + "x" * 1_000) for n in range(40)]
    found = asked(user(*pieces, text("Which piece?")))
    assert found.question.startswith("Which piece?\n\n")
    assert found.context.count("=== part ") == 40


@pytest.mark.parametrize("separator", ["\n\n", "\n"])
def test_of_a_single_long_text_the_edges_are_asked_and_all_of_it_is_the_context(separator: str) -> None:
    prompt = f"Count the lines.{separator}{LONG}{separator}How many?"
    found = asked(user(text(prompt)))
    assert found.context == prompt
    assert "Count the lines." in found.question
    assert found.question.endswith("How many?")
    assert len(found.question) < 2 * EDGE_BYTES + 200


def test_of_one_endless_line_nothing_is_a_question() -> None:
    with pytest.raises(InvalidRequestError, match="asks nothing"):
        asked(user(text("x" * 100_000)))


@pytest.mark.parametrize("content", [[document("green")], [text("  ")], []])
def test_a_message_that_asks_nothing_is_refused(content: list[dict[str, Any]]) -> None:
    with pytest.raises(InvalidRequestError, match="asks nothing"):
        asked({"role": "user", "content": content})


@given(
    st.lists(
        st.sampled_from(
            ["short one", "other short", LONG, "y" * LONG_BYTES, document("doc"), document(LONG)]
        ),
        min_size=1,
        max_size=6,
    )
)
def test_nothing_that_was_sent_is_lost(blocks: list[Any]) -> None:
    sent = [text(block) if isinstance(block, str) else block for block in blocks]
    try:
        found = asked(user(*sent))
    except InvalidRequestError:
        return
    for block in sent:
        words = block["text"] if block["type"] == "text" else block["source"]["data"]
        assert words in found.question or words in found.context


@given(st.text(max_size=300), st.integers(1, 100), st.integers(1, 40))
def test_an_answer_is_cut_between_characters_however_it_comes(
    answer: str, max_tokens: int, part: int
) -> None:
    data = answer.encode("utf-8", "replace")
    cutting = AnswerText(max_tokens)
    found = "".join(cutting.feed(data[at : at + part]) for at in range(0, len(data), part))
    found += cutting.feed(b"", is_last=True)
    room = max_tokens * 4
    assert found == (data.decode() if len(data) <= room else data[:room].decode("utf-8", "ignore"))
    assert cutting.stop_reason == ("end_turn" if len(data) <= room else "max_tokens")
