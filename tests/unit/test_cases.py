import pytest

from tests.cases import NO_RUNSC, Case, Ran, Shown, Verdict, as_markdown, judge, loud, read_catalogue, totals

A01 = Case(id="A01", title="nothing is held", priority="P0", lanes=["no_container", "runsc"])


def shown(*session: Ran, case: Case = A01) -> Shown:
    (only,) = judge({case.id: case}, session)
    return only


def ran(lane: str, outcome: str = "passed", reason: str = "", test: str = "t") -> Ran:
    return Ran(test=f"{test}[{lane}]", lane=lane, outcome=outcome, reason=reason, cases=["A01"])


def test_a_case_is_shown_by_a_passing_test_in_each_of_its_lanes() -> None:
    assert shown(ran("no_container"), ran("runsc")).verdict is Verdict.SHOWN


def test_a_case_without_a_passing_test_in_a_lane_fails_the_session() -> None:
    missing = shown(ran("no_container"))
    assert missing.verdict is Verdict.NOT_SHOWN
    assert missing.fails_the_session
    assert loud([missing]) == ["NOT TESTED: A01 (P0) on runsc, nothing is held: no test"]


def test_a_skipped_test_shows_nothing() -> None:
    skipped = shown(ran("no_container"), ran("runsc", "skipped", "no time"))
    assert skipped.fails_the_session
    assert "no time" in loud([skipped])[0]


def test_a_machine_without_runsc_is_told_loudly_and_not_failed() -> None:
    without = shown(ran("no_container"), ran("runsc", "skipped", f"Skipped: {NO_RUNSC}"))
    assert without.verdict is Verdict.NOT_TESTED
    assert not without.fails_the_session
    assert loud([without]) == [f"NOT TESTED: A01 (P0) on runsc, nothing is held: Skipped: {NO_RUNSC}"]


def test_one_failure_outweighs_what_passed_in_whatever_lane() -> None:
    failed = shown(ran("no_container"), ran("runsc"), ran("runc", "failed", test="other"))
    assert failed.verdict is Verdict.FAILED
    assert failed.fails_the_session


def test_a_p2_case_may_be_missing_but_not_fail() -> None:
    p2 = Case(id="A01", title="nothing is held", priority="P2", lanes=["runsc"])
    assert not shown(case=p2).fails_the_session
    assert shown(ran("runsc", "failed"), case=p2).fails_the_session


def test_only_controls_that_passed_count_as_fired() -> None:
    fired = Ran(test="c", lane="runc", outcome="passed", controls=["A01"])
    blind = Ran(test="d", lane="runc", outcome="failed", controls=["A01"])
    assert shown(fired, blind).controls_fired == 1


def test_a_test_of_two_cases_is_counted_once() -> None:
    b01 = Case(id="B01", title="nor that", priority="P1", lanes=["runc"])
    both = Ran(test="t", lane="runc", outcome="passed", cases=["A01", "B01"])
    assert totals(judge({"A01": A01, "B01": b01}, [both]))["tests"] == 1


def test_the_summary_says_what_runtimes_do_differently() -> None:
    assert "| write to /proc | EPERM here |" in as_markdown([shown()], {"write to /proc": "EPERM here"})


def test_the_catalogue_can_be_read_and_names_every_group() -> None:
    catalogue = read_catalogue()
    assert {name[0] for name in catalogue} == set("ABCDEFGHIJLNQ")
    assert sum(case.priority == "P0" for case in catalogue.values()) > 80


def test_a_lane_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match="A01"):
        Case(id="A01", title="", priority="P0", lanes=["crun"])
