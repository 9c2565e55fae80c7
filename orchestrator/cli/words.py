"""Amounts as people read them."""

from orchestrator.limits import RunLimits
from orchestrator.trajectory import Tally

SCRIPTED_LABEL = "[scripted] "
"""In front of every line that shows what a scripted model said or did."""


def duration(seconds: float) -> str:
    """`0.3 s`, `12 s`, `1:05`, `1:02:03`."""
    seconds = max(0.0, seconds)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, left = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{left:02}" if hours else f"{minutes}:{left:02}"


def dollars(microusd: int) -> str:
    """To a hundredth of a cent, or exactly when that would read as nothing."""
    return (
        f"${microusd / 1_000_000:.4f}" if microusd >= 100 or not microusd else f"${microusd / 1_000_000:.6f}"
    )


def many(count: int, word: str) -> str:
    """`1 turn`, `2,000 turns`."""
    return f"{count:,} {word}" if count == 1 else f"{count:,} {word}s"


def used(tally: Tally) -> str:
    """What a run tree has used, on one line; what no provider has confirmed is named apart."""
    both = tally.confirmed.plus(tally.unconfirmed)
    text = f"{many(both.tokens, 'token')} · {dollars(both.cost_microusd)} · {many(both.calls, 'model call')}"
    text += f" · {many(tally.child_runs, 'child run')}"
    if any(tally.unconfirmed):
        text += (
            f" (of these unconfirmed: {many(tally.unconfirmed.tokens, 'token')},"
            f" {dollars(tally.unconfirmed.cost_microusd)})"
        )
    return text


def left(tally: Tally, limits: RunLimits, elapsed_s: float) -> str:
    """What its limits leave."""
    both = tally.confirmed.plus(tally.unconfirmed)
    return " · ".join(
        (
            many(max(0, limits.max_tokens - both.tokens), "token"),
            dollars(max(0, limits.max_cost_microusd - both.cost_microusd)),
            many(max(0, limits.max_calls - both.calls), "model call"),
            many(max(0, limits.max_child_runs - tally.child_runs), "child run"),
            duration(limits.deadline_s - elapsed_s),
        )
    )
