"""The composition root: the one place that knows every part and puts them together."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orchestrator.config import Settings
from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.trajectory import Event, Tally
from orchestrator.turn import Outcome

Observer = Callable[[Event], None]
"""Called with each event, in order within a run, after it is stored. Must be quick and must not raise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunOptions:
    """One question, as the command line or a library user asks it."""

    question: str
    context_paths: Sequence[Path]
    model: str
    """`scripted:FILE.py` for a model played by a script."""
    sub_model: str = ""
    """For sub-calls and child runs; empty for `model`."""
    base_url: str = ""
    """Of any server that speaks the Anthropic Messages API; empty for Anthropic's own."""
    runtime: str = "runc"
    limits: RunLimits = field(default_factory=RunLimits)
    price_input_usd_per_mtok: float | None = None
    """For models without a known price. Both or neither; 0 is allowed."""
    price_output_usd_per_mtok: float | None = None


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
    notes: Sequence[str]
    """About the context: replaced bytes, skipped links."""


async def run(
    options: RunOptions,
    settings: Settings,
    *,
    observers: Sequence[Observer] = (),
    say: Callable[[str], None] = lambda _line: None,
) -> RunReport:
    """Answer one question, and leave nothing behind.

    Cancelling it ends the run with its containers gone; what was spent is then in the events only. The answer
    and everything else that a model or a guest wrote is hostile text: make it visible before a terminal sees it.

    Args:
        options: The question and its limits.
        settings: The process's settings.
        observers: See `Observer`.
        say: Told what is being waited for, one line at a time.

    Raises:
        CallerError: What the caller can change in the call: the context, the model, a limit.
        MachineError: What the machine lacks: a key, an engine, an image, an address that answers.
    """
    raise NotImplementedError
