"""One sandbox, all probes: what they found is looked at by many tests."""

import asyncio
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from orchestrator.config import Settings
from orchestrator.probes.finding import Facts, Finding, Probe, find
from orchestrator.probes.host import Host
from orchestrator.probes.sandbox import PROBES, collect

T = TypeVar("T")


@dataclass(frozen=True)
class Probed:
    """What was seen of one sandbox, from inside and from the host."""

    facts: Mapping[str, Facts | str]
    host: Host

    def finding(self, probe: Probe) -> Finding:
        return find(probe, self.facts[probe.source], self.host)

    def open_cases(self, probes: Sequence[Probe] = PROBES) -> dict[str, str]:
        """The cases whose doors are not closed, and how."""
        findings = [self.finding(probe) for probe in probes if probe.source in self.facts]
        return {each.case: f"{each.verdict.value}: {each.detail}" for each in findings if not each.ok}

    def of(self, source: str) -> Facts:
        """The facts of a guest file that ran."""
        facts = self.facts[source]
        assert not isinstance(facts, str), facts
        return facts


def probe(settings: Settings, runtime: str, probes: Sequence[Probe] = PROBES) -> Probed:
    """Probes a sandbox. For fixtures that live longer than a test's event loop."""
    return Probed(*_in_a_loop_of_its_own(collect(settings, runtime, probes)))


def _in_a_loop_of_its_own(work: Coroutine[Any, Any, T]) -> T:
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()
