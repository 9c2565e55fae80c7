from pathlib import Path
from typing import cast

import pytest
from prometheus_client.parser import text_string_to_metric_families

from orchestrator.errors import BudgetExceededError, NotAllowedError
from orchestrator.ids import TenantId
from orchestrator.sandbox.pool import SandboxPool
from orchestrator.sandbox.pool_events import Phase
from orchestrator.sandbox.pool_rules import PoolStats
from orchestrator.server.metrics import ServiceMetrics, reason_label
from orchestrator.trajectory import Event
from tests.unit.server.stories import CANARY, ROOT, held, row, settled, sub_call, the_story


def samples(metrics: ServiceMetrics) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    """All samples, without empty labels."""
    text, media_type = metrics.exposition()
    assert media_type.startswith("text/plain")
    return {
        (one.name, frozenset((name, value) for name, value in one.labels.items() if value)): one.value
        for family in text_string_to_metric_families(text.decode())
        for one in family.samples
    }


def sample(metrics: ServiceMetrics, name: str, **labels: str) -> float:
    return samples(metrics).get((name, frozenset(labels.items())), 0.0)


@pytest.fixture
def told() -> ServiceMetrics:
    metrics = ServiceMetrics()
    metrics.created(row())
    observe = metrics.observer(row())
    for event in the_story():
        observe(event)
    metrics.left(row())
    return metrics


def test_a_run_tree_is_counted_from_its_events(told: ServiceMetrics) -> None:
    assert sample(told, "rlm_runs_created_total") == 1
    assert sample(told, "rlm_runs_ended_total", outcome="answered") == 1
    assert sample(told, "rlm_child_runs_total") == 1
    assert sample(told, "rlm_turns_total") == 1
    assert sample(told, "rlm_cells_total", outcome="ok") == 1
    assert sample(told, "rlm_sub_calls_total", what="complete", result="failed") == 2
    assert sample(told, "rlm_sub_calls_total", what="child_run", result="answered") == 1
    assert sample(told, "rlm_refused_total", what="complete", reason="BudgetExceededError") == 1
    assert sample(told, "rlm_model_calls_total", model="small", result="failed") == 1
    assert sample(told, "rlm_tokens_total", model="big", kind="input") == 70
    assert sample(told, "rlm_tokens_total", model="small", kind="cache_read") == 20
    assert sample(told, "rlm_cost_microusd_total", model="small", certainty="unconfirmed") == 500
    assert sample(told, "rlm_cost_microusd_total", model="big", certainty="confirmed") == 40


def test_latencies_are_histograms(told: ServiceMetrics) -> None:
    assert sample(told, "rlm_run_wait_seconds_sum") == 10
    assert sample(told, "rlm_run_duration_seconds_sum") == 9
    assert sample(told, "rlm_model_call_duration_seconds_count") == 3
    assert sample(told, "rlm_sandbox_wait_seconds_bucket", le="0.25") == 1
    assert sample(told, "rlm_cell_duration_seconds_sum") == 2


def test_nothing_that_a_model_or_a_guest_wrote_is_in_them(told: ServiceMetrics) -> None:
    assert CANARY not in told.exposition()[0].decode()


def test_what_is_in_flight_is_shown_and_forgotten_with_its_run() -> None:
    metrics = ServiceMetrics()
    observe = metrics.observer(row())
    observe(Event(ROOT, 0, 1.0, held("turn-1", "big")))
    observe(Event(ROOT, 1, 1.0, sub_call("a", "complete")))
    assert sample(metrics, "rlm_runs_live") == 1
    assert sample(metrics, "rlm_held_tokens") == 1_000
    assert sample(metrics, "rlm_model_calls_in_flight") == 1
    assert sample(metrics, "rlm_sub_calls_in_flight") == 1
    metrics.left(row())
    observe(Event(ROOT, 2, 1.0, settled("turn-1", "big")))
    for name in (
        "runs_live",
        "held_tokens",
        "held_cost_microusd",
        "model_calls_in_flight",
        "sub_calls_in_flight",
    ):
        assert sample(metrics, f"rlm_{name}") == 0


def test_a_run_that_goes_on_here_is_one_run() -> None:
    metrics = ServiceMetrics()
    metrics.observer(row())(Event(ROOT, 0, 1.0, held("turn-1", "big")))
    metrics.observer(row())
    assert sample(metrics, "rlm_runs_live") == 1
    assert sample(metrics, "rlm_held_tokens") == 0
    metrics.left(row())
    metrics.left(row())
    assert sample(metrics, "rlm_runs_live") == 0


def test_tenants_are_named_only_where_the_settings_say_so_and_not_without_end() -> None:
    metrics = ServiceMetrics(by_tenant=True)
    for number in range(500):
        metrics.created(row(tenant=f"t{number}"))
    assert sample(metrics, "rlm_runs_created_total", tenant="t7") == 1
    assert sample(metrics, "rlm_runs_created_total", tenant="other") == 300


def test_refused_runs_are_counted_by_reason() -> None:
    metrics = ServiceMetrics()
    metrics.refused(TenantId("t"), BudgetExceededError("tenant", {"runs": 2}, {"runs": 1}))
    metrics.refused(TenantId("t"), NotAllowedError("a model"))
    assert sample(metrics, "rlm_refused_total", what="run", reason="BudgetExceededError") == 1
    assert sample(metrics, "rlm_refused_total", what="run", reason="NotAllowedError") == 1
    assert reason_label("whatever a guest says") == "other"


def test_gauges_are_read_when_somebody_looks() -> None:
    now = {"sandboxes_waiting": 3.0}
    metrics = ServiceMetrics(lambda: now)
    assert sample(metrics, "rlm_sandboxes_waiting") == 3
    now["sandboxes_waiting"] = 1.0
    assert sample(metrics, "rlm_sandboxes_waiting") == 1


class FullPool:
    """What is read of a pool."""

    def stats(self) -> dict[str, PoolStats]:
        return {"runc": PoolStats(warm=3, refused=1), "runsc": PoolStats()}

    def count(self, phase: Phase, runtime: str) -> int:
        return 2 if (phase, runtime) == (Phase.WAITING, "runc") else 0


def test_sandboxes_are_shown_by_where_they_stand_and_leases_by_how_they_were_served() -> None:
    metrics = ServiceMetrics()
    metrics.watch_pool(cast(SandboxPool, FullPool()))
    assert sample(metrics, "rlm_sandboxes", runtime="runc", phase="waiting") == 2
    assert sample(metrics, "rlm_sandboxes", runtime="runsc", phase="waiting") == 0
    assert sample(metrics, "rlm_pool_total", runtime="runc", what="warm") == 3
    assert sample(metrics, "rlm_pool_total", runtime="runc", what="refused") == 1


def test_the_page_names_every_metric() -> None:
    page = (Path(__file__).parents[3] / "docs" / "http.md").read_text()
    metrics = ServiceMetrics()
    metrics.watch_pool(cast(SandboxPool, FullPool()))
    text = metrics.exposition()[0].decode()
    for family in text_string_to_metric_families(text):
        if not family.name.endswith("_created"):
            total = "_total" if family.type == "counter" else ""
            assert f"`{family.name}{total}`" in page
