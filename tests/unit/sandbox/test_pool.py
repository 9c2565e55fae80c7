"""The pool over guests of this process: real servers and streams, no containers."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.errors import EngineError, InvariantError, SandboxBusyError, SandboxStartError
from orchestrator.ids import SandboxId, TenantId
from orchestrator.limits import OWN_STARTS_AT_ONCE, POOLED_LEASE_S, SANDBOX_EXPIRY_GRACE_S
from orchestrator.sandbox.instance import Instance, claim_instance
from orchestrator.sandbox.lease import LeasedSandbox, SandboxLeases
from orchestrator.sandbox.making import MadeSandbox, SandboxMaker
from orchestrator.sandbox.pool import SandboxPool, pooling
from orchestrator.sandbox.pool_events import Phase
from orchestrator.sandbox.pool_rules import Plan, WhenEmpty
from orchestrator.sandbox.port import SandboxSpec
from tests.fakes.in_process_driver import InProcessDriver

SOON_S = 10.0
RUNTIME = "none"
A_RUN_S = 3_600.0


class Driver(InProcessDriver):
    """Starts can be held up or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.goes_on = asyncio.Event()
        self.goes_on.set()
        self.failures: list[Exception] = []
        self.specs: list[SandboxSpec] = []

    async def start(self, spec: SandboxSpec) -> None:
        self.specs.append(spec)
        await self.goes_on.wait()
        if self.failures:
            raise self.failures.pop(0)
        await super().start(spec)


@dataclass
class Rig:
    instance: Instance
    driver: Driver
    pool: SandboxPool
    _stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    @asynccontextmanager
    async def lease(self, wanted_for_s: float = A_RUN_S, hash_seed: int = 0) -> AsyncIterator[LeasedSandbox]:
        leases = SandboxLeases(self.instance, self.driver, memory_bytes=1 << 20, pool=self.pool)
        async with leases.open(
            lambda _directory: None,
            runtime=RUNTIME,
            guest_services=(),
            max_concurrent_calls=1,
            wanted_for_s=wanted_for_s,
            hash_seed=hash_seed,
        ) as leased:
            yield leased

    def there(self) -> int:
        return len(self.instance.alive)


@asynccontextmanager
async def opened(size: int = 1, *, capacity: int = 8, **plan: object) -> AsyncIterator[Rig]:
    # Short, because a Unix socket's path is.
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir, claim_instance(Path(state_dir)) as instance:
        driver = Driver()
        plans = {RUNTIME: Plan(size=size, **plan)}  # type: ignore[arg-type]
        pool = SandboxPool(SandboxMaker(instance, driver), plans, capacity=capacity)
        rig = Rig(instance, driver, pool)
        async with pooling(pool):
            yield rig
        assert rig.there() == 0
        assert pool.count(Phase.WAITING) + pool.count(Phase.ENDING) == 0


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():  # noqa: ASYNC110 - what is waited for has no event of its own
            await asyncio.sleep(0.005)


async def filled(rig: Rig, size: int = 1) -> None:
    await until(lambda: rig.pool.count(Phase.WAITING) == size)


async def test_a_lease_gets_one_that_waited_and_another_takes_its_place() -> None:
    async with opened() as rig:
        await filled(rig)
        waited = set(rig.instance.alive)
        async with rig.lease() as first:
            assert {first.sandbox_id} == waited
            await filled(rig)
        assert first.sandbox_id not in rig.instance.alive
        assert rig.pool.stats()[RUNTIME].warm == 1


@pytest.mark.case("F05")
async def test_many_leases_at_once_never_share_a_sandbox() -> None:
    async with opened(size=3, capacity=20) as rig:
        had: list[SandboxId] = []

        async def run() -> None:
            async with rig.lease() as leased:
                had.append(leased.sandbox_id)
                await asyncio.sleep(0)

        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
            for _ in range(20):
                group.create_task(run())
        assert len(set(had)) == 20


async def test_own_starts_of_one_tenant_delay_anothers_by_one_of_them() -> None:

    async with opened(size=0, capacity=40) as rig:
        rig.driver.goes_on.clear()
        order: list[str] = []

        async def run(tenant: str) -> None:
            async with rig.pool.sandbox(runtime=RUNTIME, wanted_for_s=A_RUN_S, tenant_id=TenantId(tenant)):
                order.append(tenant)

        async with asyncio.timeout(SOON_S), asyncio.TaskGroup() as group:
            for _ in range(30):
                group.create_task(run("flood"))
            await until(lambda: len(rig.driver.specs) == OWN_STARTS_AT_ONCE)
            group.create_task(run("mine"))
            await asyncio.sleep(0.05)
            assert len(rig.driver.specs) == OWN_STARTS_AT_ONCE, "the others wait for their turn"
            rig.driver.goes_on.set()
        assert order.index("mine") <= 2 * OWN_STARTS_AT_ONCE
        assert len(order) == 31


@pytest.mark.case("F05")
async def test_a_waiting_sandbox_has_no_context_and_is_bound_once() -> None:
    async with opened() as rig:
        await filled(rig)
        async with rig.pool.sandbox(runtime=RUNTIME, wanted_for_s=A_RUN_S) as made:
            assert list(made.context_dir.iterdir()) == []
            made.services.bind(())
            with pytest.raises(InvariantError, match="leased twice"):
                made.services.bind(())


async def test_one_whose_stream_ended_is_replaced() -> None:
    async with opened() as rig:
        await filled(rig)
        (dead,) = rig.instance.alive
        await rig.driver.destroy(dead)
        await until(lambda: rig.pool.stats()[RUNTIME].died == 1)
        await filled(rig)
        assert dead not in rig.instance.alive


async def test_a_lease_that_gets_one_that_died_unseen_has_another_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with opened() as rig:
        await filled(rig)
        (dead,) = rig.instance.alive
        real = rig.pool.sandbox

        @asynccontextmanager
        async def dies_unseen(
            *, runtime: str, wanted_for_s: float, own: bool, tenant_id: TenantId
        ) -> AsyncIterator[MadeSandbox]:
            async with real(runtime=runtime, wanted_for_s=wanted_for_s, own=own, tenant_id=tenant_id) as made:
                if made.sandbox_id == dead:
                    await rig.driver.destroy(dead)
                    await made.session.over
                yield made

        monkeypatch.setattr(rig.pool, "sandbox", dies_unseen)
        async with rig.lease() as leased:
            assert leased.sandbox_id != dead
            assert rig.pool.stats()[RUNTIME].own == 1


async def test_a_lease_that_finds_none_gets_the_first_that_is_ready() -> None:
    async with opened() as rig:
        async with rig.lease() as leased:
            assert leased.sandbox_id in {spec.sandbox_id for spec in rig.driver.specs[:2]}
        assert rig.pool.stats()[RUNTIME].cold == 1


@pytest.mark.parametrize(
    "asked", [{"hash_seed": 7}, {"wanted_for_s": POOLED_LEASE_S + 1}], ids=["a seed", "a long lease"]
)
async def test_a_lease_that_no_pooled_one_can_serve_starts_its_own(asked: dict[str, int]) -> None:
    async with opened() as rig:
        await filled(rig)
        waited = set(rig.instance.alive)
        async with rig.lease(**asked) as leased:
            assert leased.sandbox_id not in waited
            assert leased.hash_seed == asked.get("hash_seed", 1)
        assert rig.pool.stats()[RUNTIME].own == 1


async def test_no_lease_that_a_pooled_sandbox_serves_outlasts_its_expiry() -> None:
    max_age_s = 100.0
    async with opened(max_age_s=max_age_s) as rig:
        await filled(rig)
        last_lease_ends_s = time.time() + max_age_s + POOLED_LEASE_S
        assert rig.driver.specs[0].expires_at_s >= int(last_lease_ends_s) + SANDBOX_EXPIRY_GRACE_S - 2


async def test_one_that_waited_too_long_is_replaced() -> None:
    async with opened(max_age_s=0.2) as rig:
        await filled(rig)
        first = set(rig.instance.alive)
        await until(lambda: rig.pool.stats()[RUNTIME].expired > 0)
        await until(lambda: first.isdisjoint(rig.instance.alive))


async def test_the_pool_yields_its_place_to_a_lease_it_cannot_serve() -> None:
    async with opened(capacity=1) as rig:
        await filled(rig)
        async with asyncio.timeout(SOON_S), rig.lease(hash_seed=7):
            assert rig.driver.live_at_most == 1
        await filled(rig)


async def test_a_start_that_fails_fails_the_lease_that_waits_for_it() -> None:
    async with opened() as rig:
        rig.driver.failures = [SandboxStartError("no such image") for _ in range(2)]
        with pytest.raises(SandboxStartError, match="no such image"):
            async with rig.lease():
                pass
        assert rig.pool.stats()[RUNTIME].failed >= 1


async def test_an_engine_that_is_gone_is_told_to_who_waits_as_what_it_is() -> None:
    async with opened() as rig:
        rig.driver.failures = [EngineError("no engine") for _ in range(2)]
        with pytest.raises(EngineError, match="no engine"):
            async with rig.lease():
                pass


async def test_an_empty_pool_refuses_where_it_is_told_to() -> None:
    async with opened(when_empty=WhenEmpty.REFUSE) as rig:
        with pytest.raises(SandboxBusyError):
            async with rig.lease():
                pass
        await filled(rig)
        async with rig.lease():
            pass


async def test_a_queue_is_bounded_in_time() -> None:
    async with opened(when_empty=WhenEmpty.QUEUE, queue_s=0.1) as rig:
        rig.driver.goes_on.clear()
        with pytest.raises(SandboxBusyError):
            async with rig.lease():
                pass
        rig.driver.goes_on.set()
        await filled(rig)


async def test_a_lease_cancelled_while_it_waits_takes_nothing_along() -> None:
    async with opened() as rig:
        rig.driver.goes_on.clear()
        waiting = [asyncio.create_task(rig.lease().__aenter__()) for _ in range(3)]
        await until(lambda: rig.there() >= 3)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting)
        await until(lambda: rig.there() == 1)
        rig.driver.goes_on.set()
        await filled(rig)


@pytest.mark.parametrize("turns", range(6))
async def test_a_lease_cancelled_in_the_moment_it_is_given_a_sandbox_leaves_none_behind(turns: int) -> None:
    async with opened() as rig:
        await filled(rig)

        async def use() -> None:
            async with rig.lease():
                await asyncio.sleep(0)

        task = asyncio.create_task(use())
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait((task,))
        await filled(rig)
        await until(lambda: rig.there() == 1)
        assert rig.pool.count(Phase.LENT) == 0


async def test_closing_ends_those_that_start_and_those_that_wait_also_when_it_is_cancelled() -> None:
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir, claim_instance(Path(state_dir)) as instance:
        driver = Driver()
        pool = SandboxPool(SandboxMaker(instance, driver), {RUNTIME: Plan(size=3)}, capacity=8)

        async def use() -> None:
            async with pooling(pool):
                await asyncio.sleep(SOON_S)

        task = asyncio.create_task(use())
        await until(lambda: pool.count(Phase.WAITING) >= 1)
        driver.goes_on.clear()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        driver.goes_on.set()
        await asyncio.wait((task,))
        assert instance.alive == set()
        assert pool.count(Phase.ENDING) == 0


async def test_without_a_pool_nothing_is_made_ahead() -> None:
    async with opened(size=0) as rig:
        assert rig.there() == 0
        async with rig.lease():
            assert rig.there() == 1
        assert rig.there() == 0
        assert rig.pool.stats()[RUNTIME].own == 1
