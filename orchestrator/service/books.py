"""The database as the service uses it."""

from dataclasses import dataclass

from orchestrator.store.books import (
    AuditBook,
    ContextBook,
    HomeBook,
    RoomBook,
    RunBook,
    TenantBook,
    TreeBook,
    UsageBook,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Books:
    """All that the service keeps, in one place."""

    tenants: TenantBook
    runs: RunBook
    contexts: ContextBook
    usage: UsageBook
    trees: TreeBook
    audit: AuditBook
    homes: HomeBook
    rooms: RoomBook
