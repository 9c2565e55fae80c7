"""The first moments of `rlm`, as a process of its own: credentials out, everything else as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.models.credentials import NAMES
from orchestrator.models.provider.sealed import VARIABLE

PROGRAM = """
import json, os, sys
from orchestrator.cli import start
from orchestrator.models.provider.sealed import SealedCredentials, unseal
pid = os.environ.setdefault("FIRST_PID", str(os.getpid()))
start.leave_credentials_behind()
given = unseal(SealedCredentials.handed_over(os.environ).take())
same = int(pid) == os.getpid()
told = [given, same, sys.argv[1:], sys.flags.utf8_mode, sys.prefix, dict(os.environ), sys.stdin.read()]
print(json.dumps(told))
"""


def started(folder: Path, **environment: str) -> list[object]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    told = subprocess.run(
        [sys.executable, "-X", "utf8", str(program), "run", "a b", "--x=ñ\udcff"],
        env={"PATH": os.environ["PATH"], **environment},
        input="typed",
        check=True,
        capture_output=True,
        text=True,
    )
    found: list[object] = json.loads(told.stdout)
    return found


def test_the_program_begins_again_as_it_was_but_for_the_credentials(tmp_path: Path) -> None:
    every = {name: f"secret of {name}" for name in NAMES}
    given, same_pid, arguments, utf8, prefix, environment, typed = started(
        tmp_path, **every, OTHER="ñ", ODD="\udcff"
    )
    assert isinstance(given, dict)
    assert isinstance(environment, dict)
    assert given["ANTHROPIC_API_KEY"] == "secret of ANTHROPIC_API_KEY"
    # What nothing here uses is not even kept.
    assert "ANTHROPIC_AUTH_TOKEN" not in given
    assert (same_pid, utf8, prefix, typed) == (True, 1, sys.prefix, "typed")
    assert arguments == ["run", "a b", "--x=ñ\udcff"]
    assert not NAMES & environment.keys()
    assert (environment["OTHER"], environment["ODD"]) == ("ñ", "\udcff")
    assert VARIABLE in environment


def test_without_credentials_it_just_goes_on(tmp_path: Path) -> None:
    given, same_pid, *_, environment, _typed = started(tmp_path)
    assert isinstance(environment, dict)
    assert (given, same_pid) == ({}, True)
    assert VARIABLE not in environment


@pytest.mark.parametrize("command", [["--help"], ["version"], ["run", "--help"]])
def test_commands_that_need_no_key_work_with_one_in_the_environment(command: list[str]) -> None:
    told = subprocess.run(
        [sys.executable, "-m", "orchestrator", *command],
        env={"PATH": os.environ["PATH"], "ANTHROPIC_API_KEY": "sk"},
        check=True,
        capture_output=True,
        text=True,
    )
    assert told.stdout
    assert told.stderr == ""


def test_a_key_that_is_none_by_its_length_is_one_sentence() -> None:
    told = subprocess.run(
        [sys.executable, "-m", "orchestrator", "version"],
        env={"PATH": os.environ["PATH"], "ANTHROPIC_API_KEY": "x" * 100_000},
        check=False,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 3
    assert told.stderr == "rlm: the credentials are longer than any credentials are\n"
