"""A run goes on in a new container, with the namespace, the hashes and the random numbers that it had."""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress

from orchestrator.app import RunOptions, Tenant, root_run
from orchestrator.budget import UNLIMITED, Amounts
from orchestrator.config import Settings
from orchestrator.conversation import Reply, StopReason
from orchestrator.errors import StoreError
from orchestrator.ids import LOCAL_TENANT, RunId, new_run_id
from orchestrator.machine import Machine, open_machine, open_workplace
from orchestrator.models.port import Completion, Model, ModelRequest
from orchestrator.pricing import Usage, free_model
from orchestrator.runs.tree import RunResult
from orchestrator.store.memory import MemoryRunStore
from orchestrator.store.port import NO_BLOBS, LedgerEntry
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import CellEnded, Event, Payload, ReplayDiverged, SandboxLeased
from orchestrator.turn import Outcome

CARD = free_model("m", window_tokens=1_000_000, max_output_tokens=32_000)


class Cells:
    """A model that says these cells, one a turn, and answers each sub-call with its prompt backwards."""

    def __init__(self, *cells: str) -> None:
        self._cells = cells
        self.sub_calls: list[str] = []

    async def complete(self, request: ModelRequest) -> Completion:
        if not request.system:
            prompt = str(getattr(request.conversation[0], "text", ""))
            self.sub_calls.append(prompt)
            block: dict[str, object] = {"type": "text", "text": prompt[::-1]}
            return Completion(Reply((block,), StopReason.END_TURN), Usage(input=1, output=1))
        turn = sum(isinstance(entry, Reply) for entry in request.conversation)
        block = {"type": "tool_use", "id": f"t{turn}", "name": "python", "input": {"code": self._cells[turn]}}
        return Completion(Reply((block,), StopReason.TOOL_USE), Usage(input=1, output=1))

    async def aclose(self) -> None:
        pass


class MortalStore(MemoryRunStore):
    """Takes nothing more once so many cells have ended, as if its process was gone."""

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        if self.cells == 0:
            raise StoreError("the process is dead")
        await super().append(run_id, expected_seq, events, blobs=blobs, ledger_entries=ledger_entries)
        self.cells -= sum(isinstance(event.payload, CellEnded) for event in events)

    def of(self, run_id: RunId, kind: type[Payload]) -> list[Payload]:
        """The run's events of a kind."""
        return [event.payload for event in self._events[run_id] if isinstance(event.payload, kind)]

    def outputs(self, run_id: RunId) -> list[str]:
        """What its cells printed, as their model was told."""
        return [str(one.output).strip() for one in self.of(run_id, CellEnded) if isinstance(one, CellEnded)]


@asynccontextmanager
async def machine_of(settings: Settings) -> AsyncIterator[Machine]:
    async with open_workplace(settings) as place, open_machine(settings, place, runtime="runc") as machine:
        yield machine


async def live(
    settings: Settings, run_id: RunId, model: Cells, store: MemoryRunStore, *, resume: bool
) -> RunResult:
    """One orchestrator, from its start to the end of the run or to its own."""
    account = MemoryTenantAccount(Amounts(*(UNLIMITED,) * 4))
    roles = dict.fromkeys(("root", "sub"), Model(CARD, model))
    async with machine_of(settings) as machine:
        context = machine.contexts.stage_text(LOCAL_TENANT, b"the context\n")
        try:
            return await root_run(
                run_id,
                RunOptions(question="What?", context_paths=(), model="m", runtime="runc"),
                machine=machine,
                tenant=Tenant(tenant_id=LOCAL_TENANT, account=account),
                models=roles,
                context=context,
                store=store,
                resume=resume,
            )
        finally:
            machine.contexts.release(context)


async def test_a_run_goes_on_in_a_new_container_with_all_that_it_had(settings: Settings) -> None:
    model = Cells(
        "import random\nseen = [random.random()]\nsaid = llm_query('alpha')\nprint(seen, hash('a'), said)",
        "class Counter:\n    def __init__(self): self.n = 0\nc = Counter()\nc.n += len(said)\n"
        "open('/tmp/note', 'w').write(said)\nseen.append(random.random())\n"
        "print(list({'x', 'y', 'z', 'w'}), seen[-1])",
        "print(open('/tmp/note').read(), c.n, len(context), seen, hash('a'), list({'x', 'y', 'z', 'w'}))",
        "FINAL(llm_query(f'{seen} {hash(\"a\")} {random.random()} {c.n}')[::-1])",
    )
    run_id, store = new_run_id(), MortalStore(cells=2)
    with suppress(StoreError):
        await live(settings, run_id, model, store, resume=False)
    assert len(store.of(run_id, CellEnded)) == 2
    assert model.sub_calls == ["alpha"]
    store.cells = -1
    result = await live(settings, run_id, model, store, resume=True)
    assert result.outcome is Outcome.ANSWERED, result.why
    assert not store.of(run_id, ReplayDiverged)
    first, second, third, _ = store.outputs(run_id)
    seen, hashed, _ = first.split()
    order, number = second.rsplit(" ", 1)
    seen = f"{seen.removesuffix(']')}, {number}]"
    assert third == f"ahpla 5 12 {seen} {hashed} {order}"
    assert model.sub_calls[:1] == ["alpha"]
    assert len(model.sub_calls) == 2, "the recorded answer was not asked for again"
    one, other = store.of(run_id, SandboxLeased)
    assert isinstance(one, SandboxLeased)
    assert isinstance(other, SandboxLeased)
    assert one.hash_seed == other.hash_seed
    assert one.sandbox_id != other.sandbox_id
    assert result.answer is not None
    assert result.answer.startswith(f"{seen} {hashed} ")
