"""The plugin behind `make test-security`: collects what tests of attack cases showed, and writes it down.

`--case-summary=DIR` writes DIR/security.md and DIR/security.json, prints what was not tested, and fails a
session that leaves a case open (`tests/cases.py` has the rules). A session that runs only some of the tests
writes what it saw with `--case-record=FILE`, and one after it counts that too with `--case-before=FILE`.
Without any of them only unknown ids are refused.

What a test says reaches the controlling process in the properties of its report, so that parallel runs are
counted too: `record_property("control", "A06")` for a control that fired, and
`record_property("difference", "what: how")` for what runc and runsc do differently.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pytest

from tests.cases import LANES, Ran, as_json, as_markdown, judge, loud, read_catalogue, totals


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--case-summary", metavar="DIR", help="write what was shown of the attack cases to DIR")
    parser.addoption("--case-record", metavar="FILE", help="write what tests of attack cases did to FILE")
    parser.addoption(
        "--case-before",
        metavar="FILE",
        action="append",
        default=[],
        help="count what an earlier session wrote to FILE; may be given more than once",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "control(*ids): a probe of these cases sees a door that was opened for it"
    )
    if hasattr(config, "workerinput"):
        return
    if record := config.getoption("--case-record"):
        config.pluginmanager.register(_Record(Path(record)))
    if summary := config.getoption("--case-summary"):
        config.pluginmanager.register(_Summary(Path(summary), before=config.getoption("--case-before")))


@pytest.hookimpl(trylast=True)  # after those that mark the tests of a directory
def pytest_collection_modifyitems(items: Sequence[pytest.Item]) -> None:
    """Writes beside each test which cases it is of, and in which lane."""
    known = read_catalogue()
    for item in items:
        for name in ("case", "control"):
            for marker in item.iter_markers(name):
                if unknown := set(marker.args) - known.keys():
                    raise pytest.UsageError(f"{item.nodeid}: unknown cases {sorted(unknown)}")
                item.user_properties += [(name, case) for case in marker.args]
        item.user_properties.append(("lane", _lane(item)))


def _lane(item: pytest.Item) -> str:
    """Where a test runs: by its `runtime` parameter, else by its markers."""
    runtime = getattr(item, "callspec", None) and item.callspec.params.get("runtime")  # type: ignore[attr-defined]
    if runtime in LANES:
        return str(runtime)
    if item.get_closest_marker("runsc"):
        return "runsc"
    return "runc" if item.get_closest_marker("docker") else "no_container"


class _Seen:
    """What the tests of one session said."""

    def __init__(self) -> None:
        self._ran: dict[str, Ran] = {}
        self._differences: dict[str, str] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        said = [(name, str(value)) for name, value in report.user_properties]
        cases = [value for name, value in said if name == "case"]
        controls = [value for name, value in said if name == "control"]
        if not cases and not controls:
            return
        if report.when != "call" and report.passed:
            return
        self._ran[report.nodeid] = Ran(
            test=report.nodeid,
            lane=next(value for name, value in said if name == "lane"),
            outcome=report.outcome,
            reason=report.longrepr[2] if report.skipped and isinstance(report.longrepr, tuple) else "",
            cases=cases,
            controls=controls,
        )
        for name, value in said:
            if name == "difference":
                what, _, how = value.partition(": ")
                self._differences[what] = how


class _Record(_Seen):
    """Of a session that another one follows."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file

    def pytest_sessionfinish(self) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        ran = [asdict(each) for each in self._ran.values()]
        self._file.write_text(json.dumps({"ran": ran, "differences": self._differences}))


class _Summary(_Seen):
    """Of one session, and of those before it that it counts too."""

    def __init__(self, directory: Path, *, before: Sequence[str]) -> None:
        super().__init__()
        self._directory = directory
        self._lines: list[str] = []
        for file in before:
            earlier = json.loads(Path(file).read_text())
            self._ran |= {each["test"]: Ran(**each) for each in earlier["ran"]}
            self._differences |= earlier["differences"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        shown = judge(read_catalogue(), self._ran.values())
        self._directory.mkdir(parents=True, exist_ok=True)
        (self._directory / "security.md").write_text(as_markdown(shown, self._differences))
        (self._directory / "security.json").write_text(
            json.dumps(as_json(shown, self._differences), indent=1) + "\n"
        )
        open_cases = [each.case.id for each in shown if each.fails_the_session]
        self._lines = [
            *loud(shown),
            *(f"{what}: {how}" for what, how in sorted(self._differences.items())),
            ", ".join(f"{name}: {count}" for name, count in totals(shown).items()),
            f"written to {self._directory}/security.md and .json",
        ]
        if open_cases:
            self._lines.append(f"not shown, and has to be: {' '.join(open_cases)}")
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        terminalreporter.section("attack cases")
        for line in self._lines:
            terminalreporter.line(line)
