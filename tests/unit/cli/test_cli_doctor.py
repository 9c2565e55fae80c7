import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import pytest
from typer.testing import CliRunner, Result

from orchestrator import doctor as machine
from orchestrator.cli import doctor as command
from orchestrator.cli.main import app as rlm
from orchestrator.config import Settings
from orchestrator.doctor import Check, Level
from orchestrator.errors import EngineError
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.probes.finding import Finding, Verdict

_ENGINE = Check("engine", Level.OK, "Docker 20.10.24")
_RUNC = Check("runtime runc", Level.OK, "sandbox ready in 0.30 s")
_RUNSC = Check("runtime runsc", Level.OK, "sandbox ready in 0.90 s")
_OLD = Check("runc version", Level.WARNING, "runc 1.1.5 has known holes", "update it")
_IMAGE = Check("image", Level.FAILURE, "not built \x1b[31m", "run `rlm image build`")


@dataclass
class Machine:
    """What doctor is to find."""

    checks: list[Check] = field(default_factory=lambda: [_ENGINE])
    findings: Callable[[str], list[Finding]] = lambda runtime: [found(runtime)]
    probed: list[str] = field(default_factory=list)
    providers: list[str] = field(default_factory=list)
    """Addresses that were to be looked at."""


def found(
    runtime: str,
    case: str = "A01",
    verdict: Verdict = Verdict.CLOSED,
    detail: str = "",
    title: str = "it holds",
) -> Finding:
    return Finding(case=case, title=title, verdict=verdict, detail=detail, runtime=runtime)


@pytest.fixture
def this(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine()

    async def doctor(_settings: Settings, provider: ProviderProcess) -> AsyncIterator[Check]:
        made.providers.append(provider.base_url)
        for check in made.checks:
            yield check

    async def probe_sandbox(_settings: Settings, runtime: str) -> AsyncIterator[Finding]:
        made.probed.append(runtime)
        for finding in made.findings(runtime):
            yield finding

    monkeypatch.setattr(machine, "doctor", doctor)
    monkeypatch.setattr(command, "probe_sandbox", probe_sandbox)
    monkeypatch.setenv("COLUMNS", "100")
    return made


def doctor(*arguments: str) -> Result:
    return CliRunner().invoke(rlm, ["doctor", *arguments])


def test_a_healthy_machine_is_exit_code_0(this: Machine) -> None:
    result = doctor()
    assert result.exit_code == 0
    assert result.stdout == "ok    engine              Docker 20.10.24\n"


def test_the_provider_that_the_server_is_set_to_is_looked_at(
    this: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLM_BASE_URL", "http://127.0.0.1:9")
    assert doctor().exit_code == 0
    assert this.providers == ["http://127.0.0.1:9"]


def test_what_is_missing_comes_with_what_to_do(this: Machine) -> None:
    this.checks.append(_IMAGE)
    result = doctor()
    assert result.exit_code == 3
    assert result.stdout.splitlines()[1:] == [
        "FAIL  image               not built \\x1b[31m",
        "                          → run `rlm image build`",
    ]


@pytest.mark.case("A16")
def test_a_warning_is_shown_and_no_failure(this: Machine) -> None:
    this.checks.append(_OLD)
    result = doctor()
    assert result.exit_code == 0
    assert "warn  runc version        runc 1.1.5 has known holes" in result.stdout


def test_json_is_one_object(this: Machine) -> None:
    this.checks += [_OLD, _IMAGE]
    result = doctor("--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "ok": False,
        "checks": [
            {"name": "engine", "ok": True, "level": "ok", "detail": "Docker 20.10.24", "what_to_do": None},
            {
                "name": "runc version",
                "ok": True,
                "level": "warning",
                "detail": "runc 1.1.5 has known holes",
                "what_to_do": "update it",
            },
            {
                "name": "image",
                "ok": False,
                "level": "failure",
                "detail": "not built \x1b[31m",
                "what_to_do": "run `rlm image build`",
            },
        ],
    }


# --- Probes --------------------------------------------------------------------------------------------


def test_closed_doors_are_exit_code_0_and_a_table(this: Machine) -> None:
    this.checks += [_RUNC, _RUNSC]
    result = doctor("--probe")
    assert result.exit_code == 0
    assert this.probed == ["runc", "runsc"]
    assert result.stdout.splitlines()[-5:] == [
        "case   what holds   runc     runsc",
        "───────────────────────────────────",
        "A01    it holds     closed   closed",
        "",
        "2 doors tried: 2 closed, 0 closed differently, 0 open, 0 did not run",
    ]


@pytest.mark.parametrize(("verdict", "word"), [(Verdict.OPEN, "OPEN"), (Verdict.DID_NOT_RUN, "DID NOT RUN")])
def test_a_door_that_is_not_known_to_be_closed_is_exit_code_3_and_said_loudly(
    this: Machine, verdict: Verdict, word: str
) -> None:
    this.checks.append(_RUNC)
    this.findings = lambda runtime: [found(runtime), found(runtime, "A02", verdict, "euid 0 \x1b[31m\n[b]")]
    result = doctor("--probe")
    assert result.exit_code == 3
    assert f"A02    it holds     {word}" in result.stdout
    assert f"A02 on runc, {word}: euid 0 \\x1b[31m\\n[b]" in result.stdout


def test_a_door_that_gvisor_closes_in_its_own_way_is_closed_and_explained(this: Machine) -> None:
    this.checks.append(_RUNSC)
    this.findings = lambda runtime: [found(runtime, "C01", Verdict.DIFFERS, "gVisor's own kernel answers")]
    result = doctor("--probe")
    assert result.exit_code == 0
    assert "C01 on runsc, closed differently: gVisor's own kernel answers" in result.stdout


def test_a_hostile_title_cannot_format_the_table(this: Machine) -> None:
    this.checks.append(_RUNC)
    this.findings = lambda runtime: [found(runtime, title="[red]x[/red]\x1b[2J\u202e")]
    result = doctor("--probe")
    assert "[red]x[/red]\\x1b[2J\\u202e" in result.stdout


def test_only_runtimes_that_work_are_probed(this: Machine) -> None:
    this.checks += [_RUNC, Check("runtime runsc", Level.WARNING, "not offered")]
    assert doctor("--probe").exit_code == 0
    assert this.probed == ["runc"]


def test_one_runtime_can_be_asked_for(this: Machine) -> None:
    this.checks += [_RUNC, _RUNSC]
    assert doctor("--probe", "--runtime", "runsc").exit_code == 0
    assert this.probed == ["runsc"]


@pytest.mark.case("A14")
def test_a_runtime_that_is_asked_for_and_missing_fails_the_probe(this: Machine) -> None:
    def missing(_runtime: str) -> list[Finding]:
        raise EngineError("the engine has no runtime 'runsc'")

    this.findings = missing
    result = doctor("--probe", "--runtime", "runsc")
    assert result.exit_code == 3
    assert "FAIL  probes runsc        no door was tried: the engine has no runtime 'runsc'" in result.stdout


def test_a_machine_on_which_nothing_can_be_probed_fails(this: Machine) -> None:
    result = doctor("--probe", "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told["checks"][-1]["detail"] == "no runtime works, so no door was tried"
    assert told["probes"] == []


def test_json_has_every_finding(this: Machine) -> None:
    this.checks.append(_RUNC)
    this.findings = lambda runtime: [found(runtime), found(runtime, "A02", Verdict.OPEN, "euid 0")]
    result = doctor("--probe", "--json")
    assert result.exit_code == 3
    told = json.loads(result.stdout)
    assert told["ok"] is False
    assert told["probes"] == [
        {"case": "A01", "title": "it holds", "runtime": "runc", "verdict": "closed", "detail": None},
        {"case": "A02", "title": "it holds", "runtime": "runc", "verdict": "open", "detail": "euid 0"},
    ]


def test_a_runtime_without_a_probe_is_wrong_use(this: Machine) -> None:
    assert doctor("--runtime", "runsc").exit_code == 2
