"""RunService over real gRPC and a real database, with sandboxes and a provider that are played."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import run_pb2_grpc, types_pb2

from orchestrator.conversation import Reply
from orchestrator.errors import MachineError, StoreError
from orchestrator.ids import RunId, new_context_id, new_run_id
from orchestrator.models.port import ModelRequest
from orchestrator.rpc.status import DETAIL_KEY
from orchestrator.server.grpc_shell import Tls, open_port
from orchestrator.service import office
from orchestrator.service.rules import NEEDED
from orchestrator.store.books import AuditRow, Quota, Role, RunState, TenantRules
from tests.fakes.model import FakeModel, runs, says, when
from tests.fakes.service import Account, Server, open_server, short_directory
from tests.fakes.tree import CARD

METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["RunService"].methods}
IDS = ("run_id", "context_id", "upload_id")
TEXT = b"The quick brown fox.\n" * 100
ANSWERS = "FINAL('forty-two')"


@pytest.fixture
def directory() -> Any:
    with short_directory() as path:
        yield path


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[Server]:
    async with open_server(directory, FakeModel(otherwise=runs(ANSWERS))) as one:
        yield one


@pytest.fixture
async def account(server: Server) -> Account:
    return await server.account("acme")


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    async with server.stub() as one:
        yield one


def key(secret: str) -> dict[str, Any]:
    """How a call says who makes it, and for how long it waits."""
    return {"metadata": (("authorization", f"Bearer {secret}"),), "timeout": 30.0}


def asking(idempotency_key: str = "k", **more: Any) -> pb.CreateRunRequest:
    if "context_id" not in more:
        more.setdefault("text", TEXT)
    return pb.CreateRunRequest(**{"idempotency_key": idempotency_key, "question": b"How many?", **more})


def named(run_id: str, **more: Any) -> Any:
    return pb.WatchRunRequest(run_id=run_id, **more)


async def watched(stub: Any, secret: str, run_id: str, from_position: int = 0) -> list[dict[str, Any]]:
    """All events of a run to its end, with their positions."""
    request = pb.WatchRunRequest(run_id=run_id, from_position=from_position)
    return [
        {"position": told.position, **json.loads(told.event_json)}
        async for told in stub.WatchRun(request, **key(secret))
    ]


async def ended(stub: Any, secret: str, run_id: str) -> pb.Run:
    await watched(stub, secret, run_id)
    answer = await stub.GetRun(pb.GetRunRequest(run_id=run_id), **key(secret))
    assert answer.run.state == pb.RUN_STATE_ENDED
    run: pb.Run = answer.run
    return run


async def created(stub: Any, account: Account, idempotency_key: str = "k", **more: Any) -> pb.Run:
    answer = await stub.CreateRun(asking(idempotency_key, **more), **key(account.run))
    run: pb.Run = answer.run
    return run


async def uploaded(stub: Any, account: Account, data: bytes = TEXT, name: str = "fox.txt") -> pb.Context:
    begun = await stub.StartUpload(
        pb.StartUploadRequest(sha256=hashlib.sha256(data).hexdigest(), length_bytes=len(data), name=name),
        **key(account.run),
    )

    async def parts() -> AsyncIterator[pb.UploadRequest]:
        for offset in range(begun.next_offset, len(data), 1_000):
            yield pb.UploadRequest(
                upload_id="" if offset else begun.upload_id, offset=offset, data=data[offset : offset + 1_000]
            )

    answer = await stub.Upload(parts(), **key(account.run))
    context: pb.Context = answer.context
    return context


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    """The error of a call that must fail, streamed answer or not."""

    async def made() -> None:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await made()
    return caught.value


def detail(error: grpc.aio.AioRpcError) -> types_pb2.ErrorDetail:
    trailing = dict(error.trailing_metadata() or ())
    return types_pb2.ErrorDetail.FromString(trailing[DETAIL_KEY])


def call_of(stub: Any, name: str, secret: str | None, **ids: str) -> Any:
    """A call of any method, with everything it needs besides ids."""
    method = METHODS[name]
    request = pb.__dict__[method.input_type.name]()
    fields = method.input_type.fields_by_name
    for field, value in {
        "idempotency_key": "any",
        "question": b"How many?",
        "data": b"x",
        "answer": True,
        "sha256": "0" * 64,
        "length_bytes": 1,
        "name": "n",
        "text": b"t",
        **ids,
    }.items():
        if field in fields and not (name == "CreateRun" and field == "text" and ids):
            setattr(request, field, value)
    if name == "ReadText":
        request.answer = True
    given = {"timeout": 30.0} if secret is None else key(secret)
    return getattr(stub, name)(iter([request]) if method.client_streaming else request, **given)


# --- A run ---------------------------------------------------------------------------------------------


async def test_a_question_is_queued_watched_and_answered(stub: Any, account: Account) -> None:
    run = await created(stub, account)
    assert (run.state, run.next_position) == (pb.RUN_STATE_QUEUED, 0)
    events = await watched(stub, account.read, run.run_id)
    assert [event["position"] for event in events] == list(range(len(events)))
    assert events[0]["kind"] == "run_started"
    assert events[-1]["kind"] == "run_ended"
    told = (await stub.GetRun(pb.GetRunRequest(run_id=run.run_id), **key(account.read))).run
    assert (told.outcome, told.answer, told.answer_length_bytes) == ("answered", b"forty-two", 9)
    assert (told.state, told.next_position) == (pb.RUN_STATE_ENDED, len(events))
    assert told.confirmed.calls == 1
    assert told.confirmed.tokens == 110
    assert told.options.model == CARD.name
    assert told.started_at.seconds
    assert told.ended_at.seconds


async def test_an_uploaded_context_is_what_the_run_sees(
    directory: Path, server: Server, account: Account
) -> None:
    async with server.stub() as stub:
        context = await uploaded(stub, account)
        assert (context.length_bytes, context.name) == (len(TEXT), "fox.txt")
        first = await created(stub, account, "1", context_id=context.context_id)
        again = await created(stub, account, "2", context_id=context.context_id)
        for run in (first, again):
            (started, *_) = await watched(stub, account.read, run.run_id)
            assert f"{len(TEXT):,}" in started["context"]
        listed = await stub.ListContexts(pb.ListContextsRequest(), **key(account.read))
        assert [one.context_id for one in listed.contexts] == [context.context_id]


async def test_a_repeat_under_one_key_is_the_same_run_and_another_request_is_refused(
    stub: Any, account: Account
) -> None:
    answers = await asyncio.gather(*(stub.CreateRun(asking("same"), **key(account.run)) for _ in range(8)))
    assert len({answer.run.run_id for answer in answers}) == 1
    assert sorted(answer.existed for answer in answers) == [False] + [True] * 7
    error = await refusal(stub.CreateRun(asking("same", question=b"Another?"), **key(account.run)))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS
    await ended(stub, account.read, answers[0].run.run_id)
    late = await stub.CreateRun(asking("same"), **key(account.run))
    assert late.existed
    assert late.run.answer == b"forty-two"


async def test_a_watcher_that_was_cut_off_goes_on_where_it_was(stub: Any, account: Account) -> None:
    run = await created(stub, account)
    whole = await watched(stub, account.read, run.run_id)
    for position in range(len(whole) + 1):
        assert await watched(stub, account.read, run.run_id, position) == whole[position:]


async def test_a_watcher_that_hangs_up_leaves_nothing_behind(directory: Path) -> None:
    async with (
        open_server(directory, FakeModel(otherwise=when(asyncio.Event(), runs(ANSWERS)))) as server,
        server.stub() as stub,
    ):
        account = await server.account("acme")
        run = await created(stub, account)
        streams: list[Any] = [stub.WatchRun(named(run.run_id), **key(account.read)) for _ in range(20)]
        for stream in streams:
            assert (await stream.read()).position == 0
        assert server.office.watchers == 20
        for stream in streams:
            stream.cancel()
        await until(lambda: server.office.watchers == 0)


async def test_a_run_is_followed_up_on_the_same_context(stub: Any, account: Account) -> None:
    first = await created(stub, account)
    request = pb.ContinueRunRequest(run_id=first.run_id, idempotency_key="next", question=b"And then?")
    await ended(stub, account.read, first.run_id)
    answer = await stub.ContinueRun(request, **key(account.run))
    assert answer.run.continues == first.run_id
    assert answer.run.context_id == first.context_id
    assert (await ended(stub, account.read, answer.run.run_id)).answer == b"forty-two"
    assert (await stub.ContinueRun(request, **key(account.run))).existed


async def test_a_run_goes_on_with_the_namespace_of_another_and_asks_nothing_twice(directory: Path) -> None:
    async def answer(request: ModelRequest) -> Reply:
        if not request.python_tool:
            return says("fine")
        said = sum(isinstance(entry, Reply) for entry in request.conversation)
        question = str(request.conversation[0])
        if "first" in question:
            return runs("kept['said'] = await llm('how are you?')" if not said else "FINAL('1')")
        if "second" in question:
            return runs("FINAL(kept['said'] + '!')" if said else "kept['more'] = 2")
        return runs("FINAL(kept['said'] + str(kept['more']))")

    model = FakeModel(otherwise=answer)
    async with open_server(directory, model) as server, server.stub() as stub:
        account = await server.account("acme")
        run = await ended(stub, account.read, (await created(stub, account, question=b"The first?")).run_id)

        async def go_on(name: str, run_id: str) -> pb.Run:
            request = pb.ContinueRunRequest(
                run_id=run_id,
                idempotency_key=name,
                question=f"The {name}?".encode(),
                keep_namespace=True,
            )
            answer = await stub.ContinueRun(request, **key(account.run))
            return await ended(stub, account.read, answer.run.run_id)

        second = await go_on("second", run.run_id)
        assert (second.outcome, second.answer) == ("answered", b"fine!")
        third = await go_on("third", second.run_id)
        assert (third.outcome, third.answer) == ("answered", b"fine2")
        asked = [one for one in model.asked if not one.python_tool]
        assert len(asked) == 1, "the sub-call's answer is the recorded one"
        await stub.DeleteRun(pb.DeleteRunRequest(run_id=run.run_id), **key(account.admin))
        request = pb.ContinueRunRequest(
            run_id=third.run_id, idempotency_key="x", question=b"And?", keep_namespace=True
        )
        error = await refusal(stub.ContinueRun(request, **key(account.run)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_a_long_answer_is_read_in_parts(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(office, "TEXT_PART_BYTES", 100_000)
    async with (
        open_server(directory, FakeModel(otherwise=runs("FINAL('x' * 250_000)"))) as server,
        server.stub() as stub,
    ):
        account = await server.account("acme")
        run = await ended(stub, account.read, (await created(stub, account)).run_id)
        assert (len(run.answer), run.answer_length_bytes) == (64 * 1024, 250_000)
        request = pb.ReadTextRequest(run_id=run.run_id, answer=True)
        parts = [part.data async for part in stub.ReadText(request, **key(account.read))]
        assert b"".join(parts) == b"x" * 250_000
        assert len(parts) > 1
        (last,) = [
            event for event in await watched(stub, account.read, run.run_id) if event["kind"] == "run_ended"
        ]
        request = pb.ReadTextRequest(run_id=run.run_id, sha256=last["answer"]["sha256"])
        parts = [part.data async for part in stub.ReadText(request, **key(account.read))]
        assert b"".join(parts) == b"x" * 250_000


async def test_runs_are_listed_newest_first_by_pages_and_filters(stub: Any, account: Account) -> None:
    ids = [(await created(stub, account, f"k{number}")).run_id for number in range(7)]
    for run_id in ids:
        await ended(stub, account.read, run_id)
    found, token = [], ""
    while True:
        request = pb.ListRunsRequest(page_size=3, page_token=token)
        page = await stub.ListRuns(request, **key(account.read))
        found += [run.run_id for run in page.runs]
        token = page.next_page_token
        if not token:
            break
    assert found == ids[::-1]
    none = await stub.ListRuns(pb.ListRunsRequest(states=[pb.RUN_STATE_QUEUED]), **key(account.read))
    assert not none.runs
    odd = pb.ListRunsRequest(page_token="garbage")  # noqa: S106 - of a page
    error = await refusal(stub.ListRuns(odd, **key(account.read)))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_what_was_deleted_is_gone_and_its_bill_is_not(
    server: Server, stub: Any, account: Account
) -> None:
    run = await ended(stub, account.read, (await created(stub, account)).run_id)
    await stub.DeleteRun(pb.DeleteRunRequest(run_id=run.run_id), **key(account.admin))
    error = await refusal(stub.GetRun(pb.GetRunRequest(run_id=run.run_id), **key(account.read)))
    assert error.code() is grpc.StatusCode.NOT_FOUND
    contexts = server.directory / "service" / "contexts"
    assert not [path for path in contexts.rglob("*") if path.is_file()], "its text went with it"
    usage = await stub.GetUsage(pb.GetUsageRequest(), **key(account.read))
    assert (usage.day.tokens, usage.month.tokens, usage.runs_day) == (110, 110, 1)
    actions = [row.action for _, row in await server.books.audit.read(tenant_id=account.tenant_id)]
    assert actions == ["CreateRun", "DeleteRun"]


async def test_a_context_that_a_run_needs_is_not_deleted(directory: Path) -> None:
    go = asyncio.Event()
    async with (
        open_server(directory, FakeModel(otherwise=when(go, runs(ANSWERS)))) as server,
        server.stub() as stub,
    ):
        account = await server.account("acme")
        context = await uploaded(stub, account)
        run = await created(stub, account, context_id=context.context_id)
        deleting = pb.DeleteContextRequest(context_id=context.context_id)
        error = await refusal(stub.DeleteContext(deleting, **key(account.admin)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
        go.set()
        await ended(stub, account.read, run.run_id)
        await stub.DeleteContext(deleting, **key(account.admin))
        assert not (await stub.ListContexts(pb.ListContextsRequest(), **key(account.read))).contexts
        request = pb.ContinueRunRequest(run_id=run.run_id, idempotency_key="n", question=b"And?")
        error = await refusal(stub.ContinueRun(request, **key(account.run)))
        assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


async def test_an_upload_that_broke_is_taken_up_and_a_wrong_one_is_told(stub: Any, account: Account) -> None:
    start = pb.StartUploadRequest(
        sha256=hashlib.sha256(TEXT).hexdigest(), length_bytes=len(TEXT), name="fox.txt"
    )
    begun = await stub.StartUpload(start, **key(account.run))
    part = pb.UploadRequest(upload_id=begun.upload_id, offset=0, data=TEXT[:500])
    answer = await stub.Upload(iter([part]), **key(account.run))
    assert answer.next_offset == 500
    assert not answer.HasField("context")
    error = await refusal(stub.Upload(iter([part]), **key(account.run)))
    assert error.code() is grpc.StatusCode.OUT_OF_RANGE
    assert (await stub.StartUpload(start, **key(account.run))).next_offset == 500
    wrong = pb.UploadRequest(upload_id=begun.upload_id, offset=500, data=b"?" * (len(TEXT) - 500))
    error = await refusal(stub.Upload(iter([wrong]), **key(account.run)))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert (await uploaded(stub, account)).length_bytes == len(TEXT)


# --- Who may what --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
async def test_without_a_key_that_is_known_no_method_answers(stub: Any, name: str) -> None:
    for secret in (None, "", "rlm_" + "0" * 40, "Bearer", "x" * 2_000):
        error = await refusal(call_of(stub, name, secret))
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        assert detail(error).message == error.details()


async def test_a_revoked_key_is_none(server: Server, stub: Any, account: Account) -> None:
    (row, secret) = await server.books.tenants.add_key(account.tenant_id, Role.READ)
    await stub.GetUsage(pb.GetUsageRequest(), **key(secret))
    await server.books.tenants.revoke_key(account.tenant_id, row.key_id)
    error = await refusal(stub.GetUsage(pb.GetUsageRequest(), **key(secret)))
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED


@pytest.mark.parametrize("name", [name for name, role in NEEDED.items() if role is not Role.READ])
async def test_a_key_of_a_lower_role_is_refused(stub: Any, account: Account, name: str) -> None:
    secret = account.run if NEEDED[name] is Role.ADMIN else account.read
    error = await refusal(call_of(stub, name, secret))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED


WITH_IDS = [
    (name, field)
    for name, method in METHODS.items()
    for field in IDS
    if field in method.input_type.fields_by_name
]


def test_every_method_that_takes_an_id_is_looked_at() -> None:
    taking = {
        name
        for name, method in METHODS.items()
        if any(field.name.endswith("_id") for field in method.input_type.fields)
    }
    assert taking == {name for name, _ in WITH_IDS}


@pytest.mark.parametrize(("name", "field"), WITH_IDS)
async def test_what_is_anothers_and_what_is_not_there_are_the_same(
    server: Server, stub: Any, account: Account, name: str, field: str
) -> None:
    theirs = await server.account("them")
    context = await uploaded(stub, theirs)
    begun = await stub.StartUpload(
        pb.StartUploadRequest(sha256="0" * 64, length_bytes=9, name="n"), **key(theirs.run)
    )
    run = await ended(stub, theirs.read, (await created(stub, theirs, context_id=context.context_id)).run_id)
    foreign = {"run_id": run.run_id, "context_id": context.context_id, "upload_id": begun.upload_id}
    absent = {"run_id": new_run_id(), "context_id": new_context_id(), "upload_id": new_context_id()}
    odd = ["x" * 1_000, "../../etc", "a\0b", "'; DROP TABLE runs; --"]
    told = []
    for value in (foreign[field], absent[field], *odd):
        error = await refusal(call_of(stub, name, account.admin, **{field: value}))
        told.append((error.code(), error.details(), detail(error)))
    assert told[0][0] is grpc.StatusCode.NOT_FOUND
    assert all(one == told[0] for one in told)
    assert (await ended(stub, theirs.read, run.run_id)).answer == b"forty-two", "and theirs is untouched"


@pytest.mark.parametrize(
    ("more", "code"),
    [
        ({"question": b""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"question": b"\xff"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"text": b""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"text": b"x" * (4 * 1024 * 1024 + 1)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"idempotency_key": ""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"options": pb.RunOptions(dialect="smoke")}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"options": pb.RunOptions(max_tokens=0)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"options": pb.RunOptions(max_depth=50)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"options": pb.RunOptions(runtime="runsc")}, grpc.StatusCode.PERMISSION_DENIED),
        ({"options": pb.RunOptions(model="nobody-knows")}, grpc.StatusCode.PERMISSION_DENIED),
        ({"options": pb.RunOptions(model="scripted:/etc/passwd")}, grpc.StatusCode.PERMISSION_DENIED),
    ],
)
async def test_a_request_that_makes_no_sense_or_may_not_be_is_refused(
    stub: Any, account: Account, more: dict[str, Any], code: grpc.StatusCode
) -> None:
    error = await refusal(stub.CreateRun(asking(**more), **key(account.run)))
    assert error.code() is code
    assert detail(error).message
    assert not (await stub.ListRuns(pb.ListRunsRequest(), **key(account.read))).runs


# --- Quotas --------------------------------------------------------------------------------------------


async def test_a_tenants_maxima_are_in_what_was_decided(server: Server, stub: Any) -> None:
    account = await server.account("small", TenantRules(max_limits={"max_tokens": 50_000, "max_depth": 0}))
    run = await created(stub, account, options=pb.RunOptions(max_tokens=900_000))
    assert (run.options.max_tokens, run.options.max_depth) == (50_000, 0)


async def test_a_quota_of_runs_is_kept_and_a_repeat_is_none(server: Server, stub: Any) -> None:
    account = await server.account("few", TenantRules(per_day=Quota(max_runs=2)))
    first = await created(stub, account, "1")
    await created(stub, account, "2")
    error = await refusal(stub.CreateRun(asking("3"), **key(account.run)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error).reason == types_pb2.ERROR_REASON_BUDGET_EXCEEDED
    assert (await created(stub, account, "1")).run_id == first.run_id


async def test_a_quota_of_tokens_ends_in_a_refusal_and_a_repeat_still_finds_its_run(
    server: Server, stub: Any
) -> None:
    account = await server.account("thrifty", TenantRules(per_month=Quota(max_tokens=30_000)))
    run = await ended(stub, account.read, (await created(stub, account, "1")).run_id)
    used = run.confirmed.tokens + run.unconfirmed.tokens
    await server.books.tenants.set_rules(
        account.tenant_id, TenantRules(per_month=Quota(max_tokens=max(1, used)))
    )
    contexts = server.directory / "service" / "contexts"
    kept = sorted(contexts.rglob("*"))
    error = await refusal(stub.CreateRun(asking("2", text=b"another"), **key(account.run)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert detail(error).shortfall.account == "tenant"
    assert sorted(contexts.rglob("*")) == kept, "nothing is written for a tenant that may not"
    assert (await created(stub, account, "1")).run_id == run.run_id
    usage = await stub.GetUsage(pb.GetUsageRequest(), **key(account.read))
    assert usage.month_limit.tokens == max(1, used)


async def test_too_many_waiting_runs_are_refused(directory: Path) -> None:
    go = asyncio.Event()
    async with (
        open_server(directory, FakeModel(otherwise=when(go, runs(ANSWERS)))) as server,
        server.stub() as stub,
    ):
        account = await server.account("acme", TenantRules(max_concurrent_runs=1, max_queued_runs=2))
        first = await created(stub, account, "1")
        await until(lambda: server.office.running == 1)
        await asyncio.sleep(0.2)  # until it counts as running in the books too
        later = [await created(stub, account, name) for name in ("2", "3")]
        error = await refusal(stub.CreateRun(asking("4"), **key(account.run)))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        go.set()
        for run in (first, *later):
            assert (await ended(stub, account.read, run.run_id)).outcome == "answered"


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of state that nobody tells of
            await asyncio.sleep(0.01)


async def test_one_tenants_flood_delays_anothers_run_by_one_end(directory: Path) -> None:
    order: list[str] = []

    class Seen:
        """A hook that writes down whose runs end."""

        def created(self, run: Any) -> None: ...
        def refused(self, tenant_id: Any, error: Any) -> None: ...
        def observer(self, run: Any) -> Callable[[Any], None]:
            order.append(run.tenant_id)
            return lambda _event: None

        def left(self, run: Any) -> None: ...

    go = asyncio.Event()
    async with (
        open_server(
            directory, FakeModel(otherwise=when(go, runs(ANSWERS))), max_running=2, hooks=(Seen(),)
        ) as server,
        server.stub() as stub,
    ):
        flood = await server.account("flood", TenantRules(max_concurrent_runs=100))
        mine = await server.account("mine")
        waiting = [await created(stub, flood, f"k{number}") for number in range(30)]
        await until(lambda: len(order) == 2)
        run = await created(stub, mine)
        go.set()
        assert (await ended(stub, mine.read, run.run_id)).outcome == "answered"
        assert order[:4].count(mine.tenant_id) == 1
        for one in waiting:
            await ended(stub, flood.read, one.run_id)


async def test_one_tenants_wide_run_delays_anothers_first_sandbox_by_as_many_ends_as_its_chain_is_long(
    directory: Path,
) -> None:
    """Of six sandboxes one tenant's child runs have all that there are, and 34 more of them wait."""
    ends: list[asyncio.Event] = []
    mine_began = asyncio.Event()

    async def play(request: ModelRequest) -> Reply:
        said = str(request.conversation)
        if "part of the flood" in said:
            ends.append(asyncio.Event())
            await ends[-1].wait()
            return runs("FINAL('part')")
        if "Mine?" in said:
            mine_began.set()
            return runs(ANSWERS)
        return runs("FINAL(len(await gather(*(rlm('part of the flood') for _ in range(40)))))")

    async with (
        open_server(directory, FakeModel(otherwise=play), sandboxes=6) as server,
        server.stub() as stub,
    ):
        flood, mine = await server.account("flood"), await server.account("mine")
        wide = pb.RunOptions(max_depth=1, max_concurrency=64)
        first = asking("1", question=b"Flood?", options=wide)
        await stub.CreateRun(first, **key(flood.run))
        await until(lambda: len(ends) == 5)
        second = asking("1", question=b"Mine?", options=pb.RunOptions(max_depth=1))
        run = (await stub.CreateRun(second, **key(mine.run))).run
        await until(lambda: server.office.running == 2)
        came_back = 0
        while not mine_began.is_set():
            ends[came_back].set()
            came_back += 1
            with suppress(TimeoutError):
                async with asyncio.timeout(3):
                    await mine_began.wait()
        # One may have had the chain's own sandbox, which comes back to its chain.
        assert came_back <= 2 + 1
        assert (await ended(stub, mine.read, run.run_id)).outcome == "answered"


# --- Ends ----------------------------------------------------------------------------------------------


async def test_a_run_is_cancelled_while_it_runs_and_while_it_waits(directory: Path) -> None:
    async with (
        open_server(directory, FakeModel(otherwise=when(asyncio.Event(), runs(ANSWERS)))) as server,
        server.stub() as stub,
    ):
        account = await server.account("acme", TenantRules(max_concurrent_runs=1))
        running = await created(stub, account, "1")
        await until(lambda: server.driver.started == 1)
        waiting = await created(stub, account, "2")
        for run in (waiting, running):
            await stub.CancelRun(pb.CancelRunRequest(run_id=run.run_id), **key(account.run))
            told = await ended(stub, account.read, run.run_id)
            assert (told.outcome, told.answer) == ("cancelled", b"")
            again = await stub.CancelRun(pb.CancelRunRequest(run_id=run.run_id), **key(account.run))
            assert again.run.outcome == "cancelled"
        assert server.driver.live_at_most == 1
        assert not await server.driver.found()


async def test_a_draining_server_takes_nothing_new_lets_runs_end_and_says_so_at_once(directory: Path) -> None:
    go = asyncio.Event()
    async with (
        open_server(directory, FakeModel(otherwise=when(go, runs(ANSWERS)))) as server,
        server.stub() as stub,
        grpc.aio.insecure_channel(server.port.address) as channel,
    ):
        account = await server.account("acme")
        checking: Any = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="rlm_proto.v1.RunService")
        assert (await checking.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        run = await created(stub, account)
        await until(lambda: server.driver.started == 1)
        watching = asyncio.create_task(watched(stub, account.read, run.run_id))
        draining = asyncio.create_task(server.drain())
        await until(lambda: not server.office.is_ready)
        assert (await checking.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        error = await refusal(stub.CreateRun(asking("late"), **key(account.run)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        go.set()
        await draining
        assert (await watching)[-1]["kind"] == "run_ended"
        assert (await ended(stub, account.read, run.run_id)).answer == b"forty-two"


@pytest.mark.parametrize("killed", [False, True], ids=["drained", "killed"])
async def test_what_a_server_left_is_taken_up_by_the_next_one(directory: Path, killed: bool) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), runs(ANSWERS)))
    async with open_server(directory, model, drain_s=0.0) as server, server.stub() as stub:
        account = await server.account("acme", TenantRules(max_concurrent_runs=1))
        running = await created(stub, account, "1")
        await until(lambda: len(model.asked) == 1)
        waiting = await created(stub, account, "2")
        seen: list[pb.WatchRunResponse] = []

        async def watch() -> None:
            request = pb.WatchRunRequest(run_id=running.run_id)
            async for told in stub.WatchRun(request, **key(account.read)):
                seen.append(told)

        watching = asyncio.create_task(watch())
        await until(lambda: len(seen) >= 3)
        if not killed:
            await server.drain()
            error = await refusal(watching)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
        books = server.books
        if killed:
            await server.office.aclose()
            await asyncio.wait((watching,))
            # What a server that is killed cannot do: say that the run is interrupted.
            await books.runs.started(
                RunId(running.run_id), at=0.0, resumed=False, max_concurrent=9, epoch=server.office.epoch
            )
            row = await books.runs.run(account.tenant_id, RunId(running.run_id))
            assert row is not None
            assert row.state is RunState.RUNNING
    async with (
        open_server(directory, FakeModel(otherwise=runs(ANSWERS))) as server,
        server.stub() as stub,
    ):
        later = await watched(stub, account.read, running.run_id, seen[-1].position + 1)
        assert [event["position"] for event in later] == list(
            range(seen[-1].position + 1, seen[-1].position + 1 + len(later))
        )
        told = await ended(stub, account.read, running.run_id)
        assert (told.outcome, told.answer, told.resumed) == ("answered", b"forty-two", 1)
        assert (told.confirmed.calls, told.unconfirmed.calls) == (1, 1), "the lost call counts in full"
        told = await ended(stub, account.read, waiting.run_id)
        assert (told.outcome, told.resumed) == ("answered", 0)
        usage = await stub.GetUsage(pb.GetUsageRequest(), **key(account.read))
        total = sum(
            run.confirmed.tokens + run.unconfirmed.tokens
            for run in (await stub.ListRuns(pb.ListRunsRequest(), **key(account.read))).runs
        )
        assert usage.day.tokens == total, "nothing drawn is lost"


class Away:
    """A database that takes nothing, until it is back."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self.refused = 0
        self.is_back = False
        self._write = server.database.write
        monkeypatch.setattr(server.database, "write", self.write)

    async def write(self, work: Any, *, lane: str = "") -> Any:
        if not self.is_back:
            self.refused += 1
            raise StoreError("the disk is full")
        return await self._write(work, lane=lane)


async def test_a_run_whose_events_cannot_be_stored_stops_and_goes_on_when_they_can(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    model = FakeModel(when(go, runs(ANSWERS)), otherwise=runs(ANSWERS))
    async with open_server(directory, model) as server, server.stub() as stub:
        account = await server.account("acme")
        run = await created(stub, account)
        await until(lambda: len(model.asked) == 1)
        away = Away(server, monkeypatch)
        error = await refusal(stub.CreateRun(asking("2"), **key(account.run)))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert "disk" not in (error.details() or ""), "that is the operator's business"
        go.set()
        await until(lambda: away.refused >= 4)
        async with asyncio.timeout(20):
            while await server.driver.found():  # noqa: ASYNC110 - what is waited for is no event
                await asyncio.sleep(0.01)
        assert len(model.asked) == 1, "nothing is asked that could not be written down"
        away.is_back = True
        told = await over(stub, account, run.run_id)
        assert (told.outcome, told.answer, told.resumed) == ("answered", b"forty-two", 1)
        assert (told.confirmed.calls, told.unconfirmed.calls) == (1, 1)


async def test_a_run_that_is_cancelled_while_nothing_can_be_stored_does_not_go_on_and_is_settled(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    model = FakeModel(when(go, runs(ANSWERS)))
    async with open_server(directory, model) as server, server.stub() as stub:
        account = await server.account("acme")
        run = await created(stub, account)
        await until(lambda: len(model.asked) == 1)
        # As if the wish had just been stored.
        audit = AuditRow(
            at=0.0, tenant_id=account.tenant_id, actor="a", action="CancelRun", target=run.run_id
        )
        await server.books.runs.cancel(account.tenant_id, RunId(run.run_id), at=0.0, error="", audit=audit)
        away = Away(server, monkeypatch)
        server.office._execution.cancel(RunId(run.run_id))
        await until(lambda: away.refused >= 2)
        away.is_back = True
        told = await over(stub, account, run.run_id)
        assert (told.outcome, told.answer) == ("cancelled", b"")
        assert told.unconfirmed.calls == 1, "what was under way is paid for"
        assert len(model.asked) == 1


async def over(stub: Any, account: Account, run_id: str) -> pb.Run:
    """The run, when it has ended, however often its watchers are cut."""
    async with asyncio.timeout(30):
        while True:
            told = await stub.GetRun(pb.GetRunRequest(run_id=run_id), **key(account.read))
            if told.run.state == pb.RUN_STATE_ENDED:
                run: pb.Run = told.run
                return run
            await asyncio.sleep(0.05)


async def test_only_an_interrupted_run_can_be_resumed(stub: Any, account: Account) -> None:
    run = await ended(stub, account.read, (await created(stub, account)).run_id)
    error = await refusal(stub.ResumeRun(pb.ResumeRunRequest(run_id=run.run_id), **key(account.run)))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION


# --- The port ------------------------------------------------------------------------------------------


async def test_the_port_has_reflection(server: Server) -> None:
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
        request: Any = reflection_pb2.ServerReflectionRequest(list_services="")
        async for answer in stub.ServerReflectionInfo(iter([request])):
            names = {service.name for service in answer.list_services_response.service}
    assert {"rlm_proto.v1.RunService", "grpc.health.v1.Health"} <= names
    assert not {name for name in names if "Broker" in name or "Sandbox" in name}


async def test_a_message_beyond_the_limit_is_refused(stub: Any, account: Account) -> None:
    error = await refusal(stub.CreateRun(asking(text=b"x" * (9 * 1024 * 1024)), **key(account.run)))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.fixture
async def tls(directory: Path) -> Tls:
    """A certificate that is its own authority, for the server and for its clients."""
    certificate, private = directory / "certificate.pem", directory / "key.pem"
    making = await asyncio.create_subprocess_exec(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
        "-keyout", private, "-out", certificate, "-days", "1", "-subj", "/CN=localhost",
        "-addext", "subjectAltName=IP:127.0.0.1",
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    assert await making.wait() == 0
    return Tls(certificate_file=certificate, key_file=private, client_ca_file=certificate)


async def test_with_tls_only_clients_with_a_certificate_of_the_authority_get_as_far_as_their_key(
    directory: Path, tls: Tls
) -> None:
    certificate, private = tls.certificate_file.read_bytes(), tls.key_file.read_bytes()
    known = grpc.ssl_channel_credentials(certificate, private, certificate)
    stranger = grpc.ssl_channel_credentials(certificate)
    async with open_server(directory, FakeModel(), tls=tls) as server:
        account = await server.account("acme")

        async def ask(channel: grpc.aio.Channel, secret: str) -> Any:
            stub: Any = run_pb2_grpc.RunServiceStub(channel)
            given = key(secret)
            return await stub.GetUsage(pb.GetUsageRequest(), **{**given, "timeout": 5.0})

        async with grpc.aio.secure_channel(server.port.address, known) as channel:
            assert (await ask(channel, account.read)).live_runs == 0
            error = await refusal(ask(channel, "rlm_nobody"))
            assert error.code() is grpc.StatusCode.UNAUTHENTICATED
        async with grpc.aio.secure_channel(server.port.address, stranger) as channel:
            error = await refusal(ask(channel, account.read))
            assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
        async with grpc.aio.insecure_channel(server.port.address) as plain:
            error = await refusal(ask(plain, account.read))
            assert error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}


async def test_a_port_that_is_taken_is_told(server: Server) -> None:
    with pytest.raises(MachineError, match="listen"):
        async with open_port(server.office, server.port.address):
            pass


async def test_a_certificate_that_is_missing_is_told_by_its_name(server: Server, tmp_path: Path) -> None:
    missing = Tls(certificate_file=tmp_path / "none.pem", key_file=tmp_path / "none.key")
    with pytest.raises(MachineError, match=r"none\.key.*RLM_TLS_"):
        async with open_port(server.office, "127.0.0.1:0", tls=missing):
            pass
