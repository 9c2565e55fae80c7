"""The HTTP port under strangers and a hostile tenant, on real sockets."""

import asyncio
import json
import logging
import ssl
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pytest

from orchestrator.server.http import listening as http_listening
from orchestrator.server.http import requests as http_requests
from orchestrator.server.http.listening import listening
from tests.fakes.http_house import ANN, House, http_house
from tests.fakes.office import waits_to_be_cancelled
from tests.wire.test_http_api import certificates

SOON_S = 20.0
JSON = {"content-type": "application/json"}


class Raw:
    """One connection, spoken to by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, house: House, said: bytes = b"") -> "Raw":
        raw = cls(*await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2])))
        raw.writer.write(said)
        return raw

    async def all(self) -> bytes:
        came = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(SOON_S):
                while part := await self.reader.read(65_536):
                    came += part
        return came


def request(line: str, *headers: str, body: bytes = b"") -> bytes:
    return "\r\n".join((line + " HTTP/1.1", "host: x", *headers, "", "")).encode() + body


# --- Strangers -----------------------------------------------------------------------------------------


async def test_idle_connections_of_strangers_take_each_others_place_and_nobody_elses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_listening, "MAX_HTTP_IDLE_CONNECTIONS", 5)
    async with http_house(waits_to_be_cancelled) as house, house.client() as client:
        made = await client.post("/v1/runs", json={"question": "q", "text": "t"})
        url = f"/v1/runs/{made.json()['run']['run_id']}/events"
        async with client.stream("GET", url) as watched:
            silent = [await Raw.to(house, b"GET /v1/us" * (number % 2)) for number in range(20)]
            assert (await client.get("/v1/usage")).status_code == 200
            for raw in silent[:14]:
                assert await raw.all() == b""
            lines = watched.aiter_lines()
            assert await anext(lines) == "retry: 1000"
            await house.office.runs[made.json()["run"]["run_id"]].end(answer=b"x")
            assert "event: end" in [line async for line in lines]
        for raw in silent:
            raw.writer.close()


SMUGGLED: Sequence[bytes] = (
    request(
        "POST /v1/runs", "content-length: 4", "transfer-encoding: chunked", body=b"0\r\n\r\nGET / HTTP/1.1"
    ),
    request("POST /v1/runs", "content-length: 4", "content-length: 5", body=b"12345"),
    request("POST /v1/runs", "transfer-encoding: xchunked", body=b"0\r\n\r\n"),
    request("POST /v1/runs", "content-length: -1"),
    request("GET /v1/usage", "x : y"),
    b"GET /v1/usage HTTP/1.1\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
)


@pytest.mark.parametrize("said", SMUGGLED)
async def test_what_two_parsers_could_read_in_two_ways_is_answered_once_and_the_connection_closed(
    said: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with http_house() as house:
        raw = await Raw.to(house, said + request("GET /healthz"))
        came = await raw.all()
        raw.writer.close()
        # 401: of two ways to read it, one is taken, and what follows is no request of its own.
        assert came.startswith((b"HTTP/1.1 400 ", b"HTTP/1.1 401 ", b"HTTP/1.1 501 "))
        assert b"alive" not in came
        assert house.office.asked == []
    assert [one for one in caplog.records if one.levelno >= logging.WARNING] == []


async def test_a_key_in_the_address_or_in_a_cookie_is_none() -> None:
    async with http_house() as house, house.client(None) as client:
        for query in ({"api_key": ANN}, {"key": ANN}, {"access_token": ANN}, {"x-api-key": ANN}):
            assert (await client.get("/v1/usage", params=query)).status_code == 401
        assert (await client.get("/v1/usage", headers={"cookie": f"x-api-key={ANN}"})).status_code == 401
        override = {"x-http-method-override": "DELETE", "x-original-url": "/v1/usage"}
        assert (await client.post("/v1/usage", headers=override)).status_code == 405
        for path in ("//v1/usage", "/v1/./usage", "/v1/runs/../usage", "/V1/usage"):
            raw = await Raw.to(house, request(f"GET {path}", f"x-api-key: {ANN}", "connection: close"))
            assert (await raw.all()).startswith(b"HTTP/1.1 404 ")
            raw.writer.close()
        assert house.office.asked == []


async def test_what_a_page_of_another_origin_can_send_without_asking_is_refused() -> None:
    simple = ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "")
    asked = json.dumps({"question": "q", "text": "t"}).encode()
    async with http_house() as house, house.client() as client:
        for media_type in simple:
            for path in ("/v1/runs", "/v1/messages", "/v1/uploads"):
                reply = await client.post(path, content=asked, headers={"content-type": media_type})
                assert reply.status_code == 415
        assert house.office.asked == []


async def test_tls_older_than_1_2_is_not_spoken(tmp_path: Path) -> None:
    async with (
        http_house() as house,
        certificates(tmp_path) as files,
        listening(house.app, host="127.0.0.1", port=0, certificates=files) as (host, port),
    ):
        context = ssl.create_default_context(cafile=files.certificate)
        context.load_cert_chain(files.certificate, files.key)
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.warns(DeprecationWarning, match="deprecated"):
            context.minimum_version = ssl.TLSVersion.TLSv1
        with pytest.warns(DeprecationWarning, match="deprecated"):
            context.maximum_version = ssl.TLSVersion.TLSv1_1
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await asyncio.open_connection(host, port, ssl=context)


# --- A hostile tenant ----------------------------------------------------------------------------------


def blocks(count: int) -> bytes:
    text = b'{"type":"text","text":""}'
    content = b",".join([text] * count)
    return b'{"model":"m","max_tokens":1,"messages":[{"role":"user","content":[%b]}]}' % content


@pytest.mark.parametrize(
    "body",
    [
        blocks(300_000),
        b'{"model":"m","max_tokens":1,"messages":[],"metadata":{"a":[%b]}}' % b",".join([b"[]"] * 2_000_000),
        b'{"model":"m","max_tokens":1,"messages":[],"metadata":%b' % (b'{"":' * 1_000_000),
        b'"' * 8_000_000,
    ],
    ids=["blocks", "lists", "deep", "strings"],
)
async def test_json_that_is_small_on_the_wire_and_large_in_memory_is_refused_before_it_is_parsed(
    body: bytes,
) -> None:
    async with http_house() as house, house.client() as client:
        reply = await client.post("/v1/messages", content=body, headers=JSON)
        assert (reply.status_code, reply.json()["error"]["type"]) == (413, "request_too_large")
        # A long prompt of many parts is none of those.
        reply = await client.post("/v1/messages", content=blocks(2_000), headers=JSON)
        assert reply.status_code == 400
        assert "asks nothing" in reply.text


async def test_what_json_costs_in_memory_counts_among_the_bodies_under_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_requests.Room.__init__, "__defaults__", (100_000,))
    async with http_house() as house, house.client() as client:
        assert (await client.post("/v1/messages", content=blocks(100), headers=JSON)).status_code == 400
        assert (await client.post("/v1/messages", content=blocks(2_000), headers=JSON)).status_code == 529
        assert (await client.post("/v1/messages", content=blocks(100), headers=JSON)).status_code == 400


ODD: Sequence[tuple[bytes, str]] = (
    (b'{"question":"q","text":"t","options":{"deadline_s":NaN}}', "deadline_s"),
    (b'{"question":"q","text":"t","options":{"max_tokens":%b}}' % (b"9" * 60_000), "JSON"),
    (b'{"question":"q","text":"t","options":{"max_tokens":true}}', "max_tokens"),
    (b'{"question":"q","text":"t","options":{"max_tokens":1.0}}', "max_tokens"),
    (b'{"question":"q","x":%b' % (b"[" * 60_000), "JSON"),
    (b'{"question":"\xff","text":"t"}', "JSON"),
    ('{"question":"q","text":"t"}'.encode("utf-16"), "JSON"),
    (b"", "JSON"),
    (b"null", ""),
)


@pytest.mark.parametrize(("body", "named"), ODD)
async def test_json_that_is_odd_is_a_refusal_and_no_failure_of_ours(
    body: bytes, named: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with http_house() as house, house.client() as client:
        reply = await client.post("/v1/runs", content=body, headers=JSON)
        assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
        assert named in reply.json()["error"]["message"]
        assert house.office.asked == []
    assert [one for one in caplog.records if one.levelno >= logging.ERROR] == []
