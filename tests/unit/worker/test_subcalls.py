"""Sub-calls and child runs, from a cell to a real broker service and back."""

import asyncio
import json

import grpc
import pytest
from rlm_proto.v1 import broker_pb2, sandbox_pb2, types_pb2

from tests.unit.worker import host
from tests.unit.worker.host import Host, Refusal

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def test_a_batch_keeps_its_order_and_its_window(shared: Host) -> None:
    async def slower_first(request: broker_pb2.CompleteRequest) -> str:
        await asyncio.sleep(0.05 if request.prompt == b"0" else 0.005)
        return request.prompt.decode()

    shared.broker.complete = slower_first
    ended = await shared.run("llm_query_batched(str(i) for i in range(300)) == [str(i) for i in range(300)]")
    assert ended.text == "True\n"
    # The host's window is 4; a busy machine need not fill it.
    assert 1 < shared.broker.most_in_flight <= 4
    assert len({request.call_id for request in shared.broker.asked}) == 300


async def test_arguments_reach_the_broker(shared: Host) -> None:
    await shared.run("llm_query('é\\ud800', model='big', max_tokens=7)")
    await shared.run("llm_query('plain')")
    first, second = shared.broker.asked
    assert (first.prompt.decode(), first.model, first.max_tokens) == ("é?", "big", 7)
    assert (second.model, second.HasField("max_tokens")) == ("", False)


async def test_a_budget_refusal_is_an_exception_with_amounts(shared: Host) -> None:
    detail = types_pb2.ErrorDetail(
        reason=types_pb2.ERROR_REASON_BUDGET_EXCEEDED,
        message="the run tree has 10 tokens left and 500 are wanted",
        shortfall=types_pb2.BudgetShortfall(
            account="run tree", wanted=types_pb2.Amounts(tokens=500), left=types_pb2.Amounts(tokens=10)
        ),
    )

    async def refuse(request: broker_pb2.CompleteRequest) -> str:
        raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, detail)

    shared.broker.complete = refuse
    ended = await shared.run(
        "try:\n    llm_query('x')\nexcept BudgetExceeded as e:\n"
        "    import pickle; e = pickle.loads(pickle.dumps(e))\n"
        "    print(e, e.account, e.wanted['tokens'], e.left['tokens'])"
    )
    assert ended.text == "the run tree has 10 tokens left and 500 are wanted run tree 500 10\n"
    ended = await shared.run("llm_query('x')")
    assert ended.outcome == "error"
    assert ended.traceback.splitlines()[-1].endswith("10 tokens left and 500 are wanted")
    assert "names.py" not in ended.traceback


@pytest.mark.parametrize(
    ("status", "reason", "exception"),
    [
        (grpc.StatusCode.FAILED_PRECONDITION, "DEPTH_EXCEEDED", "DepthExceeded"),
        (grpc.StatusCode.FAILED_PRECONDITION, "NOT_EXECUTING", "NotExecuting"),
        (grpc.StatusCode.UNAVAILABLE, "MODEL_FAILED", "ModelFailed"),
        (grpc.StatusCode.PERMISSION_DENIED, "MODEL_NOT_ALLOWED", "ModelNotAllowed"),
        (grpc.StatusCode.ABORTED, "CHILD_RUN_FAILED", "ChildRunFailed"),
        (grpc.StatusCode.CANCELLED, "CANCELLED", "SubCallCancelled"),
        (grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED", "DeadlineExceeded"),
        (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_REQUEST", "InvalidRequest"),
        (grpc.StatusCode.INTERNAL, "INTERNAL", "SubCallError"),
        (grpc.StatusCode.INTERNAL, None, "SubCallError"),
        (grpc.StatusCode.OUT_OF_RANGE, None, "InvalidRequest"),
    ],
)
async def test_each_reason_has_its_exception(
    shared: Host, status: grpc.StatusCode, reason: str | None, exception: str
) -> None:
    async def refuse(request: broker_pb2.CompleteRequest) -> str:
        value = types_pb2.ErrorReason.Value(f"ERROR_REASON_{reason}") if reason else 0
        detail = types_pb2.ErrorDetail(reason=value, message="why")  # type: ignore[arg-type]
        raise Refusal(status, detail if reason else None)

    shared.broker.complete = refuse
    ended = await shared.run("try: llm_query('x')\nexcept SubCallError as e: print(type(e).__name__)")
    assert ended.text == f"{exception}\n"


async def test_back_pressure_is_waited_out_under_the_same_call_id(shared: Host) -> None:
    refused = 0

    async def busy_at_first(request: broker_pb2.CompleteRequest) -> str:
        nonlocal refused
        if refused < 3:
            refused += 1
            raise Refusal(grpc.StatusCode.RESOURCE_EXHAUSTED)
        return "at last"

    shared.broker.complete = busy_at_first
    assert (await shared.run("llm_query('x')")).text == "'at last'\n"
    assert len({request.call_id for request in shared.broker.asked}) == 1


async def test_errors_can_be_returned_in_place(shared: Host) -> None:
    async def odd_fails(request: broker_pb2.CompleteRequest) -> str:
        if int(request.prompt) % 2:
            raise Refusal(grpc.StatusCode.INTERNAL)
        return request.prompt.decode()

    shared.broker.complete = odd_fails
    ended = await shared.run("[type(a).__name__ for a in llm_query_batched(list('0123'), on_error='return')]")
    assert ended.text == "['Reply', 'SubCallError', 'Reply', 'SubCallError']\n"
    before = len(shared.broker.asked)
    ended = await shared.run("llm_query_batched([str(i) for i in range(1000)])")
    assert ended.outcome == "error"
    assert len(shared.broker.asked) - before < 20


async def test_a_large_prompt_and_a_too_large_one(shared: Host) -> None:
    ended = await shared.run("len(llm_query('é' * 2_000_000))")
    assert ended.text == f"{2_000_000 + len('echo: ')}\n"
    ended = await shared.run("llm_query('é' * 6_000_000)")
    assert "InvalidRequest: a prompt of 12,000,000 bytes; this run allows 10,000,000" in ended.traceback


@pytest.mark.parametrize(
    "code",
    [
        "llm_query(3)",
        "llm_query_batched('one string')",
        "llm_query_batched(['a', None])",
        "rlm_query('q', 5)",
        "rlm_query('q', {1: 'x'})",
        "rlm_query('q', ['x', b'y'])",
        "rlm_query_batched(['q'], 'context')",
    ],
)
async def test_arguments_of_a_wrong_type_are_refused_at_once(shared: Host, code: str) -> None:
    ended = await shared.run(code)
    assert "TypeError" in ended.traceback
    assert shared.broker.asked == []
    assert shared.broker.children == []


async def test_calls_work_from_threads_and_not_between_cells(shared: Host) -> None:
    async def slowly(request: broker_pb2.CompleteRequest) -> str:
        await asyncio.sleep(0.02)
        return await host.echo(request)

    shared.broker.complete = slowly
    ended = await shared.run(
        "from concurrent.futures import ThreadPoolExecutor\n"
        "with ThreadPoolExecutor(20) as pool: print(sorted(pool.map(llm_query, 'abcdefghij' * 5))[0])"
    )
    assert ended.text == "echo: a\n"
    assert shared.broker.most_in_flight == 4
    await shared.run(
        "import threading, time\nseen = []\ndef late():\n"
        "    time.sleep(0.2)\n    try: llm_query('late')\n    except NotExecuting as e: seen.append(e)\n"
        "thread = threading.Thread(target=late); thread.start()"
    )
    await asyncio.sleep(0.5)
    assert "no cell is running" in (await shared.run("thread.join(); seen")).text


async def test_a_call_of_a_thread_ends_with_its_cell(shared: Host) -> None:
    shared.broker.complete = forever
    await shared.run(
        "import threading, time\nseen = []\ndef ask():\n    try: llm_query('x')\n"
        "    except SubCallCancelled as e: seen.append(e)\n"
        "thread = threading.Thread(target=ask); thread.start(); time.sleep(0.2)"
    )
    assert "has ended" in (await shared.run("thread.join(); seen")).text
    await shared.settled()


async def test_async_calls_run_side_by_side_and_can_be_cancelled(shared: Host) -> None:
    ended = await shared.run(
        "import asyncio\nawait asyncio.gather(*[allm_query(str(i)) for i in range(3)], arlm_query('q'))"
    )
    assert ended.text == "['echo: 0', 'echo: 1', 'echo: 2', 'child answer']\n"
    shared.broker.complete = forever
    ended = await shared.run(
        "try:\n    await asyncio.wait_for(allm_query('x'), 0.1)\nexcept TimeoutError: print('gave up')\n"
        "await asyncio.sleep(0.1)"
    )
    assert ended.text == "gave up\n"
    assert shared.broker.cancelled == 1
    shared.broker.complete = host.echo
    assert (await shared.run("await allm_query_batched(['a'])")).text == "['echo: a']\n"


CONTEXTS = [
    ("rlm_query('why?')", "inline", b"why?"),
    ("rlm_query('q', 'text é')", "inline", "text é".encode()),
    ("rlm_query('q', '')", "inline", b""),
]


@pytest.mark.parametrize(("code", "form", "data"), CONTEXTS)
async def test_a_small_child_context_travels_in_the_request(
    shared: Host, code: str, form: str, data: bytes
) -> None:
    assert (await shared.run(code)).text == "'child answer'\n"
    (request,) = shared.broker.children
    assert request.WhichOneof("context") == form
    assert request.inline == data


async def test_the_context_itself_is_passed_by_reference() -> None:
    async with host.started("long é text") as mine:
        await mine.run("rlm_query('q', context, max_tokens=5)")
        (request,) = mine.broker.children
        assert (request.range.path, request.range.start_byte, request.range.end_byte) == (b"", 0, 12)
        assert request.max_tokens == 5


async def test_files_are_passed_by_reference() -> None:
    async with host.started({"a.txt": "é1", "b/c.txt": "two", "d.txt": "three"}) as mine:
        ended = await mine.run(
            "rlm_query_batched([('q', context[:2]), ('q', context['b/c.txt']), ('q', context), ('q', 'two')])"
        )
        assert ended.text == f"{['child answer'] * 4}\n"
        forms = {request.WhichOneof("context"): request for request in mine.broker.children}
        runs = sorted(list(request.files.runs) for request in mine.broker.children if request.files.runs)
        assert runs == [[0, 2], [0, 3]]
        assert (forms["range"].range.path, forms["range"].range.end_byte) == (b"b/c.txt", 3)


async def test_a_part_of_a_large_text_is_passed_by_reference() -> None:
    lease = sandbox_pb2.Lease()
    lease.CopyFrom(host.LEASE)
    lease.max_str_bytes = 1000
    async with host.started("é" * 3000 + "x" * 3000, lease) as mine:
        ended = await mine.run("part = context[1000:5000]; print(type(part).__name__); rlm_query('q', part)")
        assert ended.text == "TextView\n'child answer'\n", ended.traceback
        (request,) = mine.broker.children
        assert (request.range.start_byte, request.range.end_byte) == (2000, 6000 + 2000)


async def test_a_large_text_and_files_are_uploaded(shared: Host) -> None:
    shared.broker.child = upload_id_of
    assert (await shared.run("text = 'é' * 1_500_000; rlm_query('q', text)")).text == "'upload-1'\n"
    (parts,) = shared.broker.uploads
    assert b"".join(part.data for part in parts).decode() == "é" * 1_500_000
    assert not any(part.WhichOneof("part") == "file_path" for part in parts)
    code = "files = {f'f{i}.txt': str(i) * i for i in range(3000)}; rlm_query('q', files)"
    assert (await shared.run(code)).text == "'upload-2'\n"
    assert files_of(shared.broker.uploads[1]) == {f"f{i}.txt": str(i) * i for i in range(3000)}
    assert (await shared.run("rlm_query('q', ['a', '', 'c'])")).text == "'upload-3'\n"
    assert files_of(shared.broker.uploads[2]) == {"0000.txt": "a", "0001.txt": "", "0002.txt": "c"}


async def test_many_uploads_at_once_do_not_lock_the_window() -> None:
    lease = sandbox_pb2.Lease()
    lease.CopyFrom(host.LEASE)
    lease.max_concurrent_calls = 1
    async with host.started(lease=lease) as mine:
        code = (
            "from concurrent.futures import ThreadPoolExecutor\n"
            "def one(i): return rlm_query('q', 'x' * 3_000_000) if i % 2 else llm_query('q')\n"
            "with ThreadPoolExecutor(6) as pool: print(len(list(pool.map(one, range(6)))))"
        )
        assert (await asyncio.wait_for(mine.run(code), 20)).text == "6\n"


async def test_a_child_answer_may_be_long(shared: Host) -> None:
    shared.broker.child = long_answer
    assert (await shared.run("rlm_query('q') == 'é' * 3_000_000")).text == "True\n"


async def test_budget_tells_what_is_left(shared: Host) -> None:
    ended = await shared.run("import json; print(json.dumps(budget()))")
    assert json.loads(ended.text) == {
        "tokens": 1234,
        "cost_microusd": None,
        "calls": None,
        "child_runs": None,
        "levels_below": 2,
        "deadline_s": 60.0,
    }


async def forever(request: object) -> str:
    await asyncio.Event().wait()
    return ""


async def upload_id_of(request: broker_pb2.StartChildRunRequest) -> bytes:
    return request.upload_id.encode()


async def long_answer(request: broker_pb2.StartChildRunRequest) -> bytes:
    return ("é" * 3_000_000).encode()


def files_of(parts: list[broker_pb2.UploadContextRequest]) -> dict[str, str]:
    files: dict[str, str] = {}
    path = ""
    for part in parts:
        if part.WhichOneof("part") == "file_path":
            path = part.file_path.decode()
            files[path] = ""
        else:
            files[path] += part.data.decode()
    return files


async def test_prompts_with_a_long_common_beginning_wait_for_the_first_which_fills_the_cache(
    shared: Host,
) -> None:
    finished: list[str] = []

    async def answer(request: broker_pb2.CompleteRequest) -> str:
        own = request.prompt.decode()[-1]
        seen_before = list(finished)
        await asyncio.sleep(0.02)
        finished.append(own)
        assert request.shared_prefix_bytes == 20_000
        return f"{own} after {len(seen_before)}"

    shared.broker.complete = answer
    ended = await shared.run("llm_query_batched(['x' * 20_000 + mark for mark in 'abcd'])")
    assert finished[0] == "a"
    assert ended.text == "['a after 0', 'b after 1', 'c after 1', 'd after 1']\n"


async def test_prompts_without_one_go_out_at_once(shared: Host) -> None:
    shared_bytes: list[int] = []

    async def answer(request: broker_pb2.CompleteRequest) -> str:
        shared_bytes.append(request.shared_prefix_bytes)
        return "ok"

    shared.broker.complete = answer
    await shared.run("llm_query_batched(['x' * 1_000 + mark for mark in 'abcd'])")
    await shared.run("llm_query_batched(['x' * 20_000 + mark for mark in 'ab'])")
    assert shared_bytes == [0] * 6
