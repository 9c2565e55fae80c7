"""The HTTP side over the real service and a real database, with sandboxes and a provider that are played."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from orchestrator.models.port import ModelClient
from orchestrator.server.http.app import ROUTES, make_app
from orchestrator.server.http.listening import listening
from orchestrator.server.metrics import ServiceMetrics
from orchestrator.server.traces import RunTraces
from orchestrator.store.books import RunFilter, RunState
from tests.fakes.model import USAGE, FakeModel, runs, when
from tests.fakes.service import Account, Server, open_server, short_directory
from tests.fakes.tree import CARD

ANSWERS = "FINAL('forty-two')"
TWENTY_MB = "One line of a long report.\n" * 750_000 + "\nHow many characters?"


@dataclass(frozen=True, slots=True)
class Served:
    """A server with its HTTP port."""

    server: Server
    url: str
    metrics: ServiceMetrics
    spans: InMemorySpanExporter

    @asynccontextmanager
    async def client(self, key: str) -> AsyncIterator[httpx2.AsyncClient]:
        headers = {"authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=60) as client:
            yield client

    def sdk(self, key: str) -> anthropic.AsyncAnthropic:
        return anthropic.AsyncAnthropic(base_url=self.url, api_key=key, max_retries=0)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@asynccontextmanager
async def served(directory: Path, client: ModelClient, **kwargs: Any) -> AsyncIterator[Served]:
    metrics, spans, provider = (
        ServiceMetrics(),
        InMemorySpanExporter(),
        TracerProvider(shutdown_on_exit=False),
    )
    provider.add_span_processor(SimpleSpanProcessor(spans))
    hooks = (metrics, RunTraces(provider.get_tracer("test")))
    async with open_server(directory, client, hooks=hooks, **kwargs) as server:
        app = make_app(server.office, lambda: server.office.is_ready)
        async with listening(app, host="127.0.0.1", port=0) as (host, port):
            yield Served(server, f"http://{host}:{port}", metrics, spans)
    provider.shutdown()


def asks(text: str = "What?") -> dict[str, Any]:
    return {"model": CARD.name, "max_tokens": 1_000, "messages": [{"role": "user", "content": text}]}


async def the_only_run(server: Server, account: Account) -> Any:
    (row,) = await server.books.runs.runs(account.tenant_id, RunFilter(), limit=10)
    return row


async def watched(client: httpx2.AsyncClient, run_id: str) -> list[dict[str, Any]]:
    reply = await client.get(f"/v1/runs/{run_id}/events")
    lines = reply.text.splitlines()
    assert lines[-3:-1] == ["event: end", "data: {}"]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-3] if line.startswith("data: ")]


@pytest.mark.parametrize("streams", [False, True])
async def test_20_mb_through_the_sdk_are_a_context_and_the_bill_is_the_ledgers(
    directory: Path, *, streams: bool
) -> None:
    async with served(directory, FakeModel(otherwise=runs(ANSWERS))) as one:
        account = await one.server.account("acme")
        async with one.sdk(account.run) as client:
            if streams:
                async with client.messages.stream(**asks(TWENTY_MB)) as stream:
                    message: anthropic.types.Message = await stream.get_final_message()
            else:
                message = await client.messages.create(**asks(TWENTY_MB))
        (block,) = message.content
        assert block.type == "text"
        assert block.text == "forty-two"
        row = await the_only_run(one.server, account)
        assert (row.state, row.outcome, f"msg_{row.run_id}") == (RunState.ENDED, "answered", message.id)
        assert (message.usage.input_tokens, message.usage.output_tokens) == (USAGE.input, USAGE.output)
        assert row.confirmed.tokens == message.usage.input_tokens + message.usage.output_tokens
        assert row.question.endswith("How many characters?")
        context = await one.server.books.contexts.context(account.tenant_id, row.context_id)
        assert context is not None
        assert context.sha256 == hashlib.sha256(TWENTY_MB.encode()).hexdigest()


async def test_what_was_uploaded_over_http_is_asked_about_and_watched(directory: Path) -> None:
    data = b"0123456789\n" * 300_000
    async with served(directory, FakeModel(otherwise=runs(ANSWERS))) as one:
        account = await one.server.account("acme")
        async with one.client(account.admin) as client:
            about = {"sha256": hashlib.sha256(data).hexdigest(), "length_bytes": len(data), "name": "d.txt"}
            upload = (await client.post("/v1/uploads", json=about)).json()
            url = f"/v1/uploads/{upload['upload_id']}"
            half = (await client.put(url, params={"offset": 0}, content=data[:2_000_000])).json()
            assert half["next_offset"] == 2_000_000
            wrong = await client.put(url, params={"offset": 0}, content=data[:10])
            assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request_error")
            whole = await client.put(url, params={"offset": 2_000_000}, content=data[2_000_000:])
            context_id = whole.json()["context"]["context_id"]
            made = await client.post("/v1/runs", json={"question": "How many?", "context_id": context_id})
            run_id = made.json()["run"]["run_id"]
            events = await watched(client, run_id)
            assert events[0]["kind"] == "run_started"
            assert events[-1]["outcome"] == "answered"
            assert (await client.get(f"/v1/runs/{run_id}/answer")).text == "forty-two"
            usage = (await client.get("/v1/usage")).json()
            assert (usage["day"]["tokens"], usage["runs_day"], usage["role"]) == (USAGE.total, 1, "admin")
            assert (await client.delete(f"/v1/runs/{run_id}")).status_code == 204
            assert (await client.delete(f"/v1/contexts/{context_id}")).status_code == 204
            assert (await client.get("/v1/contexts")).json()["contexts"] == []


def dateless(reply: httpx2.Response) -> list[tuple[str, str]]:
    """Headers but for the date, in which a second may pass."""
    return [(name, value) for name, value in reply.headers.items() if name != "date"]


ABSENT = {"run_id": "r" + "0" * 20, "upload_id": "c" + "0" * 20, "context_id": "c" + "0" * 20}
BODIES: dict[str, dict[str, object]] = {
    "CreateRun": {"question": "q"},
    "ContinueRun": {"question": "q"},
    "StartUpload": {"sha256": "0" * 64, "length_bytes": 3, "name": "n"},
    "Messages": asks(),
}


async def test_over_every_route_anothers_and_nobodys_are_the_same(directory: Path) -> None:
    async with served(directory, FakeModel(otherwise=runs(f"print('x' * 6_000)\n{ANSWERS}"))) as one:
        ann, bob = await one.server.account("ann"), await one.server.account("bob")
        async with one.client(ann.admin) as mine, one.client(bob.admin) as his:
            made = (await mine.post("/v1/runs", json={"question": "q", "text": "t" * 5_000})).json()["run"]
            events = await watched(mine, made["run_id"])
            (output,) = [event["output"] for event in events if event["kind"] == "cell_ended"]
            assert (await mine.get(f"/v1/runs/{made['run_id']}/texts/{output['sha256']}")).status_code == 200
            upload = (await mine.post("/v1/uploads", json=BODIES["StartUpload"])).json()
            ids = {"run_id": made["run_id"], "upload_id": upload["upload_id"]}
            ids["context_id"] = upload["upload_id"]
            checked = set()
            for route in ROUTES:
                names_something = "{" in route.path or route.name == "CreateRun"
                if not names_something:
                    continue
                replies = []
                for which in (ids, ABSENT):
                    request: dict[str, Any] = {}
                    if route.body is not None:
                        request["json"] = dict(BODIES[route.name])
                    if route.name == "CreateRun":
                        request["json"]["context_id"] = which["context_id"]
                    if route.takes_bytes:
                        request |= {"content": b"abc", "params": {"offset": 0}}
                    path = route.path.format(**which, sha256=output["sha256"])
                    replies.append(await his.request(route.method, path, **request))
                foreign, absent = replies
                assert foreign.status_code == absent.status_code == 404, route.name
                assert foreign.content == absent.content, route.name
                assert dateless(foreign) == dateless(absent), route.name
                checked.add(route.name)
            assert len(checked) == 11
            assert (await his.get("/v1/runs")).json()["runs"] == []
            assert (await his.get("/v1/usage")).json()["day"]["tokens"] == 0
            # A request of his with her hash is an upload of his own.
            other = (await his.post("/v1/uploads", json=BODIES["StartUpload"])).json()
            assert other["upload_id"] != upload["upload_id"]


async def test_metrics_and_spans_agree_with_the_ledger(directory: Path) -> None:
    async with served(directory, FakeModel(otherwise=runs(ANSWERS))) as one:
        account = await one.server.account("acme")
        async with one.sdk(account.run) as client, one.client(account.run) as plain:
            await asyncio.gather(*(client.messages.create(**asks(f"q{n}")) for n in range(5)))
            exposition = one.metrics.exposition()[0].decode()
            used = (await plain.get("/v1/usage")).json()["day"]
        lines = exposition.splitlines()
        assert 'rlm_runs_ended_total{outcome="answered",tenant=""} 5.0' in lines
        tokens = [float(line.split()[-1]) for line in lines if line.startswith("rlm_tokens_total{")]
        assert sum(tokens) == used["tokens"] == 5 * USAGE.total
        assert 'rlm_runs_live{tenant=""} 0.0' in lines
        assert 'rlm_held_tokens{tenant=""} 0.0' in lines
        spans = one.spans.get_finished_spans()
        assert sum(span.name == "invoke_agent rlm" for span in spans) == 5
        assert sum(span.name == f"chat {CARD.name}" for span in spans) == 5
        assert sum(span.name == "execute_tool python" for span in spans) == 5


async def test_a_client_that_hangs_up_ends_its_run(directory: Path) -> None:
    async with served(directory, FakeModel(otherwise=when(asyncio.Event(), runs(ANSWERS)))) as one:
        account = await one.server.account("acme")
        async with one.sdk(account.run) as client:
            asking = asyncio.create_task(client.messages.create(**asks()))
            async with asyncio.timeout(30):
                while one.server.office.running == 0:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.02)
            row = await the_only_run(one.server, account)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
        async with one.client(account.run) as plain:
            # Of a run that was cancelled before it began there are no events.
            await watched(plain, row.run_id)
        assert (await the_only_run(one.server, account)).outcome == "cancelled"


@pytest.mark.parametrize("key", [None, "once"])
async def test_of_a_draining_server_only_what_a_client_comes_again_for_goes_on(
    directory: Path, key: str | None
) -> None:
    headers = {"idempotency-key": key} if key else {}
    body = asks("short")
    never = FakeModel(otherwise=when(asyncio.Event(), runs(ANSWERS)))
    async with served(directory, never, drain_s=0.0) as one:
        account = await one.server.account("acme")
        async with one.client(account.run) as client:
            asking = asyncio.create_task(client.post("/v1/messages", json=body, headers=headers))
            async with asyncio.timeout(30):
                while one.server.office.running == 0:  # noqa: ASYNC110 - it tells nobody
                    await asyncio.sleep(0.02)
            await one.server.drain()
            reply = await asking
            assert (reply.status_code, reply.json()["error"]["type"]) == (529, "overloaded_error")
            assert (await client.get("/readyz")).status_code == 503
            assert (await client.post("/v1/messages", json=body)).status_code == 529
        row = await the_only_run(one.server, account)
        assert row.state is (RunState.INTERRUPTED if key else RunState.ENDED)
    async with served(directory, FakeModel(otherwise=runs(ANSWERS))) as two:
        async with two.client(account.run) as client:
            if key:
                reply = await client.post("/v1/messages", json=body, headers=headers)
                assert reply.json()["content"][0]["text"] == "forty-two"
        row = await the_only_run(two.server, account)
        assert row.outcome == ("answered" if key else "cancelled")
