"""What a cell may do, seen from the host: a real worker, a real interpreter, a real socket."""

import pytest

from tests.unit.worker import host
from tests.unit.worker.host import Host

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_the_namespace_lives_from_cell_to_cell(shared: Host) -> None:
    await shared.run("kept = 41")
    ended = await shared.run("kept += 1; print(kept)")
    assert ended.outcome == "ok"
    assert ended.text == "42\n"
    assert "kept" in ended.variables


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx", "3\n"),
        ("None", ""),
        ("1 + 1;", ""),
        ("_ = 5\n7", "7\n"),
        ("for i in range(2): i", ""),
        ("", ""),
        ("# only a comment", ""),
        ("'a' 'b'", "'ab'\n"),
        ("import asyncio\nawait asyncio.sleep(0, 'slept')", "'slept'\n"),
        ("import asyncio\nasync def f(): return 4\nasyncio.run(f())", "4\n"),
        ("async for i in (x async for x in __import__('types').AsyncGeneratorType): pass", None),
        ("print('\\ud800')", "\\ud800\n"),
    ],
)
async def test_the_last_expression_is_displayed_as_in_jupyter(
    shared: Host, code: str, text: str | None
) -> None:
    ended = await shared.run(code)
    if text is None:
        assert ended.outcome == "error"
    else:
        assert (ended.outcome, ended.text) == ("ok", text)


async def test_underscore_is_the_last_displayed_value(shared: Host) -> None:
    await shared.run("del _" if "_" in (await shared.run("6 * 7")).variables else "6 * 7")
    assert (await shared.run("_ + 1")).text == "43\n"


async def test_a_traceback_shows_the_cells_own_lines_only(shared: Host) -> None:
    await shared.run("import json\ndef parse(text):\n    return json.loads(text)  # here")
    ended = await shared.run("parse('{')")
    assert ended.outcome == "error"
    assert "return json.loads(text)  # here" in ended.traceback
    assert "parse('{')" in ended.traceback
    assert "decoder.py" not in ended.traceback
    assert "interpreter/cell.py" not in ended.traceback
    assert ended.traceback.splitlines()[-1].startswith("json.decoder.JSONDecodeError")


async def test_a_syntax_error_points_at_its_place(shared: Host) -> None:
    ended = await shared.run("x = 1\ny = = 2")
    assert ended.outcome == "error"
    assert "y = = 2" in ended.traceback
    assert "^" in ended.traceback
    assert "SyntaxError" in ended.traceback


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("raise KeyboardInterrupt('mine')", "KeyboardInterrupt: mine"),
        ("import asyncio\nraise asyncio.CancelledError", "CancelledError"),
        ("import sys; sys.exit(3)", "the namespace is kept"),
        ("exit()", "the namespace is kept"),
        ("input('name? ')", "nobody can type into a cell"),
        ("def f(): f()\nf()", "RecursionError"),
        ("raise ExceptionGroup('many', [ValueError('one'), KeyError('two')])", "KeyError: 'two'"),
        (
            "class E(Exception):\n    def __str__(self): raise RuntimeError\nraise E",
            "<exception str() failed>",
        ),
        ("class E(Exception):\n    def __str__(self): import os, sys; sys.exit()\nraise E", "E"),
        ("class E(Exception): __traceback__ = 5\nraise E('odd')", "E: odd"),
        ("class E(Exception): __cause__ = 5\nraise E('odd')", "E"),
        ("raise ValueError('\\ud800')", "ValueError"),
        ("class R:\n    def __repr__(self): raise ValueError('no repr')\nR()", "no repr"),
        ("try:\n    1/0\nexcept Exception as e:\n    raise KeyError from e", "ZeroDivisionError"),
        ("x = '\\x00'\nexec(x)", "null"),
        ("(" * 500 + ")" * 500, "Error"),
        ("\x00", "null"),
    ],
)
async def test_what_a_cell_raises_is_its_result(shared: Host, code: str, expected: str) -> None:
    await shared.run("kept = 'still here'")
    ended = await shared.run(code)
    assert ended.outcome == "error"
    assert expected in ended.traceback
    assert (await shared.run("kept")).text == "'still here'\n"


async def test_a_huge_message_is_cut_in_the_middle(shared: Host) -> None:
    ended = await shared.run("raise ValueError('<' + 100_000_000 * 'x' + '>')")
    assert len(ended.end.error.traceback) <= 16_384
    assert "ValueError: <xxx" in ended.traceback
    assert "bytes of the traceback cut" in ended.traceback


async def test_a_source_line_of_a_helper_file_is_shown(shared: Host) -> None:
    await shared.run("open('helper.py', 'w').write('def fail():\\n    raise OSError(7)  # helper line\\n');")
    ended = await shared.run("import helper\nhelper.fail()")
    assert "# helper line" in ended.traceback


async def test_output_keeps_its_order_over_streams_and_processes(shared: Host) -> None:
    ended = await shared.run(
        "import os, subprocess, sys\n"
        "print('one')\nprint('two', file=sys.stderr)\nsubprocess.run(['echo', 'three'])\n"
        "os.write(1, b'four\\n')\nprint('five', end='');"
    )
    assert ended.text == "one\ntwo\nthree\nfour\nfive"


async def test_a_flood_is_cut_in_the_middle_and_counted(shared: Host) -> None:
    ended = await shared.run("print('<' + 50_000_000 * 'x' + '>')")
    assert ended.outcome == "ok"
    assert ended.end.output_bytes == 50_000_003
    assert sum(len(data) for _, data in ended.chunks) == 25_000
    assert ended.text.startswith("<xx")
    assert ended.text.endswith("x>\n")
    last_offset, last = ended.chunks[-1]
    assert last_offset + len(last) == 50_000_003


@pytest.mark.parametrize(
    "damage",
    [
        "import sys; sys.stdout.close()",
        "import sys, io; sys.stdout = io.StringIO(); print('lost')",
        "import os; os.close(1)",
        "import os; os.close(1); os.close(2); print('x')",
        "import sys; sys.stdout = None; sys.stderr = None",
        "import sys; sys.stdout = 5",
        "import os; os.dup2(os.open('log', os.O_CREAT | os.O_WRONLY), 1); print('x')",
        "import sys; del sys.stdout",
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)",
        "__builtins__ = {}",
        "llm_query = print = 3",
        "globals().clear()",
        "globals()[5] = 6",
    ],
)
async def test_a_cell_that_breaks_its_surroundings_breaks_only_itself(damage: str) -> None:
    async with host.started() as mine:
        ended = await mine.run(damage)
        assert ended.outcome in ("ok", "error")
        ended = await mine.run("import builtins; builtins.print('works again')")
        # What could not be written before may come now.
        assert ended.text.endswith("works again\n"), ended.traceback


async def test_a_forked_child_ends_with_the_cell(shared: Host) -> None:
    ended = await shared.run(
        "import os\npid = os.fork()\nif pid: print(os.waitpid(pid, 0)[1])\nelse: print('child', flush=True)"
    )
    assert ended.text == "child\n0\n"
    assert (await shared.run("os.getpid() == os.getppid()")).text == "False\n"


async def test_a_forked_child_cannot_make_sub_calls(shared: Host) -> None:
    ended = await shared.run(
        "import os\npid = os.fork()\nif pid:\n    os.waitpid(pid, 0)\nelse:\n"
        "    try: llm_query('x')\n    except SubCallError as e: print(e)\n"
    )
    assert "only in the cell's own process" in ended.text
    assert shared.broker.asked == []


async def test_a_pool_runs_functions_of_a_cell(shared: Host) -> None:
    ended = await shared.run(
        "import multiprocessing\ndef square(n): return n * n\n"
        "with multiprocessing.get_context('fork').Pool(2) as pool: print(pool.map(square, range(4)))"
    )
    assert ended.text == "[0, 1, 4, 9]\n", ended.traceback


async def test_spawned_processes_run_functions_of_modules(shared: Host) -> None:
    ended = await shared.run(
        "import math, multiprocessing\n"
        "with multiprocessing.get_context('spawn').Pool(1) as pool: print(pool.map(math.sqrt, [4, 9]))"
    )
    assert ended.text == "[2.0, 3.0]\n", ended.traceback


async def test_output_between_cells_comes_first_in_the_next(shared: Host) -> None:
    await shared.run(
        "import threading, time\n"
        "def late():\n    time.sleep(0.2); print('late')\n"
        "thread = threading.Thread(target=late); thread.start()"
    )
    assert (await shared.run("thread.join(); print('now')")).text == "late\nnow\n"


async def test_a_background_flood_does_not_hold_a_cell_open(shared: Host) -> None:
    ended = await shared.run("import subprocess; flood = subprocess.Popen(['yes'])")
    assert ended.outcome == "ok"
    ended = await shared.run("flood.kill(); flood.wait();")
    assert ended.outcome == "ok"


async def test_classes_of_a_cell_can_be_pickled(shared: Host) -> None:
    ended = await shared.run("import pickle\nclass P: pass\ntype(pickle.loads(pickle.dumps(P()))) is P")
    assert ended.text == "True\n"


async def test_the_interpreter_does_not_load_grpc(shared: Host) -> None:
    ended = await shared.run(
        "import sys; [name for name in sys.modules if 'grpc' in name or 'google' in name]"
    )
    assert ended.text == "[]\n"


async def test_variables_are_capped_and_sorted() -> None:
    async with host.started() as mine:
        ended = await mine.run("for i in range(300): globals()['é' * 80 + str(i)] = i")
        assert len(ended.end.variables) == 200
        assert all(len(name) <= 100 for name in ended.end.variables)
        assert ended.variables == sorted(ended.variables)


async def test_future_imports_hold_for_later_cells(shared: Host) -> None:
    await shared.run("from __future__ import annotations")
    assert (
        await shared.run("def f(x: undefined_name): pass\nf.__annotations__")
    ).text == "{'x': 'undefined_name'}\n"


async def test_the_source_of_a_function_can_be_read_back(shared: Host) -> None:
    await shared.run("def known():\n    return 'source'")
    assert "return 'source'" in (await shared.run("import inspect; print(inspect.getsource(known))")).text


async def test_show_vars_lists_what_cells_made(shared: Host) -> None:
    await shared.run("shown_list = [1, 2, 3]")
    ended = await shared.run("print(SHOW_VARS())")
    assert "shown_list: list, length 3" in ended.text
    assert "llm_query" not in ended.text
