"""What every attack in a real container stands on; see `tests/containers.py`.

A test that asks for `runtime`, or for `player`, runs twice: on runc and on runsc. One that is about one of
them says so: `@pytest.mark.parametrize("runtime", ["runc"])`.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.machine import runtimes
from tests.cases import NO_RUNSC
from tests.containers import containers_of, engine, image_id, instances_in, player, settings, state_dir
from tests.security.probing import Probed, probe

__all__ = ["containers_of", "engine", "image_id", "instances_in", "player", "settings", "state_dir"]

RUNTIMES = ["runc", pytest.param("runsc", marks=pytest.mark.runsc)]
_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of this directory that ask for the engine need it."""
    for item in items:
        if item.path.is_relative_to(_HERE) and "engine" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.docker)


@pytest.fixture(params=RUNTIMES)
def runtime(request: pytest.FixtureRequest, engine: DockerClient) -> str:
    """Both runtimes. Where runsc is missing its tests are skipped, and counted as not tested."""
    name = str(request.param)
    if name == "runsc" and name not in runtimes(engine):
        pytest.skip(NO_RUNSC)
    return name


@pytest.fixture(scope="session")
def probed(engine: DockerClient, image_id: str, state_dir: Path) -> Callable[[str], Probed]:
    """What all probes found in one sandbox of a runtime; made once."""
    return cache(lambda runtime: probe(Settings(state_dir=state_dir, image=image_id), runtime))
