"""The Python client of `rlm serve` (docs/client.md)."""

from orchestrator.client.channel import Tls
from orchestrator.client.client import Client
from orchestrator.client.patience import Patience
from orchestrator.client.sync import SyncClient, ask
from orchestrator.client.values import (
    Answer,
    Context,
    Created,
    Run,
    RunOptions,
    RunState,
    Uploaded,
    Usage,
)

__all__ = [
    "Answer",
    "Client",
    "Context",
    "Created",
    "Patience",
    "Run",
    "RunOptions",
    "RunState",
    "SyncClient",
    "Tls",
    "Uploaded",
    "Usage",
    "ask",
]
