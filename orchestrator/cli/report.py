"""What is left of a run: the `--json` object, and a few lines for people."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict

from orchestrator.cli import words
from orchestrator.limits import RunLimits
from orchestrator.run_report import RunReport, WholeContext
from orchestrator.trajectory import Line

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
        "usage_by_model_and_depth": [
            _line(model, depth, line) for (model, depth), line in sorted(tally.lines.items())
        ],
        "whole_context_once": _whole_context(report.whole_context),
        "limits": _limits(report.limits),
        "turns": tally.root_turns,
        "sandboxes_lost": list(tally.losses),
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
    if report.tally.losses:
        reasons = Counter(loss.replace("_", " ") for loss in report.tally.losses)
        counts = ", ".join(f"{count:,} {reason}" for reason, count in sorted(reasons.items()))
        yield f"rlm: sandboxes lost under a cell: {counts}"
    yield f"rlm: used {words.used(report.tally)}"
    if len(report.tally.lines) > 1:
        yield from (
            f"rlm:   {_line_in_words(*key, line)}" for key, line in sorted(report.tally.lines.items())
        )
    if report.whole_context is not None:
        whole = report.whole_context
        window = "" if whole.fits_window else "; it does not fit the root model's window"
        yield (
            f"rlm: sending the whole context once would have been about {whole.tokens:,} tokens, "
            f"{words.dollars(whole.cost_microusd)}{window}"
        )
    if report.answer is None and report.found_so_far:
        yield f"{label}rlm: found so far:"
        found = report.found_so_far
        if len(found) > _FOUND_CHARS:
            # The end of an output tells more than its beginning.
            yield f"{label}  … {len(found) - _FOUND_CHARS:,} characters before"
            found = found[-_FOUND_CHARS:]
        for line in found.rstrip("\n").split("\n"):
            yield f"{label}  {line}"


def _line_in_words(model: str, depth: int, line: Line) -> str:
    counts = ((line.retried, "retried"), (line.refused, "refused"), (line.memoised, "memoised"))
    parts = [
        f"{line.usage.total:,} tokens",
        words.dollars(line.cost_microusd),
        words.many(line.calls, "call"),
    ]
    parts += [f"{count:,} {what}" for count, what in counts if count]
    return f"{model} at depth {depth}: {' · '.join(parts)}"


def _line(model: str, depth: int, line: Line) -> dict[str, object]:
    return {
        "model": model,
        "depth": depth,
        "input_tokens": line.usage.input,
        "output_tokens": line.usage.output,
        "cache_read_tokens": line.usage.cache_read,
        "cache_write_tokens": line.usage.cache_write,
        "unconfirmed_tokens": line.unconfirmed.tokens,
        "cost_usd": _usd(line.cost_microusd),
        "calls": line.calls,
        "retried": line.retried,
        "refused": line.refused,
        "memoised": line.memoised,
    }


def _whole_context(whole: WholeContext | None) -> dict[str, object] | None:
    if whole is None:
        return None
    return {
        "estimated_tokens": whole.tokens,
        "estimated_cost_usd": _usd(whole.cost_microusd),
        "fits_window": whole.fits_window,
    }


def _limits(limits: RunLimits) -> dict[str, float]:
    named: dict[str, float] = asdict(limits)
    named["max_cost_usd"] = _usd(limits.max_cost_microusd)
    del named["max_cost_microusd"]
    return named


def _usd(microusd: int) -> float:
    # The nearest double prints as the exact six decimals, up to nine billion dollars.
    return microusd / 1_000_000
