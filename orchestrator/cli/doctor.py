"""`rlm doctor`: what the machine has and lacks, and what to do about it."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from orchestrator import app
from orchestrator.cli import exits, signals
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.config import Settings


class Check(Protocol):
    """One thing that was looked at."""

    @property
    def name(self) -> str:
        """In a word or two: `engine`, `runtime runsc`."""

    @property
    def ok(self) -> bool:
        """False only for what a run with the default settings would fail without."""

    @property
    def detail(self) -> str:
        """What was found."""

    @property
    def what_to_do(self) -> str:
        """One sentence when something is to be done, else empty."""


def doctor(settings: Settings, *, as_json: bool) -> Exit:
    """Look at everything a run needs, and print each finding as it comes."""
    try:
        checks = asyncio.run(_watched(settings, as_json=as_json))
    except signals.StoppedError:
        exits.tell("rlm: stopped")
        return Exit.NO_ANSWER
    well = all(check.ok for check in checks)
    if as_json:
        exits.put(json_line({"ok": well, "checks": [_as_json(check) for check in checks]}))
    return Exit.DONE if well else Exit.MACHINE


async def _watched(settings: Settings, *, as_json: bool) -> list[Check]:
    async def collect() -> list[Check]:
        found: list[Check] = []
        # Typed here, not there: the protocol above is all that this file needs of a check.
        composition_root: Any = app
        checks: AsyncIterator[Check] = composition_root.doctor(settings)
        async for check in checks:
            found.append(check)
            if not as_json:
                exits.put(lines(check))
        return found

    return await signals.until_stopped(collect(), lambda _count: None)


def lines(check: Check) -> str:
    """A check for people."""
    text = f"{'ok  ' if check.ok else 'FAIL'}  {check.name:<16}  {check.detail}"
    return f"{text}\n{'':24}→ {check.what_to_do}" if check.what_to_do else text


def _as_json(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "ok": check.ok,
        "detail": check.detail,
        "what_to_do": check.what_to_do or None,
    }
