"""Contexts kept between runs, so that the next run over the same one need not stage it again.

For a process that serves many runs. Whoever uploads a context puts it here and gets its content id; whoever
starts a run asks for it by tenant and id. What goes, and when, is said in `keeping`.
"""

import threading
import time
from collections.abc import Callable
from typing import NamedTuple

from orchestrator.contexts.keeping import KeepingLimits, Kept, to_go
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.ids import TenantId


class _Key(NamedTuple):
    tenant: TenantId
    content_id: str


class ContextShelf:
    """Owns one reference to each context on it. Any thread may call.

    Args:
        store: Where they are. It outlives the shelf.
        limits: What stays.
        clock_s: Seconds that only go up.
    """

    def __init__(
        self,
        store: ContextStore,
        limits: KeepingLimits | None = None,
        *,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._limits = limits or KeepingLimits()
        self._clock_s = clock_s
        self._lock = threading.Lock()
        self._kept: dict[_Key, tuple[StagedContext, float]] = {}

    def put(self, context: StagedContext) -> str:
        """Keeps a context, whose reference is the shelf's from here on; the id to ask for it by."""
        key = _Key(context.tenant, context.content_id)
        with self._lock:
            before = self._kept.get(key)
            self._kept[key] = (context, self._clock_s())
        if before is not None:
            self._store.release(before[0])
        self.expire()
        return key.content_id

    def take(self, tenant: TenantId, content_id: str) -> StagedContext | None:
        """A reference to a tenant's context, for the caller to release; None if it is not here (any more)."""
        self.expire()
        key = _Key(tenant, content_id)
        with self._lock:
            found = self._kept.get(key)
            if found is None:
                return None
            self._kept[key] = (found[0], self._clock_s())
            # Under the lock: outside of it the shelf could give up its own reference first.
            return self._store.share(found[0])

    def drop(self, tenant: TenantId, content_id: str) -> None:
        """Gives up a tenant's context, if it is here: it is not to be kept any longer."""
        with self._lock:
            found = self._kept.pop(_Key(tenant, content_id), None)
        if found is not None:
            self._store.release(found[0])

    def expire(self) -> int:
        """Gives up what is too old or too much; how many. To be called now and then when nothing else is."""
        with self._lock:
            kept = [
                Kept(key, str(context.files.blob), context.manifest.blob_bytes, asked_for_s)
                for key, (context, asked_for_s) in self._kept.items()
            ]
            gone = [self._kept.pop(key)[0] for key in to_go(kept, self._limits, self._clock_s())]
        for context in gone:
            self._store.release(context)
        return len(gone)

    def close(self) -> None:
        """Gives up everything."""
        with self._lock:
            gone = [context for context, _ in self._kept.values()]
            self._kept.clear()
        for context in gone:
            self._store.release(context)
