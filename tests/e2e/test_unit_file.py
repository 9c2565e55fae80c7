"""deploy/rlm.service as systemd's own tools read it; docs/first-deployment.md says how it was run."""

import shutil
import subprocess
from pathlib import Path

import pytest

UNIT = Path(__file__).parents[2] / "deploy" / "rlm.service"
EXPOSED_AT_MOST = 30
"""Tenths of what `systemd-analyze security` calls exposure; versions of systemd differ by some of these."""


@pytest.fixture(autouse=True)
def _analyze() -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("NOT TESTED: there is no systemd-analyze here")


def analyzed(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["/usr/bin/env", "systemd-analyze", *arguments],
        capture_output=True, text=True, timeout=30, check=False,
    )  # fmt: skip


def test_systemd_finds_nothing_odd_in_the_unit(tmp_path: Path) -> None:
    # It looks for the programs too.
    for name in ("with-secrets", "rlm"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.touch(0o755)
    unit = tmp_path / "rlm.service"
    unit.write_text(UNIT.read_text().replace("/opt/rlm/", f"{tmp_path}/"))
    done = analyzed("verify", unit)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_unit_stays_as_tight_as_it_is() -> None:
    done = analyzed("security", "--offline=true", f"--threshold={EXPOSED_AT_MOST}", "--no-pager", UNIT)
    assert done.returncode == 0, done.stdout
