"""Hypothesis strategies: events in which every text is as bad as a guest can make it."""

import dataclasses
import types
import typing
from collections.abc import Mapping

from hypothesis import strategies as st

from orchestrator import trajectory
from orchestrator.budget import Amounts
from orchestrator.ids import RunId
from orchestrator.pricing import Usage
from orchestrator.trajectory import Blob, Event, Payload

_BAD = st.sampled_from(
    [
        "\x1b[2J",
        "\x1b]0;title\x07",
        "\x9b31m",
        "\r",
        "\x08",
        "\x7f",
        "\x00",
        "\u202e",
        "\u2066",
        "\u2028",
        "\ud800",
        "\n",
    ]
)
texts = st.lists(_BAD | st.text(max_size=4), max_size=6).map("".join)
_counts = st.integers(min_value=0, max_value=10**9)
_amounts = st.builds(Amounts, _counts, _counts, _counts, _counts)
_run_ids = st.sampled_from([RunId("ra"), RunId("rb"), RunId("rc")])

_BY_TYPE: Mapping[object, st.SearchStrategy[object]] = {
    str: texts,
    bool: st.booleans(),
    int: st.integers(min_value=0, max_value=200),
    float: st.floats(min_value=0, max_value=1e6),
    RunId: _run_ids,
    type(None): st.none(),
    Blob: st.builds(Blob, texts, _counts, st.just("0" * 64)),
    Amounts: _amounts,
    Usage: st.builds(Usage, _counts, _counts, _counts, _counts),
    tuple[str, ...]: st.lists(texts, max_size=3).map(tuple),
    Mapping[str, int]: st.dictionaries(texts, _counts, max_size=2),
    Mapping[str, float]: st.dictionaries(texts, st.floats(0, 1e9), max_size=2),
}


def _of(hint: object) -> st.SearchStrategy[object]:
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        return st.one_of([_of(part) for part in typing.get_args(hint)])
    return _BY_TYPE[hint]


def _payload(kind: type[Payload]) -> st.SearchStrategy[Payload]:
    hints = typing.get_type_hints(kind)
    fields = {item.name: _of(hints[item.name]) for item in dataclasses.fields(kind)}
    return st.builds(kind, **fields)


payload_kinds: tuple[type[Payload], ...] = typing.get_args(trajectory.Payload)

events = st.builds(
    Event,
    _run_ids,
    st.integers(0, 100),
    st.floats(min_value=1.7e9, max_value=1.7e9 + 1e6),
    st.one_of([_payload(kind) for kind in payload_kinds]),
)
