"""What every test in here stands on; see `tests/containers.py`."""

from pathlib import Path

import pytest

from tests.containers import (
    containers_of,
    engine,
    image_id,
    instances_in,
    player,
    runtime,
    settings,
    state_dir,
)

__all__ = [
    "containers_of",
    "engine",
    "image_id",
    "instances_in",
    "player",
    "runtime",
    "settings",
    "state_dir",
]

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """All tests of this directory need containers."""
    for item in items:
        if item.path.is_relative_to(_HERE):
            item.add_marker(pytest.mark.docker)
