import asyncio

import pytest

from orchestrator.conversation import Reply, StopReason, Told
from orchestrator.errors import Billing, ModelError
from orchestrator.models.breaker import (
    FAILURES_TO_OPEN,
    FIRST_PAUSE_S,
    LONGEST_PAUSE_S,
    Breaker,
    GuardedClient,
)
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage

REQUEST = ModelRequest(
    model="m", system="", conversation=(Told("hi"),), python_tool=False, max_tokens=10, timeout_s=5
)
DOWN = ModelError("down", billing=Billing.NOTHING, retryable=True)
OVERLOADED = ModelError("529", billing=Billing.NOTHING, retryable=True, status=529)
RATE_LIMITED = ModelError("429", billing=Billing.NOTHING, retryable=True, status=429)
NO_KEY = ModelError("401", billing=Billing.NOTHING, retryable=False, status=401)
BROKE = ModelError("broke", billing=Billing.UNKNOWN, retryable=True)
REFUSED = ModelError("400", billing=Billing.NOTHING, retryable=False, status=400)


class Provider:
    """Fails as told, and counts who got through."""

    def __init__(self) -> None:
        self.failure: ModelError | None = None
        self.asked = 0
        self.hold: asyncio.Event | None = None

    async def complete(self, request: ModelRequest) -> Completion:
        self.asked += 1
        if self.hold is not None:
            await self.hold.wait()
        if self.failure is not None:
            raise self.failure
        return Completion(Reply(({"type": "text", "text": "ok"},), StopReason.END_TURN), Usage(output=1))

    async def aclose(self) -> None:
        pass


class Rig:
    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.provider = Provider()
        self.client = GuardedClient(self.provider, clock=lambda: self.now_s)

    async def fails(self, failure: ModelError) -> ModelError:
        self.provider.failure = failure
        with pytest.raises(ModelError) as caught:
            await self.client.complete(REQUEST)
        return caught.value

    async def opened(self) -> "Rig":
        for _ in range(FAILURES_TO_OPEN):
            await self.fails(DOWN)
        return self


async def test_a_provider_that_is_down_is_asked_no_more_until_the_pause_is_over() -> None:
    rig = await Rig().opened()
    for _ in range(500):
        refusal = await rig.fails(DOWN)
        assert (refusal.billing, refusal.retryable) == (Billing.NOTHING, True)
        assert refusal.retry_after_s == pytest.approx(FIRST_PAUSE_S)
    assert rig.provider.asked == FAILURES_TO_OPEN


async def test_one_success_in_between_starts_the_count_again() -> None:
    rig = Rig()
    for _ in range(3):
        for _ in range(FAILURES_TO_OPEN - 1):
            await rig.fails(OVERLOADED)
        rig.provider.failure = None
        await rig.client.complete(REQUEST)
    assert rig.provider.asked == 3 * FAILURES_TO_OPEN


@pytest.mark.parametrize("failure", [RATE_LIMITED, REFUSED])
async def test_what_concerns_one_caller_never_opens_it(failure: ModelError) -> None:
    rig = Rig()
    for _ in range(10 * FAILURES_TO_OPEN):
        await rig.fails(failure)
    assert rig.provider.asked == 10 * FAILURES_TO_OPEN


async def test_after_the_pause_one_probe_goes_out_and_the_others_wait_for_it() -> None:
    rig = await Rig().opened()
    rig.now_s += FIRST_PAUSE_S
    rig.provider.failure, rig.provider.hold = None, asyncio.Event()
    probe = asyncio.create_task(rig.client.complete(REQUEST))
    await asyncio.sleep(0)
    with pytest.raises(ModelError):
        await rig.client.complete(REQUEST)
    rig.provider.hold.set()
    await probe
    await rig.client.complete(REQUEST)
    assert rig.provider.asked == FAILURES_TO_OPEN + 2


async def test_each_failed_probe_doubles_the_pause_up_to_the_longest() -> None:
    rig = await Rig().opened()
    pauses_s = []
    for _ in range(8):
        refusal = await rig.fails(DOWN)
        assert refusal.retry_after_s is not None
        pauses_s.append(refusal.retry_after_s)
        rig.now_s += refusal.retry_after_s
        await rig.fails(DOWN)
    assert pauses_s == pytest.approx([2, 4, 8, 16, 32, 60, 60, 60])
    assert max(pauses_s) == LONGEST_PAUSE_S


async def test_calls_that_fail_late_do_not_make_the_pause_longer() -> None:
    rig = Rig()
    rig.provider.failure, rig.provider.hold = DOWN, asyncio.Event()
    late = [asyncio.create_task(rig.client.complete(REQUEST)) for _ in range(3 * FAILURES_TO_OPEN)]
    await asyncio.sleep(0)
    rig.provider.hold.set()
    await asyncio.gather(*late, return_exceptions=True)
    assert (await rig.fails(DOWN)).retry_after_s == pytest.approx(FIRST_PAUSE_S)


def test_a_probe_that_never_reports_lets_another_one_out_after_a_pause() -> None:
    breaker = Breaker()
    for _ in range(FAILURES_TO_OPEN):
        breaker.failed(0.0, probe=False)
    assert breaker.refused_for_s(FIRST_PAUSE_S) == 0.0
    assert breaker.refused_for_s(FIRST_PAUSE_S) == pytest.approx(FIRST_PAUSE_S)
    assert breaker.refused_for_s(2 * FIRST_PAUSE_S) == 0.0


# --- What is every caller's trouble ---------------------------------------------------------------------


def trouble(rig: Rig) -> ModelError | None:
    """As it is now: a checker would take the first look for good."""
    return rig.client.trouble


def may_be_over(rig: Rig) -> bool:
    """Likewise."""
    return rig.client.may_be_over


async def test_a_provider_that_is_down_is_every_callers_trouble_until_a_call_gets_through() -> None:
    rig = Rig()
    assert trouble(rig) is None
    await rig.opened()
    assert trouble(rig) is DOWN
    assert not may_be_over(rig)
    rig.now_s += FIRST_PAUSE_S
    assert may_be_over(rig)
    rig.provider.failure = None
    await rig.client.complete(REQUEST)
    assert trouble(rig) is None


@pytest.mark.parametrize("failure", [RATE_LIMITED, REFUSED])
async def test_one_callers_failure_is_nobody_elses_trouble(failure: ModelError) -> None:
    rig = Rig()
    for _ in range(FAILURES_TO_OPEN):
        await rig.fails(failure)
    assert trouble(rig) is None


async def test_a_key_that_is_refused_is_every_callers_trouble_and_opens_nothing() -> None:
    rig = Rig()
    assert await rig.fails(NO_KEY) is NO_KEY
    assert rig.client.is_key_refused
    assert trouble(rig) is NO_KEY
    assert not may_be_over(rig)
    assert await rig.fails(NO_KEY) is NO_KEY, "each call is told why"
    rig.now_s += LONGEST_PAUSE_S
    assert may_be_over(rig)
    rig.provider.failure = None
    await rig.client.complete(REQUEST)
    assert trouble(rig) is None
    assert not rig.client.is_key_refused


async def test_an_address_that_accepts_connections_again_ends_what_only_failed_to_connect() -> None:
    rig = await Rig().opened()
    rig.client.reached()
    assert trouble(rig) is None
    for _ in range(FAILURES_TO_OPEN):
        await rig.fails(BROKE)
    rig.client.reached()
    assert trouble(rig) is BROKE, "that it accepts connections does not show that it answers"
