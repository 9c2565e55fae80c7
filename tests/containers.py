"""Fixtures of tests in real containers: a real engine, the real image, and nothing left behind.

A conftest imports those it wants. Without engine or image these tests fail. They never skip: what a container
promises is shown in one, or not at all.
"""

import shutil
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.errors import MachineError
from orchestrator.sandbox import image
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.posture import LABEL_INSTANCE
from tests.e2e.playing import Player


@pytest.fixture(scope="session")
def engine() -> Iterator[DockerClient]:
    try:
        client = connect_engine()
    except MachineError as error:
        pytest.fail(f"these tests run in real containers, and {error}", pytrace=False)
    yield client
    client.close()


@pytest.fixture(scope="session")
def image_id() -> str:
    try:
        return _image_of_these_sources()
    except MachineError as error:
        pytest.fail(f"these tests run in real containers: {error}", pytrace=False)


@cache
def _image_of_these_sources() -> str:
    # Once, for all directories of tests: they run in one image, whoever edits its sources meanwhile.
    client = connect_engine()
    try:
        return image.find(client)
    finally:
        client.close()


@pytest.fixture(scope="session")
def state_dir() -> Iterator[Path]:
    # Not `tmp_path`: the path of a Unix socket below it may have 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="rlm", dir="/tmp"))
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture
def settings(engine: DockerClient, image_id: str, state_dir: Path) -> Iterator[Settings]:
    """The process's settings; afterwards no container and no directory of a run may be left."""
    yield Settings(state_dir=state_dir, image=image_id)
    containers = containers_of(engine, state_dir)
    directories = instances_in(state_dir)
    for container in containers:
        engine.api.remove_container(container, force=True)
    for directory in directories:
        shutil.rmtree(directory) if directory.is_dir() else directory.unlink()
    assert not containers, "sandboxes were left behind"
    assert not directories, "directories of runs were left behind"


@pytest.fixture
def runtime() -> str:
    """What sandboxes run on; the security tests have both."""
    return "runc"


@pytest.fixture
def player(settings: Settings, runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Player:
    return Player(settings, tmp_path, monkeypatch, runtime=runtime)


def containers_of(engine: DockerClient, state_dir: Path) -> list[str]:
    """The sandboxes of runs whose state is in `state_dir`. Others may use the engine at the same time."""
    return [
        container["Id"]
        for container in engine.api.containers(all=True, filters={"label": LABEL_INSTANCE})
        if any(mount["Source"].startswith(str(state_dir)) for mount in container["Mounts"])
    ]


def instances_in(state_dir: Path) -> list[Path]:
    """What is left of orchestrators that used `state_dir`."""
    return sorted((state_dir / "instances").glob("*"))
