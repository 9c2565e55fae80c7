import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.cells import CellClock, CellLimit, CellOutcome, CellResult

START = 1_000.0


def clock(timeout_s: float = 10.0, cpu_s: float = 20.0, ceiling_s: float = 100.0) -> CellClock:
    return CellClock(started_s=START, cell_timeout_s=timeout_s, cell_cpu_s=cpu_s, cell_ceiling_s=ceiling_s)


# --- The clock --------------------------------------------------------------------------------------------


def test_guest_time_is_wall_time_while_nothing_is_in_flight() -> None:
    assert clock().guest_s(START + 3) == 3


def test_guest_time_stands_still_while_a_sub_call_is_in_flight() -> None:
    cell = clock()
    cell.sub_call_started(START + 2)
    assert cell.guest_s(START + 50) == 2
    cell.sub_call_ended(START + 50)
    assert cell.guest_s(START + 53) == 5


def test_overlapping_sub_calls_stop_the_clock_once() -> None:
    cell = clock()
    cell.sub_call_started(START + 1)
    cell.sub_call_started(START + 2)
    cell.sub_call_ended(START + 5)
    assert cell.waiting
    cell.sub_call_ended(START + 9)
    assert cell.guest_s(START + 10) == 2


@pytest.mark.parametrize(
    ("after_s", "cpu_s", "limit"),
    [
        (9.9, 19.9, None),
        (10.0, 0.0, CellLimit.GUEST_TIME),
        (5.0, 20.0, CellLimit.CPU_TIME),
    ],
)
def test_a_limit_is_passed_when_it_is_reached(after_s: float, cpu_s: float, limit: CellLimit | None) -> None:
    assert clock().passed(START + after_s, cpu_s) is limit


def test_cpu_time_counts_beside_a_waiting_call() -> None:
    cell = clock()
    cell.sub_call_started(START)
    assert cell.passed(START + 50, 19.9) is None
    assert cell.passed(START + 50, 20.0) is CellLimit.CPU_TIME


def test_the_ceiling_counts_waiting_too() -> None:
    cell = clock()
    cell.sub_call_started(START)
    assert cell.passed(START + 99, 0.0) is None
    assert cell.passed(START + 100, 0.0) is CellLimit.CEILING


def test_the_next_look_is_when_guest_time_could_be_over() -> None:
    assert clock().next_look_s(START + 4) == 6


def test_the_next_look_is_at_the_ceiling_when_that_comes_first() -> None:
    assert clock(ceiling_s=5).next_look_s(START + 4) == 1


def test_while_waiting_only_the_ceiling_can_be_passed_by_time_alone() -> None:
    cell = clock()
    cell.sub_call_started(START + 1)
    assert cell.next_look_s(START + 40) == 60


Intervals = st.lists(st.tuples(st.integers(0, 200), st.integers(0, 200)), max_size=12)


@given(intervals=Intervals, now=st.integers(0, 250))
def test_guest_time_is_wall_time_less_the_union_of_all_waiting(
    intervals: list[tuple[int, int]], now: int
) -> None:
    """Counted by whole seconds, one by one."""
    spans = [(min(pair), max(pair)) for pair in intervals]
    moments = [(start, 0) for start, _ in spans] + [(end, 1) for _, end in spans]
    cell = clock()
    # At one moment starts come first: no call ends before it began.
    for moment, is_end in sorted(moment for moment in moments if moment[0] <= now):
        (cell.sub_call_ended if is_end else cell.sub_call_started)(START + moment)
    waited = sum(any(start <= second < end for start, end in spans) for second in range(now))
    assert cell.guest_s(START + now) == now - waited


@given(intervals=Intervals, steps=st.lists(st.integers(0, 40), max_size=20))
def test_guest_time_never_runs_back_and_never_faster_than_the_wall(
    intervals: list[tuple[int, int]], steps: list[int]
) -> None:
    cell, now, before = clock(), START, 0.0
    open_calls = 0
    for step, (first, _) in zip(steps, [*intervals, *[(0, 0)] * len(steps)], strict=False):
        if first % 3 == 0:
            cell.sub_call_started(now)
            open_calls += 1
        elif open_calls:
            cell.sub_call_ended(now)
            open_calls -= 1
        now += step
        assert before <= cell.guest_s(now) <= before + step
        before = cell.guest_s(now)


@given(
    waits=st.lists(st.booleans(), max_size=5),
    after_s=st.floats(0, 300),
    timeout_s=st.floats(0.1, 200),
    ceiling_s=st.floats(0.1, 200),
)
def test_a_limit_that_time_alone_can_pass_is_looked_at_in_time(
    waits: list[bool], after_s: float, timeout_s: float, ceiling_s: float
) -> None:
    cell = clock(timeout_s=timeout_s, ceiling_s=ceiling_s)
    for number, wait in enumerate(waits):
        moment = START + after_s * number / len(waits)
        if wait:
            cell.sub_call_started(moment)
        elif cell.waiting:
            cell.sub_call_ended(moment)
    now = START + after_s
    look_s = cell.next_look_s(now)
    if cell.passed(now, 0.0):
        assert look_s == 0
    else:
        assert cell.passed(now + look_s / 2, 0.0) is None
        assert cell.passed(now + look_s + 1e-6, 0.0)


# --- Outcomes and results ---------------------------------------------------------------------------------


def test_the_namespace_is_kept_by_exactly_three_outcomes() -> None:
    kept = {outcome for outcome in CellOutcome if outcome.namespace_kept}
    assert kept == {CellOutcome.OK, CellOutcome.ERROR, CellOutcome.INTERRUPTED}


def test_an_output_that_was_not_cut_is_shown_whole() -> None:
    result = CellResult(outcome=CellOutcome.OK, output_head="ab", output_tail="cd", output_bytes=4)
    assert result.output == "abcd"


def test_a_cut_is_named_where_it_is() -> None:
    result = CellResult(
        outcome=CellOutcome.OK, output_head="head", output_tail="tail", output_bytes=50_008, cut_bytes=50_000
    )
    assert result.output == "head\n[... 50,000 bytes of output cut ...]\ntail"
