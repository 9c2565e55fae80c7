"""The Python client of `rlm serve` (docs/client.md)."""

from orchestrator.client.admin import AdminClient
from orchestrator.client.channel import Tls
from orchestrator.client.client import Client
from orchestrator.client.patience import Patience
from orchestrator.client.sync import SyncAdminClient, SyncClient, ask
from orchestrator.client.values import (
    AddedKey,
    AddedTenant,
    Answer,
    Context,
    Created,
    Key,
    Run,
    RunOptions,
    RunState,
    Tenant,
    Uploaded,
    Usage,
)
from orchestrator.store.books import Quota, Role, TenantRules
from orchestrator.store.rule_changes import Limit, RuleChanges

__all__ = [
    "AddedKey",
    "AddedTenant",
    "AdminClient",
    "Answer",
    "Client",
    "Context",
    "Created",
    "Key",
    "Limit",
    "Patience",
    "Quota",
    "Role",
    "RuleChanges",
    "Run",
    "RunOptions",
    "RunState",
    "SyncAdminClient",
    "SyncClient",
    "Tenant",
    "TenantRules",
    "Tls",
    "Uploaded",
    "Usage",
    "ask",
]
