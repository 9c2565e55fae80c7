"""Recursion under limits far smaller than the tree: nothing may wait for ever, and no bill may be missing."""

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from orchestrator.broker.service import serve_broker
from orchestrator.budget import Amounts
from orchestrator.contexts.store import ContextStore
from orchestrator.conversation import Reply, StopReason
from orchestrator.ids import LOCAL_TENANT, new_run_id
from orchestrator.limits import RunLimits
from orchestrator.models.port import Completion, Model, ModelRequest
from orchestrator.models.scripted import task_of
from orchestrator.pricing import Usage, free_model
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.model_calls import ModelCalls
from orchestrator.runs.run import run_to_end
from orchestrator.runs.treasury import Treasury
from orchestrator.runs.tree import RunResult, RunSpec, RunTree, limit_amounts
from orchestrator.sandbox.instance import Instance, claim_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.store.memory import MemoryRunStore
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import Tally
from orchestrator.turn import Outcome
from tests.fakes.in_process_driver import InProcessDriver

pytestmark = pytest.mark.timeout(240)

WIDTH = int(os.environ.get("RLM_TEST_WIDTH", "4"))
"""Child runs of each run: 341 runs in all, and 4,681 with the 8 of `make test-service`."""


@dataclass
class TreeModel:
    """Every run asks `width` children at once and adds up what they say; at the bottom it is one."""

    depth: int
    width: int
    in_flight: int = 0
    most_in_flight: int = 0
    served: int = 0
    asked: list[str] = field(default_factory=list)

    async def complete(self, request: ModelRequest) -> Completion:
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.002)
        self.in_flight -= 1
        self.served += 1
        _, depth = task_of(request.conversation)
        code = "FINAL(1)" if depth == self.depth else self._ask_children()
        call = {"type": "tool_use", "id": "call", "name": "python", "input": {"code": code}}
        return Completion(Reply((call,), StopReason.TOOL_USE), Usage(input=10, output=1))

    def _ask_children(self) -> str:
        asked = ", ".join(f"rlm('child {number}')" for number in range(self.width))
        return f"FINAL(1 + sum(map(int, await gather({asked}))))"

    async def aclose(self) -> None:
        pass


@pytest.fixture
async def instance() -> AsyncIterator[Instance]:
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir, claim_instance(Path(state_dir)) as claimed:
        yield claimed


async def grow(
    instance: Instance, driver: InProcessDriver, model: TreeModel, *, sandboxes: int, concurrency: int
) -> tuple[RunResult, Tally, MemoryTenantAccount]:
    limits = RunLimits(
        max_depth=model.depth,
        max_child_runs=100_000,
        max_calls=100_000,
        max_concurrency=concurrency,
        max_tokens=1_000_000_000,
    )
    tally = Tally()
    tenant = MemoryTenantAccount(limit_amounts(limits))
    treasury = Treasury(tenant, limit_amounts(limits))
    contexts = ContextStore(instance.contexts_dir)
    card = free_model("m", window_tokens=1_000_000, max_output_tokens=32_000)
    calls = ModelCalls(
        LOCAL_TENANT, treasury, max_concurrency=concurrency, deadline_at_s=time.monotonic() + 200
    )
    async with SandboxSlots(sandboxes).admit(model.depth) as slots:
        tree = RunTree(
            tenant_id=LOCAL_TENANT,
            limits=limits,
            treasury=treasury,
            models={"root": Model(card, model), "sub": Model(card, model)},
            calls=calls,
            slots=slots,
            leases=SandboxLeases(instance, driver, memory_bytes=1 << 20),
            contexts=contexts,
            store=MemoryRunStore(),
            observers=[tally.add],
            runtime="runc",
        )
        context = contexts.stage_text(LOCAL_TENANT, b"the root's text")
        spec = RunSpec(
            run_id=new_run_id(),
            question="How many?",
            context=context,
            model=tree.model("root"),
            depth=0,
            account=treasury.account,
        )
        result = await run_to_end(tree, spec, serve_broker)
    await treasury.close()
    await driver.aclose()
    contexts.close()
    return result, tally, tenant


@pytest.mark.parametrize(("depth", "width"), [(4, 3), (2, 8)])
async def test_a_tree_ends_with_room_for_one_chain_and_one_call(
    instance: Instance, depth: int, width: int
) -> None:
    runs = sum(width**level for level in range(depth + 1))
    model, driver = TreeModel(depth, width), InProcessDriver()
    result, tally, tenant = await grow(instance, driver, model, sandboxes=depth + 1, concurrency=1)
    assert (result.outcome, result.answer) == (Outcome.ANSWERED, str(runs))
    assert driver.live_at_most == depth + 1
    assert model.most_in_flight == 1
    assert model.served == runs == tally.child_runs + 1
    assert tally.usage.total == 11 * runs
    assert tenant.drawn == tally.confirmed.plus(Amounts(child_runs=runs - 1))


@pytest.mark.long
async def test_a_tree_of_depth_4_ends_under_two_provider_calls_however_wide(instance: Instance) -> None:
    runs = sum(WIDTH**level for level in range(5))
    model, driver = TreeModel(4, WIDTH), InProcessDriver()
    result, tally, _ = await grow(instance, driver, model, sandboxes=12, concurrency=2)
    assert (result.outcome, result.answer) == (Outcome.ANSWERED, str(runs))
    assert driver.started == runs
    assert driver.live_at_most <= 12
    assert model.most_in_flight == 2
    assert tally.confirmed.calls == runs
    assert tally.open_calls == 0
