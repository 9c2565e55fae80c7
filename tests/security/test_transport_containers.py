"""Floods out of real containers: who floods is ended, the neighbour goes on, honest waste is borne."""

from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.limits import RunLimits
from orchestrator.sandbox.port import GUEST_SOCKET_DIR
from orchestrator.trajectory import GuestMisbehaved
from orchestrator.turn import Outcome
from tests.security.house import House, open_house
from tests.wire import raw_guest

_RAW_GUEST = Path(raw_guest.__file__).read_text().partition("def main")[0]
FEW_CALLS = RunLimits(max_calls=3, cell_timeout_s=60)


def flooding(attack: str) -> str:
    """A cell that speaks to its socket by hand."""
    socket = f"{GUEST_SOCKET_DIR}/broker.sock"
    return f"{_RAW_GUEST}\nprint({attack.replace('SOCKET', repr(socket))})\nprint('survived')"


async def cell_beside(house: House, attack: str) -> tuple[Outcome, str, list[GuestMisbehaved], str]:
    """The end of a run that floods, and what a neighbour's cell printed afterwards."""
    async with house.sandbox("the neighbour's text") as neighbour:
        story = await house.cells(flooding(attack), limits=FEW_CALLS)
        counted = [one.payload for one in story.events if isinstance(one.payload, GuestMisbehaved)]
        return story.end.outcome, story.end.why, counted, await neighbour.says("print(len(context))")


@pytest.mark.case("G04", "G09", "G10")
@pytest.mark.parametrize(
    ("attack", "what"),
    [
        ("rapid_reset(SOCKET, most=10**6, most_s=40)", "given up as they were made"),
        ("malformed(SOCKET, most=10**6, most_s=40)", "malformed messages"),
        ("unknown_methods(SOCKET, most=10**6, most_s=40)", "calls of unknown methods"),
    ],
    ids=["resets", "junk", "unknown methods"],
)
async def test_a_run_that_floods_its_socket_is_ended_and_told_why_and_its_neighbour_goes_on(
    settings: Settings, engine: DockerClient, runtime: str, attack: str, what: str
) -> None:
    async with open_house(settings, engine, runtime) as house:
        outcome, why, counted, printed = await cell_beside(house, attack)
    assert outcome is Outcome.ABUSE
    assert what in why
    assert len(counted) == 1
    assert any(what in kind for kind in counted[0].counts)
    assert printed == "20"


@pytest.mark.case("G01", "G08")
@pytest.mark.parametrize("attack", ["frames(SOCKET, most_s=2)", "silent(SOCKET, 200, 1.0)"])
async def test_a_guest_that_wastes_its_own_connections_ends_nothing_but_those(
    settings: Settings, engine: DockerClient, runtime: str, attack: str
) -> None:
    async with open_house(settings, engine, runtime) as house:
        outcome, _, _, printed = await cell_beside(house, attack)
    assert outcome is Outcome.ANSWERED
    assert printed == "20"


async def test_a_batch_that_goes_on_asking_after_its_budget_ran_out_is_slowed_down_and_not_ended(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    cell = (
        "found = llm_query_batched([f'prompt {n}' for n in range(1_300)], on_error='return')\n"
        "FINAL(sum(isinstance(one, BudgetExceeded) for one in found))"
    )
    async with open_house(settings, engine, runtime) as house:
        story = await house.cells(cell, limits=FEW_CALLS)
    assert story.end.outcome is Outcome.ANSWERED, story.end.why
    # One call is the turn's, one is kept for the last answer.
    assert story.end.answer == "1299"
    (counted,) = [one.payload for one in story.events if isinstance(one.payload, GuestMisbehaved)]
    # A few that were asked for side by side may be recorded past the thousandth.
    assert 280 < counted.unrecorded_refusals <= 299
