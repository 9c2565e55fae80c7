import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.visible import visible, visible_line

_ANY_TEXT = st.text(st.characters(codec=None, exclude_categories=()))


@pytest.mark.parametrize(
    ("hostile", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b2J", "\\x9b2J"),
        ("50%\rdone", "50%\\rdone"),
        ("a\x00b\x7f\x08", "a\\x00b\\x7f\\x08"),
        ("user\u202egnp.exe", "user\\u202egnp.exe"),
        ("\u2066isolated\u2069", "\\u2066isolated\\u2069"),
        ("one\u2028two\u2029", "one\\u2028two\\u2029"),
        ("\udcff lone", "\\udcff lone"),
        ("\ufeffmark", "\\ufeffmark"),
        ("hid\U000e0041den", "hid\\U000e0041den"),
    ],
)
def test_what_a_terminal_would_act_on_is_shown_as_an_escape(hostile: str, shown: str) -> None:
    assert visible(hostile) == shown


@pytest.mark.parametrize("text", ["plain\n\tindented", "naïve 漢字 👩‍👩‍👧 می‌خواهم", "back\\slash", ""])
def test_what_is_harmless_stays(text: str) -> None:
    assert visible(text) == text


@given(_ANY_TEXT)
def test_nothing_that_controls_is_ever_emitted(text: str) -> None:
    shown = visible(text)

    shown.encode()
    assert {unicodedata.category(char) for char in shown if char not in "\n\t"}.isdisjoint(
        {"Cc", "Cs", "Zl", "Zp"}
    )
    bidirectional = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
    assert {unicodedata.bidirectional(char) for char in shown}.isdisjoint(bidirectional)
    assert visible(shown) == shown


@given(_ANY_TEXT, st.integers(0, 30))
def test_a_line_is_one_line_no_longer_than_asked_for(text: str, max_chars: int) -> None:
    line = visible_line(text, max_chars)

    assert len(line) <= max_chars
    assert len(line.splitlines()) <= 1
    assert "\t" not in line
    assert visible(line) == line


def test_a_line_that_fits_is_not_cut() -> None:
    assert visible_line("abc", 3) == "abc"
    assert visible_line("a\nb", 4) == "a\\nb"


def test_a_line_that_is_too_long_ends_in_an_ellipsis_and_in_no_half_escape() -> None:
    assert visible_line("abcdef", 4) == "abc…"
    assert visible_line("ab\x1bcd", 5) == "ab…"
    assert visible_line("\x1b", 3) == "…"


def test_a_huge_text_is_not_looked_at_beyond_the_cut() -> None:
    assert visible_line("x" * 100_000_000, 10) == "xxxxxxxxx…"
