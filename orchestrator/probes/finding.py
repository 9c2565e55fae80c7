"""What a probe is, and what it found.

A probe asks whether one door of the sandbox is closed. A guest file tries it and prints facts; a judge on the
host, which is pure, says what of them is open. A probe that did not run found nothing: that is a failure too.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from orchestrator.probes.host import Host, HostUnseenError

Facts = Mapping[str, Any]
"""What a guest file printed, read from JSON. A judge may take any shape for granted: if a fact is missing or
of another kind, its probe did not run."""


@dataclass(frozen=True, slots=True)
class Differs:
    """A door that leads no further than gVisor's own kernel, inside the sandbox. Under runc it is closed."""

    how: str


Judge = Callable[[Facts, Host], Iterable[str | Differs]]
"""What is open, each in a few words; nothing when the door is closed."""

_MAX_DETAIL_CHARS = 400


class Verdict(Enum):
    """What became of a probe."""

    CLOSED = "closed"
    DIFFERS = "closed differently"
    """Not tried in vain, but what answered is gVisor's own, and nothing of the host was reached."""
    OPEN = "open"
    DID_NOT_RUN = "did not run"


@dataclass(frozen=True, slots=True)
class Probe:
    """One door."""

    case: str
    """Its id among the attack cases."""
    title: str
    """What holds when it is closed."""
    source: str
    """The guest file that tries it; several probes may read one file's facts."""
    judge: Judge


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one probe found on one runtime."""

    case: str
    title: str
    verdict: Verdict
    detail: str
    """What is open, what differs, or why it did not run. It quotes the guest: make it visible first."""
    runtime: str

    @property
    def ok(self) -> bool:
        """Whether the door is known to be closed."""
        return self.verdict in {Verdict.CLOSED, Verdict.DIFFERS}


def read_facts(source: str, printed: str) -> Facts:
    """The facts in what a guest file printed.

    Raises:
        ValueError: It is not exactly one line that says that this file ran.
    """
    lines = printed.splitlines()
    if len(lines) != 1:
        raise ValueError(f"{source} printed {len(lines)} lines, not one")
    facts = json.loads(lines[0])
    if not isinstance(facts, dict) or facts.get("id") != source or facts.get("ran") is not True:
        raise ValueError(f"{source} did not say that it ran")
    return facts


def find(probe: Probe, facts: Facts | str, host: Host) -> Finding:
    """What a probe found: by its judge, or nothing, if `facts` is the reason why there are none."""
    verdict, detail = _judge(probe, facts, host)
    return Finding(
        case=probe.case,
        title=probe.title,
        verdict=verdict,
        detail=detail[:_MAX_DETAIL_CHARS],
        runtime=host.runtime,
    )


def _judge(probe: Probe, facts: Facts | str, host: Host) -> tuple[Verdict, str]:
    if isinstance(facts, str):
        return Verdict.DID_NOT_RUN, facts
    try:
        found = list(probe.judge(facts, host))
    except HostUnseenError as error:
        return Verdict.DID_NOT_RUN, str(error)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        return Verdict.DID_NOT_RUN, f"facts that make no sense: {type(error).__name__}: {error}"
    if doors := [each for each in found if isinstance(each, str)]:
        return Verdict.OPEN, "; ".join(doors)
    if found:
        return Verdict.DIFFERS, "; ".join(each.how for each in found if isinstance(each, Differs))
    return Verdict.CLOSED, ""
