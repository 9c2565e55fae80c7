"""`rlm doctor`: what the machine has and lacks, and what to do about it."""

import asyncio

from orchestrator import doctor as machine
from orchestrator.cli import exits, signals
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.config import Settings
from orchestrator.doctor import Check, Level

_WORDS = {Level.OK: "ok  ", Level.WARNING: "warn", Level.FAILURE: "FAIL"}


def doctor(settings: Settings, *, as_json: bool) -> Exit:
    """Look at everything a run needs, and print each finding as it comes."""
    try:
        checks = asyncio.run(signals.until_stopped(_looked_at(settings, as_json), lambda _count: None))
    except signals.StoppedError:
        exits.tell("rlm: stopped")
        return Exit.NO_ANSWER
    well = not any(check.level is Level.FAILURE for check in checks)
    if as_json:
        exits.put(json_line({"ok": well, "checks": [_plain(check) for check in checks]}))
    return Exit.DONE if well else Exit.MACHINE


def lines(check: Check) -> str:
    """A check for people: what was found, and below it what to do."""
    text = f"{_WORDS[check.level]}  {check.name:<14}  {check.detail}"
    return f"{text}\n{'':22}→ {check.what_to_do}" if check.what_to_do else text


async def _looked_at(settings: Settings, as_json: bool) -> list[Check]:
    found: list[Check] = []
    async for check in machine.doctor(settings):
        found.append(check)
        if not as_json:
            exits.put(lines(check))
    return found


def _plain(check: Check) -> dict[str, object]:
    return {
        "name": check.name,
        "ok": check.level is not Level.FAILURE,
        "level": check.level.value,
        "detail": check.detail,
        "what_to_do": check.what_to_do or None,
    }
