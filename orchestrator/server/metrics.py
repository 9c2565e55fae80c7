"""What the service does, as Prometheus metrics, counted from the events of its runs.

Labels are closed lists: states, outcomes, kinds of errors, models as far as `_MAX_MODELS`, and tenants only
where the settings say so, as far as `_MAX_TENANTS`; what comes beyond is `other`. Nothing of a prompt, an
output or a guest's own naming enters.

A process counts what it saw itself: after a restart its counters begin at 0, as Prometheus expects.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from orchestrator import errors
from orchestrator.budget import Amounts
from orchestrator.errors import OrchestratorError
from orchestrator.ids import RunId, TenantId
from orchestrator.runs.recorder import Observer
from orchestrator.sandbox.pool import SandboxPool
from orchestrator.sandbox.pool_events import Phase
from orchestrator.store.books import RunRow
from orchestrator.trajectory import (
    CallHeld,
    CallSettled,
    CellEnded,
    Event,
    RunEnded,
    RunStarted,
    SandboxLeased,
    SubCallEnded,
    SubCallStarted,
    TurnStarted,
)

_MAX_TENANTS = 200
_MAX_MODELS = 50
_OTHER = "other"
_REASONS = frozenset(name for name, one in vars(errors).items() if isinstance(one, type))
_RUN_S = (1, 2, 5, 10, 30, 60, 120, 300, 600, 1_800, 3_600, 7_200)
_CALL_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
_SHORT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

Gauges = Callable[[], Mapping[str, float]]
"""What is read when somebody looks, by name without prefix: `sandboxes_waiting`, `leases`, `runs_queued`."""


@dataclass(slots=True)
class _Names:
    """A label's values, as far as there is room."""

    limit: int
    known: set[str] = field(default_factory=set)

    def label(self, name: str) -> str:
        if name in self.known:
            return name
        if len(self.known) >= self.limit:
            return _OTHER
        self.known.add(name)
        return name


class ServiceMetrics:
    """All metrics of one server; a `ServiceHook`.

    Args:
        gauges: Read at each look; None for none.
        by_tenant: Label what is counted with tenant ids. Whoever can read the metrics then knows the tenants
            and how much they do.
    """

    def __init__(self, gauges: Gauges | None = None, *, by_tenant: bool = False) -> None:
        self._registry = CollectorRegistry()
        self._gauges = gauges
        self._by_tenant = by_tenant
        self._tenants = _Names(_MAX_TENANTS)
        self._models = _Names(_MAX_MODELS)
        self._read: dict[str, Gauge] = {}
        self._live: dict[RunId, _TreeObserver] = {}

        self.runs_created = self._counter("runs_created", "Root runs that were stored.")
        self.runs_ended = self._counter("runs_ended", "Root runs that ended.", "outcome")
        self.refusals = self._counter("refused", "Runs and sub-calls that were refused.", "what", "reason")
        self.child_runs = self._counter("child_runs", "Child runs that started.")
        self.turns = self._counter("turns", "Turns that began.")
        self.cells = self._counter("cells", "Cells that ended.", "outcome")
        self.sub_calls = self._counter("sub_calls", "Sub-calls that ended.", "what", "result")
        self.model_calls = self._counter("model_calls", "Attempts at a provider.", "model", "result")
        self.tokens = self._counter("tokens", "Tokens that a provider counted.", "model", "kind")
        self.cost = self._counter("cost_microusd", "Millionths of a US dollar.", "model", "certainty")
        self.unconfirmed_tokens = self._counter(
            "unconfirmed_tokens", "Tokens that may have been billed.", "model"
        )

        self.runs_live = self._gauge("runs_live", "Root runs that run here.")
        self.calls_in_flight = self._gauge("model_calls_in_flight", "Attempts that hold something now.")
        self.held_tokens = self._gauge("held_tokens", "Tokens held by attempts in flight.")
        self.held_cost = self._gauge("held_cost_microusd", "Millionths of a dollar held likewise.")
        self.sub_calls_in_flight = self._gauge("sub_calls_in_flight", "Sub-calls that are not answered yet.")

        self.run_s = self._histogram("run_duration_seconds", "Root runs, queueing excluded.", _RUN_S)
        self.queue_s = self._histogram("run_wait_seconds", "From a run's creation to its start.", _RUN_S)
        self.call_s = self._histogram("model_call_duration_seconds", "One attempt.", _CALL_S)
        self.cell_s = self._histogram("cell_duration_seconds", "Wall time of a cell.", _CALL_S)
        self.sub_call_s = self._histogram("sub_call_duration_seconds", "Waiting included.", _CALL_S)
        self.lease_s = self._histogram(
            "sandbox_wait_seconds", "From asking for a sandbox to its Hello.", _SHORT_S
        )

    def watch_pool(self, pool: SandboxPool) -> None:
        """Show the machine's sandboxes too, by where they stand, and what became of its leases."""
        self._registry.register(_PoolCollector(pool))

    def exposition(self) -> tuple[bytes, str]:
        """All of it in Prometheus's text format, and the media type of that."""
        for name, value in (self._gauges() if self._gauges else {}).items():
            if name not in self._read:
                self._read[name] = Gauge(f"rlm_{name}", name.replace("_", " "), registry=self._registry)
            self._read[name].set(value)
        return generate_latest(self._registry), CONTENT_TYPE_LATEST

    # --- ServiceHook -----------------------------------------------------------------------------------

    def created(self, run: RunRow) -> None:
        """It is stored and queued."""
        self.runs_created.labels(self.tenant_label(run.tenant_id)).inc()

    def refused(self, tenant_id: TenantId, error: OrchestratorError) -> None:
        """A run was asked for and not created."""
        self.refusals.labels(self.tenant_label(tenant_id), "run", reason_label(type(error).__name__)).inc()

    def observer(self, run: RunRow) -> Observer:
        """Counts the events of the run's tree."""
        observer = _TreeObserver(self, run)
        self.left(run)
        self._live[run.run_id] = observer
        self.runs_live.labels(self.tenant_label(run.tenant_id)).inc()
        return observer.see

    def left(self, run: RunRow) -> None:
        """It runs here no longer, and calls in flight are not shown any more: perhaps nobody settles them."""
        observer = self._live.pop(run.run_id, None)
        if observer is not None:
            observer.forget_holds()
            self.runs_live.labels(self.tenant_label(run.tenant_id)).dec()

    # --- Labels ----------------------------------------------------------------------------------------

    def tenant_label(self, tenant_id: TenantId) -> str:
        """Empty, unless the settings say so."""
        return self._tenants.label(tenant_id) if self._by_tenant else ""

    def model_label(self, model: str) -> str:
        """Its name, as long as there are not too many."""
        return self._models.label(model)

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(f"rlm_{name}", about, ("tenant", *labels), registry=self._registry)

    def _gauge(self, name: str, about: str) -> Gauge:
        return Gauge(f"rlm_{name}", about, ("tenant",), registry=self._registry)

    def _histogram(self, name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
        # Without the tenant: a histogram is a dozen series for each value of a label.
        return Histogram(f"rlm_{name}", about, registry=self._registry, buckets=buckets)


def reason_label(name: str) -> str:
    """The name of one of our errors."""
    return name if name in _REASONS else _OTHER


class _PoolCollector(Collector):
    """Reads a pool whenever somebody looks."""

    def __init__(self, pool: SandboxPool) -> None:
        self._pool = pool

    def collect(self) -> Iterator[Metric]:
        """See `Collector`."""
        stats = self._pool.stats()
        sandboxes = GaugeMetricFamily(
            "rlm_sandboxes", "Sandboxes of this server.", labels=("runtime", "phase")
        )
        leases = CounterMetricFamily(
            "rlm_pool", "Leases by how they were served, and ends of sandboxes.", labels=("runtime", "what")
        )
        for runtime, counted in stats.items():
            for phase in Phase:
                sandboxes.add_metric((runtime, phase.value), self._pool.count(phase, runtime))
            for what, count in asdict(counted).items():
                leases.add_metric((runtime, what), count)
        yield sandboxes
        yield leases


class _TreeObserver:
    """Counts one tree's events. What began before it began is not missed when it ends."""

    def __init__(self, metrics: ServiceMetrics, run: RunRow) -> None:
        self._metrics = metrics
        self._run = run
        self._tenant = metrics.tenant_label(run.tenant_id)
        self._held: dict[tuple[RunId, str, int], Amounts] = {}
        self._asked: dict[tuple[RunId, str], str] = {}
        """What the sub-calls in flight are, by their guest's names for them."""

    def see(self, event: Event) -> None:
        """Count one event."""
        payload, metrics = event.payload, self._metrics
        match payload:
            case RunStarted():
                self._started(payload, event.at)
            case SandboxLeased():
                metrics.lease_s.observe(payload.wait_s)
            case TurnStarted():
                metrics.turns.labels(self._tenant).inc()
            case CallHeld():
                self._hold((event.run_id, payload.call, payload.attempt), payload.held)
            case CallSettled():
                self._release((event.run_id, payload.call, payload.attempt))
                self._settled(payload)
            case CellEnded():
                metrics.cells.labels(self._tenant, payload.outcome).inc()
                metrics.cell_s.observe(payload.duration_s)
            case SubCallStarted():
                self._asked[event.run_id, payload.call] = payload.what
                metrics.sub_calls_in_flight.labels(self._tenant).inc()
            case SubCallEnded():
                self._sub_call_ended(event.run_id, payload)
            case RunEnded() if event.run_id == self._run.run_id:
                metrics.runs_ended.labels(self._tenant, payload.outcome).inc()
                metrics.run_s.observe(payload.duration_s)
            case _:
                pass

    def forget_holds(self) -> None:
        """Nothing of this tree is in flight here any more."""
        for key in tuple(self._held):
            self._release(key)
        self._metrics.sub_calls_in_flight.labels(self._tenant).dec(len(self._asked))
        self._asked.clear()

    def _started(self, started: RunStarted, at: float) -> None:
        if started.parent is None:
            self._metrics.queue_s.observe(max(0.0, at - self._run.created_at))
        else:
            self._metrics.child_runs.labels(self._tenant).inc()

    def _hold(self, key: tuple[RunId, str, int], held: Amounts) -> None:
        self._held[key] = held
        self._metrics.calls_in_flight.labels(self._tenant).inc()
        self._metrics.held_tokens.labels(self._tenant).inc(held.tokens)
        self._metrics.held_cost.labels(self._tenant).inc(held.cost_microusd)

    def _release(self, key: tuple[RunId, str, int]) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._metrics.calls_in_flight.labels(self._tenant).dec()
            self._metrics.held_tokens.labels(self._tenant).dec(held.tokens)
            self._metrics.held_cost.labels(self._tenant).dec(held.cost_microusd)

    def _settled(self, settled: CallSettled) -> None:
        metrics, model = self._metrics, self._metrics.model_label(settled.model)
        metrics.model_calls.labels(self._tenant, model, "failed" if settled.error else "answered").inc()
        metrics.call_s.observe(settled.duration_s)
        for kind, tokens in settled.usage._asdict().items():
            metrics.tokens.labels(self._tenant, model, kind).inc(tokens)
        metrics.unconfirmed_tokens.labels(self._tenant, model).inc(settled.unconfirmed.tokens)
        metrics.cost.labels(self._tenant, model, "confirmed").inc(settled.confirmed.cost_microusd)
        metrics.cost.labels(self._tenant, model, "unconfirmed").inc(settled.unconfirmed.cost_microusd)

    def _sub_call_ended(self, run_id: RunId, ended: SubCallEnded) -> None:
        what = self._asked.pop((run_id, ended.call), None)
        if what is None:
            return
        metrics = self._metrics
        metrics.sub_calls_in_flight.labels(self._tenant).dec()
        result = "memoised" if ended.memoised else "failed" if ended.error else "answered"
        metrics.sub_calls.labels(self._tenant, what, result).inc()
        metrics.sub_call_s.observe(ended.duration_s)
        if ended.error:
            metrics.refusals.labels(self._tenant, what, reason_label(ended.error_kind)).inc()
