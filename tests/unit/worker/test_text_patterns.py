"""A pattern that runs on bytes finds there what `re` finds in the `str`; each common one takes its way."""

import re
import warnings

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox_image.worker.interpreter.text_patterns import longest_look, needed_start, on_ascii, on_utf8

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
@settings(max_examples=1_500)
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
@settings(max_examples=800)
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


@given(pattern=PATTERNS, text=TEXTS)
@example(pattern="a(?:b)c", text="abc")
def test_every_match_begins_with_what_is_needed_and_is_no_longer_than_it_can_look(
    pattern: str, text: str
) -> None:
    original = compiled(pattern)
    if original is None:
        return
    longest, needed = longest_look(original), needed_start(original)
    for place in range(len(text) + 1):
        match = original.match(text, place)
        assert match is None or text.startswith(needed, place)
        if longest is not None:
            # What lies further does not matter.
            near = original.match(text[: place + longest], place)
            assert (match and match.regs) == (near and near.regs)


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
