"""The metrics have an address of their own, and the clients' port has none of them."""

from collections.abc import AsyncIterator

import httpx2
import pytest

from orchestrator.config import ServiceSettings
from orchestrator.errors import InvalidRequestError
from orchestrator.server.metrics import ServiceMetrics
from orchestrator.server.metrics_port import metrics_port
from orchestrator.server.serve import _metrics
from tests.fakes.http_house import http_house


@pytest.fixture
async def reader() -> AsyncIterator[httpx2.AsyncClient]:
    """Reads the metrics of a server that has done nothing yet."""
    async with (
        metrics_port(ServiceMetrics().exposition, host="127.0.0.1", port=0) as port,
        httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30) as client,
    ):
        yield client


async def test_prometheus_reads_them_without_a_key(reader: httpx2.AsyncClient) -> None:
    reply = await reader.get("/metrics")
    assert reply.status_code == 200
    assert reply.headers["content-type"].startswith("text/plain; version=")
    assert "# TYPE rlm_runs_ended_total counter" in reply.text


@pytest.mark.parametrize("path", ["/", "/metrics/", "/v1/runs", "/openapi.json", "/healthz"])
async def test_there_is_nothing_else_at_their_address(reader: httpx2.AsyncClient, path: str) -> None:
    assert (await reader.get(path)).status_code == 404


async def test_nothing_can_be_written_there(reader: httpx2.AsyncClient) -> None:
    assert (await reader.post("/metrics", content=b"rlm_runs_ended_total 0\n")).status_code == 405


async def test_a_tenants_key_opens_no_metrics_at_the_clients_port() -> None:
    async with http_house() as house, house.client() as client:
        assert (await client.get("/metrics")).status_code == 404


async def test_they_are_off_until_a_setting_gives_them_an_address() -> None:
    async with _metrics(ServiceSettings(), ServiceMetrics()) as address:
        assert address == ""
    async with _metrics(ServiceSettings(metrics="127.0.0.1:0"), ServiceMetrics()) as address:
        assert address.startswith("127.0.0.1:")
        assert not address.endswith(":0")


async def test_an_address_that_makes_no_sense_is_refused_by_the_name_of_its_setting() -> None:
    with pytest.raises(InvalidRequestError, match="RLM_METRICS"):
        async with _metrics(ServiceSettings(metrics="yes"), ServiceMetrics()):
            pass
