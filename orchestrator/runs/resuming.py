"""Takes a run tree up again from its record: reads it, and settles what a crash left open in it."""

from collections.abc import Mapping, Sequence

from orchestrator.conversation import Reply, StopReason
from orchestrator.errors import InvalidRequestError
from orchestrator.ids import RunId, TenantId
from orchestrator.models.port import Completion
from orchestrator.pricing import Usage
from orchestrator.runs.memo import Memo
from orchestrator.runs.past import RunPast, TreePast, child_ids, left_open, long_texts, read_run
from orchestrator.runs.recorder import Observer, Recorder
from orchestrator.runs.tree import Earlier, whole_text
from orchestrator.store.port import LedgerEntry, RunStore
from orchestrator.trajectory import Blob, CallSettled, Event, Payload, RunEnded, Text, TurnStarted
from orchestrator.turn import Outcome


async def take_up(
    run_id: RunId, *, tenant_id: TenantId, store: RunStore, observers: Sequence[Observer] = ()
) -> TreePast | None:
    """A run tree's past, with everything settled that a crash left open.

    What is settled is stored before this returns, with its ledger entries; a second time there is nothing to
    settle. Nobody else may write to the tree's runs.

    Args:
        run_id: Of the root run.
        tenant_id: Who pays.
        store: Has the events.
        observers: Told of what is settled.

    Returns:
        None when nothing was recorded: the run can only begin.

    Raises:
        ReplayError: The events are not what a run tree of ours leaves behind.
        MachineError: The store does not answer.
    """
    runs = await settle(run_id, tenant_id=tenant_id, store=store, observers=observers)
    if not runs:
        return None
    return TreePast([await _read_run(events, store) for events in runs.values()])


async def settle(
    run_id: RunId, *, tenant_id: TenantId, store: RunStore, observers: Sequence[Observer] = ()
) -> Mapping[RunId, Sequence[Event]]:
    """Settle what a crash left open in a run tree, and do nothing else with it.

    What is settled is stored before this returns, with its ledger entries; a second time there is nothing to
    settle. Nobody else may write to the tree's runs.

    Args:
        run_id: Of the root run.
        tenant_id: Who pays.
        store: Has the events.
        observers: Told of what is settled.

    Returns:
        The events of all runs that have begun, the settlements too; parents come before their children.

    Raises:
        MachineError: The store does not answer.
    """
    runs = await _read_tree(run_id, store)
    await _settle(runs, tenant_id, store, observers)
    return runs


async def read_earlier(run_id: RunId, store: RunStore) -> Earlier:
    """A run that has ended, for another to continue.

    Raises:
        InvalidRequestError: It has not ended.
        ReplayError: Its events are not what a run of ours leaves behind.
        MachineError: The store does not answer.
    """
    events = [event async for event in store.events(run_id)]
    if not any(isinstance(event.payload, RunEnded) for event in events):
        raise InvalidRequestError("the run to continue has not ended")
    return Earlier(await _read_run(events, store), store)


async def end_unresumed(
    run_id: RunId,
    why: str,
    *,
    tenant_id: TenantId,
    store: RunStore,
    outcome: Outcome = Outcome.INTERNAL_ERROR,
    observers: Sequence[Observer] = (),
) -> None:
    """End a run that was interrupted and does not go on. What it recorded so far stays readable.

    Settles what the crash left open, as `take_up` does. Runs of its tree that have ended stay as they are.

    Args:
        run_id: Of the root run.
        why: One sentence.
        tenant_id: Who pays.
        store: Has the events.
        outcome: How it ends, with all runs of its tree that had not ended.
        observers: Told of the end.

    Raises:
        MachineError: The store does not answer.
    """
    runs = await settle(run_id, tenant_id=tenant_id, store=store, observers=observers)
    # Children first, as when a run ends by itself.
    for events in reversed(list(runs.values())):
        if not any(isinstance(event.payload, RunEnded) for event in events):
            await _record_end(events, outcome, why, store, observers)


async def end_left_behind(past: TreePast, store: RunStore, observers: Sequence[Observer] = ()) -> None:
    """End the runs of a tree that nobody took up again, because their parent did not ask for them any more.

    Args:
        past: Of a tree whose root run has ended.
        store: Has the events.
        observers: Told of the ends.
    """
    for run in past:
        if run.ended is None and run.started.parent is not None:
            events = [event async for event in store.events(run.run_id)]
            if len(events) == run.length:
                why = "its parent's cell did not ask for it again after a restart"
                await _record_end(events, Outcome.CANCELLED, why, store, observers)


async def _record_end(
    events: Sequence[Event], outcome: Outcome, why: str, store: RunStore, observers: Sequence[Observer]
) -> None:
    turns = max(event.payload.turn if isinstance(event.payload, TurnStarted) else 0 for event in events)
    ended = RunEnded(
        outcome=outcome.value,
        answer=None,
        error=why,
        turns=turns,
        duration_s=max(0.0, events[-1].at - events[0].at),
    )
    await Recorder(events[0].run_id, store, observers, next_seq=len(events)).record(ended)


async def remember(memo: Memo, past: TreePast, store: RunStore) -> None:
    """Fill a tree's memo with what its sub-calls were answered before.

    Raises:
        ReplayError: A text is missing.
    """
    for run in past:
        for cell in run.cells.values():
            for call in cell.calls.values():
                if call.started.what == "complete" and call.ended is not None and not call.ended.error:
                    text = await whole_text(store, call.ended.answer)
                    stop = StopReason.MAX_TOKENS if call.ended.truncated else StopReason.END_TURN
                    reply = Reply(({"type": "text", "text": text},), stop)
                    memo.know(call.started.request_hash, Completion(reply, Usage()))


async def _read_run(events: Sequence[Event], store: RunStore) -> RunPast:
    texts = {blob.sha256: await whole_text(store, blob) for blob in long_texts(events)}

    def text_of(text: Text) -> str:
        return texts[text.sha256] if isinstance(text, Blob) else text

    return read_run(events, text_of)


async def _read_tree(run_id: RunId, store: RunStore) -> dict[RunId, list[Event]]:
    """The events of all runs of a tree that have begun, parents before their children."""
    runs: dict[RunId, list[Event]] = {}
    wanted = [run_id]
    while wanted:
        one = wanted.pop()
        events = [] if one in runs else [event async for event in store.events(one)]
        if events:
            runs[one] = events
            # Each once: a call that was lost is recorded again when it is asked again.
            wanted.extend(dict.fromkeys(child_ids(events)))
    return runs


async def _settle(
    runs: dict[RunId, list[Event]], tenant_id: TenantId, store: RunStore, observers: Sequence[Observer]
) -> None:
    payloads: dict[RunId, list[Payload]] = {}
    for run_id, payload in left_open([event for events in runs.values() for event in events]):
        payloads.setdefault(run_id, []).append(payload)
    for run_id, open_ones in payloads.items():
        recorder = Recorder(run_id, store, (runs[run_id].append, *observers), next_seq=len(runs[run_id]))
        entries = [
            LedgerEntry(
                tenant_id=tenant_id,
                run_id=run_id,
                call=settled.call,
                attempt=settled.attempt,
                confirmed=settled.confirmed,
                unconfirmed=settled.unconfirmed,
            )
            for settled in open_ones
            if isinstance(settled, CallSettled)
        ]
        await recorder.record(*open_ones, ledger_entries=entries)
