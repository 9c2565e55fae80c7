r"""Which regular expressions may run on UTF-8 instead of characters, and what they look like there.

Running on the bytes of the file needs no decoding, so it is several times as fast. It is done only where it
finds exactly what `re` would find in the `str`. Rules, with the reason for each:

In a text that is all ASCII a byte is a character. Only `\s` differs: `str` counts four separators more as
space. With IGNORECASE a character beyond ASCII in the pattern may stand for one within, so such a pattern
is left alone.

In any other valid UTF-8:

1. What can only match ASCII characters, and literal characters of any kind, match the same bytes wherever
   they match at all: no such character starts within another. (With IGNORECASE `i`, `k` and `s` have
   relatives beyond ASCII, and so have most literals there; those patterns are left alone.)
2. What matches every character beyond ASCII (`.`, `[^,]`, `\S` under ASCII, `[\s\S]`) matches every byte of
   one too. Taken once it would take a part of a character, so it may only come as a run of any length, `.*`
   or `.+`; and such a run must not end within a character. It cannot when what follows begins with rule 1,
   or is `^`, `$` or the like; or when nothing follows and the run is greedy, because the bytes behind it
   then end it too.
3. A match must not start within a character. It cannot when the pattern begins with rule 1. When it begins
   with a run of rule 2, a match found there would have been found where the character starts, and that
   comes first - unless an assertion refused that place, or a possessive part kept what was needed, so then
   there must be none.
4. A pattern that can match nothing could do so within a character, so it is left alone. So is one with a
   back-reference.
5. Everything else depends on what Unicode says of a character (`\w`, `\d`, `\s`, `\b`, `[à-ü]`) and is left
   alone.

The pattern is read with the standard library's own parser, whose tree is what `re` itself compiles; it has
the form of Python 3.11. A tree with anything unknown in it is left alone.
"""

import enum
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Any, NamedTuple

# The parser is not documented, and has no types.
_parser: Any = import_module("re._parser")
_compiler: Any = import_module("re._compiler")
_op: Any = import_module("re._constants")
_sre: Any = import_module("_sre")

_NEWLINE = 10
_ASCII_END = 128
_LAST_CHARACTER = 0x10FFFF
# Under IGNORECASE `str` also has these match U+0130 and U+0131, U+212A, U+017F.
_RELATED_BEYOND_ASCII = frozenset(map(ord, "ikIKsS"))
# White space for `str` within ASCII; `bytes` lack the four separators from 28.
_SPACE_RANGES = ((9, 13), (28, 32))
_NOT_SPACE_RANGES = ((0, 8), (14, 27), (33, 255))

# Each level of repeats is looked at twice.
_MAX_REPEAT_DEPTH = 6

_Item = tuple[Any, Any]


class _LeftAloneError(Exception):
    """The pattern has to run on characters."""


class _Next(enum.IntEnum):
    """What comes after a place in the pattern, from the least to the most that is known of it."""

    OPEN = 0
    """Something that may hold within a character."""
    END = 1
    """Nothing: the match, or an assertion, is complete."""
    WHOLE = 2
    """Something that only holds between two characters."""


class Reach(NamedTuple):
    """How far around the start of a match lies what it depends on."""

    behind: int
    """Characters before it."""
    characters: int | None
    """Characters from it on; None for any number."""
    newlines: int | None
    """Newlines that it, with what it looks at, can go beyond; None for any number."""


class _Beyond(enum.Enum):
    """Which characters beyond ASCII an item matches."""

    NONE = 0
    ALL = 1
    SOME = 2


def on_ascii(pattern: "re.Pattern[str]") -> "re.Pattern[bytes] | None":
    """The pattern that finds in ASCII bytes what `pattern` finds in that text, or None."""
    return _compiled(pattern, lambda tree: _ascii_items(tree.data, pattern.flags))


def on_utf8(pattern: "re.Pattern[str]") -> "re.Pattern[bytes] | None":
    """The pattern that finds in UTF-8 what `pattern` finds in the text, position by position, or None."""
    return _compiled(pattern, lambda tree: _Utf8Rules().whole(tree, pattern.flags))


def needed_start(pattern: "re.Pattern[str]") -> str:
    """What every match begins with; empty when nothing is known."""
    start: list[str] = []
    _collect_start(_parse(pattern).data, pattern.flags, start)
    return "".join(start)


def reach(pattern: "re.Pattern[str]") -> Reach:
    """How far from its first character a match can look."""
    tree = _parse(pattern)
    flags = pattern.flags
    asserted = [value for op, value in _all_items(tree) if op in (_op.ASSERT, _op.ASSERT_NOT)]
    ahead = [inside for direction, inside in asserted if direction > 0]
    behind = sum(inside.getwidth()[1] for direction, inside in asserted if direction < 0)
    longest = tree.getwidth()[1] + sum(inside.getwidth()[1] for inside in ahead)
    return Reach(
        # More by one for the places that look at the next or the last character, by two for `$`.
        behind=behind + 1,
        characters=None if longest >= _op.MAXREPEAT else longest + 2,
        newlines=_most_newlines(tree.data, flags),
    )


def _compiled(
    pattern: "re.Pattern[str]", rewritten: Callable[[Any], list[_Item]]
) -> "re.Pattern[bytes] | None":
    try:
        tree = _parse(pattern)
        tree.data = rewritten(tree)
        tree.state.flags = pattern.flags & ~(re.UNICODE | re.DEBUG)
        in_bytes: re.Pattern[bytes] = _compiler.compile(tree)
    except (_LeftAloneError, re.error):
        # The latter: a look-behind over characters of several lengths.
        return None
    return in_bytes


def _parse(pattern: "re.Pattern[str]") -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when the caller compiled it
        return _parser.parse(pattern.pattern, pattern.flags & ~re.DEBUG)


def _flags_within(flags: int, add: int, remove: int) -> int:
    """Flags in a group with flags of its own."""
    if add & (re.ASCII | re.UNICODE):
        flags &= ~(re.ASCII | re.UNICODE)
    return (flags | add) & ~remove


def _group(op: Any, group: Any, add: int, remove: int, tree: Any) -> _Item:
    # UNICODE has no place in a pattern for bytes.
    return op, (group, add & ~re.UNICODE, remove, tree)


def _with(tree: Any, items: list[_Item]) -> Any:
    return _parser.SubPattern(tree.state, items)


# --- A text that is all ASCII ---------------------------------------------------------------------------


def _ascii_items(items: Sequence[_Item], flags: int) -> list[_Item]:
    return [_ascii_item(op, value, flags) for op, value in items]


def _ascii_item(op: Any, value: Any, flags: int) -> _Item:
    def inside(tree: Any, flags: int = flags) -> Any:
        return _with(tree, _ascii_items(tree.data, flags))

    if op in (_op.LITERAL, _op.NOT_LITERAL):
        if value >= _ASCII_END and flags & re.IGNORECASE:
            raise _LeftAloneError
        return op, value
    if op is _op.IN:
        return op, [part for item in value for part in _ascii_class_items(item[0], item[1], flags)]
    if op in (_op.ANY, _op.AT, _op.GROUPREF):
        return op, value
    if op is _op.BRANCH:
        return op, (value[0], [inside(tree) for tree in value[1]])
    if op is _op.SUBPATTERN:
        group, add, remove, tree = value
        return _group(op, group, add, remove, inside(tree, _flags_within(flags, add, remove)))
    if op in (_op.MAX_REPEAT, _op.MIN_REPEAT, _op.POSSESSIVE_REPEAT):
        return op, (value[0], value[1], inside(value[2]))
    if op in (_op.ASSERT, _op.ASSERT_NOT):
        return op, (value[0], inside(value[1]))
    if op is _op.ATOMIC_GROUP:
        return op, inside(value)
    if op is _op.GROUPREF_EXISTS:
        return op, (value[0], inside(value[1]), value[2] and inside(value[2]))
    raise _LeftAloneError


def _ascii_class_items(op: Any, value: Any, flags: int) -> list[_Item]:
    if op is _op.CATEGORY and not flags & re.ASCII:
        if value is _op.CATEGORY_SPACE:
            return [(_op.RANGE, ends) for ends in _SPACE_RANGES]
        if value is _op.CATEGORY_NOT_SPACE:
            return [(_op.RANGE, ends) for ends in _NOT_SPACE_RANGES]
    if flags & re.IGNORECASE and _reaches_beyond(op, value):
        raise _LeftAloneError
    return [(op, value)]


def _reaches_beyond(op: Any, value: Any) -> bool:
    last = value if op is _op.LITERAL else value[1] if op is _op.RANGE else 0
    return bool(last >= _ASCII_END)


# --- Any UTF-8 ------------------------------------------------------------------------------------------


class _Utf8Rules:
    """Rewrites a pattern from its end to its start: what may be done depends on what follows."""

    def __init__(self) -> None:
        self._may_refuse_or_keep = False
        self._repeat_depth = 0

    def whole(self, tree: Any, flags: int) -> list[_Item]:
        """The items of a pattern, rewritten."""
        if tree.getwidth()[0] == 0:
            raise _LeftAloneError  # rule 4
        items, start = self._sequence(tree.data, flags, _Next.END)
        if start is not _Next.WHOLE and self._may_refuse_or_keep:
            raise _LeftAloneError  # rule 3
        return items

    def _sequence(self, items: Sequence[_Item], flags: int, follow: _Next) -> tuple[list[_Item], _Next]:
        """Items rewritten, and what stands at their start."""
        backwards: list[_Item] = []
        for op, value in reversed(items):
            rewritten, follow = self._item(op, value, flags, follow)
            backwards += reversed(rewritten)
        return backwards[::-1], follow

    def _tree(self, tree: Any, flags: int, follow: _Next) -> tuple[Any, _Next]:
        items, start = self._sequence(tree.data, flags, follow)
        return _with(tree, items), start

    def _item(self, op: Any, value: Any, flags: int, follow: _Next) -> tuple[list[_Item], _Next]:
        if op in (_op.LITERAL, _op.NOT_LITERAL, _op.ANY, _op.IN):
            if _beyond(op, value, flags) is not _Beyond.NONE:
                return _encoded_literal(op, value, flags), _Next.WHOLE
            return [(op, value)], _Next.WHOLE
        if op in (_op.MAX_REPEAT, _op.MIN_REPEAT, _op.POSSESSIVE_REPEAT):
            return self._repeat(op, value, flags, follow)
        if op is _op.AT:
            return [(op, self._place(value, flags))], _Next.WHOLE
        if op is _op.BRANCH:
            branches = [self._tree(tree, flags, follow) for tree in value[1]]
            return [(op, (value[0], [tree for tree, _ in branches]))], min(start for _, start in branches)
        if op is _op.SUBPATTERN:
            group, add, remove, tree = value
            inside, start = self._tree(tree, _flags_within(flags, add, remove), follow)
            return [_group(op, group, add, remove, inside)], start
        if op is _op.ATOMIC_GROUP:
            # What it takes first it keeps, whatever follows.
            self._may_refuse_or_keep = True
            inside, start = self._tree(value, flags, _Next.END)
            return [(op, inside)], follow if start is _Next.END else start
        if op in (_op.ASSERT, _op.ASSERT_NOT):
            return self._assertion(op, value, flags, follow)
        raise _LeftAloneError

    def _repeat(self, op: Any, value: Any, flags: int, follow: _Next) -> tuple[list[_Item], _Next]:
        least, most, tree = value
        if len(tree) == 1 and _beyond(tree[0][0], tree[0][1], flags) is _Beyond.ALL:
            if least > 1 or most != _op.MAXREPEAT:
                raise _LeftAloneError
            self._may_refuse_or_keep |= op is _op.POSSESSIVE_REPEAT
            needs = {_op.MAX_REPEAT: _Next.END, _op.MIN_REPEAT: _Next.WHOLE}.get(op, _Next.OPEN)
            if follow < needs:
                raise _LeftAloneError  # rule 2
            return [(op, value)], _Next.OPEN
        if op is _op.POSSESSIVE_REPEAT:
            self._may_refuse_or_keep = True
        self._repeat_depth += 1
        if self._repeat_depth > _MAX_REPEAT_DEPTH:
            raise _LeftAloneError
        # After one round comes another, or what follows; a possessive one keeps what it took first.
        _, again = self._tree(tree, flags, _Next.WHOLE)
        after = _Next.END if op is _op.POSSESSIVE_REPEAT else follow
        inside, start = self._tree(tree, flags, after if most == 1 else min(again, after))
        self._repeat_depth -= 1
        if least == 0 or start is _Next.END:
            start = min(start, follow) if start is not _Next.END else follow
        return [(op, (least, most, inside))], start

    def _place(self, place: Any, flags: int) -> Any:
        if place is _op.AT_NON_BOUNDARY or (place is _op.AT_BOUNDARY and not flags & re.ASCII):
            raise _LeftAloneError  # rule 5; and within a character nothing is a boundary
        return place

    def _assertion(self, op: Any, value: Any, flags: int, follow: _Next) -> tuple[list[_Item], _Next]:
        direction, tree = value
        inside, start = self._tree(tree, flags, _Next.END)
        if op is _op.ASSERT and start is _Next.WHOLE:
            # Looking ahead, a character begins here; looking behind, one ends here: all that it takes is
            # whole characters, and runs have no place in it because its width is fixed.
            return [(op, (direction, inside))], _Next.WHOLE
        self._may_refuse_or_keep = True
        # Unlike the end of the pattern it can refuse a place, and a greedy run would then give bytes back.
        return [(op, (direction, inside))], _Next.WHOLE if follow is _Next.WHOLE else _Next.OPEN


def _beyond(op: Any, value: Any, flags: int) -> _Beyond:
    """Which characters beyond ASCII one item matches; NONE for what is no single character."""
    if op is _op.ANY:
        return _Beyond.ALL
    if op is _op.LITERAL:
        related = flags & re.IGNORECASE and value in _RELATED_BEYOND_ASCII and not flags & re.ASCII
        return _Beyond.SOME if value >= _ASCII_END or related else _Beyond.NONE
    if op is _op.NOT_LITERAL:
        return _opposite(_beyond(_op.LITERAL, value, flags))
    if op is not _op.IN:
        return _Beyond.NONE
    is_negated = value[0][0] is _op.NEGATE
    taken = _class_beyond(value[is_negated:], flags)
    return _opposite(taken) if is_negated else taken


def _class_beyond(items: Sequence[_Item], flags: int) -> _Beyond:
    categories = {value for op, value in items if op is _op.CATEGORY}
    if any({one, other} <= categories for one, other in _OPPOSITE_CATEGORIES):
        return _Beyond.ALL
    found = {_class_item_beyond(op, value, flags) for op, value in items}
    if _Beyond.ALL in found:
        return _Beyond.ALL
    return _Beyond.SOME if _Beyond.SOME in found else _Beyond.NONE


def _class_item_beyond(op: Any, value: Any, flags: int) -> _Beyond:
    if op is _op.CATEGORY:
        if not flags & re.ASCII:
            return _Beyond.SOME
        return _Beyond.ALL if value in {other for _, other in _OPPOSITE_CATEGORIES} else _Beyond.NONE
    if op is _op.LITERAL:
        return _beyond(op, value, flags)
    first, last = value
    if first <= _ASCII_END and last == _LAST_CHARACTER:
        return _Beyond.ALL
    if last >= _ASCII_END:
        return _Beyond.SOME
    related = not _RELATED_BEYOND_ASCII.isdisjoint(range(first, last + 1))
    return _Beyond.SOME if flags & re.IGNORECASE and not flags & re.ASCII and related else _Beyond.NONE


_OPPOSITE_CATEGORIES = (
    (_op.CATEGORY_DIGIT, _op.CATEGORY_NOT_DIGIT),
    (_op.CATEGORY_SPACE, _op.CATEGORY_NOT_SPACE),
    (_op.CATEGORY_WORD, _op.CATEGORY_NOT_WORD),
)


def _opposite(taken: _Beyond) -> _Beyond:
    return {_Beyond.NONE: _Beyond.ALL, _Beyond.ALL: _Beyond.NONE}.get(taken, taken)


def _encoded_literal(op: Any, value: Any, flags: int) -> list[_Item]:
    """The bytes of a literal character beyond ASCII; anything else that matches there is left alone."""
    if op is not _op.LITERAL or value < _ASCII_END or 0xD800 <= value <= 0xDFFF:
        raise _LeftAloneError
    if flags & re.IGNORECASE and _sre.unicode_iscased(value):
        raise _LeftAloneError
    return [(_op.LITERAL, byte) for byte in chr(value).encode()]


# --- What is known of a pattern's matches ---------------------------------------------------------------


def _collect_start(items: Sequence[_Item], flags: int, start: list[str]) -> bool:
    """Collects what matches begin with, as far as it is certain; whether all items were so."""
    for op, value in items:
        if op is _op.LITERAL and not flags & re.IGNORECASE and not 0xD800 <= value <= 0xDFFF:
            start.append(chr(value))
        elif op is _op.SUBPATTERN:
            _, add, remove, tree = value
            if not _collect_start(tree.data, _flags_within(flags, add, remove), start):
                return False
        elif op not in (_op.AT, _op.ASSERT, _op.ASSERT_NOT):
            return False
    return True


def _most_newlines(items: Sequence[_Item], flags: int) -> int | None:
    """How many newlines these items can take or look at, each in its turn."""
    most = 0
    for op, value in items:
        one = _newlines_of(op, value, flags)
        if one is None:
            return None
        most += one
    return most


def _newlines_of(op: Any, value: Any, flags: int) -> int | None:
    if op in (_op.LITERAL, _op.NOT_LITERAL, _op.ANY, _op.IN):
        return int(_takes_newline(op, value, flags))
    if op is _op.AT:
        return 0
    if op is _op.SUBPATTERN:
        _, add, remove, tree = value
        return _most_newlines(tree.data, _flags_within(flags, add, remove))
    if op is _op.ATOMIC_GROUP:
        return _most_newlines(value.data, flags)
    if op in (_op.ASSERT, _op.ASSERT_NOT):
        return _most_newlines(value[1].data, flags) if value[0] > 0 else 0
    if op is _op.BRANCH:
        branches = [_most_newlines(tree.data, flags) for tree in value[1]]
        known = [one for one in branches if one is not None]
        return max(known) if len(known) == len(branches) else None
    if op in (_op.MAX_REPEAT, _op.MIN_REPEAT, _op.POSSESSIVE_REPEAT):
        _, most, tree = value
        once = _most_newlines(tree.data, flags)
        if once == 0:
            return 0
        return None if once is None or most == _op.MAXREPEAT else int(once * most)
    return None  # a back-reference may take what a group took, again and again


def _takes_newline(op: Any, value: Any, flags: int) -> bool:
    if op is _op.ANY:
        return bool(flags & re.DOTALL)
    if op is _op.IN:
        is_negated = value[0][0] is _op.NEGATE
        return is_negated != any(_class_takes_newline(*item) for item in value[is_negated:])
    return bool((op is _op.LITERAL) == (value == _NEWLINE))


def _class_takes_newline(op: Any, value: Any) -> bool:
    if op is _op.CATEGORY:
        return value in (_op.CATEGORY_SPACE, _op.CATEGORY_NOT_DIGIT, _op.CATEGORY_NOT_WORD)
    return bool(value == _NEWLINE if op is _op.LITERAL else value[0] <= _NEWLINE <= value[1])


def _all_items(tree: Any) -> Iterator[_Item]:
    waiting = [tree]
    while waiting:
        one = waiting.pop()
        if isinstance(one, _parser.SubPattern):
            yield from one.data
            waiting += [value for _, value in one.data]
        elif isinstance(one, tuple | list):
            waiting += one
