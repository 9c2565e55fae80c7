"""What holds for every unit test."""

from contextlib import nullcontext

import pytest

from orchestrator.cli import run, serve


@pytest.fixture(autouse=True)
def _no_look_through_all_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands look for garbage once before they begin. Here that would go through all tests that pytest
    has collected, half a second each time; `test_collector.py` has what it does.
    """
    for command in (run, serve):
        monkeypatch.setattr(command, "collecting_seldom", nullcontext)
