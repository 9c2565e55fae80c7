"""Brings one run to its end on this server's machine: its context, its models, its tenant's account."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace

from orchestrator.access import ModelAccess
from orchestrator.app import RunOptions, Tenant, root_run, staged
from orchestrator.contexts.shelf import ContextShelf
from orchestrator.contexts.store import StagedContext
from orchestrator.errors import ConflictError, NotFoundError
from orchestrator.ids import RunId, TenantId
from orchestrator.machine import Machine
from orchestrator.models.choice import Wanted
from orchestrator.models.port import Model
from orchestrator.runs.call_slots import CallSlots
from orchestrator.runs.recorder import Observer
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS
from orchestrator.service.books import Books
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.job import End, Job
from orchestrator.service.rules import Decided, Offer, decide, permits
from orchestrator.store.books import RunRow, TenantRow
from orchestrator.store.port import RunStore
from orchestrator.tenants.port import TenantAccount

MAX_CHAIN = 50
"""Runs that continue one another with one namespace: each runs the cells of all before it again."""

OpenAccount = Callable[[TenantRow, RunId], TenantAccount]
"""The allowance of a tenant, for one run tree."""


class Runner:
    """Runs runs, of all tenants, as many at once as it is asked to."""

    def __init__(
        self,
        *,
        books: Books,
        machine: Machine,
        models: ModelAccess,
        desk: ContextDesk,
        shelf: ContextShelf,
        offer: Offer,
        open_account: OpenAccount,
        max_model_calls: int,
    ) -> None:
        """Runs nothing yet.

        Args:
            books: The database.
            machine: Where they run.
            models: Connected.
            desk: Where the contexts of runs are.
            shelf: Where they are kept between runs, on the machines.
            offer: What runs are decided by.
            open_account: Who pays.
            max_model_calls: Calls of models in flight at once, of all runs.
        """
        self._books = books
        self._machine = machine
        self._models = models
        self._desk = desk
        self._shelf = shelf
        self._offer = offer
        self._open_account = open_account
        self._call_slots = CallSlots(max_model_calls)
        self._content_ids: dict[str, str] = {}
        """On the shelf, by context id."""

    async def run(self, job: Job, observers: Sequence[Observer], *, on_trouble: Callable[[], None]) -> End:
        """Run one to its end.

        Args:
            job: The run, started in the books.
            observers: Told of its events.
            on_trouble: Called when it is the machine that fails it.

        Raises:
            OrchestratorError: It could not be brought to an end.
        """
        row, tenant_id = job.row, job.row.tenant_id
        decided = decide(row.options, job.tenant, self._offer)
        machine = replace(self._machine, leases=self._machine.leases.telling(on_trouble))
        tenant = Tenant(tenant_id=tenant_id, account=self._open_account(job.tenant, row.run_id))
        async with (
            self._context(row, machine, tenant) as context,
            self._models.models(wanted_by(decided)) as models,
        ):
            result = await root_run(
                row.run_id,
                options_of(row, decided),
                machine=machine,
                tenant=tenant,
                models=self._permitted(models, job.tenant),
                context=context,
                observers=(job.bill.add, *observers),
                store=job.record,
                resume=job.resume,
                after=await self._earlier(row),
                call_slots=self._call_slots,
                max_sandboxes=job.tenant.rules.max_concurrent_sandboxes,
            )
        answer = None if result.answer is None else result.answer.encode("utf-8", "replace")
        return End(result.outcome.value, result.why, answer)

    def forget_context(self, tenant_id: TenantId, context_id: str) -> None:
        """A context was deleted: it is not kept on the machine either."""
        content_id = self._content_ids.pop(context_id, None)
        if content_id is not None:
            self._shelf.drop(tenant_id, content_id)

    async def chain_of(self, row: RunRow) -> Sequence[RunId]:
        """The runs whose cells make up the namespace that a run ended with, the first one first.

        Raises:
            ConflictError: One of them was deleted, or there are too many.
            StoreError: The database does not answer.
        """
        chain = [row.run_id]
        one: RunRow | None = row
        while one is not None and one.keeps_namespace and one.continues is not None:
            if len(chain) == MAX_CHAIN:
                raise ConflictError(f"{MAX_CHAIN} runs have continued one another; start afresh")
            one = await self._books.runs.run(one.tenant_id, one.continues)
            if one is None:
                raise ConflictError("a run whose cells its namespace is made of was deleted")
            chain.append(one.run_id)
        return chain[::-1]

    async def _earlier(self, row: RunRow) -> Sequence[tuple[RunId, RunStore]]:
        """What is run again before a run that keeps another's namespace."""
        if not row.keeps_namespace or row.continues is None:
            return ()
        *earlier, _ = await self.chain_of(row)
        return [(run_id, self._books.trees.tree(row.tenant_id, run_id)) for run_id in earlier]

    def _permitted(self, models: Mapping[str, Model], tenant: TenantRow) -> dict[str, Model]:
        """Without a list of its own a run may name all that the settings list: here, what the tenant may."""
        return {
            name: model
            for name, model in models.items()
            if name in {ROOT_ALIAS, SUB_ALIAS} or permits(model.card.name, tenant.rules, self._offer)
        }

    @asynccontextmanager
    async def _context(self, row: RunRow, machine: Machine, tenant: Tenant) -> AsyncIterator[StagedContext]:
        """The run's context, staged; from the shelf where it is kept."""
        kept = await self._kept(row, machine)
        if kept is not None:
            try:
                yield kept
            finally:
                machine.contexts.release(kept)
            return
        context_row = await self._books.contexts.context(row.tenant_id, row.context_id)
        if context_row is None or not context_row.is_complete:
            raise NotFoundError("the run's context is gone")
        async with staged(machine.contexts, tenant, [self._desk.path(context_row)]) as context:
            shared = machine.contexts.share(context)
            self._content_ids[row.context_id] = await asyncio.to_thread(self._shelf.put, shared)
            yield context

    async def _kept(self, row: RunRow, machine: Machine) -> StagedContext | None:
        """The run's context if it is on the shelf. A thread's work: what is too old goes meanwhile."""
        content_id = self._content_ids.get(row.context_id)
        if content_id is None:
            return None
        taking = asyncio.ensure_future(asyncio.to_thread(self._shelf.take, row.tenant_id, content_id))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            await asyncio.wait((taking,))
            kept = taking.result()
            if kept is not None:
                machine.contexts.release(kept)
            raise


def wanted_by(decided: Decided) -> Wanted:
    """The models of a run."""
    return Wanted(roles={ROOT_ALIAS: decided.model, SUB_ALIAS: decided.sub_model}, allow=decided.allow_models)


def options_of(row: RunRow, decided: Decided) -> RunOptions:
    """The run as the composition root takes it."""
    return RunOptions(
        question=row.question,
        context_paths=(),
        model=decided.model,
        sub_model=decided.sub_model,
        allow_models=decided.allow_models,
        dialect=decided.dialect,
        runtime=decided.runtime,
        memoise=decided.memoise,
        limits=decided.limits,
    )
