"""Cells that do not end by themselves, and interpreters that end before their cell does."""

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest
from rlm_proto.v1 import sandbox_pb2

from tests.unit.worker import host
from tests.unit.worker.host import Ended, Host


async def interrupted(mine: Host, code: str) -> Ended:
    """Run a cell that prints 'started', interrupt it then."""
    mine.start("kept = 1")
    await mine.end()
    mine.start("print('started', flush=True)\n" + code)
    assert b"started" in await mine.output()
    mine.interrupt()
    return await mine.end()


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import subprocess; subprocess.run(['sleep', '60'])",
        "import threading; threading.Event().wait()",
        "import asyncio\nawait asyncio.sleep(60)",
        "import asyncio\nasync def f():\n    while True: pass\nawait f()",
        "import asyncio\nasyncio.run(asyncio.sleep(60))",
        "while True:\n    try:\n        import time; time.sleep(60)\n    except KeyboardInterrupt:\n"
        "        if globals().setdefault('seen', []): raise\n        seen.append(1)",
        "import signal; signal.pause()",
        "class E(Exception):\n    def __str__(self):\n        while True: pass\nraise E",
        "import queue; queue.Queue().get()",
        "exec('while True: pass')",
    ],
)
async def test_an_interrupt_stops_the_cell_and_keeps_the_namespace(code: str) -> None:
    async with host.started() as mine:
        ended = await interrupted(mine, code)
        assert ended.outcome in ("interrupted", "error")
        if "class E" not in code:
            assert ended.outcome == "interrupted"
            assert "KeyboardInterrupt" in ended.traceback or "CancelledError" in ended.traceback
        assert (await mine.run("kept")).text == "1\n"


async def test_an_async_cell_may_clean_up_with_await() -> None:
    async with host.started() as mine:
        ended = await interrupted(
            mine,
            "import asyncio\ntry:\n    await asyncio.sleep(60)\nfinally:\n"
            "    await asyncio.sleep(0.1); print('cleaned')",
        )
        assert ended.outcome == "interrupted"
        assert (await mine.run("await asyncio.sleep(0, 'next')")).text == "'next'\n"


async def test_an_interrupt_wakes_a_cell_that_waits_for_sub_calls() -> None:
    async with host.started() as mine:
        mine.broker.complete = never
        mine.start("print('started', flush=True)\nllm_query_batched(['a', 'b'] * 50)")
        await mine.output()
        await eventually(lambda: mine.broker.in_flight == 4)
        mine.interrupt()
        ended = await mine.end()
        assert ended.outcome == "interrupted"
        await eventually(lambda: mine.broker.in_flight == 0)
        assert mine.broker.cancelled == 4
        mine.broker.complete = host.echo
        assert (await mine.run("llm_query('next')")).text == "'echo: next'\n"


async def test_a_cell_that_catches_the_interrupt_may_end_well() -> None:
    async with host.started() as mine:
        ended = await interrupted(
            mine, "import time\ntry:\n    time.sleep(60)\nexcept KeyboardInterrupt:\n    print('saved')"
        )
        assert ended.outcome == "ok"
        assert "saved" in ended.text


async def test_interrupts_between_cells_are_nothing() -> None:
    async with host.started() as mine:
        await mine.run("kept = 1; import os; pid = os.getpid()")
        pid = int((await mine.run("print(pid)")).text)
        for _ in range(50):
            os.kill(pid, signal.SIGINT)
        mine.interrupt()
        assert (await mine.run("kept")).text == "1\n"


async def test_a_rain_of_interrupts_loses_no_cell() -> None:
    async with host.started() as mine:
        pid = int((await mine.run("import os; print(os.getpid())")).text)
        for _ in range(150):
            mine.start("x = 0\nfor i in range(200): x += i\nprint(x)")
            for _ in range(3):
                os.kill(pid, signal.SIGINT)
                await asyncio.sleep(0.0003)
            ended = await mine.end()
            assert ended.outcome in ("ok", "error")
        assert (await mine.run("os.getpid()")).text == f"{pid}\n"


async def test_a_kill_loses_the_namespace_and_says_so() -> None:
    async with host.started() as mine:
        await mine.run("kept = 1")
        mine.start(
            "import signal, subprocess; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
            "other = subprocess.Popen(['sleep', '1000'])\nprint(other.pid, flush=True)\nwhile True: pass"
        )
        other_pid = int(await mine.output())
        mine.kill()
        ended = await mine.end()
        assert ended.end.namespace_lost.cause == sandbox_pb2.NamespaceLost.CAUSE_KILLED
        assert ended.variables == []
        await eventually(lambda: not alive(other_pid))
        again = await mine.run("print(context, 'kept' in globals())")
        assert again.text == "a context False\n"


async def test_a_kill_of_a_cell_that_is_over_is_nothing() -> None:
    async with host.started() as mine:
        await mine.run("kept = 1")
        mine.kill()
        assert (await mine.run("kept")).text == "1\n"


@pytest.mark.parametrize(
    ("code", "cause", "status"),
    [
        (
            "import os; print('last words', flush=True); os._exit(7)",
            sandbox_pb2.NamespaceLost.CAUSE_EXITED,
            7,
        ),
        (
            "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGSEGV)",
            sandbox_pb2.NamespaceLost.CAUSE_SIGNALLED,
            signal.SIGSEGV,
        ),
        (
            "import os, signal; print('last words', flush=True); os.kill(os.getpid(), signal.SIGKILL)",
            sandbox_pb2.NamespaceLost.CAUSE_SIGNALLED,
            signal.SIGKILL,
        ),
    ],
)
async def test_a_dead_interpreter_is_replaced(code: str, cause: int, status: int) -> None:
    async with host.started() as mine:
        ended = await mine.run(code)
        assert ended.text == "last words\n"
        assert (ended.end.namespace_lost.cause, ended.end.namespace_lost.status) == (cause, status)
        assert (await mine.run("1 + 1")).text == "2\n"


async def test_a_death_between_cells_is_told_to_the_next() -> None:
    async with host.started() as mine:
        await mine.run("import threading, os\nthreading.Timer(0.1, os._exit, [3]).start()")
        await asyncio.sleep(0.5)
        ended = await mine.run("print('not run')")
        assert ended.end.namespace_lost.status == 3
        assert ended.text == ""
        assert (await mine.run("print('run')")).text == "run\n"


@pytest.mark.parametrize(
    "code",
    [
        "import os; os.closerange(3, 100)",
        "import os\nfor fd in range(3, 30):\n"
        "    try: os.write(fd, b'garbage ' * 10)\n    except OSError: pass\n"
        "while True: pass",
    ],
)
async def test_a_cell_that_ruins_the_sockets_costs_only_the_namespace(code: str) -> None:
    async with host.started() as mine:
        ended = await mine.run(code)
        assert ended.outcome == "namespace_lost"
        assert (await mine.run("1 + 1")).text == "2\n"


async def test_a_new_interpreter_has_the_seed_of_the_old() -> None:
    async with host.started() as mine:
        first = (await mine.run("import random; print(hash('x'), random.random())")).text
        await mine.run("import os; os._exit(0)")
        assert (await mine.run("import random; print(hash('x'), random.random())")).text == first


async def test_siblings_differ_and_a_lease_can_ask_for_a_seed() -> None:
    code = "import random; print(hash('x'), random.random())"
    async with host.started() as one, host.started() as other:
        assert one.hello.hash_seed != other.hello.hash_seed
        text = (await one.run(code)).text
        assert text != (await other.run(code)).text
    lease = sandbox_pb2.Lease()
    lease.CopyFrom(host.LEASE)
    lease.hash_seed = one.hello.hash_seed
    async with host.started(lease=lease) as again:
        assert (await again.run(code)).text == text


async def test_the_worker_ends_with_the_stream_and_takes_everything_along() -> None:
    async with host.started() as mine:
        pids = (
            await mine.run(
                "import os, subprocess; print(os.getpid(), subprocess.Popen(['sleep', '1000']).pid)"
            )
        ).text.split()
        mine.close_stream()
        assert await asyncio.wait_for(mine.process.wait(), 5) == 0
        await eventually(lambda: not any(alive(int(pid)) for pid in pids))


async def test_an_orphan_of_a_cell_dies_with_the_interpreter() -> None:
    async with host.started() as mine:
        ended = await mine.run(
            "import subprocess\nsubprocess.run(['sh', '-c', 'sleep 1000 & echo $!'], check=True)\n"
        )
        orphan = int(ended.text.splitlines()[0])
        await mine.run("import os; os._exit(0)")
        await eventually(lambda: not alive(orphan))


async def never(request: object) -> str:
    await asyncio.Event().wait()
    return ""


async def eventually(condition: "object") -> None:
    assert callable(condition)
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
