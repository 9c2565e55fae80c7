import asyncio
import hashlib
import json
import ssl
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from rlm_proto.v1 import run_pb2

from orchestrator import errors
from orchestrator.errors import BudgetExceededError, StoreError, UnavailableError
from orchestrator.server.http import app as http_app
from orchestrator.server.http import listening as http_listening
from orchestrator.server.http import requests as http_requests
from orchestrator.server.http import resources
from orchestrator.server.http.listening import Certificates, listening
from orchestrator.server.http.routes import Route
from orchestrator.service.rules import NEEDED
from orchestrator.store.books import Role
from orchestrator.trajectory import ModelReplied, TurnStarted
from tests.fakes.http_house import ANN, BOB, READER, RUNNER, http_house
from tests.fakes.office import FakeRun, answers, waits_to_be_cancelled
from tests.open_files import nothing_left_open

ABSENT = {"run_id": "r" + "0" * 20, "upload_id": "c999", "context_id": "c999", "sha256": "0" * 64}


async def created(client: httpx2.AsyncClient, **body: object) -> dict[str, Any]:
    reply = await client.post("/v1/runs", json={"question": "what?", "text": "this", **body})
    assert reply.status_code == 201, reply.text
    run: dict[str, Any] = reply.json()["run"]
    return run


async def watched(client: httpx2.AsyncClient, run_id: str, **kwargs: Any) -> list[tuple[str, str, str]]:
    """All of the stream: id, event, data."""
    async with client.stream("GET", f"/v1/runs/{run_id}/events", **kwargs) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        return [one async for one in server_sent(stream)]


async def server_sent(stream: httpx2.Response) -> AsyncIterator[tuple[str, str, str]]:
    fields: dict[str, str] = {}
    async for line in stream.aiter_lines():
        if not line:
            if "data" in fields:
                yield fields.get("id", ""), fields.get("event", ""), fields["data"]
            fields = {}
        elif not line.startswith(":"):
            name, _, value = line.partition(": ")
            fields[name] = value


# --- Runs ----------------------------------------------------------------------------------------------


async def test_a_run_is_created_watched_and_answered() -> None:
    with nothing_left_open():
        async with http_house(answers("forty-two")) as house, house.client() as client:
            run = await created(client, options={"max_depth": 1, "model": "m"})
            events = await watched(client, run["run_id"])
            kinds = [json.loads(data)["kind"] for _, event, data in events if not event]
            assert kinds == ["call_settled", "run_ended"]
            assert [number for number, event, _ in events if not event] == ["0", "1"]
            assert events[-1][1] == "end"
            ended = (await client.get(f"/v1/runs/{run['run_id']}")).json()
            assert (ended["state"], ended["outcome"], ended["answer"]) == ("ended", "answered", "forty-two")
            assert ended["options"] == {"max_depth": 1, "model": "m"}
            assert ended["next_position"] == 2
            answer = await client.get(f"/v1/runs/{run['run_id']}/answer")
            assert (answer.text, answer.headers["content-type"]) == ("forty-two", "text/plain; charset=utf-8")


async def test_a_repeat_under_one_key_is_the_first_ones_run_and_another_request_is_a_conflict() -> None:
    async with http_house() as house, house.client() as client:
        body = {"question": "what?", "text": "this", "idempotency_key": "one"}
        first, second = [await client.post("/v1/runs", json=body) for _ in range(2)]
        assert (first.status_code, second.status_code) == (201, 200)
        assert first.json()["run"]["run_id"] == second.json()["run"]["run_id"]
        assert second.json()["existed"] is True
        by_header = await client.post(
            "/v1/runs", json={**body, "question": "other"} | {}, headers={"idempotency-key": "one"}
        )
        assert (by_header.status_code, by_header.json()["error"]["type"]) == (409, "conflict_error")
        two_keys = await client.post("/v1/runs", json=body, headers={"idempotency-key": "two"})
        assert two_keys.status_code == 400


async def test_lists_come_in_pages_newest_first_and_filtered() -> None:
    async with http_house() as house, house.client() as client:
        made = [(await created(client))["run_id"] for _ in range(5)]
        await asyncio.gather(*(watched(client, run_id) for run_id in made))
        seen: list[str] = []
        token = ""
        for _ in range(4):
            page = (await client.get("/v1/runs", params={"page_size": 2, "page_token": token})).json()
            seen += [run["run_id"] for run in page["runs"]]
            token = page["next_page_token"]
            if not token:
                break
        assert seen == made[::-1]
        filters = {
            "state": ["ended", "queued"],
            "outcome": "answered",
            "created_from": "2020-01-01T00:00:00Z",
        }
        assert len((await client.get("/v1/runs", params=filters)).json()["runs"]) == 5
        none = {"created_before": "2020-01-01T00:00:00Z"}
        assert (await client.get("/v1/runs", params=none)).json() == {"runs": [], "next_page_token": ""}
        for wrong in (
            {"page_token": "nonsense"},
            {"page_size": 0},
            {"state": "asleep"},
            {"pagesize": 3},
            {"created_from": "2020-01-01T00:00:00"},
        ):
            assert (await client.get("/v1/runs", params=wrong)).status_code == 400


async def test_runs_are_cancelled_continued_resumed_and_deleted() -> None:
    async with http_house(waits_to_be_cancelled) as house, house.client() as client:
        run_id = (await created(client))["run_id"]
        assert (await client.delete(f"/v1/runs/{run_id}")).status_code == 409
        assert (
            await client.post(f"/v1/runs/{run_id}/continue", json={"question": "and?"})
        ).status_code == 409
        assert (await client.post(f"/v1/runs/{run_id}/resume")).status_code == 409
        assert (await client.post(f"/v1/runs/{run_id}/cancel")).status_code == 200
        await watched(client, run_id)
        on = await client.post(f"/v1/runs/{run_id}/continue", json={"question": "and?"})
        assert (on.status_code, on.json()["run"]["continues"]) == (201, run_id)
        gone = await client.delete(f"/v1/runs/{run_id}")
        assert (gone.status_code, gone.content) == (204, b"")
        assert (await client.get(f"/v1/runs/{run_id}")).status_code == 404


async def test_a_watch_is_taken_up_where_it_broke() -> None:
    async def play(run: FakeRun) -> None:
        for turn in range(20):
            await run.tell(TurnStarted(turn=turn, request_bytes=1))
        await run.end(answer=b"done")

    async with http_house(play) as house, house.client() as client:
        run_id = (await created(client))["run_id"]
        seen = []
        async with client.stream("GET", f"/v1/runs/{run_id}/events") as stream:
            async for number, _, _ in server_sent(stream):
                seen.append(int(number))
                if len(seen) == 7:
                    break
        rest = await watched(client, run_id, headers={"last-event-id": str(seen[-1])})
        seen += [int(number) for number, event, _ in rest if not event]
        assert seen == list(range(21))
        from_there = await watched(client, run_id, params={"from": 19})
        assert [number for number, event, _ in from_there if not event] == ["19", "20"]
        both = await watched(client, run_id, params={"from": 0}, headers={"last-event-id": "19"})
        assert [number for number, event, _ in both if not event] == ["20"]
        for wrong in ({"last-event-id": "-1"}, {"last-event-id": "x"}, {"last-event-id": "9" * 30}):
            assert (await client.get(f"/v1/runs/{run_id}/events", headers=wrong)).status_code == 400


async def test_a_silent_watch_shows_that_it_lives_and_ends_with_its_client(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(resources, "HTTP_HEARTBEAT_S", 0.02)
    async with http_house(waits_to_be_cancelled) as house, house.client() as client:
        run_id = (await created(client))["run_id"]
        async with client.stream("GET", f"/v1/runs/{run_id}/events") as stream:
            lines = stream.aiter_lines()
            beats = 0
            while beats < 3:
                beats += (await anext(lines)).startswith(":")
        await asyncio.wait_for(house.office.runs[run_id].left.wait(), 20)
        # Who only watches ends nothing.
        assert not house.office.runs[run_id].cancelled.is_set()


async def test_a_client_that_takes_nothing_is_cut_off_and_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_listening, "HTTP_PART_TAKEN_S", 0.3)

    async def play(run: FakeRun) -> None:
        for turn in range(5_000):
            await run.tell(ModelReplied(turn=turn, content="x" * 4_000, stop="end_turn"))
        await run.end(answer=b"done")

    async with http_house(play) as house, house.client() as client:
        run_id = (await created(client))["run_id"]
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        request = f"GET /v1/runs/{run_id}/events HTTP/1.1\r\nhost: x\r\nx-api-key: {ANN}\r\n\r\n"
        writer.write(request.encode())
        await asyncio.wait_for(house.office.runs[run_id].left.wait(), 30)
        with suppress(ConnectionError):
            while await asyncio.wait_for(reader.read(65_536), 20):
                pass
        writer.transport.abort()
        assert len(await watched(client, run_id)) == 5_002


async def test_a_watch_that_breaks_on_our_side_says_so_in_the_stream() -> None:
    async with http_house(waits_to_be_cancelled) as house, house.client() as client:
        run_id = (await created(client))["run_id"]
        async with client.stream("GET", f"/v1/runs/{run_id}/events") as stream:
            coming = server_sent(stream)
            run = house.office.runs[run_id]
            await run.watched.wait()
            house.office.failure = StoreError("the database at 10.0.0.1 is gone")
            await run.tell(TurnStarted(turn=1, request_bytes=1))
            _, event, data = await anext(coming)
        assert (event, json.loads(data)["error"]["type"]) == ("error", "overloaded_error")
        assert "10.0.0.1" not in data


async def test_long_texts_and_long_answers_come_whole() -> None:
    text, answer = "é" * 700_000, "ü" * 900_000
    sha256 = hashlib.sha256(text.encode()).hexdigest()

    async def play(run: FakeRun) -> None:
        run.texts[sha256] = text.encode()
        await run.end(answer=answer.encode())

    async with http_house(play) as house, house.client() as client:
        run_id = (await created(client))["run_id"]
        await watched(client, run_id)
        assert (await client.get(f"/v1/runs/{run_id}/texts/{sha256}")).text == text
        assert (await client.get(f"/v1/runs/{run_id}/answer")).text == answer
        run = (await client.get(f"/v1/runs/{run_id}")).json()
        assert run["answer"] == answer[: 32 * 1024]
        assert run["answer_length_bytes"] == 1_800_000
        listed = (await client.get("/v1/runs")).json()["runs"][0]
        assert listed["answer"] == answer[:100]


# --- Contexts ------------------------------------------------------------------------------------------


async def uploading(client: httpx2.AsyncClient, data: bytes, **body: object) -> dict[str, Any]:
    about = {"sha256": hashlib.sha256(data).hexdigest(), "length_bytes": len(data), "name": "a.txt", **body}
    reply = await client.post("/v1/uploads", json=about)
    assert reply.status_code == 200, reply.text
    upload: dict[str, Any] = reply.json()
    return upload


@pytest.mark.parametrize("length", [5, 1024 * 1024, 3 * 1024 * 1024 + 17])
async def test_an_upload_arrives_whole_and_questions_can_be_asked_about_it(length: int) -> None:
    data = bytes(range(256)) * (length // 256 + 1)
    data = data[:length]
    async with http_house() as house, house.client() as client:
        upload = await uploading(client, data)
        assert (upload["next_offset"], upload["context"]) == (0, None)
        url = f"/v1/uploads/{upload['upload_id']}"
        reply = await client.put(url, params={"offset": 0}, content=data)
        assert reply.status_code == 200, reply.text
        context = reply.json()["context"]
        assert context["length_bytes"] == length
        assert bytes(house.office.uploads[context["context_id"]][1]) == data
        again = await uploading(client, data)
        assert (again["next_offset"], again["context"]["context_id"]) == (length, context["context_id"])
        contexts = (await client.get("/v1/contexts")).json()
        assert [one["context_id"] for one in contexts["contexts"]] == [context["context_id"]]
        run = await client.post("/v1/runs", json={"question": "q", "context_id": context["context_id"]})
        assert run.json()["run"]["context_id"] == context["context_id"]
        assert (await client.delete(f"/v1/contexts/{context['context_id']}")).status_code == 204


async def test_an_upload_goes_on_where_it_stands_and_nowhere_else() -> None:
    data = b"0123456789" * 100
    async with http_house() as house, house.client() as client:
        url = f"/v1/uploads/{(await uploading(client, data))['upload_id']}"
        half = (await client.put(url, params={"offset": 0}, content=data[:500])).json()
        assert (half["next_offset"], half["context"]) == (500, None)
        assert (await client.put(url, params={"offset": 0}, content=data[:500])).status_code == 400
        assert (await client.put(url, content=data[500:])).status_code == 400
        stands = (await client.put(url, params={"offset": 500}, content=b"")).json()
        assert stands["next_offset"] == 500
        whole = (await client.put(url, params={"offset": 500}, content=data[500:])).json()
        assert whole["context"]["sha256"] == hashlib.sha256(data).hexdigest()


async def test_an_upload_with_another_hash_is_dropped() -> None:
    async with http_house() as house, house.client() as client:
        upload = await uploading(client, b"right")
        reply = await client.put(f"/v1/uploads/{upload['upload_id']}", params={"offset": 0}, content=b"wrong")
        assert reply.status_code == 422
        assert house.office.uploads == {}


def dateless(reply: httpx2.Response) -> list[tuple[str, str]]:
    """Headers but for the date, in which a second may pass."""
    return [(name, value) for name, value in reply.headers.items() if name != "date"]


# --- Who may what --------------------------------------------------------------------------------------


def asked(route: Route, ids: dict[str, str]) -> dict[str, Any]:
    """A well-formed request for a route."""
    bodies: dict[str, dict[str, object]] = {
        "CreateRun": {"question": "q", "context_id": ids["context_id"]},
        "ContinueRun": {"question": "q"},
        "StartUpload": {"sha256": "0" * 64, "length_bytes": 3, "name": "n"},
        "Messages": {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hi"}]},
    }
    request: dict[str, Any] = {"method": route.method, "url": route.path.format(**ids)}
    if route.body is not None:
        request["json"] = bodies[route.name]
    if route.takes_bytes:
        request |= {"params": {"offset": 0}, "content": b"abc"}
    return request


async def test_what_is_another_tenants_and_what_is_not_there_give_the_same_bytes() -> None:
    """Enumerated from the table, so that no new route is forgotten."""
    async with http_house() as house, house.client(ANN) as ann, house.client(BOB) as bob:
        run_id = (await created(ann))["run_id"]
        await watched(ann, run_id)
        text = b"a secret text"
        sha256 = hashlib.sha256(text).hexdigest()
        house.office.runs[run_id].texts[sha256] = text
        upload_id = (await uploading(ann, b"abc"))["upload_id"]
        ids = {"run_id": run_id, "sha256": sha256, "upload_id": upload_id, "context_id": upload_id}
        for route in http_app.ROUTES:
            if "{" in route.path or "context_id" in str(asked(route, ABSENT).get("json")):
                foreign, absent = [await bob.request(**asked(route, which)) for which in (ids, ABSENT)]
                assert foreign.status_code == absent.status_code == 404, route.name
                assert foreign.content == absent.content, route.name
                assert dateless(foreign) == dateless(absent), route.name
            elif route.method == "GET":
                # It names nothing; what it lists or adds up is the caller's own.
                mine = await bob.request(**asked(route, ids))
                assert mine.status_code == 200, route.name
                assert run_id not in mine.text
                assert upload_id not in mine.text
        assert run_id in house.office.runs
        assert upload_id in house.office.uploads


async def test_no_route_answers_without_a_key() -> None:
    async with http_house() as house, house.client(None) as client:
        for route in http_app.ROUTES:
            for headers in ({}, {"authorization": "Bearer nobody"}, {"authorization": "Basic cmxtX2Fubg=="}):
                reply = await client.request(**asked(route, ABSENT), headers=headers)
                assert reply.status_code == 401, route.name
                assert reply.json()["error"]["type"] == "authentication_error"
                assert reply.headers["www-authenticate"] == "Bearer"
        assert house.office.asked == []


async def test_no_route_answers_a_key_with_too_small_a_role() -> None:
    weaker = {Role.RUN: READER, Role.ADMIN: RUNNER}
    async with http_house() as house, house.client(None) as client:
        for route in http_app.ROUTES:
            if route.role is Role.READ:
                continue
            headers = {"x-api-key": weaker[route.role]}
            reply = await client.request(**asked(route, ABSENT), headers=headers)
            assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error"), route.name


async def test_both_ways_to_give_a_key_are_taken_and_two_different_ones_are_none() -> None:
    async with http_house() as house, house.client(None) as client:
        for headers in (
            {"x-api-key": ANN},
            {"authorization": f"bearer {ANN}"},
            {"authorization": f"Bearer {ANN}", "x-api-key": ANN},
        ):
            assert (await client.get("/v1/usage", headers=headers)).status_code == 200
        two = {"authorization": f"Bearer {ANN}", "x-api-key": BOB}
        assert (await client.get("/v1/usage", headers=two)).status_code == 401


async def test_every_rpc_of_the_service_can_be_asked_over_http() -> None:
    rpcs = {method.name for method in run_pb2.DESCRIPTOR.services_by_name["RunService"].methods}
    assert {route.rpc or route.name for route in http_app.ROUTES} == rpcs == set(NEEDED)


# --- What is refused -----------------------------------------------------------------------------------


async def test_a_request_of_another_form_is_refused_with_the_field_and_without_its_value() -> None:
    wrong: list[tuple[object, str]] = [
        ({"question": "q", "text": "t", "option": {}}, "option"),
        ({"question": "q", "text": "t", "options": {"max_token": 3}}, "options.max_token"),
        ({"question": "q", "text": "t", "options": {"max_tokens": "3"}}, "options.max_tokens"),
        ({"question": "", "text": "t"}, "question"),
        ({"text": "t"}, "question"),
        ({"question": "q", "text": "t" * (4 * 1024 * 1024 + 1)}, "text"),
        ({"question": "q", "text": "t", "context_id": "c1"}, "context_id"),
        ({"question": "q", "context_id": "c\0"}, "context_id"),
        ([], ""),
    ]
    async with http_house() as house, house.client() as client:
        for body, place in wrong:
            reply = await client.post("/v1/runs", json=body)
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
            assert place in reply.json()["error"]["message"]
            assert len(reply.text) < 700
        assert house.office.runs == {}


async def test_bodies_that_are_no_json_are_refused() -> None:
    async with http_house() as house, house.client() as client:
        url = "/v1/runs"
        assert (
            await client.post(url, content=b"{", headers={"content-type": "application/json"})
        ).status_code == 400
        form = {"content-type": "application/x-www-form-urlencoded"}
        assert (await client.post(url, content=b"question=q", headers=form)).status_code == 415
        lone = b'{"question": "\\ud800", "text": "t"}'
        assert (
            await client.post(url, content=lone, headers={"content-type": "application/json"})
        ).status_code == 400
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        assert (await client.post(url, content=b"x", headers=packed)).status_code == 415


async def test_a_body_past_its_limit_is_refused_said_or_not() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 1024 * 1024

    async with http_house() as house, house.client() as client:
        json_type = {"content-type": "application/json"}
        said = await client.post("/v1/runs", content=b" " * (20 * 1024 * 1024), headers=json_type)
        unsaid = await client.post("/v1/runs", content=parts(), headers=json_type)
        for reply in (said, unsaid):
            assert (reply.status_code, reply.json()["error"]["type"]) == (413, "request_too_large")


async def test_a_stranger_with_a_long_body_learns_that_he_is_one() -> None:
    async with http_house() as house, house.client("rlm_nobody") as client:
        reply = await client.post(
            "/v1/messages", content=b" " * (20 * 1024 * 1024), headers={"content-type": "application/json"}
        )
        assert reply.status_code == 401


async def test_a_body_that_stops_coming_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_requests, "HTTP_BODY_PART_S", 0.05)
    monkeypatch.setattr(http_requests, "HTTP_LINGER_S", 0.05)

    async def parts() -> AsyncIterator[bytes]:
        yield b"{"
        # The client sends all of it before it reads an answer.
        await asyncio.sleep(0.5)

    async with http_house() as house, house.client() as client:
        reply = await client.post("/v1/runs", content=parts(), headers={"content-type": "application/json"})
        assert reply.status_code == 408


@pytest.mark.parametrize("said", [b"", b"GET /v1/usage HTTP/1.1\r\nhost: x\r\n"])
async def test_a_connection_whose_headers_do_not_come_is_closed(
    monkeypatch: pytest.MonkeyPatch, said: bytes
) -> None:
    monkeypatch.setattr(http_listening, "HTTP_HEAD_S", 0.1)
    async with http_house() as house:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        writer.write(said)
        assert await asyncio.wait_for(reader.read(), 20) == b""
        writer.close()
        await writer.wait_closed()


async def test_a_second_request_whose_headers_do_not_come_is_given_up_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_listening, "HTTP_HEAD_S", 0.3)
    monkeypatch.setattr(http_listening, "HTTP_KEEP_ALIVE_S", 0.5)
    request = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"
    async with http_house() as house:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(house.url.rpartition(":")[2]))
        writer.write(request)
        assert (await reader.readuntil(b"alive")).startswith(b"HTTP/1.1 200 OK")
        writer.write(b"GET /heal")
        await asyncio.wait_for(reader.read(), 20)
        writer.close()
        await writer.wait_closed()


async def test_while_too_many_long_bodies_are_under_way_the_next_comes_again_later() -> None:
    async with http_house() as house, house.client() as client:
        room = http_requests.Room(10)
        with room.hold() as held, room.hold() as other:
            held.take(6)
            with pytest.raises(UnavailableError):
                other.take(5)
        with room.hold() as held:
            held.take(10)
        assert (await client.get("/v1/usage")).status_code == 200


async def test_a_tenant_with_too_many_streams_is_refused_more_and_another_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_app, "MAX_HTTP_REQUESTS_OF_TENANT", 3)
    async with http_house(waits_to_be_cancelled) as house, house.client() as ann, house.client(BOB) as bob:
        run_id = (await created(ann))["run_id"]
        async with AsyncExitStack() as streams:
            for _ in range(3):
                await streams.enter_async_context(ann.stream("GET", f"/v1/runs/{run_id}/events"))
            more = await ann.get("/v1/usage")
            assert (more.status_code, more.json()["error"]["type"]) == (429, "rate_limit_error")
            assert (await bob.get("/v1/usage")).status_code == 200
        async with asyncio.timeout(20):
            while (await ann.get("/v1/usage")).status_code != 200:  # noqa: ASYNC110 - the server sees it late
                await asyncio.sleep(0.01)


async def test_headers_past_their_limit_are_refused() -> None:
    async with http_house() as house, house.client() as client:
        for reply in (
            await client.get("/v1/usage", headers={"x-long": "x" * 100_000}),
            await client.get("/v1/usage", params={"x": "x" * 40_000}),
        ):
            assert (reply.status_code, reply.json()["error"]["type"]) == (431, "request_too_large")
        with suppress(httpx2.TransportError):
            endless = await client.get("/v1/usage", headers={"x-long": "x" * 5_000_000})
            assert endless.status_code in {400, 431}
        assert house.office.asked == []


async def test_each_failure_has_its_status_and_its_word() -> None:
    failures: list[tuple[Exception, int, str]] = [
        (errors.NotAllowedError("a model"), 403, "permission_error"),
        (errors.ModelNotAllowedError("a model"), 403, "permission_error"),
        (errors.ConflictError("a state"), 409, "conflict_error"),
        (UnavailableError("drains"), 503, "overloaded_error"),
        (StoreError("gone"), 503, "overloaded_error"),
        (errors.InvariantError("bug"), 500, "api_error"),
        (RuntimeError("bug with a secret"), 500, "api_error"),
        (TimeoutError(), 504, "timeout_error"),
    ]
    async with http_house() as house, house.client() as client:
        for failure, status, kind in failures:
            house.office.failure = failure
            reply = await client.get("/v1/usage")
            assert (reply.status_code, reply.json()["error"]["type"]) == (status, kind)
            assert reply.json()["type"] == "error"
            assert "secret" not in reply.text
            assert ("retry-after" in reply.headers) == (status == 503)


async def test_the_log_says_what_failed_where_and_nothing_that_somebody_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with http_house() as house, house.client() as client:
        house.office.failure = RuntimeError("cannot store 'a prompt with a secret'")
        body = {"question": "a secret question", "text": "a secret text"}
        assert (await client.post("/v1/runs", json=body)).status_code == 500
        assert (
            await client.post("/v1/runs", content=b"a secret", headers={"x-secret": "1"})
        ).status_code == 415
        path = "/v1/runs/secret?from=secret"
        assert (await client.get(path)).status_code == 400
    assert "CreateRun failed: RuntimeError" in caplog.text
    assert "create_run" in caplog.text
    assert "secret" not in caplog.text


async def test_a_used_up_quota_says_what_is_short_and_that_trying_again_does_not_help() -> None:
    async with http_house() as house, house.client() as client:
        house.office.failure = BudgetExceededError("tenant", {"tokens": 5}, {"tokens": 1})
        reply = await client.get("/v1/usage")
        assert reply.status_code == 429
        assert reply.headers["x-should-retry"] == "false"
        assert "5 tokens wanted, 1 left" in reply.json()["error"]["message"]


async def test_what_cannot_be_an_id_never_reaches_the_office() -> None:
    async with http_house() as house, house.client() as client:
        for name in ("%00", "a%20b", "a" * 100, "%2e%2e", "é"):
            assert (await client.get(f"/v1/runs/{name}")).status_code == 404
        assert house.office.asked == []


async def test_unknown_paths_and_methods_have_the_same_form_of_error() -> None:
    async with http_house() as house, house.client() as client:
        absent = await client.get("/v2/runs")
        assert (absent.status_code, absent.json()["error"]["type"]) == (404, "not_found_error")
        slash = await client.get("/v1/runs/", headers={"host": "elsewhere.example"})
        assert (slash.status_code, "location" in slash.headers) == (404, False)
        wrong = await client.patch("/v1/runs")
        assert (wrong.status_code, wrong.json()["type"]) == (405, "error")
        assert (await client.head("/v1/usage")).status_code == 405


# --- The server ----------------------------------------------------------------------------------------


async def test_every_response_keeps_browsers_from_making_anything_of_it() -> None:
    async with http_house() as house, house.client() as client:
        for path in ("/v1/usage", "/nowhere", "/healthz", "/openapi.json"):
            reply = await client.get(path, headers={"origin": "https://elsewhere.example"})
            assert reply.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in reply.headers["content-security-policy"]
            assert reply.headers["cache-control"] == "no-store"
            assert "set-cookie" not in reply.headers
            assert "server" not in reply.headers
            assert not any(name.startswith("access-control-") for name in reply.headers)
        preflight = await client.options("/v1/usage", headers={"access-control-request-method": "GET"})
        assert preflight.status_code == 405


async def test_ready_means_ready_and_alive_means_alive() -> None:
    async with http_house() as house, house.client(None) as client:
        assert (await client.get("/readyz")).status_code == 200
        house.is_ready = False
        assert (await client.get("/readyz")).status_code == 503
        assert (await client.get("/healthz")).status_code == 200


async def test_the_openapi_document_names_every_route_with_its_parameters_and_errors() -> None:
    async with http_house() as house, house.client(None) as client:
        document = (await client.get("/openapi.json")).json()
    operations = {
        (method.upper(), path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    assert set(operations) == {(route.method, route.path) for route in http_app.ROUTES}
    for route in http_app.ROUTES:
        operation = operations[route.method, route.path]
        assert {"400", "401", "403", "404", "500"} <= set(operation["responses"])
        assert str(route.status) in operation["responses"]
        assert ("requestBody" in operation) == (route.body is not None or route.takes_bytes)
    upload = operations["PUT", "/v1/uploads/{upload_id}"]
    assert [(one["name"], one["in"]) for one in upload["parameters"]] == [
        ("upload_id", "path"),
        ("offset", "query"),
    ]
    for reference in references(document):
        assert reference.removeprefix("#/components/schemas/") in document["components"]["schemas"]


def references(document: object) -> Iterator[str]:
    if isinstance(document, dict):
        for name, value in document.items():
            if name == "$ref":
                yield value
            yield from references(value)
    elif isinstance(document, list):
        for value in document:
            yield from references(value)


@asynccontextmanager
async def certificates(directory: Path) -> AsyncIterator[Certificates]:
    certificate, key = directory / "certificate.pem", directory / "key.pem"
    about = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"]
    make: list[str | Path] = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-keyout",
        key,
        "-out",
        certificate,
        *about,
    ]
    await asyncio.to_thread(lambda: subprocess.run(make, check=True, capture_output=True, timeout=30))
    yield Certificates(certificate=str(certificate), key=str(key), client_authority=str(certificate))


async def test_with_tls_only_clients_with_a_certificate_of_the_authority_are_let_in(tmp_path: Path) -> None:
    async with (
        http_house() as house,
        certificates(tmp_path) as files,
        listening(house.app, host="127.0.0.1", port=0, certificates=files) as (host, port),
    ):
        known = ssl.create_default_context(cafile=files.certificate)
        known.load_cert_chain(files.certificate, files.key)
        async with httpx2.AsyncClient(verify=known) as client:
            assert (await client.get(f"https://{host}:{port}/healthz")).status_code == 200
        stranger = ssl.create_default_context(cafile=files.certificate)
        async with httpx2.AsyncClient(verify=stranger) as client:
            with pytest.raises(httpx2.TransportError):
                await client.get(f"https://{host}:{port}/healthz")


async def test_an_address_that_is_taken_is_said() -> None:
    async with http_house() as house:
        port = int(house.url.rpartition(":")[2])
        with pytest.raises(errors.InvalidRequestError, match="cannot listen"):
            async with listening(house.app, host="127.0.0.1", port=port):
                pass


async def test_a_server_that_ends_ends_its_streams_and_cancels_no_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http_listening, "HTTP_STREAMS_END_S", 0)
    message = {
        "model": "m",
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "hi"}],
        "stream": True,
    }
    async with (
        http_house(waits_to_be_cancelled) as house,
        house.client() as client,
        AsyncExitStack() as stack,
    ):
        async with listening(house.app, host="127.0.0.1", port=0) as (host, port):
            url = f"http://{host}:{port}/v1/messages"
            stream = await stack.enter_async_context(client.stream("POST", url, json=message))
            lines = stream.aiter_lines()
            assert await anext(lines) == "event: message_start"
            house.is_ready = False
        with pytest.raises(httpx2.TransportError):
            assert [line async for line in lines if "message_stop" in line] == []
        (run,) = house.office.runs.values()
        await asyncio.wait_for(run.left.wait(), 20)
        assert not run.cancelled.is_set()
