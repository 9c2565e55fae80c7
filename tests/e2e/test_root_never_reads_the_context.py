"""What the root model is sent: the shape of the context and what its cells print, never the context."""

import re
import secrets
from pathlib import Path

from tests.e2e.playing import Played, Player

MEGABYTE = 1_000_000
LINE = "Nothing of note was said at the meeting, and nobody minded.\n"

# It measures, has pieces read by sub-calls and a child run, and prints only what it worked out itself.
CELLS = (
    "print(type(context).__name__, len(context), context.count('meeting'))",
    """
middle = len(context) // 2
pieces = [context[start:start + 2_000] for start in (0, middle - 1_000, len(context) - 2_000)]
answers = llm_query_batched(["How many lines are these?\\n" + piece for piece in pieces])
print(answers)
""",
    "below = rlm_query('How long is it?', context[middle - 500_000:middle + 500_000])\nprint(below)",
    "FINAL(f'{len(context)} characters, {below} of them below, {answers}')",
)
CHILD_CELLS = ("FINAL(len(context))",)


def text_with(canary: str, length: int) -> str:
    half = LINE * (length // 2 // len(LINE))
    return half + canary + "\n" + half


async def ask_about(player: Player, text: str) -> Played:
    script = player.script(CELLS, child_steps=CHILD_CELLS, complete="return str(prompt.count(chr(10)))")
    return await player.run(script, player.context(text))


async def test_a_canary_in_the_context_is_in_no_request_of_the_root_run(player: Player) -> None:
    canary = secrets.token_hex(16)
    played = await ask_about(player, text_with(canary, MEGABYTE))

    assert played.report.answer is not None
    assert len(played.root_requests) == len(CELLS)
    assert all(canary not in repr(request) for request in played.root_requests)
    others = [request for request in played.requests if request not in played.root_requests]
    assert any(canary in repr(request) for request in others), "a sub-call did read the middle of the context"
    root = [event for event in played.events if event.run_id == played.root_id]
    said = [repr(event) for event in root if event.kind != "sub_call_started"]
    assert all(canary not in one for one in said)


async def test_the_roots_input_does_not_grow_with_the_context(player: Player) -> None:
    small = await ask_about(player, text_with("canary", MEGABYTE))
    large = await ask_about(player, text_with("canary", 100 * MEGABYTE))

    assert large.report.context_bytes > 99 * small.report.context_bytes
    assert [without_numbers(sent) for sent in small.root_requests_as_text] == [
        without_numbers(sent) for sent in large.root_requests_as_text
    ]
    more_bytes = large.report.tally.root_request_bytes - small.report.tally.root_request_bytes
    assert 0 <= more_bytes < 200, "the digits of some sizes"


def without_numbers(text: str) -> str:
    return re.sub(r"\d[\d,]*", "#", text)


def test_the_text_has_the_canary_in_its_middle(tmp_path: Path) -> None:
    text = text_with("canary", MEGABYTE)
    assert abs(text.index("canary") - len(text) // 2) < 100
