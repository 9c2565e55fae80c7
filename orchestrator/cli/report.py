"""What is left of a run: the `--json` object, and a few lines for people."""

from collections.abc import Iterator
from dataclasses import asdict

from orchestrator.app import RunReport
from orchestrator.cli import words
from orchestrator.limits import RunLimits

_FOUND_CHARS = 4_000


def as_json(report: RunReport) -> dict[str, object]:
    """The object of `--json`, documented in docs/command-line.md. Keys may be added, never renamed."""
    tally = report.tally
    return {
        "run_id": report.run_id or None,
        "outcome": report.outcome.value,
        "answer": report.answer,
        "usage": {
            "input_tokens": tally.usage.input,
            "output_tokens": tally.usage.output,
            "cache_read_tokens": tally.usage.cache_read,
            "cache_write_tokens": tally.usage.cache_write,
            "unconfirmed_tokens": tally.unconfirmed.tokens,
            "cost_usd": _usd(tally.confirmed.cost_microusd),
            "unconfirmed_cost_usd": _usd(tally.unconfirmed.cost_microusd),
            "model_calls": tally.confirmed.calls + tally.unconfirmed.calls,
            "child_runs": tally.child_runs,
        },
        "limits": _limits(report.limits),
        "turns": tally.root_turns,
        "max_depth_reached": tally.max_depth_reached,
        "duration_s": round(report.duration_s, 3),
        "error": report.error or None,
        "found_so_far": report.found_so_far or None,
        "context_bytes": report.context_bytes,
        "notes": list(report.notes),
    }


def summary(report: RunReport, *, scripted: bool, notes: bool) -> Iterator[str]:
    """For people, on stderr; hostile text in it is not visible yet.

    Args:
        report: What became of the run.
        scripted: A script played one of its models.
        notes: Tell those about the context. Plain lines told them when it was staged.
    """
    label = words.SCRIPTED_LABEL if scripted else ""
    if notes:
        yield from (f"rlm: {note}" for note in report.notes)
    turns = words.many(report.tally.root_turns, "turn")
    why = f": {report.error}" if report.error else ""
    took = words.duration(report.duration_s)
    yield f"{label}rlm: {report.outcome.value} after {turns}, {took}{why}"
    yield f"rlm: used {words.used(report.tally)}"
    if report.answer is None and report.found_so_far:
        yield f"{label}rlm: found so far:"
        found = report.found_so_far
        if len(found) > _FOUND_CHARS:
            # The end of an output tells more than its beginning.
            yield f"{label}  … {len(found) - _FOUND_CHARS:,} characters before"
            found = found[-_FOUND_CHARS:]
        for line in found.rstrip("\n").split("\n"):
            yield f"{label}  {line}"


def _limits(limits: RunLimits) -> dict[str, float]:
    named: dict[str, float] = asdict(limits)
    named["max_cost_usd"] = _usd(limits.max_cost_microusd)
    del named["max_cost_microusd"]
    return named


def _usd(microusd: int) -> float:
    # The nearest double prints as the exact six decimals, up to nine billion dollars.
    return microusd / 1_000_000
