"""What the service does besides answering: retention, tenants that go, runs that were interrupted."""

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.errors import ConflictError, MachineError, NotFoundError
from orchestrator.ids import RunId
from orchestrator.service.clock import ClockJudge
from orchestrator.service.port import Caller, Question
from orchestrator.service.recovery import Recovery
from orchestrator.store.books import Role, RunFilter, RunRow, RunState, TenantRules
from tests.databases import new_store_url, postgres, store_url
from tests.fakes.model import FakeModel, runs, when
from tests.fakes.service import Server, new_database, open_server, short_directory

__all__ = ["new_store_url", "postgres", "store_url"]

ANSWERS = runs("FINAL('forty-two')")


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of state that nobody tells of
            await asyncio.sleep(0.01)


async def a_caller(server: Server, name: str = "acme", rules: TenantRules | None = None) -> Caller:
    account = await server.account(name, rules)
    return await server.office.authenticate(account.admin)


def asking(key: str = "k", text: bytes = b"some text") -> Question:
    return Question(idempotency_key=key, question="How many?", text=text)


async def ended(server: Server, caller: Caller, run_id: str) -> RunRow:
    async for _ in server.office.watch_run(caller, run_id, 0):
        pass
    return await server.office.get_run(caller, run_id)


def files(server: Server) -> list[Path]:
    return [path for path in (server.directory / "service" / "contexts").rglob("*") if path.is_file()]


# --- What an operator does -----------------------------------------------------------------------------


async def test_a_tenant_that_is_removed_takes_its_runs_along_and_nobody_elses(directory: Path) -> None:
    go = asyncio.Event()
    model = FakeModel(otherwise=when(go, ANSWERS))
    async with open_server(directory, model, sandboxes=6) as server:
        gone, stays = await a_caller(server, "gone"), await a_caller(server, "stays")
        for number in range(4):
            await server.office.create_run(gone, asking(f"{number}"))
        mine = (await server.office.create_run(stays, asking())).run
        await until(lambda: len(model.asked) == 2)
        await server.books.tenants.remove_tenant(gone.tenant.tenant_id)
        go.set()
        assert (await ended(server, stays, mine.run_id)).outcome == "answered"
        await until(lambda: not server.office.running and not server.office.waiting)
        assert not await server.driver.found()


async def test_a_key_that_was_revoked_or_whose_tenant_was_removed_opens_nothing(directory: Path) -> None:
    async with open_server(directory, FakeModel()) as server:
        account = await server.account("acme")
        assert (await server.office.authenticate(account.read)).role is Role.READ
        await server.books.tenants.remove_tenant(account.tenant_id)
        for key in (account.read, account.run, account.admin, None, ""):
            with pytest.raises(Exception, match="API key"):
                await server.office.authenticate(key)


# --- Retention -----------------------------------------------------------------------------------------


def time_passes(
    server: Server, monkeypatch: pytest.MonkeyPatch, seconds: float, *, steadily: bool = True
) -> None:
    """Both clocks go on, or the wall clock alone is set."""
    wall_s, steady_s = time.time, server.office._retention._steady_s
    monkeypatch.setattr(time, "time", lambda: wall_s() + seconds)
    if steadily:
        monkeypatch.setattr(server.office._retention, "_steady_s", lambda: steady_s() + seconds)


async def test_what_is_older_than_a_tenants_retention_goes_with_an_entry_in_the_audit_log(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        keeps = await a_caller(server, "keeps")
        forgets = await a_caller(server, "forgets", TenantRules(retention_days=30))
        old = (await server.office.create_run(forgets, asking("old"))).run
        other = (await server.office.create_run(keeps, asking("old"))).run
        for caller, run in ((forgets, old), (keeps, other)):
            await ended(server, caller, run.run_id)
        assert len(files(server)) == 2
        assert await server.office._retention.sweep() == 0
        time_passes(server, monkeypatch, 31 * 86_400)
        assert await server.office._retention.sweep() == 1
        with pytest.raises(NotFoundError):
            await server.office.get_run(forgets, old.run_id)
        assert (await server.office.get_run(keeps, other.run_id)).outcome == "answered"
        assert len(files(server)) == 1
        audit = await server.books.audit.read(tenant_id=forgets.tenant.tenant_id)
        last = audit[-1][1]
        assert (last.actor, last.action, last.target) == ("retention", "DeleteRun", old.run_id)


async def test_a_clock_that_jumps_a_year_ahead_deletes_nothing(
    directory: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        caller = await a_caller(server, rules=TenantRules(retention_days=30))
        run = (await server.office.create_run(caller, asking())).run
        await ended(server, caller, run.run_id)
        assert await server.office._retention.sweep() == 0
        time_passes(server, monkeypatch, 365 * 86_400, steadily=False)
        assert await server.office._retention.sweep() == 0
        assert "look at the date" in caplog.text
        # What is created in that year is answered.
        later = (await server.office.create_run(caller, asking("later"))).run
        assert (await ended(server, caller, later.run_id)).outcome == "answered"
    # Neither does a server that starts with such a date; but one whose date stays is believed in the end.
    monkeypatch.undo()
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        # Its own first sweep, or that would go on in the middle of these.
        await until(lambda: server.office._retention._clock.has_looked)
        time_passes(server, monkeypatch, 2 * 365 * 86_400)
        server.office._retention._clock = ClockJudge()
        assert await server.office._retention.sweep() == 0
        time_passes(server, monkeypatch, 86_400)
        assert await server.office._retention.sweep() == 2


async def test_a_clock_that_is_set_in_the_middle_of_runs_ends_none_of_them(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = asyncio.Event()
    model = FakeModel(otherwise=when(go, ANSWERS))
    async with open_server(directory, model) as server:
        caller = await a_caller(server)
        created = [(await server.office.create_run(caller, asking(key))).run for key in "ab"]
        await until(lambda: len(model.asked) == 2)
        for years in (1, -2):
            time_passes(server, monkeypatch, years * 365 * 86_400, steadily=False)
            await asyncio.sleep(0.1)
        go.set()
        for run in created:
            assert (await ended(server, caller, run.run_id)).outcome == "answered"


async def test_a_state_directory_with_another_databases_contexts_is_refused_however_often_and_keeps_them(
    directory: Path,
) -> None:
    model = FakeModel(otherwise=ANSWERS)
    async with open_server(directory, model) as server:
        caller = await a_caller(server)
        run = (await server.office.create_run(caller, asking())).run
        await ended(server, caller, run.run_id)
        kept = files(server)
    assert kept
    other = await new_database(directory / "other.db")
    for _ in range(2):
        with pytest.raises(MachineError, match="this database knows nothing of"):
            async with open_server(directory, model, store_url=other):
                pass
    async with open_server(directory, model) as server:
        assert files(server) == kept


async def test_a_text_whose_run_was_refused_goes_in_the_end(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        caller = await a_caller(server, rules=TenantRules(max_queued_runs=0))
        with pytest.raises(Exception, match="tenant"):
            await server.office.create_run(caller, asking())
        assert len(files(server)) == 1
        assert await server.office._retention.sweep() == 0, "a run about it may be on its way"
        time_passes(server, monkeypatch, 2 * 3_600)
        assert await server.office._retention.sweep() == 1
        assert not files(server)


async def test_one_text_of_two_runs_goes_with_the_second(directory: Path) -> None:
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        caller = await a_caller(server)
        first, second = [(await server.office.create_run(caller, asking(key))).run for key in "ab"]
        assert first.context_id == second.context_id
        for run in (first, second):
            await ended(server, caller, run.run_id)
        await server.office.delete_run(caller, first.run_id)
        assert len(files(server)) == 1
        await server.office.delete_run(caller, second.run_id)
        assert not files(server)
        assert (
            await ended(server, caller, (await server.office.create_run(caller, asking("c"))).run.run_id)
        ).outcome == "answered"


# --- Interrupted runs ----------------------------------------------------------------------------------


async def test_an_interrupted_run_is_resumed_or_cancelled_by_hand(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with open_server(directory, model) as server:
        caller = await a_caller(server)
        created = [(await server.office.create_run(caller, asking(f"{n}"))).run for n in range(2)]
        await until(lambda: len(model.asked) == 2)

    async def claim_and_go_on_with_none(recovery: Recovery) -> int:
        await recovery._books.homes.claim(recovery._presence.home, recovery._presence.epoch)
        return 0

    monkeypatch.setattr(Recovery, "at_start", claim_and_go_on_with_none)
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        rows = await server.office.list_runs(caller, RunFilter(), limit=10)
        assert {row.state for row in rows} == {RunState.INTERRUPTED}
        resumed = await server.office.resume_run(caller, created[0].run_id)
        assert resumed.state in {RunState.INTERRUPTED, RunState.RUNNING, RunState.ENDED}
        told = await ended(server, caller, created[0].run_id)
        assert (told.outcome, told.resumed) == ("answered", 1)
        told = await server.office.cancel_run(caller, created[1].run_id)
        assert (told.state, told.outcome) == (RunState.ENDED, "cancelled")
        assert told.unconfirmed.calls == 1, "what was under way is paid for"
        with pytest.raises(ConflictError):
            await server.office.resume_run(caller, created[1].run_id)


async def test_a_run_that_gets_no_further_is_given_up_with_its_events_readable(directory: Path) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with open_server(directory, model) as server:
        caller = await a_caller(server)
        run = (await server.office.create_run(caller, asking())).run
        await until(lambda: len(model.asked) == 1)
        for _ in range(25):
            await server.books.runs.started(
                RunId(run.run_id), at=0.0, resumed=True, max_concurrent=99, epoch=server.office.epoch
            )
    async with open_server(directory, FakeModel()) as server:
        told = await ended(server, caller, run.run_id)
        assert (told.outcome, told.answer) == ("internal_error", None)
        assert "resumed" in told.error
        events = [data async for _, data in server.office.watch_run(caller, run.run_id, 0)]
        assert b'"run_started"' in events[0]
        assert b'"run_ended"' in events[-1]


async def test_rules_that_were_narrowed_end_a_run_that_they_no_longer_allow(directory: Path) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), ANSWERS))
    async with open_server(directory, model) as server:
        caller = await a_caller(server)
        run = (await server.office.create_run(caller, asking())).run
        await until(lambda: len(model.asked) == 1)
        rules = replace(caller.tenant.rules, runtimes=("runsc",))
        await server.books.tenants.set_rules(caller.tenant.tenant_id, rules)
    async with open_server(directory, FakeModel()) as server:
        told = await ended(server, caller, run.run_id)
        assert told.outcome == "internal_error"
        assert "runtime" in told.error
