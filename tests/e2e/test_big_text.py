"""A text far larger than a sandbox could hold as a `str`."""

import json
from pathlib import Path

import pytest

from orchestrator.config import SandboxSettings
from tests.e2e.playing import Player

pytestmark = pytest.mark.timeout(180)

MEGABYTES = 200
LINE = "One line of a text that is far too long to be read.\n"
EMOJI = "🙂"
NEEDLE = "The needle lies here."

CELLS = (
    "print(type(context).__name__, len(context), context[-1_000:][-40:])",
    f"at = context.find({NEEDLE!r})\nprint(at, context[at:at + 21], context.find('no such thing'))",
    f"print(context.count({EMOJI!r}), sum(1 for line in context.lines()), context.count(chr(10)))",
    "print([match.start() for match in context.finditer('needle')] == [at + 4], 'needle' in context)",
    "longest = max(len(piece) for piece in context.chunks(10_000_000))\nprint(longest)",
    "part = context[at - 60_000_000:at + 1_000]\nprint(type(part).__name__, rlm_query('Where is it?', part))",
    "print(rlm_query('Where is it?', context[at - 100:at + 100]))",
    "FINAL_VAR('at')",
)
CHILD_CELLS = (f"FINAL([type(context).__name__, len(context), context.find({NEEDLE!r})])",)


def megabyte_of_text() -> str:
    """One megabyte of UTF-8 with one emoji in the middle of it."""
    lines = LINE * (1_000_000 // len(LINE) - 1)
    half = len(lines) // 2
    text = lines[:half] + EMOJI + lines[half:]
    return text + "x" * (999_999 - len(text.encode())) + "\n"


@pytest.fixture
def big_text(tmp_path: Path) -> Path:
    path = tmp_path / "big.txt"
    one = megabyte_of_text()
    with path.open("w", encoding="utf-8") as file:
        for number in range(MEGABYTES):
            # In the last but one megabyte, instead of as many characters.
            file.write(one.replace(LINE[:21], NEEDLE, 1) if number == MEGABYTES - 2 else one)
    return path


async def test_a_text_of_200_megabytes_works_under_the_default_memory_limit(
    player: Player, big_text: Path
) -> None:
    assert player.settings.sandbox == SandboxSettings()
    one = megabyte_of_text()
    length, at = len(one) * MEGABYTES, len(one) * (MEGABYTES - 2)

    played = await player.run(player.script(CELLS, child_steps=CHILD_CELLS), big_text)

    assert played.report.context_bytes == MEGABYTES * 1_000_000
    size, found, counted, searched, chunks, large_child, small_child = played.told
    assert size == f"TextView {length} {one[-40:].rstrip()}"
    assert found == f"{at} {NEEDLE} -1"
    assert counted == f"{MEGABYTES} {one.count(chr(10)) * MEGABYTES} {one.count(chr(10)) * MEGABYTES}"
    assert searched == "True True"
    assert chunks == "10000000"
    kind, _, of_child = large_child.partition(" ")
    assert kind == "TextView"
    assert json.loads(of_child) == ["TextView", 60_001_000, 60_000_000]
    assert json.loads(small_child) == ["str", 200, 100]
    assert played.report.answer == str(at)
    assert [cell.outcome for cell in played.cells] == ["ok"] * len(CELLS)


MAPPING_CELLS = (
    "print(rlm_query('Which?', context[1:3]))",
    "print(rlm_query('Which?', context))",
    "print(rlm_query('Which?', context.subset(['d.txt', 'a.txt'])))",
    "FINAL('told')",
)
MAPPING_CHILD_CELLS = ("FINAL({path: text for path, text in context.items()})",)


async def test_files_that_a_child_is_given_by_reference_are_those_and_no_others(
    player: Player, tmp_path: Path
) -> None:
    texts = {f"{name}.txt": f"{name} é\n" for name in "abcd"}
    (tmp_path / "files").mkdir()
    for name, text in texts.items():
        (tmp_path / "files" / name).write_text(text, encoding="utf-8")
    script = player.script(MAPPING_CELLS, child_steps=MAPPING_CHILD_CELLS)

    played = await player.run(script, tmp_path / "files")

    some, everything, chosen = map(json.loads, played.told)
    assert some == {name: texts[name] for name in ("b.txt", "c.txt")}
    assert everything == texts
    assert list(chosen) == ["d.txt", "a.txt"]
