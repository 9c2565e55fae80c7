"""A canary for a key in the environment of `rlm run`, searched for in all that a run leaves."""

import json
import os
import secrets
import subprocess
import sys
import time
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from tests.containers import containers_of
from tests.e2e.playing import Player

CELLS = [
    "import os; print(dict(os.environ), open('/proc/1/environ').read(), open('/proc/1/cmdline').read())",
    "print(llm_query('hello'))",
    "raise ValueError('an error in the record')",
    "import time; print('waiting', flush=True); time.sleep(4)",
    "FINAL(str(dict(os.environ)))",
]


def holds(canary: bytes, top: Path) -> list[str]:
    """The files below that have it in them, or in their name."""
    found = []
    for path in top.rglob("*"):
        if canary in bytes(path) or (
            path.is_file() and not path.is_symlink() and canary in path.read_bytes()
        ):
            found.append(str(path))
    return found


@pytest.fixture
def canary(tmp_path: Path) -> str:
    """A key of the right shape. The search is not blind: it finds the canary where it was put."""
    key = f"sk-ant-api03-{secrets.token_urlsafe(40)}"
    place = tmp_path / "control"
    place.mkdir()
    (place / "file").write_text(f"before {key} after")
    assert holds(key.encode(), place) == [str(place / "file")]
    (place / "file").unlink()
    return key


@pytest.mark.case("N01")
def test_the_key_is_in_nothing_that_a_run_leaves_or_the_engine_knows(
    *,
    runtime: str,
    player: Player,
    settings: Settings,
    engine: DockerClient,
    canary: str,
    tmp_path: Path,
) -> None:
    script = player.script(CELLS)
    events = tmp_path / "events.jsonl"
    command = [sys.executable, "-m", "orchestrator", "run", "What is in there?", "--runtime", runtime]
    command += ["--context", str(player.context()), "--model", f"scripted:{script}", "--events", str(events)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RLM_")}
    environment |= {
        "RLM_STATE_DIR": str(settings.state_dir),
        "RLM_IMAGE": settings.image,
        "ANTHROPIC_API_KEY": canary,
    }
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            container = _wait_for_the_last_but_one_cell(engine, settings, events, process)
            seen = _all_that_is_known_of(engine, container, settings)
            state = holds(canary.encode(), settings.state_dir)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert process.returncode == 0, err
    assert "hello" in events.read_text()
    assert canary not in seen
    assert canary not in out + err
    assert state == []
    assert holds(canary.encode(), tmp_path) == []
    assert holds(canary.encode(), settings.state_dir) == []


def _wait_for_the_last_but_one_cell(
    engine: DockerClient, settings: Settings, events: Path, process: "subprocess.Popen[str]"
) -> str:
    give_up_s = time.monotonic() + 40
    while time.monotonic() < give_up_s:
        assert process.poll() is None, process.communicate()
        if events.exists() and events.read_text().count('"cell_started"') >= 4:
            (container,) = containers_of(engine, settings.state_dir)
            return container
        time.sleep(0.05)
    raise AssertionError("the run did not come that far")


def _all_that_is_known_of(engine: DockerClient, container: str, settings: Settings) -> str:
    """The engine's words about container and image, its files, and the environment of the first process."""
    inspected = engine.api.inspect_container(container)
    image = engine.images.get(settings.image)
    words = [inspected, image.attrs, image.history()]
    files = [
        path.read_text(errors="replace")
        for path in (Path(engine.info()["DockerRootDir"]) / "containers" / container).rglob("*")
        if path.is_file()
    ]
    assert files, "the engine is on this machine"
    process = Path("/proc") / str(inspected["State"]["Pid"])
    own = b"".join((process / name).read_bytes() for name in ("environ", "cmdline"))
    return json.dumps(words) + "".join(files) + own.decode(errors="replace")
