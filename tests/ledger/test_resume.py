"""A run tree whose orchestrator is killed, at every point at which something new is in its record.

The kill is simulated by a store that takes nothing more, as if its process was gone: without a record of
the hold no call goes out, so nothing that the dead process does afterwards has an effect. Then a new process,
with a machine, guests, ledger and books of its own, goes on from what is stored. The provider's log is the
witness.
"""

import ast
import asyncio
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from orchestrator import prompts
from orchestrator.app import RunOptions, Tenant, root_run
from orchestrator.budget import UNLIMITED, ZERO, Amounts
from orchestrator.contexts.store import ContextStore
from orchestrator.conversation import Reply, StopReason, Told
from orchestrator.errors import OrchestratorError, StoreError
from orchestrator.ids import LOCAL_TENANT, RunId, child_run_id
from orchestrator.limits import RunLimits
from orchestrator.machine import Machine
from orchestrator.models.port import Model, ModelRequest
from orchestrator.models.scripted import task_of
from orchestrator.runs import replayed_cell
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.past import TreePast
from orchestrator.runs.replay import STARTS_OF_A_CELL
from orchestrator.runs.resuming import end_unresumed, take_up
from orchestrator.runs.tree import RunResult
from orchestrator.sandbox.instance import claim_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.store.memory import MemoryRunStore
from orchestrator.store.port import NO_BLOBS, LedgerEntry, RunStore
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import (
    CallHeld,
    CallSettled,
    CellEnded,
    CellStarted,
    Event,
    ReplayDiverged,
    RunEnded,
    RunResumed,
    RunStarted,
    SandboxLeased,
    SubCallStarted,
    Tally,
)
from orchestrator.turn import Outcome
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.tree import CARD, ROOT
from tests.ledger.witness import Provider, prompt_of

pytestmark = pytest.mark.timeout(300)

LIMITS = RunLimits(max_depth=2, max_concurrency=4, max_tokens=10_000_000, max_cost_microusd=100_000_000)

# --- The run tree: what its models say ----------------------------------------------------------------------

ROOT_CELLS = (
    "kept['a'] = await gather(*(llm(f'piece {n}') for n in range(5)))\nprint(len(kept['a']))",
    "kept['c'] = await gather(rlm('child one'), rlm('child two'))\nprint(kept['c'])",
    "kept['b'] = await llm('again ' + ''.join(kept['a']))\nprint(kept['b'])",
    "FINAL('|'.join([*kept['a'], *kept['c'], kept['b']]))",
)
CHILD_CELLS = (
    "kept['x'] = await llm('first of {question}')\nprint(kept['x'])",
    "kept['y'] = await gather(llm('second of {question}'), rlm('grandchild of {question}'))",
    "FINAL(kept['x'] + ' ' + ' '.join(kept['y']))",
)
GRANDCHILD_CELLS = ("FINAL(await llm('only of {question}'))",)


def says(request: ModelRequest) -> str | Reply:
    """A turn's next cell; of a sub-call, its prompt backwards."""
    if not request.system:
        return prompt_of(request)[::-1]
    question, depth = task_of(request.conversation)
    cells = (ROOT_CELLS, CHILD_CELLS, GRANDCHILD_CELLS)[depth]
    return runs(cells[turns_of(request)].replace("{question}", question))


def runs(code: str) -> Reply:
    call = {"type": "tool_use", "id": "call", "name": "python", "input": {"code": code}}
    return Reply((call,), StopReason.TOOL_USE)


def turns_of(request: ModelRequest) -> int:
    return sum(isinstance(entry, Reply) for entry in request.conversation)


Key = tuple[str, str, int]
"""What a provider was asked: of a turn the question and its number, of a sub-call the prompt."""


def key_of(request: ModelRequest) -> Key:
    if not request.system:
        return ("sub-call", prompt_of(request), 0)
    return ("turn", task_of(request.conversation)[0], turns_of(request) + 1)


# --- Processes ----------------------------------------------------------------------------------------------


class Disk:
    """What outlives a process: events, texts and ledger entries, and the tenant's account."""

    def __init__(self) -> None:
        self.store = MemoryRunStore()
        self.tenant = MemoryTenantAccount(Amounts(*(UNLIMITED,) * 4))
        self.appends = 0

    @property
    def runs(self) -> Mapping[RunId, Sequence[Event]]:
        return self.store._events

    @property
    def events(self) -> list[Event]:
        return [event for events in self.runs.values() for event in events]

    def payloads(self, kind: type[Any], run_id: RunId | None = None) -> list[Any]:
        return [
            event.payload
            for event in self.events
            if isinstance(event.payload, kind) and run_id in {None, event.run_id}
        ]

    def settled(self) -> set[Key]:
        """What the provider is known to have answered."""
        questions = {
            event.run_id: event.payload.question
            for event in self.events
            if isinstance(event.payload, RunStarted)
        }
        asked = {
            (event.run_id, event.payload.call): event.payload.prompt
            for event in self.events
            if isinstance(event.payload, SubCallStarted)
        }
        keys: set[Key] = set()
        for event in self.events:
            if isinstance(event.payload, CallSettled) and not event.payload.error:
                name = event.payload.call
                if name.startswith("turn-"):
                    number = int(name.removeprefix("turn-").partition(".")[0])
                    keys.add(("turn", str(questions[event.run_id]), number))
                else:
                    keys.add(("sub-call", str(asked[event.run_id, name]), 0))
        return keys

    def explained(self) -> Amounts:
        """What the ledger says was used."""
        total = ZERO
        for entry in self.store.ledger_entries:
            total = total.plus(entry.confirmed).plus(entry.unconfirmed)
        return total


class MortalStore:
    """A process's way to the disk. After so many appends it is dead, and nothing gets there any more."""

    def __init__(self, disk: Disk, lives: int | None) -> None:
        self._disk = disk
        self._lives = lives
        self.is_dead = False

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        # Like one that writes to a disk.
        await asyncio.sleep(0)
        self.is_dead = self.is_dead or self._lives == 0
        if self.is_dead:
            raise StoreError("the process is dead")
        if self._lives is not None:
            self._lives -= 1
        await self._disk.store.append(
            run_id, expected_seq, events, blobs=blobs, ledger_entries=ledger_entries
        )
        self._disk.appends += 1

    def events(self, run_id: RunId, from_seq: int = 0) -> AsyncIterator[Event]:
        return self._disk.store.events(run_id, from_seq)

    async def blob(self, sha256: str) -> bytes | None:
        return await self._disk.store.blob(sha256)


class MortalTenant:
    """Its way to the tenant's account."""

    def __init__(self, disk: Disk, store: MortalStore) -> None:
        self._disk = disk
        self._store = store

    async def grant(self, wanted: Amounts) -> Amounts:
        return ZERO if self._store.is_dead else await self._disk.tenant.grant(wanted)

    async def charge(self, overdraft: Amounts) -> None:
        if not self._store.is_dead:
            await self._disk.tenant.charge(overdraft)

    async def give_back(self, unused: Amounts) -> None:
        if not self._store.is_dead:
            await self._disk.tenant.give_back(unused)


@dataclass
class Process:
    """One orchestrator process."""

    driver: InProcessDriver
    machine: Machine
    state_dir: Path


@asynccontextmanager
async def process(**names: Any) -> AsyncIterator[Process]:
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir, claim_instance(Path(state_dir)) as instance:
        driver = InProcessDriver(**names)
        leases = SandboxLeases(instance, driver, memory_bytes=1 << 20)
        contexts = ContextStore(instance.contexts_dir)
        machine = Machine(contexts=contexts, leases=leases, slots=SandboxSlots(8), pool=leases._pool)
        try:
            yield Process(driver, machine, Path(state_dir))
        finally:
            await driver.aclose()
            contexts.close()


@dataclass
class World:
    """A disk, a provider, and one process after the other."""

    provider: Provider = field(default_factory=lambda: Provider(says, delay_s=0.001))
    disk: Disk = field(default_factory=Disk)
    limits: RunLimits = LIMITS
    memoise: bool = False
    seeds: list[list[int]] = field(default_factory=list)

    async def live(self, *, lives: int | None = None, resume: bool = False, **names: Any) -> RunResult | None:
        """One process, from its start to the end of the run or to its own; None when it died."""
        store = MortalStore(self.disk, lives)
        tenant = Tenant(tenant_id=LOCAL_TENANT, account=MortalTenant(self.disk, store))
        model = Model(CARD, self.provider)
        options = RunOptions(
            question="Who?",
            context_paths=(),
            model="fake",
            limits=self.limits,
            memoise=self.memoise,
        )
        async with process(**names) as alive:
            context = alive.machine.contexts.stage_text(LOCAL_TENANT, b"the whole context\n")
            try:
                result = await root_run(
                    ROOT,
                    options,
                    machine=alive.machine,
                    tenant=tenant,
                    models={"root": model, "sub": model, "fake": model},
                    context=context,
                    store=store,
                    resume=resume,
                )
            except StoreError:
                return None
            finally:
                alive.machine.contexts.release(context)
                self.seeds.append(alive.driver.seeds)
            return None if store.is_dead else result

    async def restart(self, **more: Any) -> RunResult | None:
        """A further process, which takes back first what the dead one had drawn and not used."""
        past = await self.settle()
        used = past.used(ROOT) if past else (ZERO, ZERO)
        unexplained = self.disk.tenant.drawn.minus(used[0]).minus(used[1])
        await self.disk.tenant.give_back(unexplained)
        return await self.live(resume=True, **more)

    async def settle(self) -> TreePast | None:
        return await take_up(ROOT, tenant_id=LOCAL_TENANT, store=self.disk.store)

    def assert_closed(self) -> None:
        """Every run has ended once, nothing is open, and all books say the same."""
        for run_id, events in self.disk.runs.items():
            ends = [event for event in events if isinstance(event.payload, RunEnded)]
            assert len(ends) == 1, run_id
            assert [event.seq for event in events] == list(range(len(events)))
        tally = Tally.of(self.disk.events)
        assert (tally.open_calls, tally.sub_calls_in_flight) == (0, 0)
        held = [
            (event.run_id, event.payload.call)
            for event in self.disk.events
            if isinstance(event.payload, CallHeld)
        ]
        assert len(set(held)) == len(held), "a name is used once"
        assert self.disk.explained() == tally.confirmed.plus(tally.unconfirmed)
        children = len(self.disk.payloads(RunStarted)) - 1
        assert self.disk.tenant.drawn == self.disk.explained().plus(Amounts(child_runs=children))
        billed = sum(usage.total for usage in self.provider.log)
        assert billed <= self.disk.explained().tokens, "nothing that was served is missing"


async def a_whole_run() -> World:
    world = World()
    result = await world.live()
    assert result is not None
    assert result.outcome is Outcome.ANSWERED
    world.assert_closed()
    return world


# --- Kills --------------------------------------------------------------------------------------------------


async def test_a_run_tree_killed_at_any_point_of_its_record_is_answered_alike_and_nothing_is_paid_twice() -> (
    None
):
    whole = await a_whole_run()
    (ended,) = whole.disk.payloads(RunEnded, ROOT)
    assert len(set(map(key_of, whole.provider.asked))) == len(whole.provider.asked) == 24
    in_flight_at_most = 0
    for lives in range(whole.disk.appends):
        world, why = World(), f"killed after {lives} of {whole.disk.appends} appends"
        if await world.live(lives=lives) is not None:
            assert lives > 0.9 * whole.disk.appends, (
                "what comes together is stored together, so it may be fewer"
            )
            break
        settled, asked = world.disk.settled(), Counter(map(key_of, world.provider.asked))
        in_flight = set(asked) - settled
        in_flight_at_most = max(in_flight_at_most, len(in_flight))
        result = await world.restart()
        assert result is not None, why
        assert (result.outcome, result.answer) == (Outcome.ANSWERED, ended.answer), why
        world.assert_closed()
        asked = Counter(map(key_of, world.provider.asked))
        assert all(asked[key] == 1 for key in settled), why
        assert {key for key, times in asked.items() if times > 1} <= in_flight, why
        assert max(asked.values()) <= 2, why
        assert not world.disk.payloads(ReplayDiverged), why
        assert len(world.disk.payloads(RunStarted)) == 5, why
    assert in_flight_at_most > 1, "kills fell into batches, too"


async def test_a_run_tree_that_is_killed_again_and_again_gets_there() -> None:
    """Each process is killed after a few appends more than it takes to get back to where the last one was."""
    world, result, kills = World(), await World().live(), 0
    expected = result.answer if result else None
    result = await world.live(lives=3)
    while result is None:
        kills += 1
        assert kills < 40
        result = await world.restart(lives=20)
    assert (result.outcome, result.answer) == (Outcome.ANSWERED, expected)
    world.assert_closed()
    assert kills > 4
    times = [one.times for one in world.disk.payloads(RunResumed, ROOT)]
    assert times == list(range(1, len(times) + 1))
    asked = Counter(map(key_of, world.provider.asked))
    assert all(asked[key] == 1 for key in asked if key not in world.disk.settled())


async def test_a_resumed_run_has_the_seed_that_it_had() -> None:
    world = World()
    assert await world.live(lives=20) is None
    assert await world.restart() is not None
    first, second = world.seeds
    assert set(first) == {0}
    (leased, again) = world.disk.payloads(SandboxLeased, ROOT)
    assert second[0] == leased.hash_seed == again.hash_seed


async def test_a_run_that_has_ended_is_not_run_again() -> None:
    world = await a_whole_run()
    before = len(world.provider.asked), len(world.disk.events)
    result = await world.restart()
    assert result is not None
    assert result.answer == world.disk.payloads(RunEnded, ROOT)[0].answer
    assert (len(world.provider.asked), len(world.disk.events)) == before
    assert world.seeds[-1] == []


async def test_a_run_of_which_nothing_was_recorded_begins() -> None:
    world = World()
    result = await world.restart()
    assert result is not None
    assert result.outcome is Outcome.ANSWERED
    assert not world.disk.payloads(RunResumed)


async def test_identical_sub_calls_are_still_asked_once_after_a_restart() -> None:
    cells = ("kept['a'] = await llm('the same')\nprint(1)", "FINAL(kept['a'] + await llm('the same'))")
    world = World(Provider(lambda request: _plays(request, cells)), memoise=True)
    await _killed_behind(world, CellEnded)
    result = await world.restart()
    assert result is not None
    assert result.answer == "emas eht" * 2
    assert [prompt_of(one) for one in world.provider.asked if not one.system] == ["the same"]


# --- Limits -------------------------------------------------------------------------------------------------


async def test_what_was_used_before_counts_against_the_limits() -> None:
    """Of seven calls six were made before the kill, one of them in flight."""
    cells = (
        "kept['a'] = await gather(*(llm(f'{n}') for n in range(4)))\nprint(1)",
        "FINAL(await llm('one more'))",
    )
    limits = replace(LIMITS, max_calls=6)
    world = World(Provider(lambda request: _plays(request, cells)), limits=limits)
    await _killed_behind(world, CellEnded)
    result = await world.restart()
    assert result is not None
    assert result.outcome is not Outcome.ANSWERED or result.answer != "erom eno"
    world.assert_closed()
    assert world.disk.explained().calls <= 6


async def test_a_deadline_counts_from_the_first_start_and_a_clock_set_back_gives_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    world = World(limits=replace(LIMITS, deadline_s=60.0))
    assert await world.live(lives=12) is None
    now_s = time.time()
    past = await world.settle()
    root = past.run(ROOT) if past else None
    assert root is not None
    assert root.elapsed_s(now_s + 59.0) > 59.0
    assert root.elapsed_s(now_s - 10_000.0) >= root.last_at_s - root.started_at_s > 0.0
    monkeypatch.setattr(time, "time", lambda: now_s + 61.0)
    result = await world.restart()
    assert result is not None
    assert result.outcome is Outcome.DEADLINE
    world.assert_closed()


# --- Divergence ---------------------------------------------------------------------------------------------


def _plays(request: ModelRequest, cells: Sequence[str]) -> str | Reply:
    return runs(cells[turns_of(request)]) if request.system else prompt_of(request)[::-1]


async def _killed_behind(world: World, kind: type[Any], **names: Any) -> None:
    """Kill a run right after it has recorded its first event of a kind."""
    lives = 0
    while not world.disk.payloads(kind):
        world.disk = Disk()
        world.provider.asked.clear()
        world.provider.log.clear()
        lives += 1
        assert await world.live(lives=lives, **names) is None


def _told(world: World, text: str) -> int:
    """How many of the requests said so."""
    return sum(
        any(isinstance(entry, Told) and text in entry.text for entry in request.conversation)
        for request in world.provider.asked
    )


async def test_a_cell_that_asks_for_something_else_is_refused_it_and_its_model_is_told() -> None:
    cells = ("kept['a'] = await llm(outside())\nprint(1)", "FINAL(str(kept))")
    world = World(Provider(lambda request: _plays(request, cells)))
    await _killed_behind(world, CellEnded, outside=lambda: "one thing")
    result = await world.restart(outside=lambda: "another thing")
    assert result is not None
    assert result.answer == "{}", "the cell was refused its answer"
    (diverged,) = world.disk.payloads(ReplayDiverged)
    assert (diverged.turn, diverged.namespace) == (1, "uncertain")
    assert "other sub-calls" in diverged.why
    assert [prompt_of(one) for one in world.provider.asked if not one.system] == ["one thing"]
    assert _told(world, prompts.NAMESPACE_UNCERTAIN) == 1
    world.assert_closed()


async def test_a_cell_that_does_not_ask_what_it_asked_has_diverged_too() -> None:
    cells = ("if outside():\n    await llm('it')\nprint(1)", "FINAL('over')")
    world = World(Provider(lambda request: _plays(request, cells)))
    await _killed_behind(world, CellEnded, outside=lambda: True)
    assert await world.restart(outside=lambda: False) is not None
    (diverged,) = world.disk.payloads(ReplayDiverged)
    assert diverged.namespace == "uncertain"


async def test_a_cell_that_only_prints_something_else_is_noted_and_nobody_is_told() -> None:
    cells = ("print(outside())", "FINAL('over')")
    world = World(Provider(lambda request: _plays(request, cells)))
    await _killed_behind(world, CellEnded, outside=lambda: "one thing")
    assert await world.restart(outside=lambda: "another thing") is not None
    (diverged,) = world.disk.payloads(ReplayDiverged)
    assert (diverged.turn, diverged.namespace) == (1, "kept")
    assert _told(world, prompts.NAMESPACE_UNCERTAIN) == 0
    last = world.provider.asked[-1].conversation[-1]
    assert getattr(last, "text", "") == "one thing", "the model goes on from what it was told"


async def test_answers_come_back_in_the_order_in_which_they_came(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that takes answers as they come, of which the first asked for comes last."""
    monkeypatch.setattr(replayed_cell, "ORDER_WAIT_S", 20.0)
    one_by_one = (
        "async def ask(n):\n    kept.setdefault('order', []).append(await llm(f'{n}'))\n"
        "await gather(*(ask(n) for n in range(6)))\nprint(kept['order'])"
    )
    cells = (one_by_one, "FINAL(await llm(' '.join(kept['order'])))")

    class Uneven(Provider):
        async def complete(self, request: ModelRequest) -> Any:
            if not request.system and prompt_of(request).isdigit():
                await asyncio.sleep(0.1 * (6 - int(prompt_of(request))))
            return await super().complete(request)

    limits = replace(LIMITS, max_concurrency=6)
    world = World(Uneven(lambda request: _plays(request, cells)), limits=limits)
    await _killed_behind(world, CellEnded)
    assert await world.restart() is not None
    assert not world.disk.payloads(ReplayDiverged)
    (ended, *_) = world.disk.payloads(CellEnded)
    order = ast.literal_eval(ended.output)
    # A busy machine may turn neighbours about.
    assert sorted(order) == ["0", "1", "2", "3", "4", "5"]
    assert order.index("5") < order.index("0"), "or an order that was kept would show nothing"


async def test_the_cell_that_was_running_begins_anew_but_not_for_ever() -> None:
    cells = (
        "kept['a'] = await llm('it')\nprint(1)\nawait gather(llm('more'))\nFINAL(1)",
        "FINAL('after the loss')",
    )
    world = World(Provider(lambda request: _plays(request, cells)))
    await _killed_behind(world, CellStarted)
    for starts in range(2, STARTS_OF_A_CELL + 1):
        assert await _dies_when(world, partial(_has_started, world, starts))
    assert not world.disk.payloads(CellEnded)
    result = await world.restart()
    assert result is not None
    assert result.answer == "after the loss"
    (ended, *_) = world.disk.payloads(CellEnded)
    assert (ended.outcome, ended.loss) == ("sandbox_lost", "orchestrator_ended")
    world.assert_closed()


def _has_started(world: World, cells: int) -> bool:
    return len(world.disk.payloads(CellStarted)) == cells


async def _dies_when(world: World, happened: Callable[[], bool]) -> bool:
    """Restart, and kill it as soon as that is in the record."""
    with _killing(world, happened):
        return await world.restart() is None


@contextmanager
def _killing(world: World, happened: Callable[[], bool]) -> Iterator[None]:
    append = MortalStore.append

    async def mortal(store: MortalStore, *args: Any, **more: Any) -> None:
        await append(store, *args, **more)
        store.is_dead = happened()

    MortalStore.append = cast(Any, mortal)  # type: ignore[method-assign]
    try:
        yield
    finally:
        MortalStore.append = append  # type: ignore[method-assign]


# --- What cannot be resumed ---------------------------------------------------------------------------------


async def test_a_run_whose_record_is_broken_ends_as_such_and_stays_readable() -> None:
    world = World()
    assert await world.live(lives=20) is None
    events = list(world.disk.runs[ROOT])
    place = next(n for n, event in enumerate(events) if isinstance(event.payload, CellEnded))
    broken = replace(cast(CellEnded, events[place].payload), outcome="who knows")
    world.disk.store._events[ROOT][place] = replace(events[place], payload=broken)
    result = await world.live(resume=True)
    assert result is not None
    assert result.outcome is Outcome.INTERNAL_ERROR
    assert "cannot be resumed" in result.why
    (ended,) = world.disk.payloads(RunEnded, ROOT)
    assert ended.error == result.why
    assert len(world.disk.runs[ROOT]) > len(events)


async def test_a_run_whose_context_is_gone_is_ended_with_everything_settled() -> None:
    world = World()
    assert await world.live(lives=25) is None
    await end_unresumed(ROOT, "its context is gone", tenant_id=LOCAL_TENANT, store=world.disk.store)
    assert all(one.error == "its context is gone" for one in world.disk.payloads(RunEnded))
    past = await world.settle()
    assert past is not None
    assert all(run.ended for run in past)
    assert Tally.of(world.disk.events).open_calls == 0


async def test_a_child_that_nobody_asks_for_any_more_is_ended() -> None:
    cells = ("await rlm(outside())", "FINAL('over')")

    def plays(request: ModelRequest) -> str | Reply:
        if request.system and task_of(request.conversation)[1]:
            return runs("FINAL(await llm('deep'))")
        return _plays(request, cells)

    world = World(Provider(plays))
    with _killing(world, lambda: len(world.disk.payloads(RunStarted)) == 2):
        assert await world.live(outside=lambda: "one") is None
    result = await world.restart(outside=lambda: "another")
    assert result is not None
    assert result.answer == "over"
    world.assert_closed()
    left = world.disk.payloads(RunEnded, _child(world, "one"))
    assert [one.outcome for one in left] == ["cancelled"]


def _child(world: World, question: str) -> RunId:
    return next(
        child_run_id(ROOT, event.payload.turn, event.payload.request_hash, event.payload.occurrence)
        for event in world.disk.runs[ROOT]
        if isinstance(event.payload, SubCallStarted) and event.payload.prompt == question
    )


async def test_a_run_without_a_sandbox_after_its_restart_ends_as_that() -> None:
    world = World()
    assert await world.live(lives=20) is None

    async def fails(*_: Any) -> None:
        raise OrchestratorError("no room")

    with pytest.MonkeyPatch.context() as patched, suppress(OrchestratorError):
        patched.setattr(InProcessDriver, "start", fails)
        result = await world.restart()
        assert result is not None
        assert result.outcome in {Outcome.SANDBOX_LOST, Outcome.INTERNAL_ERROR}
    assert len(world.disk.payloads(RunEnded, ROOT)) == 1


def _is_store(store: RunStore) -> RunStore:
    """For the type checker: a mortal store is one."""
    return store


_is_store(MortalStore(Disk(), 0))
