"""Who is told what the service does: metrics, traces, logs."""

from typing import Protocol

from orchestrator.errors import OrchestratorError
from orchestrator.ids import TenantId
from orchestrator.runs.recorder import Observer
from orchestrator.store.books import RunRow


class ServiceHook(Protocol):
    """Told of every run from its creation to its end.

    A hook returns at once, awaits nothing and never raises: it is called between two steps of the service.
    What it makes of a run never holds a prompt, an output or a key.
    """

    def created(self, run: RunRow) -> None:
        """It is stored and queued."""
        ...

    def refused(self, tenant_id: TenantId, error: OrchestratorError) -> None:
        """A run was asked for and not created."""
        ...

    def observer(self, run: RunRow) -> Observer:
        """Who sees the events of the run's whole tree, from now on. Asked for when it starts or goes on."""
        ...

    def left(self, run: RunRow) -> None:
        """It runs here no longer: it has ended, or is left to another server. Late settlements may follow."""
        ...
