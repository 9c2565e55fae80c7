"""What all runs of one run tree share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from orchestrator.budget import Account, Amounts
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.conversation import Dialect
from orchestrator.errors import ModelNotAllowedError, ReplayError
from orchestrator.ids import RunId, TenantId
from orchestrator.limits import RunLimits
from orchestrator.models.port import Model
from orchestrator.runs.admission import TreeSlots
from orchestrator.runs.memo import Memo
from orchestrator.runs.model_calls import ModelCalls
from orchestrator.runs.past import RunPast, TreePast
from orchestrator.runs.recorder import Observer, Recorder
from orchestrator.runs.treasury import Treasury
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.store.port import RunStore
from orchestrator.trajectory import Blob, Text
from orchestrator.turn import Outcome

ROOT_ALIAS = "root"
SUB_ALIAS = "sub"


@dataclass(frozen=True, kw_only=True, slots=True)
class RunTree:
    """One run tree: its money, its models, its sandboxes, its record."""

    tenant_id: TenantId
    limits: RunLimits
    treasury: Treasury
    models: Mapping[str, Model]
    """By name, and by the aliases `root` and `sub`. No other model can be asked for."""
    calls: ModelCalls
    slots: TreeSlots
    leases: SandboxLeases
    contexts: ContextStore
    store: RunStore
    observers: Sequence[Observer]
    runtime: str
    dialect: Dialect = Dialect.TOOLS
    """Of all its runs."""
    memo: Memo | None = None
    """Set when identical sub-calls are to be asked once."""
    past: TreePast | None = None
    """Of a tree that is resumed."""

    def model(self, name: str) -> Model:
        """A model of this tree; an empty name is the sub-call model.

        Raises:
            ModelNotAllowedError: It is none of this tree's.
        """
        model = self.models.get(name or SUB_ALIAS)
        if model is None:
            allowed = ", ".join(sorted(self.models))
            raise ModelNotAllowedError(f"this run has no model of that name; it has: {allowed}")
        return model

    def past_of(self, run_id: RunId) -> RunPast | None:
        """What a run did before this process; None when it begins."""
        return None if self.past is None else self.past.run(run_id)

    def recorder(self, run_id: RunId) -> Recorder:
        """The one writer of a run's events."""
        past = self.past_of(run_id)
        return Recorder(run_id, self.store, self.observers, next_seq=past.length if past else 0)


@dataclass(frozen=True, slots=True)
class Earlier:
    """A run that has ended, with whose variables another begins."""

    past: RunPast
    store: RunStore
    """Where its texts are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSpec:
    """One run of a tree, root or child."""

    run_id: RunId
    question: str
    context: StagedContext
    model: Model
    depth: int
    account: Account
    """What it pays from: the tree's, or one of its own below its parent's."""
    parent: RunId | None = None
    parent_call: str = ""
    after: Sequence[Earlier] = ()
    """Runs over the same context, each of which began with the variables of the one before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunResult:
    """How a run ended."""

    outcome: Outcome
    answer: str | None
    why: str
    """Why there is no answer; empty otherwise."""
    found_so_far: str
    """Without an answer: the last thing a cell printed or the model said."""
    turns: int


async def whole_text(store: RunStore, text: Text) -> str:
    """The whole of a recorded text.

    Raises:
        ReplayError: It is not there any more.
    """
    if not isinstance(text, Blob):
        return text
    data = await store.blob(text.sha256)
    if data is None:
        raise ReplayError("a text that the run's events refer to is missing")
    return data.decode("utf-8", "replace")


def limit_amounts(limits: RunLimits) -> Amounts:
    """A tree's limits as its account counts them."""
    return Amounts(
        tokens=limits.max_tokens,
        cost_microusd=limits.max_cost_microusd,
        calls=limits.max_calls,
        child_runs=limits.max_child_runs,
    )
