"""What became of a run, for whoever asked: here, or of a server."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.trajectory import Tally
from orchestrator.turn import Outcome


@dataclass(frozen=True, kw_only=True, slots=True)
class WholeContext:
    """An estimate: the context's bytes times the tokens per byte that this run's own calls were billed."""

    tokens: int
    cost_microusd: int
    """Of the input alone, at the root model's price."""
    fits_window: bool
    """Whether the root model could have read it at all."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunReport:
    """What became of a run."""

    run_id: RunId
    outcome: Outcome
    answer: str | None
    error: str
    """Why there is no answer; empty otherwise."""
    found_so_far: str
    """Without an answer: the last output or text, so that paid work is not lost. Hostile text."""
    tally: Tally
    limits: RunLimits
    duration_s: float
    context_bytes: int
    whole_context: WholeContext | None = None
    """What sending all of it once to the root model would have cost; None when nothing was measured."""
    notes: Sequence[str]
    """About the context: replaced bytes, skipped links."""
