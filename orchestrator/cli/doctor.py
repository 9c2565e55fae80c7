"""`rlm doctor`: what the machine has and lacks, what to do about it, and whether the doors are closed."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field

from orchestrator import doctor as machine
from orchestrator.cli import exits, probe_table, signals
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.config import Settings
from orchestrator.doctor import Check, Level
from orchestrator.errors import OrchestratorError
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.probes.finding import Finding
from orchestrator.probes.sandbox import probe_sandbox
from orchestrator.sandbox.runtimes import RUNTIMES

_WORDS = {Level.OK: "ok  ", Level.WARNING: "warn", Level.FAILURE: "FAIL"}
_PROBES_S = 300.0
"""For all probes of one runtime."""


@dataclass(slots=True)
class _LookedAt:
    checks: list[Check] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def well(self) -> bool:
        failed = any(check.level is Level.FAILURE for check in self.checks)
        return not failed and all(finding.ok for finding in self.findings)


def doctor(
    settings: Settings,
    provider: ProviderProcess,
    *,
    as_json: bool,
    probe: bool = False,
    runtime: str | None = None,
) -> Exit:
    """Look at everything a run needs, and print each finding as it comes.

    Args:
        settings: The process's settings.
        provider: The process that holds the credentials.
        as_json: Print the object of docs/command-line.md instead.
        probe: Then try the doors of real sandboxes.
        runtime: On this one; None for each that works.
    """
    looked = _LookedAt()
    looking = _look(looked, settings, provider, as_json=as_json, probe=probe, runtime=runtime)
    try:
        asyncio.run(signals.until_stopped(looking, lambda _count: None))
    except signals.StoppedError:
        exits.tell("rlm: stopped")
        return Exit.NO_ANSWER
    if as_json:
        told: dict[str, object] = {"ok": looked.well(), "checks": [_plain(check) for check in looked.checks]}
        if probe:
            told["probes"] = probe_table.as_objects(looked.findings)
        exits.put(json_line(told))
    elif looked.findings:
        exits.put(f"\n{probe_table.as_table(looked.findings)}\n\n{probe_table.summary(looked.findings)}")
    return Exit.DONE if looked.well() else Exit.MACHINE


def lines(check: Check) -> str:
    """A check for people: what was found, and below it what to do."""
    text = f"{_WORDS[check.level]}  {check.name:<18}  {check.detail}"
    return f"{text}\n{'':26}→ {check.what_to_do}" if check.what_to_do else text


async def _look(
    looked: _LookedAt,
    settings: Settings,
    provider: ProviderProcess,
    *,
    as_json: bool,
    probe: bool,
    runtime: str | None,
) -> None:
    def add(check: Check) -> None:
        looked.checks.append(check)
        if not as_json:
            exits.put(lines(check))

    async for check in machine.doctor(settings, provider):
        add(check)
    if not probe:
        return
    chosen = (runtime,) if runtime else _working(looked.checks)
    if not chosen:
        add(Check("probes", Level.FAILURE, "no runtime works, so no door was tried"))
    for name in chosen:
        try:
            async with asyncio.timeout(_PROBES_S):
                looked.findings += [finding async for finding in probe_sandbox(settings, name)]
        except (OrchestratorError, TimeoutError) as error:
            why = str(error) or f"they were not through after {_PROBES_S:g} s"
            add(Check(f"probes {name}", Level.FAILURE, f"no door was tried: {why}"))


def _working(checks: Sequence[Check]) -> tuple[str, ...]:
    well = {check.name for check in checks if check.level is Level.OK}
    return tuple(runtime for runtime in RUNTIMES if machine.runtime_check(runtime) in well)


def _plain(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "ok": check.level is not Level.FAILURE,
        "level": check.level.value,
        "detail": check.detail,
        "what_to_do": check.what_to_do or None,
    }
