import codecs
import ctypes
import hashlib
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from orchestrator.contexts.normalise import Normaliser, width_of

# Pieces that are whole characters of each length, parts of such, and what never occurs in UTF-8.
_PIECES = st.sampled_from(
    [
        b"a",
        b"\n",
        b"\r\n",
        "é".encode(),
        "ÿĀ".encode(),
        "漢".encode(),
        "\ufffd".encode(),
        "\uffff".encode(),
        "😀".encode(),
        codecs.BOM_UTF8,
        b"\xf0\x9f\x98",
        b"\xe6\xbc",
        b"\xc3",
        b"\x80",
        b"\xff",
        b"\xed\xa0\x80",
        b"\xf4\x90\x80\x80",
        b"\xc0\xaf",
        b"\xef\xbf",
    ]
)
_INPUTS = st.one_of(st.binary(max_size=200), st.lists(_PIECES, max_size=40).map(b"".join))


def _feed(normaliser: Normaliser, raw: bytes, cuts: list[int]) -> bytes:
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    parts = [normaliser.feed(raw[start:end]) for start, end in pairwise(edges)]
    return b"".join(parts) + normaliser.finish()


@given(raw=_INPUTS, cuts=st.lists(st.integers(0, 400), max_size=20))
@example(raw=codecs.BOM_UTF8, cuts=[1, 2])
@example(raw=codecs.BOM_UTF8 * 2 + b"x", cuts=[1, 4])
@example(raw=b"\xef\xbb", cuts=[1])
@example(raw=b"", cuts=[])
def test_chunks_of_any_size_give_what_decoding_the_whole_with_replacement_gives(
    raw: bytes, cuts: list[int]
) -> None:
    expected = raw.decode("utf-8", "replace").removeprefix("\ufeff")
    normaliser = Normaliser()

    clean = _feed(normaliser, raw, cuts)

    assert clean.decode() == expected
    measured = normaliser.measured()
    assert measured.length_bytes == len(clean)
    assert measured.chars == len(expected)
    assert measured.sha256 == hashlib.sha256(clean).hexdigest()
    assert measured.lines == len(expected.split("\n")) - expected.endswith("\n") - (not expected)
    widest = max(expected, default="")
    assert measured.width == (1 if widest <= "\xff" else 2 if widest <= "\uffff" else 4)


@given(raw=_INPUTS, cuts=st.lists(st.integers(0, 400), max_size=20))
def test_replacements_are_counted_apart_from_replacement_characters_of_the_input(
    raw: bytes, cuts: list[int]
) -> None:
    normaliser = Normaliser()

    _feed(normaliser, raw, cuts)

    added = raw.decode("utf-8", "replace").count("\ufffd") - raw.decode("utf-8", "ignore").count("\ufffd")
    assert normaliser.replaced == added
    try:
        raw.decode()
        first = None
    except UnicodeDecodeError as error:
        first = error.start
    assert normaliser.first_replaced_byte == first


def test_newlines_of_every_kind_are_left_alone() -> None:
    normaliser = Normaliser()

    assert normaliser.feed(b"a\r\nb\rc\nd") + normaliser.finish() == b"a\r\nb\rc\nd"


def test_only_a_byte_order_mark_at_the_start_is_removed() -> None:
    normaliser = Normaliser()

    clean = normaliser.feed("\ufeffa\ufeffb".encode()) + normaliser.finish()

    assert clean.decode() == "a\ufeffb"


def test_a_part_of_a_text_keeps_a_byte_order_mark_it_starts_with() -> None:
    normaliser = Normaliser(strip_bom=False)

    assert normaliser.feed("\ufeffa".encode()).decode() == "\ufeffa"


@pytest.mark.parametrize(
    ("text", "width"),
    [
        ("a", 1),
        ("é", 1),
        ("\xff", 1),
        ("Ā", 2),
        ("\uffff", 2),
        ("\U00010000", 4),
        ("aÿ", 1),
        ("aĀ", 2),
        ("a\uffff", 2),
        ("a😀", 4),
    ],
)
def test_width_is_that_of_the_widest_character_however_long_the_text(text: str, width: int) -> None:
    assert width_of(text) == width
    assert width_of((text * 100_000).encode().decode()) == width


def test_width_of_one_character_does_not_depend_on_what_cpython_has_cached_for_it() -> None:
    shared = "é".encode().decode()
    # One-character strings are shared, and this makes CPython keep, and report, their UTF-8 as well.
    ctypes.pythonapi.PyUnicode_AsUTF8(ctypes.py_object(shared))

    assert width_of("é".encode().decode()) == 1
