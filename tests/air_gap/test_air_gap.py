"""The whole product on a machine without any registry: a bundle, an empty engine, and no network at all.

`make test-air-gap`. The bundle is made once, with a network. From then on every process, the engine among
them, lives in a network namespace of its own that has nothing but a loopback. The engine is a second one,
started here with an empty folder, so that no image can be there but the one that was carried over. Needs root
and dockerd.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROJECT = Path(__file__).resolve().parents[2]
ENGINE_START_S = 60.0
OFFLINE = ("unshare", "--net", "--")

# Making the bundle takes half a minute, a first install likewise.
pytestmark = [pytest.mark.air_gap, pytest.mark.timeout(240)]

SCRIPT = """
from orchestrator.models.scripted import Cell

def run(question, depth):
    yield Cell("total = sum(int(line) for line in context.splitlines())")
    yield Cell("FINAL(f'the sum is {total}')")
    return "I could not add them up."

def complete(prompt):
    return "nothing"
"""


@dataclass(frozen=True)
class Island:
    """A machine without a network, as far as the programs started in it can tell."""

    root: Path

    def run(self, *command: str, timeout_s: float = 120.0) -> subprocess.CompletedProcess[str]:
        """A program that runs there to its end, with nothing of our environment."""
        return subprocess.run(
            [*OFFLINE, *command],
            cwd=self.root,
            env={
                "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
                "HOME": str(self.root),
                "DOCKER_HOST": f"unix://{self.root}/docker.sock",
                "RLM_STATE_DIR": str(self.root / "state"),
                "PYTHON": sys.executable,
            },
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )

    def rlm(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The installed command."""
        return self.run(str(self.root / "rlm" / "bin" / "rlm"), *arguments)


@pytest.fixture(scope="module")
def bundle() -> Iterator[Path]:
    """What `make bundle` makes, of the sources as they are."""
    with tempfile.TemporaryDirectory(prefix="rlm-bundle-", dir="/var/tmp") as folder:
        made = Path(folder) / "bundle"
        subprocess.run([sys.executable, PROJECT / "deploy" / "make-bundle", made], check=True, timeout=180)
        yield made


@pytest.fixture(scope="module")
def island() -> Iterator[Island]:
    """An engine without images and without a network."""
    if os.geteuid() != 0 or not shutil.which("dockerd"):
        pytest.fail(
            "only root can start an engine of its own, and only where dockerd is installed", pytrace=False
        )
    # The path of a socket may have 107 bytes.
    root = Path(tempfile.mkdtemp(prefix="rlm-island-", dir="/var/tmp"))
    (root / "daemon.json").write_text("{}")
    with (root / "engine.log").open("w") as log:
        engine = subprocess.Popen(
            [
                *OFFLINE, "dockerd", f"--host=unix://{root}/docker.sock", f"--data-root={root}/data",
                f"--exec-root={root}/exec", f"--pidfile={root}/pid", f"--config-file={root}/daemon.json",
                "--bridge=none", "--iptables=false", "--ip6tables=false",
            ],
            stdout=log, stderr=log,
        )  # fmt: skip
    try:
        wait_for(root / "docker.sock", engine, root / "engine.log")
        yield Island(root)
    finally:
        # It ends its containerd too.
        engine.terminate()
        engine.wait(timeout=30)
        shutil.rmtree(root)


def wait_for(path: Path, engine: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + ENGINE_START_S
    while time.monotonic() < deadline_s and engine.poll() is None:
        with socket.socket(socket.AF_UNIX) as line:
            if line.connect_ex(str(path)) == 0:
                return
        time.sleep(0.1)
    pytest.fail(f"the engine does not start: {log.read_text()[-2_000:]}", pytrace=False)


@pytest.fixture(scope="module")
def installed(island: Island, bundle: Path) -> Island:
    """The island after `install` has run there."""
    started_s = time.monotonic()
    done = island.run(str(bundle / "install"), str(island.root / "rlm"))
    assert done.returncode == 0, done.stderr
    assert "loading the sandbox image" in done.stdout
    print(f"installed, image loaded, in {time.monotonic() - started_s:.1f} s")
    return island


def test_the_island_has_no_network_and_no_image(island: Island) -> None:
    interfaces = island.run("cat", "/proc/net/dev").stdout.splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]
    routes = island.run("cat", "/proc/net/route").stdout.splitlines()[1:]
    assert routes == []


def test_what_was_installed_is_the_wheel_and_not_this_folder(installed: Island) -> None:
    done = installed.run(
        str(installed.root / "rlm" / "bin" / "python"),
        "-I",
        "-c",
        "import orchestrator; print(orchestrator.__file__)",
    )
    assert Path(done.stdout.strip()).is_relative_to(installed.root / "rlm"), done.stderr


def test_what_a_service_needs_came_along(installed: Island, bundle: Path) -> None:
    deploy = PROJECT / "deploy"
    with_secrets = installed.root / "rlm" / "bin" / "with-secrets"
    assert with_secrets.read_bytes() == (deploy / "with-secrets").read_bytes()
    assert os.access(with_secrets, os.X_OK)
    assert (bundle / "rlm.service").read_bytes() == (deploy / "rlm.service").read_bytes()
    assert {page.name for page in (bundle / "docs").iterdir()} == {
        "settings.md",
        "runbook.md",
        "hardening.md",
    }


def test_a_secret_reaches_the_program_from_its_file(installed: Island) -> None:
    secrets = installed.root / "secrets"
    secrets.mkdir(mode=0o700)
    (secrets / "ANTHROPIC_API_KEY").write_text("from a file\n")
    (secrets / "tls.pem").write_text("not a variable")
    shown = installed.run(str(installed.root / "rlm" / "bin" / "with-secrets"), str(secrets), "env").stdout
    assert "ANTHROPIC_API_KEY=from a file" in shown.splitlines()
    assert "not a variable" not in shown


def test_the_carried_image_is_the_promised_one(installed: Island, bundle: Path) -> None:
    shown = json.loads(installed.rlm("image", "show", "--json").stdout)
    assert shown["id"] == (bundle / "image-id").read_text().strip()
    assert {package["name"] for package in shown["contents"]["packages"]} > {"libc6", "bash"}


def test_doctor_finds_all_but_key_and_provider_in_order(installed: Island) -> None:
    done = installed.rlm("doctor", "--json")
    assert done.returncode == 3, done.stderr
    checks: dict[str, Any] = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["image"]["ok"], checks
    assert checks["runtime runc"]["ok"], checks
    # On a machine without a network there is no provider but one of its own.
    assert not checks["provider"]["ok"]


def test_a_run_answers_from_a_real_container(installed: Island) -> None:
    (installed.root / "script.py").write_text(SCRIPT)
    (installed.root / "numbers.txt").write_text("".join(f"{number}\n" for number in range(1_000)))
    done = installed.rlm(
        "run", "What is the sum?", "--context", "numbers.txt", "--model", "scripted:script.py", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["answer"] == "the sum is 499500"


@pytest.mark.parametrize("extra", ["bedrock", "vertex"])
def test_the_wheels_of_an_extra_are_all_there(installed: Island, bundle: Path, extra: str) -> None:
    pip = next((bundle / "wheels").glob("pip-*.whl"))
    done = installed.run(
        str(installed.root / "rlm" / "bin" / "python"), "-I", f"{pip}/pip", "--isolated", "install",
        "--dry-run", "--no-index", f"--find-links={bundle / 'wheels'}", "--require-hashes",
        f"--requirement={bundle / f'requirements-{extra}.txt'}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "Would install" in done.stdout


def test_a_bundle_that_was_damaged_on_the_way_is_refused_before_anything_is_made(
    island: Island, bundle: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "bundle"
    shutil.copytree(bundle, damaged)
    wheel = next((damaged / "wheels").glob("rlm_*.whl"))
    wheel.write_bytes(wheel.read_bytes()[:-1])
    done = island.run(str(damaged / "install"), str(island.root / "damaged"))
    assert done.returncode == 3
    assert "damaged or not complete" in done.stderr
    assert not (island.root / "damaged").exists()
