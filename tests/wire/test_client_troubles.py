"""The client where things go wrong: connections that break, servers that restart, lie or refuse."""

import asyncio
import hashlib
import io
import subprocess
import tarfile
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio
import pytest
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import run_pb2_grpc

from orchestrator import client as public
from orchestrator import errors
from orchestrator.client import Client, Patience, RunOptions, RunState, SyncClient, Tls, watching
from orchestrator.errors import (
    BudgetExceededError,
    CallIdReusedError,
    ConflictError,
    ContextInputError,
    HashMismatchError,
    InvalidRequestError,
    InvariantError,
    ModelNotAllowedError,
    NotAllowedError,
    NotFoundError,
    OrchestratorError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from tests.fakes.relay import Relay, relayed
from tests.fakes.run_service import KEY, FakeRunService, serve, served_in_a_thread

METHODS = {method.name for method in pb.DESCRIPTOR.services_by_name["RunService"].methods}
GONE = grpc.StatusCode.UNAVAILABLE
IMPATIENT = Patience(call_s=0.5, watch_s=0.5)
ROOT = "r1"


@dataclass
class House:
    """A fake service, a relay in front of it, and a client behind that."""

    service: FakeRunService
    relay: Relay
    address: str
    said: list[str] = field(default_factory=list)

    def client(self, *, patience: Patience | None = None, api_key: str = KEY) -> Client:
        return Client(self.address, api_key=api_key, patience=patience, say=self.said.append)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    service = FakeRunService()
    async with serve(service) as address, relayed(address) as (relay, public_address):
        yield House(service, relay, public_address)


@pytest.fixture
async def client(house: House) -> AsyncIterator[Client]:
    async with house.client() as one:
        yield one


def numbered(count: int, *, size: int = 10) -> list[dict[str, object]]:
    return [{"v": 1, "seq": number, "text": "x" * size} for number in range(count)]


async def watched(client: Client, run_id: str = ROOT, from_position: int = 0) -> list[tuple[int, object]]:
    async with aclosing(client.watch(run_id, from_position)) as events:
        return [(position, event["seq"]) async for position, event in events]


async def until(holds: Callable[[], bool]) -> None:
    """pytest's own limit ends a wait in vain."""
    while not holds():  # noqa: ASYNC110 - nothing there to wait on
        await asyncio.sleep(0.005)


def twice(*numbers: int) -> list[tuple[int, object]]:
    """Events that say their own position."""
    return [(number, number) for number in numbers]


# --- Calls ---------------------------------------------------------------------------------------------


async def test_a_question_that_had_to_be_sent_four_times_makes_one_run(house: House, client: Client) -> None:
    house.service.before["CreateRun"] = [GONE, UnavailableError("draining")]
    house.service.after["CreateRun"] = [GONE]
    created = await client.create_run("why?", text="because")
    assert house.service.calls["CreateRun"] == 4
    assert len(house.service.keys_seen) == 2
    assert len(set(house.service.keys_seen)) == 1
    assert list(house.service.runs) == [created.run.run_id]
    assert created.existed
    # Once it is away, and once it is back, however many attempts lie between.
    assert house.said == [
        f"{house.address} does not answer: Socket closed; trying again",
        f"{house.address} is back",
    ]


async def test_a_program_that_asks_again_under_its_own_key_gets_the_same_run(client: Client) -> None:
    first = await client.create_run("why?", text="because", idempotency_key="mine")
    again = await client.create_run("why?", text="because", idempotency_key="mine")
    assert (first.existed, again.existed) == (False, True)
    assert again.run == first.run
    with pytest.raises(CallIdReusedError, match="another request"):
        await client.create_run("why not?", text="because", idempotency_key="mine")


async def test_what_was_not_asked_for_is_left_to_the_server(house: House, client: Client) -> None:
    options = RunOptions(model="m", memoise=True, max_depth=0, deadline_s=1.5, allow_models=("a", "b=c"))
    created = await client.create_run("why?", text="because", options=options)
    asked = house.service.asked[created.run.idempotency_key]
    assert isinstance(asked, pb.CreateRunRequest)
    assert {name.name for name, _value in asked.options.ListFields()} == {
        "model", "memoise", "max_depth", "deadline_s", "allow_models",
    }  # fmt: skip
    assert created.run.options == options


def test_the_client_knows_every_option_of_the_protocol() -> None:
    assert [item.name for item in fields(RunOptions)] == [
        item.name for item in pb.RunOptions.DESCRIPTOR.fields
    ]


@pytest.mark.parametrize(
    ("sent", "got"),
    [
        (errors.InvalidRequestError("no"), InvalidRequestError),
        (errors.UnauthenticatedError("no"), UnauthenticatedError),
        (errors.NotAllowedError("no"), NotAllowedError),
        (errors.ModelNotAllowedError("no"), ModelNotAllowedError),
        (errors.NotFoundError("no"), NotFoundError),
        (errors.ConflictError("no"), ConflictError),
        (errors.CallIdReusedError("no"), CallIdReusedError),
        (errors.ContextInputError("no"), ContextInputError),
        (errors.HashMismatchError("no"), HashMismatchError),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else "",
)
async def test_an_error_of_the_service_is_the_same_error_here_and_is_not_asked_for_twice(
    house: House, client: Client, sent: OrchestratorError, got: type[OrchestratorError]
) -> None:
    house.service.before["GetUsage"] = [sent]
    with pytest.raises(got, match=r"^no$") as raised:
        await client.get_usage()
    assert type(raised.value) is got
    assert house.service.calls["GetUsage"] == 1
    assert house.said == []


async def test_a_refusal_by_a_quota_brings_its_numbers_and_the_servers_sentence(
    house: House, client: Client
) -> None:
    refused = BudgetExceededError("tenant", {"tokens": 10, "runs": 2}, {"tokens": 3, "runs": 0})
    house.service.before["CreateRun"] = [refused]
    with pytest.raises(BudgetExceededError) as raised:
        await client.create_run("why?", text="because")
    assert str(raised.value) == str(refused)
    assert raised.value.account == "tenant"
    assert raised.value.wanted["tokens"] == 10
    assert raised.value.left["tokens"] == 3


async def test_a_failure_of_the_servers_own_is_told_as_such(house: House, client: Client) -> None:
    house.service.before["GetUsage"] = [errors.InvariantError("secret detail")]
    with pytest.raises(ServerError) as raised:
        await client.get_usage()
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    "status",
    [GONE, grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED, grpc.StatusCode.INTERNAL],
)
async def test_what_the_transport_makes_is_tried_again(
    house: House, client: Client, status: grpc.StatusCode
) -> None:
    house.service.before["GetUsage"] = [status] * 2
    await client.get_usage()
    assert house.service.calls["GetUsage"] == 3


async def test_patience_has_an_end(house: House) -> None:
    house.service.before["GetUsage"] = [GONE] * 1_000
    async with house.client(patience=IMPATIENT) as client:
        with pytest.raises(UnavailableError, match=r"does not answer: Socket closed"):
            await client.get_usage()
    assert len(house.said) == 1


async def test_a_server_that_is_not_there_is_told_of_in_a_few_words() -> None:
    async with Client("127.0.0.1:1", api_key=KEY, patience=IMPATIENT) as client:
        with pytest.raises(UnavailableError, match=r"^127\.0\.0\.1:1 does not answer: connection refused$"):
            await client.get_usage()


async def test_a_server_that_is_none_of_ours_is_told_of() -> None:
    server = grpc.aio.server()
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with Client(f"127.0.0.1:{port}", api_key=KEY) as client:
            with pytest.raises(ServerError, match="does not know this call"):
                await client.get_usage()
    finally:
        await server.stop(None)


async def test_a_wrong_key_is_refused_and_occurs_in_no_error(house: House) -> None:
    async with house.client(api_key="rlm_wrong") as client:
        with pytest.raises(UnauthenticatedError) as raised:
            await client.get_usage()
    assert "rlm_wrong" not in repr(raised.value)
    with pytest.raises(InvalidRequestError) as refused:
        Client("127.0.0.1:1", api_key="two words")
    assert "two words" not in str(refused.value)


async def test_runs_and_contexts_come_page_by_page(house: House, client: Client) -> None:
    for number in range(5):
        house.service.add_run(f"r{number}")
        await client.upload_bytes(b"x" * (number + 1), f"{number}.txt")
    assert [run.run_id async for run in client.list_runs()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [context.name async for context in client.list_contexts()] == [f"{n}.txt" for n in (4, 3, 2, 1, 0)]
    assert house.service.calls["ListRuns"] == house.service.calls["ListContexts"] == 3


async def test_filters_of_a_list_reach_the_server(house: House, client: Client) -> None:
    until = datetime(2026, 11, 23, tzinfo=UTC)
    listed = client.list_runs(
        states=[RunState.ENDED],
        outcomes=["answered"],
        created_from=until - timedelta(days=1),
        created_before=until,
    )
    assert [run async for run in listed] == []
    asked = house.service.asked["ListRuns"]
    assert isinstance(asked, pb.ListRunsRequest)
    assert list(asked.states) == [pb.RUN_STATE_ENDED]
    assert list(asked.outcomes) == ["answered"]
    assert asked.created_before.seconds - asked.created_from.seconds == 86_400
    assert asked.created_before.seconds == int(until.timestamp())


async def test_deleting_what_was_deleted_by_a_lost_call_is_done(house: House, client: Client) -> None:
    house.service.add_run(ROOT, state=pb.RUN_STATE_ENDED)
    house.service.after["DeleteRun"] = [GONE]
    await client.delete_run(ROOT)
    with pytest.raises(NotFoundError):
        await client.delete_run(ROOT)
    uploaded = await client.upload_bytes(b"text")
    house.service.after["DeleteContext"] = [GONE]
    await client.delete_context(uploaded.context_id)
    with pytest.raises(NotFoundError):
        await client.delete_context(uploaded.context_id)


async def test_resuming_what_was_resumed_by_a_lost_call_is_done(house: House, client: Client) -> None:
    house.service.add_run(ROOT, state=pb.RUN_STATE_INTERRUPTED)
    house.service.after["ResumeRun"] = [GONE]
    assert (await client.resume_run(ROOT)).state is RunState.RUNNING
    with pytest.raises(ConflictError):
        await client.resume_run(ROOT)


async def test_a_client_outside_of_its_block_says_so() -> None:
    with pytest.raises(InvariantError, match="outside"):
        await Client("127.0.0.1:1", api_key=KEY).get_usage()


async def test_every_method_of_the_service_can_be_called_and_each_call_has_a_deadline(
    house: House, client: Client, tmp_path: Path
) -> None:
    # The fake refuses a call without key or deadline.
    house.service.on_create = lambda run: house.service.end(run.run_id)
    file = tmp_path / "a.txt"
    file.write_text("hi")
    answer = await client.ask("why?", file)
    await client.continue_run(answer.run.run_id, "and?")
    await client.cancel_run(answer.run.run_id)
    house.service.add_run(ROOT, state=pb.RUN_STATE_INTERRUPTED)
    await client.resume_run(ROOT)
    assert [part async for part in client.read_text(answer.run.run_id)] == [b"42"]
    assert await client.get_usage()
    assert len([run async for run in client.list_runs()]) == 3
    assert len([context async for context in client.list_contexts()]) == 1
    await client.delete_context(answer.run.context_id or (await client.upload(file)).context_id)
    await client.delete_run(answer.run.run_id)
    assert set(house.service.calls) == METHODS


# --- Watching ------------------------------------------------------------------------------------------


async def test_a_watch_over_connections_that_break_has_no_gap_and_no_repeat(house: House) -> None:
    service = house.service
    service.add_run(ROOT)
    service.tell(ROOT, *numbered(400, size=1_000))
    service.end(ROOT)
    house.relay.cut_down = [60_000, 100, 150_000, 0]
    async with house.client() as client:
        assert await watched(client) == twice(*range(400))
    assert house.relay.connections >= 4
    assert [line for line in house.said if line.endswith("when it is back")]
    assert [line for line in house.said if "is back; going on from event" in line]


async def test_a_watch_goes_on_when_its_server_comes_back_later(house: House) -> None:
    service, said = FakeRunService(), list[str]()
    service.add_run(ROOT)
    service.tell(ROOT, *numbered(3))
    seen: asyncio.Queue[int] = asyncio.Queue()

    async def follow(client: Client) -> None:
        async with aclosing(client.watch(ROOT)) as events:
            async for position, _event in events:
                seen.put_nowait(position)

    async with serve(service) as address:
        client = Client(address, api_key=KEY, say=said.append)
        await client.__aenter__()
        following = asyncio.create_task(follow(client))
        assert [await seen.get() for _ in range(3)] == [0, 1, 2]
    await until(lambda: bool(said))
    assert said[0].startswith(f"{address} does not answer: ")
    assert said[0].endswith("; taking up at event 3 when it is back")
    service.tell(ROOT, *numbered(2))
    service.end(ROOT)
    async with serve(service, address):
        await following
        await client.__aexit__(None, None, None)
    assert [seen.get_nowait() for _ in range(2)] == [3, 4]
    assert said[1:] == [f"{address} is back; going on from event 3"]


async def test_a_quiet_stream_is_renewed_without_a_word(
    house: House, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "STREAM_S", 0.3)
    house.service.add_run(ROOT)
    house.service.tell(ROOT, *numbered(2))
    following = asyncio.create_task(watched(client))
    await until(lambda: house.service.calls["WatchRun"] >= 3)
    house.service.tell(ROOT, *numbered(1))
    house.service.end(ROOT)
    await house.service.stir()
    assert await following == [(0, 0), (1, 1), (2, 0)]
    assert house.said == []


async def test_a_stream_that_ends_before_its_run_is_taken_up_again(house: House, client: Client) -> None:
    house.service.add_run(ROOT)
    house.service.tell(ROOT, *numbered(4))
    house.service.watches = [[0, 1], []]

    async def ends_later() -> None:
        await until(lambda: house.service.calls["WatchRun"] >= 3)
        house.service.end(ROOT)
        await house.service.stir()

    ending = asyncio.create_task(ends_later())
    assert await watched(client) == twice(0, 1, 2, 3)
    await ending


async def test_events_that_come_twice_are_given_once_and_one_that_is_left_out_is_told(
    house: House, client: Client
) -> None:
    house.service.add_run(ROOT)
    house.service.tell(ROOT, *numbered(5))
    house.service.end(ROOT)
    house.service.watches = [[0, 1, 0, 1, 2]]
    assert await watched(client) == twice(0, 1, 2)
    house.service.watches = [[0, 1, 4]]
    with pytest.raises(ServerError, match="left out events 2 to 3"):
        await watched(client)


@pytest.mark.parametrize("said", [b"{", b"[]", b'"\xff"'])
async def test_an_event_that_is_none_is_told(house: House, client: Client, said: bytes) -> None:
    house.service.add_run(ROOT)
    house.service.events[ROOT].append(said)
    with pytest.raises(ServerError, match="sent an event that is no"):
        await watched(client)


async def test_a_watch_begins_where_it_is_told_to(house: House, client: Client) -> None:
    house.service.add_run(ROOT)
    house.service.tell(ROOT, *numbered(5))
    house.service.end(ROOT)
    assert await watched(client, from_position=3) == twice(3, 4)


async def test_a_watch_of_a_run_that_is_not_there_or_was_deleted_ends_with_that(
    house: House, client: Client
) -> None:
    with pytest.raises(NotFoundError):
        await watched(client)
    house.service.add_run(ROOT)
    house.service.watches = [[]]
    house.service.before["GetRun"] = [NotFoundError("deleted meanwhile")]
    with pytest.raises(NotFoundError, match="deleted meanwhile"):
        await watched(client)


async def test_a_watcher_whose_server_stays_away_gives_up_in_the_end(house: House) -> None:
    house.service.add_run(ROOT)
    house.service.tell(ROOT, *numbered(1))
    house.service.before["WatchRun"] = [GONE] * 1_000
    async with house.client(patience=IMPATIENT) as client:
        with pytest.raises(UnavailableError):
            await watched(client)


async def test_a_watch_that_is_left_leaves_no_call_behind(house: House, client: Client) -> None:
    house.service.add_run(ROOT)
    house.service.tell(ROOT, *numbered(3))
    async with aclosing(client.watch(ROOT)) as events:
        async for _position, _event in events:
            break
    house.service.end(ROOT)
    assert (await client.get_run(ROOT)).is_over


# --- Uploading -----------------------------------------------------------------------------------------


def received(service: FakeRunService) -> bytes:
    (data,) = service.uploads.values()
    return bytes(data)


async def test_an_upload_over_connections_that_break_sends_little_twice(house: House, tmp_path: Path) -> None:
    data = bytes(range(256)) * 4 * 10_000
    file = tmp_path / "big.bin"
    file.write_bytes(data)
    house.relay.cut_up = [3_000_000, 100, 4_000_000]
    async with house.client() as client:
        uploaded = await client.upload(file)
    assert house.relay.connections >= 3
    assert received(house.service) == data
    assert uploaded.sha256 == hashlib.sha256(data).hexdigest()
    assert (uploaded.name, uploaded.length_bytes, uploaded.existed) == ("big.bin", len(data), False)
    # What was under way when a connection broke, and no more.
    assert house.service.received_bytes == len(data)
    assert house.relay.sent_bytes < 1.5 * len(data)
    assert [line for line in house.said if line.endswith("the upload goes on from where it stands")]


async def test_an_upload_whose_last_response_was_lost_is_complete(house: House, client: Client) -> None:
    house.service.upload_parts = [1]
    uploaded = await client.upload_bytes(b"x" * 600_000)
    assert received(house.service) == b"x" * 600_000
    assert not uploaded.existed


async def test_what_the_server_has_is_not_sent_again(house: House, client: Client) -> None:
    first = await client.upload_bytes(b"text", "a.txt")
    again = await client.upload_bytes(b"text", "a.txt")
    assert (first.existed, again.existed) == (False, True)
    assert again.context_id == first.context_id
    assert house.service.calls["Upload"] == 1


async def test_an_upload_that_another_client_got_further_with_goes_on_from_there(
    house: House, client: Client
) -> None:
    data = bytes(range(250)) * 8_000
    upload_id = f"c{hashlib.sha256(data).hexdigest()[:20]}"

    house.service.uploads[upload_id] = bytearray(data[: 512 * 1024])
    house.service.before["Upload"] = [ContextInputError("it stands elsewhere"), ConflictError("complete")]
    await client.upload_bytes(data)
    assert house.service.received_bytes == len(data) - 512 * 1024
    assert received(house.service) == data


async def test_a_file_that_changed_while_it_was_sent_is_refused_and_not_sent_for_ever(
    house: House, client: Client
) -> None:
    house.service.before["Upload"] = [HashMismatchError("all is there, and it is something else")]
    with pytest.raises(HashMismatchError):
        await client.upload_bytes(b"text")
    assert house.service.calls["Upload"] == 1


async def test_a_server_that_takes_nothing_is_given_up(house: House) -> None:
    house.service.before["Upload"] = [GONE] * 1_000
    async with house.client(patience=IMPATIENT) as client:
        with pytest.raises(UnavailableError):
            await client.upload_bytes(b"text")


async def test_a_directory_is_sent_as_an_archive_that_is_the_same_each_time(
    house: House, client: Client, tmp_path: Path
) -> None:
    folder = tmp_path / "papers"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("bee")
    (folder / "sub" / "a.txt").write_text("eh")
    (folder / "link").symlink_to("/etc/passwd")
    uploaded = await client.upload(folder)
    assert uploaded.name == "papers.tar"
    with tarfile.open(fileobj=io.BytesIO(received(house.service))) as archive:
        assert archive.getnames() == ["b.txt", "sub/a.txt"]
        assert {entry.mtime for entry in archive} == {0}
    assert len(uploaded.notes) == 1
    assert "link" in uploaded.notes[0]
    (folder / "b.txt").touch()
    assert (await client.upload(folder)).existed


# --- Texts ---------------------------------------------------------------------------------------------


async def test_a_long_text_that_broke_off_goes_on_where_it_broke(house: House, client: Client) -> None:
    text = b"".join(b"%06d" % number for number in range(2_000))
    sha256 = hashlib.sha256(text).hexdigest()
    house.service.add_run(ROOT)
    house.service.texts[sha256] = text
    house.service.after["ReadText"] = [UnavailableError("draining"), GONE]
    assert b"".join([part async for part in client.read_text(ROOT, sha256)]) == text
    assert house.service.calls["ReadText"] == 3


async def test_a_text_that_is_another_than_its_hash_says_is_refused(house: House, client: Client) -> None:
    house.service.add_run(ROOT)
    house.service.texts["0" * 64] = b"something else"
    with pytest.raises(ServerError, match="another text"):
        _ = [part async for part in client.read_text(ROOT, "0" * 64)]


@pytest.mark.parametrize("length", [10, 64_000, 200_001])
async def test_an_answer_of_any_length_comes_whole(house: House, client: Client, length: int) -> None:
    # Three bytes a character, so that the head is cut in the middle of one.
    whole = "€" * length
    house.service.on_create = lambda run: house.service.end(run.run_id, answer=whole.encode())
    assert (await client.ask("why?", "because")).text == whole


async def test_a_text_too_long_for_a_question_is_uploaded_first(house: House, client: Client) -> None:
    house.service.on_create = lambda run: house.service.end(run.run_id)
    await client.ask("why?", "x" * 4_000_001)
    assert len(received(house.service)) == 4_000_001


async def test_a_run_without_an_answer_says_why(house: House, client: Client) -> None:
    house.service.on_create = lambda run: house.service.end(run.run_id, "budget_exhausted", error="no tokens")
    seen: list[int] = []
    answer = await client.ask("why?", b"because", on_event=lambda position, _event: seen.append(position))
    assert answer.text is None
    assert (answer.run.outcome, answer.run.error) == ("budget_exhausted", "no tokens")
    assert seen == []


# --- The way there -------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["10.0.0.1:7443", "example.org:7443", "[2001:db8::1]:7443"])
async def test_a_key_does_not_go_to_another_machine_in_plain_text(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="without TLS"):
        await Client(address, api_key=KEY).__aenter__()
    async with Client(address, api_key=KEY, plaintext=True), Client(address, api_key=KEY, tls=Tls()):
        pass


@pytest.mark.parametrize("address", ["", "7443", "host", "host:0", "host:70000", "http://host:1", "a b:1"])
async def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidRequestError, match="is no address"):
        await Client(address, api_key=KEY).__aenter__()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """Of localhost, signed by itself, and its key."""
    folder = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [  # noqa: S607 - the system's
            "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
            "-keyout", "key.pem", "-out", "cert.pem", "-days", "2", "-subj", "/CN=localhost",
            "-addext", "subjectAltName=DNS:localhost",
        ],
        cwd=folder, check=True, capture_output=True,
    )  # fmt: skip
    return (folder / "cert.pem").read_bytes(), (folder / "key.pem").read_bytes()


async def test_tls_shows_each_side_who_the_other_is(certificate: tuple[bytes, bytes]) -> None:
    public_part, private_part = certificate
    server = grpc.aio.server()
    run_pb2_grpc.add_RunServiceServicer_to_server(FakeRunService(), server)
    credentials = grpc.ssl_server_credentials([(private_part, public_part)], public_part, True)
    address = f"localhost:{server.add_secure_port('localhost:0', credentials)}"
    await server.start()
    known = Tls(ca=public_part, certificate=public_part, private_key=private_part)
    assert private_part.decode() not in repr(known)
    try:
        async with Client(address, api_key=KEY, tls=known) as client:
            await client.get_usage()
        # Of unknown servers it is said at once: waiting changes no certificate.
        async with Client(address, api_key=KEY, tls=Tls()) as client:
            with pytest.raises(ServerError, match="no TLS with"):
                await client.get_usage()
        async with Client(address, api_key=KEY, tls=Tls(ca=public_part), patience=IMPATIENT) as client:
            with pytest.raises((ServerError, UnavailableError)):
                await client.get_usage()
    finally:
        await server.stop(None)
    with pytest.raises(InvalidRequestError, match="together"):
        await Client(address, api_key=KEY, tls=Tls(certificate=public_part)).__aenter__()


# --- Without an event loop -----------------------------------------------------------------------------


def test_the_client_without_an_event_loop_does_the_same() -> None:
    def answered(run: pb.Run) -> None:
        service.tell(run.run_id, *numbered(3))
        service.end(run.run_id)

    with served_in_a_thread() as (service, address):
        service.on_create = answered
        with SyncClient(address, api_key=KEY) as client:
            answer = client.ask("why?", "because")
            assert answer.text == "42"
            run_id = answer.run.run_id
            assert [position for position, _event in client.watch(run_id)] == [0, 1, 2]
            first = next(iter(client.watch(run_id)))
            assert first[0] == 0
            assert [run.run_id for run in client.list_runs()] == [run_id]
            with pytest.raises(NotFoundError):
                client.get_run("none")
        with pytest.raises(InvariantError, match="outside"):
            client.get_usage()
        assert public.ask("why?", "because", server=address, api_key=KEY).text == "42"


async def test_the_client_without_an_event_loop_works_below_one() -> None:
    """As in a notebook."""
    with served_in_a_thread() as (_service, address), SyncClient(address, api_key=KEY) as client:
        assert client.get_usage().live_runs == 0


def test_the_synchronous_client_has_every_method_of_the_other() -> None:
    def methods(kind: type) -> set[str]:
        return {name for name in vars(kind) if not name.startswith("_")}

    assert methods(Client) == methods(SyncClient) - {"run"}
