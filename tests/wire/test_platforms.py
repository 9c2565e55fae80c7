"""Bedrock, Vertex and Foundry through the real SDK, against servers on loopback that speak as they do.

What these servers do is what the SDK's source says the platforms do; no platform was asked.
"""

import base64
import json
import struct
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from aiohttp import web
from botocore.auth import SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

from orchestrator.conversation import StopReason, Told
from orchestrator.errors import Billing, InvalidRequestError, KeyMissingError, MachineError, ModelError
from orchestrator.models import platforms
from orchestrator.models.anthropic_client import AnthropicClient
from orchestrator.models.platforms import Bedrock, Foundry, Platform, Vertex
from orchestrator.models.port import ModelRequest
from orchestrator.models.sdk import on_platform
from orchestrator.pricing import Usage

REQUEST = ModelRequest(
    model="claude-test:0",
    system="",
    conversation=(Told("What is 6 times 7?"),),
    python_tool=False,
    max_tokens=100,
    timeout_s=10.0,
)
USAGE = {"input_tokens": 12, "output_tokens": 1}
EVENTS: list[dict[str, Any]] = [
    {"type": "message_start", "message": {"content": [], "usage": USAGE, "stop_reason": None}},
    {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
    {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "42"}},
    {"type": "content_block_stop", "index": 0},
    {"type": "message_delta", "delta": {"stop_reason": "end_turn"}, "usage": {"output_tokens": 3}},
    {"type": "message_stop"},
]
SECRET = "a-very-secret-key"  # noqa: S105 - it opens nothing
KEYS = Bedrock(region="eu-west-1", access_key_id="AKID", secret_access_key=SECRET, session_token=SECRET)
TOKEN = Bedrock(region="eu-west-1", bearer_token=SECRET)
VERTEX = Vertex(region="europe-west1", project_id="my-project", access_token=SECRET)
FOUNDRY = Foundry(resource="mine", api_key=SECRET)

PLAIN_HEADERS = {
    "accept", "accept-encoding", "anthropic-version", "connection", "content-length", "content-type", "host",
    "user-agent",
}  # fmt: skip


@dataclass
class Server:
    """One address for all platforms; it remembers the last request."""

    url: str = ""
    path: str = ""
    headers: dict[str, str] | None = None
    body: bytes = b""
    reply: bytes | None = None
    """Instead of the usual one."""
    status: int = 200

    async def handle(self, request: web.Request) -> web.Response:
        self.path, self.body = request.raw_path, await request.read()
        self.headers = {name.lower(): value for name, value in request.headers.items()}
        if self.status != 200:
            return web.json_response({"message": f"no, {SECRET}"}, status=self.status)
        from_amazon = "/model/" in self.path
        kind = "application/vnd.amazon.eventstream" if from_amazon else "text/event-stream"
        usual = b"".join(_amazon_frames(EVENTS) if from_amazon else map(_server_sent, EVENTS))
        return web.Response(body=usual if self.reply is None else self.reply, headers={"content-type": kind})


@asynccontextmanager
async def serving(platform: Platform) -> AsyncIterator[tuple[AnthropicClient, Server]]:
    server = Server()
    app = web.Application()
    app.router.add_post("/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    host, port = runner.addresses[0][:2]
    server.url = f"http://{host}:{port}"
    client = AnthropicClient(on_platform(platform, server.url))
    try:
        yield client, server
    finally:
        await client.aclose()
        await runner.cleanup()


def _server_sent(event: dict[str, Any]) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _amazon_frames(events: list[dict[str, Any]]) -> Iterator[bytes]:
    for event in events:
        payload = {"bytes": base64.b64encode(json.dumps(event).encode()).decode()}
        yield _frame({":message-type": "event", ":event-type": "chunk"}, payload)


def _frame(headers: dict[str, str], payload: dict[str, Any]) -> bytes:
    """One message of Amazon's binary event streams."""
    head = b"".join(
        bytes([len(name)]) + name.encode() + b"\x07" + struct.pack("!H", len(value)) + value.encode()
        for name, value in headers.items()
    )
    body = json.dumps(payload).encode()
    prelude = struct.pack("!II", 16 + len(head) + len(body), len(head))
    message = prelude + struct.pack("!I", zlib.crc32(prelude)) + head + body
    return message + struct.pack("!I", zlib.crc32(message))


# --- One code path over all of them --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "path"),
    [
        (KEYS, "/model/claude-test:0/invoke-with-response-stream"),
        (TOKEN, "/model/claude-test:0/invoke-with-response-stream"),
        (
            VERTEX,
            "/projects/my-project/locations/europe-west1/publishers/anthropic/models/"
            "claude-test:0:streamRawPredict",
        ),
        (FOUNDRY, "/v1/messages"),
    ],
    ids=["bedrock with keys", "bedrock with a token", "vertex", "foundry"],
)
async def test_a_sub_call_is_answered_and_counted(platform: Platform, path: str) -> None:
    async with serving(platform) as (client, server):
        completion = await client.complete(REQUEST)
    assert completion.reply.text == "42"
    assert completion.reply.stop is StopReason.END_TURN
    assert completion.usage == Usage(input=12, output=3)
    assert server.path == path
    sent = json.loads(server.body)
    assert sent["max_tokens"] == 100
    assert sent["messages"][0]["content"][0]["text"] == "What is 6 times 7?"


@pytest.mark.parametrize("platform", [KEYS, TOKEN, VERTEX, FOUNDRY], ids=repr)
async def test_nothing_of_the_environment_goes_out(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-somebody-else")
    monkeypatch.setenv("ANTHROPIC_FOUNDRY_API_KEY", "key-of-somebody-else")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-somebody-else")
    monkeypatch.setenv("ANTHROPIC_BEDROCK_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ANTHROPIC_VERTEX_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv(
        "ANTHROPIC_CUSTOM_HEADERS", "X-Leak: 1\nAuthorization: Bearer stolen\nx-api-key: stolen"
    )
    async with serving(platform) as (client, server):
        await client.complete(REQUEST)
    assert server.headers is not None
    assert "somebody-else" not in repr(server.headers)
    assert "stolen" not in repr(server.headers)
    added = set(server.headers) - PLAIN_HEADERS
    if isinstance(platform, Foundry):
        assert {server.headers[name] for name in added} == {SECRET}
        assert added == {"x-api-key", "api-key"}
    elif platform is KEYS:
        assert added <= {"authorization", "x-amz-date", "x-amz-security-token", "x-amz-content-sha256"}
    else:
        assert added == {"authorization"}
        assert server.headers["authorization"] == f"Bearer {SECRET}"


async def test_what_arrives_at_amazon_is_what_was_signed() -> None:
    async with serving(KEYS) as (client, server):
        await client.complete(REQUEST)
    assert server.headers is not None
    told = server.headers["authorization"]
    signed = told.partition("SignedHeaders=")[2].partition(",")[0].split(";")
    assert "content-type" in signed
    # The server's side of it: the same headers, as they arrived, and Amazon's own rules.
    arrived = {name: server.headers[name] for name in signed}
    request = AWSRequest("POST", server.url + server.path, headers=arrived, data=server.body)
    request.context["timestamp"] = server.headers["x-amz-date"]
    auth = SigV4Auth(Credentials("AKID", SECRET, SECRET), "bedrock", "eu-west-1")
    expected = auth.signature(auth.string_to_sign(request, auth.canonical_request(request)), request)
    assert told.endswith(f"Signature={expected}")


# --- What goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", [KEYS, VERTEX, FOUNDRY], ids=["bedrock", "vertex", "foundry"])
@pytest.mark.parametrize(
    ("status", "billing", "retryable"),
    [
        (400, Billing.NOTHING, False),
        (403, Billing.NOTHING, False),
        (429, Billing.NOTHING, True),
        (500, Billing.UNKNOWN, True),
        (503, Billing.UNKNOWN, True),
    ],
)
async def test_refusals_are_classified_alike(
    platform: Platform, status: int, billing: Billing, retryable: bool
) -> None:
    async with serving(platform) as (client, server):
        server.status = status
        with pytest.raises(ModelError) as caught:
            await client.complete(REQUEST)
    failure = caught.value
    assert (failure.billing, failure.retryable, failure.status) == (billing, retryable, status)
    assert SECRET not in str(failure)


@pytest.mark.parametrize(
    ("reply", "billing", "retryable"),
    [
        (
            _frame(
                {":message-type": "exception", ":exception-type": "throttlingException"}, {"message": "slow"}
            ),
            Billing.NOTHING,
            True,
        ),
        (b"".join(_amazon_frames(EVENTS[:3])), Billing.UNKNOWN, True),
        (b"x" * 200, Billing.UNKNOWN, False),
        (b"", Billing.UNKNOWN, True),
    ],
    ids=["throttled in the stream", "cut short", "no event stream", "nothing"],
)
async def test_a_broken_stream_of_amazons_is_one_failed_attempt(
    reply: bytes, billing: Billing, retryable: bool
) -> None:
    async with serving(KEYS) as (client, server):
        server.reply = reply
        with pytest.raises(ModelError) as caught:
            await client.complete(REQUEST)
    assert (caught.value.billing, caught.value.retryable) == (billing, retryable)


async def test_a_platform_whose_credentials_are_nowhere_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    for name in (
        "AWS_ACCESS_KEY_ID",
        "AWS_PROFILE",
        "AWS_BEARER_TOKEN_BEDROCK",
        "GOOGLE_APPLICATION_CREDENTIALS",
    ):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))
    for platform, whose in (
        (Bedrock(region="eu-west-1"), "Amazon"),
        (Vertex(region="eu", project_id="p"), "Google"),
    ):
        async with serving(platform) as (client, server):
            with pytest.raises(ModelError, match=f"no credentials .* {whose}'s library reports") as caught:
                await client.complete(REQUEST)
        assert (caught.value.billing, caught.value.retryable) == (Billing.NOTHING, False)
        assert server.path == ""


def test_what_is_missing_is_said_before_anything_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(KeyMissingError):
        on_platform(Foundry(resource="mine"))
    with pytest.raises(InvalidRequestError, match="no http or https URL"):
        on_platform(FOUNDRY, "ftp://host")
    monkeypatch.setattr(platforms, "find_spec", lambda name: None)
    with pytest.raises(
        MachineError, match=r"boto3 is not installed: pip install 'rlm-orchestrator\[bedrock\]'"
    ):
        on_platform(KEYS)
    with pytest.raises(MachineError, match=r"rlm-orchestrator\[vertex\]"):
        on_platform(Vertex(region="eu", project_id="p"))
