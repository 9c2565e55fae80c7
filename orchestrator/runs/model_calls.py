"""Every call to a model, of turns and sub-calls alike: reserve, journal, call, settle.

One hold per attempt, taken when a provider slot is free, so that only what is in flight holds anything; whose
turn it is when none is, `call_slots.py` says.
The settlement is synchronous and in a `finally`: nothing can come between an attempt and its bill. It is
posted to the record: what came of the call is recorded behind it, and nobody hears of that before both are
stored.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from orchestrator.budget import ZERO, Account, Amounts, Ask, Request
from orchestrator.conversation import Conversation
from orchestrator.errors import (
    Billing,
    BudgetExceededError,
    DeadlineExceededError,
    ModelError,
    OrchestratorError,
)
from orchestrator.estimate import input_bound_tokens
from orchestrator.ids import TenantId
from orchestrator.limits import MODEL_ATTEMPTS, MODEL_CALL_TIMEOUT_S
from orchestrator.models.port import Completion, Model, ModelRequest
from orchestrator.models.retry import with_retries
from orchestrator.pricing import ModelCard, Usage, whole_microusd
from orchestrator.runs.call_slots import CallSlots
from orchestrator.runs.recorder import Recorder
from orchestrator.runs.treasury import Treasury
from orchestrator.store.port import LedgerEntry
from orchestrator.trajectory import CallHeld, CallSettled


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """What to ask of a model, and who pays."""

    call: str
    """Its name in the run's events."""
    model: Model
    system: str
    conversation: Conversation
    python_tool: bool
    output_tokens: int
    least_output_tokens: int
    """Equal to `output_tokens` when it may not shrink."""
    keep: Amounts | None = None
    last_answer: bool = False
    stop_sequences: tuple[str, ...] = ()


class ModelCalls:
    """The way of one run tree to its models."""

    def __init__(
        self,
        tenant_id: TenantId,
        treasury: Treasury,
        *,
        max_concurrency: int,
        deadline_at_s: float,
        slots: CallSlots | None = None,
    ) -> None:
        """Args:
        tenant_id: Who pays.
        treasury: Of the run tree.
        max_concurrency: Provider calls in flight at once.
        deadline_at_s: The run tree's deadline on `time.monotonic`'s clock.
        slots: Shared with the other run trees of the process; None where there are no others.
        """
        self._tenant_id = tenant_id
        self._treasury = treasury
        shared = CallSlots(max_concurrency) if slots is None else slots
        self._slots = shared.of_tree(tenant_id, at_once=max_concurrency)
        self._deadline_at_s = deadline_at_s

    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self._deadline_at_s - time.monotonic()

    async def ask(
        self,
        wish: Wish,
        account: Account,
        recorder: Recorder,
        *,
        on_dispatch: Callable[[], None] = lambda: None,
        on_retry: Callable[[], None] = lambda: None,
    ) -> Completion:
        """A completion, retried as long as that makes sense.

        Args:
            wish: What to ask.
            account: Pays, with all its ancestors.
            recorder: Of the run that asks.
            on_dispatch: Called when an attempt goes out: from then on it may cost money.
            on_retry: Called when one has failed and is settled, before the wait for the next.

        Raises:
            BudgetExceededError: It can't be paid.
            DeadlineExceededError: The run's deadline came first.
            ModelError: The provider failed, and trying again makes no sense.
        """
        bound_tokens, ask = _ask(wish)

        async def attempt(number: int) -> Completion:
            async with self._slots.slot() as slot:
                hold = await self._treasury.hold(
                    account, ask, timeout_s=self.left_s(), while_waiting=slot.give_up
                )
                try:
                    await slot.take()
                except BaseException:
                    self._treasury.ledger.settle(hold, confirmed=ZERO, unconfirmed=ZERO)
                    raise
                return await self._attempt(
                    number,
                    wish,
                    hold,
                    bound_tokens=bound_tokens,
                    recorder=recorder,
                    on_dispatch=on_dispatch,
                )

        return await with_retries(
            attempt,
            deadline=self.left_s,
            attempts=MODEL_ATTEMPTS,
            on_retry=lambda _number, _failure, _wait_s: on_retry(),
        )

    def refusal(self, wish: Wish, account: Account) -> BudgetExceededError | None:
        """Why the run tree can't ever pay for this, or None. Nothing is held."""
        return self._treasury.refusal(account, _ask(wish)[1])

    async def _attempt(
        self,
        number: int,
        wish: Wish,
        hold: Request,
        *,
        bound_tokens: int,
        recorder: Recorder,
        on_dispatch: Callable[[], None],
    ) -> Completion:
        usage, confirmed, unconfirmed, failure = Usage(), ZERO, ZERO, "cancelled"
        started_s = time.monotonic()
        try:
            await recorder.record(
                CallHeld(
                    call=wish.call,
                    attempt=number,
                    model=wish.model.card.name,
                    input_bound_tokens=bound_tokens,
                    held=hold.amounts,
                )
            )
            request = self._request(wish, hold.output_tokens)
            on_dispatch()
            unconfirmed = hold.amounts
            completion = await wish.model.client.complete(request)
            usage, unconfirmed, failure = completion.usage, ZERO, ""
            confirmed = Amounts(usage.total, wish.model.card.cost_microusd(usage), 1)
            return completion
        except Exception as error:
            failure = str(error) if isinstance(error, OrchestratorError) else "the orchestrator failed"
            if isinstance(error, ModelError) and error.billing is Billing.NOTHING:
                unconfirmed = ZERO
            raise
        finally:
            self._treasury.ledger.settle(hold, confirmed=confirmed, unconfirmed=unconfirmed)
            settled = CallSettled(
                call=wish.call,
                attempt=number,
                model=wish.model.card.name,
                input_bound_tokens=bound_tokens,
                usage=usage,
                confirmed=confirmed,
                unconfirmed=unconfirmed,
                error=failure,
                duration_s=time.monotonic() - started_s,
            )
            entry = LedgerEntry(
                tenant_id=self._tenant_id,
                run_id=recorder.run_id,
                call=wish.call,
                attempt=number,
                confirmed=confirmed,
                unconfirmed=unconfirmed,
            )
            recorder.post(settled, ledger_entries=(entry,))

    def _request(self, wish: Wish, max_tokens: int) -> ModelRequest:
        left_s = self.left_s()
        if left_s <= 0:
            raise DeadlineExceededError("the run's deadline passed")
        return ModelRequest(
            model=wish.model.card.name,
            system=wish.system,
            conversation=wish.conversation,
            python_tool=wish.python_tool,
            stop_sequences=wish.stop_sequences,
            max_tokens=max_tokens,
            timeout_s=min(MODEL_CALL_TIMEOUT_S, left_s),
        )


def _ask(wish: Wish) -> tuple[int, Ask]:
    """The input's upper bound, and what has to be held."""
    bound_tokens = input_bound_tokens(wish.system, wish.conversation, python_tool=wish.python_tool)
    card = wish.model.card
    return bound_tokens, Ask(
        fixed=call_amounts(card, bound_tokens),
        output_tokens=min(wish.output_tokens, card.max_output_tokens),
        least_output_tokens=min(wish.least_output_tokens, card.max_output_tokens),
        output_microusd_per_mtok=card.dearest_output(bound_tokens),
        keep=wish.keep,
        last_answer=wish.last_answer,
    )


def call_amounts(card: ModelCard, input_tokens: int) -> Amounts:
    """What a call of at most so many input tokens can cost before it writes a word."""
    cost_microusd = whole_microusd(input_tokens * card.dearest_input(input_tokens))
    return Amounts(tokens=input_tokens, cost_microusd=cost_microusd, calls=1)


def output_cost_microusd(card: ModelCard, input_tokens: int, output_tokens: int) -> int:
    """What so much output can cost behind an input of at most so many tokens."""
    return whole_microusd(output_tokens * card.dearest_output(input_tokens))
