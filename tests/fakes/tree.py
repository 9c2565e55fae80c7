"""A run tree of fakes: real money, real record, real contexts; no model, no sandbox, no machine."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import cast

from orchestrator.budget import UNLIMITED, ZERO, Account, Amounts
from orchestrator.contexts.store import ContextStore
from orchestrator.ids import LOCAL_TENANT, RunId
from orchestrator.limits import RunLimits
from orchestrator.models.port import Model, ModelClient
from orchestrator.pricing import ModelCard, Tier
from orchestrator.runs.admission import TreeSlots
from orchestrator.runs.call_slots import CallSlots
from orchestrator.runs.memo import Memo
from orchestrator.runs.model_calls import ModelCalls
from orchestrator.runs.treasury import Treasury
from orchestrator.runs.tree import RunSpec, RunTree, limit_amounts
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.store.memory import MemoryRunStore
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import CallHeld, CallSettled, Event, Payload
from tests.fakes.leases import FakeLeases, prints

ROOT = RunId("r" + "0" * 20)
CARD = ModelCard(
    name="fake",
    window_tokens=200_000,
    max_output_tokens=32_000,
    tiers=(
        Tier(
            up_to_input_tokens=200_000,
            input=1_000_000,
            output=5_000_000,
            cache_read=100_000,
            cache_write=1_250_000,
        ),
    ),
)


class FakeTree:
    """A run tree, and everything a test wants to see of it."""

    def __init__(
        self,
        directory: Path,
        slots: TreeSlots,
        client: ModelClient,
        *,
        leases: FakeLeases | None = None,
        limits: RunLimits = RunLimits(),  # noqa: B008 - frozen
        memoise: bool = False,
        call_slots: CallSlots | None = None,
    ) -> None:
        no_quota = Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED)
        self.treasury = Treasury(MemoryTenantAccount(no_quota), limit_amounts(limits))
        self.ledger, self.account = self.treasury.ledger, self.treasury.account
        self.contexts = ContextStore(directory / "contexts")
        self.leases = leases or FakeLeases(prints)
        self.store = MemoryRunStore()
        self.seen: list[Event] = []
        self.model = Model(CARD, client)
        self.calls = ModelCalls(
            LOCAL_TENANT,
            self.treasury,
            max_concurrency=limits.max_concurrency,
            deadline_at_s=time.monotonic() + limits.deadline_s,
            slots=call_slots,
        )
        self.tree = RunTree(
            tenant_id=LOCAL_TENANT,
            limits=limits,
            treasury=self.treasury,
            models={"fake": self.model, "root": self.model, "sub": self.model},
            calls=self.calls,
            slots=slots,
            leases=cast(SandboxLeases, self.leases),
            contexts=self.contexts,
            store=self.store,
            observers=(self.seen.append,),
            runtime="none",
            memo=Memo() if memoise else None,
        )
        self.recorder = self.tree.recorder(ROOT)
        """Of a root run that a test plays itself."""

    def spec(self, *, depth: int = 0, account: Account | None = None) -> RunSpec:
        """A run over a context of one line."""
        return RunSpec(
            run_id=ROOT,
            question="Who?",
            context=self.contexts.stage_text(LOCAL_TENANT, b"the whole context\n"),
            model=self.model,
            depth=depth,
            account=account or self.account,
        )

    def payloads(self, *kinds: type[Payload], run_id: RunId | None = None) -> Sequence[Payload]:
        """What was recorded, of these kinds and of this run."""
        return [
            event.payload
            for event in self.seen
            if (not kinds or isinstance(event.payload, kinds)) and run_id in {None, event.run_id}
        ]

    def settlements(self) -> list[CallSettled]:
        """Every attempt that is over."""
        return [event.payload for event in self.seen if isinstance(event.payload, CallSettled)]

    def assert_books_are_closed(self) -> None:
        """Nothing is held, and account, events and ledger entries tell the same bill."""
        assert not self.ledger.waiting
        assert self.account.held() == ZERO
        confirmed, unconfirmed = ZERO, ZERO
        for settled in self.settlements():
            confirmed, unconfirmed = confirmed.plus(settled.confirmed), unconfirmed.plus(settled.unconfirmed)
        # Child runs are paid without a call.
        assert self.account.confirmed._replace(child_runs=0) == confirmed
        assert self.account.unconfirmed == unconfirmed
        held = [
            (event.run_id, event.payload.call, event.payload.attempt)
            for event in self.seen
            if isinstance(event.payload, CallHeld)
        ]
        settled_calls = [
            (event.run_id, event.payload.call, event.payload.attempt)
            for event in self.seen
            if isinstance(event.payload, CallSettled)
        ]
        assert sorted(held) == sorted(settled_calls)
        assert len(set(held)) == len(held), "an attempt is settled once"
        entries = [
            (entry.run_id, entry.call, entry.attempt, entry.confirmed, entry.unconfirmed)
            for entry in self.store.ledger_entries
        ]
        assert len(entries) == len(held)
        total = ZERO
        for *_, paid, maybe_paid in entries:
            total = total.plus(paid).plus(maybe_paid)
        assert total == confirmed.plus(unconfirmed)
