"""A pattern that runs on bytes finds there what `re` finds in the `str`; each common one takes its way."""

import re
import warnings
from unittest.mock import patch

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox_image.worker.interpreter import text_patterns, text_search
from sandbox_image.worker.interpreter.text_patterns import needed_start, on_ascii, on_utf8
from tests.unit.worker.views import view_of

# Relatives of ASCII letters under IGNORECASE among them, and what only `str` calls space, digit or letter.
LETTERS = "abkz0,\n \x1c\x85é\u0130\u212a\u017f\u0663漢\U0001f600"
TEXTS = st.text(LETTERS, max_size=14)

_ATOMS = st.sampled_from(
    [
        *("a", "b", "k", "z", "0", ",", r"\n", " ", "é", "漢", "\U0001f600", "ab", "aé", "éa"),
        *(
            ".",
            "[^a]",
            "[^,\n]",
            "[ab]",
            "[a-k]",
            "[^a-k]",
            r"[\s\S]",
            r"[a-\U0010ffff]",
            "[aé]",
            "[^é]",
            r"[^\s]",
        ),
        *(
            r"\w",
            r"\W",
            r"\d",
            r"\D",
            r"\s",
            r"\S",
            r"\b",
            r"\B",
            "^",
            "$",
            r"\A",
            r"\Z",
            r"(?a:\w)",
            r"(?a:[\W])",
        ),
        *(
            "(?<=a)",
            "(?<!a)",
            "(?<=é)",
            "(?<!é)",
            r"(?<=\n)",
            "(?i:k)",
            "(?s:.)",
            "(?-m:^)",
            r"(?a:\b)",
            r"(?a:\B)",
        ),
    ]
)
_QUANTIFIERS = st.sampled_from(
    ["", "", "", "*", "+", "?", "*?", "+?", "??", "*+", "++", "?+", "{2}", "{1,2}", "{2,}", "{0,1}?"]
)


def _composed(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    wrapped = st.builds(
        "{}{}){}".format, st.sampled_from(["(", "(?:", "(?>", "(?=", "(?!"]), inner, _QUANTIFIERS
    )
    return st.one_of(wrapped, st.builds("{}{}".format, inner, inner), st.builds("{}|{}".format, inner, inner))


PATTERNS = st.recursive(st.builds("{}{}".format, _ATOMS, _QUANTIFIERS), _composed, max_leaves=6)
FLAGS = st.sets(st.sampled_from([re.I, re.M, re.S, re.A]), max_size=2).map(sum)


def compiled(pattern: str, flags: int = 0) -> "re.Pattern[str] | None":
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return re.compile(pattern, flags)
    except re.error:
        return None


def in_characters(pattern: "re.Pattern[str]", text: str) -> list[object]:
    return [(match.regs, match.lastindex) for match in pattern.finditer(text)]


def in_bytes(pattern: "re.Pattern[bytes]", text: str) -> list[object]:
    raw = text.encode()

    def place(byte: int) -> int:
        return len(raw[:byte].decode()) if byte >= 0 else -1

    return [
        (tuple((place(start), place(end)) for start, end in match.regs), match.lastindex)
        for match in pattern.finditer(raw)
    ]


@given(pattern=PATTERNS, flags=FLAGS, text=TEXTS)
@settings(max_examples=400)
@example(pattern="(?:é)?+.+b", flags=0, text="éb")
@example(pattern="(?<!a).*b", flags=0, text="aéb")
@example(pattern="a.*(?!\n)", flags=0, text="aé\n")
@example(pattern="(?:,.+?)*+b", flags=0, text=",éb")
@example(pattern="(?:.+)+b", flags=0, text="éb")
@example(pattern=".+?", flags=0, text="é")
@example(pattern="k", flags=re.I, text="\u212a")
@example(pattern="[a-z]", flags=re.I, text="\u017f")
def test_what_runs_on_utf8_finds_there_what_it_finds_in_the_text(pattern: str, flags: int, text: str) -> None:
    original = compiled(pattern, flags)
    translated = original and on_utf8(original)
    if original and translated:
        assert in_bytes(translated, text) == in_characters(original, text)


@given(pattern=PATTERNS, flags=FLAGS, text=st.text("abkz0, \n\t\x1c\x1f_-", max_size=14))
@settings(max_examples=200)
@example(pattern=r"\s", flags=0, text="\x1c")
@example(pattern=r"[^\s]|\S", flags=0, text="\x1f")
@example(pattern="\u212a", flags=re.I, text="k")
def test_what_runs_on_ascii_finds_there_what_it_finds_in_the_text(
    pattern: str, flags: int, text: str
) -> None:
    original = compiled(pattern, flags)
    translated = original and on_ascii(original)
    if original and translated:
        assert in_bytes(translated, text) == in_characters(original, text)


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "error",
            "Ошибка",
            "naïve café",
            "ERROR|WARNING",
            "(?P<what>foo|bar)=",
            "(?i)error",
            "[A-Z][a-z]+ [0-9]{4}",
        ),
        *(
            "^Name: (.*)$",
            "(?m)^Name: (.*)$",
            '"[^"]*"',
            "<a .*?>",
            "key=[^,;]+",
            "(?s)BEGIN.*?END",
            ".+ was here",
        ),
        *(
            r"[0-9]{4}-[0-9]{2}-[0-9]{2}",
            r"(?a)\bword\b",
            r"(?a)\d+\s\w+",
            "(?<=x)y",
            "a(?=b)",
            "a(?!b)",
            "(?:ab)+",
        ),
    ],
)
def test_a_pattern_that_asks_nothing_of_unicode_runs_on_utf8(pattern: str) -> None:
    assert on_utf8(re.compile(pattern)) is not None


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            r"\w+",
            r"\d",
            r"\s",
            r"\bword",
            "[à-ü]",
            "(?i)é",
            "(?i)risk",
            "(?i)[a-z]",
            "",
            "a*",
            ".",
            "x.y",
            ".{3}",
        ),
        *(r"(.*)x\1", ".+?", "(?<!a).*b", "(" * 7 + "a" + "+)" * 7, "\ud800"),
    ],
)
def test_a_pattern_that_could_mean_something_else_on_utf8_is_left_alone(pattern: str) -> None:
    assert on_utf8(re.compile(pattern)) is None


@pytest.mark.parametrize(
    "pattern", [r"\w+", r"\d", r"\s+\S", r"\bword\b", "", "a*", ".", r"(.)\1", "(a)?(?(1)b|c)", "é"]
)
def test_nearly_every_pattern_runs_on_ascii(pattern: str) -> None:
    assert on_ascii(re.compile(pattern)) is not None


def test_the_relatives_of_ascii_letters_are_all_known() -> None:
    """Of all characters, those that IGNORECASE takes for an ASCII letter, and the other way round."""
    beyond = "".join(map(chr, (*range(128, 0xD800), *range(0xE000, 0x110000))))
    for letter in map(chr, range(128)):
        related = re.search(re.escape(letter), beyond, re.IGNORECASE) is not None
        translated = on_utf8(re.compile(re.escape(letter), re.IGNORECASE))
        assert (translated is None) == related


@given(pattern=PATTERNS, flags=FLAGS, text=TEXTS | st.text("ab\n", max_size=14))
@settings(max_examples=200)
@example(pattern="a(?:b)c", flags=0, text="abc")
@example(pattern="a$", flags=0, text="a\nb")
@example(pattern=r"a(?=\n)", flags=0, text="a\n\nb")
@example(pattern=r"(?<=^a)b", flags=0, text="aab")
def test_what_lies_beyond_the_reach_of_a_pattern_does_not_matter(pattern: str, flags: int, text: str) -> None:
    original = compiled(pattern, flags)
    if original is None:
        return
    reach, needed = text_patterns.reach(original), needed_start(original)
    for place in range(len(text) + 1):
        match = original.match(text, place)
        assert match is None or text.startswith(needed, place)
        ends = [len(text)]
        if reach.characters is not None:
            ends.append(place + reach.characters)
        if reach.newlines is not None:
            lines = re.findall(".*\n|.+", text[place:])
            ends.append(place + len("".join(lines[: reach.newlines + 2])))
        start = max(0, place - reach.behind)
        near = original.match(text[start : min(ends)], place - start)
        regs = near and tuple(
            (first + start, last + start) if first >= 0 else (first, last) for first, last in near.regs
        )
        assert (match and match.regs) == regs


@given(pattern=PATTERNS, flags=FLAGS, text=TEXTS | st.text("aék \n", min_size=20, max_size=60))
@settings(max_examples=200)
@example(pattern=r"\w+\n\w", flags=0, text="aaé\naé\n" * 5)
@example(pattern=r"(?<=\s)k?$", flags=re.M, text="éa \n" * 9)
def test_windows_find_what_there_is_wherever_their_borders_are(pattern: str, flags: int, text: str) -> None:
    original = compiled(pattern, flags)
    if original is None:
        return
    reach = text_patterns.reach(original)
    if reach.characters is None and reach.newlines is None:
        return
    with patch.multiple(text_search, LEAST_WINDOW_BYTES=3, MOST_WINDOW_BYTES=9):
        found = list(text_search._matches_in_windows(original, view_of(text).stretch))
    expected = list(original.finditer(text))
    assert [match.span() for match in found] == [match.span() for match in expected]
    assert [match.groups() for match in found] == [match.groups() for match in expected]


def test_how_far_patterns_reach() -> None:
    def reach_of(pattern: str) -> text_patterns.Reach:
        return text_patterns.reach(re.compile(pattern))

    assert reach_of("abc") == (1, 5, 0)
    assert reach_of(r"Chapter \d+") == (1, None, 0)
    assert reach_of(r"(?<=ab)\w+\n?") == (3, None, 1)
    assert reach_of(r"a.*(?=\nb)") == (1, None, 1)
    assert reach_of(r"\w+\s{1,3}") == (1, None, 3)
    assert reach_of(r"a\s*") == (1, None, None)
    assert reach_of(r"(?s)a.*b") == (1, None, None)
    assert reach_of(r"([^b]+)(?P=one)".replace("(", "(?P<one>", 1)) == (1, None, None)


def test_what_is_needed_at_the_start() -> None:
    patterns = [r"Chapter \d+", r"\bword\b", "(?P<a>ab)c|x", "(?i)ab", "ab|ac", "(?:ab)c+", "a?b", "(?i:a)b"]
    assert [needed_start(re.compile(pattern)) for pattern in patterns] == [
        "Chapter ",
        "word",
        "",
        "",
        "a",
        "ab",
        "",
        "",
    ]
