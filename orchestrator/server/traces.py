"""The run tree as OpenTelemetry spans, made from its events.

    invoke_agent rlm                     a run, root or child
      chat MODEL                         an attempt at a provider, for a turn of the run
      execute_tool python                a cell
        chat MODEL                       likewise, for a sub-call of the cell
        sub_call child_run               what the cell asked for
          invoke_agent rlm               the child run

Names and attributes follow the semantic conventions for generative AI; ours begin with `rlm.`. No span holds
a prompt, an output or anything that a guest named.

Source: OpenTelemetry semantic conventions 1.4x, "Generative AI"; names as in the package
`opentelemetry-semantic-conventions` 0.66b2.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TypeAlias

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.semconv._incubating.attributes import gen_ai_attributes as gen_ai
from opentelemetry.semconv.attributes.error_attributes import ERROR_TYPE
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.util.types import AttributeValue

from orchestrator.errors import OrchestratorError
from orchestrator.ids import RunId, TenantId
from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex
from orchestrator.runs.recorder import Observer
from orchestrator.store.books import RunRow
from orchestrator.trajectory import (
    CallHeld,
    CallSettled,
    CellEnded,
    CellStarted,
    Event,
    RunEnded,
    RunResumed,
    RunStarted,
    SubCallEnded,
    SubCallStarted,
)

MAX_SPANS = 10_000
"""Of one run tree. How many were left out, its root span tells."""

_Key: TypeAlias = tuple[object, ...]
_Attributes: TypeAlias = dict[str, AttributeValue]


class RunTraces:
    """Spans of all runs of a server; a `ServiceHook`.

    Args:
        tracer: Takes the spans.
        provider: See `provider_name`.
    """

    def __init__(self, tracer: Tracer, *, provider: str = "anthropic") -> None:
        self._tracer = tracer
        self._provider = provider
        self._trees: dict[RunId, _Tree] = {}

    def created(self, run: RunRow) -> None:
        """Nothing yet: a span begins with the run."""

    def refused(self, tenant_id: TenantId, error: OrchestratorError) -> None:
        """Nothing: no run, no span."""

    def observer(self, run: RunRow) -> Observer:
        """Makes the spans of the run's tree."""
        self.left(run)
        tree = _Tree(self._tracer, self._provider, run)
        self._trees[run.run_id] = tree
        return tree.see

    def left(self, run: RunRow) -> None:
        """It runs here no longer: what is open ends."""
        tree = self._trees.pop(run.run_id, None)
        if tree is not None:
            tree.close()


@dataclass(slots=True)
class _Tree:
    tracer: Tracer
    provider: str
    run: RunRow
    open: dict[_Key, Span] = field(default_factory=dict)
    made: int = 0
    left_out: int = 0
    last_at: float = 0.0

    def see(self, event: Event) -> None:
        run_id, at, payload = event.run_id, event.at, event.payload
        self.last_at = max(self.last_at, at)
        match payload:
            case RunStarted():
                self._run_started(run_id, at, payload)
            case RunResumed():
                self._run_span(run_id, at).set_attribute("rlm.resumed", payload.times)
            case RunEnded():
                self._run_ended(run_id, at, payload)
            case CallHeld():
                self._call_held(run_id, at, payload)
            case CallSettled():
                self._call_settled(run_id, at, payload)
            case CellStarted():
                about: _Attributes = {gen_ai.GEN_AI_TOOL_TYPE: "function", "rlm.turn": payload.turn}
                about[gen_ai.GEN_AI_TOOL_NAME] = "python"
                about[gen_ai.GEN_AI_OPERATION_NAME] = "execute_tool"
                self._begin(("cell", run_id), self._run_span(run_id, at), at, "execute_tool python", about)
            case CellEnded():
                ended: _Attributes = {
                    "rlm.cell.outcome": payload.outcome,
                    "rlm.cell.guest_s": payload.guest_s,
                }
                self._end(("cell", run_id), at, ended, "" if payload.outcome == "ok" else payload.outcome)
            case SubCallStarted():
                about = {gen_ai.GEN_AI_REQUEST_MODEL: payload.model, "rlm.turn": payload.turn}
                self._begin(
                    ("sub", run_id, payload.call),
                    self._cell(run_id, at),
                    at,
                    f"sub_call {payload.what}",
                    about,
                )
            case SubCallEnded():
                memoised: _Attributes = {"rlm.memoised": payload.memoised}
                self._end(("sub", run_id, payload.call), at, memoised, payload.error_kind)
            case _:
                pass

    def close(self) -> None:
        """End what is open, the innermost first."""
        if self.left_out and ("run", self.run.run_id) in self.open:
            self.open["run", self.run.run_id].set_attribute("rlm.spans_left_out", self.left_out)
        for key in reversed(tuple(self.open)):
            self._end(key, self.last_at, {}, "")

    def _run_started(self, run_id: RunId, at: float, started: RunStarted) -> None:
        parent = None
        if started.parent is not None:
            asked = self.open.get(("sub", started.parent, started.parent_call))
            parent = asked or self._run_span(started.parent, at)
        self._begin_run(run_id, at, parent, started.depth, started.model)

    def _begin_run(self, run_id: RunId, at: float, parent: Span | None, depth: int, model: str) -> None:
        about: _Attributes = {
            gen_ai.GEN_AI_OPERATION_NAME: "invoke_agent",
            gen_ai.GEN_AI_AGENT_NAME: "rlm",
            gen_ai.GEN_AI_CONVERSATION_ID: self.run.run_id,
            gen_ai.GEN_AI_PROVIDER_NAME: self.provider,
            gen_ai.GEN_AI_REQUEST_MODEL: model,
            "rlm.run_id": run_id,
            "rlm.depth": depth,
            "rlm.tenant_id": self.run.tenant_id,
        }
        self._begin(("run", run_id), parent, at, "invoke_agent rlm", about)

    def _run_span(self, run_id: RunId, at: float) -> Span:
        """The span of a run; a new one where its start was seen by another server."""
        known = self.open.get(("run", run_id))
        if known is None:
            parent = None if run_id == self.run.run_id else self.open.get(("run", self.run.run_id))
            model = str(self.run.options.get("model", ""))
            self._begin_run(run_id, at, parent, 0 if parent is None else -1, model)
            known = self.open[("run", run_id)]
        return known

    def _run_ended(self, run_id: RunId, at: float, ended: RunEnded) -> None:
        is_answered = ended.outcome == "answered"
        about: _Attributes = {"rlm.outcome": ended.outcome, "rlm.turns": ended.turns}
        if run_id == self.run.run_id and self.left_out:
            about["rlm.spans_left_out"] = self.left_out
        self._end(("run", run_id), at, about, "" if is_answered else ended.outcome)

    def _cell(self, run_id: RunId, at: float) -> Span:
        return self.open.get(("cell", run_id)) or self._run_span(run_id, at)

    def _call_held(self, run_id: RunId, at: float, held: CallHeld) -> None:
        is_turn = held.call.startswith("turn-")
        about: _Attributes = {
            gen_ai.GEN_AI_OPERATION_NAME: "chat",
            gen_ai.GEN_AI_PROVIDER_NAME: self.provider,
            gen_ai.GEN_AI_REQUEST_MODEL: held.model,
            "rlm.attempt": held.attempt,
        }
        parent = self._run_span(run_id, at) if is_turn else self._cell(run_id, at)
        key = ("call", run_id, held.call, held.attempt)
        self._begin(key, parent, at, f"chat {held.model}", about)

    def _call_settled(self, run_id: RunId, at: float, settled: CallSettled) -> None:
        usage = settled.usage
        about: _Attributes = {
            # All input, the cached part of it included: so the conventions count.
            gen_ai.GEN_AI_USAGE_INPUT_TOKENS: usage.total_input,
            gen_ai.GEN_AI_USAGE_CACHE_READ_INPUT_TOKENS: usage.cache_read,
            gen_ai.GEN_AI_USAGE_CACHE_CREATION_INPUT_TOKENS: usage.cache_write,
            gen_ai.GEN_AI_USAGE_OUTPUT_TOKENS: usage.output,
            "rlm.cost_microusd": settled.confirmed.cost_microusd,
            "rlm.unconfirmed_cost_microusd": settled.unconfirmed.cost_microusd,
        }
        # The provider's words may quote a prompt.
        kind = "provider_error" if settled.error else ""
        self._end(("call", run_id, settled.call, settled.attempt), at, about, kind)

    def _begin(
        self,
        key: _Key,
        parent: Span | None,
        at: float,
        name: str,
        about: _Attributes,
    ) -> None:
        if self.made >= MAX_SPANS and key[0] != "run":
            self.left_out += 1
            return
        self.made += 1
        self.open[key] = self.tracer.start_span(
            name,
            # The event loop's own context belongs to whoever runs there just now.
            context=set_span_in_context(parent) if parent is not None else Context(),
            kind=SpanKind.CLIENT if key[0] == "call" else SpanKind.INTERNAL,
            attributes=about,
            start_time=_ns(at),
        )

    def _end(self, key: _Key, at: float, about: _Attributes, fault: str) -> None:
        span = self.open.pop(key, None)
        if span is None:
            return
        span.set_attributes(about)
        if fault:
            span.set_attribute(ERROR_TYPE, fault)
            span.set_status(Status(StatusCode.ERROR))
        span.end(_ns(at))


def _ns(at: float) -> int:
    return int(at * 1_000_000_000)


def provider_name(platform: Platform | None) -> str:
    """Who serves the models, as the conventions name it."""
    match platform:
        case Bedrock():
            return "aws.bedrock"
        case Vertex():
            return "gcp.vertex_ai"
        case Foundry():
            return "azure.ai.inference"
        case None:
            return "anthropic"


@asynccontextmanager
async def open_traces(
    endpoint: str, *, service_name: str = "rlm", provider: str = "anthropic"
) -> AsyncIterator[RunTraces]:
    """Spans to a collector that takes OTLP over gRPC, in batches, for the length of the block.

    A collector that does not answer loses spans and holds up nothing; what waits at the end has five seconds.

    Args:
        endpoint: `http://HOST:PORT`, or `https://` with TLS.
        service_name: Under which the spans stand.
        provider: See `provider_name`.
    """
    tracing = TracerProvider(resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http://"), timeout=5)
    tracing.add_span_processor(BatchSpanProcessor(exporter))
    traces = RunTraces(tracing.get_tracer("rlm-orchestrator"), provider=provider)
    try:
        yield traces
    finally:
        await asyncio.to_thread(tracing.shutdown)
