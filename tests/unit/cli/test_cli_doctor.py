import json
from collections.abc import AsyncIterator

import pytest
from typer.testing import CliRunner

from orchestrator import doctor as machine
from orchestrator.cli.main import app as rlm
from orchestrator.config import Settings
from orchestrator.doctor import Check

_ENGINE = Check("engine", ok=True, detail="Docker 20.10.24")
_IMAGE = Check("image", ok=False, detail="not built \x1b[31m", what_to_do="run `rlm image build`")


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[Check]:
    checks = [_ENGINE]

    async def doctor(_settings: Settings) -> AsyncIterator[Check]:
        for check in checks:
            yield check

    monkeypatch.setattr(machine, "doctor", doctor)
    return checks


def test_a_healthy_machine_is_exit_code_0(found: list[Check]) -> None:
    result = CliRunner().invoke(rlm, ["doctor"])
    assert result.exit_code == 0
    assert result.stdout == "ok    engine          Docker 20.10.24\n"


def test_what_is_missing_comes_with_what_to_do(found: list[Check]) -> None:
    found.append(_IMAGE)
    result = CliRunner().invoke(rlm, ["doctor"])
    assert result.exit_code == 3
    assert result.stdout.splitlines()[1:] == [
        "FAIL  image           not built \\x1b[31m",
        "                      → run `rlm image build`",
    ]


def test_json_is_one_object(found: list[Check]) -> None:
    found.append(_IMAGE)
    result = CliRunner().invoke(rlm, ["doctor", "--json"])
    assert result.exit_code == 3
    assert json.loads(result.stdout) == {
        "ok": False,
        "checks": [
            {"name": "engine", "ok": True, "detail": "Docker 20.10.24", "what_to_do": None},
            {
                "name": "image",
                "ok": False,
                "detail": "not built \x1b[31m",
                "what_to_do": "run `rlm image build`",
            },
        ],
    }
