import pytest

from orchestrator.models import retry
from orchestrator.runs import treasury
from tests.ledger.witness import WatchedLedger


@pytest.fixture(autouse=True)
def watched_ledger(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run tree of these tests has one."""
    monkeypatch.setattr(treasury, "Ledger", WatchedLedger)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE_S", 0.001)
