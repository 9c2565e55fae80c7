"""What a cell does, and what its model is told about it, in a real container."""

import json

import pytest

from orchestrator.limits import RunLimits
from orchestrator.models.scripted import Wait
from orchestrator.turn import Outcome
from tests.e2e.playing import LAST_WORDS, Player


async def test_everything_a_cell_writes_arrives_in_order_whoever_wrote_it(player: Player) -> None:
    played = await player.cells(
        """
import os, subprocess, sys
print("one")
print("two", file=sys.stderr)
subprocess.run(["sh", "-c", "echo three; echo four >&2"])
os.write(1, b"five\\n")
print("six, without an end of line", end="")
"""
    )
    assert played.told == ["one\ntwo\nthree\nfour\nfive\nsix, without an end of line"]


async def test_a_cell_is_what_a_person_used_to_jupyter_expects(player: Player) -> None:
    played = await player.cells(
        "import asyncio\nx = await asyncio.sleep(0, 20)\nx + 1",
        "x + 22",
        "x = = 1",
        "def broken(): return 1 / 0\nbroken()",
        "x += 80\nraise SystemExit(3)",
        "name = input('who? ')",
        "pass",
        "x",
    )
    value, later, syntax, error, system_exit, asked, silent, at_last = played.told
    assert (value, later, silent, at_last) == ("21", "42", "[no output]", "100")
    assert "SyntaxError" in syntax
    assert "x = = 1" in syntax
    assert error.endswith("ZeroDivisionError: division by zero")
    assert "def broken(): return 1 / 0" in error
    assert "/opt/rlm" not in error
    assert "Use FINAL to end the run" in system_exit
    assert "EOFError: input() has nobody to ask" in asked
    assert [cell.outcome for cell in played.cells] == [
        "ok",
        "ok",
        "error",
        "error",
        "error",
        "error",
        "ok",
        "ok",
    ]


async def test_a_cell_may_start_processes_of_all_kinds(player: Player) -> None:
    played = await player.cells(
        """
import subprocess
print(subprocess.run(["python3", "-c", "print(6 * 7)"], capture_output=True, text=True).stdout)
""",
        """
import multiprocessing
def square(number): return number * number
with multiprocessing.Pool(3) as pool: print(pool.map(square, range(5)))
""",
        """
import os
pid = os.fork()
kept = "by the parent" if pid else "by the child"
if pid: print("the child's status:", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
else: print("in the child")
""",
        "kept",
    )
    assert played.told == [
        "42",
        "[0, 1, 4, 9, 16]",
        "in the child\nthe child's status: 0",
        "'by the parent'",
    ]


@pytest.mark.case("E14")
async def test_a_thread_outlives_its_cell_and_is_refused_sub_calls_between_cells(player: Player) -> None:
    script = player.script(
        [
            """
import threading, time
seen = []
def late():
    time.sleep(0.4)
    try: llm_query("Is anybody there?")
    except Exception as error: seen.append(error)
thread = threading.Thread(target=late)
thread.start()
""",
            Wait(1.5),
            "thread.join(); seen",
        ]
    )
    played = await player.run(script)
    assert played.told[0] == "[no output]"
    assert played.told[1].startswith("[NotExecuting(")
    assert played.report.tally.sub_calls_done == 0


@pytest.mark.case("E10")
async def test_fifty_megabytes_of_output_are_cut_and_the_cut_is_named(player: Player) -> None:
    played = await player.cells(
        """
for number in range(50): print(f"megabyte {number}: " + "x" * 999_980, flush=True)
print("the end")
"""
    )
    (told,) = played.told
    assert told.startswith("megabyte 0: xxx")
    assert told.endswith("xxx\nthe end")
    assert f"{played.cells[0].cut_bytes:,} bytes of output cut" in told
    assert played.cells[0].output_bytes > 49_000_000
    assert len(told) < 17_000


@pytest.mark.case("E16")
async def test_a_cell_that_ends_its_interpreter_loses_the_namespace_and_says_what_is_gone(
    player: Player,
) -> None:
    played = await player.cells(
        "found = [1, 2]\nnote = 'x'",
        "import os\nprint('about to leave')\nos._exit(7)",
        "len(context), 'found' in globals()",
    )
    _, left, after = played.told
    assert left.startswith(
        "about to leave\n[The cell ended its own interpreter (exit code 7). The namespace is LOST"
    )
    assert "these names are gone: found, note" in left
    assert after == f"({len('nothing to see')}, False)"
    assert played.cells[1].lost_variables == ("found", "note")


@pytest.mark.case("E08")
async def test_an_endless_loop_is_interrupted_and_the_namespace_kept(player: Player) -> None:
    played = await player.cells(
        "found = 42",
        "print('looping')\nwhile True: pass",
        "import asyncio, time\ntry: time.sleep(60)\nfinally: print('tidied up')",
        "import subprocess\nsubprocess.run(['sleep', '60'])",
        "found",
        limits=RunLimits(cell_timeout_s=1),
    )
    interrupted = "[The cell passed its time limit and was interrupted. The namespace is kept.]"
    _, loop, sleep, process, after = played.told
    assert loop.startswith("looping\n")
    assert sleep.startswith("tidied up\n")
    assert all(told.endswith(interrupted) for told in (loop, sleep, process))
    assert after == "42"
    assert all(cell.guest_s < 3 for cell in played.cells)


@pytest.mark.case("E08", "E09")
@pytest.mark.parametrize(
    "loop",
    [
        "import itertools\nsum(itertools.repeat(1))",
        # With something before it in the `try`: else Python 3.11 does not count it as within.
        "while True:\n  try:\n    more += 1\n    while True: more += 1\n  except KeyboardInterrupt: pass",
    ],
    ids=["in C", "that swallows the interrupt"],
)
async def test_an_endless_loop_that_ignores_the_interrupt_is_killed(player: Player, loop: str) -> None:
    played = await player.cells(
        "found = 42",
        f"more = 1\nprint('looping')\n{loop}",
        "len(context)",
        limits=RunLimits(cell_timeout_s=1),
    )
    told = played.told[1]
    assert told.startswith("looping\n[The cell passed its time limit and ignored the interrupt")
    assert "The namespace is LOST" in told
    assert "these names are gone: found" in told
    assert played.told[2] == str(len("nothing to see"))
    assert played.cells[1].outcome == "killed"


async def test_memory_beyond_the_limit_kills_the_interpreter_and_the_model_is_told(player: Player) -> None:
    played = await player.cells(
        "found = 42",
        "print('eating')\nhoard = bytearray(b'x') * 900_000_000",
        "print('going on', len(context))",
    )
    _, told, after = played.told
    assert told.startswith("eating\n[The cell's interpreter ran out of memory and was killed.")
    assert "these names are gone: found" in told
    assert after == "going on 14"


@pytest.mark.parametrize(
    ("cell", "answer"),
    [
        ("FINAL('Zürich 🙂')", "Zürich 🙂"),
        ("FINAL({'b': [1, None], 'a': 'ä'})", '{"b": [1, null], "a": "ä"}'),
        ("result = ['x'] * 3\nFINAL_VAR('result')", '["x", "x", "x"]'),
        ("answer['content'] = 'as in the reference'\nanswer['ready'] = True\nanswer['content'] += ' library'",
         "as in the reference library"),
        ("try: FINAL('first')\nexcept BaseException: pass\nFINAL('second')", "first"),
        ("try: FINAL_VAR('missing')\nexcept NameError as error: FINAL(str(error)[:9])", "FINAL_VAR"),
    ],
)  # fmt: skip
async def test_a_cell_gives_the_answer(player: Player, cell: str, answer: str) -> None:
    played = await player.cells(cell, "print('never run')")
    assert played.report.outcome is Outcome.ANSWERED
    assert played.report.answer == answer
    assert len(played.cells) == 1


async def test_an_answer_may_be_longer_than_anything_a_model_could_write(player: Player) -> None:
    played = await player.cells("long = 'ä' * 4_000_000\nFINAL_VAR('long')")
    assert played.report.answer == "ä" * 4_000_000


async def test_an_answer_that_json_cannot_hold_is_refused_and_the_run_goes_on(player: Player) -> None:
    played = await player.cells("FINAL({1, 2})", "FINAL(object())")
    assert all("TypeError: FINAL takes text or a value that JSON can hold" in told for told in played.told)
    assert played.report.answer == LAST_WORDS


async def test_batched_sub_calls_run_side_by_side_and_keep_their_order(player: Player) -> None:
    played = await player.cells(
        """
import time
started = time.monotonic()
answers = llm_query_batched([f"prompt {number}" for number in range(48)])
print([int(answer.split()[-1]) for answer in answers] == list(range(48)))
print("side by side:", time.monotonic() - started < 48 * 0.1)
""",
        """
mixed = llm_query_batched(["good", "bad", "good"], on_error="return")
print([one if isinstance(one, str) else type(one).__name__ for one in mixed])
llm_query_batched(["good", "bad", "good"])
""",
        """
import asyncio
print(await asyncio.gather(allm_query("a 1"), allm_query("b 2")))
""",
        complete="""
if prompt == "bad":
    raise ValueError
# The later ones of each sixteen come back first.
await asyncio.sleep(0.2 - 0.01 * (int(prompt.split()[-1]) % 16) if prompt != "good" else 0)
return "answer to " + prompt
""",
    )
    batch, mixed, together = played.told
    assert batch == "True\nside by side: True"
    assert mixed.startswith("['answer to good', 'ModelFailed', 'answer to good']\n")
    assert "ModelFailed: " in mixed.splitlines()[-1]
    assert together == "['answer to a 1', 'answer to b 2']"


async def test_a_child_run_has_a_namespace_of_its_own_and_stops_at_the_depth_limit(player: Player) -> None:
    script = player.script(
        ["mine = 1\nprint(rlm_query('How deep?', 'child text'))"],
        child_steps=[
            """
try: deeper = rlm_query("Deeper?", "x")
except DepthExceeded as error: deeper = f"refused: {type(error).__name__}"
FINAL([context, "mine" in globals(), deeper, budget()["levels_below"]])
"""
        ],
    )
    played = await player.run(script, limits=RunLimits(max_depth=1))
    assert json.loads(played.told[0]) == ["child text", False, "refused: DepthExceeded", 0]
    assert played.report.tally.child_runs == 1
    assert played.report.tally.max_depth_reached == 1


async def test_a_budget_refusal_tells_the_cell_the_account_and_the_amounts(player: Player) -> None:
    played = await player.cells(
        """
import json
try: llm_query("x" * 1_000_000)
except BudgetExceeded as error:
    print(json.dumps([error.account, dict(error.wanted), dict(error.left), str(error)]))
print(llm_query("short"))
""",
        limits=RunLimits(max_tokens=400_000),
    )
    refusal, short = played.told[0].splitlines()
    account, wanted, left, why = json.loads(refusal)
    assert account == "run tree"
    assert wanted["tokens"] >= 1_000_000
    assert 0 < left["tokens"] < 400_000
    assert "run tree" in why
    assert short == "short"
    assert played.report.tally.sub_calls_failed == 1


@pytest.mark.case("E01")
async def test_a_guest_that_hogs_its_processes_is_held_by_the_limit(player: Player) -> None:
    played = await player.cells(
        """
import subprocess
started = []
try:
    for _ in range(400): started.append(subprocess.Popen(["sleep", "60"]))
except OSError as error: print(type(error).__name__, len(started) < 256)
for process in started: process.kill()
for process in started: process.wait()
""",
        "1 + 1",
    )
    limit = "[No more processes and threads could be started: 256 at most.]"
    assert played.told == [f"BlockingIOError True\n{limit}", "2"]
