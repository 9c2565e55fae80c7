"""What deploy/ says is what the program takes, as far as that shows without systemd and compose."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from orchestrator.config import read_settings
from orchestrator.sandbox.uids import HOST_DIRECTORY

DEPLOY = Path(__file__).parents[2] / "deploy"
COMPOSE = (DEPLOY / "compose.yaml").read_text(encoding="utf-8")
UNIT = (DEPLOY / "rlm.service").read_text(encoding="utf-8")


def _with_secrets(directory: Path, *command: str) -> str:
    done = subprocess.run(
        [DEPLOY / "with-secrets", directory, *command],
        env={"PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    return done.stdout


def test_each_file_named_like_a_variable_becomes_one(tmp_path: Path) -> None:
    (tmp_path / "ANTHROPIC_API_KEY").write_text("sk one 'two' $three\n")
    (tmp_path / "PGPASSWORD").write_text("p")
    said = _with_secrets(
        tmp_path, "sh", "-c", 'printf "%s|%s|%s" "$ANTHROPIC_API_KEY" "$PGPASSWORD" "$1"', "-", "an arg"
    )
    assert said == "sk one 'two' $three|p|an arg"


@pytest.mark.parametrize("name", ["cert.pem", "lower", "A-B", "1A", "A=B", ".hidden"])
def test_another_file_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("secret")
    assert "secret" not in _with_secrets(tmp_path, "env")


def test_without_any_secret_the_program_starts_all_the_same(tmp_path: Path) -> None:
    assert _with_secrets(tmp_path, "echo", "started") == "started\n"
    assert _with_secrets(tmp_path / "absent", "echo", "started") == "started\n"


def test_the_compose_files_settings_are_settings_and_its_paths_are_the_same_on_both_sides() -> None:
    given = dict(re.findall(r"^      (RLM_\w+): \"?([^\"\s]+)\"?$", COMPOSE, re.MULTILINE))
    settings = read_settings(given)
    mounts = set(re.findall(r"^      - (/[^:\s]+):(/[^:\s]+)", COMPOSE, re.MULTILINE))
    for path in (str(settings.state_dir), str(HOST_DIRECTORY)):
        assert (path, path) in mounts


def test_unit_and_container_are_left_the_same_capabilities() -> None:
    unit = re.search(r"^CapabilityBoundingSet=(.*)$", UNIT, re.MULTILINE)
    compose = re.search(r"^    cap_add: \[(.*)\]$", COMPOSE, re.MULTILINE)
    assert unit
    assert compose
    assert unit[1].split() == [f"CAP_{name}" for name in compose[1].split(", ")]
