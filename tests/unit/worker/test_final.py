"""How a cell ends the run."""

import pytest

from tests.unit.worker import host
from tests.unit.worker.host import Host

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.case("F10")
@pytest.mark.parametrize(
    ("code", "answer"),
    [
        ("FINAL('text é')", "text é"),
        ("FINAL({'a': [1, None, 'é']})", '{"a": [1, null, "é"]}'),
        ("FINAL('lone \\ud800')", "lone ?"),
        ("FINAL('')", ""),
        ("x = [1]; FINAL_VAR('x')", "[1]"),
        ("FINAL('first')\nprint('never')", "first"),
        ("try: FINAL('first')\nexcept BaseException: pass\nFINAL('second')", "first"),
        ("try: FINAL('swallowed')\nexcept BaseException: pass", "swallowed"),
        (
            "import threading\nt = threading.Thread(target=FINAL, args=['threaded']); t.start(); t.join()",
            "threaded",
        ),
        ("import asyncio\nasync def f(): FINAL('async')\nawait asyncio.gather(f())", "async"),
        ("answer['content'] = 'dict'; answer['ready'] = True", "dict"),
        ("answer = {'content': 5, 'ready': 1}", "5"),
        ("FINAL('x' * 1_000_000)", "x" * 1_000_000),
        ("try: FINAL('kept')\nfinally: 1/0", "kept"),
        ("FINAL(context)", "a context"),
    ],
)
async def test_an_answer_ends_the_run(code: str, answer: str) -> None:
    async with host.started() as mine:
        ended = await mine.run(code)
        assert ended.end.HasField("answer")
        assert ended.answer.decode() == answer
        assert ended.end.answer.length_bytes == len(ended.answer)
        assert "never" not in ended.text
        assert "RunEnded" not in ended.text


@pytest.mark.parametrize(
    ("code", "error"),
    [
        ("FINAL(object())", "TypeError: FINAL takes text or a value that JSON can hold"),
        ("FINAL(float('nan'))", "TypeError: FINAL takes text"),
        ("FINAL(b'bytes')", "TypeError: FINAL takes text"),
        ("x = []; x.append(x); FINAL(x)", "TypeError: FINAL takes text"),
        ("FINAL('é' * 500_001)", "ValueError: the answer has 1,000,002 bytes; this run allows 1,000,000"),
        ("total = 1; FINAL_VAR('totl')", "did you mean total?"),
        ("FINAL_VAR(5)", "TypeError"),
        ("answer['ready'] = True; answer['content'] = object()", "TypeError: FINAL takes text"),
        (
            "class B:\n    def __bool__(self): raise ValueError('bool')\nanswer['ready'] = B()",
            "ValueError: bool",
        ),
    ],
)
async def test_an_answer_that_cannot_be_given_is_a_cell_error(shared: Host, code: str, error: str) -> None:
    ended = await shared.run(code)
    assert ended.outcome == "error"
    assert error in ended.traceback
    assert not ended.end.HasField("answer")
    await shared.run("answer = {}")
    assert (await shared.run("1 + 1")).outcome == "ok"


async def test_final_in_a_forked_child_is_refused() -> None:
    async with host.started() as mine:
        ended = await mine.run(
            "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\nelse:\n"
            "    try: FINAL('x')\n    except RuntimeError as e: print(e)"
        )
        assert "only in the cell's own process" in ended.text
        assert not ended.end.HasField("answer")
