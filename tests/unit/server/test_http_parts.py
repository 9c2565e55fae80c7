"""Parts of the HTTP side that need no port."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rlm_proto.v1 import run_pb2

from orchestrator import errors
from orchestrator.errors import InvalidRequestError, OrchestratorError
from orchestrator.server.http import pages
from orchestrator.server.http.app import ROUTES
from orchestrator.server.http.forms import OptionsForm, RunReply, query_values
from orchestrator.server.http.refusals import BY_ERROR, told
from orchestrator.server.http.streams import in_batches


def test_every_error_has_its_own_row() -> None:
    defined = {
        one
        for one in vars(errors).values()
        if isinstance(one, type) and issubclass(one, OrchestratorError) and one is not OrchestratorError
    }
    assert set(BY_ERROR) == defined


@pytest.mark.parametrize(
    "error",
    [one for one in BY_ERROR if BY_ERROR[one].kind in {"api_error", "overloaded_error"}],
    ids=lambda e: e.__name__,
)
def test_our_own_failures_are_told_without_their_words(error: type[OrchestratorError]) -> None:
    made = error.__new__(error)
    Exception.__init__(made, "a path of this machine")
    assert "path" not in told(made)[1]


def test_options_and_runs_have_the_fields_of_the_protos() -> None:
    assert set(OptionsForm.model_fields) == {field.name for field in run_pb2.RunOptions.DESCRIPTOR.fields}
    assert set(RunReply.model_fields) == {field.name for field in run_pb2.Run.DESCRIPTOR.fields}


def test_the_page_names_every_route_and_every_kind_of_error() -> None:
    page = (Path(__file__).parents[3] / "docs" / "http.md").read_text()
    for route in ROUTES:
        assert f"`{route.method} {route.path}" in page
    for refusal in BY_ERROR.values():
        assert f"`{refusal.kind}`" in page
        assert str(refusal.status) in page


@given(st.floats(0, 4e9), st.from_regex(r"[A-Za-z0-9_-]{1,64}", fullmatch=True))
def test_a_page_token_says_what_it_was_made_of(at: float, name: str) -> None:
    found = pages.read(pages.token(at, name))
    assert found is not None
    assert found[1] == name
    assert found[0] == pytest.approx(at, abs=1e-8)


@given(st.integers(1_500_000_000, 2_500_000_000), st.integers(0, 999_999))
def test_a_time_of_this_century_survives_a_page_token_exactly(second: int, microsecond: int) -> None:
    at = second + microsecond / 1_000_000
    assert pages.read(pages.token(at, "r1")) == (at, "r1")


@given(st.text(max_size=60))
def test_a_page_token_that_is_none_is_refused_and_nothing_else_happens(given_token: str) -> None:
    with contextlib.suppress(InvalidRequestError):
        pages.read(given_token)


def test_a_query_gives_lists_only_where_its_form_has_them() -> None:
    pairs = [("state", "queued"), ("page_size", "1"), ("state", "ended"), ("page_size", "2")]
    assert query_values(pairs, frozenset({"state"})) == {"state": ["queued", "ended"], "page_size": "2"}


async def test_pauses_are_told_and_nothing_is_lost_between_them() -> None:
    async def slow() -> AsyncIterator[int]:
        for number in range(3):
            await asyncio.sleep(0.05)
            yield number

    found = [some async for some in in_batches(slow(), 0.01)]
    assert [one for some in found for one in some] == [0, 1, 2]
    assert found.count(()) >= 3


async def test_what_is_there_together_comes_together() -> None:
    async def quick() -> AsyncIterator[int]:
        for number in range(1_000):
            yield number

    found = [some async for some in in_batches(quick(), 10.0)]
    assert [one for some in found for one in some] == list(range(1_000))
    assert len(found) < 20


async def test_a_slow_reader_holds_up_the_source() -> None:
    made = 0

    async def quick() -> AsyncIterator[int]:
        nonlocal made
        while True:
            made += 1
            yield made

    async with aclosing(in_batches(quick(), 10.0)) as batches:
        first = await anext(batches)
        for _ in range(100):
            await asyncio.sleep(0)
        assert made <= 3 * len(first)


async def test_a_source_that_fails_fails_its_reader_after_what_it_gave() -> None:
    async def broken() -> AsyncIterator[int]:
        yield 1
        raise InvalidRequestError("broken")

    batches = in_batches(broken(), 1.0)
    assert await anext(batches) == (1,)
    with pytest.raises(InvalidRequestError, match="broken"):
        await anext(batches)


async def test_who_stops_reading_ends_the_source() -> None:
    is_ended = asyncio.Event()

    async def endless() -> AsyncIterator[int]:
        try:
            yield 1
            await asyncio.sleep(3_600)
        finally:
            is_ended.set()

    reading = in_batches(endless(), 0.01)
    assert await anext(reading) == (1,)
    assert await anext(reading) == ()
    await reading.aclose()
    assert is_ended.is_set()
