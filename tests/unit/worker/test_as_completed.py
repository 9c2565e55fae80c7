"""Sub-calls whose answers are taken as they come, from a cell to a real broker service and back."""

import asyncio

import grpc
import pytest
from rlm_proto.v1 import broker_pb2

from tests.unit.worker import host
from tests.unit.worker.host import Host, Refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")

WINDOW = host.LEASE.max_concurrent_calls


async def slower_first(request: broker_pb2.CompleteRequest) -> str:
    await asyncio.sleep(0.3 if request.prompt == b"0" else 0.005)
    return request.prompt.decode()


async def forever(request: broker_pb2.CompleteRequest) -> str:
    await asyncio.Event().wait()
    return ""


async def odd_fails(request: broker_pb2.CompleteRequest) -> str:
    if int(request.prompt) % 2:
        raise Refusal(grpc.StatusCode.INTERNAL)
    return request.prompt.decode()


async def test_answers_come_as_they_come_each_with_its_place(shared: Host) -> None:
    shared.broker.complete = slower_first
    ended = await shared.run(
        "came = list(llm_query_as_completed(str(i) for i in range(40)))\n"
        "print(sorted(came) == [(i, str(i)) for i in range(40)], came[-1][0] == 0, came[0][0] != 0)"
    )
    assert ended.text == "True True True\n", ended.traceback
    assert shared.broker.most_in_flight <= WINDOW


async def test_a_cell_that_is_slow_to_take_answers_holds_the_calls_up(shared: Host) -> None:
    ended = await shared.run(
        "import time\ndrawn = 0\n"
        "def endless():\n    global drawn\n    while True:\n        yield str(drawn)\n        drawn += 1\n"
        "answers = llm_query_as_completed(endless())\n"
        "for taken in range(1, 6): next(answers); time.sleep(0.1)\n"
        "print(drawn - taken)"
    )
    assert int(ended.text) <= 2 * WINDOW, ended.traceback


async def test_leaving_the_loop_starts_nothing_more_and_gives_up_what_is_under_way(shared: Host) -> None:
    async def only_the_first(request: broker_pb2.CompleteRequest) -> str:
        return "first" if request.prompt == b"0" else await forever(request)

    shared.broker.complete = only_the_first
    ended = await shared.run(
        "for place, answer in llm_query_as_completed(map(str, range(1_000))):\n    break\n"
        "print(place, answer)"
    )
    assert ended.text == "0 first\n", ended.traceback
    await shared.settled()
    assert len(shared.broker.asked) <= 1 + 2 * WINDOW
    shared.broker.complete = host.echo
    assert (await shared.run("llm_query('x')")).text == "'echo: x'\n"


async def test_the_first_error_is_raised_or_errors_stand_in_place(shared: Host) -> None:
    shared.broker.complete = odd_fails
    ended = await shared.run(
        "came = dict(llm_query_as_completed(map(str, range(6)), on_error='return'))\n"
        "[type(came[i]).__name__ for i in range(6)]"
    )
    assert ended.text == f"{['Reply', 'SubCallError'] * 3}\n"
    before = len(shared.broker.asked)
    ended = await shared.run("for place, answer in llm_query_as_completed(map(str, range(1_000))): pass")
    assert ended.traceback.splitlines()[-1].startswith("SubCallError")
    await shared.settled()
    assert len(shared.broker.asked) - before < 20


async def test_a_thread_that_waits_uses_no_cpu(shared: Host) -> None:
    async def slowly(request: broker_pb2.CompleteRequest) -> str:
        await asyncio.sleep(1.0)
        return "late"

    shared.broker.complete = slowly
    ended = await shared.run(
        "import time\nbegan = time.process_time()\n"
        "print(len(list(llm_query_as_completed('abcd'[i] for i in range(4)))),"
        " time.process_time() - began < 0.5)"
    )
    assert ended.text == "4 True\n", ended.traceback


async def test_the_prompts_may_be_code_of_the_cell_that_makes_calls_itself_or_fails(shared: Host) -> None:
    ended = await shared.run(
        "def twice():\n    for i in range(10): yield llm_query(str(i))\n"
        "sorted(dict(llm_query_as_completed(twice())).values())[0]"
    )
    assert ended.text == "'echo: echo: 0'\n", ended.traceback
    ended = await shared.run(
        "def broken():\n    yield 'a'\n    raise KeyError('mine')\nlist(llm_query_as_completed(broken()))"
    )
    assert ended.traceback.splitlines()[-1] == "KeyError: 'mine'"
    assert (await shared.run("llm_query('x')")).text == "'echo: x'\n"


@pytest.mark.parametrize(
    "code",
    [
        "llm_query_as_completed('one string')",
        "list(llm_query_as_completed(['a', None]))",
        "rlm_query_as_completed('one string')",
        "list(rlm_query_as_completed(['q', 'r'], [5, 6]))",
    ],
)
async def test_arguments_of_a_wrong_type_are_refused(shared: Host, code: str) -> None:
    assert "TypeError" in (await shared.run(code)).traceback


async def test_an_interrupt_ends_the_wait_and_the_calls(shared: Host) -> None:
    shared.broker.complete = forever
    shared.start("list(llm_query_as_completed(map(str, range(100))))")
    while not shared.broker.in_flight:  # noqa: ASYNC110 - a few milliseconds, in a test
        await asyncio.sleep(0.01)
    shared.interrupt()
    assert (await shared.end()).outcome == "interrupted"
    await shared.settled()
    shared.broker.complete = host.echo
    assert (await shared.run("list(llm_query_as_completed(['x']))")).text == "[(0, 'echo: x')]\n"


async def test_child_runs_are_taken_as_they_end(shared: Host) -> None:
    ended = await shared.run("sorted(rlm_query_as_completed(['q', 'r'], ['one', 'two']))")
    assert ended.text == "[(0, 'child answer'), (1, 'child answer')]\n", ended.traceback
    assert {(child.question, child.inline) for child in shared.broker.children} == {
        (b"q", b"one"),
        (b"r", b"two"),
    }
    ended = await shared.run("sorted(rlm_query_as_completed([('q', 'one'), 'r']))")
    assert ended.text == "[(0, 'child answer'), (1, 'child answer')]\n", ended.traceback


async def test_both_have_async_twins(shared: Host) -> None:
    ended = await shared.run(
        "print(sorted([found async for found in allm_query_as_completed('abc'[i] for i in range(3))]))\n"
        "print([found async for found in arlm_query_as_completed(['q'])])"
    )
    assert ended.text == "[(0, 'echo: a'), (1, 'echo: b'), (2, 'echo: c')]\n[(0, 'child answer')]\n"
    shared.broker.complete = forever
    ended = await shared.run(
        "import asyncio\n"
        "async def first():\n    async for found in allm_query_as_completed(['x']): return found\n"
        "try:\n    await asyncio.wait_for(first(), 0.1)\nexcept TimeoutError: print('gave up')\n"
        "await asyncio.sleep(0.1)"
    )
    assert ended.text == "gave up\n", ended.traceback
    await shared.settled()


async def test_prompts_of_a_list_with_a_long_common_beginning_wait_for_the_first(shared: Host) -> None:
    finished: list[str] = []

    async def answer(request: broker_pb2.CompleteRequest) -> str:
        seen_before = len(finished)
        await asyncio.sleep(0.02)
        finished.append(request.prompt.decode()[-1])
        assert request.shared_prefix_bytes == 20_000
        return f"after {seen_before}"

    shared.broker.complete = answer
    ended = await shared.run("sorted(llm_query_as_completed(['x' * 20_000 + mark for mark in 'abcd']))")
    assert ended.text == "[(0, 'after 0'), (1, 'after 1'), (2, 'after 1'), (3, 'after 1')]\n"


async def test_long_prompts_in_flight_have_a_limit_together(shared: Host) -> None:
    async def slowly(request: broker_pb2.CompleteRequest) -> str:
        await asyncio.sleep(0.05)
        return str(len(request.prompt))

    shared.broker.complete = slowly
    ended = await shared.run("set(llm_query_batched(chr(97 + i) * 6_000_000 for i in range(6)))")
    assert ended.text == "{'6000000'}\n", ended.traceback
    assert shared.broker.most_in_flight <= 2


async def test_however_many_long_prompts_are_generated_memory_holds_few(shared: Host) -> None:
    ended = await shared.run(
        "import resource\n"
        "def most(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024\n"
        "before = most()\n"
        "for _, answer in llm_query_as_completed(chr(97 + i % 26) * 1_000_000 for i in range(200)): pass\n"
        "most() - before"
    )
    # A window of prompts with their encoded form, and as many answers: some tens of MB, of 400.
    assert int(ended.text) < 100, ended.traceback
