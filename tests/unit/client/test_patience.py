"""How long a client goes on trying: rules of `orchestrator.client.patience`."""

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.client.patience import FIRST_PAUSE_S, LONGEST_PAUSE_S, Row


def pauses(row: Row, *, most: int = 1_000) -> list[float]:
    """Of attempts that fail at once, until the row's time is up."""
    now_s, found = 0.0, list[float]()
    while (pause_s := row.failed(now_s)) is not None and len(found) < most:
        found.append(pause_s)
        now_s += pause_s
    return found


def test_pauses_double_up_to_the_longest() -> None:
    found = pauses(Row(1_000.0, lambda: 0.0))
    assert found[:4] == [FIRST_PAUSE_S * factor for factor in (1, 2, 4, 8)]
    assert max(found) == LONGEST_PAUSE_S
    assert found[-2] == LONGEST_PAUSE_S


@given(st.floats(min_value=0.1, max_value=10_000.0), st.floats(min_value=0.0, max_value=1.0))
def test_a_row_lasts_as_long_as_it_may_and_no_longer(most_s: float, chance: float) -> None:
    assert abs(sum(pauses(Row(most_s, lambda: chance), most=10_000)) - most_s) < 1e-6 * most_s


def test_chance_shortens_a_pause_by_at_most_a_half() -> None:
    row = Row(60.0, lambda: 1.0)
    assert row.failed(0.0) == FIRST_PAUSE_S / 2


def test_a_row_is_open_from_its_first_failure_until_something_is_heard() -> None:
    row = Row(10.0, lambda: 0.0)
    states = [row.is_open]
    row.failed(0.0)
    states.append(row.is_open)
    row.heard()
    assert [*states, row.is_open] == [False, True, False]


def test_a_row_after_something_was_heard_has_a_time_and_pauses_of_its_own() -> None:
    row = Row(10.0, lambda: 0.0)
    row.failed(0.0)
    row.failed(9.0)
    row.heard()
    assert row.failed(100.0) == FIRST_PAUSE_S
    assert row.failed(109.0) is not None
    assert row.failed(110.0) is None
