"""The catalogue of attack cases, and what a session of tests showed of it.

Rules. They live in this file and nowhere else:

1. A case is shown in a lane if at least one of its tests passed there and none failed there.
2. A P0 or P1 case has to be shown in every one of its lanes, or the session fails.
3. A lane that this machine cannot run (no runsc) is no failure and never silent: it is printed as NOT TESTED.
4. A skipped test shows nothing, whatever its reason.
5. A control is a test in which a probe saw a door that was opened for it. Only those that passed count.
"""

import tomllib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

CATALOGUE = Path(__file__).parent / "security" / "cases.toml"
LANES = ("no_container", "runc", "runsc")
NO_RUNSC = "the engine has no runtime runsc"
"""Why a test of the runsc lane was skipped, where that is the machine's doing."""

_MUST = ("P0", "P1")


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """One entry of the catalogue."""

    id: str
    title: str
    priority: str
    lanes: Sequence[str]
    not_applicable: str = ""
    """Why there is nothing to attack yet."""

    def __post_init__(self) -> None:
        if self.priority not in {"P0", "P1", "P2"} or not self.lanes or not set(self.lanes) <= set(LANES):
            raise ValueError(f"case {self.id}: priority {self.priority}, lanes {self.lanes}")


def read_catalogue(path: Path = CATALOGUE) -> Mapping[str, Case]:
    """All cases, in the order of the file."""
    return {name: Case(id=name, **entry) for name, entry in tomllib.loads(path.read_text()).items()}


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """How one test of some cases ended."""

    test: str
    lane: str
    outcome: str
    """passed, failed or skipped."""
    reason: str = ""
    """Why it was skipped."""
    cases: Sequence[str] = ()
    controls: Sequence[str] = ()
    """Cases whose probes this test shows to see an open door."""


class Verdict(Enum):
    """What a session showed of a case."""

    SHOWN = "shown"
    FAILED = "FAILED"
    NOT_SHOWN = "NOT SHOWN"
    NOT_TESTED = "NOT TESTED"
    NOT_APPLICABLE = "does not apply"


@dataclass(frozen=True, kw_only=True, slots=True)
class Shown:
    """One case and what its tests said."""

    case: Case
    tests: Sequence[Ran]
    controls_fired: int
    lanes: Mapping[str, Verdict]

    @property
    def verdict(self) -> Verdict:
        """Of all its lanes, the worst."""
        if self.case.not_applicable:
            return Verdict.NOT_APPLICABLE
        for worst in (Verdict.FAILED, Verdict.NOT_SHOWN, Verdict.NOT_TESTED):
            if worst in self.lanes.values():
                return worst
        return Verdict.SHOWN

    @property
    def fails_the_session(self) -> bool:
        """Whether a release may not go out like this."""
        failing = {Verdict.FAILED} | ({Verdict.NOT_SHOWN} if self.case.priority in _MUST else set())
        return self.verdict in failing

    def count(self, outcome: str) -> int:
        """How many of its tests ended so."""
        return sum(ran.outcome == outcome for ran in self.tests)


def judge(catalogue: Mapping[str, Case], session: Iterable[Ran]) -> list[Shown]:
    """What a session showed of every case of the catalogue."""
    ran_all = list(session)
    shown = []
    for case in catalogue.values():
        tests = [ran for ran in ran_all if case.id in ran.cases]
        fired = sum(case.id in ran.controls and ran.outcome == "passed" for ran in ran_all)
        lanes = {lane: _judge_lane(lane, tests) for lane in LANES if lane in case.lanes}
        # A failure counts in a lane that the catalogue does not ask for, too.
        lanes |= {ran.lane: Verdict.FAILED for ran in tests if ran.outcome == "failed"}
        shown.append(Shown(case=case, tests=tests, controls_fired=fired, lanes=lanes))
    return shown


def _judge_lane(lane: str, tests: Sequence[Ran]) -> Verdict:
    here = [ran for ran in tests if ran.lane == lane]
    outcomes = Counter(ran.outcome for ran in here)
    if outcomes["failed"]:
        return Verdict.FAILED
    if outcomes["passed"]:
        return Verdict.SHOWN
    if here and all(ran.reason.endswith(NO_RUNSC) for ran in here):
        return Verdict.NOT_TESTED
    return Verdict.NOT_SHOWN


# --- The summary ---------------------------------------------------------------------------------------


def totals(shown: Sequence[Shown]) -> dict[str, int]:
    """The figures under the table."""
    verdicts = Counter(each.verdict for each in shown)
    # A test of several cases is one test.
    tests = {ran.test: ran.outcome for each in shown for ran in each.tests}
    return {
        "cases": len(shown),
        **{verdict.value: verdicts[verdict] for verdict in Verdict},
        "tests": len(tests),
        **{outcome: Counter(tests.values())[outcome] for outcome in ("passed", "failed", "skipped")},
        "controls fired": sum(each.controls_fired for each in shown),
    }


def loud(shown: Sequence[Shown]) -> list[str]:
    """What nobody may overlook: a line for everything that was not shown."""
    lines = []
    for each in shown:
        for lane, verdict in each.lanes.items():
            if verdict is Verdict.SHOWN or each.case.not_applicable:
                continue
            word = "FAILED" if verdict is Verdict.FAILED else "NOT TESTED"
            why = "" if verdict is Verdict.FAILED else f": {_why(each, lane)}"
            lines.append(f"{word}: {each.case.id} ({each.case.priority}) on {lane}, {each.case.title}{why}")
    return lines


def _why(each: Shown, lane: str) -> str:
    reasons = sorted({ran.reason for ran in each.tests if ran.lane == lane and ran.outcome == "skipped"})
    return "; ".join(reasons) or "no test"


def as_json(shown: Sequence[Shown], differences: Mapping[str, str]) -> dict[str, Any]:
    """The summary for machines."""
    return {
        "totals": totals(shown),
        "not_tested": loud(shown),
        "differences": dict(differences),
        "cases": [
            {
                "id": each.case.id,
                "title": each.case.title,
                "priority": each.case.priority,
                "verdict": each.verdict.value,
                "not_applicable": each.case.not_applicable,
                "lanes": {lane: verdict.value for lane, verdict in each.lanes.items()},
                "controls_fired": each.controls_fired,
                "tests": [
                    {"test": ran.test, "lane": ran.lane, "outcome": ran.outcome, "reason": ran.reason}
                    for ran in each.tests
                ],
            }
            for each in shown
        ],
    }


def as_markdown(shown: Sequence[Shown], differences: Mapping[str, str]) -> str:
    """The summary for people."""
    lines = [
        "# Attack cases, and what this session showed",
        "",
        ", ".join(f"{name}: {count}" for name, count in totals(shown).items()),
        "",
        "| case | what must hold | lanes | result | passed | failed | skipped | controls |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in shown:
        case = each.case
        lanes = ", ".join(
            lane if verdict is Verdict.SHOWN or case.not_applicable else f"{lane} ({verdict.value})"
            for lane, verdict in each.lanes.items()
        )
        result = each.verdict.value + (f": {case.not_applicable}" if case.not_applicable else "")
        counts = [str(each.count(outcome)) for outcome in ("passed", "failed", "skipped")]
        row = (f"{case.id} {case.priority}", case.title, lanes, result, *counts, str(each.controls_fired))
        lines.append(f"| {' | '.join(row)} |")
    if differences:
        lines += ["", "## Where runc and runsc differ", "", "| what | how |", "|---|---|"]
        lines += [f"| {what} | {how} |" for what, how in sorted(differences.items())]
    not_shown = loud(shown)
    if not_shown:
        lines += ["", "## Not shown", "", *(f"* {line}" for line in not_shown)]
    return "\n".join(lines) + "\n"
