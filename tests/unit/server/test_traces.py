import asyncio
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.semconv._incubating.attributes.gen_ai_attributes import GenAiProviderNameValues
from opentelemetry.trace import SpanKind, StatusCode

from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex
from orchestrator.server import traces
from orchestrator.server.traces import RunTraces
from orchestrator.trajectory import Event, RunResumed
from tests.unit.server.stories import (
    CANARY,
    CHILD,
    ROOT,
    cell_ended,
    ended,
    held,
    row,
    started,
    sub_call,
    sub_call_ended,
    the_story,
)


@pytest.fixture
def exporter() -> Iterator[InMemorySpanExporter]:
    exporter = InMemorySpanExporter()
    yield exporter
    exporter.shutdown()


@pytest.fixture
def hook(exporter: InMemorySpanExporter) -> Iterator[RunTraces]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield RunTraces(provider.get_tracer("test"))
    provider.shutdown()


def tree(spans: tuple[ReadableSpan, ...]) -> set[tuple[str, str]]:
    """Names with those of their parents."""
    by_id = {span.context.span_id: span for span in spans if span.context}
    return {(span.name, by_id[span.parent.span_id].name if span.parent else "") for span in spans}


def test_a_run_tree_is_a_tree_of_spans(hook: RunTraces, exporter: InMemorySpanExporter) -> None:
    observe = hook.observer(row())
    for event in the_story():
        observe(event)
    hook.left(row())
    spans = exporter.get_finished_spans()
    assert tree(spans) == {
        ("invoke_agent rlm", ""),
        ("chat big", "invoke_agent rlm"),
        ("execute_tool python", "invoke_agent rlm"),
        ("sub_call complete", "execute_tool python"),
        ("chat small", "execute_tool python"),
        ("sub_call child_run", "execute_tool python"),
        ("invoke_agent rlm", "sub_call child_run"),
        ("chat small", "invoke_agent rlm"),
    }
    assert len({span.context.trace_id for span in spans if span.context}) == 1


def test_spans_have_the_conventions_attributes_and_the_events_times(
    hook: RunTraces, exporter: InMemorySpanExporter
) -> None:
    observe = hook.observer(row())
    for event in the_story():
        observe(event)
    (chat,) = [span for span in exporter.get_finished_spans() if span.name == "chat big"]
    assert chat.kind is SpanKind.CLIENT
    assert chat.start_time == 103_000_000_000
    assert chat.end_time == 104_000_000_000
    assert chat.attributes is not None
    assert dict(chat.attributes) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "anthropic",
        "gen_ai.request.model": "big",
        "gen_ai.usage.input_tokens": 100,
        "gen_ai.usage.cache_read.input_tokens": 20,
        "gen_ai.usage.cache_creation.input_tokens": 10,
        "gen_ai.usage.output_tokens": 5,
        "rlm.attempt": 1,
        "rlm.cost_microusd": 40,
        "rlm.unconfirmed_cost_microusd": 0,
    }


def test_no_span_holds_what_a_model_or_a_guest_wrote(hook: RunTraces, exporter: InMemorySpanExporter) -> None:
    observe = hook.observer(row())
    for event in the_story():
        observe(event)
    assert CANARY not in "".join(span.to_json() for span in exporter.get_finished_spans())


def test_what_failed_is_an_error_by_its_kind(hook: RunTraces, exporter: InMemorySpanExporter) -> None:
    observe = hook.observer(row())
    for event in the_story():
        observe(event)
    failed = {
        (span.name, (span.attributes or {})["error.type"])
        for span in exporter.get_finished_spans()
        if span.status.status_code is StatusCode.ERROR
    }
    assert failed == {
        ("sub_call complete", "ModelError"),
        ("sub_call complete", "BudgetExceededError"),
        ("chat small", "provider_error"),
    }


def test_a_run_that_goes_on_here_gets_a_span_of_its_own(
    hook: RunTraces, exporter: InMemorySpanExporter
) -> None:
    observe = hook.observer(row())
    observe(Event(ROOT, 9, 200.0, RunResumed(times=1, turn=2, cells=1)))
    observe(Event(ROOT, 10, 201.0, held("turn-2", "big")))
    observe(Event(CHILD, 5, 202.0, held("turn-2", "small")))
    observe(Event(ROOT, 11, 203.0, cell_ended()))
    observe(Event(ROOT, 12, 203.0, sub_call_ended("a")))
    hook.left(row())
    spans = exporter.get_finished_spans()
    assert tree(spans) == {
        ("invoke_agent rlm", ""),
        ("chat big", "invoke_agent rlm"),
        ("invoke_agent rlm", "invoke_agent rlm"),
        ("chat small", "invoke_agent rlm"),
    }
    assert all(span.end_time == 203_000_000_000 for span in spans)


def test_platforms_have_the_conventions_names() -> None:
    platforms: list[Platform | None] = [
        None,
        Bedrock(region="eu-west-1", profile=""),
        Vertex(region="global", project_id="p"),
        Foundry(resource="r"),
    ]
    known = {value.value for value in GenAiProviderNameValues}
    names = [traces.provider_name(platform) for platform in platforms]
    assert set(names) <= known
    assert len(set(names)) == 4


async def test_spans_reach_a_collector_over_grpc() -> None:
    received: list[bytes] = []

    async def export(request: bytes, _context: object) -> bytes:
        received.append(request)
        return b""

    server = grpc.aio.server()
    handlers: Any = {"Export": grpc.unary_unary_rpc_method_handler(export)}
    service = "opentelemetry.proto.collector.trace.v1.TraceService"
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with traces.open_traces(f"http://127.0.0.1:{port}") as hook:
            observe = hook.observer(row())
            for event in the_story():
                observe(event)
            hook.left(row())
    finally:
        await server.stop(None)
    (batch,) = received
    assert batch.count(b"invoke_agent rlm") == 2
    assert CANARY.encode() not in batch


async def test_a_collector_that_is_not_there_holds_up_nothing_but_the_end_and_that_not_for_long() -> None:
    async with asyncio.timeout(30):
        async with traces.open_traces("http://127.0.0.1:9") as hook:
            observe = hook.observer(row())
            for event in the_story():
                observe(event)
            hook.left(row())


def test_past_so_many_spans_only_their_number_is_told(
    monkeypatch: pytest.MonkeyPatch, hook: RunTraces, exporter: InMemorySpanExporter
) -> None:
    monkeypatch.setattr(traces, "MAX_SPANS", 5)
    observe = hook.observer(row())
    observe(Event(ROOT, 0, 1.0, started()))
    for number in range(20):
        observe(Event(ROOT, 1 + number, 2.0, sub_call(f"{number}", "complete")))
        observe(Event(ROOT, 1 + number, 2.0, sub_call_ended(f"{number}")))
    observe(Event(ROOT, 99, 3.0, ended("turn_limit")))
    spans = exporter.get_finished_spans()
    assert len(spans) == 5
    assert (spans[-1].attributes or {})["rlm.spans_left_out"] == 16
    assert (spans[-1].attributes or {})["error.type"] == "turn_limit"
