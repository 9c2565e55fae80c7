"""TextView answers as `str` does, on the same text."""

import itertools
import re
from collections.abc import Iterator
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox_image.worker.interpreter import text_bytes, text_search
from sandbox_image.worker.interpreter.text import TextView
from tests.unit.worker.views import view_of

# Few, so that they meet at the borders of pieces: all widths, all line ends, what only `str` calls space.
ALPHABET = "ab \n\r\t.\x1c\x85é\u2028ßΩ漢\U0001f600\U0010fffd"
TEXTS = st.text(ALPHABET, max_size=60) | st.text(max_size=30)
ANY_BOUND = st.none() | st.integers(-70, 70)


@pytest.fixture(autouse=True, scope="module")
def tiny_pieces() -> Iterator[None]:
    """Pieces and windows of a few bytes, so that short texts have many of them."""
    with (
        patch.object(text_bytes, "PIECE_BYTES", 5),
        patch("sandbox_image.worker.interpreter.stretch.PIECE_BYTES", 5),
        patch.object(text_search, "LEAST_WINDOW_BYTES", 4),
        patch.object(text_search, "MOST_WINDOW_BYTES", 16),
        patch.object(text_search, "MOST_FAR_WINDOW_BYTES", 32),
        patch.object(text_search, "REACH_BYTES", 32),
    ):
        yield


def valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


@given(
    text=TEXTS.map(valid), start=ANY_BOUND, end=ANY_BOUND, step=st.none() | st.integers(-7, 7).filter(bool)
)
def test_slices(text: str, start: int | None, end: int | None, step: int | None) -> None:
    assert view_of(text)[start:end:step] == text[start:end:step]


@given(text=TEXTS.map(valid), start=ANY_BOUND, end=ANY_BOUND)
def test_slices_too_large_for_a_str_are_views(text: str, start: int | None, end: int | None) -> None:
    part = view_of(text, max_str_bytes=0)[start:end]
    assert isinstance(part, TextView) or part == ""
    assert "".join(part) == text[start:end]
    assert len(part) == len(text[start:end])


@given(
    text=TEXTS.map(valid),
    sub=st.text(ALPHABET, max_size=3) | st.text(max_size=2),
    start=ANY_BOUND,
    end=ANY_BOUND,
)
@example(text="aaaa", sub="aa", start=1, end=None)
@example(text="abc", sub="", start=4, end=None)
@example(text="é", sub="\ud800", start=None, end=None)
def test_searching(text: str, sub: str, start: int | None, end: int | None) -> None:
    view = view_of(text)
    assert view.find(sub, start, end) == text.find(sub, start, end)
    assert view.rfind(sub, start, end) == text.rfind(sub, start, end)
    assert view.count(sub, start, end) == text.count(sub, start, end)
    assert view.startswith(sub, start, end) == text.startswith(sub, start, end)
    assert view.endswith(sub, start, end) == text.endswith(sub, start, end)
    assert view.startswith((sub, "a"), start, end) == text.startswith((sub, "a"), start, end)
    assert (sub in view) == (sub in text)


@given(TEXTS.map(valid))
def test_single_characters_iteration_and_equality(text: str) -> None:
    view = view_of(text)
    assert len(view) == len(text)
    assert list(view) == list(text)
    assert [view[i] for i in range(-len(text), len(text))] == list(text) * 2
    assert view == text
    assert view == view_of(text)
    assert view != text + "x"
    assert view != text[:-1] + ("\x01" if text[-1:] == "\x00" else "\x00")
    assert str(view) == text
    assert f"{view}" == text
    assert view.isascii() == text.isascii()


@given(TEXTS.map(valid), st.integers(0, 20), st.integers(0, 20))
def test_lines(text: str, start: int, end: int) -> None:
    view = view_of(text)
    expected = re.split("\r?\n", text)
    if expected[-1] == "":
        expected.pop()
    assert list(view.lines()) == expected
    assert "".join(view.lines(keepends=True)) == text
    assert view.line_range(start, end) == expected[start:end]
    assert view.line_count() == len(expected)
    numbers = [text[:place].count("\n") for place in range(len(text))]
    assert [view.line_number(place) for place in range(len(text))] == numbers
    with pytest.raises(IndexError):
        view.line_number(len(text))


@given(TEXTS.map(valid), st.integers(1, 9), st.integers(0, 8))
def test_chunks_cover_the_text(text: str, n_chars: int, overlap: int) -> None:
    view = view_of(text)
    if overlap >= n_chars:
        with pytest.raises(ValueError, match="overlap"):
            view.chunks(n_chars, overlap)
        return
    chunks = list(view.chunks(n_chars, overlap))
    assert "".join(chunk[overlap if number else 0 :] for number, chunk in enumerate(chunks)) == text
    assert all(len(chunk) == n_chars for chunk in chunks[:-1])
    assert not any(
        first.endswith(second) for first, second in itertools.pairwise(chunks) if len(second) <= overlap
    )


PATTERNS = [
    "a",
    "[aé]+",
    r"\w+",
    r"\s",
    r"\s+\S",
    r"\b",
    "",
    "a?",
    "^",
    "$",
    "(?m)^.",
    "(?m).$",
    r"\A.",
    r".\Z",
    "(?<=a)b",
    "(?<!a)b",
    "a(?!b)",
    "(?i)ß",
    "(?P<one>a)|(b)",
    "(a)|b",
    "[^a]",
    ".",
    "(?s).",
    r"\u00e9",
    "(?u)a",
    "\U0001f600",
    r"a\w",
    r"é+\b",
    "[^a\n]+",
    "(?s)a.*?b",
    r"(?<=\s)a\s",
    r"a\w*$",
    r"a\w?\s?",
    r"\w+\n\w",
]


@given(text=TEXTS.map(valid), pattern=st.sampled_from(PATTERNS))
@settings(max_examples=400)
def test_regular_expressions(text: str, pattern: str) -> None:
    found = list(view_of(text).finditer(pattern))
    expected = list(re.finditer(pattern, text))
    assert [match.span() for match in found] == [match.span() for match in expected]
    assert [match.groups() for match in found] == [match.groups() for match in expected]
    assert [match.groupdict() for match in found] == [match.groupdict() for match in expected]
    assert [match[0] for match in found] == [match[0] for match in expected]
    assert [match.lastgroup for match in found] == [match.lastgroup for match in expected]
    assert view_of(text).findall(pattern) == re.findall(pattern, text)


@pytest.mark.parametrize("pattern", ["b", r"\wb", r"(?P<one>\w)b"])
def test_a_match_lacks_the_groups_that_its_pattern_lacks(pattern: str) -> None:
    found = view_of("éab").search(pattern)
    assert found is not None
    assert found.group(0) == found[0] == found.group()
    assert (found.re.pattern, found.end()) == (pattern, 3)
    for group in (2, -1, "two"):
        with pytest.raises(IndexError, match="no such group"):
            found.start(group)
        with pytest.raises(IndexError, match="no such group"):
            _ = found[group]


def test_a_match_longer_than_a_window_is_refused_not_cut() -> None:
    with pytest.raises(ValueError, match="more than a million characters at 1,"):
        list(view_of(" é" + "a" * 500).finditer(r"\w+"))
    assert [match.span() for match in view_of("a" * 500).finditer(r"\w+")] == [(0, 500)]
    assert [match.span() for match in view_of("é" + "a" * 500).finditer("a+")] == [(1, 501)]


def test_a_str_that_does_not_fit_is_refused_with_the_sizes() -> None:
    with pytest.raises(
        ValueError, match="500 characters take up to 500 bytes as a str, and this sandbox allows 9"
    ):
        str(view_of("a" * 500, max_str_bytes=9))


def test_what_is_not_there_has_no_index() -> None:
    assert (view_of("aba").index("a"), view_of("aba").rindex("a")) == (0, 2)
    for search in (view_of("aba").index, view_of("aba").rindex):
        with pytest.raises(ValueError, match="not found"):
            search("c")


def test_a_method_it_lacks_says_what_to_use() -> None:
    with pytest.raises(AttributeError, match=r"TextView has no 'splitlines'.*use find"):
        _ = view_of("a").splitlines


def test_it_has_no_hash() -> None:
    with pytest.raises(TypeError):
        hash(view_of("a"))
