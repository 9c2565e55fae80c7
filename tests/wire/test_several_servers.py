"""Several servers on one database: each takes any request, and one that is lost is settled by the others."""

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.conversation import Reply
from orchestrator.errors import ConflictError, NotFoundError, TakenOverError, UnavailableError
from orchestrator.ids import RunId
from orchestrator.models.port import ModelClient, ModelRequest
from orchestrator.sandbox.port import SandboxSpec
from orchestrator.service.port import Caller, Question
from orchestrator.service.recovery import Recovery
from orchestrator.store.books import (
    AuditRow,
    ContextRow,
    Role,
    RunFilter,
    RunRow,
    RunState,
    TenantRules,
    Wish,
)
from tests.databases import POSTGRESQL, new_store_url, postgres
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.model import FakeModel, runs, when
from tests.fakes.service import Server, open_server, short_directory

__all__ = ["new_store_url", "postgres"]

pytestmark = pytest.mark.docker

ANSWERS = runs("FINAL('forty-two')")
TEXT = b"It was the best of times, it was the worst of times. " * 20
LEASE_S = 3.0
"""A server notices another one within a sixth of it."""
FIRST, SECOND = "first-home", "second-home"


@pytest.fixture
def store_url(new_store_url: Callable[[str], str]) -> str:
    """Of the kind of database that several servers share. SQLite is one server's."""
    return new_store_url(POSTGRESQL)


async def until(condition: Callable[[], bool], within_s: float = 30.0) -> None:
    async with asyncio.timeout(within_s):
        while not condition():  # noqa: ASYNC110 - of state that nobody tells of
            await asyncio.sleep(0.01)


@asynccontextmanager
async def a_server(
    store_url: str, model: ModelClient, home: str, driver: InProcessDriver | None = None
) -> AsyncIterator[Server]:
    """On a state directory of its own."""
    with short_directory() as directory:
        async with open_server(
            directory, model, store_url=store_url, home=home, lease_s=LEASE_S, driver=driver
        ) as server:
            yield server


@asynccontextmanager
async def two_servers(
    store_url: str,
    client: ModelClient,
    other_client: ModelClient | None = None,
    drivers: Sequence[InProcessDriver | None] = (None, None),
) -> AsyncIterator[tuple[Server, Server]]:
    """Two state directories, one database, and each has heard of the other."""
    async with (
        a_server(store_url, client, FIRST, drivers[0]) as first,
        a_server(store_url, other_client or client, SECOND, drivers[1]) as second,
    ):
        servers = (first, second)
        await until(lambda: know_each_other(*servers))
        yield servers


def know_each_other(*servers: Server) -> bool:
    return not any(server.office._presence.is_alone for server in servers)


async def a_caller(server: Server, rules: TenantRules | None = None) -> Caller:
    tenant = await server.books.tenants.add_tenant("acme", rules or TenantRules())
    _, key = await server.books.tenants.add_key(tenant.tenant_id, Role.ADMIN)
    return await server.office.authenticate(key)


def asking(key: str = "k", text: bytes = b"some text") -> Question:
    return Question(idempotency_key=key, question="How many?", text=text)


def about(context: ContextRow, key: str = "k") -> Question:
    return Question(idempotency_key=key, question="How long?", context_id=context.context_id)


async def uploaded(server: Server, caller: Caller) -> ContextRow:
    sha256 = hashlib.sha256(TEXT).hexdigest()
    begun = await server.office.start_upload(caller, sha256=sha256, length_bytes=len(TEXT), name="a.txt")
    return (await server.office.write_upload(caller, begun.context.context_id, 0, TEXT)).context


async def ended(server: Server, caller: Caller, run_id: str) -> RunRow:
    async with asyncio.timeout(40):
        async for _ in server.office.watch_run(caller, run_id, 0):
            pass
    return await server.office.get_run(caller, run_id)


async def kinds(server: Server, caller: Caller, run_id: str) -> list[dict[str, object]]:
    return [json.loads(data) async for _, data in server.office.watch_run(caller, run_id, 0)]


async def in_state(server: Server, caller: Caller, run_id: str, state: RunState) -> RunRow:
    async with asyncio.timeout(40):
        while (row := await server.office.get_run(caller, run_id)).state is not state:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    return row


async def audited(server: Server, action: str) -> list[str]:
    return [row.target for _, row in await server.books.audit.read() if row.action == action]


def files(server: Server) -> list[Path]:
    return [path for path in (server.directory / "service" / "contexts").rglob("*") if path.is_file()]


# --- Any server takes any request ------------------------------------------------------------------------


async def test_servers_of_one_database_keep_a_tenants_limit_together(store_url: str) -> None:
    go = asyncio.Event()
    model = FakeModel(otherwise=when(go, ANSWERS))
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_runs=2))
        created = [
            (server, (await server.office.create_run(caller, asking(f"{server.directory}{number}"))).run)
            for server in (first, second)
            for number in range(3)
        ]
        await until(lambda: len(model.asked) == 2)
        await asyncio.sleep(1.5)  # long enough for a server to look whether it may start one more
        assert len(model.asked) == 2
        assert (await first.books.runs.count_live(caller.tenant.tenant_id))[RunState.RUNNING] == 2
        go.set()
        for server, run in created:
            assert (await ended(server, caller, run.run_id)).outcome == "answered"


class Meter:
    """Counts the sandboxes of several servers together."""

    def __init__(self) -> None:
        self.drivers = (Metered(self), Metered(self))
        self.most = 0

    def count(self) -> None:
        self.most = max(self.most, sum(driver.live for driver in self.drivers))


class Metered(InProcessDriver):
    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    @property
    def live(self) -> int:
        return len(self._guests)

    async def start(self, spec: SandboxSpec) -> None:
        await super().start(spec)
        self._meter.count()


class Trees(FakeModel):
    """Root runs that start children, so many at once, again and again until it is enough."""

    def __init__(self, width: int = 16) -> None:
        super().__init__(otherwise=self.play)
        self._width = width
        self.roots = 0
        self.is_enough = False

    async def play(self, request: ModelRequest) -> Reply:
        if "How many?" not in str(request.conversation):
            await asyncio.sleep(0.1)
            return runs("FINAL('part')")
        self.roots += 1
        children = f"await gather(*(rlm('part of it') for _ in range({self._width})))"
        return runs(f"FINAL(len({children}))" if self.is_enough else children)


def wide(key: str) -> Question:
    return replace(asking(key), options={"max_depth": 1, "max_concurrency": 64, "max_child_runs": 1_000})


async def room_is(server: Server, caller: Caller, home: str, units: int) -> None:
    async with asyncio.timeout(30):
        while True:
            rooms = (await server.books.rooms.around(home))[caller.tenant.tenant_id].rooms
            if rooms[home].units == units:
                return
            await asyncio.sleep(0.05)


async def test_servers_of_one_database_keep_a_tenants_limit_of_sandboxes_together(store_url: str) -> None:
    meter, models = Meter(), (Trees(), Trees())
    async with two_servers(store_url, *models, drivers=meter.drivers) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_sandboxes=6))
        one = (await first.office.create_run(caller, wide("1"))).run
        await until(lambda: meter.drivers[0].live == 6)
        two = (await second.office.create_run(caller, wide("2"))).run
        await until(lambda: meter.drivers[1].live == 3)
        await room_is(first, caller, FIRST, 3)
        assert first.office.running, "nobody had to end for the other's sake"
        for server, model, run in ((first, models[0], one), (second, models[1], two)):
            model.is_enough = True
            assert (await ended(server, caller, run.run_id)).outcome == "answered"
        assert meter.most == 6


async def test_servers_that_need_all_sandboxes_for_each_run_take_turns(store_url: str) -> None:
    go = asyncio.Event()
    meter, model = Meter(), FakeModel(when(go, ANSWERS), otherwise=ANSWERS)
    async with two_servers(store_url, model, drivers=meter.drivers) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_sandboxes=2))
        here = [(await first.office.create_run(caller, wide(f"here {n}"))).run for n in range(3)]
        await until(lambda: len(model.asked) == 1)
        there = [(await second.office.create_run(caller, wide(f"there {n}"))).run for n in range(5)]
        await until(lambda: first.office._rooms._tenants[caller.tenant.tenant_id].is_contended)
        go.set()
        started_at = []
        for server, runs_ in ((first, here), (second, there)):
            rows = [await ended(server, caller, run.run_id) for run in runs_]
            assert {row.outcome for row in rows} == {"answered"}
            started_at.append([row.started_at or 0 for row in rows])
        # Who waits is next; but a server that has not looked since another is short may begin more before.
        assert started_at[0][0] < started_at[1][0] < started_at[0][1] < started_at[1][-1]
        assert meter.most == 1, "each run has its chain of two for itself"


async def test_a_server_that_is_alone_claims_a_tenants_sandboxes_once_and_asks_nothing_more(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, asked = Trees(10), []
    model.is_enough = True
    async with a_server(store_url, model, FIRST) as server:
        limited = await a_caller(server, rules=TenantRules(max_concurrent_sandboxes=4))
        tenant = await server.books.tenants.add_tenant("free", TenantRules())
        _, key = await server.books.tenants.add_key(tenant.tenant_id, Role.ADMIN)
        free = await server.office.authenticate(key)
        for name in ("claim", "around"):
            method = getattr(server.books.rooms, name)

            async def counted(*args: object, name: str = name, method: Any = method) -> object:
                asked.append(name)
                return await method(*args)

            monkeypatch.setattr(server.books.rooms, name, counted)
        for number in range(3):
            for caller in (limited, free):
                run = (await server.office.create_run(caller, wide(f"{number}"))).run
                assert (await ended(server, caller, run.run_id)).outcome == "answered"
        await asyncio.sleep(1.5)  # long enough for a look
        assert asked == ["claim"]


async def test_a_server_that_drained_leaves_its_sandboxes_to_the_others_at_once(store_url: str) -> None:
    model = Trees(8)
    model.is_enough = True
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_sandboxes=4))
        run = (await first.office.create_run(caller, wide("1"))).run
        await ended(first, caller, run.run_id)
        assert (await first.books.rooms.around(FIRST))[caller.tenant.tenant_id].rooms[FIRST].units == 4
        await first.drain()
        assert await first.books.rooms.around(FIRST) == {}
        run = (await second.office.create_run(caller, wide("2"))).run
        assert (await ended(second, caller, run.run_id)).outcome == "answered"
        await room_is(second, caller, SECOND, 4)


async def test_a_limit_of_sandboxes_that_is_changed_counts_for_what_runs(store_url: str) -> None:
    meter, model = Meter(), Trees()
    async with two_servers(store_url, model, drivers=meter.drivers) as (first, _):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_sandboxes=6))
        run = (await first.office.create_run(caller, wide("1"))).run
        await until(lambda: meter.drivers[0].live == 6)
        for most in (3, 9):
            rules = TenantRules(max_concurrent_sandboxes=most)
            await first.books.tenants.set_rules(caller.tenant.tenant_id, rules)
            await room_is(first, caller, FIRST, most)
        await until(lambda: meter.drivers[0].live == 9)
        model.is_enough = True
        assert (await ended(first, caller, run.run_id)).outcome == "answered"


async def test_a_question_about_a_context_of_another_server_is_answered_there_and_watched_here(
    store_url: str,
) -> None:
    nothing = FakeModel()
    async with two_servers(store_url, FakeModel(otherwise=ANSWERS), nothing) as (first, second):
        caller = await a_caller(first)
        context = await uploaded(first, caller)
        created = await second.office.create_run(caller, about(context))
        assert (created.existed, created.run.state) == (False, RunState.QUEUED)
        assert (await second.office.create_run(caller, about(context))).existed
        told = await ended(second, caller, created.run.run_id)
        assert (told.outcome, told.answer, told.home) == ("answered", b"forty-two", FIRST)
        assert not nothing.asked
        assert not second.driver.started
        question = Question(idempotency_key="2", question="And?")
        for keep in (False, True):
            question = replace(question, idempotency_key=f"{keep}")
            further = await second.office.continue_run(caller, told.run_id, question, keep_namespace=keep)
            assert (await ended(second, caller, further.run.run_id)).outcome == "answered"
        assert await audited(second, "CreateRun") == [created.run.run_id]
        assert await first.books.runs.wished(FIRST) == []


async def test_a_run_is_cancelled_through_any_server_while_it_runs_and_while_it_waits(store_url: str) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_runs=1))
        running, waiting = [(await first.office.create_run(caller, asking(f"{n}"))).run for n in range(2)]
        await until(lambda: len(model.asked) == 1)
        watching = [
            asyncio.create_task(ended(server, caller, run.run_id))
            for server in (first, second)
            for run in (running, waiting)
        ]
        told = await second.office.cancel_run(caller, waiting.run_id)
        assert (told.state, told.outcome) == (RunState.ENDED, "cancelled"), "it never began"
        told = await second.office.cancel_run(caller, running.run_id)
        assert told.run_id == running.run_id
        for one in watching:
            assert (await one).outcome == "cancelled"
        await until(lambda: not first.office.running and not first.office.waiting)
        assert (await kinds(second, caller, running.run_id))[-1]["outcome"] == "cancelled"
        await second.office.cancel_run(caller, running.run_id)
        assert await audited(second, "CancelRun") == [waiting.run_id, running.run_id], "each once"
        with pytest.raises(ConflictError):
            await second.office.resume_run(caller, running.run_id)


async def test_an_interrupted_run_is_resumed_and_cancelled_through_any_server(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    with short_directory() as directory:
        async with open_server(directory, model, store_url=store_url, home=FIRST) as server:
            caller = await a_caller(server)
            created = [(await server.office.create_run(caller, asking(f"{n}"))).run for n in range(2)]
            await until(lambda: len(model.asked) == 2)

        async def claim_and_go_on_with_none(recovery: Recovery) -> int:
            await recovery._books.homes.claim(recovery._presence.home, recovery._presence.epoch)
            return 0

        monkeypatch.setattr(Recovery, "at_start", claim_and_go_on_with_none)
        model = FakeModel(otherwise=ANSWERS)
        async with (
            open_server(directory, model, store_url=store_url, home=FIRST, lease_s=LEASE_S) as first,
            a_server(store_url, model, SECOND) as second,
        ):
            await until(lambda: not first.office._presence.is_alone)
            await second.office.resume_run(caller, created[0].run_id)
            told = await ended(second, caller, created[0].run_id)
            assert (told.outcome, told.resumed) == ("answered", 1)
            await second.office.cancel_run(caller, created[1].run_id)
            told = await ended(second, caller, created[1].run_id)
            assert (told.outcome, told.unconfirmed.calls) == ("cancelled", 1)
            last = (await kinds(second, caller, created[1].run_id))[-1]
            assert (last["kind"], last["outcome"]) == ("run_ended", "cancelled")
            assert first.driver.started == 1


async def test_what_is_deleted_through_another_server_is_gone_from_its_disk(store_url: str) -> None:
    model = FakeModel(otherwise=ANSWERS)
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first)
        context = await uploaded(first, caller)
        run = (await first.office.create_run(caller, asking())).run
        await ended(first, caller, run.run_id)
        assert len(files(first)) == 2
        await second.office.delete_context(caller, context.context_id)
        with pytest.raises(NotFoundError):
            await first.office.delete_context(caller, context.context_id)
        await second.office.delete_run(caller, run.run_id)
        await until(lambda: not files(first))
        assert await audited(first, "DeleteContext") == [context.context_id]
        assert await audited(first, "DeleteRun") == [run.run_id]


async def test_a_context_that_a_run_of_another_server_needs_is_not_deleted(store_url: str) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first)
        context = await uploaded(first, caller)
        await second.office.create_run(caller, about(context))
        with pytest.raises(ConflictError):
            await second.office.delete_context(caller, context.context_id)
        assert len(files(first)) == 1


async def test_an_upload_belongs_to_one_server_and_starts_anew_on_another(store_url: str) -> None:
    async with two_servers(store_url, FakeModel()) as (first, second):
        caller = await a_caller(first)
        sha256 = hashlib.sha256(TEXT).hexdigest()
        there = await first.office.start_upload(caller, sha256=sha256, length_bytes=len(TEXT), name="a.txt")
        await first.office.write_upload(caller, there.context.context_id, 0, TEXT[:100])
        with pytest.raises(ConflictError, match="another server"):
            await second.office.write_upload(caller, there.context.context_id, 100, TEXT[100:])
        here = await second.office.start_upload(caller, sha256=sha256, length_bytes=len(TEXT), name="a.txt")
        assert (here.next_offset, here.context.context_id != there.context.context_id) == (0, True)


# --- Ends of servers -------------------------------------------------------------------------------------


async def test_a_cancel_that_was_acknowledged_outlives_the_server(store_url: str) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    with short_directory() as directory:
        async with open_server(directory, model, store_url=store_url) as server:
            caller = await a_caller(server)
            run = (await server.office.create_run(caller, asking())).run
            await until(lambda: len(model.asked) == 1)
            tenant_id, audit = caller.tenant.tenant_id, an_entry(caller, run.run_id)
            await server.books.runs.cancel(tenant_id, run.run_id, at=0.0, error="", audit=audit)
        nothing = FakeModel()
        async with open_server(directory, nothing, store_url=store_url) as server:
            told = await ended(server, caller, run.run_id)
            assert (told.outcome, told.unconfirmed.calls) == ("cancelled", 1)
            assert (await kinds(server, caller, run.run_id))[-1]["outcome"] == "cancelled"
            assert not nothing.asked


def an_entry(caller: Caller, target: str) -> AuditRow:
    return AuditRow(
        at=0.0, tenant_id=caller.tenant.tenant_id, actor="key:k", action="CancelRun", target=target
    )


class Stopped:
    """A server of which nothing is heard until it goes on. What it runs hears of nothing."""

    def __init__(self, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        self._beat = server.office._presence.beat
        self._goes_on = asyncio.Event()
        monkeypatch.setattr(server.office._presence, "beat", self.beat)

    async def beat(self) -> None:
        await self._goes_on.wait()
        await self._beat()

    def go_on(self) -> None:
        self._goes_on.set()


async def test_the_runs_of_a_lost_server_are_settled_by_another_and_nothing_is_paid_by_it_any_more(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    model, others = FakeModel(when(go, runs("x = 1")), otherwise=ANSWERS), FakeModel(otherwise=ANSWERS)
    async with two_servers(store_url, model, others) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_runs=1))
        run = (await first.office.create_run(caller, asking("1"))).run
        queued = (await first.office.create_run(caller, asking("2"))).run
        await until(lambda: len(model.asked) == 1)
        context = await uploaded(first, caller)
        stopped = Stopped(first, monkeypatch)
        mine = (await second.office.create_run(caller, asking("3"))).run
        told = await in_state(second, caller, run.run_id, RunState.INTERRUPTED)
        assert await audited(second, "TakeOver") == [FIRST]
        assert (await ended(second, caller, mine.run_id)).outcome == "answered", "there is room for it now"
        with pytest.raises(UnavailableError, match="away"):
            await second.office.create_run(caller, about(context))

        # It goes on where it was, and nothing of that is stored, or asked for.
        go.set()
        await until(lambda: not first.office.running)
        assert len(model.asked) == 1
        events = await first.books.trees.tree_events(run.run_id, 0, limit=500)
        assert json.loads(events[-1][1])["kind"] == "call_settled"

        stopped.go_on()
        told = await ended(second, caller, run.run_id)
        assert (told.outcome, told.resumed) == ("answered", 1)
        assert (told.confirmed.calls, told.unconfirmed.calls) == (1, 1)
        assert (await ended(second, caller, queued.run_id)).outcome == "answered"
        assert len(model.asked) == 3
        used = (await second.office.get_usage(caller)).day.amounts
        rows = await second.office.list_runs(caller, RunFilter(), limit=10)
        assert used.tokens == sum(row.confirmed.tokens + row.unconfirmed.tokens for row in rows)


async def test_the_sandboxes_of_a_lost_server_are_other_servers_once_it_was_taken_over(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    model, others = FakeModel(otherwise=when(go, ANSWERS)), FakeModel(otherwise=ANSWERS)
    async with two_servers(store_url, model, others) as (first, second):
        caller = await a_caller(first, rules=TenantRules(max_concurrent_sandboxes=2))
        lost = (await first.office.create_run(caller, wide("1"))).run
        await until(lambda: len(model.asked) == 1)
        waiting = (await second.office.create_run(caller, wide("2"))).run
        await asyncio.sleep(1.5)  # long enough for a server to ask for room twice
        assert not others.asked
        stopped = Stopped(first, monkeypatch)
        assert (await ended(second, caller, waiting.run_id)).outcome == "answered"
        assert await audited(second, "TakeOver") == [FIRST]
        go.set()
        stopped.go_on()
        assert (await ended(second, caller, lost.run_id)).outcome == "answered"


async def test_runs_of_a_lost_server_are_cancelled_through_the_others(
    store_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first)
        before, later = [(await first.office.create_run(caller, asking(f"{n}"))).run for n in range(2)]
        await until(lambda: len(model.asked) == 2)
        stopped = Stopped(first, monkeypatch)
        monkeypatch.setattr(first.books.runs, "wished", nobody_asks)
        await second.office.cancel_run(caller, before.run_id)
        assert (await ended(second, caller, before.run_id)).outcome == "cancelled"
        await in_state(second, caller, later.run_id, RunState.INTERRUPTED)
        await second.office.cancel_run(caller, later.run_id)
        told = await ended(second, caller, later.run_id)
        assert (told.outcome, told.unconfirmed.calls) == ("cancelled", 1)
        assert (await kinds(second, caller, later.run_id))[-1]["outcome"] == "cancelled"
        stopped.go_on()
        await until(lambda: not first.office.running)
        assert len(model.asked) == 2


async def nobody_asks(_home: str) -> list[Wish]:
    return []


async def test_a_server_whose_epoch_is_over_can_store_nothing_about_its_runs(store_url: str) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with two_servers(store_url, model) as (first, second):
        caller = await a_caller(first)
        run = (await first.office.create_run(caller, asking())).run
        await until(lambda: len(model.asked) == 1)
        runs_, homes, epoch = first.books.runs, first.books.homes, first.office.epoch
        assert await homes.enter(FIRST, lease_s=60.0) == epoch + 1
        with pytest.raises(TakenOverError):
            await homes.beat(FIRST, epoch, lease_s=60.0)
        with pytest.raises(TakenOverError):
            await runs_.started(RunId(run.run_id), at=0.0, resumed=True, max_concurrent=9, epoch=epoch)
        assert second.office.is_ready
