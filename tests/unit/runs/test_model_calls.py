import asyncio
from dataclasses import replace

import pytest

from orchestrator.budget import UNLIMITED, ZERO, Amounts
from orchestrator.conversation import Reply, Told
from orchestrator.errors import Billing, BudgetExceededError, DeadlineExceededError, ModelError
from orchestrator.limits import RunLimits
from orchestrator.models import retry
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage
from orchestrator.runs.call_slots import CallSlots
from orchestrator.runs.model_calls import Wish, call_amounts, output_cost_microusd
from orchestrator.trajectory import CallHeld, CallSettled
from tests.fakes.model import USAGE, FakeModel, after, says, when
from tests.fakes.tree import CARD, FakeTree
from tests.unit.runs.conftest import MakeTree

PAID = Amounts(USAGE.total, CARD.cost_microusd(USAGE), 1)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE_S", 0.001)


def wish(tree: FakeTree, **more: object) -> Wish:
    plain = Wish(
        call="turn-1",
        model=tree.model,
        system="",
        conversation=(Told("x" * 1_000),),
        python_tool=False,
        output_tokens=500,
        least_output_tokens=500,
    )
    return replace(plain, **more)  # type: ignore[arg-type]


async def ask(tree: FakeTree, **more: object) -> Completion:
    try:
        return await tree.calls.ask(wish(tree, **more), tree.account, tree.recorder)
    finally:
        # Settlements are posted: waiting for what comes behind them is waiting for them.
        await tree.recorder.record()


def failure(billing: Billing, *, retryable: bool = False) -> ModelError:
    return ModelError("it failed", billing=billing, retryable=retryable)


def bills(tree: FakeTree) -> list[tuple[Amounts, Amounts, str]]:
    return [(one.confirmed, one.unconfirmed, one.error) for one in tree.settlements()]


# --- One attempt ------------------------------------------------------------------------------------------


async def test_an_answer_is_paid_as_the_provider_counted_it(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(says("yes")))
    completion = await ask(tree)
    assert completion.reply == says("yes")
    assert bills(tree) == [(PAID, ZERO, "")]
    assert tree.account.used() == PAID


async def test_the_hold_is_recorded_before_the_call_and_covers_its_worst_case(make_tree: MakeTree) -> None:
    seen: list[object] = []

    async def look(_request: ModelRequest) -> Reply:
        seen.extend(tree.payloads())
        return says("yes")

    tree = make_tree(FakeModel(look))
    await ask(tree)
    (held,) = seen
    assert isinstance(held, CallHeld)
    dearest = Usage(cache_write=held.input_bound_tokens, output=500)
    assert held.held == Amounts(dearest.total, CARD.cost_microusd(dearest), 1)


async def test_what_is_sent_is_what_was_reserved_for(make_tree: MakeTree) -> None:
    model = FakeModel(says("yes"))
    tree = make_tree(model, limits=RunLimits(max_tokens=2_000))
    await ask(tree, output_tokens=4_096, least_output_tokens=256)
    held = next(payload for payload in tree.payloads(CallHeld) if isinstance(payload, CallHeld))
    assert model.asked[0].max_tokens == 2_000 - held.input_bound_tokens
    assert held.held.tokens == 2_000


async def test_more_output_than_the_model_can_write_is_never_asked_for(make_tree: MakeTree) -> None:
    model = FakeModel(says("yes"))
    await ask(make_tree(model), output_tokens=10**6, least_output_tokens=10**6)
    assert model.asked[0].max_tokens == CARD.max_output_tokens


@pytest.mark.parametrize("billing", Billing)
async def test_a_failure_is_charged_by_what_it_may_have_cost(make_tree: MakeTree, billing: Billing) -> None:
    tree = make_tree(FakeModel(failure(billing)))
    with pytest.raises(ModelError):
        await ask(tree)
    held = next(payload for payload in tree.payloads(CallHeld) if isinstance(payload, CallHeld))
    unconfirmed = ZERO if billing is Billing.NOTHING else held.held
    assert bills(tree) == [(ZERO, unconfirmed, "it failed")]


async def test_a_bug_of_a_client_is_charged_in_full_and_keeps_its_words_out_of_the_record(
    make_tree: MakeTree,
) -> None:
    tree = make_tree(FakeModel(ZeroDivisionError("a prompt")))
    with pytest.raises(ZeroDivisionError):
        await ask(tree)
    ((confirmed, unconfirmed, error),) = bills(tree)
    assert confirmed == ZERO
    assert unconfirmed.calls == 1
    assert error == "the orchestrator failed"


async def test_a_refused_call_never_reaches_the_provider(make_tree: MakeTree) -> None:
    model = FakeModel()
    tree = make_tree(model, limits=RunLimits(max_tokens=1_000))
    with pytest.raises(BudgetExceededError):
        await ask(tree)
    assert model.asked == []
    assert tree.payloads() == []


# --- Retries ----------------------------------------------------------------------------------------------


async def test_every_attempt_has_a_hold_of_its_own(make_tree: MakeTree) -> None:
    overloaded = failure(Billing.NOTHING, retryable=True)
    broke = failure(Billing.UNKNOWN, retryable=True)
    tree = make_tree(FakeModel(overloaded, broke, says("yes")))
    await ask(tree)
    assert [type(payload) for payload in tree.payloads()] == [CallHeld, CallSettled] * 3
    assert [settled.attempt for settled in tree.settlements()] == [1, 2, 3]
    assert [confirmed for confirmed, _, _ in bills(tree)] == [ZERO, ZERO, PAID]
    assert [maybe.calls for _, maybe, _ in bills(tree)] == [0, 1, 0]


async def test_a_retry_that_can_no_longer_be_paid_is_refused(make_tree: MakeTree) -> None:
    model = FakeModel(failure(Billing.UNKNOWN, retryable=True))
    tree = make_tree(model, limits=RunLimits(max_tokens=2_500))
    with pytest.raises(BudgetExceededError):
        await ask(tree)
    assert len(model.asked) == 1


async def test_callers_are_told_of_each_dispatch_and_each_retry(make_tree: MakeTree) -> None:
    told: list[str] = []
    tree = make_tree(FakeModel(failure(Billing.NOTHING, retryable=True), says("yes")))
    await tree.calls.ask(
        wish(tree),
        tree.account,
        tree.recorder,
        on_dispatch=lambda: told.append("dispatch"),
        on_retry=lambda: told.append("retry"),
    )
    assert told == ["dispatch", "retry", "dispatch"]


# --- Concurrency and deadline -----------------------------------------------------------------------------


async def test_no_more_calls_are_in_flight_than_the_limit_and_only_those_hold_anything(
    make_tree: MakeTree,
) -> None:
    held_at_once: list[int] = []

    async def look(request: ModelRequest) -> Reply:
        held_at_once.append(tree.account.held().calls)
        return await after(3, says("yes"))(request)

    model = FakeModel(otherwise=look)
    tree = make_tree(model, limits=RunLimits(max_concurrency=3))
    await asyncio.gather(*(ask(tree, call=f"1.{number}") for number in range(20)))
    assert model.in_flight_at_most == 3
    assert max(held_at_once) == 3


async def test_of_64_calls_each_worth_half_the_budget_at_most_two_are_ever_in_flight(
    make_tree: MakeTree,
) -> None:
    model = FakeModel(otherwise=after(3, says("yes")))
    tree = make_tree(model, limits=RunLimits(max_tokens=3_300, max_concurrency=64))
    results = await asyncio.gather(
        *(ask(tree, call=f"1.{number}") for number in range(64)), return_exceptions=True
    )
    assert model.in_flight_at_most == 2
    assert len(model.served) == sum(isinstance(result, Completion) for result in results)
    assert {type(result) for result in results} == {Completion, BudgetExceededError}
    assert tree.account.used().tokens == USAGE.total * len(model.served) <= 3_300


async def test_a_call_that_waits_for_budget_is_in_no_other_trees_way(make_tree: MakeTree) -> None:
    shared, go = CallSlots(2), asyncio.Event()
    model = FakeModel(otherwise=when(go, says("yes")))
    short = make_tree(model, limits=RunLimits(max_tokens=3_300, max_concurrency=64), call_slots=shared)
    held = [asyncio.create_task(ask(short, call=f"1.{number}", output_tokens=2_000)) for number in range(8)]
    async with asyncio.timeout(10):
        while len(model.asked) < 1 or shared.waiting:  # noqa: ASYNC110 - nobody tells of it
            await asyncio.sleep(0)
        assert len(model.asked) == 1, "all but one wait for the budget that it holds"
        other = make_tree(FakeModel(says("at once")), call_slots=shared)
        assert (await ask(other)).reply.content
        go.set()
        results = await asyncio.gather(*held, return_exceptions=True)
    assert {type(result) for result in results} <= {Completion, BudgetExceededError}
    assert isinstance(results[0], Completion)
    assert shared.free == 2


@pytest.mark.parametrize("steps", range(12))
async def test_a_call_cancelled_between_its_budget_and_its_slot_holds_neither(
    make_tree: MakeTree, steps: int
) -> None:
    shared, go, theirs = CallSlots(1), asyncio.Event(), asyncio.Event()
    first = FakeModel(when(go, says("yes")), otherwise=says("yes"))
    tree = make_tree(first, limits=RunLimits(max_tokens=3_300, max_concurrency=8), call_slots=shared)
    other = make_tree(FakeModel(otherwise=when(theirs, says("yes"))), call_slots=shared)
    tasks = [asyncio.create_task(ask(tree, call=f"1.{number}", output_tokens=1_000)) for number in range(2)]
    await asyncio.sleep(0)
    blocking = [asyncio.create_task(ask(other, call=f"2.{number}")) for number in range(3)]
    go.set()
    for _ in range(steps):
        await asyncio.sleep(0)
    tasks[1].cancel()
    theirs.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*tasks, *blocking, return_exceptions=True)
    tree.assert_books_are_closed()
    assert (shared.free, shared.waiting) == (1, 0)


async def test_a_call_at_the_deadline_is_cancelled_and_charged(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(when(asyncio.Event(), says("never"))), limits=RunLimits(deadline_s=0.1))
    with pytest.raises(DeadlineExceededError):
        await ask(tree)
    ((_, unconfirmed, error),) = bills(tree)
    assert unconfirmed.calls == 1
    assert error == "cancelled"


async def test_a_call_that_waits_for_a_slot_at_the_deadline_costs_nothing(make_tree: MakeTree) -> None:
    model = FakeModel(otherwise=when(asyncio.Event(), says("never")))
    tree = make_tree(model, limits=RunLimits(deadline_s=0.1, max_concurrency=1))
    results = await asyncio.gather(ask(tree), ask(tree, call="turn-2"), return_exceptions=True)
    assert {type(result) for result in results} == {DeadlineExceededError}
    assert len(model.asked) == len(bills(tree)) == 1


async def test_after_the_deadline_nothing_is_asked(make_tree: MakeTree) -> None:
    model = FakeModel()
    with pytest.raises(DeadlineExceededError):
        await ask(make_tree(model, limits=RunLimits(deadline_s=-1)))
    assert model.asked == []


# --- Cancellation at every await --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(40))
async def test_a_call_cancelled_at_any_point_is_charged_no_less_than_was_served(
    make_tree: MakeTree, steps: int
) -> None:
    model = FakeModel(failure(Billing.NOTHING, retryable=True), after(4, says("yes")))
    tree = make_tree(model)
    task = asyncio.create_task(ask(tree))
    for _ in range(steps):
        await asyncio.sleep(0 if steps < 30 else 0.001)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    tree.assert_books_are_closed()
    served = sum(usage.total for usage in model.served)
    assert served <= tree.account.used().tokens


@pytest.mark.parametrize("steps", range(12))
async def test_a_call_cancelled_while_it_waits_for_budget_or_a_slot_lets_the_others_go_on(
    make_tree: MakeTree, steps: int
) -> None:
    model = FakeModel(otherwise=after(5, says("yes")))
    tree = make_tree(model, limits=RunLimits(max_tokens=3_300, max_concurrency=2))
    tasks = [asyncio.create_task(ask(tree, call=f"1.{number}")) for number in range(4)]
    for _ in range(steps):
        await asyncio.sleep(0)
    tasks[1].cancel()
    tasks[2].cancel()
    async with asyncio.timeout(10):
        first, _, _, last = await asyncio.gather(*tasks, return_exceptions=True)
    assert isinstance(first, Completion)
    assert isinstance(last, Completion | BudgetExceededError)


# --- The arithmetic of a hold -----------------------------------------------------------------------------


def test_the_input_of_a_call_is_held_at_its_dearest() -> None:
    assert call_amounts(CARD, 1_000) == Amounts(tokens=1_000, cost_microusd=1_250, calls=1)


def test_costs_of_a_hold_are_rounded_up() -> None:
    assert call_amounts(CARD, 1).cost_microusd == 2
    assert output_cost_microusd(CARD, 1, 1) == 5


def test_nothing_costs_nothing_but_the_call() -> None:
    assert call_amounts(CARD, 0) == Amounts(calls=1)
    assert call_amounts(CARD, 0).fits(Amounts(0, 0, 1, UNLIMITED))
