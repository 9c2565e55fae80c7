"""The composition root: the one place that knows every part and puts them together."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from orchestrator.access import chosen, open_models
from orchestrator.broker.service import serve_broker
from orchestrator.budget import UNLIMITED, ZERO, Amounts
from orchestrator.config import Settings
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.conversation import Dialect
from orchestrator.errors import InvalidRequestError, ReplayError
from orchestrator.ids import LOCAL_TENANT, RunId, TenantId, new_run_id
from orchestrator.limits import RunLimits
from orchestrator.machine import Machine, open_machine, open_workplace
from orchestrator.models.choice import HandPrice, Wanted
from orchestrator.models.port import Model
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.pricing import ModelCard, Usage
from orchestrator.run_report import RunReport, WholeContext
from orchestrator.runs.call_slots import CallSlots
from orchestrator.runs.memo import Memo
from orchestrator.runs.model_calls import ModelCalls
from orchestrator.runs.past import TreePast
from orchestrator.runs.recorder import Observer
from orchestrator.runs.resuming import (
    end_left_behind,
    end_unresumed,
    read_earlier,
    remember,
    take_up,
)
from orchestrator.runs.run import result_of, run_to_end
from orchestrator.runs.treasury import Treasury
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS, RunResult, RunSpec, RunTree, limit_amounts
from orchestrator.sandbox.runtimes import runtime_for
from orchestrator.shielding import run_shielded
from orchestrator.store.memory import MemoryRunStore
from orchestrator.store.port import RunStore
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.tenants.port import TenantAccount
from orchestrator.trajectory import Tally
from orchestrator.turn import Outcome

_NO_QUOTA = Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED)
"""Of the one tenant of the command line: its run's own limits are what binds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """One question, as the command line or a library user asks it."""

    question: str
    context_paths: Sequence[Path]
    model: str
    """`scripted:FILE.py` for a model played by a script."""
    sub_model: str = ""
    """For sub-calls and child runs; empty for `model`."""
    allow_models: Sequence[str] = ()
    """Models that cells may name besides, each `MODEL` or `NAME=MODEL`."""
    dialect: Dialect = Dialect.TOOLS
    """How the models of all runs ask for cells."""
    runtime: str | None = None
    """`runc` or `runsc`; None for gVisor where the settings hold the tenant to it, and else runc."""
    memoise: bool = False
    """Ask identical sub-calls (same model, prompt and options) once and pay them once."""
    limits: RunLimits = field(default_factory=RunLimits)
    price_input_usd_per_mtok: Decimal | None = None
    """For models without a known price. Both or neither; 0 is allowed."""
    price_output_usd_per_mtok: Decimal | None = None
    window_tokens: int | None = None
    """Of the models priced so; None for 200,000."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tenant:
    """Who pays for a run tree, and is isolated from all other tenants."""

    tenant_id: TenantId
    account: TenantAccount
    """Shared by all of the tenant's run trees."""


async def run(
    options: RunOptions,
    settings: Settings,
    *,
    provider: ProviderProcess | None = None,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> RunReport:
    """Answer one question, and leave nothing behind.

    Cancelling it ends the run with its containers gone; what was spent is then in the events only. Whatever
    a model or a guest wrote, the answer too, is hostile text: make it visible before a terminal sees it.

    Args:
        options: The question and its limits.
        settings: The process's settings.
        provider: Has the provider's credentials; None for a run of scripted models alone. It serves one run.
        observers: See `Observer`.
        say: Told what is being waited for, one line at a time.

    Raises:
        CallerError: What the caller can change in the call: the context, the model, a limit.
        MachineError: What the machine lacks: a key, an engine, an image, an address that answers.
    """
    if not options.question.strip():
        raise InvalidRequestError("the question is empty")
    started_s = time.monotonic()
    tally = Tally()
    wanted = _wanted(options)
    # A model that may not be used is the caller's mistake, and is said before anything is opened.
    chosen(wanted, settings)
    runtime = runtime_for(LOCAL_TENANT, options.runtime, held_to_gvisor=settings.runsc_tenants)
    async with open_workplace(settings) as workplace:
        say("staging the context")
        tenant = Tenant(tenant_id=LOCAL_TENANT, account=MemoryTenantAccount(_NO_QUOTA))
        async with staged(workplace.contexts, tenant, options.context_paths) as context:
            for note in context.notes:
                say(note)
            async with (
                # The engine first: the provider process imports its library meanwhile.
                open_machine(settings, workplace, runtime=runtime) as machine,
                open_models(wanted, settings, provider) as models,
            ):
                for warning in _warnings(machine, settings):
                    say(warning)
                say("starting a sandbox")
                run_id = new_run_id()
                result = await root_run(
                    run_id,
                    options,
                    machine=machine,
                    tenant=tenant,
                    models=models,
                    context=context,
                    observers=(tally.add, *observers),
                )
            return RunReport(
                run_id=run_id,
                outcome=result.outcome,
                answer=result.answer,
                error=result.why,
                found_so_far=result.found_so_far,
                tally=tally,
                limits=options.limits,
                duration_s=time.monotonic() - started_s,
                context_bytes=context.manifest.text_bytes,
                whole_context=_whole_context(tally, context.manifest.text_bytes, models[ROOT_ALIAS].card),
                notes=context.notes,
            )


async def root_run(
    run_id: RunId,
    options: RunOptions,
    *,
    machine: Machine,
    tenant: Tenant,
    models: Mapping[str, Model],
    context: StagedContext,
    observers: Sequence[Observer] = (),
    store: RunStore | None = None,
    resume: bool = False,
    after: Sequence[tuple[RunId, RunStore]] = (),
    call_slots: CallSlots | None = None,
    max_sandboxes: int | None = None,
) -> RunResult:
    """One run tree on a machine that may run others at the same time, of this tenant or of another.

    It waits until the machine has room for a chain of its sandboxes. Cancelling it ends it as `cancelled`.

    A run tree whose orchestrator was killed goes on from its record (`runs/replay.py`): what was settled is
    not asked again, what was under way is settled at its whole hold before anything else and asked for once
    more at most. Its limits and its deadline count from its first start. One that was never begun is begun;
    one that has ended, or whose record is broken, ends at once, the latter as `internal_error`.

    Args:
        run_id: Of the root run.
        options: The question and its limits. What they say of context and models was used for the two below.
        machine: Where it runs.
        tenant: Who pays.
        models: Connected, by name, role and alias; open for as long as the run.
        context: Staged for this tenant, and kept by the caller for as long as the run.
        observers: See `Observer`. Of a run that is resumed they are told only what is new.
        store: Keeps the events; None for as long as the run.
        resume: Whether the store may have a past of this run. All other arguments are what they were then.
            The tenant's account counts what the tree used as drawn, whoever drew it.
        after: Root runs of the tenant's over the same context that have ended, and where their events are:
            their cells are run again first, with their recorded answers, so that their variables are there.
            Of several, each began with the variables of the one before.
        call_slots: Shared by all run trees that ask the same provider; None where there is one tree.
        max_sandboxes: Of all the tenant's run trees on this machine together; None for no limit.

    Raises:
        InvalidRequestError: The tenant may not have this runtime; a run to continue has not ended.
        ReplayError: The record of a run to continue is broken.
        MachineError: The machine lacks something; only before the first turn, or the first after a restart.
    """
    runtime = runtime_for(tenant.tenant_id, options.runtime, held_to_gvisor=machine.held_to_gvisor)
    limits = options.limits
    store = MemoryRunStore() if store is None else store
    earlier = [await read_earlier(one, its_store) for one, its_store in after]
    past: TreePast | None = None
    if resume:
        try:
            past = await take_up(run_id, tenant_id=tenant.tenant_id, store=store, observers=observers)
        except ReplayError as error:
            why = f"the run cannot be resumed: {error}"
            await end_unresumed(run_id, why, tenant_id=tenant.tenant_id, store=store, observers=observers)
            return RunResult(outcome=Outcome.INTERNAL_ERROR, answer=None, why=why, found_so_far="", turns=0)
    before = None if past is None else past.run(run_id)
    if before is not None and before.ended is not None:
        return result_of(before.ended, before.answer)
    elapsed_s = 0.0 if before is None else before.elapsed_s(time.time())
    treasury = Treasury(
        tenant.account, limit_amounts(limits), used=(ZERO, ZERO) if past is None else past.used(run_id)
    )
    memo = Memo() if options.memoise else None
    if memo is not None and past is not None:
        await remember(memo, past, store)
    calls = ModelCalls(
        tenant.tenant_id,
        treasury,
        max_concurrency=limits.max_concurrency,
        deadline_at_s=time.monotonic() + limits.deadline_s - elapsed_s,
        slots=call_slots,
    )
    admitted = machine.slots.admit(limits.max_depth, tenant_id=tenant.tenant_id, most=max_sandboxes)
    async with admitted as slots:
        tree = RunTree(
            tenant_id=tenant.tenant_id,
            limits=limits,
            treasury=treasury,
            models=models,
            calls=calls,
            slots=slots,
            leases=machine.leases,
            contexts=machine.contexts,
            store=store,
            observers=observers,
            runtime=runtime,
            dialect=options.dialect,
            memo=memo,
            past=past,
        )
        spec = RunSpec(
            run_id=run_id,
            question=options.question,
            context=context,
            model=models[ROOT_ALIAS],
            depth=0,
            account=treasury.account,
            after=earlier,
        )
        try:
            return await run_to_end(tree, spec, serve_broker)
        finally:
            await run_shielded(_wind_up(tree))


async def _wind_up(tree: RunTree) -> None:
    try:
        if tree.past is not None:
            await end_left_behind(tree.past, tree.store, tree.observers)
    finally:
        await tree.treasury.close()


@asynccontextmanager
async def staged(
    contexts: ContextStore, tenant: Tenant, paths: Sequence[Path]
) -> AsyncIterator[StagedContext]:
    """The staged context, for the length of the block. Cancelling stops the staging between two chunks.

    Raises:
        CallerError: The context cannot be read, or is none.
    """
    stopped = False
    staging = asyncio.ensure_future(
        asyncio.to_thread(contexts.stage_paths, tenant.tenant_id, paths, cancelled=lambda: stopped)
    )
    try:
        context = await asyncio.shield(staging)
    except asyncio.CancelledError:
        stopped = True
        await asyncio.wait((staging,))
        if staging.exception() is None:
            contexts.release(staging.result())
        raise
    try:
        yield context
    finally:
        contexts.release(context)


def _whole_context(tally: Tally, context_bytes: int, card: ModelCard) -> WholeContext | None:
    tokens_per_byte = tally.input_tokens_per_byte()
    if tokens_per_byte is None:
        return None
    tokens = round(context_bytes * tokens_per_byte)
    return WholeContext(
        tokens=tokens,
        cost_microusd=card.cost_microusd(Usage(input=tokens)),
        fits_window=tokens <= card.window_tokens,
    )


def _warnings(machine: Machine, settings: Settings) -> Iterator[str]:
    """What whoever starts a run on this machine should know, a line each. `rlm doctor` says all of it."""
    for objection in machine.objections:
        if objection.name.endswith(" version"):
            yield f"warning: {objection.detail}; `rlm doctor` says what to do"
    if settings.debug_switches:
        yield (
            f"warning: {', '.join(settings.debug_switches)} may write what models and cells say to this"
            " terminal, control characters included"
        )


def _wanted(options: RunOptions) -> Wanted:
    return Wanted(
        roles={ROOT_ALIAS: options.model, SUB_ALIAS: options.sub_model or options.model},
        allow=options.allow_models,
        by_hand=_price_by_hand(options),
    )


def _price_by_hand(options: RunOptions) -> HandPrice | None:
    price_input, price_output = options.price_input_usd_per_mtok, options.price_output_usd_per_mtok
    if price_input is None and price_output is None:
        if options.window_tokens is not None:
            raise InvalidRequestError("--window-tokens is for a model with --price-input and --price-output")
        return None
    if price_input is None or price_output is None:
        raise InvalidRequestError("give both --price-input and --price-output, or neither")
    return HandPrice(input_usd=price_input, output_usd=price_output, window_tokens=options.window_tokens)
