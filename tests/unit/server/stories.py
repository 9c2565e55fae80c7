"""Events of a small run tree, for whatever is made of events."""

from collections.abc import Iterator

from orchestrator.budget import Amounts
from orchestrator.ids import RunId, TenantId
from orchestrator.pricing import Usage
from orchestrator.store.books import RunRow, RunState
from orchestrator.trajectory import (
    CallHeld,
    CallSettled,
    CellEnded,
    CellStarted,
    Event,
    Payload,
    RunEnded,
    RunStarted,
    SandboxLeased,
    SubCallEnded,
    SubCallStarted,
    TurnStarted,
)

ROOT, CHILD = RunId("r" + "1" * 20), RunId("r" + "2" * 20)
CANARY = "the-secret-of-the-context"
"""In every text of the story: it must not be found in anything made of it."""
HELD = Amounts(tokens=1_000, cost_microusd=500, calls=1)
USAGE = Usage(input=70, cache_read=20, cache_write=10, output=5)


def row(tenant: str = "t-ann", created_at: float = 90.0) -> RunRow:
    """The root run."""
    return RunRow(
        run_id=ROOT,
        tenant_id=TenantId(tenant),
        idempotency_key="k",
        request_hash="h",
        question=CANARY,
        context_id="c1",
        options={"model": "big"},
        state=RunState.RUNNING,
        created_at=created_at,
    )


def started(parent: RunId | None = None, parent_call: str = "") -> RunStarted:
    return RunStarted(
        question=CANARY,
        context=CANARY,
        model="big" if parent is None else "small",
        sub_model="small",
        depth=0 if parent is None else 1,
        parent=parent,
        parent_call=parent_call,
        limits={},
    )


def held(call: str, model: str) -> CallHeld:
    return CallHeld(call=call, attempt=1, model=model, input_bound_tokens=100, held=HELD)


def settled(call: str, model: str, error: str = "") -> CallSettled:
    return CallSettled(
        call=call,
        attempt=1,
        model=model,
        input_bound_tokens=100,
        usage=Usage() if error else USAGE,
        confirmed=Amounts() if error else Amounts(tokens=105, cost_microusd=40, calls=1),
        unconfirmed=HELD if error else Amounts(),
        error=error,
        duration_s=0.5,
    )


def sub_call(call: str, what: str) -> SubCallStarted:
    return SubCallStarted(
        call=call, turn=1, what=what, model="small", prompt=CANARY, request_hash="h", occurrence=0
    )


def sub_call_ended(call: str, error_kind: str = "") -> SubCallEnded:
    return SubCallEnded(
        call=call,
        answer="" if error_kind else CANARY,
        error=CANARY if error_kind else "",
        error_kind=error_kind,
        memoised=False,
        duration_s=1.0,
    )


def cell_ended(outcome: str = "ok") -> CellEnded:
    return CellEnded(
        turn=1,
        outcome=outcome,
        output=CANARY,
        output_bytes=10,
        cut_bytes=0,
        traceback=CANARY,
        status=0,
        lost_variables=(CANARY,),
        duration_s=2.0,
        guest_s=1.0,
    )


def ended(outcome: str = "answered") -> RunEnded:
    return RunEnded(outcome=outcome, answer=CANARY, error=CANARY, turns=1, duration_s=9.0)


def leased() -> SandboxLeased:
    return SandboxLeased(sandbox_id="s1", runtime="runc", image="i", hash_seed=1, wait_s=0.2)


def the_story() -> Iterator[Event]:
    """A root run with one cell, one completion, one that was refused and one child run; a second an event."""
    steps: list[tuple[RunId, Payload]] = [
        (ROOT, started()),
        (ROOT, leased()),
        (ROOT, TurnStarted(turn=1, request_bytes=10)),
        (ROOT, held("turn-1", "big")),
        (ROOT, settled("turn-1", "big")),
        (ROOT, CellStarted(turn=1, code=CANARY)),
        (ROOT, sub_call(CANARY, "complete")),
        (ROOT, held("1.1", "small")),
        (ROOT, settled("1.1", "small", error=f"the provider said {CANARY}")),
        (ROOT, sub_call_ended(CANARY, "ModelError")),
        (ROOT, sub_call("b", "complete")),
        (ROOT, sub_call_ended("b", "BudgetExceededError")),
        (ROOT, sub_call("c", "child_run")),
        (CHILD, started(ROOT, "c")),
        (CHILD, held("turn-1", "small")),
        (CHILD, settled("turn-1", "small")),
        (CHILD, ended()),
        (ROOT, sub_call_ended("c")),
        (ROOT, cell_ended()),
        (ROOT, ended()),
    ]
    seqs = {ROOT: 0, CHILD: 0}
    for at, (run_id, payload) in enumerate(steps):
        yield Event(run_id, seqs[run_id], 100.0 + at, payload)
        seqs[run_id] += 1
