"""Which versions have known holes: the rule and the table.

The table is `known_bad.toml`; what is in it and why is said there. The rule:

1. A version is bad when it is lower than the fix of its own branch (major.minor), or its branch got no fix
   and is older than one that did.
2. It is good when the distribution says so: a package keeps its number when a hole is mended, and its
   changelog names the CVE. `Component.mended` holds what was found there.
3. A number that says nothing about what is in it (a kernel of Ubuntu or Red Hat), or that cannot be read, is
   neither: it is unknown, and said to be.

Pure: no I/O but the table itself, which is part of the program.
"""

import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

_DOTTED = re.compile(r"v?(\d{1,9}(?:\.\d{1,9}){1,3})(?:[-~.]?(rc|beta|alpha)[.-]?(\d{1,9}))?")
_DATED = re.compile(r"(?<!\d)(20\d{6})(?:\.\d{1,4})?(?!\d)")
_RELEASED = 1
"""Sorts after the candidates of the same number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Component:
    """A part whose version is known."""

    name: str
    """As in the table: engine, containerd, runc, runsc, kernel, grpcio, protobuf."""
    version: str
    """As the part reports it. Empty when its number says nothing."""
    mended: frozenset[str] = frozenset()
    """CVE ids that the changelog of exactly this package names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hole:
    """A row of the table."""

    component: str
    cves: tuple[str, ...]
    fixed: tuple[str, ...]
    since: str
    release: int
    what: str
    source: str


@cache
def table() -> tuple[Hole, ...]:
    """The rows that we ship."""
    return read_table(files("orchestrator.sandbox").joinpath("known_bad.toml").read_text(encoding="utf-8"))


def read_table(text: str) -> tuple[Hole, ...]:
    """The rows of a table in TOML."""
    return tuple(_hole(row) for row in tomllib.loads(text)["hole"])


def open_holes(component: Component, holes: Iterable[Hole]) -> tuple[Hole, ...]:
    """The holes that the component's version is known to have."""
    return tuple(
        hole
        for hole in holes
        if hole.component == component.name
        and is_bad(component.version, hole)
        and not (hole.cves and component.mended.issuperset(hole.cves))
    )


def is_bad(version: str, hole: Hole) -> bool:
    """Whether the number alone says that the hole is there. False when it cannot be read."""
    if hole.release:
        dated = _DATED.search(version)
        return dated is not None and int(dated[1]) < hole.release
    number = parsed(version)
    if number is None or (hole.since and number < _sure(hole.since)):
        return False
    fixes = [_sure(fixed) for fixed in hole.fixed]
    for fix in fixes:
        if fix[:2] == number[:2]:
            return number < fix
    return number[:2] < max(fix[:2] for fix in fixes)


def is_readable(component: Component) -> bool:
    """Whether the table's rule can judge the version at all."""
    return bool(parsed(component.version) or _DATED.search(component.version))


def parsed(version: str) -> tuple[int, ...] | None:
    """A version in an order: four numbers, whether it is a release, the number of its candidate.

    What follows the number (a distribution's own, a commit) is left out. None when there is no number.
    """
    match = _DOTTED.match(version)
    if match is None:
        return None
    numbers = [int(part) for part in match[1].split(".")]
    candidate = (0, int(match[3])) if match[2] else (_RELEASED, 0)
    return (*numbers, *(0,) * (4 - len(numbers)), *candidate)


def _sure(version: str) -> tuple[int, ...]:
    number = parsed(version)
    if number is None:
        raise ValueError(f"{version!r} in the table is no version")
    return number


def _hole(row: Mapping[str, Any]) -> Hole:
    cves: Sequence[str] = row["cves"]
    hole = Hole(
        component=row["component"],
        cves=tuple(cves),
        fixed=tuple(row.get("fixed", ())),
        since=row.get("since", ""),
        release=row.get("release", 0),
        what=row["what"],
        source=row["source"],
    )
    if bool(hole.fixed) == bool(hole.release):
        raise ValueError(f"a row about {hole.component} needs either `fixed` or `release`")
    return hole
