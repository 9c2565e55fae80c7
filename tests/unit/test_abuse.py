import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.abuse import LIMITS, Conduct, Offence, Pace
from orchestrator.limits import FREE_CALLS_AT_FULL_SPEED, FREE_CALLS_PER_S, MAX_REFUSALS


@pytest.mark.parametrize("offence", Offence)
def test_one_offence_more_than_the_limit_is_one_too_many_and_only_that_one(offence: Offence) -> None:
    conduct = Conduct()
    assert not any(conduct.blame(offence) for _ in range(LIMITS[offence]))
    assert not conduct.verdict
    assert conduct.blame(offence)
    assert not conduct.blame(offence)
    assert offence.value in conduct.verdict
    assert f"{LIMITS[offence]:,}" in conduct.verdict


def test_the_first_verdict_stays() -> None:
    conduct = Conduct()
    for _ in range(LIMITS[Offence.MALFORMED] + 1):
        conduct.blame(Offence.MALFORMED)
    first = conduct.verdict
    assert not any(conduct.blame(Offence.UNKNOWN_METHOD) for _ in range(LIMITS[Offence.UNKNOWN_METHOD] + 1))
    assert conduct.verdict == first


def test_offences_of_different_kinds_are_not_added_up() -> None:
    conduct = Conduct()
    for offence in Offence:
        for _ in range(LIMITS[offence]):
            assert not conduct.blame(offence)


def test_ten_thousand_refusals_of_a_batch_are_nothing_remarkable() -> None:
    conduct = Conduct()
    assert not any(conduct.blame(Offence.REFUSED) for _ in range(10_000))
    assert not conduct.remarkable
    assert MAX_REFUSALS >= 5 * 10_000


@pytest.mark.parametrize("offence", [Offence.MALFORMED, Offence.UNKNOWN_METHOD, Offence.TURNED_AWAY])
def test_what_no_library_of_ours_sends_is_remarkable_at_once(offence: Offence) -> None:
    conduct = Conduct()
    conduct.blame(offence)
    assert conduct.remarkable


def test_calls_are_free_of_delay_until_the_burst_is_used_up() -> None:
    pace = Pace()
    assert all(pace.delay_s(100.0) == 0 for _ in range(FREE_CALLS_AT_FULL_SPEED))
    assert pace.delay_s(100.0) == pytest.approx(1 / FREE_CALLS_PER_S)
    assert pace.delay_s(100.0) == pytest.approx(2 / FREE_CALLS_PER_S)


def test_who_pauses_gets_a_burst_again() -> None:
    pace = Pace(burst=10, per_s=5)
    for _ in range(30):
        pace.delay_s(0.0)
    assert pace.delay_s(0.0) > 4
    assert all(pace.delay_s(100.0) < 1e-6 for _ in range(10))
    assert pace.delay_s(100.0) > 0.1


@given(st.lists(st.floats(0, 5), max_size=200), st.integers(1, 20), st.floats(1, 50))
def test_however_they_come_no_more_calls_are_served_than_the_burst_and_the_rate(
    gaps_s: list[float], burst: int, per_s: float
) -> None:
    pace, now_s, served_s = Pace(burst=burst, per_s=per_s), 0.0, []
    for gap_s in gaps_s:
        now_s += gap_s
        served_s.append(now_s + pace.delay_s(now_s))
    for place, begin_s in enumerate(served_s):
        for later, end_s in enumerate(served_s[place:], start=1):
            assert later <= burst + (end_s - begin_s) * per_s + 1.001
